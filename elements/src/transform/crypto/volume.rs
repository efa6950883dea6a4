//! An open volume: its header and sessions, and how they get to the disk.

use super::cipher::Session;
use super::format::{
    COPIES, Cipher, DATA, ENTRY, Entry, Fault, HEADER, Header, Id, RESERVED, SESSIONS, SLOTS, TABLE,
};
use super::keys::{Credential, Master, Secret, Source, random};
use crate::transform::own::Io;
use crate::transform::slots::{Layout, aside};
use blockmason::sched::RangeLock;
use blockmason::{Cx, Data, Error, Kind, Result};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What an element says of the volume that it expects.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) source: Source,
    pub(super) cipher: Cipher,
    /// Formats an empty disk.
    pub(super) create: bool,
    /// A copy of the header to open with if there is none on the disk.
    pub(super) backup: Option<PathBuf>,
}

pub(super) struct Volume {
    pub(super) layout: Layout,
    /// Blocks that are being read, by several, or changed, by one: a slot must not be read while it is written.
    pub(super) ranges: RangeLock,
    /// Held by whoever changes the header or begins a session.
    pub(super) changing: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

pub(super) struct State {
    pub(super) header: Header,
    /// The copy that counts.
    counts: usize,
    /// The other copy is not the same.
    differ: bool,
    master: Master,
    keys: HashMap<u32, Secret>,
    table: Vec<Entry>,
    sessions: HashMap<u32, Arc<Session>>,
    current: Option<Arc<Session>>,
}

fn denied(message: impl Into<String>) -> Error {
    Error::new(Kind::Denied, message.into())
}

/// A header as it was found.
struct Found {
    header: Header,
    bytes: Vec<u8>,
    /// The copy, and whether the other one is the same.
    copy: usize,
    differ: bool,
}

impl Found {
    /// The copy that counts, of those on the disk; None if neither can be read.
    ///
    /// # Errors
    /// One of them says something that this program cannot do: the other one is older.
    fn choose(copies: &[Vec<u8>; 2]) -> Result<Option<Found>> {
        let mut best: Option<Found> = None;
        for (copy, bytes) in copies.iter().enumerate() {
            match Header::decode(bytes) {
                Ok(header) if best.as_ref().is_none_or(|best| best.header.sequence < header.sequence) => {
                    best = Some(Found { header, bytes: bytes.clone(), copy, differ: copies[0] != copies[1] });
                }
                Ok(_) | Err(Fault::Empty | Fault::Unreadable) => {}
                Err(Fault::Refused(why)) => return Err(denied(why)),
            }
        }
        Ok(best)
    }

    fn backup(path: &PathBuf) -> Result<Found> {
        let bytes = std::fs::read(path).map_err(|error| Error::io(error, "the header cannot be read"));
        let bytes = bytes.map_err(|error| error.with_path(path))?;
        match Header::decode(&bytes) {
            Ok(header) => Ok(Found { header, bytes, copy: 0, differ: true }),
            Err(Fault::Refused(why)) => Err(denied(why).with_path(path)),
            Err(Fault::Empty | Fault::Unreadable) => Err(denied("this is no header").with_path(path)),
        }
    }

