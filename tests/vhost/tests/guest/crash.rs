//! A daemon that is killed at any instant under load, and started again. The guest's memory and the notes of what is
//! in flight outlive it, so every request is completed exactly once, and nothing that was acknowledged is lost.

use crate::{Daemon, Sink};
use blockmason_tests::mason::now;
use blockmason_vhost_tests::blk::{Blk, Shape};
use blockmason_vhost_tests::model::{BLOCK, Load};
use rustix::process::{Pid, Signal, kill_process};
use std::time::Duration;

/// Blocks of the disk.
const BLOCKS: u64 = 512;

/// Kills as often as `VHOST_KILLS` says, with the seed `VHOST_SEED`.
#[test]
fn killed_at_any_instant() {
    let number = |name, or| std::env::var(name).map_or(or, |text: String| text.parse().unwrap());
    let (kills, seed) = (number("VHOST_KILLS", 100), number("VHOST_SEED", 1));
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut daemon = Daemon::new();
    let mut blk = Blk::new(Shape { queues: 2, size: 128, depth: 16, ..Shape::default() });
    // Soon all indices begin again at 0.
    blk.start_at(0xffe0);
    let mut load = Load::new(blk, BLOCKS, seed);
    let (mut early, mut flying, begun) = (0, 0, now());
    for kill in 0..kills {
        daemon.poll = if kill % 3 == 1 { "100us" } else { "0s" };
        daemon.start(sink(kill), 2);
        // Some die while the front-end still sends its messages, or while they replay.
        let instant = if kill % 4 == 3 { rng.u64(..3_000) } else { rng.u64(..40_000) };
        early += u64::from(!until_death(&mut load, &mut daemon, Duration::from_micros(instant)));
        daemon.kill();
        load.blk.device.disconnect();
        flying += load.in_flight();
        load.check_image(&daemon.image());
    }
    daemon.start(sink(0), 2);
    load.blk.connect(&daemon.socket()).unwrap();
    load.drain();
    load.check_all();
    assert_eq!(load.blk.in_flight(), 0);
    println!(
        "crash: {kills} kills in {:?}, seed {seed}: {} requests, {} of them writes; {flying} in flight at a kill; {early} kills before all queues ran",
        begun.elapsed(),
        load.completed,
        load.changes
    );
    assert!(load.completed > kills && flying as u64 > kills, "there was hardly any load");
    daemon.stop();
}

/// The page cache outlives the daemon, and what has left it does.
fn sink(kill: u64) -> Sink {
    if kill % 5 == 4 { Sink::Direct(BLOCKS * BLOCK) } else { Sink::File(BLOCKS * BLOCK) }
}

/// Connects and keeps the daemon busy until it is dead, which somebody else sees to after so much time. Returns
/// whether all queues ran by then.
fn until_death(load: &mut Load, daemon: &mut Daemon, time: Duration) -> bool {
    let (pid, socket) = (Pid::from_raw(daemon.pid().cast_signed()).unwrap(), daemon.socket());
    std::thread::scope(|scope| {
        let killer = scope.spawn(move || {
            blockmason_tests::mason::pause(time);
            kill_process(pid, Signal::KILL).unwrap();
        });
        // What is offered while there is no daemon must be done, too.
        load.fill();
        let ran = load.blk.connect(&socket).is_ok();
        while !killer.is_finished() {
            load.fill();
            if load.collect() == 0 {
                load.rest();
            }
        }
        ran
    })
}
