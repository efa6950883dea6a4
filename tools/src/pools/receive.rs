//! `mason volume receive`: makes a volume of a stream, or brings one up to the snapshot that the stream is of.

use super::pool::number;
use super::reach::Pool;
use super::stream::{About, Change, Reader};
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::progress::lines;
use base64::prelude::{BASE64_STANDARD, Engine};
use blockmason_elements::parallax::tool::{Operation, Settings};
use serde_json::Value;
use std::fmt;
use std::io::Read;
use std::str::FromStr;

/// Bytes after which what is there is made durable, and said to be there.
const STEP: u64 = 64 << 20;

/// How far a snapshot has been received, as people carry it from one pool to the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    /// How its identity begins.
    id: String,
    offset: u64,
}

impl Token {
    /// Of a volume that is being received.
    pub(super) fn of(receiving: &Value) -> Option<Token> {
        Some(Token { id: receiving["id"].as_str()?.to_owned(), offset: number(&receiving["offset"]) })
    }

    /// Where to go on with a snapshot of that identity.
    pub(super) fn offset_in(&self, id: &Value, volume: &str, snapshot: &str) -> Outcome<u64> {
        match self.is_of(id.as_str().unwrap_or_default()) {
            true => Ok(self.offset),
            false => Err(Failure::new(format!(
                "what is to be resumed is another snapshot than {volume}@{snapshot}"
            ))),
        }
    }

    fn is_of(&self, id: &str) -> bool {
        id.starts_with(&self.id)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.id, self.offset)
    }
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Token, String> {
        let parts = text.split_once(':');
        let parts =
            parts.filter(|(id, _)| id.len() == 20 && id.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let token =
            parts.and_then(|(id, offset)| Some(Token { id: id.to_owned(), offset: offset.parse().ok()? }));
        token.ok_or_else(|| {
            "expected what `mason volume stat` shows of a volume that is being received".to_owned()
        })
    }
}

/// What there is to do.
enum Plan {
    /// The volume has the snapshot already.
    Nothing,
    /// It is made first.
    Make,
    /// It is to be filled from the start.
    Begin,
    /// It has what comes before that.
    GoOn(u64),
}

pub(super) fn receive(pool: &Pool<'_>, (name, kept): (&str, Settings), from: impl Read) -> Outcome {
    let mut reader = Reader::begin(from)?;
    let about = reader.about.clone();
    let (found, mut at) = (pool.find(name)?, about.offset);
    match plan(&about, name, found.as_ref())? {
        Plan::Nothing => {
            return output::text(&format!("{name} has {} already\n", about.snapshot.name));
        }
        Plan::Make => {
            let settings = Settings { checksums: about.checksums, ordered: about.ordered, ..kept };
            let made = Operation::CreateVolume { name: name.to_owned(), size: about.size, settings };
            pool.ask(&made)?;
            fill(pool, name, &about, 0).inspect_err(|_| {
                let _ = pool.ask(&Operation::DeleteVolume { name: name.to_owned() });
            })?;
        }
        Plan::Begin => {
            unchanged(pool, name, &about)?;
            fill(pool, name, &about, 0)?;
        }
        Plan::GoOn(has) => at = at.max(has),
    }
    if found.is_some_and(|found| number(&found["size"]) < about.size) {
        pool.ask(&Operation::Resize { name: name.to_owned(), size: about.size })?;
    }
    if let Err(failure) = write_all(pool, name, &mut reader, &mut at) {
        // What is there need not come again.
        let _ = fill(pool, name, &about, at);
        let token = pool.find(name).ok().flatten().and_then(|found| Token::of(&found["receiving"]));
        return Err(match token {
            Some(token) => Failure::new(format!("{failure}; send the rest with --resume {token}")),
            None => failure,
        });
    }
    fill(pool, name, &about, about.size)?;
    let whole = Operation::Filled {
        volume: name.to_owned(),
        id: about.snapshot.id.clone(),
        snapshot: about.snapshot.name.clone(),
        made: about.snapshot.made,
    };
    pool.ask(&whole).map(drop)
}

