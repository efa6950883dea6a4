//! `mason bucket`: disks in buckets, served or not.

use crate::failure::{Failure, Outcome};
use crate::output::{self, printable};
use crate::progress::lines;
use crate::units::{Bytes, Exact, Stamp};
use blockmason::lang::value::{Size, Uri};
use blockmason_elements::cloud::tool::{self, Place};
use serde_json::Value;
use std::path::PathBuf;

/// Make disks in buckets of S3, look at them, check them.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason bucket create s3://vms/vm1 --size 100G
  mason bucket create s3://vms/vm1 --size 100G --endpoint https://s3.example.org --credentials keys
  mason bucket check s3://vms/vm1 && echo sound
  mason bucket grow s3://vms/vm1 --size 200G
  mason bucket backup s3://vms/vm1 s3://backup/vm1 --keep-daily 7 --keep-weekly 8
  mason bucket points s3://backup/vm1
  mason bucket restore s3://backup/vm1 s3://vms/vm1-again --point 3
  mason bucket copy s3://vms/vm1 s3://vms/vm2

The keys are in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), in ~/.aws/credentials, in the file
that --credentials names, or are those of the machine's role.")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make a disk where there is none
    Create {
        #[command(flatten)]
        volume: Volume,
        /// Bytes of the disk
        #[arg(long)]
        size: Size,
        /// Makes the bucket first, if it is not there
        #[arg(long)]
        make_bucket: bool,
        #[command(flatten)]
        making: Making,
    },
    /// Show what a disk in a bucket is, who has it open, and what it costs to keep
    Stat(Volume),
    /// Look at every object by listing them: exits with 1 if anything is missing
    Check {
        #[command(flatten)]
        volume: Volume,
        /// Deletes what nothing leads to: what a host had put when it died. Nobody may have the disk open
        #[arg(long)]
        delete_stray: bool,
        /// Says what it will cost, and does nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Say that the host that has a disk open is dead, and what its caches have is lost, so that another one may open it
    ///
    /// If that host lives, its disk fails from then on. A process of this host that lives is left alone without --force. What a cache has
    /// that the bucket has not is given up, also where nobody has the disk open.
    Take {
        #[command(flatten)]
        volume: Volume,
        /// Even if a process of this host has it open, and lives
        #[arg(long)]
        force: bool,
    },
    /// Make a disk larger that nobody has open: what is new reads as zeros
    Grow {
        #[command(flatten)]
        volume: Volume,
        /// Bytes that the disk is to have
        #[arg(long)]
        size: Size,
    },
    /// Delete a disk, a backup, or what a restore has left that did not end
    Delete {
        #[command(flatten)]
        volume: Volume,
        /// Even if another host has it open, or it is damaged
        #[arg(long)]
        force: bool,
        /// Says what would go, and deletes nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Copy a disk that nobody has open
    Copy {
        #[command(flatten)]
        volume: Volume,
        #[command(flatten)]
        to: Target,
        #[command(flatten)]
        making: Making,
    },
    /// Back a disk up, which may be in use: adds a point in time to a backup, or begins one
    ///
    /// The point is what the bucket has: what a cache above still holds is not in it. Only objects that the backup lacks are
    /// copied, as they are: what is encrypted stays so. Points that nothing says to keep are deleted once the new one is there;
    /// without any --keep all of them stay.
    Backup {
        #[command(flatten)]
        volume: Volume,
        #[command(flatten)]
        to: Target,
        #[command(flatten)]
        keep: Keep,
        /// Whoever was at work on the backup is dead
        #[arg(long)]
        take: bool,
    },
    /// List the points in time of a backup
    Points(Volume),
    /// Delete points in time of a backup, and what only they lead to
    #[command(after_help = "Examples:
  mason bucket prune s3://backup/vm1 --keep-daily 7 --keep-weekly 8 --keep-monthly 12
  mason bucket prune s3://backup/vm1 --point 3 --dry-run")]
    #[command(group = clap::ArgGroup::new("which").required(true).multiple(true).args([
        "keep", "keep_daily", "keep_weekly", "keep_monthly", "point"
    ]))]
    Prune {
        #[command(flatten)]
        volume: Volume,
        #[command(flatten)]
        keep: Keep,
        /// Deletes this one, too; may be given more than once
        #[arg(long)]
        point: Vec<u64>,
        /// Whoever was at work on the backup is dead
        #[arg(long)]
        take: bool,
        /// Says what would go, and deletes nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// Make a disk of a backup, where there is none
    Restore {
        #[command(flatten)]
        volume: Volume,
        #[command(flatten)]
        to: Target,
        /// The point in time, as `mason bucket points` numbers them; the newest without it
        #[arg(long)]
        point: Option<u64>,
        /// Goes on where the store ignores `If-None-Match`: two hosts that open the disk then destroy it
        #[arg(long)]
        unsafe_no_fencing: bool,
    },
}

