//! `mason bill` of a file, which is written here as docs/formats/ledger.md says. With a daemon: tests/tests/bill.rs.

use crate::harness::Home;

/// 2026-11-30, in days since 1970.
const TODAY: u32 = 20_787;

/// A file whose first slot is sound: half of 2026-11-30, and all of the day before.
fn ledger() -> Vec<u8> {
    let mut slot = b"MasonLGR\0\0\0\0".to_vec();
    slot.extend(1u32.to_le_bytes());
    let at = u64::from(TODAY) * 86_400 + 43_200;
    slot.extend([5, at, 3 << 30].iter().flat_map(|number: &u64| number.to_le_bytes()));
    slot.extend(2u64.to_le_bytes());
    slot.extend([0.005, 0.0004, 0.023, 0.09].iter().flat_map(|price: &f64| price.to_le_bytes()));
    slot.extend([0; 32]);
    slot.extend([7; 16]);
    for (day, seconds, puts, gets) in
        [(TODAY - 1, 86_400u64, 2000u64, 0u64), (TODAY, 43_200, 100_000, 50_000)]
    {
        slot.extend(u64::from(day).to_le_bytes());
        slot.extend(seconds.to_le_bytes());
        slot.extend([puts, gets, 0, 0, 7].iter().flat_map(|number| number.to_le_bytes()));
        slot.extend([puts << 20, 1_000_000_000, 0, 0, 0].iter().flat_map(|number| number.to_le_bytes()));
        slot.extend((u128::from(seconds) * 1_000_000_000_000).to_le_bytes());
        slot.extend([0; 16]);
    }
    let checksum = crc32fast::hash(&slot);
    slot[8..12].copy_from_slice(&checksum.to_le_bytes());
    slot.resize(131_072, 0);
    slot
}

fn home() -> Home {
    let home = Home::new();
    std::fs::write(home.path("vm1.ledger"), ledger()).unwrap();
    home
}

#[test]
fn a_file_is_shown_by_day_and_operation() {
    let home = home();
    let said = home.mason(&["bill", "--ledger", "vm1.ledger"]).done();
    let head: Vec<_> = said.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(head, ["day", "operation", "requests", "bytes", "dollars"]);
    for line in [
        "2026-11-29 put 2000 2.0G 0.0100",
        "delete 7 0.0000",
        "stored 931.3G 0.7667",
        "2026-11-30 put 100000 97.7G 0.5000",
        "get 50000 953.7M 0.1100",
        "stored 931.3G 0.3833",
        "all 0.9933",
        "today 0.9933 $",
        "this month 1.8600 $, 2.48 $ at its end if it goes on so",
        "stored 3G",
        "prices put=0.005 get=0.0004 month=0.023 out=0.09",
    ] {
        let squeezed = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.lines().any(|found| squeezed(found) == line), "{line} in\n{said}");
    }
    assert!(!said.contains("budget"), "{said}");
}

#[test]
fn other_prices_other_months_and_json() {
    let home = home();
    let bill = |more: &[&str]| home.mason(&[&["bill", "--ledger", "vm1.ledger"], more].concat());
    let said = bill(&["--prices", "none,put=1"]).done();
    assert!(said.contains("put=1 get=0 month=0 out=0") && said.contains("100.0000 $"), "{said}");
    let json = bill(&["--json"]).json();
    assert_eq!((&json["days"][1]["date"], &json["stored"]), (&"2026-11-30".into(), &(3u64 << 30).into()));
    assert_eq!(json["days"][1]["operations"]["put"]["requests"], 100_000);
    let dollars = json["days"][1]["operations"]["get"]["dollars"].as_f64().unwrap();
    assert!((dollars - 0.11).abs() < 1e-9, "{json}");
    let json = bill(&["--json", "--month", "2026-10"]).json();
    assert_eq!(json["days"].as_array().unwrap().len(), 0);
    let said = bill(&["--month", "2026-10"]).done();
    assert!(said.starts_with("  2026-10     0.0000 $\n"), "{said}");
}

#[test]
fn what_is_wrong_is_one_sentence() {
    let home = home();
    home.file("diary", "dear diary");
    let said = home.mason(&["bill", "--ledger", "diary"]).failed();
    assert!(said.contains("diary: it has 10 bytes, and a ledger 131072"), "{said}");
    assert!(home.mason(&["bill", "--ledger", "gone"]).failed().contains("gone: the ledger cannot be read"));
    for (option, value, wanted) in [
        ("--month", "2026-13", "2026-11"),
        ("--prices", "gold", "s3_standard"),
        ("--graph", "vm", "--ledger"),
    ] {
        let ended = home.mason(&["bill", "--ledger", "vm1.ledger", option, value]);
        assert!(ended.code == Some(2) && ended.err.contains(wanted), "{ended:?}");
    }
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    let said = home.mason(&["bill"]).failed();
    assert!(said.contains("vm has no meter: `mason elements meter`"), "{said}");
    daemon.stop().done();
}
