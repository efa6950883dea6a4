//! Requests as Chrome's trace events, which Perfetto reads.
//!
//! Each shard is a process with as many tracks as requests overlap. On a track the events of one request
//! stand within each other; a hop that overlaps one beside it goes to a track of its own.

use super::tree::Tree;
use crate::hops::HopView;
use serde_json::{Value, json};
use std::collections::HashMap;

/// The tracks that there are, by shard.
#[derive(Default)]
pub(super) struct Tracks {
    shards: HashMap<usize, Vec<Track>>,
}

#[derive(Clone, Copy, Default)]
struct Track {
    /// When the last event on it ends.
    end_ns: u64,
}

/// Where a hop stands, and until when hops below it take up that track.
struct Placed {
    shard: usize,
    track: usize,
    below_end_ns: u64,
}

impl Tracks {
    /// The events of a tree; first those that name what is new.
    pub(super) fn events(&mut self, tree: &Tree) -> Vec<Value> {
        let mut events = Vec::new();
        let mut placed: Vec<Placed> = Vec::with_capacity(tree.nodes.len());
        for node in &tree.nodes {
            let hop = &node.hop;
            let above = node.parent.and_then(|parent| {
                let fits = hop.start_ns >= tree.nodes[parent].hop.start_ns
                    && hop.end_ns() <= tree.nodes[parent].hop.end_ns();
                Some(&mut placed[parent])
                    .filter(|above| fits && above.shard == hop.shard && above.below_end_ns <= hop.start_ns)
            });
            let track = match above {
                Some(above) => {
                    above.below_end_ns = hop.end_ns();
                    above.track
                }
                None => self.free(hop, &mut events),
            };
            placed.push(Placed { shard: hop.shard, track, below_end_ns: hop.start_ns });
            events.push(event(hop, track, node.self_ns));
        }
        events
    }

    /// A track on which nothing goes on when the hop begins.
    fn free(&mut self, hop: &HopView, events: &mut Vec<Value>) -> usize {
        let shard = self.shards.entry(hop.shard).or_insert_with(|| {
            let args = json!({ "name": format!("shard {}", hop.shard) });
            events.push(
                json!({ "name": "process_name", "ph": "M", "pid": hop.shard + 1, "tid": 0, "args": args }),
            );
            Vec::new()
        });
        let track = shard.iter().position(|track| track.end_ns <= hop.start_ns).unwrap_or_else(|| {
            shard.push(Track::default());
            shard.len() - 1
        });
        shard[track].end_ns = hop.end_ns();
        track
    }
}

/// Times are in microseconds. Process and thread 0 are not drawn by everybody.
fn event(hop: &HopView, track: usize, self_ns: u64) -> Value {
    let us = |ns: u64| ns as f64 / 1000.0;
    json!({
        "name": format!("{} {}", hop.to, hop.operation),
        "cat": hop.operation,
        "ph": "X",
        "pid": hop.shard + 1,
        "tid": track + 1,
        "ts": us(hop.start_ns),
        "dur": us(hop.took_ns),
        "args": {
            "request": hop.request,
            "root": hop.root,
            "from": hop.from,
            "port": hop.port,
            "offset": hop.offset,
            "length": hop.length,
            "flags": hop.flags,
            "origin": hop.origin,
            "self_us": us(self_ns),
            "error": hop.error,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::super::tree::{all, tests::hop};
    use super::*;

    /// Checks what a viewer relies on: on a track, events lie within each other or apart.
    fn check(events: &[Value]) {
        let mut tracks: HashMap<(u64, u64), Vec<(u64, u64)>> = HashMap::new();
        for event in events.iter().filter(|event| event["ph"] == "X") {
            // As viewers do, in whole nanoseconds.
            let ns = |us: f64| (us * 1000.0).round() as u64;
            let number = |key: &str| event[key].as_f64().map(ns).unwrap_or_else(|| panic!("{key}: {event}"));
            assert!(event["name"].is_string() && event["cat"].is_string() && event["args"].is_object());
            let track = (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
            tracks.entry(track).or_default().push((number("ts"), number("ts") + number("dur")));
        }
        for (track, spans) in tracks {
            for (a, b) in spans.iter().flat_map(|a| spans.iter().map(move |b| (a, b))) {
                let apart = a.1 <= b.0 || b.1 <= a.0;
                let within = (a.0 <= b.0 && b.1 <= a.1) || (b.0 <= a.0 && a.1 <= b.1);
                assert!(apart || within, "{track:?}: {a:?} and {b:?} overlap");
            }
        }
    }

    #[test]
    fn legs_side_by_side_and_requests_at_once_do_not_overlap() {
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..200 {
            let mut tracks = Tracks::default();
            let mut events = Vec::new();
            let mut trees = Vec::new();
            for root in 0..20u64 {
                let mut hops = vec![hop(&format!("{root}00"), None, "Guest", root * 100, root * 100 + 1000)];
                hops[0].shard = rng.usize(0..2);
                for n in 1..rng.u64(2..12) {
                    let above = hops[rng.usize(0..hops.len())].clone();
                    let start = rng.u64(above.start_ns..=above.end_ns());
                    // Some outlive the hop above them.
                    let end = rng.u64(start..=above.end_ns() + 50);
                    let parent = above.hop.strip_prefix("0-").unwrap();
                    let below = hop(&format!("{root}{n:02}"), Some(parent), "Leg", start, end);
                    hops.push(HopView { shard: above.shard, ..below });
                }
                trees.extend(all(hops));
            }
            // They come in the order of their ends.
            trees.sort_by_key(|tree| tree.nodes[0].hop.end_ns());
            trees.iter().for_each(|tree| events.extend(tracks.events(tree)));
            check(&events);
            let names = events.iter().filter(|event| event["ph"] == "M").count();
            assert!((1..=2).contains(&names), "a name for each shard, once");
        }
    }

    #[test]
    fn a_request_alone_needs_one_track() {
        let tree = &all(vec![
            hop("2", None, "Guest", 0, 100),
            hop("3", Some("2"), "A", 10, 40),
            hop("4", Some("2"), "B", 40, 90),
        ])[0];
        let mut tracks = Tracks::default();
        let events = tracks.events(tree);
        assert_eq!(events.len(), 4);
        assert!(events[1..].iter().all(|event| event["tid"] == 1));
        assert_eq!(
            (&events[2]["name"], &events[2]["ts"], &events[2]["dur"]),
            (&json!("A write"), &json!(0.01), &json!(0.03))
        );
    }
}
