//! Stopping while a client waits for an answer.

use crate::harness::{Daemon, Home};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

/// A disk whose reads take this long, with a client whose read is in flight.
fn reading(home: &Home, delay: &str) -> (Daemon, UnixStream) {
    home.file(
        "vm.mason",
        &format!(
            "element Guest (type nbd) (listen unix:vm.nbd)\n\
             element Slow (type delay) (read {delay})\n\
             element Disk (type mem) (size 1M)\n\
             Guest -> Slow -> Disk\n"
        ),
    );
    let daemon = home.run(&["vm.mason"], 1);
    let mut client = UnixStream::connect(home.path("vm.nbd")).unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    // Fixed newstyle without padding; the option that goes on with the export of no name.
    client.write_all(&3u32.to_be_bytes()).unwrap();
    client.write_all(&[b"IHAVEOPT", &1u32.to_be_bytes()[..], &0u32.to_be_bytes()].concat()).unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
    let (flags, read, offset) = (0u16.to_be_bytes(), 0u16.to_be_bytes(), 0u64.to_be_bytes());
    let head = [&0x2560_9513u32.to_be_bytes()[..], &flags, &read, b"a cookie", &offset].concat();
    client.write_all(&[&head[..], &512u32.to_be_bytes()].concat()).unwrap();
    while home.mason(&["status", "--json"]).json()["graphs"][0]["edges"][0]["requests"] == 0 {}
    (daemon, client)
}

#[test]
fn what_is_in_flight_is_answered_first() {
    let home = Home::new();
    let (daemon, mut client) = reading(&home, "1s");
    daemon.signal(Signal::TERM);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer.len(), 16 + 512);
    assert_eq!(&answer[..16], [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], b"a cookie"].concat());
    daemon.end().done();
}

#[test]
fn who_does_not_want_to_wait_interrupts_again() {
    let home = Home::new();
    let (daemon, _client) = reading(&home, "1000s");
    daemon.signal(Signal::INT);
    // Stopping has begun when the path has gone.
    while home.path("vm.nbd").exists() {}
    assert!(!home.path("mason/vm.sock").exists());
    daemon.signal(Signal::INT);
    assert_eq!(daemon.end().code, Some(130));
}
