//! Whose the room of a pool is: quotas, reserves, what waits where there is none, what comes back, pools that grow.

use super::super::account::Account;
use super::super::below::Below;
use super::super::check::check;
use super::super::format::{BLOCK, EntryKind, Format};
use super::super::open::{Opening, create, open_newest};
use super::super::pool::Pool;
use super::super::settings::{NewSettings, Settings};
use super::super::shared::make;
use super::super::tool::{self, Operation};
use super::super::volume::Volume;
use base64::prelude::{BASE64_STANDARD, Engine};
use blockmason::testing::{TestDisk, run};
use blockmason::{Data, Error, Kind, Op, Request, Result};
use futures::executor::block_on;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// A pool on a file.
struct Bench {
    file: File,
    pool: Arc<Pool>,
}

impl Bench {
    fn new(size: u64) -> Bench {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        block_on(create([3; 16], size, Below::Plain(file.as_fd()))).unwrap();
        let pool = opened(&file);
        Bench { file, pool }
    }

    fn below(&self) -> Below<'_> {
        Below::Plain(self.file.as_fd())
    }

    fn volume(&self, name: &str, settings: Settings) -> Volume {
        let number = block_on(self.pool.make_volume(name, 1 << 40, settings, self.below())).unwrap();
        Volume::new(self.pool.clone(), number)
    }

    fn find(&self, name: &str) -> Volume {
        let number = self.pool.core().volume(name).unwrap();
        Volume::new(self.pool.clone(), number)
    }

    fn write(&self, volume: &Volume, at: u64, len: u64, byte: u8) -> Result<()> {
        let data = Data::shared(vec![byte; len as usize]);
        block_on(volume.write_pieces(Request::write(at, data), self.below())).map(drop)
    }

    /// Writes mebibytes until there is no room. Where that was.
    fn fill(&self, volume: &Volume, mut at: u64) -> (u64, Error) {
        loop {
            if let Err(error) = self.write(volume, at, MIB, 7) {
                return (at, error);
            }
            at += MIB;
        }
    }

    fn discard(&self, volume: &Volume, at: u64, len: u64) {
        block_on(volume.punch(Request::new(Op::Discard, at, len), self.below())).unwrap();
    }

    fn snapshot(&self, volume: &Volume, name: &str) -> Result<()> {
        block_on(self.pool.snapshot(&[(volume.number(), name.to_owned())], 1, self.below())).map(drop)
    }

    fn used(&self) -> u64 {
        block_on(self.pool.checkpoint(self.below())).unwrap();
        assert_eq!(self.pool.space.promised(), 0, "somebody has ended and kept what was promised");
        self.pool.core().root.used
    }

    /// Another process finds everything sound.
    fn reopen(&mut self) {
        self.pool = opened(&self.file);
        assert_eq!(block_on(check(&self.pool, self.below())).unwrap().said.all, [] as [String; 0]);
    }
}

fn opened(file: &File) -> Arc<Pool> {
    let (opening, size) = (Opening::writable(16 << 20), file.metadata().unwrap().len());
    Arc::new(block_on(open_newest(opening, size, Below::Plain(file.as_fd()))).unwrap())
}

#[test]
fn a_volume_keeps_to_its_quota() {
    let mut bench = Bench::new(128 * MIB);
    let volume = bench.volume("v", Settings { quota: 8 * MIB, ..Settings::default() });
    let (at, error) = bench.fill(&volume, 0);
    assert_eq!((at, error.kind()), (8 * MIB, Kind::NoSpace));
    assert!(error.to_string().contains("quota"), "{error}");
    bench.write(&volume, 0, 8 * MIB, 8).unwrap();
    bench.snapshot(&volume, "s").unwrap();
    bench.write(&volume, 0, 8 * MIB, 9).unwrap();
    bench.discard(&volume, MIB, MIB);
    bench.write(&volume, 20 * MIB, MIB, 1).unwrap();
    assert_eq!(bench.fill(&volume, 30 * MIB).0, 30 * MIB);
    let more = NewSettings { quota: Some(9 * MIB), ..NewSettings::default() };
    block_on(bench.pool.set("v", more, bench.below())).unwrap();
    assert_eq!(bench.fill(&volume, 30 * MIB).0, 31 * MIB);
    drop(volume);
    bench.reopen();
}

