//! `mason pool scrub`, `mason pool repair`, and the room that snapshots take, by the real program.

use crate::harness::Home;
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::FileExt;

const GRAPH: &str = "element Guest (type nbd) (listen unix:a.nbd)
element Disk (type parallax) (pool a.pool) (volume v)
Guest -> Disk
";

/// A pool with a volume of checksums, a snapshot, and what has changed since.
fn pool(format: &str) -> Home {
    let home = Home::new();
    home.mason(&["pool", "create", "a.pool", "--size", "128M"]).done();
    home.file("one.raw", &"1".repeat(4 << 20));
    let import = ["volume", "import", "a.pool", "v", "one.raw", "--checksums", "--format", format];
    home.mason(&import).done();
    home.mason(&["volume", "snapshot", "a.pool", "v@s"]).done();
    home
}

/// First bytes of the nodes of a kind and level 0 that are in the pool.
fn nodes(file: &File, kind: u8) -> Vec<u64> {
    let blocks = file.metadata().unwrap().len() / 4096;
    let is = |at: &u64| {
        let mut head = [0; 10];
        file.read_exact_at(&mut head, at * 4096).unwrap();
        head.starts_with(b"PXND") && head[8..] == [kind, 0]
    };
    (0..blocks).filter(is).map(|at| at * 4096).collect()
}

fn open(home: &Home) -> File {
    File::options().read(true).write(true).open(home.path("a.pool")).unwrap()
}

fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

#[test]
fn a_scrub_mends_what_has_a_second_copy_and_names_the_rest() {
    for format in ["1", "2"] {
        let home = pool(format);
        let sound = home.mason(&["pool", "scrub", "a.pool", "--json"]).json();
        assert_eq!((&sound["problems"], &sound["more"]), (&json!([]), &json!(0)), "{sound}");
        assert!(sound["bytes"].as_u64().unwrap() > 4 << 20, "{sound}");
        let file = open(&home);
        let leaves = nodes(&file, 1);
        flip(&file, leaves[0] + 70);
        // While a daemon serves it.
        home.file("a.mason", GRAPH);
        let daemon = home.run(&["a.mason"], 1);
        let found = home.mason(&["pool", "scrub", "a.pool", "--full-speed"]);
        assert_eq!(found.code, Some(1));
        assert!(found.out.contains("was damaged, and is written anew"), "{}", found.out);
        home.mason(&["pool", "scrub", "a.pool"]).done();
        drop(daemon);
        home.mason(&["pool", "check", "a.pool"]).done();
        // A block of data: where all of a block is ones.
        let blocks = file.metadata().unwrap().len() / 4096;
        let mut block = vec![0; 4096];
        let is = |at: &u64| {
            file.read_exact_at(&mut block, at * 4096).unwrap();
            block.iter().all(|byte| *byte == b'1')
        };
        let data = (0..blocks).find(is).unwrap();
        flip(&file, data * 4096 + 5);
        let found = home.mason(&["pool", "scrub", "a.pool"]);
        assert_eq!(found.code, Some(1));
        assert!(found.out.contains("v@s: the 4096 bytes at 0 are damaged"), "{}", found.out);
    }
}

