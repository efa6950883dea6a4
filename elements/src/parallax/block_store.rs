//! The block store of a pool on the disk below, for trees that are elements of their own.

use super::below::Below;
use super::blocks::Blocks;
use super::format::{BLOCK, EXTENT, Features, Format, is_key};
use super::lease::{Ask, Door, Free, Lease, Letter, Row, letter, text};
use super::open::{add_owner, create, find_owner, is_empty, need_size, note_feature, read_label};
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::lang::value::Size;
use blockmason::{
    Answer, Children, Cx, Element, Error, Flow, Geometry, Kind, LocalBoxFuture, Prepared, Reply, Request,
    Result,
};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

blockmason::params! {
    /// The block store of a pool.
    struct Params {
        /// Bytes that trees are given at once, which costs one write of metadata: a multiple of 2 MiB. Without it a
        /// sixty-fourth of the pool, 2 GiB at most. Never more than a sixteenth of the pool.
        region: Option<Size>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "block_store",
    summary: "gives the room of a pool to trees that are elements of their own",
    doc: "Keeps the label, the owners and the table of extents of a pool on the disk below, and gives extents of 2 MiB to the trees \
          above, each of which is an owner: `radix` above `isolation` above this is what `(type parallax)` is in one piece. An empty \
          disk (its first block is zeros) is made a pool.\n\n\
          Trees ask for extents with control requests; everything else passes as it is. Only an `isolation` in between may \
          ask, and each has a key of its own: so this element knows who asks, and trees cannot reach what others have.\n\n\
          **Durability.** An extent is given away once the table says so durably: two writes and one flush of the disk below \
          for each region.",
    family: Family::Parallax,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "free", access: Access::Read, doc: "bytes of the pool that are nobody's" },
        Handler {
            name: "grants",
            access: Access::Read,
            doc: "regions given away since the graph was started",
        },
    ],
    example: "element Guest (type nbd) (listen unix:store.sock)\n\
              element Volume (type radix) (volume vm1) (size 1G)\n\
              element Trees (type isolation)\n\
              element Store (type block_store)\n\
              element Disk (type file) (path pool.img) (size 256M)\n\
              Guest -> Volume -> Trees -> Store -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let region = build.read(Params::from)?.region.map(|size| size.0);
        if region.is_some_and(|bytes| bytes == 0 || !bytes.is_multiple_of(EXTENT * BLOCK)) {
            return Err(Error::invalid("a region is a multiple of 2 MiB"));
        }
        let region = region.map(|bytes| bytes / (EXTENT * BLOCK));
        Ok(Arc::new(BlockStore {
            region,
            opening: Default::default(),
            open: OnceLock::new(),
            grants: Default::default(),
        }))
    },
    ..ElementType::BASE
};

/// Extents of a region, at most, where nothing is said: 2 GiB.
const MOST_REGION: u64 = 1024;

struct BlockStore {
    /// In extents.
    region: Option<u64>,
    opening: tokio::sync::Mutex<()>,
    open: OnceLock<Blocks>,
    grants: std::sync::atomic::AtomicU64,
}

/// What is known for one graph.
struct Known {
    /// Bytes of the disk below.
    size: u64,
    /// Which owner's trees use which door.
    doors: Mutex<BTreeMap<u32, Door>>,
}

impl Known {
    fn doors(&self) -> MutexGuard<'_, BTreeMap<u32, Door>> {
        self.doors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The owner who uses a door.
    fn owner(&self, door: &Door) -> Result<u32> {
        let doors = self.doors();
        let found = doors.iter().find(|(_, other)| *other == door);
        found
            .map(|(owner, _)| *owner)
            .ok_or_else(|| Error::new(Kind::Denied, "the trees have not been opened"))
    }
}

