//! A disk in a bucket of S3, or of what speaks like it.

use crate::cloud::claims::claim;
use crate::cloud::client::{S3, Target, read_ca};
use crate::cloud::counts::{Call, Counts, Sum};
use crate::cloud::credentials::{Source, profile};
use crate::cloud::ledger::Book;
use crate::cloud::metered::Metered;
use crate::cloud::shared::{self, Shared};
use crate::cloud::store::{ObjectStore, prefix};
use crate::cloud::volume::{LONGEST, Opening};
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::events::{Event, EventKind};
use blockmason::heads::HeadPlace;
use blockmason::lang::value::{FilePath, Service, Size, Time, Uri};
use blockmason::{
    Answer, Children, Cx, Element, Error, Flow, Geometry, Kind, Op, Open, Ops, Prepared, Request, Result, rt,
};
use std::any::Any;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

blockmason::words! {
    /// Where the name of a bucket goes.
    enum Addressing {
        /// Into the path.
        Path = "path",
        /// Into the name of the host.
        Host = "host",
    }
}

blockmason::params! {
    /// A disk in a bucket.
    pub struct Params {
        /// The bucket.
        bucket: String,
        /// What the keys of the disk's objects begin with, `vms/vm1`: so one bucket has room for many disks.
        prefix: Option<String>,
        /// The server, `https://s3.example.org`; without it Amazon's.
        endpoint: Option<Uri>,
        /// The region that requests are signed for.
        region: String = "us-east-1",
        /// Whether the bucket stands in the path of a URL (`path`) or in the host's name (`host`). Without it in the path
        /// where there is an `endpoint`, and in the name at Amazon's.
        addressing: Option<Addressing>,
        /// A file of keys, in the form of `~/.aws/credentials`. Without it the keys are in the environment (`AWS_ACCESS_KEY_ID`,
        /// `AWS_SECRET_ACCESS_KEY`), in `~/.aws/credentials`, or are those of the machine's role, whichever is found first.
        credentials: Option<FilePath>,
        /// The profile in that file.
        profile: Option<String>,
        /// Certificates to trust beside those of the system, as PEM.
        ca: Option<FilePath>,
        /// Memory for what is durable in the bucket and not yet in its block's object; 96 MiB at least.
        memory: Size = "128M",
        /// How long a request waits for a store that does not answer; then it fails. Without it requests wait until the
        /// store is back.
        patience: Option<Time>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "s3",
    summary: "a disk in a bucket of S3, or of what speaks like it",
    doc: "Serves a volume that `mason bucket create` has made in a bucket. A block of the disk is an object; blocks that were never written, or were \
          discarded, have none.\n\n\
          **Durability.** A write is answered when it is durable in the bucket: as part of a commit, an object that holds what was written \
          since the one before. So a flush has nothing left to do, and what is in the bucket is at each instant what the disk was at \
          one. Latency is that of one or two requests to the store; put a `cache` on an SSD above for less. Writes of such a cache \
          (origin `write_back`) are answered at once and durable at its next flush; what it writes between two flushes, up to 32 MiB \
          in 65,536 pieces, is in the bucket as a whole or not at all.\n\n\
          **One owner.** Whoever opens a volume last owns it; the former owner's disk then fails, with an event. A \
          volume that another host has open is not opened, until `mason bucket take` says that this host is dead. The \
          store must honour `If-None-Match: *`, which `mason bucket create` tries.\n\n\
          **Caches that write back.** A cache on an SSD tells the bucket before it keeps a first change, and when it leaves with none that the bucket has \
          not. As long as one may have more, the disk is read and written through that cache only, or once `mason bucket take` has said that it is lost.\n\n\
          **When the store does not answer**, requests wait, or fail after `patience`; an event says so, and another one that it \
          is back. An object that the map has and the bucket has not is an I/O error and an event, never zeros.\n\n\
          The volume is not handed over to another process. [Cloud disks](../cloud.md) tells more; format: \
          [formats/bucket.md](../formats/bucket.md).",
    family: Family::Sink,
    params: Params::PARAMS,
    ports: Ports::SINK,
    handlers: &[
        Handler {
            name: "store",
            access: Access::Read,
            doc: "answers, silent, or why nothing is served any more",
        },
        Handler {
            name: "waiting",
            access: Access::Read,
            doc: "bytes in memory that are in no block's object yet",
        },
        Handler { name: "epoch", access: Access::Read, doc: "how often the volume has been opened" },
        Handler { name: "commits", access: Access::Read, doc: "commits since it was opened" },
        Handler {
            name: "puts",
            access: Access::Read,
            doc: "objects put since it was opened, attempts included",
        },
        Handler { name: "gets", access: Access::Read, doc: "objects or parts of them fetched" },
        Handler { name: "lists", access: Access::Read, doc: "listings" },
        Handler { name: "sent", access: Access::Read, doc: "bytes put" },
        Handler { name: "received", access: Access::Read, doc: "bytes fetched" },
        Handler {
            name: "settle",
            access: Access::Call,
            doc: "brings everything into its block's object, and makes a checkpoint; durable before, too",
        },
    ],
    example: "element Guest (type nbd) (listen unix:cloud.sock)\n\
              element Disk (type s3) (bucket vms) (prefix vm1) (endpoint http://127.0.0.1:9000)\n\
              Guest -> Disk\n",
    provides: &["metered"],
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(Disk::new(build)?)),
    ..ElementType::BASE
};

