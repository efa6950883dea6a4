//! The ledger against a naive model, and its file against crashes and everything that is no ledger.

use super::book::Book;
use super::format::{SLOT, decode, encode, read};
use super::*;
use crate::calendar::date;
use crate::cloud::counts::Call;
use blockmason::Kind;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

const VOLUME: [u8; 16] = [7; 16];

/// Noon of 2026-11-30, seconds since 1970.
const NOON: u64 = 1_796_040_000;

fn puts(requests: u64) -> Sum {
    Sum { requests: [requests, 0, 0, 0, 0], bytes: [requests * 100, 0, 0, 0, 0] }
}

/// A ledger with chance in it.
fn random(rng: &mut fastrand::Rng) -> Ledger {
    let mut ledger = Ledger::new(VOLUME);
    let mut now = NOON;
    for _ in 0..rng.u32(..30) {
        ledger.pass(now, Some(rng.u64(..1 << 40)));
        let mut sum = Sum::default();
        sum.requests.iter_mut().chain(&mut sum.bytes).for_each(|number| *number = rng.u64(..1 << 50));
        ledger.count(&sum);
        now += rng.u64(..30 * DAY);
    }
    ledger.raised_day = (rng.u32(..), f64::from(rng.u32(..100)));
    ledger
}

#[test]
fn storage_costs_what_a_bill_says() {
    let mut ledger = Ledger::new(VOLUME);
    let november = Month::of(day_of(NOON));
    let first = u64::from(november.first_day()) * DAY;
    ledger.pass(first, Some(1_000_000_000));
    // A whole month in one step, and ten days of the next one, in which there is twice as much.
    ledger.pass(first + 30 * DAY, Some(2_000_000_000));
    ledger.pass(first + 40 * DAY, None);
    assert_eq!(ledger.days_of(november).count(), 30);
    assert!((ledger.cost_of_month(november, &STANDARD) - 0.023).abs() < 1e-9);
    let wanted = 2.0 * 0.023 * 10.0 / 31.0;
    assert!((ledger.cost_of_month(november.next(), &STANDARD) - wanted).abs() < 1e-9);
    let forecast = ledger.forecast(&STANDARD).unwrap();
    assert!((forecast - 0.046).abs() < 1e-9, "{forecast}");
}

#[test]
fn requests_belong_to_the_day_on_which_they_were_made() {
    let mut ledger = Ledger::new(VOLUME);
    ledger.pass(NOON, Some(0));
    ledger.count(&puts(1000));
    ledger.pass(NOON + DAY, Some(0));
    ledger.count(&puts(3000));
    let days: Vec<_> =
        ledger.days.iter().map(|(day, it)| (date(*day), it.sum.requests[0], it.seconds)).collect();
    assert_eq!(days, [("2026-11-30".to_owned(), 1000, DAY / 2), ("2026-12-01".to_owned(), 3000, DAY / 2)]);
    assert!((ledger.cost_of_day(ledger.today(), &STANDARD) - 0.015).abs() < 1e-9);
    assert_eq!(ledger.cost_of_day(3, &STANDARD), 0.0);
    assert_eq!(ledger.cost_of_month(Month(3), &STANDARD).to_string(), "0");
}

/// Random times, forth and a little back, against sums over every single second.
#[test]
fn is_a_sum_over_seconds() {
    for seed in 0..50 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (mut ledger, mut model) = (Ledger::new(VOLUME), BTreeMap::<u32, (u64, u128)>::new());
        let (mut last, mut stored) = (NOON, 0);
        ledger.pass(last, Some(0));
        for _ in 0..20 {
            let now = (last + rng.u64(..DAY)).saturating_sub(rng.u64(..2000));
            for second in last..now.max(last) {
                let day = model.entry(day_of(second)).or_default();
                *day = (day.0 + 1, day.1 + u128::from(stored));
            }
            last = now.max(last);
            let known = rng.bool().then(|| rng.u64(..1000));
            stored = known.unwrap_or(stored);
            ledger.pass(now, known);
        }
        let found: BTreeMap<_, _> =
            ledger.days.iter().map(|(day, it)| (*day, (it.seconds, it.byte_seconds))).collect();
        assert_eq!(found, model, "seed {seed}");
    }
}

