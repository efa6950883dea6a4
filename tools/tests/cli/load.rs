//! Graphs that come and go while the daemon runs, and the description of the control socket.

use crate::harness::{Home, repository};
use std::os::unix::net::UnixStream;

#[test]
fn a_graph_is_loaded_and_unloaded() {
    let home = Home::new();
    home.memory_graph("one");
    home.memory_graph("two");
    let daemon = home.run(&["one.mason"], 1);
    let uri = format!("nbd+unix:///?socket={}", home.path("two.nbd").display());
    assert_eq!(home.mason(&["load", "two.mason"]).done(), format!("ready Guest {uri}\n"));
    UnixStream::connect(home.path("two.nbd")).unwrap();
    let status = home.mason(&["status", "--json"]).json();
    let names: Vec<_> = status["graphs"].as_array().unwrap().iter().map(|graph| &graph["name"]).collect();
    assert_eq!(names, ["one", "two"]);
    assert_eq!(home.mason(&["unload", "one"]).done(), "");
    assert!(!home.path("one.nbd").exists() && home.path("two.nbd").exists());
    let gone = home.mason(&["unload", "one"]).failed();
    assert_eq!(gone, "mason: no graph one is served; served: two\n");
    // By the path of its file, from wherever.
    home.mason(&["unload", "./two.mason"]).done();
    // With the last graph gone the daemon goes on.
    assert_eq!(home.mason(&["unload", "two"]).failed(), "mason: no graph two is served; served: none\n");
    assert_eq!(home.mason(&["load", "two.mason", "--json"]).json()["exports"][0]["uri"], uri);
    daemon.stop().done();
    assert!(!home.path("two.nbd").exists());
}

#[test]
fn what_cannot_be_loaded_is_said_and_changes_nothing() {
    let home = Home::new();
    home.memory_graph("one");
    let daemon = home.run(&["one.mason"], 1);
    let twice = home.mason(&["load", "one.mason"]).failed();
    assert_eq!(twice, "mason: a graph one is served already; `mason unload one` ends it\n");
    home.file("bad.mason", "element Disk (type fiel)\n");
    let drawn = home.mason(&["load", "bad.mason"]);
    assert_eq!((drawn.code, &drawn.err), (Some(1), &home.mason(&["check", "bad.mason"]).err));
    home.file(
        "gone.mason",
        "element Guest (type nbd) (listen unix:gone.nbd)\nelement D (type file) (path gone.img)\nGuest -> D\n",
    );
    let gone = home.mason(&["load", "gone.mason"]).failed();
    assert!(gone.starts_with("mason: D (gone.mason:2:9): "), "{gone}");
    assert!(gone.contains("gone.img: there is no such file"), "{gone}");
    home.file(
        "same.mason",
        "element Guest (type nbd) (listen unix:one.nbd)\nelement D (type mem) (size 1M)\nGuest -> D\n",
    );
    let taken = home.mason(&["load", "same.mason"]).failed();
    assert!(taken.contains("Guest (same.mason:1:9)") && taken.contains("already"), "{taken}");
    let status = home.mason(&["status", "--json"]).json();
    assert_eq!(status["graphs"].as_array().unwrap().len(), 1);
    daemon.stop().done();
    assert!(home.mason(&["load", "one.mason"]).failed().contains("no daemon runs"));
    home.mason(&["load"]).misused();
}

#[test]
fn the_client_reads_and_the_daemon_opens() {
    let home = Home::new();
    home.memory_graph("one");
    let daemon = home.run(&["one.mason", "-D", "size=3M", "-D", "name=daemon"], 1);
    std::fs::create_dir(home.path("sub")).unwrap();
    home.file("sub/disk.mason", "element Disk (type file) (path ${state}/${name}.img) (size ${size})\n");
    home.file(
        "sub/two.mason",
        "include \"disk.mason\"\nelement Guest (type nbd) (listen unix:two.nbd)\nGuest -> Disk\n",
    );
    home.mason(&["load", "sub/two.mason", "-D", "name=client"]).done();
    assert_eq!(home.path("state/mason/two/client.img").metadata().unwrap().len(), 3 << 20);
    assert!(home.path("sub/two.nbd").exists(), "relative to the folder of the graph file");
    daemon.stop().done();
}

#[test]
fn the_description_of_the_control_socket_is_current() {
    let home = Home::new();
    let fresh = home.mason(&["openapi"]).done();
    let path = repository().join("docs/openapi.json");
    let kept = std::fs::read_to_string(&path).unwrap();
    assert!(kept == fresh, "write it anew: cargo run -- openapi > docs/openapi.json");
    // Each route and method is there; the router has no others, as both are made of one list.
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    let document: serde_json::Value = serde_json::from_str(&fresh).unwrap();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace("{name}", "no").replace("{element}", "no").replace("{handler}", "no");
        for method in methods.as_object().unwrap().keys() {
            let answer = home.ask("mason/vm.sock", &method.to_uppercase(), &path, "{}");
            assert!(!answer.contains("no such path") && !answer.starts_with("HTTP/1.1 405"), "{answer}");
        }
    }
    let other = home.ask("mason/vm.sock", "PATCH", "/v1/graphs", "");
    assert!(other.contains(r#""kind":"unsupported""#), "{other}");
    daemon.stop().done();
}
