//! An open volume: what is in memory of it, and what requests do with that. What goes to the bucket when: keeper.rs.

use super::format::{Claim, Description, Gone, Id, Span, version};
use super::holds::{self, Hold};
use super::key;
use super::map::Map;
use super::pieces::{Fill, Piece, Pieces};
use super::store::Bucket;
use blockmason::data::Data;
use blockmason::request::join_extents;
use blockmason::{Answer, Error, Extent, ExtentState, Kind, Op, Origin, Reply, Request, Result, rt};
use futures::future::try_join_all;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// The most data of one commit, in bytes.
pub(crate) const BATCH: u64 = 32 << 20;

/// The longest write that may enter, and that is in one commit as a whole.
pub(crate) const LONGEST: u32 = 16 << 20;

/// The most entries of one commit: a flood of small requests ends a batch too.
pub(crate) const ENTRIES: usize = 1 << 16;

/// A volume that this process has open.
pub(crate) struct Volume {
    pub(crate) bucket: Bucket,
    pub(crate) id: Id,
    pub(crate) block: u64,
    pub(crate) epoch: u64,
    /// Bytes that may wait in memory for their blocks.
    pub(crate) memory: u64,
    /// How long they may where nothing is written any more.
    pub(crate) idle: Duration,
    /// What was left in order: the description as it is in the bucket.
    pub(crate) description: Description,
    state: Mutex<State>,
    /// Something for the keeper to look at.
    pub(crate) work: Notify,
    /// How far it is; whoever waits for a commit, or for room, follows it.
    pub(crate) progress: watch::Sender<Progress>,
    pub(crate) say: Arc<dyn Fn(&str) + Send + Sync>,
    /// Caches that may have had changes when it was opened which the bucket has not.
    pub(crate) holds: Vec<Hold>,
    /// Keys of those of the cache above.
    own: Mutex<Vec<String>>,
    /// Whoever asks for something has been told of them.
    told: AtomicBool,
    /// Something was refused for want of that.
    refused: AtomicBool,
    /// Where requests to the store are made.
    handle: Handle,
}

/// How far an open volume is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    /// Batches up to this one are durable in the bucket.
    pub(crate) committed: u64,
    /// Counts whenever room may have become free.
    pub(crate) freed: u64,
    /// Of those who asked for everything to be brought into its blocks, up to whom it is.
    pub(crate) settled: u64,
    /// Nothing is served any more.
    pub(crate) dead: bool,
}

/// What is in memory of a volume.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) size: u64,
    pub(crate) map: Map,
    /// What was written and is in no block's object yet, committed or not: reads find it here first. Pieces of batch 0
    /// come from commits of earlier epochs.
    pub(crate) pieces: Pieces,
    /// Of each batch that is not committed, the oldest batch of what its pieces lie over, which is in memory no more: the
    /// commits of that one are needed until this one is durable.
    pub(crate) covered: BTreeMap<u64, u64>,
    /// What the next commit will hold.
    pub(crate) open: Batch,
    /// Blocks that are just being written anew, each with whether a commit has brought it as a whole meanwhile: what is
    /// being written is then older. The versions alone do not tell, since holes have none.
    pub(crate) settling: BTreeMap<u64, bool>,
    /// The last batch that is on its way. A batch is commit of the same number.
    pub(crate) sealed: u64,
    /// The epoch of the newest commit; where that is in no commit any more, of the newest checkpoint.
    pub(crate) committer: u64,
    /// The last batch that is durable, with all before it.
    pub(crate) committed: u64,
    /// The number of the next version.
    pub(crate) next: u64,
    pub(crate) serial: u64,
    /// Commits of earlier epochs whose pieces are still here.
    pub(crate) replays: Vec<Span>,
    /// Of this epoch, what a checkpoint has covered.
    pub(crate) done: u64,
    pub(crate) checkpoint: u64,
    /// What nothing leads to since the last checkpoint, with the last batch then under way. A block goes when that
    /// is covered by a checkpoint, for a commit may name it.
    pub(crate) doomed: Vec<(u64, u64, u64)>,
    /// What may go after the next checkpoint, or may and perhaps has gone.
    pub(crate) gone: Gone,
    pub(crate) dead: Option<(Kind, String)>,
    /// When something was written last.
    pub(crate) touched: Instant,
    /// It is being left: nothing may be written any more.
    pub(crate) closing: bool,
    /// How often everything in pieces was to be brought into its blocks, and how often it has been.
    pub(crate) asked: u64,
    pub(crate) answered: u64,
    /// What was committed when blocks were last settled.
    pub(crate) settled: Option<u64>,
    /// Bytes of the commits of this epoch that are in the bucket, by number.
    pub(crate) logged: BTreeMap<u64, u64>,
    /// Nothing is brought into its block but what must be.
    pub(crate) rests: bool,
}

