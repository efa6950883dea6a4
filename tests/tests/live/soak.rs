//! Random valid changes at random moments, many of them: `tests/long` runs it.

use crate::{Site, graph};
use blockmason_tests::control::{Control, reload};
use blockmason_tests::mason::{pause, until};
use blockmason_tests::stamps::Stampers;
use serde_json::{Value, json};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// What lies between the exports and the image.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ground {
    Plain,
    Direct,
    Halves,
    Overlay,
}

/// A graph of the same disk, and what it rests on.
fn draw(rng: &mut fastrand::Rng, number: usize) -> (String, Ground) {
    let mut elements = String::new();
    let mut way = String::new();
    let mut add = |name: &str, text: String| {
        elements += &format!("element {name} {text}\n");
        way += &format!("{name} -> ");
    };
    if rng.bool() {
        add("P", "(type probe)".to_owned());
    }
    if rng.u8(..4) == 0 {
        add(&format!("P{number}"), "(type probe)".to_owned());
    }
    if rng.u8(..3) == 0 {
        add("D", format!("(type delay) (all {}ms) (jitter 1ms)", rng.u8(..3)));
    }
    if rng.u8(..3) == 0 {
        add("E", "(type error) (probability 0%)".to_owned());
    }
    if rng.bool() {
        add("L", format!("(type throttle) (rate {}M/s)", rng.u32(50..500)));
    }
    let ground = match rng.u8(..16) {
        0..8 => Ground::Plain,
        8..10 => Ground::Direct,
        10..14 => Ground::Halves,
        _ => Ground::Overlay,
    };
    let (more, bottom) = match ground {
        Ground::Plain | Ground::Direct => ("", "A"),
        Ground::Halves => (
            "element Both (type linear) element Low (type slice) (length 32M) element High (type slice) \
             (offset 32M)\n(Both, low) -> Low -> A (Both, high) -> High -> A\n",
            "Both",
        ),
        Ground::Overlay => (
            "element Try (type cow) element Changes (type mem) (size 66M)\n(Try, base) -> A (Try, overlay) -> Changes\n",
            "Try",
        ),
    };
    elements += more;
    if rng.bool() {
        elements += &format!("element Other (type nbd) (listen unix:other.nbd)\nOther -> {bottom}\n");
    }
    let text = graph(&elements, &format!("Guest -> {way}{bottom}"));
    match ground {
        Ground::Direct => (text.replace("(size 64M)", "(size 64M) (direct yes)"), ground),
        _ => (text, ground),
    }
}

/// The same with a write-ahead log above the image, which stays whatever else changes.
fn with_log(text: &str) -> String {
    text.replace("-> A", "-> W")
        + "element W (type wal) element Log (type file) (path a.log) (size 16M)\n(W, out) -> A (W, log) -> Log\n"
}

fn fio(uri: &str, seed: u64) -> Child {
    let mut command = Command::new("fio");
    command.args(["--name=soak", "--ioengine=nbd", &format!("--uri={uri}"), "--rw=randrw", "--bs=4k"]);
    command.args(["--iodepth=16", "--numjobs=4", "--thread", "--size=8M", "--offset_increment=8M"]);
    command.args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--fsync=64"]);
    command.arg(format!("--randseed={seed}"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Of writes, as the daemon has counted them, in milliseconds: median, 99th percentile, maximum.
fn latencies(control: &mut Control) -> String {
    let graph = control.graph("vm");
    let sources = graph["live"]["sources"].as_array().unwrap();
    let guest = sources.iter().find(|source| source["element"] == "Guest").unwrap();
    let writes =
        guest["operations"].as_array().unwrap().iter().find(|op| op["operation"] == "write").unwrap();
    let at = |key: &str| writes[key].as_f64().unwrap() / 1e6;
    format!("p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms", at("p50_ns"), at("p99_ns"), at("max_ns"))
}

/// Moves everything to the image that is not there yet.
fn commit(control: &mut Control) {
    let handlers = "/v1/graphs/vm/elements/Try/handlers";
    let state = |control: &mut Control| control.done("GET", &format!("{handlers}/state"), &Value::Null);
    if state(control)["value"] == "overlaying" {
        control.done("POST", &format!("{handlers}/commit"), &json!({}));
    }
    until("everything is in the image", || state(control)["value"] == "committed");
}

/// In milliseconds: median, 99th percentile, maximum.
fn summary(mut seconds: Vec<f64>) -> String {
    seconds.sort_by(f64::total_cmp);
    let at = |share: f64| {
        seconds.get(((seconds.len() as f64 * share) as usize).min(seconds.len() - 1)).unwrap() * 1e3
    };
    format!("p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms", at(0.5), at(0.99), at(1.0))
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
#[ignore = "takes minutes: tests/long runs it"]
fn a_thousand_reloads() {
    let (seed, wanted) = (number("LIVE_SEED", 1), number("LIVE_RELOADS", 1000) as usize);
    let logged = number("LIVE_WAL", 0) != 0;
    let finish = |text: String| if logged { with_log(&text) } else { text };
    let mut rng = fastrand::Rng::with_seed(seed);
    let site = Site::new();
    let place = site.write("vm.mason", finish(graph("", "Guest -> A")));
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(daemon.socket(), 32 << 8, 32 << 8, 4, seed);
    let mut control = site.control();
    let (mut ground, mut pauses, mut free, mut rounds) = (Ground::Plain, Vec::new(), 0, 0);
    let mut load = fio(daemon.uri(), seed);
    for count in 0..wanted {
        if load.try_wait().unwrap().is_some() {
            rounds += 1;
            let next = fio(daemon.uri(), seed + rounds);
            let ended = std::mem::replace(&mut load, next).wait_with_output().unwrap();
            assert!(ended.status.success(), "seed {seed}, reload {count}: {ended:?}");
        }
        let (text, next) = draw(&mut rng, count);
        let text = finish(text);
        pause(Duration::from_micros(rng.u64(..20_000)));
        if ground == Ground::Overlay && next != Ground::Overlay {
            commit(&mut control);
        }
        let body = reload(&place, &text, &json!({ "sign": true, "deadline_seconds": 30 }));
        let (status, answer) = control.ask("POST", "/v1/graphs/vm/reload", &body);
        assert_eq!(status, 200, "seed {seed}, reload {count}: {answer}\n{text}");
        ground = next;
        match answer["pause_seconds"].as_f64().unwrap() {
            0.0 => free += 1,
            pause => pauses.push(pause),
        }
    }
    if ground == Ground::Overlay {
        commit(&mut control);
    }
    let ended = load.wait_with_output().unwrap();
    assert!(ended.status.success(), "seed {seed}, at the end: {ended:?}");
    let requests = stampers.finish();
    println!(
        "live: {wanted} reloads{}, {} with a gate and {free} without, seed {seed}; {} rounds of fio over 4 connections \
         and {requests} stamped requests over 4, none failed, none lost",
        if logged { " above a log" } else { "" },
        pauses.len(),
        rounds + 1
    );
    println!("live: pauses: {}", summary(pauses));
    println!("live: writes: {}", latencies(&mut control));
    daemon.stop_well();
}
