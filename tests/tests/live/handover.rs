//! Another process goes on: clients notice nothing, and where it cannot, the one before does.

use crate::migrate::{TO, World};
use crate::{BLOCKS, Site, graph, plain};
use blockmason_tests::client;
use blockmason_tests::handover::{Heir, is_running};
use blockmason_tests::mason::{Mason, until};
use blockmason_tests::raw::{READ, Raw, WRITE};
use blockmason_tests::stamps::Stampers;
use rustix::fs::{FlockOperation, flock};
use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

fn hand_over(site: &Site) -> Heir {
    Heir::take_over(site.folder(), &[]).0
}

#[test]
fn twenty_handovers_under_load() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let mut daemon = Some(site.run(&["vm.mason"]));
    let (socket, uri) = (site.path("vm.nbd"), daemon.as_ref().unwrap().uri().to_owned());
    let stampers = Stampers::start(&socket, 40 << 8, 20 << 8, 3, 30);
    let (stop, tries) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut pauses = Vec::new();
    std::thread::scope(|scope| {
        // Another process that wants the image, at every instant.
        let thief = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let file = std::fs::File::open(site.path("a.img")).unwrap();
                assert!(flock(&file, FlockOperation::NonBlockingLockShared).is_err(), "the image was free");
                tries.fetch_add(1, Ordering::Relaxed);
            }
        });
        let fio = Command::new("fio")
            .args(["--name=ho", "--ioengine=nbd", &format!("--uri={uri}"), "--rw=randwrite", "--bs=4k"])
            .args(["--iodepth=16", "--numjobs=2", "--thread", "--size=8M", "--offset_increment=8M"])
            .args(["--rate_iops=,1200", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut heir: Option<Heir> = None;
        for _ in 0..20 {
            let before = heir.as_ref().map_or_else(|| daemon.as_ref().unwrap().pid(), Heir::pid);
            let (next, handed) = Heir::take_over(site.folder(), &[]);
            assert_eq!(handed.from, before);
            pauses.push(handed.pause);
            until("the old process ends", || !is_running(before));
            if let Some(daemon) = daemon.take() {
                assert!(daemon.ended_well());
            }
            heir = Some(next);
            stampers.go_on(200);
            // Of a process that has just come, too.
            assert_eq!(client("nbdinfo", &["--size", &uri]).trim(), "67108864");
        }
        let ended = fio.wait_with_output().unwrap();
        stop.store(true, Ordering::Relaxed);
        assert!(ended.status.success(), "{ended:?}");
        thief.join().unwrap();
        assert!(stampers.finish() > 4000 && tries.load(Ordering::Relaxed) > 1000);
        let status = site.mason(&["status"]).done();
        assert!(status.contains(&format!("process {}", heir.as_ref().unwrap().pid())), "{status}");
        heir.unwrap().stop(&socket);
        assert!(!site.path("c.sock").exists());
    });
    pauses.sort();
    eprintln!("pauses: {pauses:?}");
    assert!(pauses[10] < Duration::from_millis(200), "{pauses:?}");
}

