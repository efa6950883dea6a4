//! Encrypts and authenticates a disk: what is below knows neither what is written nor can it change it unnoticed.
//!
//! `format` is what is stored, `keys` are secrets and what they wrap, `cipher` makes slots of blocks, `volume` keeps
//! header and sessions, `serve` answers requests, `rotate` changes the data key.

mod cipher;
mod format;
mod keys;
mod rotate;
mod serve;
#[cfg(test)]
mod tests;
mod volume;

use super::own::{Io, OUT};
use super::power::Block;
use super::slots::{self, Layout};
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::lang::value::FilePath;
use blockmason::lang::{ParamError, Params as Given};
use blockmason::{Children, Cx, Element, Error, Flow, Kind, LocalBoxFuture, Op, Prepared, Request, Result};
use format::{Cipher, DATA, HEADER, Opener, SESSIONS, TRAILER};
use futures::future::{Either, select};
use keys::{Credential, Source};
use rotate::Rotation;
use std::collections::VecDeque;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use volume::{Volume, Wanted, hex};

blockmason::params! {
    /// Encryption.
    struct Params {
        /// A file with a key: 32 bytes at least, all of which count. `head -c 32 /dev/urandom` makes one. Exactly one of
        /// `key_file`, `passphrase_file` and `key_command` is given.
        key_file: Option<FilePath>,
        /// A file with a passphrase: 8 bytes at least; a line feed at its end does not count.
        passphrase_file: Option<FilePath>,
        /// A program and its arguments, without a shell. What it prints within 30 seconds is the key, as if it were in a
        /// file: a line feed counts.
        key_command: Vec<String>,
        /// Of a new volume; of one that exists it must be its own.
        cipher: Cipher = "aes-256-gcm",
        /// Bytes that are encrypted together: a power of two from 512 to 64k. Of a volume that exists it must be its own.
        block: Block = "4k",
        /// Makes an encrypted volume of an empty disk.
        create: bool = "no",
        /// A file that `backup_header` has written. Opens the volume if both copies on the disk are lost, and is written there
        /// before the first block.
        header: Option<FilePath>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "crypto",
    summary: "encrypts a disk and notices when what is stored was changed",
    doc: "Blocks are encrypted and authenticated by AES-256-GCM, or by AES-256-GCM-SIV, on their way down, and \
          checked on their way up. A block that was changed below, moved to another place, or comes from another volume \
          is answered with EIO, and an event names it; its data is never given out. How to make keys, to add and to \
          remove them, and what is not protected: [crypto.md](../crypto.md).\n\n\
          **The disk below.** Each block is stored with 32 bytes of its own, in one slot, which must be written as a whole or \
          not at all, whatever dies meanwhile. A disk that does not promise that is refused: a block torn by a loss of power \
          could not be told from one that somebody has changed. `s3` promises it; a `wal`, whose log sees to it; and `mem`, where \
          nothing is left to be torn. Files and block devices do not: put a `wal` in between, which writes everything twice. A log of \
          5 MiB or more takes writes of a MiB in one piece, smaller ones less. 2 MiB and 32 KiB at the start are taken by the header and the \
          table of sessions, and 32 bytes for each block after that. An empty disk becomes an encrypted volume where \
          `(create yes)` says so; anything else without a header is refused. Format: \
          [formats/crypto.md](../formats/crypto.md).\n\n\
          **Nonces.** The first write after each start begins a session: a key of its own, which follows from the data key and \
          256 random bits, and is durable before anything is encrypted with it. Blocks are counted within it. So no pair of key and nonce \
          is used twice, although the disk below may be copied, cloned or set back to an old state. 4096 sessions can be begun; \
          an event comes when 90 % are used, and `rotate` makes them free. Then writes are refused.\n\n\
          **Zeros.** Blocks that were never written read as zeros, and so do those that were discarded or zeroed: their slots are \
          zeros. That is not authenticated: who can write below can make a block zero. It also shows which blocks are in use.\n\n\
          **Order, durability.** A write of several blocks is one write below, and atomic as that is. Flushes and FUA are passed on. \
          Overlapping requests do not meet below: a read waits for a write of the same block. What is shorter than a block \
          is read, decrypted, modified and written.\n\n\
          **Keys.** Handlers return before what they ask for has been done: `pending` says whether something is still to be done, \
          `error` whether it failed. `rotate` draws a new data key and encrypts all blocks again in the background, 1 MiB at a time, \
          while guests go on; it goes on after a restart. `erase` overwrites every key, and the data is gone.\n\n\
          **Speed.** Requests of more than 64 KiB are encrypted beside the shards.",
    family: Family::Transform,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "volume", access: Access::Read, doc: "the volume id" },
        Handler {
            name: "slots",
            access: Access::Read,
            doc: "the key slots that are used, and what opens them",
        },
        Handler { name: "sessions", access: Access::Read, doc: "how many sessions are used" },
        Handler {
            name: "rotation",
            access: Access::Read,
            doc: "how much of a change of the data key is done, in percent, or `none`",
        },
        Handler {
            name: "pending",
            access: Access::Read,
            doc: "how many of the things asked for below are still to be done",
        },
        Handler {
            name: "error",
            access: Access::Read,
            doc: "why the volume cannot be opened, or what was asked for has failed; else empty",
        },
        Handler {
            name: "add_key_file",
            access: Access::Call,
            doc: "with the path of a key file: whoever has it can open the volume, too",
        },
        Handler {
            name: "add_passphrase_file",
            access: Access::Call,
            doc: "with the path of a passphrase file: whoever has it can open the volume, too",
        },
        Handler {
            name: "remove_slot",
            access: Access::Call,
            doc: "with the number of a key slot: forgets it, unless it is the last one",
        },
        Handler {
            name: "backup_header",
            access: Access::Call,
            doc: "with the path of a file that is not there: writes the header to it, with all key slots",
        },
        Handler {
            name: "rotate",
            access: Access::Call,
            doc: "begins to encrypt every block again with a new data key",
        },
        Handler {
            name: "erase",
            access: Access::Call,
            doc: "with the volume id: forgets all keys for ever, data loss for everybody",
        },
    ],
    layout: true,
    tuning: &["key_command", "create"],
    example: "element Guest (type nbd) (listen unix:crypto.sock)\n\
              element Secret (type crypto) (key_file vm1.key) (create yes)\n\
              element Disk (type mem) (size 64M)\n\
              Guest -> Secret -> Disk\n",
    check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        let source = source(&params)?;
        source.check()?;
        Ok(Arc::new(Crypto::new(&params, source)))
    },
    ..ElementType::BASE
};

