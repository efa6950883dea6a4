//! A volume of a pool in a file or on a block device.

use super::below::block_on;
use super::care::volume_params;
use super::format::BLOCK;
use super::pool::Core;
use super::schedule::check_taken_name;
use super::shared::{Shared, having, head_of};
use super::volume::Volume;
use crate::calendar::seconds;
use blockmason::describe::{Access, Build, Carries, ElementType, Family, Handler, Ports};
use blockmason::heads::HeadPlace;
use blockmason::io::Opened;
use blockmason::lang::value::{FilePath, Service, Size};
use blockmason::{
    Children, Cx, Element, Error, Flow, Geometry, LocalBoxFuture, Open, Ops, Prepared, Request, Result,
};
use std::sync::{Arc, OnceLock};

volume_params! {
    /// A volume of a pool.
    struct Params {
        /// The pool: its file, its block device, or the folder that it is in.
        pool: FilePath,
        /// The volume.
        volume: String,
        /// Serves this snapshot of the volume instead, for reading only.
        snapshot: Option<String>,
        /// Memory that the pool's map may take. What the first graph says that opens the pool counts.
        memory: Size = "256M",
    }
}

/// What all elements can be asked that serve a volume.
pub(super) const HANDLERS: &[Handler] = &[
    Handler { name: "free", access: Access::Read, doc: "bytes of the pool that are free" },
    Handler { name: "used", access: Access::Read, doc: "bytes of the pool that are in use" },
    Handler {
        name: "snapshots",
        access: Access::Read,
        doc: "names of the volume's snapshots, the oldest first",
    },
    Handler {
        name: "snapshot",
        access: Access::Call,
        doc: "takes a snapshot of that name; durable when it is answered",
    },
    Handler { name: "delete_snapshot", access: Access::Call, doc: "deletes the snapshot of that name" },
    Handler { name: "checkpoint", access: Access::Call, doc: "brings what is in the log into the trees" },
];

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "parallax",
    summary: "a thin volume with snapshots and clones, of a pool in a file or on a block device",
    doc: "Serves a volume, or a snapshot of one, of a pool that `mason pool create` has made. All volumes of a pool share its room; \
          graphs of one process may serve several of them, each volume one graph; one process at a time may use the pool.\n\n\
          A volume takes room for what is written to it; discarded and zeroed ranges take none. Blocks of 4 KiB are written in place \
          where only the volume sees them, and to a new place where a snapshot or a clone sees them, too.\n\n\
          `snapshot NAME` keeps the volume as it is at that instant. It takes one flush, whatever the size, and no request waits for \
          it. More is done with volumes by `mason volume`, also while they are served.\n\n\
          **Durability.** A write is answered when its data and a record of the log that leads to it have been written, so the \
          death of this process loses nothing. A flush is one fdatasync. After a loss of power each block that was written \
          since the last flush has its new or its flushed contents, never another block's. A failed flush ends all \
          changes to the pool until all graphs that use it are started anew.\n\n\
          Where the pool is full, or the volume has reached its quota, writes that need room fail with ENOSPC, or wait with \
          `(on_full queue)`; deleting a snapshot, or discarding, makes room. Events say when less than 20, 10 and 2 % are left. Format: \
          [formats/parallax.md](../formats/parallax.md).",
    family: Family::Parallax,
    params: Params::PARAMS,
    ports: Ports::SINK,
    handlers: HANDLERS,
    example: "element Guest (type nbd) (listen unix:vm1.sock)\n\
              element Disk (type parallax) (pool vms.pool) (volume vm1)\n\
              Guest -> Disk\n",
    carries: |params| match Params::from(params) {
        Ok(params) if params.snapshot.is_some() => Carries::NO_WRITES,
        _ => Carries::ALL,
    },
    provides: &[Snapshots::NAME],
    check: Params::check_all,
    build: |build: &Build<'_>| {
        let (params, graph) = (build.read(Params::from)?, build.graph.to_owned());
        params.care()?;
        Ok(Arc::new(Disk { params, graph, open: OnceLock::new() }))
    },
    ..ElementType::BASE
};