const STRUCTURED: &str = r#"
import os, subprocess
folder, program = os.environ["FOLDER"], os.environ["PROGRAM"]
h.set_request_structured_replies(True)
h.add_meta_context("base:allocation")
h.connect_unix(folder + "/vm.nbd")
assert h.get_structured_replies_negotiated()
seen = []
for round in range(6):
    data = bytes([65 + round]) * 65536
    h.pwrite(data, round * 1048576)
    reads = [(bytearray(4096), i) for i in range(16)]
    cookies = [h.aio_pread(nbd.Buffer.from_bytearray(b), round * 1048576 + 4096 * i) for b, i in reads]
    run = subprocess.run([program, "handover", "--control", folder + "/c.sock"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("handed over from "), run.stdout
    for cookie in cookies:
        while not h.aio_command_completed(cookie): h.poll(-1)
    assert h.pread(65536, round * 1048576) == data
    extents = []
    h.block_status(1 << 20, round * 1048576, lambda name, offset, e, err: extents.extend(e) or 0)
    assert extents[0] == 65536, extents
    h.zero(4096, round * 1048576); h.trim(4096, round * 1048576 + 4096); h.flush()
    assert h.pread(4096, round * 1048576) == bytes(4096)
h.shutdown()
"#;

#[test]
fn a_client_with_structured_replies_goes_on() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let _daemon = site.run(&["vm.mason"]);
    // It starts them from within; the last one is found below.
    let shell = Command::new("/usr/bin/python3")
        .args(["-c", &format!("import nbd\nh = nbd.NBD()\n{STRUCTURED}")])
        .env("FOLDER", site.folder())
        .env("PROGRAM", blockmason_tests::mason::program())
        .output()
        .unwrap();
    let _last = hand_over(&site);
    assert!(shell.status.success(), "{shell:?}");
}

#[test]
fn requests_that_have_come_in_half() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let _daemon = site.run(&["vm.mason"]);
    let mut heirs = Vec::new();
    let mut raw = Raw::ready(&site.path("vm.nbd"));
    let data: Vec<u8> = (0..200_000u32).map(|n| (n % 251) as u8).collect();
    let header = request(WRITE, 7, 8192, data.len() as u32);
    let whole = [&header[..], &data].concat();
    for cut in [1, 4, 27, 28, 29, 28 + 4096, 28 + 150_000, whole.len() - 1] {
        raw.write(8192, &vec![0; data.len()]);
        raw.send(&whole[..cut]);
        heirs.push(hand_over(&site));
        raw.send(&whole[cut..]);
        let reply = raw.bytes(16);
        assert_eq!((&reply[4..8], &reply[8..]), (&[0; 4][..], &7u64.to_be_bytes()[..]), "cut at {cut}");
        assert_eq!(raw.read(8192, data.len() as u32), data, "cut at {cut}");
    }
    // Twice within one request, and several requests behind it.
    raw.send(&whole[..10_000]);
    heirs.push(hand_over(&site));
    raw.send(&whole[10_000..20_000]);
    heirs.push(hand_over(&site));
    raw.send(&whole[20_000..]);
    raw.send(&request(READ, 8, 0, 512));
    let mut cookies = [0; 2].map(|_| {
        let reply = raw.bytes(16);
        assert_eq!(reply[4..8], [0; 4]);
        if reply[15] == 8 {
            raw.bytes(512);
        }
        reply[15]
    });
    cookies.sort_unstable();
    assert_eq!(cookies, [7, 8]);
    // One that is refused, whose payload is thrown away: it does not lie on the disk.
    raw.send(&request(WRITE, 9, 1 << 40, data.len() as u32));
    raw.send(&data[..100_000]);
    heirs.push(hand_over(&site));
    raw.send(&data[100_000..]);
    let reply = raw.bytes(16);
    assert_ne!(reply[4..8], [0; 4]);
    assert_eq!(reply[15], 9);
    raw.write(0, &[1; 512]);
}

fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    [
        &0x2560_9513u32.to_be_bytes()[..],
        &0u16.to_be_bytes(),
        &command.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

#[test]
fn replies_that_nobody_has_taken_yet() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let _daemon = site.run(&["vm.mason"]);
    let mut raw = Raw::ready(&site.path("vm.nbd"));
    for block in 0..32u64 {
        raw.write(block << 20, &vec![block as u8 + 1; 1 << 20]);
    }
    for block in 0..32u64 {
        raw.request(READ, block << 20, 1 << 20);
    }
    // They are answered, as far as the gate has let them in; nobody has read a byte.
    let mut heirs = vec![hand_over(&site), hand_over(&site)];
    let mut seen = 0u32;
    for number in 0..32 {
        if number == 11 {
            heirs.push(hand_over(&site));
        }
        let (error, offset) = raw.reply_to();
        assert_eq!(error, 0);
        let found = raw.bytes(1 << 20);
        assert!(found.iter().all(|byte| u64::from(*byte) == (offset >> 20) + 1), "at {offset}");
        seen |= 1 << (offset >> 20);
    }
    assert_eq!(seen, u32::MAX);
}

/// A program that says some of what a successor says, and no more.
const IMPOSTOR: &str = r#"#!/usr/bin/python3
import json, os, socket, struct, sys, time
s = socket.socket(fileno=0)
def say(**message):
    text = json.dumps(message).encode()
    s.sendall(b"masonhnd" + struct.pack("<II", len(text), 0) + text)