fn check(given: &Given) -> Result<(), Vec<ParamError>> {
    source(&Params::from(given)?).map(drop).map_err(|error| {
        let mut named = ["key_file", "passphrase_file", "key_command"].into_iter();
        let last = named.rfind(|name| given.get(name).is_some()).unwrap_or("key_file");
        vec![given.error(last, error.message())]
    })
}

/// Where the key comes from.
fn source(params: &Params) -> Result<Source> {
    match (&params.key_file, &params.passphrase_file, params.key_command.as_slice()) {
        (Some(path), None, []) => Ok(Source::Key(path.0.clone())),
        (None, Some(path), []) => Ok(Source::Passphrase(path.0.clone())),
        (None, None, command @ [_, ..]) => Ok(Source::Command(command.to_vec())),
        _ => Err(Error::invalid(
            "exactly one of key_file, passphrase_file and key_command says where the key is",
        )),
    }
}

/// How long what has failed waits before it is tried again, at first and at last.
const RETRY: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// For so long requests are answered with what the last try to open the volume came to: a passphrase is dear to try,
/// and a command may ask somebody.
const REFUSED: Duration = Duration::from_secs(5);

/// The longest that a rotation steps back for guests between two steps.
const STEP_BACK: Duration = Duration::from_millis(100);

/// What an operator has asked for.
#[derive(Debug)]
enum Order {
    Add(Credential),
    Remove(usize),
    Rotate,
    Erase,
}

