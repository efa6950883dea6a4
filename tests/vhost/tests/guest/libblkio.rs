//! The driver that libblkio has, with its own connection: its rings lie in memory that is not sealed.

use crate::{Daemon, Sink};
use blockmason_vhost_tests::load::{Client, Job, run};
use std::time::Duration;

fn job(daemon: &Daemon, client: Client) -> Job {
    Job {
        socket: daemon.socket(),
        queues: 2,
        depth: 16,
        block: 4096,
        write: false,
        sequential: false,
        time: Duration::from_millis(300),
        poll: false,
        span: None,
        client,
        server: Some(daemon.pid()),
        idle: Duration::from_millis(10),
    }
}

#[test]
fn reads_and_writes() {
    let daemon = Daemon::started(Sink::File(4 << 20), 2);
    for client in [Client::Libblkio, Client::Plain] {
        for write in [true, false] {
            for poll in [false, true] {
                let outcome = run(&Job { write, poll, ..job(&daemon, client) }).unwrap();
                assert_eq!(outcome.errors, 0);
                assert!(outcome.requests > 100, "{client:?}: only {} requests", outcome.requests);
                assert!(outcome.server_cpu.unwrap() > Duration::ZERO);
            }
        }
    }
}

/// A guest need not use all queues that there are.
#[test]
fn one_queue_of_many() {
    let daemon = Daemon::started(Sink::Null(64 << 20), 8);
    let outcome = run(&Job { queues: 1, depth: 1, ..job(&daemon, Client::Libblkio) }).unwrap();
    assert_eq!(outcome.errors, 0);
    assert!(outcome.requests > 0);
}
