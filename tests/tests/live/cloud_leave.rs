//! A disk in a bucket is left for another host, or taken: what only this machine has stays behind by mistake never, and what
//! a living process has is not taken from it.

use crate::cloud::{Cloud, URL};
use blockmason_tests::client;
use blockmason_tests::control::{command, ended};
use blockmason_tests::mason::until;
use blockmason_tests::raw::{DISC, Raw, WRITE};
use mason_bucket::{Action, Hold, Operation, Rule};
use std::net::Shutdown;

/// Nothing goes into the bucket before it has to.
const LAZY: &str = "(size 32M) (dirty_time 1h)";
const LEN: usize = 4096;

#[test]
fn unload_leaves_nothing_behind_unless_it_is_told() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with(LAZY);
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    raw.write(0, &[1; LEN]);
    let refused = cloud.site.mason(&["unload", "cloud"]).refused();
    assert!(refused.contains("only in the cache") && refused.contains("--undrained"), "{refused}");
    // It serves as before.
    raw.write(8192, &[2; LEN]);
    drop(raw);
    cloud.site.mason(&["unload", "cloud", "--undrained"]).done();
    cloud.site.mason(&["load", "cloud.mason"]).done();
    let mut raw = Raw::ready(daemon.socket());
    assert_eq!((raw.read(0, LEN as u32), raw.read(8192, LEN as u32)), (vec![1; LEN], vec![2; LEN]));
    drop(raw);
    cloud.drain();
    cloud.site.mason(&["unload", "cloud"]).done();
    daemon.stop_well();
}

/// A guest's write is on its way when the command looks, and gets into the cache after that.
#[test]
fn unload_looks_again_when_the_last_request_has_ended() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with(LAZY);
    let daemon = cloud.run();
    Raw::ready(daemon.socket()).write(0, &[1; LEN]);
    cloud.drain();
    daemon.stop_well();
    std::fs::remove_file(cloud.site.path("vm1.cache")).unwrap();
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    // Half of a block of the encryption: the rest is read first, from the bucket.
    let hold = Hold::default();
    cloud.server.fault(Rule::always(Action::Hold(hold.clone())).on(Operation::Get).prefix("vm1/b/"));
    raw.request(WRITE, 0, 512);
    raw.send(&[2; 512]);
    hold.wait(1);
    assert_eq!(cloud.get("Ssd.dirty"), "0");
    let socket = daemon.socket().to_owned();
    let refused = std::thread::scope(|scope| {
        let unload = scope.spawn(|| cloud.site.mason(&["unload", "cloud"]).refused());
        until("the export is closed", || !socket.exists());
        hold.release();
        unload.join().unwrap()
    });
    assert!(refused.contains("only in the cache"), "{refused}");
    cloud.server.clear_faults();
    // Nothing is lost: it is here when the graph is loaded here again.
    cloud.site.mason(&["load", "cloud.mason"]).done();
    let expected = [&[2; 512][..], &[1; LEN - 512]].concat();
    assert_eq!(Raw::ready(&socket).read(0, LEN as u32), expected);
    cloud.drain();
    daemon.stop_well();
}

#[test]
fn a_disk_is_not_taken_from_a_process_that_lives() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with(LAZY);
    let daemon = cloud.run();
    Raw::ready(daemon.socket()).write(0, &[1; LEN]);
    let refused = cloud.bucket("take", &[]).refused();
    assert!(refused.contains(&daemon.pid().to_string()) && refused.contains("lives: stop it"), "{refused}");
    // Nor by another daemon here.
    let mut second = command(cloud.site.folder(), &["run", "cloud.mason", "--control", "d.sock"]);
    let second =
        ended(&second.env("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1").output().unwrap());
    assert_eq!(second.code, Some(1), "{second:?}");
    cloud.drain();
    cloud.bucket("take", &["--force"]).done();
    let mut raw = Raw::ready(daemon.socket());
    raw.write(0, &[2; LEN]);
    cloud.site.mason(&["call", "Ssd.flush"]);
    let says = "owns it now";
    until("the owner before knows", || cloud.site.mason(&["events", "--json"]).out.contains(says));
    drop(raw);
    daemon.kill();
    cloud.bucket("take", &[]).done();
}

#[test]
fn nothing_is_made_where_something_is() {
    let cloud = Cloud::new("8M");
    let endpoint = cloud.server.endpoint();
    let create = |url: &str| cloud.mason(&["bucket", "create", url, "--size", "8M", "--endpoint", &endpoint]);
    let refused = create(URL).refused();
    assert!(refused.contains("there is a volume already"), "{refused}");
    let refused = create("s3://vms/vm1/wal").refused();
    assert!(refused.contains("`wal`: choose another prefix"), "{refused}");
    // The checkpoint of a volume whose description somebody has deleted.
    let map = format!("vm2/map/{:016x}-{:016x}", u64::MAX - 1, u64::MAX - 1);
    cloud.server.store().put("vms", &map, "left");
    let refused = create("s3://vms/vm2").refused();
    assert!(refused.contains("what is left of another volume"), "{refused}");
    cloud.mason(&["bucket", "delete", "s3://vms/vm2", "--force", "--endpoint", &endpoint]).done();
    create("s3://vms/vm2").done();
}

/// Whoever only looks does not have to wait until the graph serves.
#[test]
fn a_client_may_leave_an_export_that_stands_by() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with(LAZY);
    cloud.change("element Guest  (type nbd)", "element Guest  (type nbd) (standby yes)");
    let daemon = cloud.run();
    let size: u64 = client("nbdinfo", &["--size", daemon.uri()]).trim().parse().unwrap();
    let (mut says_so, mut just_goes) = (Raw::ready(daemon.socket()), Raw::ready(daemon.socket()));
    let mut stays = Raw::ready(daemon.socket());
    stays.request(WRITE, 0, LEN as u32);
    stays.send(&[3; LEN]);
    says_so.request(DISC, 0, 0);
    assert!(says_so.ended());
    just_goes.0.shutdown(Shutdown::Write).unwrap();
    assert!(just_goes.ended());
    cloud.site.mason(&["activate", "cloud"]).done();
    assert_eq!(stays.reply(), 0);
    assert_eq!(stays.read(0, LEN as u32), [3; LEN]);

    // What it told clients has to be true when it is activated.
    drop(stays);
    cloud.drain();
    cloud.site.mason(&["unload", "cloud"]).done();
    cloud.site.mason(&["load", "cloud.mason"]).done();
    cloud.bucket("grow", &["--size", "16M"]).done();
    let refused = cloud.site.mason(&["activate", "cloud"]).refused();
    assert!(refused.contains("unload the graph and load it again"), "{refused}");
    cloud.site.mason(&["unload", "cloud"]).done();
    cloud.site.mason(&["load", "cloud.mason"]).done();
    cloud.site.mason(&["activate", "cloud"]).done();
    let (mut raw, now) = Raw::ready_with_size(daemon.socket());
    assert!(now > size, "{now}");
    assert_eq!(raw.read(0, LEN as u32), [3; LEN]);
    drop(raw);
    daemon.stop_well();
}
