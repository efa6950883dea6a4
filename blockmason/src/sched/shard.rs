//! A shard: a named thread with a runtime and an io_uring of its own. What happens on it is touched
//! by no other thread.

use super::disk::Slot;
use super::home::Harbour;
use super::recorder::Recorder;
use crate::events::Events;
use crate::io::Ring;
use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Shard>>> = const { RefCell::new(None) };
}

/// What belongs to one thread of the data plane.
pub struct Shard {
    id: usize,
    next_id: Cell<u64>,
    pub(crate) rng: RefCell<fastrand::Rng>,
    pub(crate) slots: RefCell<HashMap<u64, Rc<Slot>>>,
    pub(crate) recorder: RefCell<Recorder>,
    locals: RefCell<HashMap<(TypeId, u64), Rc<dyn Any>>>,
    ring: Option<Ring>,
    pub(super) harbour: Harbour,
    events: Arc<Events>,
}

impl Shard {
    pub(crate) fn new(
        id: usize,
        seed: Option<u64>,
        ring: Option<Ring>,
        harbour: Harbour,
        events: Arc<Events>,
    ) -> Rc<Shard> {
        let rng = seed.map_or_else(fastrand::Rng::new, fastrand::Rng::with_seed);
        Rc::new(Shard {
            id,
            next_id: Cell::new(1),
            rng: RefCell::new(rng),
            slots: RefCell::default(),
            recorder: RefCell::default(),
            locals: RefCell::default(),
            ring,
            harbour,
            events,
        })
    }

    /// Makes this the shard of the current thread until the guard goes.
    pub(crate) fn enter(self: &Rc<Self>) -> Entered {
        CURRENT.set(Some(self.clone()));
        Entered(())
    }

    /// The current thread is no shard any more. What that drops may wake tasks: not to be left to the end of the
    /// thread, when there are none.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn leave() {
        drop(CURRENT.take());
    }

    /// The shard of the current thread, if it is one.
    pub fn current() -> Option<Rc<Shard>> {
        CURRENT.try_with(|shard| shard.borrow().clone()).ok().flatten()
    }

    /// Submits what this thread's flows have queued for the kernel. Happens by itself whenever the thread is about to
    /// wait: one system call for a turn's I/O. To be called by what keeps the thread from waiting.
    pub fn submit() {
        let _ = CURRENT.try_with(|shard| {
            if let Some(ring) = shard.borrow().as_ref().and_then(|shard| shard.ring.as_ref()) {
                ring.turn();
            }
        });
    }

    /// Its number, from 0.
    pub fn id(&self) -> usize {
        self.id
    }

    /// How many shards its host has.
    pub fn shards(&self) -> usize {
        self.harbour.shards()
    }

    /// What happens that an operator wants to know of, in this process.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// Its io_uring; None where the kernel refuses one.
    pub fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }

    /// A request id, unique in the process.
    #[inline]
    pub(crate) fn next_id(&self) -> u64 {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        (self.id as u64) << 48 | id
    }

    /// The shard's random numbers, seeded in tests.
    pub fn random<T>(&self, f: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        f(&mut self.rng.borrow_mut())
    }

    /// What `owner` keeps of type `T` on this shard, made when it is first asked for.
    pub fn local<T: 'static>(&self, owner: u64, make: impl FnOnce() -> T) -> Rc<T> {
        let key = (TypeId::of::<T>(), owner);
        let found = self.locals.borrow().get(&key).cloned();
        if let Some(Ok(found)) = found.map(Rc::downcast) {
            return found;
        }
        let made = Rc::new(make());
        self.locals.borrow_mut().insert(key, made.clone());
        made
    }

    /// Forgets what `owner` keeps of type `T` on this shard.
    pub fn forget<T: 'static>(&self, owner: u64) {
        self.locals.borrow_mut().remove(&(TypeId::of::<T>(), owner));
    }
}

/// The current thread is a shard while this lives.
pub(crate) struct Entered(());

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(None);
    }
}
