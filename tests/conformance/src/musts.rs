//! The table of the specification's demands, `musts.tsv`, and the tests that keep it complete.

use std::collections::{BTreeMap, BTreeSet};

const TABLE: &str = include_str!("../musts.tsv");

struct Row {
    spec: &'static str,
    line: Option<usize>,
    hash: &'static str,
    binds: &'static str,
    what: &'static str,
    tests: Vec<&'static str>,
    reason: Option<&'static str>,
}

fn rows() -> Vec<Row> {
    let lines = TABLE.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let fields: Vec<_> = line.split('\t').collect();
            let [spec, number, hash, binds, what, tests, reason] = fields[..] else {
                panic!("not seven columns: {line}")
            };
            let tests = tests.split(',').filter(|&test| test != "-").collect();
            let reason = (reason != "-").then_some(reason);
            Row { spec, line: number.parse().ok(), hash, binds, what, tests, reason }
        })
        .collect()
}

fn names() -> BTreeSet<&'static str> {
    crate::cases::all().map(|case| case.name).collect()
}

#[test]
fn rows_are_well_formed_and_in_order() {
    let mut last = BTreeMap::new();
    for row in rows() {
        assert!(["master", "ext", "extra"].contains(&row.spec), "{}", row.spec);
        assert!(["server", "client", "both", "none"].contains(&row.binds), "{}", row.binds);
        if row.spec == "extra" {
            assert!(row.reason.is_some() && row.tests.len() == 1, "{:?}", row.tests);
            continue;
        }
        let line = row.line.expect("a line number");
        assert!(last.insert(row.spec, line).is_none_or(|before| before < line), "{} {line}", row.spec);
        assert_eq!(row.hash.len(), 16, "{} {line}", row.spec);
        assert!(row.what.len() > 8, "{} {line} says nothing", row.spec);
    }
}

#[test]
fn every_named_test_exists() {
    let names = names();
    for row in rows() {
        for test in row.tests {
            assert!(names.contains(test), "{} {:?} names '{test}'", row.spec, row.line);
        }
    }
}

#[test]
fn every_demand_on_servers_has_a_test_or_a_reason() {
    for row in rows().iter().filter(|row| ["server", "both"].contains(&row.binds)) {
        assert!(!row.tests.is_empty() || row.reason.is_some(), "{} {:?}", row.spec, row.line);
    }
}

#[test]
fn every_test_is_in_the_table() {
    let told: BTreeSet<_> = rows().into_iter().flat_map(|row| row.tests).collect();
    let missing: Vec<_> = names().into_iter().filter(|name| !told.contains(name)).collect();
    assert!(missing.is_empty(), "not in musts.tsv: {missing:?}");
}

#[test]
fn every_expectation_file_parses() {
    for text in [
        include_str!("../expect/nbdkit.txt"),
        include_str!("../expect/qemu-nbd.txt"),
        include_str!("../expect/nbdkit-tls.txt"),
    ] {
        crate::report::parse_expected(text).expect("a good file");
    }
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Compares the table with the specification itself, which is not part of this repository: set
/// `NBD_PROTO_MD` and `NBD_PROTO_EXT_MD` to the two files.
#[test]
fn the_table_has_every_line_of_the_specification() {
    let read =
        |name: &str| std::env::var(name).ok().map(|path| std::fs::read_to_string(path).expect("the file"));
    let (Some(master), Some(ext)) = (read("NBD_PROTO_MD"), read("NBD_PROTO_EXT_MD")) else {
        eprintln!("skipped: NBD_PROTO_MD and NBD_PROTO_EXT_MD are not set");
        return;
    };
    let known: BTreeSet<_> = master.lines().collect();
    let told = |spec: &str| -> BTreeMap<usize, String> {
        let rows = rows().into_iter().filter(|row| row.spec == spec);
        rows.filter_map(|row| Some((row.line?, row.hash.to_owned()))).collect()
    };
    let demands = |text: &str, new_only: bool| -> BTreeMap<usize, String> {
        let lines = text.lines().enumerate().filter(|(_, line)| line.contains("MUST"));
        let lines = lines.filter(|(_, line)| !new_only || !known.contains(line));
        lines.map(|(at, line)| (at + 1, format!("{:016x}", fnv(line.as_bytes())))).collect()
    };
    assert_eq!(told("master"), demands(&master, false));
    assert_eq!(told("ext"), demands(&ext, true));
}
