//! The way from the trees of one version to the block store that they share with others.

use super::below::Below;
use super::blocks::read_table;
use super::count::Count;
use super::format::{BLOCK, EXTENT, EXTENT_RECORD, ExtentRecord, Label, MOST_KEY, is_key};
use super::lease::{Ask, Door, Lease, Letter, Row, VERB, answer, letter, text};
use super::open::read_label;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::{Answer, Children, Cx, Element, Error, Flow, Kind, Op, Prepared, Reply, Request, Result};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

blockmason::params! {
    /// The way to a block store.
    struct Params {
        /// Whose trees come this way: a version of the program, say, in up to 24 letters, digits, `.`, `_`, `-`. Trees of
        /// each key are apart. Without it, those that a pool is made with, and that `(type parallax)` serves.
        key: String = "",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "isolation",
    summary: "lets trees change what is theirs in a block store, and nothing else",
    doc: "Stands between the trees of one version of a storage service and the `block_store` that they share with others. Reads \
          pass. A write, a discard or zeros pass if they go to extents that these trees have been given, or to their own records of \
          the table of extents; anything else is refused with EPERM, counted, and an event tells of the first time. So a version \
          with a bug damages what it has, and no other version's.\n\n\
          What the trees have is read from the table when they are opened, kept in memory as one bit for each 2 MiB, and follows what \
          they ask the store for. One `radix` comes through each isolation element.\n\n\
          `mason set Trees.revoked yes` ends all changes that come this way: it returns when none is on its way any more, and \
          what comes later is refused, however late. What was written stays.",
    family: Family::Parallax,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "refused", access: Access::Read, doc: "changes that were refused" },
        Handler { name: "revoked", access: Access::ReadWrite, doc: "whether all changes are refused" },
    ],
    layout: true,
    example: "element Guest (type nbd) (listen unix:store.sock)\n\
              element Volume (type radix) (volume vm1) (size 1G)\n\
              element Trees (type isolation) (key v2)\n\
              element Store (type block_store)\n\
              element Disk (type file) (path pool.img) (size 256M)\n\
              Guest -> Volume -> Trees -> Store -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let Params { key } = build.read(Params::from)?;
        if !key.is_empty() && !is_key(&key) {
            let message = format!("a key has up to {MOST_KEY} letters, digits, `.`, `_` and `-`");
            return Err(Error::invalid(message));
        }
        Ok(Arc::new(Isolation {
            key,
            rights: RwLock::default(),
            revoked: AtomicBool::new(false),
            changing: Arc::default(),
            refused: AtomicU64::new(0),
        }))
    },
    ..ElementType::BASE
};

struct Isolation {
    key: String,
    /// What the trees have that come this way. Two graphs may be in use at once: it is the same in both.
    rights: RwLock<Option<Arc<Rights>>>,
    revoked: AtomicBool,
    /// Changes that are on their way.
    changing: Arc<Count>,
    refused: AtomicU64,
}

/// What is known for one graph: who has opened the trees, who are the only ones to come this way.
#[derive(Default)]
struct Known {
    opening: tokio::sync::Mutex<()>,
    opener: OnceLock<u64>,
}

struct Rights {
    owner: u32,
    label: Label,
    /// A bit for each extent.
    ours: Vec<AtomicU64>,
}

