//! The client against our own server, against servers that exist only as bytes, and against noise.

use super::*;
use crate::nbd::meta::ALLOCATION;
use crate::nbd::server::tests::Shelf;
use crate::nbd::server::{self, Negotiated, TlsPolicy};
use crate::nbd::wire::{OptionReply, encode_option_reply};
use proptest::prelude::*;
use tokio::io::{DuplexStream, duplex};

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

type Ends = (Result<Server<DuplexStream>, HandshakeError>, Option<Negotiated<DuplexStream, u32>>);

fn meet(wanted: &Wanted<'_>) -> Ends {
    let (near, far) = duplex(256);
    block_on(async {
        let shelf = Shelf::default();
        let serve = async { server::negotiate(far, &shelf, &TlsPolicy::Off).await.unwrap() };
        tokio::join!(connect(near, wanted), serve)
    })
}

#[test]
fn both_sides_agree_on_the_same() {
    for style in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
        for contexts in [&[][..], &[ALLOCATION], &["x-mason:dirty", ALLOCATION, "who:knows"]] {
            let wanted = Wanted { export: "disk", style, contexts, tls: ClientTls::Off };
            let (client, server) = meet(&wanted);
            let (client, server) = (client.unwrap(), server.unwrap());
            assert_eq!((client.style, server.style), (style, style));
            assert_eq!(client.flags, server.flags);
            assert_eq!(client.size, server.export.info.size);
            assert_eq!(client.blocks, Some(server.export.info.blocks));
            assert_eq!(client.contexts, server.contexts);
            let expected = if style == ReplyStyle::Simple { 0 } else { contexts.len().min(2) };
            assert_eq!(client.contexts.len(), expected);
        }
    }
}

#[test]
fn an_unknown_export_is_a_polite_end() {
    let (client, server) = meet(&Wanted { export: "nothing", ..Wanted::default() });
    let code = ReplyCode::ERR_UNKNOWN;
    assert!(matches!(client, Err(HandshakeError::Refused { code: heard, .. }) if heard == code));
    assert!(server.is_none(), "the client aborts");
}

#[test]
fn exports_are_listed() {
    let (near, far) = duplex(256);
    let listed = block_on(async {
        let shelf = Shelf::default();
        let serve = server::negotiate(far, &shelf, &TlsPolicy::Off);
        let (listed, served) = tokio::join!(list(near, &ClientTls::Off), serve);
        assert!(served.unwrap().is_none());
        listed.unwrap()
    });
    let names: Vec<_> =
        listed.iter().map(|listed| (listed.name.as_str(), listed.description.as_str())).collect();
    assert_eq!(names, [("", ""), ("disk", "the disk")]);
}

/// A server that says these bytes, whatever it hears.
fn hear(bytes: &[u8], wanted: &Wanted<'_>) -> Result<Server<DuplexStream>, HandshakeError> {
    let (near, mut far) = duplex(16 << 20);
    block_on(async {
        far.write_all(bytes).await.unwrap();
        far.shutdown().await.unwrap();
        connect(near, wanted).await
    })
}

/// The start of a server's words: magic numbers and handshake flags.
fn greeting(flags: u8) -> Vec<u8> {
    [&MAGIC_INIT.to_be_bytes()[..], &MAGIC_OPTION.to_be_bytes(), &[0, flags]].concat()
}

fn reply(option: OptionCode, code: ReplyCode, data: &[u8]) -> Vec<u8> {
    [&encode_option_reply(&OptionReply { option, code, len: data.len() as u32 })[..], data].concat()
}

fn export_info(size: u64, flags: u16) -> Vec<u8> {
    let data = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    reply(OptionCode::GO, ReplyCode::INFO, &data)
}

