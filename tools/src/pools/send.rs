//! `mason volume send`: a snapshot, or what has changed since an older one, as a stream.

use super::pool::{number, same};
use super::reach::Pool;
use super::stream::{About, Change, MOST_DATA, Since, Taken, Writer};
use super::{Named, receive::Token};
use crate::failure::{Failure, Outcome};
use crate::progress::lines;
use base64::prelude::{BASE64_STANDARD, Engine};
use blockmason_elements::parallax::tool::Operation;
use serde_json::Value;
use std::io::Write;

/// What of a snapshot is sent.
pub(super) struct Wanted<'a> {
    pub(super) of: &'a Named,
    /// Only what has changed since this one.
    pub(super) since: Option<&'a str>,
    /// What has been received.
    pub(super) resume: Option<&'a Token>,
}

pub(super) fn send(pool: &Pool<'_>, wanted: &Wanted<'_>, to: impl Write) -> Outcome {
    let Named { volume, snapshot } = wanted.of;
    let found = pool.volume(volume)?;
    let taken = snapshot_of(&found, volume, snapshot)?;
    let since = wanted.since.map(|since| snapshot_of(&found, volume, since)).transpose()?;
    let offset = wanted.resume.map_or(Ok(0), |token| token.offset_in(&taken, volume))?;
    let diff = Operation::Diff {
        volume: volume.clone(),
        until: Some(snapshot.clone()),
        since: wanted.since.map(str::to_owned),
        number: same(&taken),
        since_number: since.as_ref().and_then(same),
    };
    let changed = ranges(&pool.ask(&diff)?, offset);
    let about = About {
        volume: volume.clone(),
        size: number(&taken["size"]),
        checksums: found["checksums"] == true,
        ordered: found["ordered"] == true,
        snapshot: Taken { name: snapshot.clone(), id: text(&taken["id"]), made: number(&taken["made"]) },
        since: since.map(|since| Since { name: text(&since["name"]), id: text(&since["id"]) }),
        offset,
        bytes: changed.iter().map(|(start, end)| end - start).sum(),
    };
    let (mut sent, said) = (0, lines("bytes are sent"));
    let all = about.bytes;
    let mut writer = Writer::begin(to, &about)?;
    for (start, end) in changed {
        for offset in (start..end).step_by(MOST_DATA as usize) {
            let len = MOST_DATA.min(end - offset);
            let read = Operation::Read {
                volume: volume.clone(),
                snapshot: Some(snapshot.clone()),
                offset,
                len,
                number: same(&taken),
            };
            let change = match pool.ask(&read)?.as_str() {
                Some(data) => {
                    let bytes = BASE64_STANDARD.decode(data).map_err(Failure::new)?;
                    Change::Data { offset, bytes }
                }
                None => Change::Zeros { offset, len },
            };
            writer.change(&change)?;
            sent += len;
            said(sent, all);
        }
    }
    writer.end()
}

/// What is known of a snapshot.
pub(super) fn snapshot_of(volume: &Value, of: &str, name: &str) -> Outcome<Value> {
    let mut all = volume["snapshots"].as_array().into_iter().flatten();
    let found = all.find(|snapshot| snapshot["name"] == name).cloned();
    found.ok_or_else(|| Failure::new(format!("there is no snapshot {of}@{name}")))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The parts of ranges that do not come before an offset.
fn ranges(changed: &Value, offset: u64) -> Vec<(u64, u64)> {
    let range = |range: &Value| (number(&range[0]), number(&range[0]) + number(&range[1]));
    let all = changed.as_array().into_iter().flatten().map(range);
    all.filter(|(_, end)| *end > offset).map(|(start, end)| (start.max(offset), end)).collect()
}
