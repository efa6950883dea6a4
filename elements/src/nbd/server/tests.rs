//! Byte scripts: what a client sends, and what it must hear.

use super::*;
use crate::nbd::meta::{ALLOCATION, encode_queries};
use crate::nbd::wire::{
    Info, OptionCode, OptionHeader, OptionReply, ReplyCode, decode_option_reply, encode_option,
};
use proptest::prelude::*;
use std::cell::Cell;
use tokio::io::{AsyncReadExt, DuplexStream, duplex};

/// Two exports that are listed and one that is hidden; counts look-ups.
#[derive(Default)]
pub(in crate::nbd) struct Shelf {
    finds: Cell<u32>,
    closing: bool,
}

const FLAGS: TransmissionFlags = TransmissionFlags(0b1_1101_1110_1101);

impl Exports for Shelf {
    type Handle = u32;

    fn list(&self) -> Vec<Listed> {
        let listed =
            |name: &str, description: &str| Listed { name: name.into(), description: description.into() };
        vec![listed("", ""), listed("disk", "the disk")]
    }

    fn find(&self, name: &str) -> Option<Export<u32>> {
        self.finds.set(self.finds.get() + 1);
        let handle = match name {
            "" => 0,
            "disk" => 1,
            "hidden" => 2,
            _ => return None,
        };
        let info = ExportInfo {
            name: name.into(),
            description: if handle == 1 { "the disk".into() } else { String::new() },
            size: 1 << 20,
            flags: FLAGS,
            blocks: BlockSizes { minimum: if handle == 2 { 512 } else { 1 }, ..BlockSizes::default() },
            contexts: vec![ALLOCATION.into(), "x-mason:dirty".into()],
        };
        Some(Export { handle, info })
    }

    fn is_closing(&self) -> bool {
        self.closing
    }
}

type Outcome = Result<Option<Negotiated<DuplexStream, u32>>, HandshakeError>;

/// Everything the client side of one connection sends, and the replies to it.
struct Script(Vec<u8>);

impl Script {
    fn new() -> Script {
        Script::with_flags(3)
    }

    fn with_flags(flags: u32) -> Script {
        Script(flags.to_be_bytes().to_vec())
    }

    fn option(mut self, option: OptionCode, data: &[u8]) -> Script {
        self.0.extend(encode_option(&OptionHeader { option, len: data.len() as u32 }));
        self.0.extend(data);
        self
    }

    fn empty(self, option: OptionCode) -> Script {
        self.option(option, &[])
    }

    fn go(self, name: &str) -> Script {
        self.option(OptionCode::GO, &info_data(name, &[]))
    }

    fn set_context(self, name: &str, queries: &[&str]) -> Script {
        self.option(OptionCode::SET_META_CONTEXT, &encode_queries(name, queries))
    }

    /// Runs the script against `shelf`: the outcome and all that came back after the greeting.
    fn run_on(self, shelf: &Shelf) -> (Outcome, Vec<u8>) {
        let (near, far) = duplex(1 << 20);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async move {
            let (mut read, mut write) = tokio::io::split(near);
            let talk = async {
                // A server that hangs up early is part of the game.
                let _ = write.write_all(&self.0).await;
                let _ = write.shutdown().await;
            };
            let serve = async {
                let mut outcome = negotiate(far, shelf, &TlsPolicy::Off).await;
                if let Ok(Some(negotiated)) = &mut outcome {
                    negotiated.stream.shutdown().await.unwrap();
                }
                outcome
            };
            let mut heard = Vec::new();
            let (outcome, (), read) = tokio::join!(serve, talk, read.read_to_end(&mut heard));
            read.unwrap();
            let greeting = [&MAGIC_INIT.to_be_bytes()[..], &MAGIC_OPTION.to_be_bytes(), &[0, 3]].concat();
            assert_eq!(heard[..18], greeting);
            (outcome, heard.split_off(18))
        })
    }

    fn run(self) -> (Outcome, Vec<Heard>) {
        let (outcome, bytes) = self.run_on(&Shelf::default());
        (outcome, replies(&bytes))
    }

    /// The reply codes of a script.
    fn codes(self) -> Vec<ReplyCode> {
        self.run().1.into_iter().map(|heard| heard.code).collect()
    }

    fn negotiated(self) -> Negotiated<DuplexStream, u32> {
        self.run_on(&Shelf::default()).0.unwrap().unwrap()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Heard {
    option: OptionCode,
    code: ReplyCode,
    data: Vec<u8>,
}

fn replies(mut bytes: &[u8]) -> Vec<Heard> {
    let mut heard = Vec::new();
    while let Some((header, rest)) = bytes.split_first_chunk::<20>() {
        let OptionReply { option, code, len } = decode_option_reply(header).unwrap();
        let (data, rest) = rest.split_at(len as usize);
        heard.push(Heard { option, code, data: data.to_vec() });
        bytes = rest;
    }
    assert!(bytes.is_empty(), "{bytes:?}");
    heard
}

fn info_data(name: &str, infos: &[Info]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|info| data.extend(info.0.to_be_bytes()));
    data
}