/// What an element provides whose handler `snapshots` has the names of snapshots since which it knows what has changed.
pub enum Snapshots {}

impl Service for Snapshots {
    const NAME: &'static str = "snapshots";
}

struct Disk {
    params: Params,
    graph: String,
    /// Set by `open`.
    open: OnceLock<(Volume, Arc<Shared>)>,
}

impl Disk {
    fn volume(&self) -> Result<&(Volume, Arc<Shared>)> {
        self.open.get().ok_or_else(|| Error::internal("a request came before the pool was opened"))
    }

    fn snapshots(&self) -> Result<Vec<String>> {
        let (served, _) = self.volume()?;
        Ok(served.pool.core().snapshots(&self.params.volume))
    }
}

/// The number of what is to be served.
fn find(core: &Core, params: &Params) -> Result<u32> {
    let found = core.find(&params.volume, params.snapshot.as_deref());
    found.map_err(|error| error.with_path(&params.pool.0))
}

/// Its bytes.
fn size(core: &Core, params: &Params) -> Result<u64> {
    let number = find(core, params)?;
    Ok(core.catalog.get(&number).map_or(0, |entry| entry.size))
}

impl Element for Disk {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        // As it is now: it may have grown since the graph before.
        let size = Shared::look(&self.params.pool.0, |trees, lacking| {
            let trees = having(trees, lacking, &self.params.volume);
            let trees = trees.map_err(|error| error.with_path(&self.params.pool.0))?;
            let core = trees.core();
            if self.params.snapshot.is_none() {
                let free = core.need_writable_by(find(&core, &self.params)?, &self.graph);
                free.map_err(|error| error.with_path(&self.params.pool.0))?;
            }
            size(&core, &self.params)
        })?;
        Ok(Prepared::of(Geometry {
            min_block: BLOCK as u32,
            preferred_block: BLOCK as u32,
            ops: Ops::ALL,
            needs_flush: true,
            read_only: self.params.snapshot.is_some(),
            ..Geometry::new(size)
        }))
    }

    fn head(&self) -> Option<HeadPlace> {
        let Params { pool, volume, snapshot, .. } = &self.params;
        Some(head_of(&pool.0, volume, snapshot.is_some()))
    }

    fn opened(&self) -> Option<Opened> {
        self.open.get()?.1.opened()
    }

    fn open(&self, _open: &Open<'_>) -> Result<Option<String>> {
        if self.open.get().is_none() {
            let shared = Shared::open(&self.params.pool.0, self.params.memory.0)?;
            let trees = shared.having(&self.params.volume);
            let trees = trees.map_err(|error| error.with_path(&self.params.pool.0))?;
            let volume = block_on(Volume::open(trees, self.params.full(), Some(&self.graph), |core| {
                find(core, &self.params)
            }))?;
            let _ = self.open.set((volume, shared));
        }
        Ok(None)
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match self.volume() {
            Ok((volume, shared)) => volume.submit(req, shared.below(cx), cx),
            Err(error) => cx.fail(&req, error),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        let (volume, shared) = self.open.get()?;
        let care = self.params.care().ok()?;
        let whole = || shared.is_whole(&self.params.volume).is_ok();
        Some(Box::pin(care.run(volume, whole, shared.below(cx), cx)))
    }

    fn may_hand_over(&self) -> Result<()> {
        Err(Error::unsupported(
            "a pool is not handed over to another process: stop this one, then start the other",
        ))
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "snapshots" => Ok(self.snapshots()?.join(" ")),
            _ => self.volume()?.0.pool.get(handler),
        }
    }

    fn call(&self, handler: &str, argument: &str) -> Result<String> {
        let (served, shared) = self.volume()?;
        let (pool, below, volume) = (&served.pool, shared.blocking(), &self.params.volume);
        match handler {
            "snapshot" => {
                check_taken_name(argument)?;
                let number = pool.core().find(volume, None)?;
                block_on(pool.snapshot(&[(number, argument.to_owned())], seconds(), below))?;
                Ok(format!("{volume}@{argument}"))
            }
            "delete_snapshot" => {
                block_on(pool.delete_snapshot(volume, argument, below))?;
                Ok(format!("{volume}@{argument} is deleted"))
            }
            "checkpoint" => block_on(pool.checkpoint(below)).map(|()| "done".to_owned()),
            _ => Err(Error::no_handler(handler)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::shared::make;
    use super::super::tool::{self, Operation, Settings};
    use blockmason::testing::{TestDisk, play_against_model, run};
    use blockmason::{Kind, Op, Result};
    use serde_json::Value;
    use std::path::{Path, PathBuf};

    /// On another thread: this one serves the pool.
    async fn carry_out(path: &Path, operation: Operation) -> Result<Value> {
        let path = path.to_owned();
        blockmason::rt::blocking(move || tool::open(&path)?.carry_out(&operation)).await.unwrap()
    }

    fn pool(folder: &tempfile::TempDir, size: u64, volume: u64) -> PathBuf {
        let path = folder.path().join("a.pool");
        make(&path, Some(size), [7; 16]).unwrap();
        let made = Operation::CreateVolume { name: "v".into(), size: volume, settings: Settings::default() };
        tool::open(&path).unwrap().carry_out(&made).unwrap();
        path
    }

    #[test]
    fn behaves_like_a_vector_and_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "element D (type parallax) (pool {}) (volume v)",
            pool(&folder, 64 << 20, 3 << 20).display()
        );
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, &text, "D").await.unwrap();
            play_against_model(&disk, 1, 400).await;
            disk.write(4096, &[9; 8192]).await.unwrap();
        });
        run(2, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, &text, "D").await.unwrap();
            assert_eq!(disk.read(4096, 8192).await.unwrap(), [9; 8192]);
        });
    }

    #[test]
    fn a_snapshot_is_served_beside_its_volume_and_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = pool(&folder, 64 << 20, 3 << 20);
        let text = format!("element D (type parallax) (pool {}) (volume v)", path.display());
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, &text, "D").await.unwrap();
            disk.write(0, &[1; 4096]).await.unwrap();
            let taken = Operation::Snapshot { volumes: vec!["v".into()], name: "before".into() };
            carry_out(&path, taken).await.unwrap();
            disk.write(0, &[2; 4096]).await.unwrap();
            let old =
                TestDisk::new(&host, crate::ALL, &format!("{text} (snapshot before)"), "D").await.unwrap();
            assert_eq!(old.read(0, 4096).await.unwrap(), [1; 4096]);
            assert_eq!(disk.read(0, 4096).await.unwrap(), [2; 4096]);
            assert_eq!(old.write(0, &[3; 4096]).await.unwrap_err().kind(), Kind::Denied);
            let delete = Operation::DeleteSnapshot { volume: "v".into(), name: "before".into() };
            assert_eq!(carry_out(&path, delete).await.unwrap_err().kind(), Kind::Busy, "it is being served");
        });
    }

    #[test]
    fn a_full_pool_says_so_and_deleting_makes_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = pool(&folder, 40 << 20, 1 << 40);
        let text = format!("element D (type parallax) (pool {}) (volume v)", path.display());
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, &text, "D").await.unwrap();
            let mut at = 0;
            let error = loop {
                match disk.write(at, &vec![5; 1 << 20]).await {
                    Ok(()) => at += 1 << 30,
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), Kind::NoSpace, "{error}");
            assert!(at >= 10 << 30, "{at}");
            disk.op(Op::Flush, 0, 0).await.unwrap();
            assert_eq!(disk.read(0, 1 << 20).await.unwrap(), vec![5; 1 << 20]);
            disk.op(Op::Discard, 0, 4 << 30).await.unwrap();
            disk.write(0, &vec![6; 1 << 20]).await.unwrap();
            assert_eq!(disk.read(4 << 30, 1 << 20).await.unwrap(), vec![5; 1 << 20]);
        });
        let findings = tool::open(&path).unwrap().carry_out(&Operation::Check).unwrap();
        assert_eq!(findings["problems"], serde_json::json!([]));
    }
}
