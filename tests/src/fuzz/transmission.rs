//! The transmission phase: any bytes from a client into a small disk in memory.

mod replies;

use super::MAX_INPUT;
use super::peer::Peer;
use blockmason::sched::serve;
use blockmason::{Disk, Host, Request};
use blockmason_elements::nbd::handshake::BlockSizes;
use blockmason_elements::nbd::meta::{Selected, StatusQuery};
use blockmason_elements::nbd::serve::{Connection, flags_of};
use blockmason_elements::nbd::server::{Export, ExportInfo, Negotiated};
use blockmason_elements::nbd::stream::Stream;
use blockmason_elements::nbd::wire::{
    BadMagic, Command, ReplyStyle, RequestHeader, Rules, TransmissionFlags, decode_request,
    decode_request_extended,
};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of the disk: some pages, and a part of one.
const SIZE: usize = 20_000;

/// The longest read or write, shorter than the disk so that there are illegal ones inside of it.
const MAX_LEN: u32 = 16 << 10;

/// Bytes that a choppy client moves at a time: less than a header, and many pieces to each reply.
const STEP: usize = 23;

/// Longer than anything that takes time takes; the clock of a test stands still while there is work.
const FOREVER: Duration = Duration::from_secs(3600);

/// The first byte says what the handshake agreed on, the rest is what the client sends.
///
/// Serving ends when the bytes do. Every request that arrived in full is answered once, correctly if it
/// was legal and with an error if not, unless the client breaks the protocol, which may cost it
/// answers. At the end the disk holds what legal requests have written to it, and nothing else; and the
/// memory of requests has been given back.
pub fn transmission(data: &[u8]) {
    let Some((&terms, data)) = data[..data.len().min(MAX_INPUT)].split_first() else { return };
    blockmason::testing::run(1, async |host| {
        let graph = if terms & 4 == 0 { "element R (type probe)" } else { "element R (type readonly)" };
        let text = format!("{graph}\nelement M (type mem) (size {SIZE})\nR -> M");
        let graph = blockmason::testing::graph(&host, blockmason_elements::ALL, &text, "R")
            .expect("the graph is valid");
        let disk = Disk::serve(&host, graph).await.expect("nothing to open");
        let peer = if terms & 16 == 0 { Peer::new(data) } else { Peer::chopped(data, STEP) };
        let traffic = peer.traffic();
        let negotiated = negotiated(terms, &disk, peer);
        let (style, contexts, rules) = (negotiated.style, negotiated.contexts.clone(), negotiated.rules());
        speak(&disk, negotiated).await;

        let mut model = Model { image: vec![0; SIZE], rules, contexts };
        let (expected, polite) = model.expect(data);
        replies::check(&traffic.heard.borrow(), style, expected, polite);
        assert!(image(&host, &disk).await == model.image, "the disk holds what nobody wrote");
    });
}

/// Serves a client to its end.
async fn speak(disk: &Arc<Disk>, negotiated: Negotiated<Peer<'_>, ()>) {
    let connection = Connection::new(negotiated, disk.budget().clone());
    let served = blockmason::rt::timeout(FOREVER, serve(disk, "Client", &connection)).await;
    served.expect("serving waits for a client that has left").expect("the disk serves");
    connection.finish().await;
    drop(connection);
    assert!(!disk.graph().is_failed(), "an element panicked");
    assert_eq!(disk.budget().used(), 0, "memory that is never given back");
}

fn negotiated<'a>(terms: u8, disk: &Disk, peer: Peer<'a>) -> Negotiated<Peer<'a>, ()> {
    let style = match terms & 3 {
        0 => ReplyStyle::Simple,
        1 => ReplyStyle::Structured,
        _ => ReplyStyle::Extended,
    };
    let mut contexts = Vec::new();
    if terms & 8 != 0 && style != ReplyStyle::Simple {
        contexts = [0, 7].map(|id| Selected { id, name: format!("x-fuzz:{id}") }).to_vec();
    }
    let graph = disk.graph();
    let below = graph.node("Client").map(|node| graph.below(node)).expect("a client").expect("a disk below");
    let mut flags = flags_of(&below);
    if style == ReplyStyle::Simple {
        flags = flags.without(TransmissionFlags::SEND_DF);
    }
    if style != ReplyStyle::Extended || contexts.is_empty() {
        flags = flags.without(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
    }
    let blocks = BlockSizes { maximum: MAX_LEN, ..BlockSizes::default() };
    let info = ExportInfo { size: below.size, flags, blocks, ..ExportInfo::default() };
    Negotiated { stream: Stream::Plain(peer), export: Export { handle: (), info }, flags, style, contexts }
}