def take(count):
    data = b""
    while len(data) < count:
        more = s.recv(count - len(data))
        if not more: sys.exit(3)
        data += more
    return data
def hear(wanted):
    while True:
        length, count = struct.unpack("<II", take(16)[8:])
        message = json.loads(take(length))
        take((count + 199) // 200)
        if message["message"] == wanted: return message
def hello(versions=[1]): say(message="hello", magic="mason-handover", versions=versions, version="impostor")
"#;

/// What `mason handover` to a program of that text says.
fn try_program(site: &Site, text: &str, deadline: &str) -> String {
    let program = site.write("program", text);
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    site.mason(&["handover", "--binary", "program", "--deadline", deadline]).refused()
}

#[test]
fn a_program_that_fails_at_each_step() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(&site.path("vm.nbd"), 0, BLOCKS, 2, 31);
    let mut control = site.control();
    let mut gated = || control.graph("vm")["live"]["gated"].as_u64().unwrap();
    let fails = |program: &str, says: &str| {
        // Only who is expected to be late is not given time.
        let said = try_program(&site, program, says.split_once(" in ").map_or("20s", |(_, time)| time));
        assert!(said.contains(says) && said.contains("this process goes on"), "{said}");
        stampers.go_on(100);
    };
    let before_the_gate = [
        ("#!/bin/sh\nexit 1\n", "has ended before `hello`"),
        ("#!/bin/sh\nexec sleep 60\n", "was not prepared in 700ms"),
        ("#!/bin/sh\necho hello world, this is a page of text >&0\nsleep 60\n", "is not understood"),
    ];
    for (program, says) in before_the_gate {
        fails(program, says);
    }
    let impostors = [
        ("hello([2, 3])\nhear('offer')", "speaks another format"),
        ("say(message='ready')\ntime.sleep(60)", "says `ready`, and `hello` was expected"),
        ("hello()\nhear('offer')", "has ended before `prepared`"),
        ("hello()\nsay(message='refused', sentence='no such luck')\ntime.sleep(60)", "no such luck"),
        ("hello()\nhear('offer')\ntime.sleep(60)", "was not prepared in 700ms"),
    ];
    for (program, says) in impostors {
        fails(&format!("{IMPOSTOR}{program}\n"), says);
    }
    assert_eq!(gated(), 0, "nobody has had to wait so far");
    let behind_the_gate = [
        ("", "has ended before `ready`"),
        ("hear('drained')", "has ended before `ready`"),
        ("time.sleep(60)", "was not ready in 2s"),
        ("hear('drained')\nsay(message='refused', sentence='no such luck')", "no such luck"),
        ("hear('drained')\nsay(message='ready')", "has ended before `going`"),
        ("hear('drained')\nsay(message='ready')\nos.close(0)", "has ended before `going`"),
        ("hear('drained')\nsay(message='ready')\nhear('go')", "has ended before `going`"),
    ];
    for (program, says) in behind_the_gate {
        fails(&format!("{IMPOSTOR}hello()\nhear('offer')\nsay(message='prepared')\n{program}\n"), says);
    }
    assert_eq!(gated(), behind_the_gate.len() as u64);
    let said = site.mason(&["handover", "--binary", "gone"]).refused();
    assert!(said.contains("gone: the new program cannot be started"), "{said}");
    // After all that it can be handed over.
    let heir = hand_over(&site);
    stampers.go_on(100);
    stampers.finish();
    assert!(daemon.ended_well());
    heir.stop(&site.path("vm.nbd"));
}

#[test]
fn what_is_only_here_stays_here() {
    let site = Site::new();
    let memory = "element Guest (type nbd) (listen unix:vm.nbd) element M (type mem) (size 1M) Guest -> M";
    site.write("mem.mason", memory);
    site.write("b.mason", plain().replace("vm.nbd", "b.nbd"));
    let daemon = site.run(&["b.mason", "mem.mason"]);
    let said = site.mason(&["handover"]).refused();
    assert!(said.contains("M (") && said.contains("would be lost"), "{said}");
    assert_eq!(site.control().graph("b")["live"]["gated"], 0);
    site.mason(&["unload", "mem"]).done();
    hand_over(&site).stop(&site.path("b.nbd"));
    assert!(daemon.ended_well());
}