    /// True if this header can be of such a disk.
    fn suits(&self, wanted: &Wanted, layout: Layout) -> Result<()> {
        let Header { cipher, layout: was, .. } = self.header;
        if cipher != wanted.cipher {
            return Err(denied(format!("the volume has the cipher {cipher}; set (cipher {cipher})")));
        }
        if was.block != layout.block {
            let block = was.block;
            return Err(denied(format!("the volume has blocks of {block} bytes; set (block {block})")));
        }
        if layout.size < was.size {
            let (was, now) = (was.size, layout.size);
            return Err(denied(format!(
                "the volume had {was} bytes, and on the disk below is room for {now}"
            )));
        }
        Ok(())
    }
}

/// Both copies of the header.
async fn copies(io: &Io<'_>) -> Result<[Vec<u8>; 2]> {
    let [first, second] = COPIES.map(|at| io.read(at, HEADER as u64));
    Ok([first.await?.to_vec(), second.await?.to_vec()])
}

async fn table(io: &Io<'_>) -> Result<Data> {
    io.read(TABLE, DATA - TABLE).await
}

/// Writes a header to both copies: first over the one that does not count.
async fn store(io: &Io<'_>, bytes: &[u8], counts: usize) -> Result<()> {
    let data = Data::copy_of(bytes);
    for copy in [1 - counts, counts] {
        io.write(COPIES[copy], data.clone()).await?;
        io.flush().await?;
    }
    Ok(())
}

impl Volume {
    /// Opens what is on the disk below, or makes something of an empty one.
    pub(super) async fn open(io: &Io<'_>, wanted: &Arc<Wanted>, layout: Layout) -> Result<Volume> {
        let copies = copies(io).await?;
        let found = match (Found::choose(&copies)?, &wanted.backup) {
            (Some(found), _) => found,
            (None, Some(backup)) => Found::backup(backup)?,
            (None, None) if copies.iter().flatten().all(|byte| *byte == 0) => {
                return Volume::create(io, wanted, layout).await;
            }
            (None, None) => return Err(denied("the disk below is not encrypted, or the header is lost")),
        };
        if found.header.erased {
            if found.differ {
                store(io, &found.bytes, found.copy).await?;
            }
            return Err(denied("the volume was erased: nothing opens it any more"));
        }
        found.suits(wanted, layout)?;
        let (source, header) = (wanted.clone(), found.header.clone());
        let opened = aside(move || source.source.read()?.open(&header.id, &header.slots)).await??;
        let master = Master::new(&found.header.id, opened)?;
        if !Header::is_authentic(&found.bytes, &master.mac) {
            return Err(denied("the header was changed by someone who does not have a key"));
        }
        let mut keys = HashMap::new();
        for key in &found.header.keys {
            keys.insert(key.id, master.data_key(&found.header.id, key)?);
        }
        let table = Entry::decode_all(&found.header.id, &table(io).await?.to_vec());
        let Found { header, copy, differ, .. } = found;
        Ok(Volume::of(layout, State::new(header, copy, differ, master, keys, table)))
    }

    /// Formats an empty disk.
    async fn create(io: &Io<'_>, wanted: &Arc<Wanted>, layout: Layout) -> Result<Volume> {
        if !table(io).await?.is_zero() {
            return Err(denied(
                "the header is lost: both copies are zeros, and there are sessions behind them",
            ));
        }
        if !wanted.create {
            return Err(denied("the disk below is empty; (create yes) makes an encrypted disk of it"));
        }
        let id = random()?;
        let master = Master::new(&id, Secret::draw()?)?;
        let (key, wrapped) = master.draw(&id, 1)?;
        let source = wanted.clone();
        let (slot, master) = aside(move || {
            let slot = source.source.read().and_then(|credential| credential.slot(&id, 0, &master.key));
            (slot, master)
        })
        .await?;
        let mut slots = [const { None }; SLOTS];
        slots[0] = Some(slot?);
        let cipher = wanted.cipher;
        let header =
            Header { id, sequence: 1, cipher, layout, erased: false, rotated: 0, slots, keys: vec![wrapped] };
        store(io, &header.encode(Some(&master.mac)), 0).await?;
        io.cx.notice(format!("the disk below is encrypted from now on; its volume id is {}", hex(&id)));
        let keys = HashMap::from([(1, key)]);
        let table = vec![Entry::Free; SESSIONS as usize];
        Ok(Volume::of(layout, State::new(header, 0, false, master, keys, table)))
    }

