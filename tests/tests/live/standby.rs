//! A disk in a bucket whose virtual machine moves: the host it moves to listens and waits while the other one serves.

use crate::Site;
use blockmason_tests::raw::{READ, Raw};
use mason_bucket::Server;
use std::path::Path;

fn graph(site: &Site, server: &Server, standby: &str) {
    let keys = format!(
        "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n",
        server.access(),
        server.secret()
    );
    site.write("keys", keys);
    let text = format!(
        "element Guest (type nbd) (listen unix:vm.nbd) (standby {standby})\n\
         element Ram (type cache) (size 8M)\n\
         element Disk (type s3) (bucket vms) (prefix vm) (endpoint {}) (credentials keys)\n\
         Guest -> Ram -> Disk\n",
        server.endpoint()
    );
    site.write("vm.mason", text);
}

fn first_byte(socket: &Path) -> u8 {
    Raw::ready(socket).read(0, 4096)[0]
}

fn status(site: &Site) -> String {
    site.mason(&["status"]).done()
}

#[test]
fn a_disk_goes_from_one_host_to_the_other_while_its_guest_is_connected() {
    let server = Server::new();
    server.store().create_bucket("vms");
    let (old, new) = (Site::new(), Site::new());
    graph(&old, &server, "no");
    graph(&new, &server, "yes");
    let endpoint = server.endpoint();
    let disk =
        ["bucket", "create", "s3://vms/vm", "--size", "8M", "--credentials", "keys", "--endpoint", &endpoint];
    blockmason_tests::control::mason(old.folder(), &disk).done();

    let serves = old.run(&["vm.mason"]);
    let waits = new.run(&["vm.mason"]);
    assert!(status(&new).contains("stands by"), "{}", status(&new));
    Raw::ready(serves.socket()).write(0, &[7; 4096]);
    // The guest is connected to both; what it asks the one that waits is answered by the one that serves.
    let mut early = Raw::ready(waits.socket());
    early.request(READ, 0, 4096);
    let refused = new.mason(&["reload", "vm.mason", "--force"]).refused();
    assert!(refused.contains("`mason activate vm` first"), "{refused}");
    old.mason(&["unload", "vm"]).done();
    assert_eq!(new.mason(&["activate"]).done(), "vm serves\n");
    assert_eq!(early.reply(), 0);
    assert_eq!(early.bytes(4096)[0], 7);
    assert_eq!(new.mason(&["activate", "vm"]).done(), "vm served before\n");
    Raw::ready(waits.socket()).write(0, &[8; 4096]);

    // A guest is there: the next daemon serves at once.
    waits.kill();
    let again = new.run(&["vm.mason"]);
    assert_eq!(first_byte(again.socket()), 8);
    assert!(!status(&new).contains("stands by"));

    // Once it has been unloaded, the guest is elsewhere.
    new.mason(&["unload", "vm"]).done();
    new.mason(&["load", "vm.mason"]).done();
    assert!(status(&new).contains("stands by"));
    old.mason(&["load", "vm.mason"]).done();
    assert_eq!(first_byte(&old.path("vm.nbd")), 8);
}

#[test]
fn what_cannot_be_activated_stands_by_as_before() {
    let server = Server::new();
    server.store().create_bucket("vms");
    let site = Site::new();
    graph(&site, &server, "yes");
    let endpoint = server.endpoint();
    let place = ["--credentials", "keys", "--endpoint", &endpoint];
    let disk = ["bucket", "create", "s3://vms/vm", "--size", "8M"];
    blockmason_tests::control::mason(site.folder(), &[&disk[..], &place].concat()).done();
    let waits = site.run(&["vm.mason"]);
    let volume = server.store().keys("vms").into_iter().find(|key| key.ends_with("/volume")).unwrap();
    let kept = server.store().get("vms", &volume).unwrap().bytes;
    server.store().put("vms", &volume, "not a volume");
    let refused = site.mason(&["activate", "vm"]).refused();
    assert!(refused.contains("no volume of Block Mason"), "{refused}");
    assert!(status(&site).contains("stands by"));
    // Nothing is left of the attempt.
    server.store().put("vms", &volume, kept.clone());
    site.mason(&["activate", "vm"]).done();
    assert_eq!(first_byte(waits.socket()), 0);
    site.mason(&["unload", "vm"]).done();
    site.mason(&["load", "vm.mason"]).done();
    server.store().put("vms", &volume, "not a volume");
    site.mason(&["activate", "vm"]).refused();
    // And so does the next daemon.
    waits.kill();
    server.store().put("vms", &volume, kept);
    let waits = site.run(&["vm.mason"]);
    assert!(status(&site).contains("stands by"));
    site.mason(&["activate", "vm"]).done();
    assert_eq!(first_byte(waits.socket()), 0);
}
