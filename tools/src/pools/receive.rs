//! `mason volume receive`: makes a volume of a stream, or brings one up to the snapshot that the stream is of.

use super::pool::{number as number_of, same};
use super::reach::Pool;
use super::stream::{About, BLOCK, Change, Reader, Since};
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

/// Of an identity that are in a token.
const DIGITS: usize = 20;

/// How far a snapshot has been received, as people carry it from one pool to the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Token {
    /// How its identity begins.
    id: String,
    offset: u64,
}

impl Token {
    /// Of a volume that is being received, unless what it has is wrong.
    pub(super) fn of(receiving: &Value) -> Option<Token> {
        Some(Token { id: receiving["id"].as_str()?.to_owned(), offset: receiving["offset"].as_u64()? })
    }

    /// Where to go on with a snapshot of that identity.
    pub(super) fn offset_in(&self, taken: &Value, volume: &str) -> Outcome<u64> {
        let (size, name) = (number_of(&taken["size"]), taken["name"].as_str().unwrap_or_default());
        if !self.is_of(taken["id"].as_str().unwrap_or_default()) {
            let message = format!("what is to be resumed is another snapshot than {volume}@{name}");
            return Err(Failure::new(message));
        }
        match self.offset.is_multiple_of(BLOCK) && self.offset <= size {
            true => Ok(self.offset),
            false => Err(Failure::new(format!(
                "{volume}@{name} has no {} to be resumed at: it has {size} bytes, in blocks of {BLOCK}",
                self.offset
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
            parts.filter(|(id, _)| id.len() == DIGITS && id.bytes().all(|digit| digit.is_ascii_hexdigit()));
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
    /// It has something of it.
    GoOn,
}

/// A volume that this process receives, until somebody else does.
struct Target<'a> {
    pool: &'a Pool<'a>,
    name: &'a str,
    receiver: u64,
    /// What it comes before that is there.
    at: u64,
}

impl<'a> Target<'a> {
    /// Takes over from whoever has received it so far.
    fn begin(pool: &'a Pool<'a>, name: &'a str, number: u32, about: &About) -> Outcome<Target<'a>> {
        let begun = pool.ask(&Operation::Receive {
            volume: name.to_owned(),
            number,
            id: about.snapshot.id.clone(),
            since: about.since.as_ref().map(|since| since.id.clone()),
            size: about.size,
        })?;
        let at = number_of(&begun["offset"]);
        match about.offset <= at {
            true => Ok(Target { pool, name, receiver: number_of(&begun["receiver"]), at }),
            false => Err(Failure::new(format!("{name} has what comes before {at} only by now: begin anew"))),
        }
    }

    fn ask(&self, operation: &Operation) -> Outcome {
        self.pool.ask(operation).map(drop)
    }

    /// So much is there, durably; or what is there is wrong.
    fn fill(&self, offset: Option<u64>) -> Outcome {
        self.ask(&Operation::Fill { volume: self.name.to_owned(), receiver: self.receiver, offset })
    }

    fn put(&mut self, change: Change) -> Outcome {
        let (end, volume, receiver) = (change.range().end, self.name.to_owned(), Some(self.receiver));
        self.ask(&match change {
            Change::Data { offset, bytes } => {
                Operation::Write { volume, offset, data: BASE64_STANDARD.encode(bytes), receiver }
            }
            Change::Zeros { offset, len } => Operation::Punch { volume, offset, len, receiver },
        })?;
        // What is sent a second time is there already.
        self.at = end.max(self.at);
        Ok(())
    }

    /// Writes what comes.
    fn write_all<R: Read>(&mut self, reader: &mut Reader<R>) -> Outcome {
        let (all, said) = (reader.about.bytes, lines("bytes are received"));
        let (mut done, mut since) = (0, 0);
        while let Some(change) = reader.next()? {
            let range = change.range();
            let len = range.end - range.start;
            self.put(change)?;
            (done, since) = (done + len, since + len);
            if since >= STEP {
                self.fill(Some(self.at))?;
                since = 0;
            }
            said(done, all);
        }
        Ok(())
    }

    /// What is to be done about a failure. What is there need not come again, if it is right.
    fn failed(&self, failure: Failure, spoilt: bool, about: &About) -> Failure {
        if spoilt {
            let _ = self.fill(None);
            return Failure::new(format!(
                "{failure}; what {} has of it is wrong: give it up with mason volume receive --abort, and have it sent anew",
                self.name
            ));
        }
        match self.fill(Some(self.at)) {
            Ok(()) => {
                let id = about.snapshot.id.chars().take(DIGITS).collect();
                let token = Token { id, offset: self.at };
                Failure::new(format!("{failure}; send the rest with --resume {token}"))
            }
            // There is another receiver by now, or there will be one that knows how far it is.
            Err(_) => failure,
        }
    }
}

pub(super) fn receive(pool: &Pool<'_>, (name, kept): (&str, Settings), from: impl Read) -> Outcome {
    let mut reader = Reader::begin(from)?;
    let about = reader.about.clone();
    let found = pool.find(name)?;
    let mut target = match (plan(&about, name, found.as_ref())?, found.as_ref().and_then(same)) {
        (Plan::Nothing, _) => {
            output::text(&format!("{name} has {} already\n", about.snapshot.name))?;
            // Whoever sends it has done nothing wrong.
            return reader.skip();
        }
        (Plan::Begin | Plan::GoOn, Some(number)) => Target::begin(pool, name, number, &about)?,
        (Plan::Make | Plan::Begin | Plan::GoOn, _) => {
            let settings = Settings { checksums: about.checksums, ordered: about.ordered, ..kept };
            let made = Operation::CreateVolume { name: name.to_owned(), size: about.size, settings };
            let number = same(&pool.ask(&made)?).unwrap_or(0);
            Target::begin(pool, name, number, &about).inspect_err(|_| {
                let _ = pool.ask(&Operation::DeleteVolume { name: name.to_owned() });
            })?
        }
    };
    if let Err(failure) = target.write_all(&mut reader) {
        return Err(target.failed(failure, reader.spoilt, &about));
    }
    target.fill(Some(about.size))?;
    target.ask(&Operation::Filled {
        volume: name.to_owned(),
        receiver: target.receiver,
        id: about.snapshot.id.clone(),
        snapshot: about.snapshot.name.clone(),
        made: about.snapshot.made,
    })
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
    if found["receiving"].is_object() {
        let Some(token) = Token::of(&found["receiving"]) else {
            return refused(format!(
                "what {name} has received is wrong: give it up with mason volume receive --abort, and have it sent anew"
            ));
        };
        // What no record speaks of is what it is in that snapshot, or zeros: the same for all of what is received.
        let since = about.since.as_ref().map(|since| since.id.as_str());
        let begun = snapshots.last().and_then(|last| last["id"].as_str());
        if token.is_of(&about.snapshot.id) && since != begun {
            let whole = "all of it, without --from";
            let what = begun.map_or(whole, |_| "what has changed since its newest snapshot, with --from");
            return refused(format!("{name} is being filled with {what}, and the stream is something else"));
        }
        return match (token.is_of(&about.snapshot.id), about.offset <= token.offset) {
            (true, true) => Ok(Plan::GoOn),
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
        (Some(since), Some(last)) if snapshots.iter().any(|snapshot| snapshot["id"] == since.id.as_str()) => {
            let last = last["name"].as_str().unwrap_or_default();
            refused(format!(
                "the stream has what has changed since {0}, and {name} has {last} since then: send what has changed \
                 since {last}, or go back to {0} with mason volume rollback",
                since.name
            ))
        }
        (Some(since), last) => {
            let last = last.and_then(|last| last["name"].as_str());
            let way = last.map_or("send all of it to another volume".to_owned(), |last| {
                format!("send what has changed since its newest snapshot, {last}")
            });
            let Since { name: base, id } = since;
            refused(format!(
                "the stream has what has changed since {base} ({id}), which {name} does not have: {way}"
            ))
        }
    }
}

/// Gives up what is half received: the volume is what its newest snapshot is, or gone if it has none.
pub(super) fn abort(pool: &Pool<'_>, name: &str) -> Outcome {
    pool.ask(&Operation::GiveUp { volume: name.to_owned() }).map(drop)
}
