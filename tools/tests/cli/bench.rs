//! `mason bench`.

use crate::harness::Home;

#[test]
fn measures_and_listens_to_nobody() {
    let home = Home::new();
    home.memory_graph("vm");
    let ended = home.mason(&["bench", "vm.mason", "--time", "50ms", "--streams", "2", "--json"]);
    assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""));
    let report = ended.json();
    let read = &report["sources"][0]["operations"][0];
    assert_eq!((&read["operation"], &report["errors"]), (&"read".into(), &0.into()), "{report:#}");
    assert!(report["requests"].as_u64().unwrap() > 0);
    assert_eq!(read["bytes"].as_u64().unwrap(), read["requests"].as_u64().unwrap() * 4096);
    assert!(report["cpu_seconds_per_million_requests"].as_f64().unwrap() > 0.0);
    let latency = |name: &str| read[name].as_u64().unwrap();
    assert!(latency("p50_ns") <= latency("p99_ns") && latency("p99_ns") <= latency("max_ns"));
    assert!(!home.path("vm.nbd").exists());
}

#[test]
fn writes_only_when_it_was_spelled_out() {
    let home = Home::new();
    home.memory_graph("vm");
    let args = ["bench", "vm.mason", "--time", "50ms", "--read-percent", "50", "--pattern", "sequential"];
    let refused = home.mason(&args).misused();
    assert!(refused.contains("--write"), "{refused}");
    let text = home.mason(&[&args[..], &["--write"]].concat()).done();
    assert!(text.contains(" write ") && text.contains(" read "), "{text}");
}

#[test]
fn what_cannot_be_measured_is_said() {
    let home = Home::new();
    home.memory_graph("vm");
    let larger = home.mason(&["bench", "vm.mason", "--block", "2M"]).failed();
    assert!(larger.contains("Guest (vm.mason:1:9)") && larger.contains("less than a block"), "{larger}");
    home.mason(&["bench", "vm.mason", "--block", "65M"]).misused();
    home.file(
        "ro.mason",
        "element Guest (type nbd)\nelement D (type file) (path d.img) (readonly yes)\nGuest -> D\n",
    );
    home.file("d.img", &"x".repeat(8192));
    let denied = home.mason(&["bench", "ro.mason", "--read-percent", "0", "--write"]).failed();
    assert!(denied.contains("read-only"), "{denied}");
}
