//! `mason pool repair`: what no second copy mends.

use super::pool::{number, outcome, word};
use crate::failure::{Failure, Outcome};
use crate::output;
use blockmason_elements::parallax::tool::{self, Repairing};
use serde_json::Value;
use std::path::Path;

/// What becomes of what cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Lost {
    /// It reads as an error, as before
    Keep,
    /// It reads as zeros, and the room that only it led to is free
    Zero,
}

/// Says what would be done, or does it.
pub(super) fn repair(pool: &Path, act: bool, lost: Lost, as_json: bool) -> Outcome {
    let how = Repairing { act, zero: lost == Lost::Zero };
    let found = tool::repair(pool, how).map_err(|error| Failure::from_error(&error))?;
    let after = &found["after"];
    let count = |said: &Value| said["problems"].as_array().map_or(0, Vec::len) as u64 + number(&said["more"]);
    match as_json {
        true => output::json(&found)?,
        false => output::text(&text(&found))?,
    }
    match (act, count(&found["found"])) {
        (true, _) => outcome(pool, count(after)),
        (false, 0) if !any(&found["steps"]) && !any(&found["left"]) => Ok(()),
        (false, _) => {
            Err(Failure::new(format!("{}: nothing has been changed; give --do to repair it", pool.display())))
        }
    }
}

fn any(list: &Value) -> bool {
    list.as_array().is_some_and(|list| !list.is_empty())
}

fn text(found: &Value) -> String {
    let mut said = String::new();
    let mut lines = |what: &str, list: &Value| {
        for line in list.as_array().into_iter().flatten() {
            said += &format!("{what}{}\n", word(line));
        }
    };
    lines("", &found["found"]["problems"]);
    let steps = if found["after"].is_null() { "to do: " } else { "done: " };
    lines(steps, &found["steps"]);
    lines("left: ", &found["left"]);
    lines("still: ", &found["after"]["problems"]);
    match (said.is_empty(), number(&found["found"]["more"])) {
        (true, _) => "there is nothing to repair\n".to_owned(),
        (false, 0) => said,
        (false, more) => format!("{said}and {more} more\n"),
    }
}