/// Which points of a backup stay. The newest does in any case.
#[derive(clap::Args)]
struct Keep {
    /// Keeps so many of the newest
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Keeps the newest of each of so many days (of UTC) that have any
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    keep_daily: Option<u32>,
    /// The same of weeks
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    keep_weekly: Option<u32>,
    /// The same of months
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    keep_monthly: Option<u32>,
}

impl Keep {
    fn rules(&self) -> tool::Keep {
        tool::Keep {
            last: self.keep,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
        }
    }
}

/// Another place. Where nothing is said, what is said of the first one holds.
#[derive(clap::Args)]
struct Target {
    /// Where to: s3://BUCKET/PREFIX
    to: Url,
    /// The server there, if it is another one
    #[arg(long)]
    to_endpoint: Option<Uri>,
    /// The region there
    #[arg(long)]
    to_region: Option<String>,
    /// The file of keys for it
    #[arg(long)]
    to_credentials: Option<PathBuf>,
    /// The profile in it
    #[arg(long)]
    to_profile: Option<String>,
    /// Certificates to trust there, as PEM
    #[arg(long)]
    to_ca: Option<PathBuf>,
}

impl Target {
    fn place(&self, from: Place) -> Place {
        Place {
            bucket: self.to.bucket.clone(),
            prefix: self.to.prefix.clone(),
            endpoint: self.to_endpoint.as_ref().map(|uri| uri.as_str().to_owned()).or(from.endpoint),
            region: self.to_region.clone().unwrap_or(from.region),
            by_path: from.by_path,
            credentials: self.to_credentials.clone().or(from.credentials),
            profile: self.to_profile.clone().or(from.profile),
            ca: self.to_ca.clone().or(from.ca),
        }
    }

    fn name(&self) -> String {
        self.to.to_string()
    }
}

#[derive(clap::Args)]
struct Making {
    /// Bytes of an object, 4k to 16M: large ones cost fewer requests, small ones less for small writes
    #[arg(long)]
    block: Option<Size>,
    /// Goes on where the store ignores `If-None-Match`: two hosts that open the disk then destroy it
    #[arg(long)]
    unsafe_no_fencing: bool,
}

/// The size of an object where none is named.
const BLOCK: u64 = 1 << 20;

#[derive(clap::Args)]
struct Volume {
    /// The disk: s3://BUCKET/PREFIX
    url: Url,
    /// The server; Amazon's without one
    #[arg(long)]
    endpoint: Option<Uri>,
    /// The region that requests are signed for
    #[arg(long, default_value = "us-east-1")]
    region: String,
    /// Where the bucket's name goes: into the path of a URL, the default where there is an endpoint, or into the host's name
    #[arg(long)]
    addressing: Option<Addressing>,
    /// A file of keys, in the form of ~/.aws/credentials
    #[arg(long)]
    credentials: Option<PathBuf>,
    /// The profile in it
    #[arg(long)]
    profile: Option<String>,
    /// Certificates to trust, as PEM
    #[arg(long)]
    ca: Option<PathBuf>,
    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Addressing {
    Path,
    Host,
}

/// A bucket and what keys begin with.
#[derive(Clone, Debug)]
struct Url {
    bucket: String,
    prefix: String,
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "s3://{}/{}", self.bucket, self.prefix)
    }
}

impl std::str::FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Url, String> {
        let wrong = || format!("expected s3://BUCKET/PREFIX, as in s3://vms/vm1, found `{text}`");
        let rest = text.strip_prefix("s3://").ok_or_else(wrong)?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(wrong());
        }
        Ok(Url { bucket: bucket.to_owned(), prefix: prefix.trim_matches('/').to_owned() })
    }
}

impl Volume {
    fn place(&self) -> Place {
        Place {
            bucket: self.url.bucket.clone(),
            prefix: self.url.prefix.clone(),
            endpoint: self.endpoint.as_ref().map(|uri| uri.as_str().to_owned()),
            region: self.region.clone(),
            by_path: self.addressing.map(|addressing| matches!(addressing, Addressing::Path)),
            credentials: self.credentials.clone(),
            profile: self.profile.clone(),
            ca: self.ca.clone(),
        }
    }

    fn name(&self) -> String {
        self.url.to_string()
    }

    fn say(&self, found: &Value, text: impl FnOnce(&Value) -> String) -> Outcome {
        if self.json { output::json(found) } else { output::text(&text(found)) }
    }
}

fn failed(error: blockmason::Error) -> Failure {
    Failure::from_error(&error)
}

