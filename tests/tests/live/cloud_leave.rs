//! A disk in a bucket is left for another host, or taken: what only this machine has stays behind by mistake never, and what
//! a living process has is not taken from it.

use crate::cloud::{Cloud, URL};
use blockmason_tests::client;
use blockmason_tests::control::{command, ended};
use blockmason_tests::mason::until;
use blockmason_tests::raw::{DISC, FLUSH, READ, Raw, WRITE};
use mason_bucket::{Action, Hold, Operation, Rule};
use std::net::Shutdown;

/// Nothing goes into the bucket before it has to.
const LAZY: &str = "(size 32M) (dirty_time 1h)";
const LEN: usize = 4096;

/// Where nothing is read before it is asked for.
const FAR: u64 = 4 << 20;

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
    Raw::ready(daemon.socket()).write(FAR, &[1; LEN]);
    cloud.drain();
    daemon.stop_well();
    std::fs::remove_file(cloud.site.path("vm1.cache")).unwrap();
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    // The encryption is open.
    assert_eq!(raw.read(0, LEN as u32), [0; LEN]);
    // Half of a block of the encryption: the rest is read first, from the bucket.
    let hold = Hold::default();
    cloud.server.fault(Rule::always(Action::Hold(hold.clone())).on(Operation::Get).prefix("vm1/b/"));
    raw.request(WRITE, FAR, 512);
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
    assert_eq!(Raw::ready(&socket).read(FAR, LEN as u32), expected);
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

/// What only the SSD has is not forgotten because its file is not where it was, or because another host comes.
#[test]
fn a_disk_is_not_served_without_the_cache_that_may_have_more() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with(LAZY);
    let daemon = cloud.run();
    Raw::ready(daemon.socket()).write(0, &[1; LEN]);
    cloud.drain();
    Raw::ready(daemon.socket()).write(0, &[2; LEN]);
    daemon.kill();
    let (file, old) = (cloud.site.path("vm1.cache"), cloud.site.path("old.cache"));
    std::fs::rename(&file, &old).unwrap();
    let named = format!("{}", file.display());
    let stat = cloud.bucket("stat", &[]).done();
    assert!(stat.contains(&named) && stat.contains("may have changes that are not here"), "{stat}");
    // Neither with a new cache nor with none.
    for without in [false, true] {
        if without {
            cloud.without("Ssd");
        }
        let daemon = cloud.run();
        assert_ne!(Raw::ready(daemon.socket()).ask(READ, 0, LEN as u32, &[]).unwrap(), 0);
        until("it is said", || cloud.site.mason(&["events", "--json"]).out.contains(&named));
        daemon.kill();
        let _ = std::fs::remove_file(&file);
    }
    // Put back, it goes on.
    std::fs::rename(&old, &file).unwrap();
    cloud.serve_with(LAZY);
    let daemon = cloud.run();
    assert_eq!(Raw::ready(daemon.socket()).read(0, LEN as u32), [2; LEN]);
    // Loaded again, and drained this time, it is needed by nobody.
    cloud.drain();
    daemon.stop_well();
    std::fs::remove_file(&file).unwrap();
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    assert_eq!(raw.read(0, LEN as u32), [2; LEN]);
    raw.write(0, &[3; LEN]);
    drop(raw);
    daemon.kill();
    // It is lost for good.
    std::fs::remove_file(&file).unwrap();
    let taken = cloud.bucket("take", &[]).done();
    assert!(taken.contains(&named), "{taken}");
    let daemon = cloud.run();
    assert_eq!(Raw::ready(daemon.socket()).read(0, LEN as u32), [2; LEN]);
    daemon.stop_well();
}

/// Its guest must not go on with a disk that no longer is one.
#[test]
fn a_host_that_has_lost_its_disk_answers_no_more_writes() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with("(size 32M) (dirty_time 20ms)");
    // What that has is still read.
    cloud.without("Ram");
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    raw.write(0, &[1; LEN]);
    cloud.drain();
    cloud.bucket("take", &["--force"]).done();
    // Until the cache hears of it.
    until("writes fail", || raw.ask(WRITE, 8192, LEN as u32, &[2; LEN]).unwrap() != 0);
    for offset in [0, 8192] {
        assert_ne!(raw.ask(READ, offset, LEN as u32, &[]).unwrap(), 0, "{offset}");
    }
    assert_ne!(raw.ask(FLUSH, 0, 0, &[]).unwrap(), 0);
    let status = cloud.site.mason(&["status"]).done();
    assert!(status.contains("Ssd does not work: the disk below has ended"), "{status}");
    daemon.kill();
}

/// A virtual machine that moves gets no errors where the host that it moves to cannot serve it.
#[test]
fn what_does_not_work_is_not_activated() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with(LAZY);
    cloud.change("element Guest  (type nbd)", "element Guest  (type nbd) (standby yes)");
    let daemon = cloud.run();
    cloud.site.mason(&["activate", "cloud"]).done();
    Raw::ready(daemon.socket()).write(0, &[1; LEN]);
    cloud.drain();
    let again = || {
        cloud.site.mason(&["unload", "cloud"]).done();
        cloud.site.mason(&["load", "cloud.mason"]).done();
    };
    again();
    cloud.site.write("vm1.key", [8; 32]);
    let mut early = Raw::ready(daemon.socket());
    early.request(READ, 0, LEN as u32);
    let refused = cloud.site.mason(&["activate", "cloud"]).refused();
    assert!(refused.contains("no key slot opens with this key"), "{refused}");
    assert!(cloud.site.mason(&["status"]).done().contains("stands by"));
    let refused = cloud.site.mason(&["get", "Ssd.dirty"]).refused();
    assert!(refused.contains("stands by"), "{refused}");
    cloud.site.write("vm1.key", [7; 32]);
    drop(early);
    again();
    let mut early = Raw::ready(daemon.socket());
    early.request(READ, 0, LEN as u32);
    cloud.site.mason(&["activate", "cloud"]).done();
    assert_eq!((early.reply(), early.bytes(LEN)), (0, vec![1; LEN]));
    drop(early);
    daemon.stop_well();
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
    let (mut asks, mut stays) = (Raw::ready(daemon.socket()), Raw::ready(daemon.socket()));
    stays.request(WRITE, 0, LEN as u32);
    stays.send(&[3; LEN]);
    asks.request(READ, 0, LEN as u32);
    asks.0.shutdown(Shutdown::Write).unwrap();
    assert!(asks.ended());
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
