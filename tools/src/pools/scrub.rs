//! `mason pool scrub`: reads all that a pool has, piece by piece, and says what was damaged.

use super::pool::number;
use super::reach::Pool;
use crate::control::find::ControlArgs;
use crate::failure::{Failure, Outcome};
use crate::output::{self, printable};
use crate::progress::Line;
use crate::units::Bytes;
use blockmason::rt;
use blockmason_elements::parallax::tool::Operation;
use serde_json::{Value, json};
use std::path::Path;

/// Sentences that one JSON object has, at most.
const MOST: usize = 10_000;

/// Does it. Where it is interrupted it is begun anew: what was mended is.
#[expect(clippy::disallowed_methods, reason = "no shard is blocked: this thread only waits")]
pub(super) fn scrub(path: &Path, full_speed: bool, as_json: bool, control: &ControlArgs) -> Outcome {
    let pool = Pool::reach(path, control);
    let (mut at, mut bytes, mut more) = (None, 0, 0);
    let mut problems: Vec<Value> = Vec::new();
    let mut line = Line::new();
    loop {
        let begun = rt::now();
        let mut piece = pool.ask(&Operation::Scrub { at })?;
        bytes += number(&piece["bytes"]);
        more += number(&piece["more"]);
        for problem in piece["problems"].as_array().into_iter().flatten() {
            if !as_json {
                line.clear();
                output::text(&(printable(problem.as_str().unwrap_or("-")) + "\n"))?;
            }
            match problems.len() < MOST {
                true => problems.push(problem.clone()),
                false => more += 1,
            }
        }
        at = serde_json::from_value(piece["next"].take()).map_err(Failure::new)?;
        if at.is_none() {
            break;
        }
        let what = printable(piece["what"].as_str().unwrap_or_default());
        line.say(&format!("{} read: {what}", Bytes(bytes)));
        if !full_speed {
            // As long again is for others.
            std::thread::sleep(begun.elapsed());
        }
    }
    line.clear();
    let count = problems.len() as u64 + more;
    match as_json {
        true => output::json(&json!({ "problems": problems, "more": more, "bytes": bytes }))?,
        false => output::text(&format!("{} read\n", Bytes(bytes)))?,
    }
    super::pool::outcome(path, count)
}
