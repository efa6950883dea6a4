//! What happens that an operator wants to know of. The last events are kept in a bounded ring, which any
//! number of readers follow at their own pace: whoever is too slow loses the oldest and is told how many.

use crate::rt;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::Notify;
use tokio::time::Instant;

/// Events that are kept.
pub const KEPT: usize = 1024;

/// Bytes of a message; of a field's value, its key included, and how many fields there are. The rest is cut.
const LONGEST_MESSAGE: usize = 1000;
const LONGEST_FIELD: usize = 200;
const MOST_FIELDS: usize = 16;

/// Of one kind and element, so many events in so much time; the rest is counted with the next one.
const BURST: u32 = 10;
const WINDOW: Duration = Duration::from_secs(10);

/// Elements whose events are counted at a time.
const MOST_COUNTED: usize = 256;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A graph serves.
    Loaded,
    /// A graph listens, and waits to be activated.
    StandsBy,
    /// A graph serves no longer.
    Unloaded,
    /// A graph was changed while it served.
    Reload,
    /// A change was refused or undone: the graph before serves on.
    ReloadFailed,
    /// Another process has handed a graph over to this one.
    HandedOver,
    /// The program could not be replaced: this process serves on.
    HandoverFailed,
    /// A request was answered with an error that is the operator's business.
    Error,
    /// An element has panicked: its graph answers nothing but errors until it is reloaded.
    Failed,
    /// An element has something to say.
    Notice,
    /// A quantity has passed a bound that was set for it.
    Threshold,
}

impl EventKind {
    /// The word of logs and of the control socket, `reload_failed`.
    pub fn name(self) -> &'static str {
        match self {
            EventKind::Loaded => "loaded",
            EventKind::StandsBy => "stands_by",
            EventKind::Unloaded => "unloaded",
            EventKind::Reload => "reload",
            EventKind::ReloadFailed => "reload_failed",
            EventKind::HandedOver => "handed_over",
            EventKind::HandoverFailed => "handover_failed",
            EventKind::Error => "error",
            EventKind::Failed => "failed",
            EventKind::Notice => "notice",
            EventKind::Threshold => "threshold",
        }
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Something that has happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Counts from 1 in this process, without gaps.
    pub number: u64,
    /// Seconds since 1970.
    pub time: f64,
    /// The graph.
    pub graph: String,
    /// The element, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub element: Option<String>,
    /// What happened.
    pub kind: EventKind,
    /// One sentence for people.
    pub message: String,
    /// Details for programs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fields: BTreeMap<String, String>,
}

impl Event {
    /// An event of a graph, to be published. Number and time are given then.
    pub fn new(kind: EventKind, graph: &str, message: impl fmt::Display) -> Event {
        let message = cut(message.to_string(), LONGEST_MESSAGE);
        let graph = graph.to_owned();
        Event { number: 0, time: 0.0, graph, element: None, kind, message, fields: BTreeMap::new() }
    }

    /// The same about an element.
    pub fn of(mut self, element: &str) -> Event {
        self.element = Some(element.to_owned());
        self
    }

    /// The same with a detail.
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Event {
        if self.fields.len() < MOST_FIELDS {
            self.fields.insert(cut(key.to_owned(), LONGEST_FIELD), cut(value.to_string(), LONGEST_FIELD));
        }
        self
    }
}

fn cut(mut text: String, longest: usize) -> String {
    if text.len() > longest {
        text.truncate(text.floor_char_boundary(longest));
        text.push_str("...");
    }
    text
}

/// The events of a process.
#[derive(Default)]
pub struct Events {
    ring: Mutex<Ring>,
    news: Notify,
}

#[derive(Default)]
struct Ring {
    /// How many have been published.
    count: u64,
    /// The last of them, in order.
    kept: VecDeque<Arc<Event>>,
    counted: HashMap<(EventKind, String, Option<String>), Counted>,
}

/// How many events of one kind and element there were lately.
struct Counted {
    since: Instant,
    count: u32,
    /// Of them not published.
    cut: u64,
}

impl Ring {
    /// How many like this one were cut off before it; None if it is cut off itself.
    fn admit(&mut self, event: &Event, now: Instant) -> Option<u64> {
        if self.counted.len() >= MOST_COUNTED {
            self.counted.retain(|_, counted| now.saturating_duration_since(counted.since) < WINDOW);
        }
        if self.counted.len() >= MOST_COUNTED {
            self.counted.clear();
        }
        let key = (event.kind, event.graph.clone(), event.element.clone());
        let counted = self.counted.entry(key).or_insert(Counted { since: now, count: 0, cut: 0 });
        if now.saturating_duration_since(counted.since) >= WINDOW {
            (counted.since, counted.count) = (now, 0);
        }
        if counted.count == BURST {
            counted.cut += 1;
            return None;
        }
        counted.count += 1;
        Some(std::mem::take(&mut counted.cut))
    }
}

impl Events {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        // Every change of it is complete before anything can panic.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes an event known. Never waits: readers hold the lock only to copy a few pointers. More than ten
    /// of one kind and element in ten seconds are counted, and the next one says how many there were.
    pub fn publish(&self, mut event: Event) {
        let time = rt::wall_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        event.time = time.as_secs_f64();
        let mut ring = self.ring();
        let Some(cut) = ring.admit(&event, rt::now()) else { return };
        if cut > 0 {
            event = event.with("more", cut);
        }
        ring.count += 1;
        event.number = ring.count;
        let oldest = if ring.kept.len() == KEPT { ring.kept.pop_front() } else { None };
        ring.kept.push_back(Arc::new(event));
        drop(ring);
        drop(oldest);
        self.news.notify_waiters();
    }

