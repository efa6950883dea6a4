//! Keeps account of which parts of the disk below differ from another one.

use super::map::DirtyMap;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::lang::value::Size;
use blockmason::{Children, Cx, Element, Error, Flow, Op, Prepared, Request, Result};
use std::any::Any;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A power of two from 4 KiB to 16 MiB.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Granule(u64);

impl FromStr for Granule {
    type Err = String;

    fn from_str(text: &str) -> Result<Granule, String> {
        let Size(bytes) = text.parse()?;
        let fits = bytes.is_power_of_two() && (4 << 10..=16 << 20).contains(&bytes);
        fits.then_some(Granule(bytes)).ok_or(format!("expected a power of two from 4k to 16M, found `{text:.40}`"))
    }
}

impl fmt::Display for Granule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size(self.0).fmt(f)
    }
}

blockmason::text_value!(Granule, "size");

blockmason::words! {
    /// What is known at first.
    enum Initially {
        /// Everything differs.
        Dirty = "dirty",
        /// Nothing does.
        Clean = "clean",
    }
}

blockmason::words! {
    /// What a change means.
    enum Written {
        /// It brings the disk below up to date: this is the leg of a mirror.
        Clean = "clean",
        /// It makes the disk below differ from its last backup.
        Dirty = "dirty",
    }
}

blockmason::params! {
    /// Keeps account of what differs.
    struct Params {
        /// Bytes of which the map knows only together whether they differ: a power of two from 4k to 16M.
        granule: Granule = "64k",
        /// What is known at first: that all is `dirty`, or that all is `clean`.
        initially: Initially = "dirty",
        /// What a change makes of the granules that it touches: `clean`, as on the leg of a mirror, or `dirty`, as
        /// since a backup.
        written: Written = "clean",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "log_dirty",
    summary: "keeps account of which parts of the disk below differ from another one",
    doc: "Requests pass unmodified. A map says of each granule of the disk whether it may differ from another \
          disk, which others refer to: a `copy` copies what is dirty, an `if` forwards only that.\n\n\
          With `(written clean)` this stands on the leg of a mirror that is being filled (Block Mason, section 3.1.1): \
          a change that succeeds on all of a granule makes it clean, one on a part of it leaves it as it was, and \
          one that fails makes it dirty. With `(written dirty)` it stands above a disk of which there is a backup: \
          a change makes the granules that it touches dirty before it is issued.\n\n\
          A `tee` above that refers to the map announces changes to it before it sends them down any leg.",
    family: Family::Migrate,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "remaining", access: Access::Read, doc: "dirty bytes" },
        Handler { name: "granules", access: Access::Read, doc: "dirty granules and all of them, `12/1024`" },
    ],
    provides: &["dirty_map"],
    passes_through: true,
    example: "element Guest (type nbd) (listen unix:log_dirty.sock)\n\
              element Changed (type log_dirty) (initially clean) (written dirty)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Changed -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        let map = DirtyMap::new(params.granule.0, params.initially == Initially::Dirty);
        Ok(Arc::new(LogDirty { map: Arc::new(map), cleans: params.written == Written::Clean }))
    },
    ..ElementType::BASE
};

struct LogDirty {
    map: Arc<DirtyMap>,
    /// Changes bring the disk below up to date.
    cleans: bool,
}

impl LogDirty {
    async fn change(&self, req: Request, cx: Cx<'_>) -> Result<blockmason::Answer> {
        let intent = self.map.intend(req.offset..req.end()).await?;
        if !self.cleans {
            intent.failed();
        }
        let reply = cx.forward(0, req).await;
        match &reply {
            Ok(_) if self.cleans => intent.synced(),
            Ok(_) => {}
            Err(_) => intent.failed(),
        }
        reply
    }
}

impl Element for LogDirty {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?.above();
        self.map.cover(below.size)?;
        Ok(Prepared::of(below))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Write | Op::WriteZeroes | Op::Discard if req.len > 0 => {
                cx.later(&req.clone(), self.change(req, cx))
            }
            _ => cx.forward(0, req),
        }
    }

    fn provide(&self, service: &str) -> Option<Box<dyn Any>> {
        (service == "dirty_map").then(|| Box::new(self.map.clone()) as Box<dyn Any>)
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "remaining" => Ok(self.map.dirty_bytes().to_string()),
            "granules" => {
                let granule = self.map.granule();
                let (dirty, all) = (self.map.dirty_bytes().div_ceil(granule), self.map.size().div_ceil(granule));
                Ok(format!("{dirty}/{all}"))
            }
            _ => Err(Error::no_handler(handler)),
        }
    }
}

#[cfg(test)]
mod tests {
    use blockmason::testing::{TestDisk, run};

    async fn get(disk: &TestDisk, handler: &str) -> String {
        let graph = disk.disk.graph();
        let found = graph.instances().find(|instance| instance.name == "L").unwrap();
        found.element.get(handler).unwrap()
    }

    #[test]
    fn whole_granules_become_clean() {
        run(1, async |host| {
            let text = "element L (type log_dirty) (granule 4k) element M (type mem) (size 10k) L -> M";
            let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
            assert_eq!(get(&disk, "granules").await, "3/3");
            disk.write(100, &[1; 8000]).await.unwrap();
            assert_eq!(get(&disk, "granules").await, "3/3");
            disk.write(0, &[1; 4096]).await.unwrap();
            disk.write(8192, &[1; 2048]).await.unwrap();
            assert_eq!((get(&disk, "granules").await, get(&disk, "remaining").await), ("1/3".into(), "4096".into()));
        });
    }

    #[test]
    fn since_a_backup_every_change_is_dirty_also_one_that_fails() {
        run(1, async |host| {
            let text = "element L (type log_dirty) (granule 4k) (initially clean) (written dirty)\n\
                        element E (type error) (op write) (range 4k-8k) element M (type mem) (size 12k) L -> E -> M";
            let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
            disk.write(100, &[1; 8]).await.unwrap();
            assert_eq!(get(&disk, "granules").await, "1/3");
            assert!(disk.write(5000, &[1; 8]).await.is_err());
            assert_eq!(get(&disk, "granules").await, "2/3");
        });
    }
}
