//! The element `s3` over servers that really speak the protocol: one in memory that fails as it is told, and Ceph's.
#![cfg(feature = "s3")]
#![allow(clippy::unwrap_used, reason = "tests panic")]

#[path = "kit/buckets.rs"]
mod kit;

use blockmason::testing::{TestDisk, play_against_model, run};
use blockmason::{Kind, Op};
use blockmason_elements::ALL;
use blockmason_elements::cloud::tool::{self, Place};
use mason_bucket::{Action, Operation, Rgw, Rule, Server};
use std::path::Path;

/// A disk that is no multiple of its blocks.
const SIZE: u64 = 70_001;

fn disk(place: &str) -> String {
    format!("element D (type s3) (bucket vms) (prefix vm1) {place}")
}

/// Plays operations through a disk, leaves it, and finds it as it was.
fn play(place: &str, seed: u64, rounds: usize) {
    let text = disk(place);
    let left = run(seed, async |host| {
        let disk = TestDisk::new(&host, ALL, &text, "D").await.unwrap();
        play_against_model(&disk, seed, rounds).await;
        disk.write(4096, &[9; 8192]).await.unwrap();
        disk.read(0, SIZE).await.unwrap()
    });
    run(seed + 1, async |host| {
        let disk = TestDisk::new(&host, ALL, &text, "D").await.unwrap();
        assert_eq!(disk.read(0, SIZE).await.unwrap(), left);
    });
}

#[test]
fn behaves_like_a_vector_and_keeps_it() {
    let (server, folder) = (Server::new(), tempfile::tempdir().unwrap());
    play(&kit::volume(&server, folder.path(), SIZE), 1, 300);
}

/// The most memory that this process has had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn an_answer_without_an_end_takes_bounded_memory_and_is_asked_for_again() {
    let (server, folder) = (Server::new(), tempfile::tempdir().unwrap());
    let place = kit::volume(&server, folder.path(), SIZE);
    for operation in [Operation::List, Operation::Get, Operation::Put, Operation::DeleteMany] {
        server.fault(Rule::once(Action::Endless(1 << 20)).on(operation));
    }
    let before = peak();
    play(&place, 5, 20);
    let taken = peak() - before;
    // Pieces of a body lie in memory of twice their length now and then.
    assert!(taken < 512 << 20, "{taken}");
}

/// Whatever is asked of the server is on the bill once, over restarts too; and it is the disk that it was.
#[test]
fn a_meter_counts_each_request_that_the_server_sees() {
    let (server, folder) = (Server::new(), tempfile::tempdir().unwrap());
    let place = kit::volume(&server, folder.path(), SIZE);
    server.clear_log();
    let ledger = folder.path().join("vm1.ledger");
    let text = format!(
        "element M (type meter) (of D) (ledger {}) (day stop_background=0) {} M -> D",
        ledger.display(),
        disk(&place)
    );
    for seed in 0..3 {
        if seed == 2 {
            // What fails is paid for, too.
            server.fault(Rule::once(Action::SLOW_DOWN).on(Operation::Put).skip(4));
            server.fault(Rule::once(Action::CloseBefore).on(Operation::Get).skip(1));
        }
        run(seed, async |host| {
            let disk = TestDisk::new(&host, ALL, &text, "M").await.unwrap();
            play_against_model(&disk, seed, 60).await;
            assert_eq!(disk.disk.graph().get("M", "state").unwrap(), "stop_background");
            disk.disk.stop().await.unwrap();
        });
        let bill = blockmason_elements::cloud::ledger::read(&ledger, None).unwrap();
        let counted = |name: &str| {
            let days = bill["days"].as_array().unwrap().iter();
            days.map(|day| day["operations"][name]["requests"].as_u64().unwrap()).sum::<u64>() as usize
        };
        let names = [
            ("put", Operation::Put),
            ("get", Operation::Get),
            ("head", Operation::Head),
            ("list", Operation::List),
            ("delete", Operation::DeleteMany),
        ];
        for (name, operation) in names {
            assert_eq!(counted(name), server.count(operation), "{name} after life {seed}");
        }
        assert!(bill["stored"].as_u64().unwrap() > 0);
    }
}

#[test]
fn a_server_that_fails_loses_answers_and_breaks_off_changes_nothing() {
    let (server, folder) = (Server::new(), tempfile::tempdir().unwrap());
    let place = kit::volume(&server, folder.path(), SIZE);
    for (action, operation) in [
        (Action::ErrorAfter(500, "InternalError"), Operation::Put),
        (Action::CloseAfter, Operation::Put),
        (Action::CloseBefore, Operation::Put),
        (Action::CONFLICT, Operation::Put),
        (Action::SLOW_DOWN, Operation::Put),
        (Action::TruncateBody(100), Operation::Get),
        (Action::CloseAfter, Operation::DeleteMany),
    ] {
        // Now and then, so that attempts that follow are answered.
        for skip in 0..6 {
            server.fault(Rule::once(action.clone()).on(operation).skip(5 + skip * 7));
        }
    }
    play(&place, 3, 150);
}