    /// Reads the last `last` events that are kept, and then what comes.
    pub fn follow(self: &Arc<Self>, last: usize) -> Follower {
        let ring = self.ring();
        let next = ring.count + 1 - ring.kept.len().min(last) as u64;
        Follower { events: self.clone(), next }
    }
}

/// A reader of events; a clone of it goes on from the same place by itself.
#[derive(Clone)]
pub struct Follower {
    events: Arc<Events>,
    /// The number of the next event that it has not seen.
    next: u64,
}

/// What a reader gets.
#[derive(Debug, Default)]
pub struct News {
    /// So many events before these were lost, since the reader was too slow.
    pub dropped: u64,
    /// In order.
    pub events: Vec<Arc<Event>>,
}

impl Follower {
    /// What has come since, at most `most` events.
    pub fn take(&mut self, most: usize) -> News {
        let ring = self.events.ring();
        let oldest = ring.count + 1 - ring.kept.len() as u64;
        let dropped = oldest.saturating_sub(self.next);
        let from = (self.next.max(oldest) - oldest) as usize;
        let events: Vec<_> = ring.kept.iter().skip(from).take(most).cloned().collect();
        self.next = self.next.max(oldest) + events.len() as u64;
        News { dropped, events }
    }

    /// Resolves when there is something to take.
    pub async fn wait(&self) {
        loop {
            let mut news = std::pin::pin!(self.events.news.notified());
            news.as_mut().enable();
            if self.events.ring().count >= self.next {
                return;
            }
            news.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(number: usize) -> Event {
        // Elements of their own, so that none is one too many.
        Event::new(EventKind::Notice, "vm", "something").of(&format!("E{number}"))
    }

    fn numbers(news: &News) -> Vec<u64> {
        news.events.iter().map(|event| event.number).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_loses_the_oldest_and_is_told() {
        let events = Arc::new(Events::default());
        let mut reader = events.follow(0);
        events.publish(notice(0));
        assert_eq!(numbers(&reader.take(10)), [1]);
        for number in 0..KEPT + 5 {
            events.publish(notice(number));
        }
        let news = reader.take(3);
        assert_eq!((news.dropped, numbers(&news)), (5, vec![7, 8, 9]));
        let news = reader.take(usize::MAX);
        assert_eq!((news.dropped, news.events.len()), (0, KEPT - 3));
        assert!(reader.take(10).events.is_empty());
        assert_eq!(events.ring().kept.len(), KEPT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_begins_with_the_last_ones() {
        let events = Arc::new(Events::default());
        (0..5).for_each(|number| events.publish(notice(number)));
        assert_eq!(numbers(&events.follow(2).take(10)), [4, 5]);
        assert_eq!(numbers(&events.follow(100).take(10)), [1, 2, 3, 4, 5]);
        let mut reader = events.follow(0);
        let waits = reader.wait();
        let publishes = async {
            rt::sleep(Duration::from_secs(1)).await;
            events.publish(notice(9));
        };
        tokio::join!(waits, publishes);
        assert_eq!(numbers(&reader.take(10)), [6]);
    }

    #[tokio::test(start_paused = true)]
    async fn too_many_of_one_kind_are_counted() {
        let events = Arc::new(Events::default());
        let error = || Event::new(EventKind::Error, "vm", "bad block").of("Disk");
        (0..25).for_each(|_| events.publish(error()));
        events.publish(error().of("Other"));
        assert_eq!(events.follow(100).take(100).events.len(), BURST as usize + 1);
        rt::sleep(WINDOW).await;
        events.publish(error());
        let news = events.follow(1).take(1);
        assert_eq!(news.events[0].fields["more"], "15");
        // Names that come and go do not fill the memory.
        (0..10 * MOST_COUNTED).for_each(|number| events.publish(notice(number)));
        assert!(events.ring().counted.len() <= MOST_COUNTED);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_long_is_cut() {
        let event = Event::new(EventKind::Notice, "vm", "ä".repeat(5000)).with("key", "x".repeat(5000));
        let event = (0..100).fold(event, |event, key| event.with(&key.to_string(), ""));
        assert!(event.message.len() < 1010 && event.fields.len() == MOST_FIELDS);
        assert!(event.fields["key"].len() < 210);
    }

    #[test]
    fn names_are_those_of_json() {
        for kind in [EventKind::Loaded, EventKind::ReloadFailed, EventKind::Threshold] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }

    #[test]
    fn many_publish_while_many_read() {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let events = Arc::new(Events::default());
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let events = events.clone();
                scope.spawn(move || {
                    runtime().block_on(async {
                        (0..500).for_each(|number| events.publish(notice(writer * 1000 + number)));
                    });
                });
            }
            for _ in 0..2 {
                let mut reader = events.follow(KEPT);
                scope.spawn(move || {
                    runtime().block_on(async {
                        // The writers may have been faster than we came.
                        let mut last = reader.next - 1;
                        while last < 2000 {
                            reader.wait().await;
                            let news = reader.take(7);
                            last += news.dropped;
                            for number in numbers(&news) {
                                assert_eq!(number, last + 1);
                                last = number;
                            }
                        }
                    });
                });
            }
        });
    }
}