/// How a volume is opened.
#[derive(Clone, Debug)]
pub(crate) struct Opening {
    /// Who opens it.
    pub(crate) claim: Claim,
    /// Bytes that may wait in memory for their blocks.
    pub(crate) memory: u64,
    /// How long they may where nothing is written any more.
    pub(crate) idle: Duration,
    /// Another host may have it open: it is taken from it.
    pub(crate) take: bool,
    /// How long requests are tried again while it is served.
    pub(crate) patience: Option<Duration>,
}

/// What is written between two commits.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) pieces: Pieces,
    /// Somebody waits for it, or it is full.
    pub(crate) due: bool,
}

impl State {
    /// # Errors
    /// The volume has another owner, or has been left.
    pub(crate) fn alive(&self) -> Result<()> {
        match &self.dead {
            Some((kind, why)) => Err(Error::new(*kind, why.clone())),
            None => Ok(()),
        }
    }

    pub(crate) fn version(&mut self, epoch: u64) -> Result<u64> {
        self.next += 1;
        version(epoch, self.next - 1)
    }

    /// The oldest batch whose commit is needed: what it wrote is in no block yet.
    pub(crate) fn oldest(&self) -> Option<u64> {
        self.pieces.oldest().into_iter().chain(self.covered.values().copied()).min()
    }

    /// Nothing leads to an object any more.
    pub(crate) fn doom(&mut self, block: u64, version: u64) {
        if version != 0 {
            self.doomed.push((block, version, self.sealed));
        }
    }
}

impl Volume {
    pub(crate) fn new(
        bucket: Bucket,
        description: Description,
        epoch: u64,
        opening: &Opening,
        state: State,
        holds: Vec<Hold>,
        say: Arc<dyn Fn(&str) + Send + Sync>,
    ) -> Result<Volume> {
        let progress = Progress { committed: state.committed, ..Progress::default() };
        Ok(Volume {
            id: description.id()?,
            block: description.block,
            bucket,
            epoch,
            memory: opening.memory.max(3 * BATCH),
            idle: opening.idle,
            description,
            state: Mutex::new(state),
            work: Notify::new(),
            progress: watch::channel(progress).0,
            say,
            holds,
            own: Mutex::default(),
            told: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            handle: Handle::current(),
        })
    }