impl Params {
    fn target(&self) -> Result<Target> {
        let endpoint = self.endpoint.as_ref().map(|uri| uri.as_str().to_owned());
        let of_file = |path: &FilePath| Source::File {
            path: path.0.clone(),
            profile: self.profile.clone().unwrap_or_else(profile),
        };
        Ok(Target {
            bucket: self.bucket.clone(),
            region: self.region.clone(),
            by_path: self.addressing.map_or(endpoint.is_some(), |addressing| addressing == Addressing::Path),
            credentials: self.credentials.as_ref().map_or(Source::Any, of_file),
            ca: self.ca.as_ref().map(|path| read_ca(&path.0)).transpose()?,
            endpoint,
        })
    }

    /// What names the volume.
    fn url(&self) -> String {
        let endpoint = self.endpoint.as_ref().map_or("s3:/", |uri| uri.as_str()).trim_end_matches('/');
        format!("{endpoint}/{}/{}", self.bucket, prefix(self.prefix.as_deref().unwrap_or_default()))
    }
}

struct Disk {
    params: Params,
    graph: String,
    state_dir: PathBuf,
    store: Arc<dyn ObjectStore>,
    geometry: Geometry,
    served: Arc<Served>,
}

/// The volume itself, for those who refer to it, too.
struct Served {
    id: [u8; 16],
    /// What was asked for before the volume was open, and since if it was opened here.
    counts: Arc<Counts>,
    /// Between `open` and `close`.
    shared: Mutex<Option<Arc<Shared>>>,
    book: Mutex<Weak<Book>>,
}

impl Served {
    fn shared(&self) -> MutexGuard<'_, Option<Arc<Shared>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self) {
        // Leaving takes a while: not under the lock.
        let shared = self.shared().take();
        let counts = shared.as_ref().map(|shared| shared.volume.bucket.counts.clone());
        drop(shared);
        let book = self.book.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let (Some(counts), Some(book)) = (counts, book)
            && let Err(error) = book.finish(&counts.take_unbilled())
        {
            tracing::warn!("what leaving has cost is on no bill: {error}");
        }
    }
}

impl Metered for Served {
    fn volume(&self) -> [u8; 16] {
        self.id
    }

    fn take_unbilled(&self) -> Sum {
        let mut sum = self.counts.take_unbilled();
        if let Some(shared) = &*self.shared() {
            sum.add(&shared.volume.bucket.counts.take_unbilled());
        }
        sum
    }

    fn stored(&self) -> Option<u64> {
        self.shared().as_ref().map(|shared| shared.volume.stored())
    }