#[test]
fn what_is_reserved_can_be_written_however_full_the_pool_is() {
    let mut bench = Bench::new(128 * MIB);
    let (kept, other) =
        (bench.volume("kept", Settings::default()), bench.volume("other", Settings::default()));
    let reserve = |reserve| NewSettings { reserve: Some(reserve), ..NewSettings::default() };
    block_on(bench.pool.set("kept", reserve(16 * MIB), bench.below())).unwrap();
    let (_, error) = bench.fill(&other, 0);
    assert_eq!(error.kind(), Kind::NoSpace);
    bench.write(&kept, 0, 8 * MIB, 1).unwrap();
    assert_eq!(
        bench.snapshot(&kept, "s").unwrap_err().kind(),
        Kind::NoSpace,
        "it would see what was written"
    );
    drop((kept, other));
    bench.reopen();
    let (kept, other) = (bench.find("kept"), bench.find("other"));
    assert_eq!(bench.fill(&other, 1 << 30).0, 1 << 30, "what is left is kept after a restart, too");
    bench.write(&kept, 8 * MIB, 8 * MIB, 2).unwrap();
    let too_much = block_on(bench.pool.set("kept", reserve(1 << 40), bench.below())).unwrap_err();
    assert_eq!(too_much.kind(), Kind::NoSpace);
    block_on(bench.pool.set("kept", reserve(0), bench.below())).unwrap();
    bench.snapshot(&kept, "s").unwrap();
}

/// Snapshots take room, and so does what they keep alive: both end before what is kept for deletions does.
#[test]
fn a_pool_that_snapshots_have_filled_can_be_opened_and_emptied() {
    let mut bench = Bench::new(32 * MIB);
    let volume = bench.volume("v", Settings::default());
    let (end, _) = bench.fill(&volume, 0);
    let punch = |bench: &Bench, at: u64| {
        let req = Request::new(Op::Discard, at % end, BLOCK);
        block_on(volume.punch(req, bench.below())).map(drop)
    };
    let mut taken = 0;
    let refused = loop {
        match bench.snapshot(&volume, &format!("s{taken}")) {
            Ok(()) => taken += 1,
            Err(error) => break error,
        }
        if let Err(error) = punch(&bench, taken * BLOCK) {
            assert_eq!(error.kind(), Kind::NoSpace, "{error}");
        }
    };
    assert_eq!(refused.kind(), Kind::NoSpace, "{refused}");
    while let Ok(()) = punch(&bench, (taken + 1) * BLOCK) {
        taken += 1;
        bench.used();
        if taken > 20_000 {
            break;
        }
    }
    drop(volume);
    bench.reopen();
    let names: Vec<String> = {
        let core = bench.pool.core();
        let snapshots =
            core.catalog.values().filter(|entry| matches!(entry.kind, EntryKind::Snapshot { .. }));
        snapshots.map(|entry| entry.name.clone()).collect()
    };
    for name in names {
        block_on(bench.pool.delete_snapshot("v", &name, bench.below())).unwrap();
    }
    block_on(bench.pool.delete_all(bench.below())).unwrap();
    let volume = bench.find("v");
    bench.discard(&volume, 0, end);
    bench.used();
    bench.write(&volume, 0, 8 * MIB, 1).unwrap();
    drop(volume);
    bench.reopen();
}

#[test]
fn a_pool_that_grows_has_room() {
    let mut bench = Bench::new(64 * MIB);
    let volume = bench.volume("v", Settings::default());
    let (at, _) = bench.fill(&volume, 0);
    bench.file.set_len(256 * MIB).unwrap();
    let too_large = block_on(bench.pool.space.blocks.grow(1 << 30, bench.below())).unwrap_err();
    assert_eq!(too_large.kind(), Kind::Invalid);
    assert_eq!(block_on(bench.pool.space.blocks.grow(1, bench.below())).unwrap_err().kind(), Kind::Invalid);
    block_on(bench.pool.space.blocks.grow(128, bench.below())).unwrap();
    let (more, _) = bench.fill(&volume, at);
    assert!(more > 200 * MIB, "{more}");
    drop(volume);
    bench.reopen();
    let volume = bench.find("v");
    let read = Request::read(more - MIB, MIB);
    let read = block_on(volume.read_pieces(read, bench.below())).unwrap().into_data().unwrap();
    assert_eq!(read.to_vec(), vec![7; MIB as usize]);
}