const ACK: ReplyCode = ReplyCode::ACK;
const CONTEXT: ReplyCode = ReplyCode::META_CONTEXT;
const INVALID: ReplyCode = ReplyCode::ERR_INVALID;

fn assert_dropped(script: Script) {
    let (outcome, _) = script.run();
    assert!(matches!(outcome, Err(HandshakeError::Protocol(_))), "{outcome:?}");
}

#[test]
fn export_name_ends_the_handshake() {
    for (flags, zeroes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let script = Script::with_flags(flags).option(OptionCode::EXPORT_NAME, b"disk");
        let (outcome, bytes) = script.run_on(&Shelf::default());
        let negotiated = outcome.unwrap().unwrap();
        assert_eq!(negotiated.export.handle, 1);
        assert_eq!(negotiated.style, ReplyStyle::Simple);
        let flags = FLAGS.without(TransmissionFlags::SEND_DF | TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        assert_eq!(negotiated.flags, flags);
        let expected = [&(1_u64 << 20).to_be_bytes()[..], &flags.0.to_be_bytes(), &vec![0; zeroes]].concat();
        assert_eq!(bytes, expected);
    }
}

#[test]
fn what_export_name_cannot_say_costs_the_connection() {
    assert_dropped(Script::new().option(OptionCode::EXPORT_NAME, b"nothing"));
    assert_dropped(Script::new().option(OptionCode::EXPORT_NAME, b"\xff"));
    assert_dropped(Script::new().option(OptionCode::EXPORT_NAME, &[b'a'; 70_000]));
    assert_dropped(
        Script::new().empty(OptionCode::EXTENDED_HEADERS).option(OptionCode::EXPORT_NAME, b"disk"),
    );
}

#[test]
fn unknown_client_flags_cost_the_connection() {
    assert_dropped(Script::with_flags(4).go("disk"));
    assert_dropped(Script::with_flags(1 << 31).go("disk"));
}

#[test]
fn a_client_without_fixed_newstyle_has_one_option() {
    assert_dropped(Script::with_flags(0).go("disk"));
    assert_dropped(Script::with_flags(2).empty(OptionCode::ABORT));
}

#[test]
fn a_wrong_option_magic_costs_the_connection() {
    let mut script = Script::new();
    script.0.extend([0x55; 16]);
    assert_dropped(script);
}

#[test]
fn go_describes_and_begins() {
    let wanted = [Info::NAME, Info::BLOCK_SIZE, Info::DESCRIPTION, Info(99), Info::EXPORT];
    let script = Script::new().option(OptionCode::GO, &info_data("disk", &wanted));
    let (outcome, heard) = script.run();
    assert_eq!(outcome.unwrap().unwrap().export.handle, 1);
    let data: Vec<_> = heard.iter().map(|heard| (heard.code, heard.data.as_slice())).collect();
    let expected: [(ReplyCode, &[u8]); 5] = [
        (ReplyCode::INFO, &[0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0x0d, 0x6d]),
        (ReplyCode::INFO, b"\0\x01disk"),
        (ReplyCode::INFO, b"\0\x02the disk"),
        (ReplyCode::INFO, &[0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 4, 0, 0, 0]),
        (ACK, &[]),
    ];
    assert_eq!(data, expected);
    assert!(heard.iter().all(|heard| heard.option == OptionCode::GO));
}

#[test]
fn the_next_byte_after_go_belongs_to_the_transmission_phase() {
    let mut script = Script::new().go("");
    script.0.extend(b"request");
    let mut negotiated = script.negotiated();
    assert_eq!(negotiated.export.handle, 0);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let mut rest = Vec::new();
    runtime.block_on(negotiated.stream.read_to_end(&mut rest)).unwrap();
    assert_eq!(rest, b"request");
}

#[test]
fn a_minimum_block_is_mentioned_unasked() {
    let codes = Script::new().go("hidden").codes();
    assert_eq!(codes, [ReplyCode::INFO, ReplyCode::INFO, ACK]);
}

#[test]
fn info_leaves_the_handshake_going_and_go_repeats_it() {
    let shelf = Shelf::default();
    let data = info_data("disk", &[]);
    let script = Script::new().option(OptionCode::INFO, &data).option(OptionCode::GO, &data);
    let (outcome, bytes) = script.run_on(&shelf);
    assert!(outcome.unwrap().is_some());
    let heard = replies(&bytes);
    assert_eq!(heard[0].data, heard[2].data);
    assert_eq!(shelf.finds.get(), 1, "GO answers from what INFO found");
    let other = Script::new().option(OptionCode::INFO, &data).go("hidden");
    assert_eq!(other.negotiated().export.handle, 2);
}

#[test]
fn an_unknown_export_is_an_error_and_no_end() {
    let script = Script::new().go("nothing").option(OptionCode::INFO, &info_data("nowhere", &[])).go("disk");
    let unknown = ReplyCode::ERR_UNKNOWN;
    assert_eq!(script.codes(), [unknown, unknown, ReplyCode::INFO, ACK]);
}

#[test]
fn malformed_info_is_refused() {
    let good = info_data("disk", &[Info::NAME]);
    let mut script = Script::new();
    for cut in 0..good.len() {
        script = script.option(OptionCode::GO, &good[..cut]);
    }
    let mut long = good.clone();
    long.push(0);
    script = script.option(OptionCode::INFO, &long);
    script = script.option(OptionCode::INFO, &info_data("di\0sk", &[]));
    script = script.option(OptionCode::INFO, &info_data(&"a".repeat(4097), &[]));
    script = script.option(OptionCode::INFO, &[0xff; 12]);
    let (outcome, heard) = script.run();
    assert!(matches!(outcome, Err(HandshakeError::Io(_))));
    assert_eq!(heard.len(), good.len() + 4);
    assert!(heard.iter().all(|heard| heard.code == INVALID));
}

#[test]
fn list_shows_what_is_not_hidden() {
    let (outcome, heard) = Script::new().empty(OptionCode::LIST).empty(OptionCode::ABORT).run();
    assert!(outcome.unwrap().is_none());
    let data: Vec<_> = heard.iter().map(|heard| (heard.code, heard.data.as_slice())).collect();
    let expected: [(ReplyCode, &[u8]); 4] = [
        (ReplyCode::SERVER, &[0, 0, 0, 0]),
        (ReplyCode::SERVER, b"\0\0\0\x04diskthe disk"),
        (ACK, &[]),
        (ACK, &[]),
    ];
    assert_eq!(data, expected);
}

#[test]
fn abort_is_acknowledged_whatever_comes_with_it() {
    let (outcome, heard) = Script::new().option(OptionCode::ABORT, &[7; 100_000]).run();
    assert!(outcome.unwrap().is_none());
    assert_eq!(heard, [Heard { option: OptionCode::ABORT, code: ACK, data: Vec::new() }]);
}

#[test]
fn options_without_data_refuse_data() {
    let options =
        [OptionCode::LIST, OptionCode::STARTTLS, OptionCode::STRUCTURED_REPLY, OptionCode::EXTENDED_HEADERS];
    for option in options {
        let script = Script::new().option(option, b"x").go("disk");
        let (outcome, heard) = script.run();
        assert_eq!(heard[0].code, INVALID, "{option}");
        assert_eq!(outcome.unwrap().unwrap().style, ReplyStyle::Simple);
    }
}

#[test]
fn unknown_options_are_answered_and_drained() {
    let script = Script::new()
        .option(OptionCode(4), b"peek")
        .option(OptionCode(0), &[1; 300_000])
        .option(OptionCode(u32::MAX), &[])
        .go("disk");
    let unsup = ReplyCode::ERR_UNSUP;
    assert_eq!(script.codes(), [unsup, unsup, unsup, ReplyCode::INFO, ACK]);
}

#[test]
fn a_long_option_is_drained_and_an_absurd_one_dropped() {
    let long = vec![0; MAX_DRAIN as usize / 64];
    let script = Script::new().option(OptionCode::GO, &long).option(OptionCode::LIST_META_CONTEXT, &long);
    let too_big = ReplyCode::ERR_TOO_BIG;
    assert_eq!(script.go("disk").codes(), [too_big, too_big, ReplyCode::INFO, ACK]);
    for option in [OptionCode::GO, OptionCode::ABORT, OptionCode(77)] {
        let mut script = Script::new();
        script.0.extend(encode_option(&OptionHeader { option, len: u32::MAX }));
        assert_dropped(script);
    }
}

#[test]
fn a_client_that_never_stops_is_dropped() {
    let mut script = Script::new();
    for _ in 0..MAX_OPTIONS {
        script = script.empty(OptionCode(99));
    }
    assert_dropped(script.go("disk"));
}

#[test]
fn starttls_without_tls_is_a_matter_of_policy() {
    let script = Script::new().empty(OptionCode::STARTTLS).go("disk");
    assert_eq!(script.codes(), [ReplyCode::ERR_POLICY, ReplyCode::INFO, ACK]);
}

#[test]
fn a_closing_server_says_so() {
    let shelf = Shelf { closing: true, ..Shelf::default() };
    let script = Script::new().go("disk").empty(OptionCode::LIST).empty(OptionCode::ABORT);
    let (outcome, bytes) = script.run_on(&shelf);
    assert!(outcome.unwrap().is_none());
    let codes: Vec<_> = replies(&bytes).into_iter().map(|heard| heard.code).collect();
    assert_eq!(codes, [ReplyCode::ERR_SHUTDOWN, ReplyCode::ERR_SHUTDOWN, ACK]);
    let (outcome, _) = Script::new().option(OptionCode::EXPORT_NAME, b"disk").run_on(&shelf);
    assert!(outcome.is_err());
}

#[test]
fn reply_styles_follow_the_strongest_wish() {
    let structured = OptionCode::STRUCTURED_REPLY;
    let extended = OptionCode::EXTENDED_HEADERS;
    let cases: [(&[OptionCode], ReplyStyle, &[ReplyCode]); 5] = [
        (&[], ReplyStyle::Simple, &[]),
        (&[structured, structured], ReplyStyle::Structured, &[ACK, ACK]),
        (&[extended], ReplyStyle::Extended, &[ACK]),
        (&[structured, extended], ReplyStyle::Extended, &[ACK, ACK]),
        (&[extended, structured], ReplyStyle::Extended, &[ACK, ReplyCode::ERR_EXT_HEADER_REQD]),
    ];
    for (options, style, codes) in cases {
        let script = options.iter().fold(Script::new(), |script, &option| script.empty(option)).go("disk");
        let (outcome, heard) = script.run();
        let negotiated = outcome.unwrap().unwrap();
        assert_eq!(negotiated.style, style);
        assert_eq!(negotiated.flags.contains(TransmissionFlags::SEND_DF), style != ReplyStyle::Simple);
        assert!(!negotiated.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
        let heard: Vec<_> = heard.into_iter().map(|heard| heard.code).collect();
        assert_eq!(heard[..codes.len()], *codes);
    }
}

#[test]
fn contexts_need_structured_replies() {
    let data = encode_queries("disk", &[ALLOCATION]);
    let script = Script::new()
        .option(OptionCode::LIST_META_CONTEXT, &data)
        .option(OptionCode::SET_META_CONTEXT, &data)
        .empty(OptionCode::STRUCTURED_REPLY)
        .go("disk");
    let (outcome, heard) = script.run();
    assert_eq!((heard[0].code, heard[1].code), (INVALID, INVALID));
    assert!(outcome.unwrap().unwrap().contexts.is_empty());
}

#[test]
fn contexts_are_listed_and_selected() {
    let script = Script::new()
        .empty(OptionCode::EXTENDED_HEADERS)
        .option(OptionCode::LIST_META_CONTEXT, &encode_queries("disk", &[]))
        .option(OptionCode::LIST_META_CONTEXT, &encode_queries("disk", &["base:"]))
        .set_context("disk", &["base:", "x-mason:dirty", "who:knows"])
        .go("disk");
    let (outcome, heard) = script.run();
    let codes: Vec<_> = heard.iter().map(|heard| heard.code).collect();
    assert_eq!(codes[..8], [ACK, CONTEXT, CONTEXT, ACK, CONTEXT, ACK, CONTEXT, ACK]);
    assert_eq!(heard[2].data, b"\0\0\0\0x-mason:dirty");
    assert_eq!(heard[4].data, b"\0\0\0\0base:allocation");
    assert_eq!(heard[6].data, b"\0\0\0\x01x-mason:dirty");
    let negotiated = outcome.unwrap().unwrap();
    assert_eq!(negotiated.contexts, [Selected { id: 1, name: "x-mason:dirty".into() }]);
    assert!(negotiated.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
    assert!(negotiated.rules().contexts && negotiated.rules().extended);
}

#[test]
fn contexts_count_only_for_the_export_they_were_selected_for() {
    let set = |name| Script::new().empty(OptionCode::STRUCTURED_REPLY).set_context(name, &[ALLOCATION]);
    assert_eq!(set("disk").go("disk").negotiated().contexts.len(), 1);
    assert_eq!(set("disk").option(OptionCode::EXPORT_NAME, b"disk").negotiated().contexts.len(), 1);
    assert!(set("hidden").go("disk").negotiated().contexts.is_empty());
    assert!(set("").go("disk").negotiated().contexts.is_empty());
    assert_eq!(set("disk").go("nothing").go("disk").negotiated().contexts.len(), 1);
}

#[test]
fn a_later_selection_replaces_even_when_it_fails() {
    let set = || Script::new().empty(OptionCode::STRUCTURED_REPLY).set_context("disk", &[ALLOCATION]);
    let failures = [
        set().set_context("disk", &[]),
        set().set_context("nothing", &[ALLOCATION]),
        set().set_context("disk", &["no colon"]),
        set().option(OptionCode::SET_META_CONTEXT, &[1, 2, 3]),
        set().option(OptionCode::SET_META_CONTEXT, &[0; 70_000]),
        set().set_context("disk", &["a:b"; 1025]),
    ];
    for script in failures {
        assert!(script.go("disk").negotiated().contexts.is_empty());
    }
    let listed = set().option(OptionCode::LIST_META_CONTEXT, &encode_queries("disk", &[]));
    assert_eq!(listed.go("disk").negotiated().contexts.len(), 1, "listing changes nothing");
}

/// Options of every kind with data that is right, nearly right or noise.
fn any_option() -> impl Strategy<Value = (u32, Vec<u8>)> {
    let noise = proptest::collection::vec(any::<u8>(), 0..200);
    let info = ("[a-z]{0,5}|disk", proptest::collection::vec(any::<u16>(), 0..4))
        .prop_map(|(name, infos)| info_data(&name, &infos.into_iter().map(Info).collect::<Vec<_>>()));
    let queries =
        prop_oneof![Just("disk"), Just("")].prop_map(|name| encode_queries(name, &["base:", ALLOCATION]));
    let data = prop_oneof![noise, info, queries, Just(Vec::new()), Just(vec![0; 66_000])];
    (prop_oneof![9 => 0..13_u32, 1 => any::<u32>()], data)
}

proptest! {
    /// Whatever comes, the server answers each option it read with a final reply to that option, in
    /// order, and ends with a result.
    #[test]
    fn every_stream_of_options_gets_an_answer(
        flags in prop_oneof![9 => Just(3_u32), 1 => any::<u32>()],
        options in proptest::collection::vec(any_option(), 0..12),
        tail in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut script = Script::with_flags(flags);
        for (option, data) in &options {
            script = script.option(OptionCode(*option), data);
        }
        script.0.extend(tail);
        let (outcome, bytes) = script.run_on(&Shelf::default());
        if options.iter().all(|(option, _)| OptionCode(*option) != OptionCode::EXPORT_NAME) {
            let heard = replies(&bytes);
            let last = |heard: &&Heard| heard.code == ACK || heard.code.is_error();
            let answered = heard.iter().filter(last).map(|heard| heard.option.0);
            prop_assert!(answered.eq(options.iter().map(|(option, _)| *option).take(heard.iter().filter(last).count())));
        }
        if let Ok(Some(negotiated)) = outcome {
            prop_assert!(negotiated.contexts.is_empty() || negotiated.style != ReplyStyle::Simple);
        }
    }

    #[test]
    fn noise_does_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut script = Script::new();
        script.0.extend(bytes);
        let (outcome, _) = script.run_on(&Shelf::default());
        prop_assert!(outcome.is_err());
    }
}