impl Rights {
    /// Reads them from the table.
    async fn read(owner: u32, below: Below<'_>) -> Result<Rights> {
        let label = read_label(below).await?;
        let ours = (0..label.extents.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let (rights, mut extent) = (Rights { owner, label, ours }, 0);
        read_table(&rights.label, below, |record| {
            if record.is_some_and(|record| record.owner == owner) {
                rights.set(extent, true);
            }
            extent += 1;
        })
        .await?;
        Ok(rights)
    }

    fn set(&self, extent: u64, ours: bool) {
        let Some(word) = self.ours.get((extent / 64) as usize) else { return };
        let bit = 1 << (extent % 64);
        if ours {
            word.fetch_or(bit, Ordering::AcqRel)
        } else {
            word.fetch_and(!bit, Ordering::AcqRel)
        };
    }

    fn has(&self, extent: u64) -> bool {
        let word = self.ours.get((extent / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (extent % 64) & 1 == 1)
    }

    fn allow(&self, req: &Request) -> bool {
        const BYTES: u64 = EXTENT * BLOCK;
        let mut extents = req.offset / BYTES..req.end().div_ceil(BYTES);
        extents.all(|extent| self.has(extent)) || req.op == Op::Write && self.is_ours(req)
    }

    /// True of a write of records of extents that are ours, and stay so.
    fn is_ours(&self, req: &Request) -> bool {
        let table = |start: &u64| (*start..start + self.label.extents * EXTENT_RECORD).contains(&req.offset);
        let Some(start) = self.label.record(0).into_iter().find(table) else { return false };
        let (at, each) = (req.offset - start, EXTENT_RECORD as usize);
        if !at.is_multiple_of(EXTENT_RECORD) || !req.len.is_multiple_of(EXTENT_RECORD) {
            return false;
        }
        let bytes = req.data.to_vec();
        let mut records = (at / EXTENT_RECORD..).zip(bytes.chunks(each));
        records.all(|(extent, bytes)| {
            self.has(extent) && ExtentRecord::decode(bytes).is_some_and(|record| record.owner == self.owner)
        })
    }
}

impl Isolation {
    /// Hands a letter on to the store, and sees what comes of it.
    async fn pass(&self, letter: Result<Letter>, mut req: Request, cx: Cx<'_>) -> Reply {
        let ask = letter?.ask;
        let known = cx.prepared::<Known>();
        let _alone = known.opening.lock().await;
        let rights = self.rights();
        match (&ask, rights.as_deref().filter(|_| known.opener.get().is_some())) {
            (Ask::Open { opener, .. }, _) if known.opener.get().is_some_and(|other| other != opener) => {
                return Err(Error::new(
                    Kind::Busy,
                    "another element has opened the trees that this way leads to",
                ));
            }
            (Ask::Open { .. }, _) => {}
            (_, None) => return Err(unopened()),
            _ if self.revoked.load(Ordering::SeqCst) => return Err(revoked()),
            // From here on they may be somebody else's.
            (Ask::Give { first, count }, Some(rights)) => {
                (*first..first.saturating_add(*count).min(rights.label.extents))
                    .for_each(|at| rights.set(at, false));
            }
            _ => {}
        }
        let door = Some(Door { name: cx.name().to_owned(), key: self.key.clone() });
        let argument = text(&Letter { ask: ask.clone(), door })?;
        if let Some(extra) = &mut req.extra {
            extra.control = Some((VERB.to_owned(), argument));
        }
        let reply = cx.forward(0, req).await?;
        let Answer::Text(said) = &reply else { return Ok(reply) };
        match (ask, rights) {
            (Ask::Open { opener, .. }, rights) => {
                let Lease { owner, .. } = answer(said)?;
                let id = read_label(Below::Port(cx)).await?.id;
                // Those that are known have followed every grant: the table may lag behind.
                if rights.is_none_or(|rights| (rights.owner, rights.label.id) != (owner, id)) {
                    let found = Arc::new(Rights::read(owner, Below::Port(cx)).await?);
                    *self.rights.write().unwrap_or_else(PoisonError::into_inner) = Some(found);
                }
                let _ = known.opener.set(opener);
            }
            (Ask::Grant { .. }, Some(rights)) => {
                let Row { first, count, .. } = answer(said)?;
                (first..first.saturating_add(count).min(rights.label.extents))
                    .for_each(|at| rights.set(at, true));
            }
            _ => {}
        }
        Ok(reply)
    }

    fn rights(&self) -> Option<Arc<Rights>> {
        self.rights.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let here = self.changing.enter();
        // Whoever revokes sets that first and counts then.
        fence(Ordering::SeqCst);
        let known = self.rights().filter(|_| cx.prepared::<Known>().opener.get().is_some());
        let denied = match known {
            _ if self.revoked.load(Ordering::SeqCst) => revoked(),
            None => unopened(),
            Some(rights) if rights.allow(&req) => {
                return cx.forward(0, req).then(move |reply| {
                    drop(here);
                    reply
                });
            }
            Some(_) => Error::new(Kind::Denied, "these trees have not been given that part of the pool"),
        };
        if self.refused.fetch_add(1, Ordering::Relaxed) == 0 {
            cx.notice(format!("a {} at {} is refused: {}", req.op, req.offset, denied.message()));
        }
        cx.fail(&req, denied)
    }
}

fn unopened() -> Error {
    Error::new(Kind::Denied, "nobody has opened the trees that this way leads to")
}

fn revoked() -> Error {
    Error::new(Kind::Denied, "these trees may not change anything any more")
}

impl Element for Isolation {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::with(children.single()?.above(), Known::default()))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Read | Op::Flush | Op::Cache | Op::Extents => cx.forward(0, req),
            Op::Write | Op::Discard | Op::WriteZeroes => self.change(req, cx),
            Op::Control => match letter(&req) {
                Some(letter) => cx.later(&req.clone(), self.pass(letter, req, cx)),
                None => cx.forward(0, req),
            },
        }
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "refused" => Ok(self.refused.load(Ordering::Relaxed).to_string()),
            "revoked" => Ok(if self.revoked.load(Ordering::SeqCst) { "yes" } else { "no" }.to_owned()),
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        let revoke = match (handler, value) {
            ("revoked", "yes" | "true") => true,
            ("revoked", "no" | "false") => false,
            ("revoked", _) => return Err(Error::invalid("it is `yes` or `no`")),
            _ => return Err(Error::no_handler(handler)),
        };
        self.revoked.store(revoke, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if revoke {
            super::below::block_on(self.changing.none());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use blockmason::testing::{TestDisk, graph, run};
    use blockmason::{Kind, Op};

    #[test]
    fn a_key_is_short_and_plain() {
        run(1, async |host| {
            let text = |key: &str| {
                format!("element I (type isolation) (key {key}) element D (type mem) (size 64M) I -> D")
            };
            for key in ["a/b", "twenty-five-letters-long-x"] {
                let refused = graph(&host, crate::ALL, &text(key), "I").err().unwrap();
                assert_eq!(refused.kind(), Kind::Invalid, "{key}");
            }
            graph(&host, crate::ALL, &text("exactly.twenty-4_letters"), "I").unwrap();
        });
    }

    /// What its trees may do, and others' may not, is tested with trees: see `tests/doors.rs`.
    #[test]
    fn nothing_is_changed_before_the_trees_are_opened() {
        run(1, async |host| {
            let text = "element I (type isolation) element D (type mem) (size 64M) I -> D";
            let graph = graph(&host, crate::ALL, text, "I").unwrap();
            let disk = TestDisk::serve(&host, graph.clone()).await;
            for op in [Op::Write, Op::Discard, Op::WriteZeroes] {
                assert_eq!(disk.op(op, 0, 4096).await.unwrap_err().kind(), Kind::Denied, "{op}");
            }
            assert_eq!(disk.read(0, 4096).await.unwrap(), [0; 4096]);
            disk.op(Op::Flush, 0, 0).await.unwrap();
            let door = graph.instances().find(|instance| instance.name == "I").unwrap();
            assert_eq!(door.element.get("refused").unwrap(), "3");
        });
    }
}
