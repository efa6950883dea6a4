//! `mason volume dump` and `restore`: a volume with its snapshots as text.
//!
//! The first line names the form, the second the volume. Then come changes, one a line, and between them the snapshots
//! that were taken, the oldest first. The last line has the CRC-32 of all before it: what is cut short is noticed.

use super::image::unfinished;
use super::pool::{number, same};
use super::reach::{Pool, half_received};
use crate::failure::{Failure, Outcome};
use blockmason_elements::parallax::tool::{Operation, Settings};
use crc32fast::Hasher;
use serde_json::Value;
use std::io::{BufRead, Write};

const FORM: &str = "mason-volume 1";

/// Bytes of a line of data, at most.
const PIECE: u64 = 64 << 10;

/// What the name of a volume ends in that is being restored.
const PART: &str = ".restoring";

/// Longest line that is read.
const LONGEST: u64 = 2 * PIECE;

/// Writes lines and remembers their checksum.
struct Lines<W> {
    to: W,
    sum: Hasher,
}

impl<W: Write> Lines<W> {
    fn put(&mut self, line: &str) -> Outcome {
        let line = format!("{line}\n");
        self.sum.update(line.as_bytes());
        self.to.write_all(line.as_bytes()).map_err(Failure::new)
    }
}

/// Writes a volume with its snapshots, or one snapshot as a volume.
pub(super) fn dump(pool: &Pool<'_>, name: &str, snapshot: Option<&str>, to: impl Write) -> Outcome {
    let volume = pool.volume(name)?;
    let all = volume["snapshots"].as_array().into_iter().flatten();
    let mut snapshots: Vec<&Value> = all.collect();
    let mut states: Vec<(Option<&str>, &Value)> = Vec::new();
    match snapshot {
        Some(wanted) => {
            snapshots.retain(|snapshot| snapshot["name"] == wanted);
            let Some(found) = snapshots.first() else {
                return Err(Failure::new(format!("there is no snapshot {name}@{wanted}")));
            };
            states.push((Some(wanted), *found));
        }
        None if volume["receiving"].is_object() => return Err(half_received(name)),
        None if volume["served"] == true => {
            return Err(Failure::new(format!(
                "{name} is served and changes: take a snapshot, and dump {name}@SNAPSHOT"
            )));
        }
        None => {
            states.extend(snapshots.iter().map(|found| (found["name"].as_str(), *found)));
            states.push((None, &volume));
        }
    }
    let mut lines = Lines { to, sum: Hasher::new() };
    lines.put(FORM)?;
    let (checksums, ordered) = (volume["checksums"] == true, volume["ordered"] == true);
    let mut has = number(&states.first().map_or(&volume, |(_, first)| *first)["size"]);
    lines.put(&format!("volume {has} checksums {checksums} ordered {ordered}"))?;
    let mut since = None;
    for (state, found) in states {
        let size = number(&found["size"]);
        if size != has {
            lines.put(&format!("size {size}"))?;
            has = size;
        }
        put_changes(pool, (name, (state, found), since), &mut lines)?;
        if let (Some(taken), None) = (state, snapshot) {
            lines.put(&format!("snapshot {taken}"))?;
        }
        since = Some(found);
    }
    let sum = lines.sum.clone().finalize();
    lines.put(&format!("end {sum:08x}"))?;
    lines.to.flush().map_err(Failure::new)
}

fn put_changes<W: Write>(
    pool: &Pool<'_>,
    (volume, (until, found), since): (&str, (Option<&str>, &Value), Option<&Value>),
    lines: &mut Lines<W>,
) -> Outcome {
    let (volume, until, number_of) = (volume.to_owned(), until.map(str::to_owned), same(found));
    let changed = pool.ask(&Operation::Diff {
        volume: volume.clone(),
        until: until.clone(),
        since: since.and_then(|since| since["name"].as_str()).map(str::to_owned),
        number: number_of,
        since_number: since.and_then(same),
    })?;
    for range in changed.as_array().into_iter().flatten() {
        let (start, len) = (number(&range[0]), number(&range[1]));
        for offset in (start..start + len).step_by(PIECE as usize) {
            let len = PIECE.min(start + len - offset);
            let (volume, snapshot) = (volume.clone(), until.clone());
            let read = Operation::Read { volume, snapshot, offset, len, number: number_of };
            match pool.ask(&read)?.as_str() {
                Some(data) => lines.put(&format!("data {offset} {data}"))?,
                None => lines.put(&format!("zero {offset} {len}"))?,
            }
        }
    }
    Ok(())
}