#[test]
fn what_is_free_goes_back_to_the_file_system() {
    let mut bench = Bench::new(128 * MIB);
    let (kept, gone) = (bench.volume("kept", Settings::default()), bench.volume("gone", Settings::default()));
    for at in (0..32 * MIB).step_by(MIB as usize) {
        bench.write(&kept, at, MIB, 1).unwrap();
        bench.write(&gone, at, MIB, 2).unwrap();
    }
    bench.used();
    drop(gone);
    block_on(bench.pool.delete_volume("gone", bench.below())).unwrap();
    let before = bench.file.metadata().unwrap().blocks();
    block_on(bench.pool.delete_all(bench.below())).unwrap();
    let free = bench.pool.space.blocks.free();
    let given = block_on(bench.pool.collect(bench.below())).unwrap();
    assert!(bench.pool.space.blocks.free() >= free, "something is lost");
    let backed = bench.pool.space.backed();
    let after = bench.file.metadata().unwrap().blocks();
    assert!(given.is_some_and(|bytes| bytes >= 32 * MIB), "{given:?}");
    assert!(before - after >= (31 * MIB) / 512, "{before} {after}");
    // Whoever opens the pool next knows that: the journal of the last checkpoint speaks of the same extents.
    drop(kept);
    bench.reopen();
    assert!(bench.pool.space.backed() < backed + 1024, "{backed} before, {} now", bench.pool.space.backed());
    let kept = bench.find("kept");
    let read = block_on(kept.read_pieces(Request::read(0, 32 * MIB), bench.below())).unwrap();
    assert!(read.into_data().unwrap().to_vec().iter().all(|byte| *byte == 1));
    bench.write(&kept, 0, 32 * MIB, 3).unwrap();
    drop(kept);
    bench.reopen();
}

#[test]
fn what_is_said_to_be_freed_is_freed() {
    let bench = Bench::new(128 * MIB);
    let volume = bench.volume("v", Settings::default());
    bench.write(&volume, 0, 8 * MIB, 1).unwrap();
    bench.snapshot(&volume, "s").unwrap();
    bench.write(&volume, 2 * MIB, 3 * MIB, 2).unwrap();
    bench.discard(&volume, 6 * MIB, MIB);
    let account = |number| block_on(bench.pool.account(number, bench.below())).unwrap();
    let snapshot = bench.pool.core().snapshot(volume.number(), "s").unwrap();
    let (of_volume, of_snapshot) = (account(volume.number()), account(snapshot));
    let blocks = |mib: u64| mib * MIB / BLOCK;
    assert_eq!((of_volume.mapped, of_volume.shared), (blocks(7), blocks(4)));
    assert_eq!(of_snapshot.mapped, blocks(8));
    assert!((blocks(4)..blocks(4) + 64).contains(&of_snapshot.freed), "{of_snapshot:?}");
    let used = bench.used();
    block_on(bench.pool.delete_snapshot("v", "s", bench.below())).unwrap();
    block_on(bench.pool.delete_all(bench.below())).unwrap();
    assert_eq!(used - bench.used(), of_snapshot.freed);
    let Account { mapped, shared, freed, .. } = account(volume.number());
    assert_eq!((mapped, shared), (blocks(7), 0));
    let used = bench.used();
    drop(volume);
    block_on(bench.pool.delete_volume("v", bench.below())).unwrap();
    block_on(bench.pool.delete_all(bench.below())).unwrap();
    assert_eq!(used - bench.used(), freed);
}