struct Crypto {
    wanted: Arc<Wanted>,
    block: u64,
    /// Held while a volume is being opened. What the last try came to that has failed, and when.
    opening: tokio::sync::Mutex<Option<(Instant, Error)>>,
    now: Mutex<Now>,
    /// Tells `run` that there is something to do.
    wake: Notify,
}

/// What handlers speak of.
#[derive(Default)]
struct Now {
    /// The volume that was opened last. Graphs that lead to the same one share it.
    volume: Option<Arc<Volume>>,
    orders: VecDeque<Order>,
    /// One of them is being carried out.
    busy: bool,
    /// The next block of a rotation.
    reached: Option<u64>,
    error: String,
}

/// What one graph makes of it.
struct Place {
    layout: Layout,
    /// Set by the first request, or by `run`.
    volume: OnceLock<Arc<Volume>>,
}

/// When `run` goes on.
enum Next {
    Asked,
    After(Duration),
}

impl Crypto {
    fn new(params: &Params, source: Source) -> Crypto {
        let wanted = Wanted {
            source,
            cipher: params.cipher,
            create: params.create,
            backup: params.header.as_ref().map(|path| path.0.clone()),
        };
        Crypto {
            wanted: Arc::new(wanted),
            block: params.block.0,
            opening: tokio::sync::Mutex::default(),
            now: Mutex::default(),
            wake: Notify::new(),
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The volume of this graph, opened if it is not yet.
    async fn volume<'a>(&self, cx: Cx<'a>) -> Result<&'a Volume> {
        let place: &Place = cx.prepared();
        if let Some(volume) = place.volume.get() {
            return Ok(volume);
        }
        let mut refused = self.opening.lock().await;
        if let Some(volume) = place.volume.get() {
            return Ok(volume);
        }
        if let Some((_, error)) = refused.as_ref().filter(|(at, _)| cx.now() - *at < REFUSED) {
            return Err(error.clone());
        }
        match self.open_or_share(cx, place.layout).await {
            Ok(volume) => {
                let mut now = self.now();
                now.volume = Some(volume.clone());
                now.error.clear();
                drop(now);
                self.wake.notify_one();
                Ok(place.volume.get_or_init(|| volume))
            }
            Err(error) => {
                *refused = Some((cx.now(), error.clone()));
                if self.fails(&error) {
                    cx.notice(format!("the volume cannot be opened: {}", error.message()));
                }
                Err(error)
            }
        }
    }

    /// Remembers an error. True if it is another one than before.
    fn fails(&self, error: &Error) -> bool {
        let text = error.to_string();
        let mut now = self.now();
        std::mem::replace(&mut now.error, text) != now.error
    }

    /// Two graphs that lead to the same volume must not each have their own idea of its sessions.
    async fn open_or_share(&self, cx: Cx<'_>, layout: Layout) -> Result<Arc<Volume>> {
        let io = Io::new(cx);
        let last = self.now().volume.clone();
        match last {
            Some(last) if last.is_at(&io, layout).await? => Ok(last),
            _ => Volume::open(&io, &self.wanted, layout).await.map(Arc::new),
        }
    }

