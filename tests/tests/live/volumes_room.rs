//! A pool on a file system that is full: what its guests are told, what can be done about it, and that nothing is lost.

use crate::Site;
use blockmason_tests::control::mason;
use blockmason_tests::mason::Mason;
use blockmason_tests::mounts::{Tmpfs, skipped};
use blockmason_tests::raw::{FLUSH, Raw, WRITE};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const GRAPH: &str = "element Guest (type nbd) (listen unix:vm.nbd)\n\
                     element Disk (type parallax) (pool fs/vms.pool) (volume vm)\n\
                     Guest -> Disk\n";

/// What NBD calls ENOSPC.
const NO_SPACE: u32 = 28;

struct World {
    site: Site,
    daemon: Mason,
    _full: Tmpfs,
}

impl World {
    /// A pool of 512 MiB on a file system that has 96, with a volume.
    fn new() -> World {
        let site = Site::new();
        std::fs::create_dir(site.path("fs")).unwrap();
        let full = Tmpfs::mount(&site.path("fs"), 96 * MIB);
        site.write("vm.mason", GRAPH);
        mason(site.folder(), &["pool", "create", "fs/vms.pool", "--size", "512M"]).done();
        mason(site.folder(), &["volume", "create", "fs/vms.pool", "vm", "--size", "1G"]).done();
        let daemon = site.run(&["vm.mason"]);
        World { site, daemon, _full: full }
    }

    fn volume(&self, args: &[&str]) -> String {
        let (verb, rest) = args.split_first().unwrap();
        self.site.mason(&[&["volume", verb, "fs/vms.pool"], rest].concat()).done()
    }

    fn check(&self) {
        let said = self.site.mason(&["pool", "check", "fs/vms.pool"]).done();
        assert!(said.contains("1 volumes"), "{said}");
    }
}

fn pattern(number: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(number);
    (0..MIB).map(|_| rng.u8(..)).collect()
}

/// NBD_CMD_TRIM.
const TRIM: u16 = 4;

fn ask(raw: &mut Raw, command: u16, at: u64, len: u64, data: &[u8]) -> u32 {
    raw.ask(command, at, len as u32, data).unwrap()
}

/// Writes mebibytes from there on until there is no room. How many there are then.
fn fill(raw: &mut Raw, mut at: u64) -> u64 {
    loop {
        match ask(raw, WRITE, at * MIB, MIB, &pattern(at)) {
            0 => at += 1,
            NO_SPACE => return at,
            other => panic!("error {other} at {at} MiB"),
        }
    }
}

#[test]
fn a_file_system_that_is_full_is_told_as_such_and_all_goes_on() {
    if skipped(
        (!rustix::process::geteuid().is_root()).then_some("a file system is mounted, which needs root"),
    ) {
        return;
    }
    let world = World::new();
    let mut raw = Raw::ready(&world.site.path("vm.nbd"));
    let kept = fill(&mut raw, 0);
    assert!((32..96).contains(&kept), "{kept}");
    // What needs no room goes on.
    raw.write(0, &pattern(1000));
    assert_eq!(ask(&mut raw, FLUSH, 0, 0, &[]), 0);
    world.volume(&["snapshot", "vm@s"]);
    assert_eq!(ask(&mut raw, WRITE, 8 * MIB, MIB, &pattern(8)), NO_SPACE, "a snapshot sees what was there");
    let said = world.site.mason(&["pool", "stat", "fs/vms.pool", "--json"]).done();
    let said: Value = serde_json::from_str(&said).unwrap();
    assert!(said["available"].as_u64().unwrap() > 300 * MIB, "the pool itself is not full: {said}");
    assert!(said["file_system_free"].as_u64().unwrap() < 8 * MIB, "{said}");
    world.check();
    // Room is made without any.
    world.volume(&["delete", "vm@s"]);
    raw.write(8 * MIB, &pattern(9));
    assert_eq!(ask(&mut raw, TRIM, 16 * MIB, 16 * MIB, &[]), 0);
    assert_eq!(ask(&mut raw, FLUSH, 0, 0, &[]), 0);
    let more = fill(&mut raw, 200);
    assert!(more >= 212, "{more}: what was discarded is room again");
    drop(raw);
    // Nor does the next process need any.
    let World { site, daemon, _full } = world;
    daemon.kill();
    let daemon = site.run(&["vm.mason"]);
    let world = World { site, daemon, _full };
    let mut raw = Raw::ready(&world.site.path("vm.nbd"));
    for at in (0..kept).chain(200..more) {
        let wanted = match at {
            0 => pattern(1000),
            8 => pattern(9),
            16..32 => vec![0; MIB as usize],
            _ => pattern(at),
        };
        assert!(raw.read(at * MIB, MIB as u32) == wanted, "at {at} MiB");
    }
    drop(raw);
    world.check();
    world.daemon.stop_well();
}
