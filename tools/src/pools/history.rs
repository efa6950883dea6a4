//! `mason volume stat --history` and `mason volume list --long`: the room of each snapshot.

use super::pool::{number, word};
use super::reach::Pool;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::units::{Bytes, Stamp, table};
use blockmason_elements::parallax::tool::Operation;
use serde_json::Value;

/// What stands above the lines.
const HEAD: [&str; 6] = ["", "made", "data", "changed", "shared", "freed if deleted"];

/// The history of one volume.
pub(super) fn show(pool: &Pool<'_>, name: &str, json: bool) -> Outcome {
    if name.contains('@') {
        return Err(Failure::Usage(
            "a history is that of a volume: give its name without a snapshot".to_owned(),
        ));
    }
    let found = pool.ask(&Operation::History { volume: name.to_owned() })?;
    match json {
        true => output::json(&found),
        false => output::text(&table(&HEAD, rows(&found, None), 2..6)),
    }
}

/// That of all volumes.
pub(super) fn list(pool: &Pool<'_>) -> Outcome {
    let found = pool.ask(&Operation::List)?;
    let mut all = Vec::new();
    for volume in found["volumes"].as_array().into_iter().flatten() {
        let name = volume["name"].as_str().unwrap_or_default();
        let history = pool.ask(&Operation::History { volume: name.to_owned() })?;
        all.append(&mut rows(&history, Some(&word(&volume["name"]))));
    }
    output::text(&table(&["volume", "made", "data", "changed", "shared", "freed if deleted"], all, 2..6))
}

/// A line for each snapshot, and one for the volume as it is now, with its name in each of them or in none.
fn rows(found: &Value, volume: Option<&str>) -> Vec<Vec<String>> {
    let points = found.as_array().into_iter().flatten();
    let row = |point: &Value| {
        let bytes = |key: &str| Bytes(number(&point[key])).to_string();
        let (name, made) = match point["made"].as_u64() {
            // To the minute.
            Some(made) => {
                let made: String = Stamp(made as f64).to_string().chars().take(16).collect();
                let name = word(&point["snapshot"]);
                let name = volume.map_or(name.clone(), |volume| format!("{volume}@{name}"));
                (name, made.replace('T', " "))
            }
            None => (volume.unwrap_or("now").to_owned(), "-".to_owned()),
        };
        vec![name, made, bytes("mapped"), bytes("changed"), bytes("shared"), bytes("freed_if_deleted")]
    };
    points.map(row).collect()
}