#[test]
fn a_repair_says_what_it_would_do_and_does_it() {
    for format in ["1", "2"] {
        let home = pool(format);
        assert_eq!(home.mason(&["pool", "repair", "a.pool"]).done(), "there is nothing to repair\n");
        let file = open(&home);
        let before = nodes(&file, 1);
        // Both copies of the leaf that has the second half.
        let index = |at: &u64| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at + 24).unwrap();
            u64::from_le_bytes(bytes)
        };
        let leaf: Vec<u64> = before.iter().copied().filter(|at| index(at) == 1).collect();
        assert!(leaf.len() >= 2, "{before:?}");
        leaf.iter().for_each(|at| flip(&file, at + 70));
        let said = home.mason(&["pool", "repair", "a.pool"]);
        assert_eq!(said.code, Some(1));
        assert!(said.out.contains("v@s: the 2097152 bytes at 2097152 cannot be read"), "{}", said.out);
        assert!(said.out.contains("left: ") && said.err.contains("give --do"), "{}", said.err);
        home.file("a.mason", GRAPH);
        let daemon = home.run(&["a.mason"], 1);
        let mut guest = home.nbd_client("a.nbd");
        assert_eq!(guest.read(0, 4096).unwrap(), [b'1'; 4096]);
        assert_eq!(guest.read(2 << 20, 4096), Err(5), "it is lost");
        let busy = home.mason(&["pool", "repair", "a.pool", "--do"]);
        assert!(busy.code == Some(1) && busy.err.contains("stop its daemon"), "{}", busy.err);
        drop(guest);
        drop(daemon);
        let kept = home.mason(&["pool", "repair", "a.pool", "--do"]);
        assert!(kept.code == Some(1) && kept.out.contains("still: "), "{}", kept.out);
        let done = home.mason(&["pool", "repair", "a.pool", "--do", "--lost", "zero", "--json"]).json();
        assert_eq!(done["after"]["problems"], json!([]), "{done}");
        home.mason(&["pool", "check", "a.pool"]).done();
        home.mason(&["volume", "export", "a.pool", "v@s", "out.raw"]).done();
        let out = std::fs::read(home.path("out.raw")).unwrap();
        assert!(
            out[..2 << 20].iter().all(|byte| *byte == b'1') && out[2 << 20..].iter().all(|byte| *byte == 0)
        );
        let free =
            |home: &Home| home.mason(&["pool", "stat", "a.pool", "--json"]).json()["free"].as_u64().unwrap();
        let had = free(&home);
        home.mason(&["volume", "delete", "a.pool", "v@s"]).done();
        home.mason(&["volume", "delete", "a.pool", "v"]).done();
        home.mason(&["pool", "gc", "a.pool"]).done();
        assert!(free(&home) >= had + (2 << 20));
        home.mason(&["pool", "check", "a.pool"]).done();
    }
}

#[test]
fn a_history_says_which_snapshot_takes_the_room() {
    let home = pool("1");
    let run = |args: &[&str]| home.mason(args).done();
    let json_of = |args: &[&str]| home.mason(args).json();
    let write = |offset: u64| {
        use blockmason_elements::parallax::tool::{self, Operation};
        // 64 KiB of something else.
        let data = "AAEC".repeat(21_845) + "AA==";
        let write = Operation::Write { volume: "v".into(), offset, data, receiver: None };
        tool::open(&home.path("a.pool")).unwrap().carry_out(&write).unwrap();
    };
    write(0);
    write(1 << 20);
    run(&["volume", "snapshot", "a.pool", "v@t"]);
    write(0);
    let found = json_of(&["volume", "stat", "a.pool", "v", "--history", "--json"]);
    let of = |ix: usize, key: &str| found[ix][key].as_u64().unwrap();
    assert_eq!(found.as_array().map(Vec::len), Some(3), "{found}");
    assert_eq!(
        [&found[0]["snapshot"], &found[1]["snapshot"], &found[2]["snapshot"]],
        [&json!("s"), &json!("t"), &Value::Null]
    );
    assert_eq!([of(0, "changed"), of(1, "changed"), of(2, "changed")], [4 << 20, 128 << 10, 64 << 10]);
    assert_eq!([of(0, "mapped"), of(1, "mapped"), of(2, "mapped")], [4 << 20; 3]);
    assert!(of(0, "freed_if_deleted") >= 128 << 10 && of(1, "freed_if_deleted") >= 64 << 10, "{found}");
    let text = run(&["volume", "stat", "a.pool", "v", "--history"]);
    assert!(text.contains("freed if deleted") && text.lines().count() == 4, "{text}");
    let long = run(&["volume", "list", "a.pool", "--long"]);
    assert!(long.contains("v@s") && long.contains("v@t") && long.lines().count() == 4, "{long}");
    // What is said to be freed is.
    let free = || json_of(&["pool", "stat", "a.pool", "--json"])["free"].as_u64().unwrap();
    let before = free();
    run(&["volume", "delete", "a.pool", "v@s"]);
    run(&["pool", "gc", "a.pool"]);
    assert!(free() >= before + of(0, "freed_if_deleted") - (64 << 10), "{before} {}", free());
}
