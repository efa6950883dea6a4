//! Which of many futures were woken: a bit for each, and one task to tell.

use super::sync::{AtomicU64, Mutex};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::task::{Wake, Waker};

/// The futures' bits, 64 to a word.
#[derive(Default)]
pub(super) struct Woken {
    words: Vec<Arc<Word>>,
    parent: Arc<Parent>,
}

/// The task's waker; taken by whoever wakes it.
type Parent = Mutex<Option<Waker>>;

struct Word {
    bits: AtomicU64,
    parent: Arc<Parent>,
}

struct SlotWaker {
    word: Arc<Word>,
    bit: u64,
}

impl Wake for SlotWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // The owner takes the bits after it has stored its waker, so no wake is lost.
        if self.word.bits.fetch_or(self.bit, Ordering::AcqRel) & self.bit == 0 {
            let parent = self.word.parent.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(waker) = parent {
                waker.wake();
            }
        }
    }
}

impl Woken {
    /// The waker of the future `ix`.
    pub(super) fn waker(&mut self, ix: usize) -> Waker {
        while self.words.len() <= ix / 64 {
            let parent = self.parent.clone();
            self.words.push(Arc::new(Word { bits: AtomicU64::new(0), parent }));
        }
        Arc::new(SlotWaker { word: self.words[ix / 64].clone(), bit: 1 << (ix % 64) }).into()
    }

    /// Whom to tell. To be called before the bits are taken.
    pub(super) fn tell(&self, waker: &Waker) {
        let mut parent = self.parent.lock().unwrap_or_else(PoisonError::into_inner);
        if !parent.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *parent = Some(waker.clone());
        }
    }

    /// How many words there are.
    pub(super) fn words(&self) -> usize {
        self.words.len()
    }

    /// Takes the bits of the futures `64 * word` and following.
    pub(super) fn take(&self, word: usize) -> u64 {
        self.words[word].bits.swap(0, Ordering::AcqRel)
    }
}