    /// # Errors
    /// A cache may have changes that the bucket has not, and nobody who knows of them is above. The first time it is said, too.
    pub(crate) fn may_be_read(&self) -> Result<()> {
        let Some(hold) = self.holds.first().filter(|_| !self.told.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        let error = holds::refusal(hold);
        if !self.refused.swap(true, Ordering::Relaxed) {
            (self.say)(error.message());
        }
        Err(error)
    }

    fn own(&self) -> MutexGuard<'_, Vec<String>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What keeps a cache from being above; nothing if no cache may have more, `own` if it is that one.
    pub(crate) fn holders(&self, cache: u64) -> String {
        self.told.store(true, Ordering::Relaxed);
        if let Some(other) = self.holds.iter().find(|hold| hold.cache != cache) {
            return holds::refusal(other).message().to_owned();
        }
        *self.own() = self.holds.iter().map(|hold| hold.key.clone()).collect();
        if self.holds.is_empty() { "" } else { "own" }.to_owned()
    }

    /// The cache above may have changes from now on that the bucket has not.
    pub(crate) async fn hold(self: Arc<Self>, cache: u64, place: String) -> Result<()> {
        let key = {
            let mut state = self.state();
            state.alive()?;
            key::hold(cache, state.version(self.epoch)?)
        };
        self.own().push(key.clone());
        let (volume, handle) = (self.clone(), self.handle.clone());
        let done = handle.spawn(async move { holds::put(&volume.bucket, &key, place).await });
        done.await.map_err(|_| Error::internal("work with a bucket has panicked"))?
    }

    /// It has none any more. Whatever comes of that late, a hold that is put from here on is another one.
    pub(crate) async fn release(self: Arc<Self>) -> Result<()> {
        self.state().alive()?;
        let keys = std::mem::take(&mut *self.own());
        let (volume, handle) = (self.clone(), self.handle.clone());
        let done = handle.spawn(async move { volume.bucket.delete_many(keys).await });
        done.await.map_err(|_| Error::internal("work with a bucket has panicked"))?
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it: whatever waits and comes fails, for the first reason that there was.
    pub(crate) fn die(&self, kind: Kind, why: &str) {
        let first = {
            let mut state = self.state();
            let first = state.dead.is_none();
            state.dead.get_or_insert((kind, why.to_owned()));
            first
        };
        if first {
            (self.say)(why);
        }
        self.progress.send_modify(|progress| progress.dead = true);
        self.work.notify_one();
    }

    /// Ends it without a word: it has been left.
    pub(crate) fn leave(&self) {
        let left = "the volume has been left";
        self.state().dead.get_or_insert((Kind::Unavailable, left.to_owned()));
        self.progress.send_modify(|progress| progress.dead = true);
        self.work.notify_one();
    }

    /// The bytes of a block: the last one may be shorter.
    pub(crate) fn range_of(&self, block: u64, size: u64) -> Range<u64> {
        block * self.block..((block + 1) * self.block).min(size)
    }

    /// Does what a request asks for. What it waits for goes on if nobody waits any more.
    ///
    /// A write is answered when it is durable in the bucket; one of origin `write_back` as soon as later reads see it, and it
    /// is durable at the next flush.
    pub(crate) async fn serve(self: Arc<Self>, req: Request) -> Reply {
        self.state().alive()?;
        if req.op.has_range() && req.len == 0 {
            return Ok(if req.op == Op::Read { Answer::Data(Data::empty()) } else { Answer::Done });
        }
        match req.op {
            Op::Read => self.read(req.offset..req.end()).await.map(Answer::Data),
            Op::Write => {
                let fill = Fill::Data(req.data.stable());
                self.change(&req, fill).await
            }
            Op::Discard | Op::WriteZeroes => self.change(&req, Fill::Zeros).await,
            Op::Flush => self.flush().await.map(|()| Answer::Done),
            Op::Cache => Ok(Answer::Done),
            Op::Extents => Ok(Answer::Extents(self.extents(req.offset..req.end()))),
            Op::Control => Err(Error::internal("a control request came as an ordinary one")),
        }
    }

    async fn change(&self, req: &Request, fill: Fill) -> Reply {
        let waits = req.origin != Origin::WriteBack || req.is_fua();
        let batch = self.accept(req.offset..req.end(), fill, waits).await?;
        if waits {
            self.committed(batch).await?;
        }
        Ok(Answer::Done)
    }

    /// Puts a change into the open batch, whose number it returns, once there is room.
    async fn accept(&self, range: Range<u64>, fill: Fill, waits: bool) -> Result<u64> {
        let mut progress = self.progress.subscribe();
        loop {
            progress.mark_unchanged();
            let taken = self.try_accept(&range, &fill, waits);
            self.work.notify_one();
            match taken? {
                Some(batch) => return Ok(batch),
                None => {
                    let _ = progress.changed().await;
                }
            }
        }
    }

    fn try_accept(&self, range: &Range<u64>, fill: &Fill, waits: bool) -> Result<Option<u64>> {
        let mut state = self.state();
        state.alive()?;
        if state.closing {
            return Err(Error::new(Kind::Unavailable, "the volume is being left"));
        }
        let len = range.end - range.start;
        let bytes = if matches!(fill, Fill::Data(_)) { len } else { 0 };
        let batch = &mut state.open;
        if batch.pieces.bytes() + bytes > BATCH || batch.pieces.len() >= ENTRIES {
            batch.due = true;
            return Ok(None);
        }
        if state.pieces.bytes() + bytes > self.memory || state.pieces.len() > 4 * ENTRIES {
            return Ok(None);
        }
        let number = state.sealed + 1;
        if let Some(covered) = state.pieces.put(range.start, Piece::new(len, fill.clone(), number)) {
            let oldest = state.covered.entry(number).or_insert(covered);
            *oldest = covered.min(*oldest);
        }
        let batch = &mut state.open;
        batch.pieces.put(range.start, Piece::new(len, fill.clone(), number));
        batch.due |= waits;
        state.touched = rt::now();
        Ok(Some(number))
    }

    /// Waits until a batch is durable.
    pub(crate) async fn committed(&self, batch: u64) -> Result<()> {
        self.until(|progress| progress.committed >= batch).await
    }

    /// Waits for progress.
    pub(crate) async fn until(&self, far_enough: impl Fn(&Progress) -> bool) -> Result<()> {
        let mut progress = self.progress.subscribe();
        let found = progress.wait_for(|progress| progress.dead || far_enough(progress)).await;
        let dead = match found {
            Ok(found) => !far_enough(&found),
            Err(_) => true,
        };
        if dead { self.state().alive() } else { Ok(()) }
    }

    /// Everything that was answered, or taken, before is durable in the bucket afterwards.
    pub(crate) async fn flush(&self) -> Result<()> {
        let batch = {
            let mut state = self.state();
            state.alive()?;
            let open = !state.open.pieces.is_empty();
            state.open.due |= open;
            state.sealed + u64::from(open)
        };
        self.work.notify_one();
        self.committed(batch).await
    }

    /// Brings all that is committed into its blocks, and makes a checkpoint.
    pub(crate) async fn settle(&self) -> Result<()> {
        self.flush().await?;
        let asked = {
            let mut state = self.state();
            state.asked += 1;
            state.asked
        };
        self.work.notify_one();
        self.until(|progress| progress.settled >= asked).await
    }

    async fn read(self: &Arc<Self>, range: Range<u64>) -> Result<Data> {
        let parts = {
            let state = self.state();
            let mut parts = Vec::new();
            for (part, fill) in state.pieces.over(range) {
                match fill {
                    Some(fill) => parts.push((part, Some(fill))),
                    None => parts.extend(self.by_block(part).map(|part| (part, None))),
                }
            }
            parts
        };
        let parts = parts.into_iter().map(|(part, fill)| async move {
            match fill {
                Some(fill) => Ok(fill.data(part.end - part.start)),
                None => self.fetch(part).await,
            }
        });
        Ok(Data::concat(try_join_all(parts).await?))
    }

    /// A range, block by block.
    pub(crate) fn by_block(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let block = self.block;
        let blocks = range.start / block..range.end.div_ceil(block);
        blocks.map(move |number| (number * block).max(range.start)..((number + 1) * block).min(range.end))
    }

    async fn fetch(self: &Arc<Self>, range: Range<u64>) -> Result<Data> {
        let volume = self.clone();
        let fetched = self.handle.spawn(async move { volume.fetch_here(range).await }).await;
        fetched.unwrap_or_else(|_| Err(Error::internal("a request to the store has panicked")))
    }

    /// A range of one block, of which nothing was in memory when it was looked for. The object may go while it is read, for
    /// another one that holds at least as much.
    async fn fetch_here(&self, range: Range<u64>) -> Result<Data> {
        let block = range.start / self.block;
        let first = block * self.block;
        loop {
            let version = self.state().map.get(block);
            if version == 0 {
                return Ok(Data::zeros((range.end - range.start) as usize));
            }
            let key = key::block(block, version);
            if let Some(data) = self.bucket.get_range(&key, range.start - first..range.end - first).await? {
                return Ok(data);
            }
            if self.state().map.get(block) == version {
                return Err(self.missing(&key));
            }
        }
    }

    /// The map has an object that is not in the bucket: never zeros.
    pub(crate) fn missing(&self, key: &str) -> Error {
        let message = format!("{key} is missing in the bucket: what it held is lost, and reads of it fail");
        (self.say)(&message);
        Error::new(Kind::Io, message)
    }

    fn extents(&self, range: Range<u64>) -> Vec<Extent> {
        /// More than a reply has room for; the rest is asked for again.
        const MOST: usize = 4096;
        let state = self.state();
        let mut found = Vec::new();
        for (part, fill) in state.pieces.over(range) {
            let extent = |range: Range<u64>, state| Extent { len: range.end - range.start, state };
            match fill {
                Some(Fill::Zeros) => found.push(extent(part, ExtentState::HOLE)),
                Some(Fill::Data(_)) => found.push(extent(part, ExtentState::DATA)),
                None => found.extend(self.by_block(part).take(MOST).map(|part| {
                    let present = state.map.get(part.start / self.block) != 0;
                    extent(part, if present { ExtentState::DATA } else { ExtentState::HOLE })
                })),
            }
            if found.len() >= MOST {
                break;
            }
        }
        join_extents(found)
    }

    /// Bytes in the bucket, as far as they are known here: blocks, those that are still to be deleted among them, and
    /// commits. The map's own objects are small, and commits of an earlier epoch soon gone.
    pub(crate) fn stored(&self) -> u64 {
        let state = self.state();
        let doomed = state.doomed.len() + state.gone.blocks.len();
        (state.map.objects() + doomed as u64) * self.block + state.logged.values().sum::<u64>()
    }

    /// Whether what is in memory is brought into its blocks only where memory or commits get scarce.
    pub(crate) fn rest(&self, rests: bool) {
        self.state().rests = rests;
    }

    /// A text that says which commit is the newest, and who has the volume open. It is another one after each commit.
    pub(crate) fn generation(&self) -> String {
        let state = self.state();
        let serial = state.serial + u64::from(!state.open.pieces.is_empty());
        format!("{} {} {serial}", self.description.id, self.epoch)
    }

    /// What has been committed since [`Volume::generation`] said that: nothing (`same`), only what came through the one who had the volume open
    /// then (`own`), or anything else (`other`).
    pub(crate) fn since(&self, generation: &str) -> &'static str {
        let words: Vec<&str> = generation.split(' ').collect();
        let [id, epoch, serial] = words[..] else { return "other" };
        let (Ok(epoch), Ok(serial)) = (epoch.parse::<u64>(), serial.parse::<u64>()) else { return "other" };
        let state = self.state();
        match id == self.description.id && serial <= state.serial {
            true if serial == state.serial => "same",
            true if epoch == state.committer => "own",
            _ => "other",
        }
    }
}