    /// Carries out what was asked for.
    async fn obey(&self, volume: &Volume, cx: Cx<'_>, rotation: &mut Option<Rotation>) {
        loop {
            let order = {
                let mut now = self.now();
                let order = now.orders.pop_front();
                now.busy = order.is_some();
                order
            };
            let io = Io::new(cx);
            let (done, what) = match order {
                None => return,
                Some(Order::Add(credential)) => {
                    (volume.add_slot(&io, credential).await, "no key slot was added")
                }
                Some(Order::Remove(slot)) => (volume.remove_slot(&io, slot).await, "no key slot was removed"),
                Some(Order::Erase) => (volume.erase(&io).await, "the volume was not erased"),
                Some(Order::Rotate) if rotation.is_some() => {
                    (Err(Error::new(Kind::Busy, "one is under way")), "no rotation was begun")
                }
                Some(Order::Rotate) => {
                    let begun = volume.begin_rotation(&io).await;
                    *rotation = volume.rotation();
                    (begun, "no rotation was begun")
                }
            };
            match done {
                Ok(()) => self.now().error.clear(),
                Err(error) => {
                    self.fails(&error);
                    cx.notice(format!("{what}: {}", error.message()));
                }
            }
        }
    }

    /// Moves a rotation on, if there is one.
    async fn rotate(
        &self,
        volume: &Volume,
        cx: Cx<'_>,
        rotation: &mut Option<Rotation>,
        retry: &mut Duration,
    ) -> Next {
        let Some(running) = rotation.as_mut().filter(|_| volume.rotation().is_some()) else {
            return Next::Asked;
        };
        let (begun, guests) = (cx.now(), cx.guest_requests());
        let most = u64::from(cx.geometry().max_len);
        let done = volume.rotate_some(&Io::background(cx), running, most).await;
        self.now().reached = Some(running.reached());
        match done {
            Ok(false) => {
                *retry = RETRY[0];
                let active = cx.guest_requests() != guests;
                Next::After(if active { (cx.now() - begun).min(STEP_BACK) } else { Duration::ZERO })
            }
            Ok(true) => {
                let mut now = self.now();
                (*rotation, now.reached) = (None, None);
                // Whoever asked for another one meanwhile has got what he wanted.
                now.error.clear();
                Next::Asked
            }
            Err(error) => {
                if self.fails(&error) {
                    cx.notice(format!("the rotation waits: {}", error.message()));
                }
                if running.is_stuck() {
                    *rotation = None;
                    return Next::Asked;
                }
                Next::After(later(retry))
            }
        }
    }

    async fn work(&self, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        let mut retry = RETRY[0];
        // None until the volume is open.
        let mut rotation = None;
        loop {
            // Not dropped half-way: what is being written would be left behind.
            let next = match self.volume(cx).await {
                // The reason has been told, and whoever sends a request is told.
                Err(_) => Next::After(later(&mut retry)),
                Ok(volume) => {
                    let running = rotation.get_or_insert_with(|| volume.rotation());
                    self.obey(volume, cx, running).await;
                    self.rotate(volume, cx, running, &mut retry).await
                }
            };
            let wait = async {
                match next {
                    Next::Asked => self.wake.notified().await,
                    Next::After(Duration::ZERO) => blockmason::rt::pass().await,
                    Next::After(time) => {
                        let _ = blockmason::rt::timeout(time, self.wake.notified()).await;
                    }
                }
            };
            if let Either::Left(_) = select(closing.as_mut(), pin!(wait)).await {
                return;
            }
        }
    }

    /// The volume, for a handler.
    fn opened(&self) -> Result<Arc<Volume>> {
        let now = self.now();
        let none = || match now.error.as_str() {
            "" => "the volume is not open yet: the graph is just being started".to_owned(),
            error => error.to_owned(),
        };
        now.volume.clone().ok_or_else(|| Error::new(Kind::Unavailable, none()))
    }

    fn order(&self, order: Order) -> Result<String> {
        self.now().orders.push_back(order);
        self.wake.notify_one();
        Ok("it is being done; `pending` is 0 when it has been, and `error` says if it failed".to_owned())
    }

    fn call_add(&self, path: &str, source: fn(PathBuf) -> Source) -> Result<String> {
        self.order(Order::Add(source(absolute(path)?.to_owned()).read()?))
    }

    fn call_remove(&self, volume: &Volume, number: &str) -> Result<String> {
        let slot =
            number.parse().map_err(|_| Error::invalid("which key slot? `slots` says which there are"))?;
        volume.state().may_remove(slot)?;
        self.order(Order::Remove(slot))
    }