/// Makes a volume of what [`dump`] has written. What has been made of it is deleted if the text is not whole.
pub(super) fn restore(pool: &Pool<'_>, (name, kept): (&str, Settings), from: impl BufRead) -> Outcome {
    let mut reader = Reader { from, sum: Hasher::new(), number: 0 };
    if reader.line()?.as_deref() != Some(FORM) {
        return Err(Failure::new("this is no dump of a volume"));
    }
    let header = reader.line()?.unwrap_or_default();
    let words: Vec<&str> = header.split(' ').collect();
    let ["volume", size, "checksums", checksums, "ordered", ordered] = &words[..] else {
        return Err(reader.bad());
    };
    let (Ok(size), Ok(checksums), Ok(ordered)) = (size.parse(), checksums.parse(), ordered.parse()) else {
        return Err(reader.bad());
    };
    if pool.find(name)?.is_some() {
        return Err(Failure::new(format!("there is a volume {name} already")));
    }
    let settings = Settings { checksums, ordered, ..kept };
    // It has its name once it is whole: whoever ends this before that must not take it for the volume.
    let part = format!("{name}{PART}");
    if pool.find(&part)?.is_some() {
        return Err(unfinished(&part));
    }
    pool.ask(&Operation::CreateVolume { name: part.clone(), size, settings })?;
    let mut snapshots = Vec::new();
    let done = fill(pool, &part, &mut reader, &mut snapshots);
    let done = done.and_then(|()| {
        let (name, to) = (part.clone(), name.to_owned());
        pool.ask(&Operation::Rename { name, to }).map(drop)
    });
    if done.is_err() {
        for taken in snapshots {
            let _ = pool.ask(&Operation::DeleteSnapshot { volume: part.clone(), name: taken });
        }
        let _ = pool.ask(&Operation::DeleteVolume { name: part });
    }
    done
}

fn fill<R: BufRead>(
    pool: &Pool<'_>,
    name: &str,
    reader: &mut Reader<R>,
    snapshots: &mut Vec<String>,
) -> Outcome {
    loop {
        let sum = reader.sum.clone().finalize();
        let Some(line) = reader.line()? else {
            return Err(Failure::new("the dump is cut short: its end is missing"));
        };
        let words: Vec<&str> = line.split(' ').collect();
        let volume = name.to_owned();
        match (words[0], words.get(1).and_then(|word| word.parse::<u64>().ok()), &words[1..]) {
            ("data", Some(offset), [_, data]) => {
                pool.ask(&Operation::Write { volume, offset, data: (*data).to_owned(), receiver: None })?;
            }
            ("zero", Some(offset), [_, len]) => {
                let len = len.parse().map_err(|_| reader.bad())?;
                pool.ask(&Operation::Punch { volume, offset, len, receiver: None })?;
            }
            ("snapshot", _, [taken]) => {
                let name = (*taken).to_owned();
                pool.ask(&Operation::Snapshot { volumes: vec![volume], name: name.clone() })?;
                snapshots.push(name);
            }
            ("size", Some(size), [_]) => {
                pool.ask(&Operation::Resize { name: volume, size })?;
            }
            ("end", _, [said]) if *said == format!("{sum:08x}") => {
                return match reader.line()? {
                    None => Ok(()),
                    Some(_) => Err(Failure::new("there is something behind the end of the dump")),
                };
            }
            ("end", _, [_]) => {
                return Err(Failure::new("the dump has been changed: its checksum is another one"));
            }
            _ => return Err(reader.bad()),
        }
    }
}

/// Reads lines and remembers their checksum.
struct Reader<R> {
    from: R,
    sum: Hasher,
    number: u64,
}

impl<R: BufRead> Reader<R> {
    /// None at the end.
    fn line(&mut self) -> Outcome<Option<String>> {
        let mut line = Vec::new();
        let mut limited = std::io::Read::take(&mut self.from, LONGEST);
        limited.read_until(b'\n', &mut line).map_err(Failure::new)?;
        self.number += 1;
        if line.is_empty() {
            return Ok(None);
        }
        self.sum.update(&line);
        let line = String::from_utf8(line).ok().and_then(|line| line.strip_suffix('\n').map(str::to_owned));
        line.map(Some).ok_or_else(|| self.bad())
    }

    fn bad(&self) -> Failure {
        Failure::new(format!("line {} of the dump says nothing that is known", self.number))
    }
}
