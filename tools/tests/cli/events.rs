//! `mason events`.

use crate::harness::{Home, MASON};
use std::io::{BufRead, BufReader};

fn kinds(text: &str) -> Vec<String> {
    text.lines().map(|line| line.split(' ').skip(1).take(2).collect::<Vec<_>>().join(" ")).collect()
}

#[test]
fn what_has_happened_is_shown() {
    let home = Home::new();
    home.memory_graph("one");
    home.memory_graph("two");
    let daemon = home.run(&["one.mason"], 1);
    home.mason(&["load", "two.mason"]).done();
    home.mason(&["unload", "two"]).done();
    let text = home.mason(&["events"]).done();
    assert_eq!(kinds(&text), ["one loaded", "two loaded", "two unloaded"], "{text}");
    assert!(text.starts_with("20") && text.lines().next().unwrap().contains("Z one loaded the graph serves"));
    assert_eq!(kinds(&home.mason(&["events", "--last", "1"]).done()), ["two unloaded"]);
    assert_eq!(kinds(&home.mason(&["events", "--graph", "./one.mason"]).done()), ["one loaded"]);
    let json = home.mason(&["events", "--json", "--last", "1"]).json();
    assert_eq!((&json["kind"], &json["number"]), (&"unloaded".into(), &3.into()), "{json}");
    daemon.stop().done();
}

#[test]
fn a_server_that_is_lost_and_back_is_told_as_it_happens() {
    let home = Home::new();
    home.memory_graph("far");
    home.file(
        "near.mason",
        "element Guest (type nbd) (listen unix:near.nbd)\n\
         element Remote (type nbd_client) (uri nbd+unix:///?socket=far.nbd) (reconnect 60s)\n\
         Guest -> Remote\n",
    );
    let far = home.run(&["far.mason", "--control", "far.sock"], 1);
    let near = home.run(&["near.mason", "--control", "near.sock"], 1);
    let mut command = home.command(MASON, &["events", "--follow", "--control", "near.sock", "--json"]);
    let mut follower = command.spawn().unwrap();
    let mut lines = BufReader::new(follower.stdout.take().unwrap()).lines();
    let mut next = || -> serde_json::Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    assert_eq!(next()["kind"], "loaded");
    // A connection is made when a request needs one.
    let mut client = home.nbd_client("near.nbd");
    client.read(0, 512).unwrap();
    far.stop().done();
    let lost = next();
    assert_eq!((&lost["kind"], &lost["element"]), (&"notice".into(), &"Remote".into()), "{lost}");
    assert!(lost["message"].as_str().unwrap().contains("far.nbd is lost"), "{lost}");
    let far = home.run(&["far.mason", "--control", "far.sock"], 1);
    client.read(0, 512).unwrap();
    let back = next();
    assert!(back["message"].as_str().unwrap().contains("answers again"), "{back}");
    drop(client);
    near.stop();
    far.stop().done();
    let mut last = serde_json::Value::Null;
    for line in lines {
        last = serde_json::from_str(&line.unwrap()).unwrap();
    }
    assert!(last.is_null() || last["kind"] == "unloaded", "{last}");
    assert_eq!(follower.wait().unwrap().code(), Some(1), "the daemon has ended");
}

#[test]
fn an_error_that_a_guest_got_is_told_and_not_too_often() {
    let home = Home::new();
    home.file(
        "vm.mason",
        "element Guest (type nbd) (listen unix:vm.nbd)\n\
         element Bad (type error) (op read)\n\
         element Disk (type mem) (size 1M)\n\
         Guest -> Bad -> Disk\n",
    );
    let daemon = home.run(&["vm.mason"], 1);
    let mut client = home.nbd_client("vm.nbd");
    for _ in 0..30 {
        assert!(client.read(512, 512).is_err());
    }
    drop(client);
    let text = home.mason(&["events"]).done();
    let errors: Vec<_> = text.lines().filter(|line| line.contains(" vm error ")).collect();
    assert_eq!(errors.len(), 10, "{text}");
    assert!(errors[0].contains("error Bad: read at 512: ") && errors[0].contains("kind io"), "{text}");
    assert_eq!(home.mason(&["get", "Guest.errors"]).done(), "30\n");
    assert_eq!(home.mason(&["get", "Bad.failed"]).done(), "30\n");
    let _ = daemon.stop();
}
