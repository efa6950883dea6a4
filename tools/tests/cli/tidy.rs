//! `mason volume defrag` and `trim` beside a guest that writes, and where nobody serves the pool.

use crate::harness::{Home, NbdClient};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};

const BLOCK: usize = 4096;
/// Of the volume.
const BLOCKS: usize = 4096;

/// A block that is filled with that.
fn fill(client: &mut NbdClient, block: usize, byte: u8) {
    client.write((block * BLOCK) as u64, &[byte; BLOCK]).unwrap();
}

fn count(found: &Value, key: &str) -> u64 {
    found[key].as_u64().unwrap_or_else(|| panic!("{key}: {found}"))
}

/// Writes, reads back, and now and then makes zeros, until it is told to stop.
fn guest(client: &mut NbdClient, model: &mut [u8], seed: u64, stop: &AtomicBool) {
    let mut rng = fastrand::Rng::with_seed(seed);
    while !stop.load(Ordering::Relaxed) {
        let block = rng.usize(0..BLOCKS);
        match rng.u8(0..8) {
            0..5 => {
                model[block] = rng.u8(0..4);
                fill(client, block, model[block]);
            }
            5 => {
                model[block] = 0;
                // Discard.
                client.send(4, (block * BLOCK) as u64, BLOCK as u32).unwrap();
            }
            6 => client.send(3, 0, 0).unwrap(),
            _ => {
                let found = client.read((block * BLOCK) as u64, BLOCK as u32).unwrap();
                assert!(found.iter().all(|byte| *byte == model[block]), "block {block} has {}", found[0]);
            }
        }
    }
}

#[test]
fn a_volume_is_put_in_order_while_a_guest_uses_it() {
    for (format, more) in [("1", &[][..]), ("2", &[]), ("1", &["--checksums"])] {
        let home = Home::new();
        home.mason(&["pool", "create", "a.pool", "--size", "128M"]).done();
        let create = ["volume", "create", "a.pool", "v", "--size", "16M", "--format", format];
        home.mason(&[&create, more].concat()).done();
        home.file(
            "vm.mason",
            "element Guest (type nbd) (listen unix:vm.nbd)\n\
             element Disk (type parallax) (pool a.pool) (volume v)\n\
             Guest -> Disk\n",
        );
        let daemon = home.run(&["vm.mason"], 1);
        let mut client = home.nbd_client("vm.nbd");
        let mut model: Vec<u8> = (0..BLOCKS).map(|block| 1 + (block % 3) as u8).collect();
        for block in (0..BLOCKS).step_by(2).chain((1..BLOCKS).step_by(2)) {
            fill(&mut client, block, model[block]);
        }
        home.mason(&["call", "Disk.checkpoint"]).done();
        let stop = AtomicBool::new(false);
        let done: Vec<Value> = std::thread::scope(|scope| {
            scope.spawn(|| guest(&mut client, &mut model, 7, &stop));
            let json = |args: &[&str]| {
                let ended = home.mason(&[&["volume"], args, &["--json"]].concat());
                assert_eq!(ended.code, Some(0), "{ended:?}");
                ended.json()
            };
            let mut done = vec![json(&["defrag", "a.pool", "v"])];
            done.push(json(&["trim", "a.pool", "v"]));
            home.mason(&["volume", "snapshot", "a.pool", "v@s"]).done();
            done.push(json(&["defrag", "a.pool", "v"]));
            done.push(json(&["defrag", "a.pool", "v", "--unshare"]));
            done.push(json(&["trim", "a.pool", "v"]));
            stop.store(true, Ordering::Relaxed);
            done
        });
        let first = &done[0];
        assert_eq!(count(first, "windows"), 8, "{first}");
        assert!(count(first, "pieces_before") > 3000 && count(first, "moved") > 8 << 20, "{first}");
        assert!(count(&done[1], "moved") > 0, "{}", done[1]);
        assert!(count(&done[2], "shared") > 8 << 20, "{}", done[2]);
        // Nobody writes any more.
        let found = home.mason(&["volume", "defrag", "a.pool", "v", "--unshare", "--json"]).json();
        assert!(count(&found, "pieces_after") <= 64, "{found}");
        let all = client.read(0, (BLOCKS * BLOCK) as u32).unwrap();
        for (block, found) in all.chunks(BLOCK).enumerate() {
            assert!(found.iter().all(|byte| *byte == model[block]), "block {block} has {}", found[0]);
        }
        assert_eq!(home.mason(&["pool", "check", "a.pool"]).code, Some(0));
        drop(client);
        daemon.stop().done();
        let said = home.mason(&["volume", "defrag", "a.pool", "v", "--unshare"]).done();
        assert!(said.contains("windows moved                  0\n"), "{said}");
        assert_eq!(home.mason(&["pool", "check", "a.pool"]).code, Some(0));
    }
}

#[test]
fn what_cannot_be_put_in_order() {
    let home = Home::new();
    home.mason(&["pool", "create", "a.pool", "--size", "128M"]).done();
    home.mason(&["volume", "create", "a.pool", "v", "--size", "16M"]).done();
    for command in ["defrag", "trim"] {
        assert_eq!(home.mason(&["volume", command, "a.pool", "w"]).failed(), "mason: there is no volume w\n");
        let said = home.mason(&["volume", command, "a.pool", "v"]).done();
        assert!(said.starts_with("windows looked at              0\n"), "{said}");
    }
}
