//! The vhost-user message loop, over a socket: what a front-end sends, whatever that is, and a good one after it.

mod frontend;

use super::MAX_INPUT;
use blockmason::Disk;
use blockmason_elements::vhost::fuzzing::{Device, PROTOCOL};
use blockmason_elements::vhost::wire::{HEADER, Header, Message, protocol};
use frontend::{Answer, Frontend, GUEST};
use std::time::Duration;

/// Longer than anything that takes time takes; the clock of a test stands still while there is work.
const FOREVER: Duration = Duration::from_secs(3600);

/// Longer than what a front-end leaves behind takes to end.
const A_WHILE: Duration = Duration::from_secs(60);

/// One byte of terms, then what a front-end does, one record after the other: a byte that says what, one of flags, one
/// of descriptors, and one with the length of what follows (see `Frontend::act`).
///
/// The session ends when its front-end has gone, if not before. Messages are answered once and in order, if at all,
/// and every answer is one of its message. Nothing of the front-end stays: no descriptor, no mapping, no memory of
/// requests. Another front-end is then served as if it were the first.
pub fn vhost_messages(data: &[u8]) {
    let Some((&terms, data)) = data[..data.len().min(MAX_INPUT)].split_first() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    blockmason::testing::run(1, async |host| {
        let slow = if terms & 1 == 0 { "probe" } else { "delay) (all 1ms" };
        let text = format!("element R (type {slow})\nelement N (type null) (size 1M)\nR -> N");
        let graph = blockmason::testing::graph(&host, blockmason_elements::ALL, &text, "R")
            .expect("the graph is valid");
        let disk = Disk::serve(&host, graph).await.expect("nothing to open");
        let (queues, read_only) = (1 + u16::from(terms >> 1 & 3), terms & 8 != 0);
        let device = Device::new(&disk, "Client", queues, read_only, folder.path().join("write-through"));
        settle(&device).await;
        let before = descriptors();
        let (sent, answers) = meet(&device, async |frontend: &mut Frontend| {
            frontend.act(data).await;
            frontend.leave().await
        })
        .await;
        check(&sent, &answers);
        meet(&device, async |frontend: &mut Frontend| frontend.read_a_sector().await).await;
        blockmason::rt::sleep(A_WHILE).await;
        assert_eq!(descriptors(), before, "descriptors that a front-end has left");
        let maps = std::fs::read_to_string("/proc/self/maps").expect("the kernel tells of mappings");
        let left = maps.lines().find(|line| line.contains(GUEST) || line.contains("requests-in-flight"));
        assert_eq!(left, None, "memory of a front-end");
        assert!(!disk.graph().is_failed(), "an element panicked");
        assert_eq!(disk.budget().used(), 0, "memory that is never given back");
    });
}

/// How many descriptors this process has open. No other thread opens or closes any meanwhile.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("the kernel tells of descriptors").count()
}

/// A front-end that comes and goes: what is opened for good the first time is open.
async fn settle(device: &Device) {
    meet(device, async |frontend: &mut Frontend| frontend.leave().await).await;
}

/// Serves a front-end to its end, which must come soon after it has gone.
async fn meet<T>(device: &Device, deed: impl AsyncFnOnce(&mut Frontend) -> T) -> T {
    let (ours, theirs) = tokio::net::UnixStream::pair().expect("a pair of sockets");
    let frontend = async move {
        let mut frontend = Frontend::new(ours);
        deed(&mut frontend).await
    };
    let both = futures::future::join(device.serve(theirs), frontend);
    blockmason::rt::timeout(FOREVER, both).await.expect("a session that never ends").1
}

/// The answers are those to the first of the messages that want one.
fn check(mut sent: &[u8], answers: &[Answer]) {
    let mut answers = answers.iter();
    let mut acknowledges = false;
    while let Some((message, need_reply, rest)) = split_message(sent) {
        sent = rest;
        if need_reply && acknowledges && !message.has_answer() {
            let Some(answer) = answers.next() else { return };
            answer.acknowledges(&message);
        } else if message.has_answer() {
            let Some(answer) = answers.next() else { return };
            answer.answers(&message);
        }
        if let Message::SetProtocolFeatures(features) = message
            && features & !PROTOCOL == 0
        {
            acknowledges = features & protocol::REPLY_ACK != 0;
        }
    }
    assert!(answers.next().is_none(), "an answer to nothing");
}

/// The message at the front, whether it wants a reply, and what comes after; None if there is no good one.
fn split_message(bytes: &[u8]) -> Option<(Message, bool, &[u8])> {
    let (header, rest) = bytes.split_first_chunk::<HEADER>()?;
    let Header { code, need_reply, size } = Header::parse(header).ok()?;
    let (payload, rest) = rest.split_at_checked(size)?;
    Some((Message::parse(code, payload).ok()?, need_reply, rest))
}
