//! Channels for messages of the back-end's own (SET_BACKEND_REQ_FD) that nobody reads, or that are none.

use crate::two::{SECTORS, Two};
use blockmason_vhost_tests::blk::{Blk, OK, Request, Shape};
use blockmason_vhost_tests::raw;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no payload.
const CONFIG_CHANGED: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// Our end of a channel, and a copy of the one that the daemon gets.
fn channel() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(blockmason_vhost_tests::PATIENCE)).unwrap();
    (ours, theirs)
}

fn set_channel(blk: &Blk, theirs: &impl AsFd) {
    let taken = blk.device.raw().acknowledged(raw::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    assert!(taken, "a channel is refused");
}

/// Makes the disk larger by `step` MiB. The guest works all the while, and sees the new size.
fn grow(two: &Two, blk: &mut Blk, step: u64) {
    for ix in 0..8 {
        blk.submit(0, Request::read(ix * 8, 4096));
    }
    blk.kick(0);
    let bytes = SECTORS * 512 + (step << 20);
    two.resize(bytes);
    (0..8).for_each(|_| assert_eq!(blk.next(0).status, OK));
    let config = blk.device.config().unwrap();
    assert_eq!(
        u64::from_le_bytes(config[..8].try_into().unwrap()),
        bytes / 512,
        "the size that the guest is told"
    );
    assert_eq!(blk.run(Request::read(bytes / 512 - 8, 4096)).status, OK, "the new end of the disk");
}

fn hears_of_a_change(channel: &mut UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message, CONFIG_CHANGED);
}

/// Writes until there is no room left, and has writing wait from then on.
fn fill(stream: &UnixStream) {
    stream.set_nonblocking(true).unwrap();
    let error = loop {
        if let Err(error) = (&*stream).write(&[0x55; 1]) {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    stream.set_nonblocking(false).unwrap();
}

/// A change of size goes out on the channel that was named last, and the one before is closed.
#[test]
fn a_channel_in_place_of_another() {
    let two = Two::new();
    let mut blk = Blk::connected(Shape::default(), &two.socket());
    let (mut first, theirs) = channel();
    set_channel(&blk, &theirs);
    drop(theirs);
    grow(&two, &mut blk, 1);
    hears_of_a_change(&mut first);
    let (mut second, theirs) = channel();
    set_channel(&blk, &theirs);
    drop(theirs);
    assert_eq!(first.read(&mut [0; 12]).unwrap(), 0, "a channel that is not used any more is kept");
    grow(&two, &mut blk, 2);
    hears_of_a_change(&mut second);
    blk.device.disconnect();
    assert_eq!(second.read(&mut [0; 12]).unwrap(), 0, "a channel is kept behind the end of its connection");
    two.is_well("two channels");
    two.finish();
}

/// Channels that nothing can be sent on: one that nobody reads until it is full, one that has been closed, one that
/// says what nobody has asked for, and descriptors that are no sockets. The guest learns of the new size when it asks.
#[test]
fn channels_that_are_of_no_use() {
    let two = Two::new();
    two.is_well("nothing");
    let descriptors = two.daemon.descriptors();
    let (full, shut, garbage) = (channel(), channel(), channel());
    fill(&full.1);
    drop(shut.0);
    fill(&garbage.0);
    let pipe = std::io::pipe().unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let channels =
        [full.1.as_fd(), shut.1.as_fd(), garbage.1.as_fd(), pipe.1.as_fd(), event.as_fd(), file.as_fd()];
    for (step, theirs) in (1..).zip(channels) {
        let lines = two.daemon.log().lines().count();
        let mut blk = Blk::connected(Shape::default(), &two.socket());
        set_channel(&blk, &theirs);
        grow(&two, &mut blk, step);
        blk.device.disconnect();
        two.is_well("a channel that is of no use");
        let said = two.daemon.log().lines().count() - lines;
        assert!(said <= 1, "{said} lines in the log\n{}", two.daemon.log());
    }
    // The last guest's connection may be on its way out.
    assert!(two.daemon.descriptors() <= descriptors + 12);
    two.finish();
}

/// Channels by the hundred: each takes the place of the one before.
#[test]
fn one_channel_after_the_other() {
    let two = Two::new();
    let blk = Blk::connected(Shape::default(), &two.socket());
    let descriptors = two.daemon.descriptors();
    for _ in 0..300 {
        set_channel(&blk, &channel().1);
    }
    // The other guest's connections may come and go.
    assert!(two.daemon.descriptors() <= descriptors + 12, "channels that are not used any more are kept");
    drop(blk);
    two.is_well("300 channels");
    two.finish();
}