    fn rest(&self, rests: bool) {
        if let Some(shared) = &*self.shared() {
            shared.volume.rest(rests);
        }
    }

    fn finish_in(&self, book: Weak<Book>) {
        *self.book.lock().unwrap_or_else(PoisonError::into_inner) = book;
    }
}

impl Disk {
    fn new(build: &Build<'_>) -> Result<Disk> {
        let params = build.read(Params::from)?;
        let store: Arc<dyn ObjectStore> = Arc::new(S3::new(&params.target()?)?);
        let (counts, shared, book) = Default::default();
        let below = prefix(params.prefix.as_deref().unwrap_or_default());
        let found = Shared::look(&params.url(), store.clone(), &below, Arc::clone(&counts));
        let (description, size) = found.map_err(|error| error.with_path(params.url()))?;
        let geometry = Geometry {
            preferred_block: description.block.min(1 << 16) as u32,
            max_len: LONGEST,
            ops: Ops { cache: false, ..Ops::ALL },
            needs_flush: true,
            atomic: LONGEST,
            ..Geometry::new(size)
        };
        let (graph, state_dir) = (build.graph.to_owned(), build.state_dir.to_owned());
        let served = Arc::new(Served { id: description.id()?, counts, shared, book });
        Ok(Disk { params, graph, state_dir, store, geometry, served })
    }

    fn shared(&self) -> Result<Arc<Shared>> {
        let shared = self.served.shared().clone();
        shared.ok_or_else(|| Error::internal("a request came before the volume was opened"))
    }

    fn control<'a>(&self, shared: &Shared, req: &Request, cx: Cx<'a>) -> Flow<'a> {
        // The id of a cache above.
        let id = |text: &str| u64::from_str_radix(text, 16).ok();
        let control = req.extra.as_ref().and_then(|extra| extra.control.as_ref());
        let volume = &shared.volume;
        let text = match control.map(|(verb, argument)| (verb.as_str(), argument.as_str())) {
            Some(("incarnation", _)) => Some(format!("bucket {} {}", volume.description.id, volume.epoch)),
            Some(("generation", _)) => Some(volume.generation()),
            Some(("since", generation)) => Some(volume.since(generation).to_owned()),
            Some(("holders", cache)) => id(cache).map(|cache| volume.holders(cache)),
            Some(("hold", argument)) => {
                let (cache, place) = argument.split_once(' ').unwrap_or((argument, ""));
                let Some(cache) = id(cache) else {
                    return cx.fail(req, Error::invalid("that is no id of a cache"));
                };
                let told = volume.clone().hold(cache, place.to_owned());
                return cx.later(req, async move { told.await.map(|()| Answer::Text(String::new())) });
            }
            Some(("release", _)) => {
                let told = volume.clone().release();
                return cx.later(req, async move { told.await.map(|()| Answer::Text(String::new())) });
            }
            Some(("ended", _)) => Some(volume.state().dead.clone().map(|(_, why)| why).unwrap_or_default()),
            _ => None,
        };
        match text {
            Some(text) => Flow::Now(Ok(Answer::Text(text))),
            None => cx.fail(req, Error::unsupported("there is nothing of that kind to control here")),
        }
    }
}

/// How long what is in a commit may wait for its block where nothing is written any more.
const IDLE: Duration = Duration::from_secs(10);

