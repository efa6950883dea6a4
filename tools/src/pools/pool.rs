//! `mason pool`: makes pools and looks at them.

use super::repair::{self, Lost};
use super::{ask, scrub};
use crate::control::find::ControlArgs;
use crate::failure::{Failure, Outcome};
use crate::output::{self, printable};
use crate::units::{Bytes, Exact, table};
use blockmason::lang::value::Size;
use blockmason_elements::parallax::tool::{self, Operation};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Make pools of thin volumes, look at them, check them.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason pool create vms.pool --size 100G
  mason pool list vms.pool
  mason pool check vms.pool && echo sound
  mason pool scrub vms.pool            read everything while guests go on, and mend it
  mason pool repair vms.pool           say what could be repaired that a scrub cannot mend
  mason pool grow vms.pool --size 200G

A pool is a file, a block device, or a folder that holds the file. Whatever is asked of a pool that a daemon
serves is done by that daemon.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make a pool in a new file, or on an empty block device
    Create {
        /// The file or device; a folder gets a file
        pool: PathBuf,

        /// Bytes of the file, which is sparse: the file system sets room aside as the pool fills up. All of a device is
        /// used without one
        #[arg(long)]
        size: Option<Size>,
    },
    /// Show what is in a pool
    List(Pool),
    /// Show how much room a pool has, and what for
    Stat(Pool),
    /// Make a pool larger
    Grow {
        /// The pool
        pool: PathBuf,
        /// Its new size; without one, that of its device
        #[arg(long)]
        size: Option<Size>,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// End what is being deleted, and give free room back to the file system that the pool is on
    Gc(Pool),
    /// Look at everything in a pool: exits with 1 if anything is not as it should be
    ///
    /// It does what a scrub does, and keeps account of each block besides: that exactly what is used is marked as used. That takes
    /// memory, about 40 bytes for each block of 4096, and changes wait that do not fit into the log. It is for a pool of which
    /// something is suspected; a scrub is for all days.
    Check(Pool),
    /// Read all that a pool has while guests go on, and mend what is damaged in one copy: exits with 1 if anything was
    ///
    /// All that leads to data is kept twice: both copies are read. Data is read in volumes with checksums. What is not mended is named,
    /// with the volume or snapshot, the oldest that has it, and the bytes: they read as an error, and all else goes on. Nothing
    /// is remembered: interrupt it at any time, and begin anew. `(scrub_every 7d)` has a daemon do it.
    Scrub {
        #[command(flatten)]
        pool: Pool,
        /// Goes on at once after each piece; otherwise as much time is for others as it took
        #[arg(long)]
        full_speed: bool,
    },
    /// Say what can be done about what a scrub and a check only name, or do it; while nobody serves the pool
    ///
    /// It changes nothing that can be read. Records of extents and dead lists of which no copy is good are made anew from what the
    /// trees lead to; what nothing leads to is free; what is in use and not marked is marked. Parts of volumes that cannot be read
    /// stay errors, and what they led to stays in use, until `--lost zero` gives them up. It takes memory as a check does. After a crash
    /// everything has been done or nothing, for the volumes of each format.
    Repair {
        /// The pool
        pool: PathBuf,
        /// Does it: otherwise it is only said
        #[arg(long = "do")]
        act: bool,
        /// What becomes of parts of volumes that cannot be read
        #[arg(long, value_enum, default_value = "keep")]
        lost: Lost,
        /// Writes one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(clap::Args)]
struct Pool {
    /// The pool
    pool: PathBuf,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

pub(crate) fn main(args: &Args) -> Outcome {
    match &args.command {
        Command::Create { pool, size } => {
            tool::create(pool, size.map(|size| size.0)).map_err(|error| Failure::from_error(&error))
        }
        Command::List(pool) => {
            let found = ask(&pool.pool, &Operation::List, &pool.control)?;
            if pool.json { output::json(&found) } else { output::text(&list(&found)) }
        }
        Command::Stat(pool) => {
            let found = ask(&pool.pool, &Operation::Stat { volume: None, snapshot: None }, &pool.control)?;
            if pool.json { output::json(&found) } else { output::text(&stat(&found)) }
        }
        Command::Grow { pool, size, control } => {
            let found = ask(pool, &Operation::Grow { size: size.map(|size| size.0) }, control)?;
            output::text(&format!("{}: {}\n", pool.display(), Exact(number(&found["size"]))))
        }
        Command::Gc(pool) => {
            let found = ask(&pool.pool, &Operation::Gc, &pool.control)?;
            match (pool.json, found["given_back"].as_u64()) {
                (true, _) => output::json(&found),
                (false, Some(bytes)) => output::text(&format!("{} are given back\n", Bytes(bytes))),
                (false, None) => output::text("what the pool is on takes no room back\n"),
            }
        }
        Command::Check(pool) => check(pool),
        Command::Repair { pool, act, lost, json } => repair::repair(pool, *act, *lost, *json),
        Command::Scrub { pool, full_speed } => {
            scrub::scrub(&pool.pool, *full_speed, pool.json, &pool.control)
        }
    }
}

pub(super) fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// The number of a volume or snapshot, which no other one will ever have.
pub(super) fn same(of: &Value) -> Option<u32> {
    of["number"].as_u64().and_then(|number| number.try_into().ok())
}

pub(super) fn word(value: &Value) -> String {
    printable(value.as_str().unwrap_or("-"))
}

pub(super) fn list(found: &Value) -> String {
    let (size, free) = (number(&found["size"]), number(&found["free"]));
    let mut rows = Vec::new();
    for volume in found["volumes"].as_array().into_iter().flatten() {
        let serving = match &volume["receiving"] {
            Value::Object(_) => "half received",
            _ if volume["served"] == true => "served",
            _ => "-",
        };
        let row = [
            word(&volume["name"]),
            Exact(number(&volume["size"])).to_string(),
            word(&volume["origin"]),
            serving.to_owned(),
        ];
        rows.push(row.to_vec());
        for snapshot in volume["snapshots"].as_array().into_iter().flatten() {
            let name = format!("{}@{}", word(&volume["name"]), word(&snapshot["name"]));
            let size = Exact(number(&snapshot["size"])).to_string();
            let is = |key: &str| snapshot[key] == true;
            let state = if is("served") {
                "served"
            } else if is("held") {
                "held"
            } else {
                "-"
            };
            rows.push(vec![name, size, "-".to_owned(), state.to_owned()]);
        }
    }
    let mut said = format!("{} of {} in use\n", Bytes(size - free), Bytes(size));
    for what in found["unusable"].as_array().into_iter().flatten() {
        said += &format!("{}\n", word(what));
    }
    if rows.is_empty() { said } else { said + &table(&["volume", "size", "clone of", ""], rows, 1..2) }
}

fn stat(found: &Value) -> String {
    let line = |what: &str, key: &str| format!("{what:<22}{:>10}\n", Bytes(number(&found[key])).to_string());
    let mut said = line("size", "size") + &line("in use", "used");
    said += &line("free for data", "available");
    said += &line("reserved for volumes", "reserved");
    said += &line("kept for deletion", "kept_back");
    if !found["file_system_free"].is_null() {
        said += &line("set aside for it", "set_aside");
        said += &line("file system has free", "file_system_free");
    }
    if number(&found["foreign"]) > 0 {
        said += &line("left alone", "foreign");
    }
    for name in found["deleting"].as_array().into_iter().flatten() {
        said += &format!("{} is being deleted\n", word(name));
    }
    said
}

fn check(pool: &Pool) -> Outcome {
    let found = ask(&pool.pool, &Operation::Check, &pool.control)?;
    let problems = found["problems"].as_array().map_or(&[][..], |problems| problems);
    if pool.json {
        output::json(&found)?;
    } else {
        let notes = found["notes"].as_array().into_iter().flatten();
        let lines: String = problems.iter().chain(notes).map(|line| word(line) + "\n").collect();
        let more = match number(&found["more"]) {
            0 => String::new(),
            more => format!("and {more} more\n"),
        };
        let said = format!(
            "{more}{} volumes, {} snapshots, {} nodes, {} in use\n",
            number(&found["volumes"]),
            number(&found["snapshots"]),
            number(&found["nodes"]),
            Bytes(number(&found["bytes"]))
        );
        output::text(&(lines + &said))?;
    }
    outcome(&pool.pool, problems.len() as u64 + number(&found["more"]))
}

/// Whether so many things are wrong.
pub(super) fn outcome(pool: &Path, count: u64) -> Outcome {
    match count {
        0 => Ok(()),
        1 => Err(Failure::new(format!("{}: one thing is not as it should be", pool.display()))),
        count => Err(Failure::new(format!("{}: {count} things are not as they should be", pool.display()))),
    }
}
