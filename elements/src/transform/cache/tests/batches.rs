//! What goes below at once.

use super::super::clean::{BATCH, newest};
use super::super::format::{Kind, Record};
use super::super::journal::{CHANGES, Journal, Tail};
use blockmason::{Data, rt};

/// Many changes that take no room each take a piece out of one that is large.
#[test]
fn a_batch_is_no_more_than_a_disk_takes_as_one_commit() {
    let mut journal = Journal::new(BATCH, BATCH, Tail { at: 0, number: 1, life: 0 });
    journal.found(Kind::Zeroes, 0..1 << 30, 512, rt::now());
    for number in 1..BATCH / 512 {
        journal.found(Kind::Unmap, number * 1024..number * 1024 + 512, 512, rt::now());
    }
    let mut sent = 0;
    while let Some(batch) = journal.batch(BATCH) {
        let record = |(_, entry): &(u64, super::super::journal::Entry)| Record {
            kind: entry.kind,
            range: entry.range.clone(),
            data: Data::empty(),
        };
        let records: Vec<Record> = batch.entries.iter().map(record).collect();
        let writes = newest(&records).len();
        assert!(writes >= records.len() && writes < 2 * CHANGES, "{writes}");
        #[cfg(feature = "s3")]
        assert!(writes < crate::cloud::volume::ENTRIES);
        sent += records.len() as u64;
        journal.clean_to(batch.end);
    }
    assert_eq!(sent, BATCH / 512);
}