#[track_caller]
fn assert_protocol_error(bytes: &[u8], part: &str) {
    let wanted = Wanted { style: ReplyStyle::Extended, contexts: &[ALLOCATION], ..Wanted::default() };
    match hear(bytes, &wanted) {
        Err(HandshakeError::Protocol(text)) => assert!(text.contains(part), "{text}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn other_servers_are_told_from_nbd() {
    assert_protocol_error(b"SSH-2.0-OpenSSH_9.2p1 Debian", "no NBD server");
    assert_protocol_error(
        &[&MAGIC_INIT.to_be_bytes()[..], &MAGIC_OLDSTYLE.to_be_bytes(), &[0; 136]].concat(),
        "oldstyle",
    );
    assert_protocol_error(&[&MAGIC_INIT.to_be_bytes()[..], &[9; 8]].concat(), "magic");
}

#[test]
fn an_old_server_is_asked_by_export_name() {
    let answer = [&4096_u64.to_be_bytes()[..], &[0, 0x81]].concat();
    let unsup = |option| reply(option, ReplyCode::ERR_UNSUP, b"what?");
    let fixed = [
        greeting(3),
        unsup(OptionCode::EXTENDED_HEADERS),
        unsup(OptionCode::STRUCTURED_REPLY),
        unsup(OptionCode::GO),
        answer.clone(),
        b"rest".to_vec(),
    ];
    let unfixed = [greeting(0), answer, vec![0; 124], b"rest".to_vec()];
    let wanted = Wanted { style: ReplyStyle::Extended, contexts: &[ALLOCATION], ..Wanted::default() };
    for bytes in [fixed.concat(), unfixed.concat()] {
        let mut server = hear(&bytes, &wanted).unwrap();
        assert_eq!((server.size, server.style, server.blocks), (4096, ReplyStyle::Simple, None));
        assert_eq!(server.flags, TransmissionFlags::HAS_FLAGS, "SEND_DF needs structured replies");
        let mut rest = Vec::new();
        block_on(server.stream.read_to_end(&mut rest)).unwrap();
        assert_eq!(rest, b"rest");
    }
    assert_protocol_error(&[greeting(0)].concat(), "hung up on the export name");
    let extended = reply(OptionCode::EXTENDED_HEADERS, ReplyCode::ACK, &[]);
    let set = reply(OptionCode::SET_META_CONTEXT, ReplyCode::ACK, &[]);
    let bytes = [greeting(3), extended, set, unsup(OptionCode::GO)].concat();
    assert!(matches!(hear(&bytes, &wanted), Err(HandshakeError::Refused { .. })));
}

#[test]
fn hostile_answers_are_refused() {
    let extended = || [greeting(3), reply(OptionCode::EXTENDED_HEADERS, ReplyCode::ACK, &[])].concat();
    let set = |data: &[u8]| reply(OptionCode::SET_META_CONTEXT, ReplyCode::META_CONTEXT, data);
    let ready = || [extended(), reply(OptionCode::SET_META_CONTEXT, ReplyCode::ACK, &[])].concat();
    let ack = || reply(OptionCode::GO, ReplyCode::ACK, &[]);
    let huge = OptionReply { option: OptionCode::GO, code: ReplyCode::INFO, len: u32::MAX };
    let info = |data: &[u8]| reply(OptionCode::GO, ReplyCode::INFO, data);
    let cases = [
        ([greeting(3), reply(OptionCode::LIST, ReplyCode::ACK, &[])].concat(), "not asked"),
        ([greeting(3), vec![7; 20]].concat(), "magic"),
        (
            [greeting(3), reply(OptionCode::EXTENDED_HEADERS, ReplyCode::ACK, b"x")].concat(),
            "acknowledgement",
        ),
        (
            [greeting(3), reply(OptionCode::EXTENDED_HEADERS, ReplyCode::INFO, b"x")].concat(),
            "something else",
        ),
        ([ready(), encode_option_reply(&huge).to_vec()].concat(), "absurdly long"),
        ([ready(), ack()].concat(), "kept the export's size"),
        ([ready(), info(&[0])].concat(), "malformed"),
        ([ready(), info(&[0, 0, 1])].concat(), "malformed"),
        ([ready(), info(&[0, 3, 0, 0, 0, 1])].concat(), "malformed"),
        ([ready(), info(&[0, 3, 0, 0, 0, 3, 0, 0, 2, 0, 0, 1, 0, 0])].concat(), "make no sense"),
        ([extended(), set(&[0, 0])].concat(), "malformed"),
        ([extended(), set(b"\0\0\0\x01base:\xff")].concat(), "malformed"),
        ([extended(), set(b"\0\0\0\x01a:b"), set(b"\0\0\0\x01a:c")].concat(), "repeat"),
    ];
    for (bytes, part) in cases {
        assert_protocol_error(&bytes, part);
    }
    let endless = [ready(), info(&[0xff; 60_000]).repeat(150)].concat();
    assert_protocol_error(&endless, "absurdly long");
}

#[test]
fn unknown_information_is_skipped() {
    let bytes = [
        greeting(3),
        reply(OptionCode::GO, ReplyCode::INFO, &[0x12, 0x34, 5, 6]),
        export_info(77, 3),
        reply(OptionCode::GO, ReplyCode::ACK, &[]),
    ];
    let server = hear(&bytes.concat(), &Wanted::default()).unwrap();
    assert_eq!((server.size, server.flags.0), (77, 3));
}

#[test]
fn a_servers_message_is_shown_without_control_characters() {
    let bytes = [greeting(3), reply(OptionCode::GO, ReplyCode::ERR_POLICY, b"not \x1b[31mtoday\n")].concat();
    let error = hear(&bytes, &Wanted::default()).unwrap_err();
    assert_eq!(error.to_string(), "the NBD server refused NBD_OPT_GO: NBD_REP_ERR_POLICY: not [31mtoday");
}

proptest! {
    #[test]
    fn noise_does_not_panic(
        flags in 0..4_u8,
        parts in proptest::collection::vec(
            (0..12_u32, prop_oneof![0..5_u32, (1_u32 << 31)..(1_u32 << 31) + 12],
             proptest::collection::vec(any::<u8>(), 0..40)),
            0..10,
        ),
        tail in proptest::collection::vec(any::<u8>(), 0..60),
    ) {
        let mut bytes = greeting(flags);
        for (option, code, data) in parts {
            bytes.extend(reply(OptionCode(option), ReplyCode(code), &data));
        }
        bytes.extend(tail);
        let wanted = Wanted { style: ReplyStyle::Extended, contexts: &[ALLOCATION], ..Wanted::default() };
        let _ = hear(&bytes, &wanted);
    }
}