impl BlockStore {
    /// The store, opened if it is not yet.
    async fn open(&self, cx: Cx<'_>) -> Result<&Blocks> {
        let _alone = self.opening.lock().await;
        if let Some(blocks) = self.open.get() {
            return Ok(blocks);
        }
        let (below, size) = (Below::Port(cx), cx.prepared::<Known>().size);
        if is_empty(below).await? {
            create(cx.rng(|rng| std::array::from_fn(|_| rng.u8(..))), size, below).await?;
        }
        let label = read_label(below).await?;
        label.features.allow(Features::KEYS, true, "the pool")?;
        need_size(&label, size)?;
        let blocks = Blocks::read(label, &[], below).await?;
        Ok(self.open.get_or_init(|| blocks))
    }

    async fn answer(&self, letter: Result<Letter>, cx: Cx<'_>) -> Reply {
        let Letter { ask, door } = letter?;
        let none = || Error::new(Kind::Denied, "trees reach a block store through an isolation element only");
        let door = door.ok_or_else(none)?;
        let (blocks, known, below) = (self.open(cx).await?, cx.prepared::<Known>(), Below::Port(cx));
        let said = match ask {
            Ask::Open { format, .. } => text(&open_trees(format, door, blocks, known, below).await?),
            Ask::Grant { near, epoch } => {
                let owner = known.owner(&door)?;
                let extents = blocks.label().extents;
                let region = self.region.unwrap_or((extents / 64).min(MOST_REGION));
                let region = region.clamp(1, (extents / 16).max(1));
                let row = blocks.hand_out(owner, (near, region), epoch, below).await?;
                self.grants.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let Range { start: first, end } = row;
                text(&Row { first, count: end - first, free: blocks.unowned() })
            }
            Ask::Give { first, count } => {
                blocks.take_back(known.owner(&door)?, first, count, below).await?;
                text(&Free { free: blocks.unowned() })
            }
            Ask::Need { feature } => {
                note_feature(blocks, known.owner(&door)?, feature, below).await?;
                text(&Free { free: blocks.unowned() })
            }
            Ask::Free {} => text(&Free { free: blocks.unowned() }),
        };
        said.map(Answer::Text)
    }
}

/// The owner of trees of that format behind a door.
///
/// # Errors
/// [`Kind::Busy`] if another door leads to them.
async fn open_trees(
    format: u32,
    door: Door,
    blocks: &Blocks,
    known: &Known,
    below: Below<'_>,
) -> Result<Lease> {
    if !door.key.is_empty() && !is_key(&door.key) {
        return Err(Error::invalid("that is no key"));
    }
    let format = Format::numbered(format).ok_or_else(|| Error::unsupported("trees of an unknown format"))?;
    let _alone = blocks.naming.lock().await;
    let owner = match find_owner(format, &door.key, &blocks.label(), below).await? {
        Some(owner) => owner,
        None => {
            let owner = add_owner(format, &door.key, blocks, below).await?;
            blocks.disown(owner.number);
            owner
        }
    };
    let mut doors = known.doors();
    match doors.get(&owner.number) {
        Some(other) if *other != door => {
            return Err(Error::new(
                Kind::Busy,
                format!("{} leads to the same trees: give one of them a key", other.name),
            ));
        }
        _ => {}
    }
    // A door leads to the trees of one format.
    doors.retain(|_, other| *other != door);
    doors.insert(owner.number, door);
    Ok(Lease { owner: owner.number, free: blocks.unowned() })
}