#[test]
fn a_clock_that_was_wrong_costs_nothing() {
    let mut ledger = Ledger::new(VOLUME);
    // No battery, then the right time.
    ledger.pass(5, Some(1 << 40));
    ledger.pass(NOON, Some(1 << 40));
    assert_eq!((ledger.days.len(), ledger.at), (0, NOON));
    ledger.pass(NOON + 10, None);
    // A little back: nothing for a second time.
    ledger.pass(NOON - 100, None);
    ledger.pass(NOON + 11, None);
    assert_eq!(ledger.days[&day_of(NOON)].seconds, 11);
    // Far ahead and back again: today is today.
    ledger.pass(NOON + 300 * DAY, None);
    ledger.pass(NOON + 20, None);
    ledger.count(&puts(1));
    assert_eq!((ledger.today(), ledger.days[&day_of(NOON)].sum.requests[0]), (day_of(NOON), 1));
    ledger.pass(u64::MAX, None);
    ledger.pass(0, None);
    ledger.pass(NOON + 30, None);
    assert_eq!(ledger.at, NOON + 30);
}

#[test]
fn days_are_bounded_and_today_is_one_of_them() {
    let mut ledger = Ledger::new(VOLUME);
    for day in 0..1000 {
        ledger.pass(NOON + day * DAY, Some(1));
        assert!(ledger.days.len() <= MOST_DAYS);
    }
    let last = day_of(NOON + 999 * DAY);
    assert_eq!(ledger.days.keys().copied().collect::<Vec<_>>(), (last - 399..=last).collect::<Vec<_>>());
    // Years back: all others are later.
    ledger.pass(NOON, None);
    ledger.count(&puts(1));
    assert!(ledger.days.len() == MOST_DAYS && ledger.days.contains_key(&day_of(NOON)));
}

#[test]
fn what_is_encoded_is_decoded_and_no_changed_bit_is() {
    for seed in 0..40 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let ledger = random(&mut rng);
        let mut bytes = encode(&ledger, seed + 1);
        assert!(bytes.len() <= SLOT);
        assert_eq!(decode(&bytes), Ok((seed + 1, ledger)));
        let (at, bit) = (rng.usize(..bytes.len()), rng.u8(..8));
        bytes[at] ^= 1 << bit;
        assert!(decode(&bytes).is_err(), "seed {seed}, byte {at}");
        bytes.truncate(at);
        assert!(decode(&bytes).is_err(), "seed {seed}, cut off at {at}");
    }
    let mut full = Ledger::new(VOLUME);
    full.pass(NOON, Some(1));
    full.pass(NOON + 399 * DAY, Some(1));
    assert!(encode(&full, 1).len() <= SLOT && full.days.len() == MOST_DAYS);
}

/// With a checksum that fits: what cannot be is refused, whoever wrote it.
#[test]
fn contents_that_cannot_be_are_refused() {
    let mut ledger = random(&mut fastrand::Rng::with_seed(3));
    ledger.pass(NOON + 200 * DAY, Some(5));
    let fits = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = encode(&ledger, 9);
        bytes[8..12].fill(0);
        change(&mut bytes);
        let checksum = crc32fast::hash(&bytes);
        bytes[8..12].copy_from_slice(&checksum.to_le_bytes());
        decode(&bytes)
    };
    assert!(fits(&|_| {}).is_ok());
    type Change = fn(&mut [u8]);
    let changes: [Change; 9] = [
        |bytes| bytes[12] = 2,
        |bytes| bytes[16..24].fill(0),
        |bytes| bytes[16..24].fill(255),
        |bytes| bytes[24..32].fill(255),
        |bytes| bytes[48..56].copy_from_slice(&f64::NAN.to_le_bytes()),
        |bytes| bytes[48..56].copy_from_slice(&(-1.0f64).to_le_bytes()),
        |bytes| bytes[128..132].fill(255),
        |bytes| bytes[132] = 1,
        |bytes| bytes.copy_within(128..132, 256),
    ];
    for (at, change) in changes.into_iter().enumerate() {
        assert!(fits(&change).is_err(), "change {at}");
    }
}

fn find(path: &Path, owner: &str) -> blockmason::Result<Arc<Book>> {
    Book::find(path, "test", owner, VOLUME)
}