pub(crate) fn main(args: &Args) -> Outcome {
    match &args.command {
        Command::Create { volume, size, make_bucket, making } => {
            if *make_bucket {
                tool::make_bucket(&volume.place()).map_err(failed)?;
            }
            let block = making.block.map_or(BLOCK, |block| block.0);
            let made =
                tool::create(&volume.place(), size.0, block, !making.unsafe_no_fencing).map_err(failed)?;
            volume.say(&made, |_| format!("{}: {}\n", volume.name(), Exact(size.0)))
        }
        Command::Stat(volume) => {
            let found = tool::stat(&volume.place()).map_err(failed)?;
            volume.say(&found, stat)
        }
        Command::Check { volume, delete_stray, dry_run } => check(volume, *delete_stray, *dry_run),
        Command::Take { volume, force } => {
            let taken = tool::take(&volume.place(), *force).map_err(failed)?;
            volume.say(&taken, |taken| {
                let caches =
                    caches(taken).map(|cache| format!("given up: what only the cache {cache} has\n"));
                let said = match taken["host"].as_str() {
                    Some(host) => format!("taken from {}; any host may open it\n", printable(host)),
                    None => "nobody had it; any host may open it\n".to_owned(),
                };
                caches.collect::<String>() + &said
            })
        }
        Command::Grow { volume, size } => {
            let done = tool::grow(&volume.place(), size.0).map_err(failed)?;
            volume.say(&done, |done| {
                let (before, size) = (Exact(number(&done["before"])), Exact(number(&done["size"])));
                format!("{}: {size}, {before} before\n", volume.name())
            })
        }
        Command::Delete { volume, force, dry_run } => {
            let gone = tool::delete(&volume.place(), *force, *dry_run).map_err(failed)?;
            volume.say(&gone, |gone| {
                let what = match gone["what"].as_str() {
                    Some("volume") => "the disk, ",
                    Some("backup") => "the backup, ",
                    _ => "",
                };
                let done = if *dry_run { "would be" } else { "are" };
                format!("{what}{} objects {done} deleted\n", gone["objects"])
            })
        }
        Command::Copy { volume, to, making } => copy(volume, to, making),
        Command::Backup { volume, to, keep, take } => backup(volume, to, keep, *take),
        Command::Points(volume) => {
            let found = tool::points(&volume.place()).map_err(failed)?;
            volume.say(&found, points)
        }
        Command::Prune { volume, keep, point, take, dry_run } => {
            let gone = tool::prune(&volume.place(), keep.rules(), point, *take, *dry_run).map_err(failed)?;
            volume.say(&gone, pruned)
        }
        Command::Restore { volume, to, point, unsafe_no_fencing } => {
            restore(volume, to, *point, !unsafe_no_fencing)
        }
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn dollars(value: &Value) -> String {
    format!("{:.4} $", value.as_f64().unwrap_or(0.0))
}

/// The caches that may have more than the bucket.
fn caches(found: &Value) -> impl Iterator<Item = String> + '_ {
    found["caches"].as_array().into_iter().flatten().filter_map(|cache| cache.as_str()).map(printable)
}

fn stat(found: &Value) -> String {
    let line = |what: &str, value: String| format!("{what:<18}{value:>12}\n");
    let mut said = line("size", Exact(number(&found["size"])).to_string());
    said += &line("object size", Bytes(number(&found["block"])).to_string());
    said += &line("objects", number(&found["objects"]).to_string());
    said += &line("in objects", Bytes(number(&found["bytes"])).to_string());
    let commits = Bytes(number(&found["commit_bytes"]));
    said += &line("in commits", format!("{commits} ({})", number(&found["commits"])));
    said += &line("costs a month", dollars(&found["month"]));
    if found["backup"] != true {
        said += &line("opened", format!("{} times", number(&found["epoch"])));
    }
    if found["fenced"] == false {
        said += "the store ignores conditions: nothing keeps two hosts from destroying it\n";
    }
    if found["backup"] == true {
        return said + "it is a backup\n";
    }
    for cache in caches(found) {
        said += &format!("the cache {cache} may have changes that are not here\n");
    }
    match (found["open"].as_bool(), found["host"].as_str()) {
        (Some(true), Some(host)) => {
            let since = Stamp(number(&found["since"]) as f64);
            said + &format!(
                "open on {}, process {}, since {since}\n",
                printable(host),
                number(&found["process"])
            )
        }
        _ => said + "nobody has it open\n",
    }
}

fn check(volume: &Volume, delete_stray: bool, dry_run: bool) -> Outcome {
    let cost = tool::cost_of_check(&volume.place()).map_err(failed)?;
    let said = format!("{} listings, about {}\n", cost["lists"], dollars(&cost["dollars"]));
    if dry_run {
        return volume.say(&cost, |_| said);
    }
    if !volume.json {
        output::text(&said)?;
    }
    let found = tool::check(&volume.place(), delete_stray).map_err(failed)?;
    let lines = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().filter_map(|line| line.as_str()).map(printable).collect()
    };
    let (problems, dangers) = (lines(&found["problems"]), lines(&found["dangers"]));
    volume.say(&found, |found| {
        let mut said: String = problems.iter().map(|problem| format!("{problem}\n")).collect();
        said += &dangers.iter().map(|danger| format!("danger: {danger}\n")).collect::<String>();
        said += &format!("{} objects, {}", found["objects"], Bytes(number(&found["bytes"])));
        if number(&found["stray"]) > 0 {
            let done = if delete_stray { "deleted" } else { "that nothing leads to: --delete-stray" };
            said += &format!("; {} with {} {done}", found["stray"], Bytes(number(&found["stray_bytes"])));
        }
        said + "\n"
    })?;
    match problems.len() {
        0 => Ok(()),
        1 => Err(Failure::new(format!("{}: one thing is not as it should be", volume.name()))),
        count => Err(Failure::new(format!("{}: {count} things are not as they should be", volume.name()))),
    }
}

