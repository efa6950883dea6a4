//! `mason volume`: makes volumes, snapshots and clones, and undoes them.

use super::image::{self, Layout};
use super::reach::Pool;
use super::receive::{self, Token};
use super::send::{self, Wanted};
use super::{Named, ask, dump, history, named, pool, tidy};
use crate::control::find::ControlArgs;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::units::{Bytes, Exact};
use blockmason::lang::value::Size;
use blockmason_elements::parallax::tool::{self, Compress, Format, NewSettings, Operation, Settings};
use std::io::{BufReader, BufWriter, IsTerminal};
use std::path::{Path, PathBuf};

/// Make thin volumes of a pool, their snapshots and clones.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason volume create vms.pool vm1 --size 20G
  mason volume snapshot vms.pool vm1@monday vm2@monday   both at one instant
  mason volume clone vms.pool vm1@monday vm3
  mason volume diff vms.pool vm1@monday
  mason volume rollback vms.pool vm1@monday --keep vm1-tuesday
  mason volume stat vms.pool vm1 --history               which snapshot takes the room
  mason volume delete vms.pool vm1@monday
  mason volume set vms.pool vm1 --quota 30G --reserve 10G
  mason volume dump vms.pool vm1 | ssh far mason volume restore other.pool vm1
  mason volume import vms.pool vm4 debian.qcow2
  mason volume send vms.pool vm1@tuesday --from monday | ssh far mason volume receive other.pool vm1
  mason volume defrag vms.pool vm1                       while guests use it
  mason volume trim vms.pool vm1

