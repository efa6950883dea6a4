//! Changes of every kind under fio, qemu-io and clients that know what each block must be.

use crate::{Site, graph};
use blockmason_tests::client_output;
use blockmason_tests::mason::until;
use blockmason_tests::stamps::Stampers;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

/// The graph that everything comes back to.
fn limited(rate: &str) -> String {
    graph(&format!("element Limit (type throttle) (rate {rate})"), "Guest -> Limit -> A")
}

const HALVES: &str = "element Both (type linear) element Low (type slice) (length 32M) \
    element High (type slice) (offset 32M) (Both, low) -> Low -> A (Both, high) -> High -> A";

/// An overlay in memory above the image: its changes have to be moved to the image before it goes.
fn overlaid() -> String {
    graph(
        "element Limit (type throttle) (rate 2G/s) element Try (type cow) element Changes (type mem) (size 66M)",
        "Guest -> Limit -> Try (Try, base) -> A (Try, overlay) -> Changes",
    )
}

fn fio(uri: &str) -> Child {
    let uri = format!("--uri={uri}");
    let mut command = Command::new("fio");
    command.args(["--name=live", "--ioengine=nbd", &uri, "--rw=randwrite", "--bs=4k", "--iodepth=16"]);
    command.args(["--numjobs=2", "--thread", "--size=8M", "--offset_increment=8M", "--loops=2"]);
    command.args(["--rate_iops=,700", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Writes and reads back, one process after the other, until it is told to end. Returns how many there were.
fn qemu_io(uri: &str, stop: &AtomicBool) -> u64 {
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        rounds += 1;
        let (pattern, offset) = (rounds % 251 + 1, (32 << 20) + (rounds % 64) * 65_536);
        let script = [
            format!("write -P {pattern} {offset} 60k"),
            "flush".to_owned(),
            format!("read -P {pattern} {offset} 60k"),
        ];
        let args = script.iter().flat_map(|line| ["-c", line]);
        let output =
            client_output("qemu-io", &["-f", "raw", uri].into_iter().chain(args).collect::<Vec<_>>());
        let said = format!("{output:?}");
        assert!(output.status.success() && !said.contains("rror") && !said.contains("failed"), "{said}");
    }
    rounds
}

/// One of each kind; the graph is the same before and after.
fn change_everything(site: &Site, round: usize) {
    let done = |args: &[&str]| site.mason(args).done();
    done(&["insert", "P (type probe)", "between", "Guest", "and", "Limit"]);
    done(&["insert", "D (type delay) (all 1ms)", "between", "Limit", "and", "A"]);
    done(&["set", "Limit.rate", "500M/s"]);
    assert_eq!(done(&["get", "Limit.rate"]), "500M/s\n");
    done(&["set", "D.all", "0s"]);
    done(&["remove", "P", "D"]);
    site.write("next.mason", limited("1G/s"));
    let said = done(&["reload", "next.mason", "--graph", "vm"]);
    assert!(said.contains("Limit") && said.contains("500M/s -> 1G/s"), "{said}");

    // Another layout: its heads are signed on the way there, and removed on the way back.
    done(&["replace", "A", HALVES]);
    assert!(site.path("a.img.mason-head").exists());
    let back = ["reload", "next.mason", "--graph", "vm"];
    assert!(site.mason(&back).refused().contains("served as it is"));
    done(&[&back[..], &["--sign"]].concat());
    assert!(!site.path("a.img.mason-head").exists());

    // The image opened anew, beside itself.
    done(&["replace", "A", "(type file) (path a.img) (direct yes)"]);
    done(&["replace", "A", "(type file) (path a.img) (size 64M)"]);

    site.write("over.mason", overlaid());
    done(&["reload", "over.mason", "--graph", "vm", "--sign"]);
    done(&["call", "Try.commit"]);
    until("everything is in the base", || done(&["get", "Try.state"]) == "committed\n");
    done(&["reload", "next.mason", "--graph", "vm", "--sign"]);

    done(&["insert", "E (type error) (probability 0%)", "between", "Limit", "and", "A"]);
    if round.is_multiple_of(2) {
        done(&["add", "element Other (type nbd) (listen unix:other.nbd)  Other -> A"]);
        done(&["remove", "Other"]);
    }
    done(&["remove", "E"]);
    done(&["set", "Limit.rate", "2G/s"]);
}

#[test]
fn clients_notice_nothing() {
    let site = Site::new();
    site.write("vm.mason", limited("2G/s"));
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(daemon.socket(), 40 << 8, 16 << 8, 2, 1);
    let stop = AtomicBool::new(false);
    let (uri, mut rounds) = (daemon.uri(), 0);
    std::thread::scope(|scope| {
        let mut fio = fio(uri);
        let shells = scope.spawn(|| qemu_io(uri, &stop));
        while fio.try_wait().unwrap().is_none() {
            change_everything(&site, rounds);
            stampers.go_on(100);
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
        let ended = fio.wait_with_output().unwrap();
        assert!(ended.status.success(), "{ended:?}");
        assert!(shells.join().unwrap() > 1);
    });
    assert!(stampers.finish() > 1000 && rounds > 0);
    let graph = site.control().graph("vm");
    assert_eq!(graph["live"]["failed"], false);
    // There and back of the linear, the image, the overlay and the other export.
    assert!(graph["live"]["gated"].as_u64().unwrap() >= 6 * rounds as u64, "{graph}");
    daemon.stop_well();
}