fn copy(volume: &Volume, to: &Target, making: &Making) -> Outcome {
    let target = to.place(volume.place());
    let block = making.block.map(|block| block.0);
    let progress = |done: u64, of: u64| tracing::info!("{} of {} looked at", Bytes(done), Bytes(of));
    let done =
        tool::copy(&volume.place(), &target, block, !making.unsafe_no_fencing, progress).map_err(failed)?;
    volume.say(&done, |done| format!("{}: {} copied\n", to.name(), Bytes(number(&done["bytes"]))))
}

fn backup(volume: &Volume, to: &Target, keep: &Keep, take: bool) -> Outcome {
    let target = to.place(volume.place());
    let done =
        tool::backup(&volume.place(), &target, keep.rules(), take, lines("objects")).map_err(failed)?;
    volume.say(&done, |done| {
        let (point, name) = (number(&done["point"]), to.name());
        let (copied, bytes) = (number(&done["objects"]), Bytes(number(&done["bytes"])));
        let (kept, deleted) = (number(&done["kept"]), number(&done["deleted"]));
        format!(
            "{name}: point {point}, {copied} objects copied, {bytes}; {kept} were there; {deleted} deleted\n"
        )
    })?;
    let problems = done["problems"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let problems: Vec<String> = problems.map(printable).collect();
    if problems.is_empty() {
        return Ok(());
    }
    let message = "the new point is whole, but not all that was there before is";
    Err(Failure::new(format!("{}: {message}:\n{}", to.name(), problems.join("\n"))))
}

fn points(found: &Value) -> String {
    let points = found["points"].as_array().map_or(&[][..], |points| points);
    if points.is_empty() {
        return "no point yet: the backup was never completed\n".to_owned();
    }
    let mut said = format!("{:>5}  {:<24} {:>8} {:>8} {:>8}\n", "point", "made", "size", "stored", "own");
    for point in points {
        let bytes = |what: &str| Bytes(number(&point[what])).to_string();
        said += &format!(
            "{:>5}  {:<24} {:>8} {:>8} {:>8}\n",
            number(&point["point"]),
            Stamp(number(&point["time"]) as f64).to_string(),
            bytes("size"),
            bytes("bytes"),
            bytes("own")
        );
    }
    said
}

fn pruned(gone: &Value) -> String {
    let points: Vec<String> =
        gone["pruned"].as_array().into_iter().flatten().map(|point| point.to_string()).collect();
    let (objects, bytes) = (number(&gone["objects"]), Bytes(number(&gone["bytes"])));
    let done = if gone["dry"] == true { "would be" } else { "are" };
    match &points[..] {
        [] => "all points stay\n".to_owned(),
        [point] => format!("point {point} with {objects} objects and {bytes} {done} deleted\n"),
        _ => format!("points {} with {objects} objects and {bytes} {done} deleted\n", points.join(", ")),
    }
}

fn restore(volume: &Volume, to: &Target, point: Option<u64>, fenced: bool) -> Outcome {
    let done = tool::restore(&volume.place(), &to.place(volume.place()), point, fenced, lines("objects"))
        .map_err(failed)?;
    volume.say(&done, |done| {
        let (point, time) = (number(&done["point"]), Stamp(number(&done["time"]) as f64));
        let (size, bytes) = (Exact(number(&done["size"])), Bytes(number(&done["bytes"])));
        format!("{}: {size}, {bytes} copied; point {point} of {time}\n", to.name())
    })
}