#[test]
fn a_log_and_an_overlay_survive() {
    let site = Site::new();
    site.write(
        "vm.mason",
        graph(
            "element Wal (type wal) element Log (type file) (path a.log) (size 4M)\n\
             element Try (type cow) element Changes (type file) (path a.cow) (size 66M)",
            "Guest -> Wal (Wal, out) -> Try (Wal, log) -> Log (Try, base) -> A (Try, overlay) -> Changes",
        ),
    );
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(&site.path("vm.nbd"), 0, 16 << 8, 2, 32);
    site.mason(&["set", "Try.merge_rate", "1G/s"]).done();
    let mut heirs = Vec::new();
    for round in 0..12 {
        stampers.go_on(100);
        if round == 6 {
            until("a commit begins", || site.mason(&["call", "Try.commit"]).code == Some(0));
        }
        // One in three is undone, and the elements go on with what they know.
        if round % 3 == 2 {
            let said = try_program(
                &site,
                &format!("{IMPOSTOR}hello()\nhear('offer')\nsay(message='prepared')\nhear('drained')\n"),
                "20s",
            );
            assert!(said.contains("has ended before `ready`"), "{said}");
            stampers.go_on(100);
        }
        heirs.push(hand_over(&site));
        assert_eq!(site.mason(&["get", "Try.merge_rate"]).done(), "1G/s\n");
    }
    // A process that has just come may not have opened it yet.
    until("everything is in the base", || site.mason(&["get", "Try.state"]).out == "committed\n");
    stampers.finish();
    assert!(daemon.ended_well());
    heirs.pop().unwrap().stop(&site.path("vm.nbd"));
}

#[test]
fn a_graph_goes_over_as_it_runs() {
    let site = Site::new();
    site.write("vm.mason", graph("element Limit (type throttle) (rate 1G/s)", "Guest -> Limit -> A"));
    site.write("tcp.mason", "element T (type nbd) (listen tcp:127.0.0.1:0)\nelement N (type null)\nT -> N\n");
    let daemon = site.run(&["vm.mason", "tcp.mason", "--metrics", "tcp:127.0.0.1:0"]);
    site.mason(&["set", "Limit.rate", "2G/s", "--graph", "vm"]).done();
    site.mason(&["insert", "P (type probe)", "between", "Guest", "and", "Limit", "--graph", "vm"]).done();
    let shown = |site: &Site| site.mason(&["show", "--graph", "vm"]).done();
    let (graph, list) = (shown(&site), site.mason(&["status", "--json"]).done());
    let uri = |list: &str| {
        let status: serde_json::Value = serde_json::from_str(list).unwrap();
        status["graphs"][1]["live"]["exports"][0]["uri"].as_str().unwrap().to_owned()
    };
    let _first = hand_over(&site);
    assert_eq!(shown(&site).lines().count(), graph.lines().count());
    assert!(shown(&site).contains("rate 2G/s"), "{}", shown(&site));
    let after = site.mason(&["status", "--json"]).done();
    assert_eq!(uri(&after), uri(&list), "the port is the same");
    client("nbdinfo", &[&uri(&after)]);
    // What the file says is known, and so is that something else runs.
    let said = site.mason(&["reload", "vm.mason", "--graph", "vm", "--dry-run"]).done();
    assert!(
        said.contains("- P (probe)") && said.contains("2G/s -> 1G/s") && said.contains("2 kept"),
        "{said}"
    );
    let second = hand_over(&site);
    site.mason(&["save", "vm"]).done();
    assert!(std::fs::read_to_string(site.path("vm.mason")).unwrap().contains("2G/s"));
    assert!(daemon.ended_well());
    second.stop(&site.path("vm.nbd"));
}