/// Whether the stream is of any use to the volume.
fn plan(about: &About, name: &str, found: Option<&Value>) -> Outcome<Plan> {
    let refused = |why: String| Err(Failure::new(why));
    let Some(found) = found else {
        return match &about.since {
            None if about.offset == 0 => Ok(Plan::Make),
            None => {
                refused(format!("there is no volume {name} that the rest of a stream could be received in"))
            }
            Some(since) => refused(format!(
                "there is no volume {name}: the stream has what has changed since {}",
                since.name
            )),
        };
    };
    let snapshots: Vec<&Value> = found["snapshots"].as_array().into_iter().flatten().collect();
    if snapshots.iter().any(|snapshot| snapshot["id"] == about.snapshot.id.as_str()) {
        return Ok(Plan::Nothing);
    }
    if found["served"] == true {
        return refused(format!("{name} is in use: a graph serves it"));
    }
    if let Some(token) = Token::of(&found["receiving"]) {
        // What no record speaks of is what it is in that snapshot, or zeros: the same for all of what is received.
        let since = about.since.as_ref().map(|since| since.id.as_str());
        let begun = snapshots.last().and_then(|last| last["id"].as_str());
        if token.is_of(&about.snapshot.id) && since != begun {
            let whole = "all of it, without --from";
            let what = begun.map_or(whole, |_| "what has changed since its newest snapshot, with --from");
            return refused(format!("{name} is being filled with {what}, and the stream is something else"));
        }
        return match (token.is_of(&about.snapshot.id), about.offset <= token.offset) {
            (true, true) => Ok(Plan::GoOn(token.offset)),
            (true, false) => refused(format!(
                "the stream begins at {}: send what is missing with --resume {token}",
                about.offset
            )),
            (false, _) => refused(format!(
                "{name} is being filled with another snapshot: send the rest of that with --resume {token}, \
                 or give it up with --abort"
            )),
        };
    }
    if snapshots.iter().any(|snapshot| snapshot["name"] == about.snapshot.name.as_str()) {
        return refused(format!("{name} has a snapshot {} of its own", about.snapshot.name));
    }
    match (&about.since, snapshots.last()) {
        (None, _) => refused(format!("there is a volume {name} already")),
        (Some(since), Some(last)) if last["id"] == since.id.as_str() => match about.offset {
            0 => Ok(Plan::Begin),
            _ => refused(format!("{name} has received nothing of that yet: send all of it")),
        },
        (Some(since), _) => refused(format!(
            "the stream has what has changed since {} ({}), which is not the newest snapshot of {name}",
            since.name, since.id
        )),
    }
}

/// Nothing may be lost by what is received.
fn unchanged(pool: &Pool<'_>, name: &str, about: &About) -> Outcome {
    let snapshots = pool.volume(name)?["snapshots"].clone();
    let since = snapshots.as_array().and_then(|all| all.last()).and_then(|last| last["name"].as_str());
    let changed =
        pool.ask(&Operation::Diff { volume: name.to_owned(), until: None, since: since.map(str::to_owned) })?;
    match changed.as_array().is_some_and(Vec::is_empty) {
        true => Ok(()),
        false => {
            let since = since.unwrap_or(&about.volume);
            Err(Failure::new(format!(
                "{name} has changed since {name}@{since}: go back to that first, with mason volume rollback"
            )))
        }
    }
}

fn fill(pool: &Pool<'_>, name: &str, about: &About, offset: u64) -> Outcome {
    let (volume, id) = (name.to_owned(), about.snapshot.id.clone());
    pool.ask(&Operation::Fill { volume, id, offset }).map(drop)
}

/// Writes what comes. `at` is what it comes before that is there.
fn write_all<R: Read>(pool: &Pool<'_>, name: &str, reader: &mut Reader<R>, at: &mut u64) -> Outcome {
    let (about, said) = (reader.about.clone(), lines("bytes are received"));
    let (mut done, mut since) = (0, 0);
    while let Some(change) = reader.next()? {
        let (range, volume) = (change.range(), name.to_owned());
        match change {
            Change::Data { offset, bytes } => {
                let data = BASE64_STANDARD.encode(bytes);
                pool.ask(&Operation::Write { volume, offset, data })?;
            }
            Change::Zeros { offset, len } => {
                pool.ask(&Operation::Punch { volume, offset, len })?;
            }
        }
        // What is sent a second time is there already.
        *at = range.end.max(*at);
        (done, since) = (done + range.end - range.start, since + range.end - range.start);
        if since >= STEP {
            fill(pool, name, &about, *at)?;
            since = 0;
        }
        said(done, about.bytes);
    }
    Ok(())
}

/// Gives up what is half received: the volume is what its newest snapshot is, or gone if it has none.
pub(super) fn abort(pool: &Pool<'_>, name: &str) -> Outcome {
    let found = pool.volume(name)?;
    if Token::of(&found["receiving"]).is_none() {
        return Err(Failure::new(format!("{name} is not being received")));
    }
    let last = found["snapshots"].as_array().and_then(|all| all.last());
    let Some(snapshot) = last.and_then(|last| last["name"].as_str()) else {
        return pool.ask(&Operation::DeleteVolume { name: name.to_owned() }).map(drop);
    };
    let (volume, keep) = (name.to_owned(), format!("{name}.aborted"));
    pool.ask(&Operation::Rollback { volume, snapshot: snapshot.to_owned(), keep: keep.clone() })?;
    pool.ask(&Operation::DeleteVolume { name: keep }).map(drop)
}