    fn of(layout: Layout, state: State) -> Volume {
        let state = Mutex::new(state);
        Volume { layout, ranges: RangeLock::default(), changing: tokio::sync::Mutex::default(), state }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the disk below has this very volume, sessions included: another graph's way to it. A copy that is
    /// as old as this instant passes too, and may: its sessions go on here.
    pub(super) async fn is_at(&self, io: &Io<'_>, layout: Layout) -> Result<bool> {
        let _alone = self.changing.lock().await;
        let Ok(Some(found)) = Found::choose(&copies(io).await?) else { return Ok(false) };
        let table = Entry::decode_all(&found.header.id, &table(io).await?.to_vec());
        let state = self.state();
        Ok(self.layout == layout && found.header == state.header && table == state.table)
    }

    /// Changes the header, on the disk and then here. The caller holds `changing`.
    ///
    /// # Errors
    /// After an error while it is written the change may be on the disk all the same.
    pub(super) async fn change(&self, io: &Io<'_>, edit: impl FnOnce(&mut Header)) -> Result<()> {
        let (next, bytes, counts) = {
            let mut state = self.state();
            let mut next = state.header.clone();
            edit(&mut next);
            next.sequence += 1;
            let bytes = next.encode((!next.erased).then_some(&state.master.mac));
            // Until both are written nobody knows.
            state.differ = true;
            (next, bytes, state.counts)
        };
        store(io, &bytes, counts).await?;
        let mut state = self.state();
        (state.header, state.differ) = (next, false);
        Ok(())
    }

    /// A session to write with, and nonces for so many blocks. The caller holds their range, so that a rotation
    /// that has passed it cannot be followed by a write with an old key.
    pub(super) async fn nonces(&self, cx: Cx<'_>, blocks: u64) -> Result<(Arc<Session>, u64)> {
        loop {
            let current = self.state().current.clone();
            if let Some(session) = current
                && let Some(first) = session.take(blocks)
            {
                return Ok((session, first));
            }
            let _alone = self.changing.lock().await;
            if self.state().needs_session() {
                self.begin(&Io::new(cx)).await?;
            }
        }
    }

    /// Begins a session. The caller holds `changing`.
    async fn begin(&self, io: &Io<'_>) -> Result<()> {
        if self.state().header.erased {
            return Err(denied("the volume was erased"));
        }
        if self.state().differ {
            self.change(io, |_| ()).await?;
            io.cx.notice("the two copies of the header differed; they are the same again");
        }
        let salt = random()?;
        let (session, used, entry) = {
            let state = self.state();
            let (number, used) = state.place()?;
            let key = state.header.newest();
            (state.session(number, key, &salt)?, used, Entry::encode(&state.header.id, number, key, &salt))
        };
        io.write(Entry::place(session.number), Data::copy_of(&entry)).await?;
        io.flush().await?;
        if used * 10 >= SESSIONS * 9 {
            io.cx.notice(format!("{used} of {SESSIONS} sessions are used; `rotate` makes them free again"));
        }
        let (session, mut state) = (Arc::new(session), self.state());
        state.table[session.number as usize - 1] = Entry::Used { key: session.key, salt };
        state.sessions.insert(session.number, session.clone());
        state.current = Some(session);
        Ok(())
    }

    /// The session that a block was written in.
    pub(super) fn session(&self, number: u32) -> Result<Option<Arc<Session>>> {
        let mut state = self.state();
        if let Some(session) = state.sessions.get(&number) {
            return Ok(Some(session.clone()));
        }
        let entry = number.checked_sub(1).and_then(|ix| state.table.get(ix as usize));
        let Some(&Entry::Used { key, salt }) = entry else { return Ok(None) };
        if !state.keys.contains_key(&key) {
            return Ok(None);
        }
        let session = Arc::new(state.session(number, key, &salt)?);
        state.sessions.insert(number, session.clone());
        Ok(Some(session))
    }

    /// The header as it is on the disk.
    pub(super) fn header_bytes(&self) -> Vec<u8> {
        let state = self.state();
        state.header.encode((!state.header.erased).then_some(&state.master.mac))
    }

    /// A key slot, in the first free place.
    pub(super) async fn add_slot(&self, io: &Io<'_>, credential: Credential) -> Result<()> {
        let _alone = self.changing.lock().await;
        let (id, number, master) = {
            let state = self.state();
            let number = state.header.slots.iter().position(Option::is_none);
            let full = || denied(format!("all {SLOTS} key slots are used; remove one first"));
            (state.header.id, number.ok_or_else(full)?, state.master.key.duplicate())
        };
        let slot = aside(move || credential.slot(&id, number, &master)).await??;
        self.change(io, |header| header.slots[number] = Some(slot)).await?;
        io.cx.notice(format!("key slot {number} was added"));
        Ok(())
    }

    /// Forgets a key slot, unless it is the last one.
    pub(super) async fn remove_slot(&self, io: &Io<'_>, number: usize) -> Result<()> {
        let _alone = self.changing.lock().await;
        self.state().may_remove(number)?;
        self.change(io, |header| header.slots[number] = None).await?;
        io.cx.notice(format!("key slot {number} was removed"));
        Ok(())
    }

    /// Forgets all keys, on the disk and here.
    pub(super) async fn erase(&self, io: &Io<'_>) -> Result<()> {
        let _alone = self.changing.lock().await;
        let erase = |header: &mut Header| {
            header.erased = true;
            header.slots = [const { None }; SLOTS];
            header.keys.clear();
        };
        self.change(io, erase).await?;
        let mut state = self.state();
        // What is left in memory opens nothing either.
        state.master = Master::new(&state.header.id, Secret::draw()?)?;
        (state.current, state.sessions, state.keys) = (None, HashMap::new(), HashMap::new());
        drop(state);
        io.cx.notice("the volume was erased: nothing opens it any more");
        Ok(())
    }

    /// A new data key, to be written with from now on. The caller holds `changing`.
    pub(super) async fn add_key(&self, io: &Io<'_>) -> Result<()> {
        let (key, wrapped) = {
            let state = self.state();
            state.master.draw(&state.header.id, state.header.newest() + 1)?
        };
        let id = wrapped.id;
        let edit = |header: &mut Header| {
            header.keys.push(wrapped);
            header.rotated = 0;
        };
        // Known before it is on the disk, so that nobody ever finds a key in the header that is not here.
        self.state().keys.insert(id, key);
        self.change(io, edit).await?;
        self.state().current = None;
        Ok(())
    }

    /// Forgets the older data key, with which no block is written any more. The caller holds `changing`.
    pub(super) async fn drop_key(&self, io: &Io<'_>) -> Result<()> {
        let oldest = self.state().header.oldest();
        self.change(io, |header| header.keys.retain(|key| key.id != oldest)).await?;
        let mut state = self.state();
        let newest = state.header.newest();
        state.keys.retain(|id, _| *id == newest);
        state.sessions.retain(|_, session| session.key == newest);
        Ok(())
    }
}

impl State {
    fn new(
        header: Header,
        counts: usize,
        differ: bool,
        master: Master,
        keys: HashMap<u32, Secret>,
        table: Vec<Entry>,
    ) -> State {
        State { header, counts, differ, master, keys, table, sessions: HashMap::new(), current: None }
    }