/// The whole disk, by a request of the framework's own.
async fn image(host: &Host, disk: &Disk) -> Vec<u8> {
    let graph = disk.graph();
    let node = graph.node("Client").expect("a client");
    let answer = host.submit(&graph, node, 0, Request::read(0, SIZE as u64)).await;
    answer.and_then(blockmason::Answer::into_data).expect("memory can be read").to_vec()
}

/// The disk and the terms of its client, done again in the simplest way. A disk in memory answers at
/// once, so its requests are done in the order of their arrival.
struct Model {
    image: Vec<u8>,
    rules: Rules,
    contexts: Vec<Selected>,
}

/// A request and what is to be answered.
struct Expected {
    header: RequestHeader,
    /// None if it is refused.
    answer: Option<Content>,
}

/// What an answer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Nothing,
    /// What is read.
    Data(Vec<u8>),
    /// What is at the range that is to be described, and the contexts that are asked for.
    Status(Vec<u8>, Vec<u32>),
}

impl Model {
    /// Does everything that `data` asks for, and returns what is to be answered; and whether the client
    /// leaves as the protocol has it.
    fn expect(&mut self, mut data: &[u8]) -> (Vec<Expected>, bool) {
        let mut expected = Vec::new();
        loop {
            let Some((header, rest)) = split_header(data, self.rules.extended) else {
                return (expected, true);
            };
            let Ok(header) = header else { return (expected, false) };
            if header.command == Command::DISC {
                return (expected, true);
            }
            let len = usize::try_from(header.payload_len(self.rules.extended)).unwrap_or(usize::MAX);
            let Some((payload, rest)) = rest.split_at_checked(len) else { return (expected, false) };
            data = rest;
            let legal = header.check(&self.rules).is_ok() && len <= MAX_LEN as usize;
            let answer = if legal { self.answer(&header, payload) } else { None };
            expected.push(Expected { header, answer });
        }
    }

    fn answer(&mut self, header: &RequestHeader, payload: &[u8]) -> Option<Content> {
        let mut ids: Vec<u32> = self.contexts.iter().map(|context| context.id).collect();
        let mut len = header.len;
        if header.is_status_query() {
            let query = StatusQuery::parse(payload, &self.contexts).ok()?;
            len = query.len;
            let wanted = (0..ids.len()).filter(|place| query.wants(*place));
            ids = wanted.map(|place| ids[place]).collect();
        }
        let start = usize::try_from(header.offset).ok()?;
        let range = start..start.checked_add(usize::try_from(len).ok()?)?;
        // What has passed the protocol's check lies inside, or this panics.
        let content = match header.command {
            Command::READ => Content::Data(self.image[range].to_vec()),
            Command::BLOCK_STATUS => Content::Status(self.image.get(range)?.to_vec(), ids),
            Command::WRITE => {
                self.image[range].copy_from_slice(payload);
                Content::Nothing
            }
            Command::TRIM | Command::WRITE_ZEROES => {
                self.image[range].fill(0);
                Content::Nothing
            }
            _ => Content::Nothing,
        };
        Some(content)
    }
}

/// The header at the front; None if there is not a whole one.
fn split_header(data: &[u8], extended: bool) -> Option<(Result<RequestHeader, BadMagic>, &[u8])> {
    if extended {
        data.split_first_chunk().map(|(bytes, rest)| (decode_request_extended(bytes), rest))
    } else {
        data.split_first_chunk().map(|(bytes, rest)| (decode_request(bytes), rest))
    }
}