#[test]
fn a_book_is_found_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm1.ledger");
    let book = find(&path, "M").unwrap();
    assert!(!path.exists(), "looking changes nothing");
    book.open().unwrap();
    for round in 1..6 {
        book.ledger().pass(NOON + round, Some(round));
        book.ledger().count(&puts(1));
        book.write().unwrap();
        let kept = book.ledger().clone();
        assert_eq!(super::book::look(&path).unwrap(), kept);
    }
    assert_eq!(path.metadata().unwrap().len(), 2 * SLOT as u64);
    let kept = book.ledger().clone();
    // A successor of the same name shares it; nobody else gets it.
    assert!(Arc::ptr_eq(&find(&path, "M").unwrap(), &book));
    assert_eq!(find(&path, "N").err().unwrap().kind(), Kind::Busy);
    assert_eq!(Book::find(&path, "other", "M", VOLUME).err().unwrap().kind(), Kind::Busy);
    book.renamed("N");
    assert!(Arc::ptr_eq(&find(&path, "N").unwrap(), &book));
    drop(book);
    let error = Book::find(&path, "test", "M", [8; 16]).err().unwrap();
    assert!(error.to_string().contains("another volume"), "{error}");
    assert_eq!(*find(&path, "M").unwrap().ledger(), kept);
}

/// Whatever a crash makes of the slot that is being written, the other one is there; and the next write spares it.
#[test]
fn a_torn_write_loses_that_write_and_no_more() {
    for seed in 0..40 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm1.ledger");
        let (mut durable, mut last) = (Ledger::new(VOLUME), Ledger::new(VOLUME));
        for life in 0..6 {
            let book = find(&path, "M").unwrap();
            book.open().unwrap();
            let found = book.ledger().clone();
            assert!(found == durable || found == last, "seed {seed}, life {life}");
            durable = found;
            for _ in 0..rng.u32(..4) {
                let now = book.ledger().at.max(NOON) + rng.u64(1..5 * DAY);
                book.ledger().pass(now, Some(rng.u64(..1 << 30)));
                book.ledger().count(&puts(rng.u64(1..9)));
                book.write().unwrap();
                durable = book.ledger().clone();
            }
            // The process dies while it writes once more: some of it has arrived.
            let before = std::fs::read(&path).unwrap();
            book.ledger().count(&puts(1));
            last = book.ledger().clone();
            book.write().unwrap();
            drop(book);
            let after = std::fs::read(&path).unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            for at in (0..after.len()).step_by(512).filter(|_| rng.bool()) {
                file.write_all_at(&before[at..at + 512], at as u64).unwrap();
            }
        }
    }
}

#[test]
fn what_is_no_ledger_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    let sound = {
        let mut bytes = encode(&random(&mut fastrand::Rng::with_seed(1)), 1);
        bytes.resize(2 * SLOT, 0);
        bytes
    };
    assert!(read(&sound).is_ok());
    let flipped = |at: usize| {
        let mut bytes = sound.clone();
        bytes[at] ^= 1;
        bytes
    };
    let cases = [
        (Vec::new(), "it has 0 bytes"),
        (vec![b'x'; 2 * SLOT], "it does not begin as a ledger does"),
        (vec![0; 2 * SLOT], "it does not begin as a ledger does"),
        (sound[..SLOT].to_vec(), "it has 65536 bytes, and a ledger 131072"),
        ([&sound[..], &[0]].concat(), "it has 131073 bytes"),
        (flipped(30), "its checksum does not fit"),
        (flipped(41), "its checksum does not fit"),
    ];
    for (bytes, wanted) in cases {
        std::fs::write(&path, &bytes).unwrap();
        for error in [find(&path, "M").err().unwrap(), super::book::look(&path).unwrap_err()] {
            let said = error.to_string();
            assert!(
                said.contains(wanted) && said.contains("not overwritten") && said.contains("file: "),
                "{said}"
            );
        }
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
    let far = find(&folder.path().join("none/file"), "M").err().unwrap();
    assert!(far.to_string().contains("its folder does not exist"), "{far}");
}

#[test]
fn a_bill_adds_up() {
    let mut ledger = random(&mut fastrand::Rng::with_seed(5));
    ledger.prices = Prices { out: 0.09, ..STANDARD };
    let bill = bill(&ledger, &ledger.prices);
    let month = Month::of(ledger.today());
    let sum = |list: &serde_json::Value, key: &str| list[key].as_f64().unwrap();
    let mut total = 0.0;
    for day in bill["days"].as_array().unwrap() {
        let operations = Call::ALL.iter().map(|call| sum(&day["operations"][call.name()], "dollars"));
        let parts = operations.sum::<f64>() + sum(&day["storage"], "dollars");
        assert!((parts - sum(day, "dollars")).abs() < 1e-6 * parts.max(1.0));
        if day["date"].as_str().unwrap().starts_with(&month.to_string()) {
            total += parts;
        }
    }
    assert!((total - sum(&bill["month"], "dollars")).abs() < 1e-6 * total.max(1.0));
    assert_eq!(bill["stored"], ledger.stored);
}