impl Element for Disk {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(self.geometry))
    }

    fn head(&self) -> Option<HeadPlace> {
        Some(HeadPlace::keyed("s3", &self.params.url(), &self.state_dir))
    }

    fn open(&self, open: &Open<'_>) -> Result<Option<String>> {
        let (events, graph, name) = (open.host.events().clone(), self.graph.clone(), open.name.to_owned());
        let say = move |message: &str| {
            events.publish(Event::new(EventKind::Notice, &graph, message).of(&name));
        };
        let opening =
            Opening { claim: claim(), memory: self.params.memory.0, idle: IDLE, take: false, patience: None };
        let (url, prefix) = (self.params.url(), prefix(self.params.prefix.as_deref().unwrap_or_default()));
        let (store, counts) = (self.store.clone(), self.served.counts.clone());
        let shared = Shared::open(&url, &self.graph, store, &prefix, counts, opening, Arc::new(say));
        let shared = shared.map_err(|error| error.with_path(&url))?;
        let size = shared.volume.state().size;
        if size != self.geometry.size {
            let message = format!(
                "it has {size} bytes now, and had {} when the graph was loaded: unload the graph and load it again",
                self.geometry.size
            );
            return Err(Error::new(Kind::Busy, message).with_path(&url));
        }
        *self.served.shared() = Some(shared);
        Ok(None)
    }

    fn close(&self) {
        self.served.leave();
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let shared = match self.shared() {
            Ok(shared) => shared,
            Err(error) => return cx.fail(&req, error),
        };
        if req.op == Op::Control {
            return self.control(&shared, &req, cx);
        }
        if req.op.has_range()
            && let Err(error) = shared.volume.may_be_read()
        {
            return cx.fail(&req, error);
        }
        let served = shared.volume.clone().serve(req.clone());
        let patience = self.params.patience.map(|time| time.0);
        cx.later(&req, async move {
            match patience {
                None => served.await,
                Some(patience) => rt::timeout(patience, served).await.unwrap_or_else(|| {
                    Err(Error::new(Kind::Unavailable, "the store does not answer in time"))
                }),
            }
        })
    }

    fn may_hand_over(&self) -> Result<()> {
        Err(Error::unsupported(
            "a disk in a bucket is not handed over to another process: stop this one, then start the other",
        ))
    }

    fn provide(&self, service: &str) -> Option<Box<dyn Any>> {
        let metered = || Box::new(self.served.clone() as Arc<dyn Metered>) as Box<dyn Any>;
        (service == <dyn Metered>::NAME).then(metered)
    }

    fn get(&self, handler: &str) -> Result<String> {
        let shared = self.shared()?;
        let (volume, counts) = (&shared.volume, &shared.volume.bucket.counts);
        Ok(match handler {
            "store" => match &volume.state().dead {
                Some((_, why)) => why.clone(),
                None if volume.bucket.is_down() => "silent".to_owned(),
                None => "answers".to_owned(),
            },
            "waiting" => volume.state().pieces.bytes().to_string(),
            "epoch" => volume.epoch.to_string(),
            "commits" => volume.state().committed.to_string(),
            "puts" => counts.requests(Call::Put).to_string(),
            "gets" => (counts.requests(Call::Get) + counts.requests(Call::Head)).to_string(),
            "lists" => counts.requests(Call::List).to_string(),
            "sent" => counts.bytes(Call::Put).to_string(),
            "received" => counts.bytes(Call::Get).to_string(),
            _ => return Err(Error::no_handler(handler)),
        })
    }

    fn call(&self, handler: &str, _argument: &str) -> Result<String> {
        match handler {
            "settle" => {
                let shared = self.shared()?;
                shared::block_on(async move { shared.volume.settle().await })?;
                Ok("everything is in its block's object".to_owned())
            }
            _ => Err(Error::no_handler(handler)),
        }
    }
}

#[cfg(test)]
mod tests {
    use blockmason::Kind;
    use blockmason::testing::{TestDisk, run};

    /// With real servers below, the model is played in the workspace's own tests of them.
    #[test]
    fn what_cannot_be_reached_is_one_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("keys");
        std::fs::write(&keys, "[default]\naws_access_key_id=a\naws_secret_access_key=b\n").unwrap();
        run(1, async |host| {
            let text = format!(
                "element D (type s3) (bucket none) (endpoint http://127.0.0.1:1) (credentials {})",
                folder.path().join("nokeys").display()
            );
            let error = TestDisk::new(&host, crate::ALL, &text, "D").await.err().unwrap();
            assert_eq!(error.kind(), Kind::Unavailable, "{error}");
            assert!(error.to_string().ends_with("nokeys: the credentials cannot be read"), "{error}");
        });
    }
}
