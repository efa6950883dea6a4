//! Both sides of the NBD handshake, against anything.

use super::MAX_INPUT;
use super::peer::{Peer, Traffic};
use blockmason_elements::nbd::client::{ClientTls, MAX_REPLIES, Server, Wanted, connect, list};
use blockmason_elements::nbd::handshake::{BlockSizes, HandshakeError};
use blockmason_elements::nbd::meta::{ALLOCATION, MAX_CONTEXTS};
use blockmason_elements::nbd::server::{
    Export, ExportInfo, Exports, Listed, Negotiated, TlsPolicy, negotiate,
};
use blockmason_elements::nbd::wire::{
    EXPORT_NAME_ZEROES, MAGIC_OPTION_REPLY, OptionCode, OptionReply, ReplyCode, ReplyStyle,
    TransmissionFlags, decode_option, decode_option_reply,
};
use futures::FutureExt;

/// A disk that is the default, and a hidden one with larger blocks.
struct Shelf {
    closing: bool,
}

impl Exports for Shelf {
    type Handle = ();

    fn list(&self) -> Vec<Listed> {
        vec![Listed { name: "disk".to_owned(), description: "the disk".to_owned() }]
    }

    fn find(&self, name: &str) -> Option<Export<()>> {
        let minimum = match name {
            "" | "disk" => 1,
            "hidden" => 512,
            _ => return None,
        };
        let info = ExportInfo {
            name: name.to_owned(),
            description: "a disk".to_owned(),
            size: 1 << 20,
            // All but NBD_FLAG_READ_ONLY, ROTATIONAL and SEND_RESIZE.
            flags: TransmissionFlags(0b1_1101_1110_1101),
            blocks: BlockSizes { minimum, ..BlockSizes::default() },
            contexts: vec![ALLOCATION.to_owned(), "x-fuzz:dirty".to_owned()],
        };
        Some(Export { handle: (), info })
    }

    fn is_closing(&self) -> bool {
        self.closing
    }
}

/// A client's side of the handshake, heard by a server that serves, and by one that closes.
///
/// The handshake ends when the bytes do; what is answered is well-formed, one final reply to each
/// option; and nothing behind the handshake has been read.
pub fn handshake(data: &[u8]) {
    let data = &data[..data.len().min(MAX_INPUT)];
    for closing in [false, true] {
        let peer = Peer::new(data);
        let traffic = peer.traffic();
        let outcome = negotiate(peer, &Shelf { closing }, &TlsPolicy::Off)
            .now_or_never()
            .expect("the handshake waits for a client that has left");
        check_answers(data, &traffic, &outcome);
    }
}

type Outcome<'a> = Result<Option<Negotiated<Peer<'a>, ()>>, HandshakeError>;

fn check_answers(data: &[u8], traffic: &Traffic, outcome: &Outcome<'_>) {
    let heard = traffic.heard.borrow();
    let mut rest = heard.get(18..).expect("a greeting comes first");
    let mut finals = Vec::new();
    while let Some((reply, after)) = option_reply(rest) {
        rest = after;
        if reply.code == ReplyCode::ACK || reply.code.is_error() {
            finals.push(reply);
        }
    }
    let last = finals.last().copied();
    match outcome {
        Err(_) => assert!(rest.is_empty(), "half an answer"),
        Ok(None) => {
            assert_eq!(
                last.map(|reply| (reply.option, reply.code)),
                Some((OptionCode::ABORT, ReplyCode::ACK))
            );
        }
        Ok(Some(negotiated)) => {
            let info = &negotiated.export.info;
            if rest.is_empty() {
                let go = Some((OptionCode::GO, ReplyCode::ACK));
                assert_eq!(last.map(|reply| (reply.option, reply.code)), go);
            } else {
                assert!([10, 10 + EXPORT_NAME_ZEROES].contains(&rest.len()), "{} bytes", rest.len());
                assert!(rest.starts_with(&info.size.to_be_bytes()));
            }
            let options = finals.len() + usize::from(!rest.is_empty());
            assert_eq!(traffic.read.get(), length_of(data, options), "read past the handshake");
            assert!(negotiated.style != ReplyStyle::Simple || negotiated.contexts.is_empty());
        }
    }
}

/// The reply at the front, its data taken off; None if something else comes.
fn option_reply(bytes: &[u8]) -> Option<(OptionReply, &[u8])> {
    if !bytes.starts_with(&MAGIC_OPTION_REPLY.to_be_bytes()) {
        return None;
    }
    let (header, rest) = bytes.split_first_chunk().expect("a whole header");
    let reply = decode_option_reply(header).expect("the magic is right");
    let (_data, rest) = rest.split_at_checked(reply.len as usize).expect("as much data as was announced");
    Some((reply, rest))
}

/// Bytes of a client's flags and so many options.
fn length_of(data: &[u8], options: usize) -> usize {
    let mut at = 4;
    for _ in 0..options {
        let header = data.get(at..).and_then(<[u8]>::first_chunk).expect("an option that was answered");
        at += header.len() + decode_option(header).expect("an option that was answered").len as usize;
    }
    at
}

/// The first byte says what a client wants, the rest is what a server sends to it.
///
/// The client ends when the bytes do, what it sends is well-formed, and what it believes is legal.
pub fn client(data: &[u8]) {
    let Some((&wish, data)) = data[..data.len().min(MAX_INPUT)].split_first() else { return };
    let peer = Peer::new(data);
    let traffic = peer.traffic();
    let waits = "the client waits for a server that has left";
    if wish & 8 != 0 {
        let listed = list(peer, &ClientTls::Off).now_or_never().expect(waits).unwrap_or_default();
        let sum: usize = listed.iter().map(|listed| listed.name.len() + listed.description.len()).sum();
        assert!(sum as u64 <= MAX_REPLIES);
    } else {
        let style = match wish & 3 {
            0 => ReplyStyle::Simple,
            1 => ReplyStyle::Structured,
            _ => ReplyStyle::Extended,
        };
        let contexts: &[&str] = if wish & 4 != 0 { &[ALLOCATION, "x-fuzz:dirty"] } else { &[] };
        let wanted = Wanted { export: "disk", style, contexts, tls: ClientTls::Off };
        if let Ok(server) = connect(peer, &wanted).now_or_never().expect(waits) {
            check_believed(&server, &wanted);
        }
    }
    check_asked(&traffic.heard.borrow());
}

fn check_believed(server: &Server<Peer<'_>>, wanted: &Wanted<'_>) {
    assert!(server.blocks.is_none_or(|blocks| blocks.is_legal()));
    assert!(server.contexts.len() <= MAX_CONTEXTS);
    let mut ids: Vec<_> = server.contexts.iter().map(|context| context.id).collect();
    ids.sort_unstable();
    assert!(ids.is_sorted_by(|one, other| one < other), "two contexts with one id");
    assert!(wanted.style != ReplyStyle::Simple || server.style == ReplyStyle::Simple);
    if server.style == ReplyStyle::Simple {
        assert!(server.contexts.is_empty() && !server.flags.contains(TransmissionFlags::SEND_DF));
    }
}

/// A client sends its flags, then options and nothing else.
fn check_asked(mut heard: &[u8]) {
    heard = heard.get(4..).unwrap_or_default();
    while !heard.is_empty() {
        let (header, rest) = heard.split_first_chunk().expect("a whole option");
        let option = decode_option(header).expect("an option");
        heard = rest.get(option.len as usize..).expect("as much data as was announced");
    }
}