#[test]
fn a_write_waits_for_room() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pool");
    make(&path, Some(64 * MIB), [7; 16]).unwrap();
    let made = Operation::CreateVolume { name: "v".into(), size: 1 << 40, settings: Settings::default() };
    tool::open(&path).unwrap().carry_out(&made).unwrap();
    let text = format!("element D (type parallax) (pool {}) (volume v)", path.display());
    run(1, async |host| {
        let disk = TestDisk::new(&host, crate::ALL, &text, "D").await.unwrap();
        let mut at = 0;
        while disk.write(at, &vec![5; MIB as usize]).await.is_ok() {
            at += 1 << 30;
        }
        assert!(at > 20 << 30, "{at}");
        drop(disk);
        let patient = format!("{text} (on_full queue) (full_timeout 1h)");
        let disk = TestDisk::new(&host, crate::ALL, &patient, "D").await.unwrap();
        // Some more fits, with all else in the trees. What fails is not what was asked for.
        let waiting = loop {
            let mut written = disk.send(Request::write(at, Data::shared(vec![6; MIB as usize])));
            for _ in 0..10 {
                disk.op(Op::Flush, 0, 0).await.unwrap();
                assert_eq!(disk.read(0, 4096).await.unwrap(), vec![5; 4096]);
            }
            match written.try_recv() {
                Ok(reply) => drop(reply.unwrap()),
                Err(_) => break written,
            }
            at += 1 << 30;
        };
        disk.op(Op::Discard, 0, 8 << 30).await.unwrap();
        waiting.await.unwrap().unwrap();
        assert_eq!(disk.read(at, MIB).await.unwrap(), vec![6; MIB as usize]);
    });
}

/// Room that volumes of one format have had and do not use any more is everybody's again.
#[test]
fn what_one_format_gives_back_the_other_may_use() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pool");
    make(&path, Some(160 * MIB), [7; 16]).unwrap();
    let pool = tool::open(&path).unwrap();
    for (name, format) in [("old", Format::One), ("new", Format::Two)] {
        let settings = Settings { format, ..Settings::default() };
        pool.carry_out(&Operation::CreateVolume { name: name.into(), size: 1 << 40, settings }).unwrap();
    }
    let data = BASE64_STANDARD.encode(vec![3; MIB as usize]);
    let fill = |name: &str| {
        let mut offset = 0;
        loop {
            let write = Operation::Write { volume: name.into(), offset, data: data.clone(), receiver: None };
            match pool.carry_out(&write) {
                Ok(_) => offset += MIB,
                Err(error) if error.kind() == Kind::NoSpace => return offset / MIB,
                Err(error) => panic!("{error}"),
            }
        }
    };
    let (all, left) = (fill("old"), fill("new"));
    assert!(all > 60 && left < 20, "{all} MiB, then {left}");
    pool.carry_out(&Operation::Punch { volume: "old".into(), offset: 0, len: 1 << 40, receiver: None })
        .unwrap();
    // A checkpoint, whose journal says of all these extents that they are the first ones'.
    pool.carry_out(&Operation::Check).unwrap();
    pool.carry_out(&Operation::Punch { volume: "new".into(), offset: 0, len: 1 << 40, receiver: None })
        .unwrap();
    let more = fill("new");
    let copy = folder.path().join("b.pool");
    std::fs::copy(&path, &copy).unwrap();
    let after_a_crash = tool::open(&copy).unwrap();
    assert_eq!(after_a_crash.carry_out(&Operation::Check).unwrap()["problems"], serde_json::json!([]));
    assert!(more + 20 > all + left, "{all} MiB and {left}, then {more}");
    let first = fill("old");
    assert!(first < 20, "{first} MiB of it are still the first ones'");
    assert_eq!(pool.carry_out(&Operation::Check).unwrap()["problems"], serde_json::json!([]));
    drop(pool);
    let pool = tool::open(&path).unwrap();
    assert_eq!(pool.carry_out(&Operation::Check).unwrap()["problems"], serde_json::json!([]));
}

/// Who asks for one name in both formats at once gets one volume.
#[test]
fn a_name_is_one_in_all_formats() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pool");
    make(&path, Some(160 * MIB), [7; 16]).unwrap();
    let pool = tool::open(&path).unwrap();
    for name in ["a", "b", "c", "d"] {
        let create = |format| {
            let settings = Settings { format, ..Settings::default() };
            pool.carry_out(&Operation::CreateVolume { name: name.into(), size: MIB, settings })
        };
        let (one, two) = std::thread::scope(|scope| {
            let one = scope.spawn(|| create(Format::One));
            (create(Format::Two), one.join().unwrap())
        });
        assert!(one.is_ok() != two.is_ok(), "{name}: {one:?}, {two:?}");
    }
}