#[test]
fn a_trial_goes_on() {
    let site = Site::new();
    site.write("vm.mason", plain());
    site.write("next.mason", graph("element P (type probe)", "Guest -> P -> A"));
    let daemon = site.run(&["vm.mason"]);
    let mut raw = Raw::ready(&site.path("vm.nbd"));
    raw.write(0, &[1; 4096]);
    site.mason(&["try", "next.mason", "--graph", "vm"]).done();
    raw.write(0, &[2; 4096]);
    let _first = hand_over(&site);
    assert_eq!(raw.read(0, 4096), [2; 4096]);
    let said = site.mason(&["reload", "vm.mason"]).refused();
    assert!(said.contains("is being tried"), "{said}");
    drop(raw);
    until("the client has gone", || site.mason(&["discard"]).code == Some(0));
    assert_eq!(Raw::ready(&site.path("vm.nbd")).read(0, 4096), [1; 4096]);
    let second = hand_over(&site);
    assert_eq!(Raw::ready(&site.path("vm.nbd")).read(0, 4096), [1; 4096]);
    assert!(daemon.ended_well());
    second.stop(&site.path("vm.nbd"));
}

#[test]
fn a_move_goes_on_in_the_process_that_comes() {
    let mut world = World::new();
    // There is little to copy: what guests have written so far.
    world.migrate(TO, &["--rate", "128k/s", "--until", "begun"]).done();
    let mut heirs = Vec::new();
    for _ in 0..3 {
        world.go_on();
        let before = world.status()["remaining"].as_u64().unwrap();
        heirs.push(hand_over(&world.site));
        world.go_on();
        let status = world.status();
        assert_eq!(status["state"], "copying", "{status}");
        // What was copied is known, and perhaps what has been on its way at that instant is not.
        assert!(status["remaining"].as_u64().unwrap() <= before + (4 << 20), "{status}, {before} before");
    }
    world.mason(&["set", "A_copy.rate", "unlimited"]).done();
    world.until_state("done");
    world.go_on();
    world.verify();
    assert_eq!((world.site.head("a.img"), world.site.head("b.img")), ("moved".into(), "active".into()));
    world.site.has_no_move();
    heirs.pop().unwrap().stop(world.daemon.socket());
}

#[test]
fn another_file_at_the_path_is_not_served() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let daemon = site.run(&["vm.mason"]);
    let mut raw = Raw::ready(&site.path("vm.nbd"));
    raw.write(0, &[1; 4096]);
    std::fs::rename(site.path("a.img"), site.path("b.img")).unwrap();
    let refused = |what: &str| {
        let said = site.mason(&["handover"]).refused();
        assert!(said.contains("its path leads to another file by now, or to none"), "{what}: {said}");
    };
    refused("gone");
    assert!(!site.path("a.img").exists(), "none was made");
    site.write("a.img", vec![7; 64 << 20]);
    refused("replaced");
    assert_eq!(raw.read(0, 4096), [1; 4096]);
    std::fs::rename(site.path("b.img"), site.path("a.img")).unwrap();
    let heir = hand_over(&site);
    assert_eq!(raw.read(0, 4096), [1; 4096]);
    assert!(daemon.ended_well());
    heir.stop(&site.path("vm.nbd"));
}

#[test]
fn a_request_that_does_not_end_keeps_the_program() {
    let site = Site::new();
    let slow = "element Slow (type delay) (read 60s) element Other (type nbd) (listen unix:slow.nbd)";
    site.write("vm.mason", graph(slow, "Guest -> A Other -> Slow -> A"));
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(&site.path("vm.nbd"), 0, BLOCKS, 2, 33);
    let mut stuck = Raw::ready(&site.path("slow.nbd"));
    stuck.request(READ, 8192, 4096);
    let mut control = site.control();
    until("it waits", || {
        let graph = control.graph("vm");
        graph["edges"].as_array().unwrap().iter().any(|edge| edge["to"] == "Slow" && edge["requests"] == 1)
    });
    let said = site.mason(&["handover", "--deadline", "1s"]).refused();
    assert!(said.contains("Other: read of 4096 at 8192") && said.contains("has not been replaced"), "{said}");
    stampers.go_on(200);
    stampers.finish();
    assert_eq!(control.ask("POST", "/v1/handover", &json!({ "deadline_seconds": -1 })).0, 400);
    drop(stuck);
    drop::<Mason>(daemon);
}