    fn needs_session(&self) -> bool {
        self.current.as_ref().is_none_or(|session| session.is_over())
    }

    fn session(&self, number: u32, key: u32, salt: &[u8; 32]) -> Result<Session> {
        let data_key =
            self.keys.get(&key).ok_or_else(|| Error::internal(format!("there is no data key {key}")))?;
        Session::new(self.header.cipher, &self.header.id, number, (key, data_key), salt)
    }

    /// True if no block can be of that session.
    fn is_free(&self, entry: &Entry) -> bool {
        match entry {
            Entry::Free => true,
            Entry::Damaged => false,
            Entry::Used { key, .. } => *key < self.header.oldest(),
        }
    }

    /// How many sessions are used.
    pub(super) fn used(&self) -> u32 {
        self.table.iter().filter(|entry| !self.is_free(entry)).count() as u32
    }

    /// The number of a new session, and how many are used then.
    fn place(&self) -> Result<(u32, u32)> {
        let used = self.used();
        let most = if self.header.keys.len() > 1 { SESSIONS } else { SESSIONS - RESERVED };
        let free = self.table.iter().position(|entry| self.is_free(entry));
        match free {
            Some(ix) if used < most => Ok((ix as u32 + 1, used + 1)),
            _ => {
                let message = format!(
                    "no session is left to write in, {used} of {SESSIONS} are used: call `rotate`, which makes them free"
                );
                Err(Error::new(Kind::NoSpace, message))
            }
        }
    }

    /// Whether a key slot may go.
    pub(super) fn may_remove(&self, number: usize) -> Result<()> {
        match self.header.slots.get(number) {
            Some(Some(_)) if self.header.slots.iter().flatten().count() == 1 => {
                Err(denied("this is the last key slot: without it nothing opens the volume; `erase` says so"))
            }
            Some(Some(_)) => Ok(()),
            _ => Err(Error::invalid(format!("there is no key slot {number}; `slots` says which there are"))),
        }
    }
}

/// A volume id as people read it.
pub(super) fn hex(id: &Id) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

const _: () = assert!(ENTRY * SESSIONS as usize == (DATA - TABLE) as usize);
