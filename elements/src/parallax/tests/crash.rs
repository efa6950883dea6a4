//! Crashes at any moment.

use super::kit::Story;
use blockmason::testing::{run, set_wall_clock};
use std::time::Duration;

pub(super) fn seeds() -> std::ops::Range<u64> {
    let count = std::env::var("PARALLAX_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(8);
    let first = std::env::var("PARALLAX_FIRST").ok().and_then(|first| first.parse().ok()).unwrap_or(0);
    first..first + count
}

/// Lives for some requests, dies, and lives again.
fn play(seed: u64, more: &str, kinds: [bool; 2]) {
    play_over(seed, more, kinds, &[]);
}

/// The same over these elements.
fn play_over(seed: u64, more: &str, kinds: [bool; 2], way: &[&'static str]) {
    run(seed, async |host| {
        let mut story = Story::begin(&host, seed, more, way).await;
        for round in 0..6 {
            for _ in 0..story.rng.usize(1..60) {
                story.send();
                if story.rng.bool() {
                    let time = story.rng.u64(0..4);
                    blockmason::rt::sleep(Duration::from_millis(time)).await;
                }
                story.look();
            }
            if story.rng.u8(0..3) == 0 {
                story.settle().await;
                story.look_inside().await;
            }
            story.crash(kinds[round % 2]).await;
        }
    });
}

#[test]
fn the_process_dies() {
    seeds().for_each(|seed| play(seed, "", [false, false]));
}

#[test]
fn the_power_is_lost() {
    seeds().for_each(|seed| play(seed + 100_000, "", [true, true]));
}

#[test]
fn what_is_left_of_an_ordered_volume_it_was_at_one_instant() {
    seeds().for_each(|seed| play(seed + 400_000, "(order prefix)", [true, true]));
}

/// Hardly a node is in memory when it is needed, and is read while checkpoints give blocks away.
#[test]
fn with_next_to_no_memory() {
    seeds().for_each(|seed| play(seed + 300_001, "(memory 12k)", [false, true]));
}

#[test]
fn a_volume_of_format_2_in_turn() {
    seeds().for_each(|seed| play(seed + 500_000, "(format 2)", [false, true]));
}

/// The trees, the way to the block store, and the store are elements of their own.
#[test]
fn over_a_block_store_in_turn() {
    let ways = [
        ["I (type isolation)", "S (type block_store)"],
        ["I (type isolation) (key v2)", "S (type block_store)"],
    ];
    for seed in seeds() {
        let (format, way) = if seed % 3 == 2 { ("(format 2)", 1) } else { ("", seed as usize % 2) };
        play_over(seed + 600_000, format, [false, true], &ways[way]);
    }
}

#[cfg(feature = "compress")]
#[test]
fn what_is_compressed_in_turn() {
    let more =
        ["(format 2)", "(checksums yes)", "(order prefix)", "(memory 12k)", "(format 2) (checksums yes)"];
    for seed in seeds() {
        let (how, more) = (["lz4", "zstd"][seed as usize % 2], more[seed as usize / 2 % more.len()]);
        play(seed + 700_000, &format!("(compress {how}) {more}"), [false, true]);
    }
}

#[cfg(feature = "compress")]
#[test]
fn what_is_compressed_over_a_block_store() {
    let way = ["I (type isolation)", "S (type block_store)"];
    seeds().step_by(2).for_each(|seed| play_over(seed + 800_000, "(compress lz4)", [false, true], &way));
}

#[test]
fn both_in_turn_with_checksums() {
    seeds().for_each(|seed| play(seed + 200_000, "(checksums yes)", [false, true]));
}

/// A scrub reads everything while guests write and what it reads goes to other places: it finds nothing, and spoils nothing.
#[test]
fn while_the_pool_is_scrubbed() {
    let mut scrubs = 0;
    for seed in seeds() {
        let more = ["", "(checksums yes)", "(format 2)", "(memory 12k)"][seed as usize % 4];
        scrubs += run(seed, async |host| {
            set_wall_clock(FULL_MINUTE - 1);
            let mut story =
                Story::begin(&host, seed + 700_000, &format!("(scrub_every 1m) {more}"), &[]).await;
            for round in 0..3 {
                for _ in 0..80 {
                    story.send();
                    blockmason::rt::sleep(Duration::from_millis(story.rng.u64(0..60))).await;
                    story.look();
                }
                set_wall_clock(FULL_MINUTE - 1);
                story.crash(round % 2 == 1).await;
            }
            let events = host.events().follow(1000).take(1000).events;
            let said =
                events.into_iter().map(|event| event.message.clone()).filter(|said| said.contains("scrub"));
            said.inspect(|said| assert!(said.ends_with("all is well"), "seed {seed}: {said}")).count()
        });
    }
    assert!(scrubs > 8, "{scrubs}");
}

const FULL_MINUTE: u64 = 1_795_996_800;