#[test]
fn a_store_that_ignores_conditions_is_refused() {
    let (server, folder) = (Server::new(), tempfile::tempdir().unwrap());
    server.store().create_bucket("vms");
    server.fault(Rule::always(Action::IgnoreConditions));
    let place = place(&server.endpoint(), &kit::keys(folder.path(), server.access(), server.secret()));
    assert_eq!(tool::create(&place, SIZE, 4096, true).unwrap_err().kind(), Kind::Unsupported);
    assert!(server.store().keys("vms").is_empty());
}

fn place(endpoint: &str, keys: &Path) -> Place {
    Place {
        bucket: "vms".to_owned(),
        prefix: "vm1".to_owned(),
        endpoint: Some(endpoint.to_owned()),
        region: "us-east-1".to_owned(),
        credentials: Some(keys.to_owned()),
        ..Place::default()
    }
}

#[test]
fn what_is_wrong_is_said_in_one_sentence_without_secrets() {
    let (server, folder) = (Server::new(), tempfile::tempdir().unwrap());
    kit::volume(&server, folder.path(), SIZE);
    let good = kit::keys(folder.path(), server.access(), server.secret());
    let bad = folder.path().join("bad");
    std::fs::create_dir(&bad).unwrap();
    let bad = kit::keys(&bad, server.access(), "not-the-secret");
    let endpoint = server.endpoint();
    let other = |change: fn(&mut Place)| {
        let mut place = place(&endpoint, &good);
        change(&mut place);
        place
    };
    for (place, kind, says) in [
        (place(&endpoint, &bad), Kind::Denied, "SignatureDoesNotMatch"),
        (other(|place| place.bucket = "none".to_owned()), Kind::Unavailable, "there is no such bucket"),
        (other(|place| place.prefix = "vm2".to_owned()), Kind::Unavailable, "there is no volume"),
    ] {
        let error = tool::stat(&place).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        let text = format!("{error} {error:?}");
        assert!(text.contains(says) && !text.contains("not-the-secret"), "{text}");
    }
    server.fault(Rule::once(Action::CLOCK_SKEW));
    let error = tool::stat(&place(&endpoint, &good)).unwrap_err();
    assert!(error.to_string().contains("clock"), "{error}");
    let error = tool::create(&place(&endpoint, &good), SIZE, 4096, true).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy, "{error}");
}

#[test]
fn a_disk_is_checked_copied_and_deleted() {
    let (server, folder) = (Server::new(), tempfile::tempdir().unwrap());
    let text = disk(&kit::volume(&server, folder.path(), SIZE));
    run(5, async |host| {
        let disk = TestDisk::new(&host, ALL, &text, "D").await.unwrap();
        disk.write(0, &[1; 30_000]).await.unwrap();
        disk.op(Op::Discard, 4096, 4096).await.unwrap();
    });
    let here = place(&server.endpoint(), &folder.path().join("keys"));
    let there = Place { prefix: "copy".to_owned(), ..here.clone() };
    let sound = |place: &Place| {
        let found = tool::check(place, false).unwrap();
        assert_eq!(
            (&found["problems"], &found["stray"], &found["open"]),
            (&serde_json::json!([]), &0.into(), &false.into()),
            "{found}"
        );
    };
    sound(&here);
    tool::copy(&here, &there, None, true, |_, _| {}).unwrap();
    sound(&there);
    run(6, async |host| {
        let text = text.replace("(prefix vm1)", "(prefix copy)");
        let disk = TestDisk::new(&host, ALL, &text, "D").await.unwrap();
        let found = disk.read(0, SIZE).await.unwrap();
        assert!(
            (0..SIZE as usize).all(|at| found[at] == u8::from(at < 30_000 && !(4096..8192).contains(&at)))
        );
    });
    // What somebody had put when he died, and what is lost.
    server.store().put("vms", "vm1/b/05/0000000000000005.0000990000000001", vec![1; 10]);
    let block = server.store().keys("vms").into_iter().find(|key| key.starts_with("vm1/b/00/")).unwrap();
    server.store().delete("vms", &block);
    let found = tool::check(&here, true).unwrap();
    assert_eq!((&found["stray"], found["problems"].as_array().unwrap().len()), (&1.into(), 1), "{found}");
    assert_eq!(tool::check(&here, false).unwrap()["stray"], 0);
    tool::delete(&here, false, false).unwrap();
    assert!(server.store().keys("vms").iter().all(|key| key.starts_with("copy/")));
    sound(&there);
}

#[test]
fn on_the_s3_of_ceph() {
    let folder = tempfile::tempdir().unwrap();
    let Some(rgw) = Rgw::start(folder.path()) else { return };
    let keys = kit::keys(folder.path(), rgw.access(), rgw.secret());
    tool::make_bucket(&place(&rgw.endpoint(), &keys)).unwrap();
    kit::make(&rgw.endpoint(), &keys, SIZE);
    play(&format!("(endpoint {}) (credentials {})", rgw.endpoint(), keys.display()), 7, 150);
    let place = place(&rgw.endpoint(), &keys);
    let found = tool::check(&place, false).unwrap();
    assert_eq!((&found["problems"], &found["stray"]), (&serde_json::json!([]), &0.into()), "{found}");
    tool::delete(&place, false, false).unwrap();
}