All of it is durable when the command returns. What a daemon serves is changed by that daemon, while guests go on.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make an empty volume
    Create {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// The volume
        name: String,
        /// Bytes; they take room when they are written
        #[arg(long)]
        size: Size,
        /// Keeps a checksum of each block; blocks are then never written in place
        #[arg(long)]
        checksums: bool,
        #[command(flatten)]
        kept: Kept,
        #[command(flatten)]
        limits: Limits,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Change how much room a volume may take, and what a loss of power may do to it
    Set {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// The volume
        name: String,
        /// How what is written from now on is compressed; what is there stays as it is
        #[arg(long)]
        compress: Option<Compress>,
        #[command(flatten)]
        limits: Limits,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Show volumes and snapshots
    List {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// Shows the room that each takes, as `stat --history` does
        #[arg(long, conflicts_with = "json")]
        long: bool,
        /// Writes one JSON object
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Delete a volume without snapshots, or a snapshot without clones
    Delete {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME or VOLUME@SNAPSHOT
        name: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Take snapshots, all at one instant; guests do not wait
    Snapshot {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME@SNAPSHOT, all with the same name after the @
        #[arg(required = true, value_parser = named)]
        names: Vec<Named>,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Keep a snapshot from being deleted, by a schedule or by anybody
    Hold {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME@SNAPSHOT
        #[arg(value_parser = named)]
        name: Named,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Let a snapshot be deleted that was held
    Release {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME@SNAPSHOT
        #[arg(value_parser = named)]
        name: Named,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Make a volume that begins as a snapshot
    Clone {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME@SNAPSHOT
        #[arg(value_parser = named)]
        of: Named,
        /// The clone
        name: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Make a volume what one of its snapshots is; what it was is kept under another name
    Rollback {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME@SNAPSHOT
        #[arg(value_parser = named)]
        to: Named,
        /// The name of the volume that has what this one was until now, with its newer snapshots
        #[arg(long, value_name = "NAME")]
        keep: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Give a clone the snapshots that it came from; the volume that has them becomes its clone
    Promote {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// The volume
        name: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Give a volume another name
    Rename {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// The volume
        name: String,
        /// Its new name
        to: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Make a volume larger
    Resize {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// The volume
        name: String,
        /// Its new size, in bytes
        size: Size,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Show the room that a volume or snapshot takes, and how it is made
    ///
    /// What is freed if it is deleted has the nodes that lead to it in it; of a volume it is what comes back once all its
    /// snapshots are deleted, too. `--history` has a line for each snapshot, the oldest first, and one for now: what has changed since
    /// the line before, and what is freed if that one alone is deleted.
    Stat {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME or VOLUME@SNAPSHOT
        name: String,
        /// Shows how its room has come about, snapshot by snapshot
        #[arg(long)]
        history: bool,
        /// Writes JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Write a volume with its snapshots, or one snapshot, to stdout as text
    ///
    /// A volume that is served changes meanwhile, and is refused: dump a snapshot of it.
    Dump {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME or VOLUME@SNAPSHOT
        name: String,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Make a volume of what `dump` has written, from stdin
    Restore {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// The volume
        name: String,
        #[command(flatten)]
        kept: Kept,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Make a volume of an image, raw or qcow2, that nobody writes meanwhile
    ///
    /// What is zero in it takes no room. An image that needs others is refused: whoever made it may have named any file. So is
    /// one that is encrypted, that is compressed with zstd or has extended L2 entries, or of which the end is missing; snapshots
    /// inside an image are ignored. What another program's image begins with is taken for a disk with --as raw only.
    Import {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// The volume
        name: String,
        /// The image
        image: PathBuf,
        /// How it is laid out; what it begins with says so otherwise, which is what a guest has written if it is raw
        #[arg(long = "as", value_name = "LAYOUT")]
        layout: Option<Layout>,
        /// Keeps a checksum of each block; blocks are then never written in place
        #[arg(long)]
        checksums: bool,
        #[command(flatten)]
        kept: Kept,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Write a volume or a snapshot to a new image, raw or qcow2; durable when the command returns
    Export {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME or VOLUME@SNAPSHOT
        name: String,
        /// The image
        image: PathBuf,
        /// How it is laid out; otherwise qcow2 if its name ends so, or raw
        #[arg(long = "as", value_name = "LAYOUT")]
        layout: Option<Layout>,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Write a snapshot to stdout for `receive`, or what has changed since an older one
    ///
    /// What takes room is sent as it is in the volume: of a disk that a guest or a graph encrypts, what is encrypted.
    Send {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME@SNAPSHOT
        #[arg(value_parser = named)]
        of: Named,
        /// Only what has changed since this older snapshot, which the other side has
        #[arg(long, value_name = "SNAPSHOT")]
        from: Option<String>,
        /// What is left after this, which `stat` of the volume that is being received shows
        #[arg(long, value_name = "TOKEN")]
        resume: Option<Token>,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Make a volume of what `send` has written, or bring one up to it, from stdin
    ///
    /// Until all of it is there the volume cannot be served, but its snapshots can; what comes to an end early is gone on with by
    /// `send --resume`. The volume has a snapshot then that is the one that was sent.
    Receive {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// The volume
        name: String,
        #[command(flatten)]
        kept: Kept,
        /// Gives up what is half received: the volume is what its newest snapshot is, or gone if it has none
        #[arg(long)]
        abort: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Put what lies here and there in the pool in a row again, so that reading it in order is fast; guests go on
    ///
    /// Goes through the volume by 2 MiB, copies those that are in more pieces than one for each 256 KiB, and takes at most half of the time
    /// if a daemon serves the pool. What a snapshot or a clone sees, too, stays where it is. It may be interrupted; the next
    /// time it finds what is in order.
    #[command(after_help = "Examples:
  mason volume defrag vms.pool vm1
  mason volume defrag vms.pool vm1 --unshare     what snapshots see is copied, and takes room twice")]
    Defrag {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// The volume
        name: String,
        /// Copies what snapshots and clones see, too: it takes room, and `diff` and `send` call it changed
        #[arg(long)]
        unshare: bool,
        /// Writes one JSON object; sizes are in bytes
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Make holes of blocks that hold only zeros, which then take no room; guests go on
    ///
    /// Reads all that only this volume sees, at most half of the time if a daemon serves the pool. It may be interrupted.
    #[command(after_help = "Examples:
  mason volume trim vms.pool vm1")]
    Trim {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// The volume
        name: String,
        /// Writes one JSON object; sizes are in bytes
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
    /// Show what has changed in a volume since a snapshot: offset and length of each range
    Diff {
        /// The pool: a file, a block device, or the folder that holds the file
        pool: PathBuf,
        /// VOLUME@SNAPSHOT
        #[arg(value_parser = named)]
        since: Named,
        /// Up to this later snapshot, not until now
        #[arg(long, value_name = "SNAPSHOT")]
        until: Option<String>,
        /// Writes pairs of bytes as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        control: ControlArgs,
    },
}

/// How what is written to a new volume is kept.
#[derive(clap::Args)]
struct Kept {
    /// The format of its map: 2 takes next to no room for what is written in a row
    #[arg(long, default_value_t)]
    format: Format,
    /// How what is written is compressed, 32 KiB at a time: no, lz4 (fast) or zstd (small)
    #[arg(long, default_value_t)]
    compress: Compress,
}

impl Kept {
    fn settings(&self) -> Settings {
        Settings { format: self.format, compress: self.compress, ..Settings::default() }
    }
}

#[derive(clap::Args)]
struct Limits {
    /// Bytes of it that may hold data; 0: any
    #[arg(long)]
    quota: Option<Size>,
    /// Bytes that can be written since its newest snapshot, however full the pool is
    #[arg(long)]
    reserve: Option<Size>,
    /// What is left after a loss of power
    #[arg(long)]
    order: Option<Order>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Order {
    /// Of each block what was flushed, or what was written later
    Block,
    /// What the whole volume was at some instant since the last flush; blocks are then never written in place
    Prefix,
}

pub(crate) fn main(args: &Args) -> Outcome {
    let done =
        |pool: &Path, operation: Operation, control: &ControlArgs| ask(pool, &operation, control).map(drop);
    match &args.command {
        Command::Create { pool, name, size, checksums, kept, limits, control } => {
            let bytes = |size: Option<Size>| size.map_or(0, |size| size.0);
            let settings = Settings {
                checksums: *checksums,
                ordered: limits.order == Some(Order::Prefix),
                quota: bytes(limits.quota),
                reserve: bytes(limits.reserve),
                ..kept.settings()
            };
            done(pool, Operation::CreateVolume { name: name.clone(), size: size.0, settings }, control)
        }
        Command::Set {
            compress: None, limits: Limits { quota: None, reserve: None, order: None }, ..
        } => {
            let what = "give what is to change: --quota, --reserve, --order or --compress";
            Err(Failure::Usage(what.to_owned()))
        }
        Command::Set { pool, name, compress, limits, control } => {
            let settings = NewSettings {
                compress: *compress,
                ordered: limits.order.map(|order| order == Order::Prefix),
                quota: limits.quota.map(|size| size.0),
                reserve: limits.reserve.map(|size| size.0),
            };
            done(pool, Operation::Set { name: name.clone(), settings }, control)
        }
        Command::List { pool, long: true, control, .. } => history::list(&Pool::reach(pool, control)),
        Command::List { pool, json, control, .. } => {
            let found = ask(pool, &Operation::List, control)?;
            if *json { output::json(&found) } else { output::text(&pool::list(&found)) }
        }
        Command::Delete { pool, name, control } => {
            let operation = match named(name) {
                Ok(Named { volume, snapshot }) => Operation::DeleteSnapshot { volume, name: snapshot },
                Err(_) => Operation::DeleteVolume { name: name.clone() },
            };
            done(pool, operation, control)
        }
        Command::Snapshot { pool, names, control } => {
            let name = names.first().map(|first| first.snapshot.clone()).unwrap_or_default();
            tool::check_snapshot_name(&name).map_err(|error| Failure::from_error(&error))?;
            if names.iter().any(|other| other.snapshot != name) {
                return Err(Failure::Usage("snapshots that are taken together have one name".to_owned()));
            }
            let volumes = names.iter().map(|name| name.volume.clone()).collect();
            done(pool, Operation::Snapshot { volumes, name }, control)
        }
        Command::Hold { pool, name, control } => done(pool, hold(name, true), control),
        Command::Release { pool, name, control } => done(pool, hold(name, false), control),
        Command::Clone { pool, of, name, control } => {
            let Named { volume, snapshot } = of.clone();
            done(pool, Operation::Clone { volume, snapshot, name: name.clone() }, control)
        }
        Command::Rollback { pool, to, keep, control } => {
            let Named { volume, snapshot } = to.clone();
            done(pool, Operation::Rollback { volume, snapshot, keep: keep.clone() }, control)
        }
        Command::Promote { pool, name, control } => {
            done(pool, Operation::Promote { name: name.clone() }, control)
        }
        Command::Rename { pool, name, to, control } => {
            done(pool, Operation::Rename { name: name.clone(), to: to.clone() }, control)
        }
        Command::Resize { pool, name, size, control } => {
            done(pool, Operation::Resize { name: name.clone(), size: size.0 }, control)
        }
        Command::Stat { pool, name, history: true, json, control } => {
            history::show(&Pool::reach(pool, control), name, *json)
        }
        Command::Stat { pool, name, json, control, .. } => {
            let (volume, snapshot) = volume_of(name);
            let found = ask(pool, &Operation::Stat { volume: Some(volume), snapshot }, control)?;
            if *json { output::json(&found) } else { output::text(&stat(&found)) }
        }
        Command::Dump { pool, name, control } => {
            let (volume, snapshot) = volume_of(name);
            let from = Pool::reach(pool, control);
            dump::dump(&from, &volume, snapshot.as_deref(), BufWriter::new(std::io::stdout().lock()))
        }
        Command::Restore { pool, name, kept, control } => {
            dump::restore(&Pool::reach(pool, control), (name, kept.settings()), std::io::stdin().lock())
        }
        Command::Import { pool, name, image, layout, checksums, kept, control } => {
            let settings = Settings { checksums: *checksums, ..kept.settings() };
            image::import(&Pool::reach(pool, control), (name, settings), image, *layout)
        }
        Command::Export { pool, name, image, layout, control } => {
            let (volume, snapshot) = volume_of(name);
            image::export(&Pool::reach(pool, control), (&volume, snapshot.as_deref()), image, *layout)
        }
        Command::Send { pool, of, from, resume, control } => {
            if std::io::stdout().is_terminal() {
                return Err(Failure::Usage(
                    "a stream is nothing for a terminal: pipe it, or write it to a file".to_owned(),
                ));
            }
            let since = from.as_ref().map(|from| volume_of(from).1.unwrap_or_else(|| from.clone()));
            let wanted = Wanted { of, since: since.as_deref(), resume: resume.as_ref() };
            send::send(
                &Pool::reach(pool, control),
                &wanted,
                BufWriter::with_capacity(1 << 20, std::io::stdout().lock()),
            )
        }
        Command::Receive { pool, name, abort: true, control, .. } => {
            receive::abort(&Pool::reach(pool, control), name)
        }
        Command::Receive { pool, name, kept, control, .. } => receive::receive(
            &Pool::reach(pool, control),
            (name, kept.settings()),
            BufReader::with_capacity(1 << 20, std::io::stdin().lock()),
        ),
        Command::Defrag { pool, name, unshare, json, control } => {
            tidy::defrag(&Pool::reach(pool, control), name, *unshare, *json)
        }
        Command::Trim { pool, name, json, control } => tidy::trim(&Pool::reach(pool, control), name, *json),
        Command::Diff { pool, since, until, json, control } => {
            diff(pool, since, until.as_deref(), *json, control)
        }
    }
}

fn hold(name: &Named, held: bool) -> Operation {
    let Named { volume, snapshot } = name.clone();
    Operation::Hold { volume, name: snapshot, held }
}

/// A volume, or one of its snapshots.
fn volume_of(name: &str) -> (String, Option<String>) {
    match named(name) {
        Ok(Named { volume, snapshot }) => (volume, Some(snapshot)),
        Err(_) => (name.to_owned(), None),
    }
}

fn stat(found: &serde_json::Value) -> String {
    let line =
        |what: &str, key: &str| format!("{what:<22}{:>10}\n", Bytes(pool::number(&found[key])).to_string());
    let words = |what: &str, is: &str| format!("{what:<22}{is:>10}\n");
    let yes = |key: &str| if found[key] == true { "yes" } else { "no" };
    let mut said = line("size", "size");
    said += &line("data", "mapped");
    said += &line("shared with others", "shared");
    said += &line("freed if deleted", "freed_if_deleted");
    for (what, key) in [("quota", "quota"), ("reserve", "reserve")] {
        if found[key].as_u64().is_some_and(|bytes| bytes > 0) {
            said += &line(what, key);
        }
    }
    said += &words("order", if found["ordered"] == true { "prefix" } else { "block" });
    said += &words("checksums", yes("checksums"));
    let [data, takes] = ["data", "takes"].map(|key| pool::number(&found["compressed"][key]));
    if data > 0 {
        let size = |bytes: u64| Bytes(bytes).to_string();
        said += &words("compressed", &format!("{} in {}", size(data), size(takes)));
    }
    if found["compress"] != "no" {
        said += &words("compresses with", found["compress"].as_str().unwrap_or("?"));
    }
    match Token::of(&found["receiving"]) {
        Some(token) => said += &format!("being received, with the rest sent by --resume {token}\n"),
        None if found["receiving"].is_object() => {
            said += "what has been received is wrong: give it up with mason volume receive --abort\n";
        }
        None => {}
    }
    said + &words("format", found["format"].as_str().unwrap_or("1"))
}

fn diff(pool: &Path, since: &Named, until: Option<&str>, json: bool, control: &ControlArgs) -> Outcome {
    let operation = Operation::Diff {
        volume: since.volume.clone(),
        until: until.map(|until| volume_of(until).1.unwrap_or_else(|| until.to_owned())),
        since: Some(since.snapshot.clone()),
        number: None,
        since_number: None,
    };
    let found = ask(pool, &operation, control)?;
    if json {
        return output::json(&found);
    }
    let pair = |range: &serde_json::Value| Some((range[0].as_u64()?, range[1].as_u64()?));
    let ranges = found.as_array().into_iter().flatten().filter_map(pair);
    output::text(
        &ranges.map(|(offset, len)| format!("{} {}\n", Exact(offset), Exact(len))).collect::<String>(),
    )
}
