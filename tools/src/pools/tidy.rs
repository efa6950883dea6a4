//! `mason volume defrag` and `trim`: puts a volume in order, piece by piece.

use super::pool::number;
use super::reach::Pool;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::progress::lines;
use crate::units::Bytes;
use blockmason::rt;
use blockmason_elements::parallax::tool::Operation;
use serde_json::{Value, json};
use std::time::Duration;

/// Places that are named where something is damaged.
const MOST_NAMED: usize = 100;

/// What each part of the work says, which is added up.
const COUNTS: [&str; 8] =
    ["windows", "moved_windows", "moved", "pieces_before", "pieces_after", "shared", "busy", "no_room"];

/// Those of them that are bytes, and those of which nothing is said where they are nothing.
const BYTES: [&str; 3] = ["moved", "shared", "busy"];
const SELDOM: [&str; 3] = ["shared", "busy", "no_room"];

pub(super) fn defrag(pool: &Pool<'_>, name: &str, unshare: bool, as_json: bool) -> Outcome {
    let found = tidy(pool, name, |offset| Operation::Defrag { volume: name.to_owned(), offset, unshare })?;
    let lines = [
        ("windows looked at", "windows"),
        ("windows moved", "moved_windows"),
        ("moved", "moved"),
        ("pieces before", "pieces_before"),
        ("pieces after", "pieces_after"),
        ("left, as it is shared", "shared"),
        ("left, was written to", "busy"),
        ("windows without room", "no_room"),
    ];
    say(name, &found, &lines, as_json)
}

pub(super) fn trim(pool: &Pool<'_>, name: &str, as_json: bool) -> Outcome {
    let found = tidy(pool, name, |offset| Operation::Trim { volume: name.to_owned(), offset })?;
    let lines = [
        ("windows looked at", "windows"),
        ("freed", "moved"),
        ("left, as it is shared", "shared"),
        ("left, was written to", "busy"),
    ];
    say(name, &found, &lines, as_json)
}

/// Does it from the volume's start to its end. What was done in all.
fn tidy(pool: &Pool<'_>, name: &str, operation: impl Fn(u64) -> Operation) -> Outcome<Value> {
    let size = number(&pool.volume(name)?["size"]);
    let (said, mut counts, mut damaged) = (lines("bytes are looked at"), [0; COUNTS.len()], Vec::new());
    let mut next = Some(0);
    while let Some(offset) = next {
        let begun = rt::now();
        let done = pool.ask(&operation(offset))?;
        for (sum, key) in counts.iter_mut().zip(COUNTS) {
            *sum += number(&done[key]);
        }
        damaged.extend(done["damaged"].as_array().into_iter().flatten().cloned());
        // A daemon that is not as it should be does not keep us for ever.
        next = done["next"].as_u64().filter(|next| *next > offset);
        if let Some(next) = next {
            said(next.min(size), size);
            if pool.is_served() {
                // As long again is for others.
                pause(begun.elapsed());
            }
        }
    }
    let mut found: Value =
        COUNTS.into_iter().zip(counts).map(|(key, sum)| (key.to_owned(), json!(sum))).collect();
    found["damaged_blocks"] = json!(damaged.len());
    damaged.truncate(MOST_NAMED);
    found["damaged"] = json!(damaged);
    Ok(found)
}

#[expect(clippy::disallowed_methods, reason = "no shard is blocked: this thread only waits")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

fn say(name: &str, found: &Value, lines: &[(&str, &str)], as_json: bool) -> Outcome {
    let line = |(what, key): &(&str, &str)| {
        let is = match number(&found[*key]) {
            0 if SELDOM.contains(key) => return String::new(),
            bytes if BYTES.contains(key) => Bytes(bytes).to_string(),
            count => count.to_string(),
        };
        format!("{what:<22}{is:>10}\n")
    };
    if as_json {
        output::json(found)?;
    } else {
        output::text(&lines.iter().map(line).collect::<String>())?;
    }
    let places: Vec<String> =
        found["damaged"].as_array().into_iter().flatten().map(ToString::to_string).collect();
    match number(&found["damaged_blocks"]) {
        0 => Ok(()),
        count => Err(Failure::new(format!(
            "{name}: {count} blocks of 4096 bytes are damaged, and were left where they are; write there what a snapshot or a backup \
             has; at {}{}",
            places.join(", "),
            if count > MOST_NAMED as u64 { ", and others" } else { "" }
        ))),
    }
}