impl Element for BlockStore {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        if below.read_only {
            return Err(Error::new(Kind::Denied, "the disk below is read-only: a pool has to be written"));
        }
        let known = Known { size: below.size, doors: Mutex::default() };
        // Records of the table are smaller than blocks: what owners write beside each other is made to fit below here.
        Ok(Prepared::with(Geometry { min_block: 1, ..below.above() }, known))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match letter(&req) {
            Some(letter) => cx.later(&req, self.answer(letter, cx)),
            None => cx.forward(0, req),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(async move {
            // Whoever asks is told; this says it at the start.
            if let Err(error) = self.open(cx).await {
                tracing::error!(graph = cx.graph_name(), element = cx.name(), "no pool: {error}");
            }
        }))
    }

    fn get(&self, handler: &str) -> Result<String> {
        let none = || Error::new(Kind::Unavailable, "the pool is not open yet");
        match handler {
            "free" => Ok((self.open.get().ok_or_else(none)?.unowned() * EXTENT * BLOCK).to_string()),
            "grants" => Ok(self.grants.load(std::sync::atomic::Ordering::Relaxed).to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::lease::VERB;
    use blockmason::testing::{TestDisk, graph, run};
    use blockmason::{Extra, Kind, Op, Reply, Request};

    async fn send(disk: &TestDisk, letter: &str) -> Reply {
        let mut req = Request::new(Op::Control, 0, 0);
        let control = Some((VERB.to_owned(), letter.to_owned()));
        req.extra = Some(Box::new(Extra { control, ..Extra::default() }));
        disk.send(req).await.unwrap()
    }

    #[test]
    fn a_region_is_whole_extents() {
        run(1, async |host| {
            for region in ["1M", "0", "3M"] {
                let text = format!(
                    "element S (type block_store) (region {region}) element D (type mem) (size 64M) S -> D"
                );
                assert_eq!(
                    graph(&host, crate::ALL, &text, "S").err().unwrap().kind(),
                    Kind::Invalid,
                    "{region}"
                );
            }
        });
    }

    /// Who sends them may be another program.
    #[test]
    fn letters_that_make_no_sense_change_nothing() {
        run(1, async |host| {
            let text = "element S (type block_store) (region 4M) element D (type mem) (size 64M) S -> D";
            let graph = graph(&host, crate::ALL, text, "S").unwrap();
            let disk = TestDisk::serve(&host, graph.clone()).await;
            let store = graph.instances().find(|instance| instance.name == "S").unwrap().element.clone();
            let door = r#""door":{"name":"I","key":"k"}"#;
            let opened =
                send(&disk, &format!(r#"{{"ask":{{"open":{{"format":1,"opener":1}}}},{door}}}"#)).await;
            let (free, opened) = (store.get("free").unwrap(), format!("{opened:?}"));
            assert!(opened.contains("owner") && free != "0", "{opened}, {free}");
            let bad = [
                (
                    r#"{"ask":{"open":{"format":1,"opener":1}},"door":{"name":"I","key":"a b"}}"#,
                    Kind::Invalid,
                ),
                ("", Kind::Invalid),
                ("[]", Kind::Invalid),
                (r#"{"ask":{"grant":{"near":0,"epoch":0}}}"#, Kind::Denied),
                (r#"{"ask":{"grant":{"near":0,"epoch":0}},"door":{"name":"J","key":"k"}}"#, Kind::Denied),
                (
                    r#"{"ask":{"grant":{"near":0,"epoch":0,"more":1}},"door":{"name":"I","key":"k"}}"#,
                    Kind::Invalid,
                ),
                (r#"{"ask":{"give":{"first":0,"count":1}},"door":{"name":"I","key":"k"}}"#, Kind::Denied),
                (r#"{"ask":{"give":{"first":31,"count":2}},"door":{"name":"I","key":"k"}}"#, Kind::Denied),
                (
                    r#"{"ask":{"give":{"first":18446744073709551615,"count":2}},"door":{"name":"I","key":"k"}}"#,
                    Kind::Denied,
                ),
                (
                    r#"{"ask":{"open":{"format":9,"opener":1}},"door":{"name":"I","key":"k"}}"#,
                    Kind::Unsupported,
                ),
            ];
            for (letter, kind) in bad {
                assert_eq!(send(&disk, letter).await.unwrap_err().kind(), kind, "{letter}");
            }
            assert_eq!(store.get("free").unwrap(), free);
            let far =
                r#"{"ask":{"grant":{"near":18446744073709551615,"epoch":0}},"door":{"name":"I","key":"k"}}"#;
            send(&disk, far).await.unwrap();
            let left = free.parse::<u64>().unwrap() - (4 << 20);
            assert_eq!(store.get("free").unwrap(), left.to_string());
        });
    }
}