    fn call_erase(&self, volume: &Volume, argument: &str) -> Result<String> {
        if argument != hex(&volume.state().header.id) {
            let message =
                "this makes the data unreadable for ever; its argument is the id that `volume` says";
            return Err(Error::new(Kind::Denied, message));
        }
        self.order(Order::Erase)
    }
}

/// How long to wait now; twice as long the next time.
fn later(retry: &mut Duration) -> Duration {
    std::mem::replace(retry, (*retry * 2).min(RETRY[1]))
}

/// Where this process stands is nothing that an operator knows.
fn absolute(path: &str) -> Result<&Path> {
    let path = Path::new(path);
    path.is_absolute().then_some(path).ok_or_else(|| Error::invalid("the path must begin with a `/`"))
}

/// Writes a header to a file of its own, for the owner alone.
fn backup(volume: &Volume, path: &Path) -> Result<String> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| {
        file.write_all(&volume.header_bytes())?;
        file.sync_all()
    });
    written.map_err(|error| Error::io(error, "the header cannot be written").with_path(path))?;
    Ok(format!(
        "the header is in {}; whoever has it and a key that opens it now can open the volume",
        path.display()
    ))
}

/// The key slots, as people read them.
fn key_slots(volume: &Volume) -> String {
    let state = volume.state();
    let used = state.header.slots.iter().enumerate();
    let used = used.filter_map(|(number, slot)| slot.as_ref().map(|slot| (number, slot.opener)));
    let all: Vec<_> = used
        .map(|(number, opener)| match opener {
            Opener::Key => format!("{number} key"),
            Opener::Passphrase(_) => format!("{number} passphrase"),
        })
        .collect();
    all.join(", ")
}

impl Element for Crypto {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        let slot = self.block + TRAILER as u64;
        let layout = Layout::new(self.block, slot, DATA, below.size, "encrypted")?;
        // A header that is torn while the volume is made would look like one that is lost.
        let geometry =
            layout.geometry(&below, HEADER as u64, "could not be told from one that was changed")?;
        Ok(Prepared::with(geometry, Place { layout, volume: OnceLock::new() }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match cx.prepared::<Place>().volume.get() {
            Some(volume) => slots::serve(&**volume, req, cx),
            // Nothing was written here that is not there: a volume that nothing opens must not keep its graph.
            None if matches!(req.op, Op::Flush | Op::Control) => cx.forward(OUT, req),
            None => cx.later(&req.clone(), async move {
                let volume = self.volume(cx).await?;
                slots::serve(volume, req, cx).await
            }),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(self.work(cx)))
    }

    fn may_hand_over(&self) -> Result<()> {
        let now = self.now();
        match now.busy || !now.orders.is_empty() {
            true => Err(Error::new(Kind::Busy, "its keys are just being changed")),
            false => Ok(()),
        }
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "volume" => Ok(hex(&self.opened()?.state().header.id)),
            "slots" => Ok(key_slots(&*self.opened()?)),
            "sessions" => Ok(format!("{} of {SESSIONS}", self.opened()?.state().used())),
            "rotation" => {
                let reached = self.now().reached;
                Ok(self.opened()?.rotated(reached))
            }
            "pending" => {
                let now = self.now();
                Ok((now.orders.len() + usize::from(now.busy)).to_string())
            }
            "error" => Ok(self.now().error.clone()),
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn call(&self, handler: &str, argument: &str) -> Result<String> {
        let volume = self.opened()?;
        match handler {
            "add_key_file" => self.call_add(argument, Source::Key),
            "add_passphrase_file" => self.call_add(argument, Source::Passphrase),
            "remove_slot" => self.call_remove(&volume, argument),
            "backup_header" => backup(&volume, absolute(argument)?),
            "rotate" => self.order(Order::Rotate),
            "erase" => self.call_erase(&volume, argument),
            _ => Err(Error::no_handler(handler)),
        }
    }
}
