//! `mason restore`: copies a backup to a disk that nobody serves, in this process.

mod heads;

use crate::control::moving::Target;
use crate::failure::{Failure, Outcome};
use crate::folders::{Folders, here};
use crate::graphs::CATALOGUE;
use crate::output::{self, printable, printable_lines};
use crate::places::in_words;
use crate::progress::{cells, watch};
use crate::units::{Bytes, Seconds};
use blockmason::describe::{Catalogue, ElementType, Family};
use blockmason::graph::build::Builder;
use blockmason::lang::value::{Rate, Size};
use blockmason::lang::{Defines, NoFiles, Spec, parse_checked};
use blockmason::sched::HostConfig;
use blockmason::{Disk, Host, rt};
use blockmason_elements::migrate::copy::Progress;
use heads::Overwritten;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Copy a backup to a disk that no daemon serves.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason restore --from 'file (path /backup/vm1.img)' --to 'file (path vm1.img)'
  mason restore --from 'file (path /backup/vm1.img)' --to 'nbd_client (uri nbd://store2/vm1)' --verify

A disk is a type and its parameters, or statements of a graph whose first element is it.
Both must not be in use, and the one at --to at least as large; its bytes behind the end
of the backup stay as they are. A file that is not there becomes as large as the backup.

A disk at --to that may hold something is overwritten with --force only. Until the end it
is marked as half restored, and served by nobody. Account that was kept of its changes
ends: the next `mason backup` is to be a full one.

Returns when everything has been flushed.")]
pub(crate) struct Args {
    /// The backup
    #[arg(long, value_name = "DISK")]
    from: String,

    /// The disk that becomes as the backup is
    #[arg(long, value_name = "DISK")]
    to: String,

    /// Overwrites what is there, and restores also a backup that is not complete
    #[arg(long)]
    force: bool,

    /// How fast it is copied at the most, 50M/s
    #[arg(long, value_name = "RATE")]
    rate: Option<Rate>,

    /// Compares both at the end
    #[arg(long)]
    verify: bool,

    /// Keeps state here [default: as `mason run`]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

/// What the graph is called.
const NAME: &str = "restore";

/// What the copier is called, and the disks that have no names of their own.
const COPY: &str = "restore_copy";
const FROM: &str = "restore_from";
const TO: &str = "restore_to";

/// The copier is what uses the disks here: a graph that nobody uses is refused.
static COPIER: ElementType =
    ElementType { family: Family::Export, ..blockmason_elements::migrate::copy::TYPE };

/// The table of types with that.
fn catalogue() -> Catalogue {
    static ALL: OnceLock<Vec<&'static ElementType>> = OnceLock::new();
    let copier = |ty: &&'static ElementType| if ty.name == COPIER.name { &COPIER } else { *ty };
    ALL.get_or_init(|| CATALOGUE.iter().map(copier).collect())
}

/// Both disks, as they were asked for.
struct Disks {
    from: Target,
    to: Target,
    /// Where relative paths start.
    here: PathBuf,
}

/// What has been done.
#[derive(Serialize)]
struct Report {
    total: u64,
    copied: u64,
    skipped: u64,
    verified: Option<u64>,
    seconds: f64,
}

pub(crate) fn main(args: &Args) -> Outcome {
    let here = here()?;
    let state = Folders::find(args.state.as_deref()).state;
    let state = state.ok_or_else(|| {
        Failure::new("there is no folder for state: give one with --state DIR, or set HOME")
    })?;
    let disks = Disks { from: Target::new(&args.from), to: Target::new(&args.to), here };
    let since = rt::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(Failure::new)?;
    let host = runtime.block_on(async { Host::start(HostConfig::new(state)) });
    let host = host.map_err(|error| Failure::from_error(&error))?;
    let spec = disks.graph(&host, args.rate)?;
    let failed = |error| disks.failed(Failure::in_graph(&error, &spec));
    let graph = disks.build(&host, &spec)?;
    let overwritten = Overwritten::of(&disks, &spec, &graph, args.force)?;
    overwritten.begin().inspect_err(|_| overwritten.take_back())?;
    let disk = runtime.block_on(Disk::serve(&host, Arc::new(graph))).map_err(failed);
    let disk = disk.inspect_err(|_| overwritten.take_back())?;
    let copied = copy(&disk, args.verify);
    // What has been copied is flushed; an error of the copy says more than one of the end.
    let stopped = runtime.block_on(disk.stop()).map_err(failed);
    let last = copied.map_err(|failure| disks.failed(failure))?;
    stopped?;
    overwritten.complete()?;
    let report = Report {
        total: last.total,
        copied: last.copied,
        skipped: last.skipped,
        verified: args.verify.then_some(last.verified),
        seconds: (rt::now() - since).as_secs_f64(),
    };
    if args.json { output::json(&report) } else { output::text(&(report.sentence() + "\n")) }
}

impl Disks {
    fn build(&self, host: &Host, spec: &Spec) -> Outcome<blockmason::Graph> {
        let builder = Builder {
            catalogue: catalogue(),
            name: NAME,
            state_dir: host.state_dir(),
            shards: host.shards(),
        };
        builder.build(spec).map_err(|error| self.failed(Failure::in_graph(&error, spec)))
    }

    /// A failure in the words of the command line: nobody has written the graph.
    fn failed(&self, failure: Failure) -> Failure {
        let Failure::Failed(message) = failure else { return failure };
        let message = message.replace(&format!("{COPY} ({NAME}:"), &format!("({NAME}:"));
        let lines = self.from.statements(FROM).lines().count();
        let side = |line| if line <= lines { "--from" } else { "--to" };
        let message = in_words(&message, NAME, side);
        let message =
            message.replace(&format!("{FROM} (--from)"), "--from").replace(&format!("{TO} (--to)"), "--to");
        let to = self.to.text();
        let message = message.replace("(--to): the disk at `to`", to).replace("the disk at `to`", to);
        let from = |message: String, is: &str| message.replace(is, self.from.text());
        Failure::Failed(from(from(message, "the disk at `from`"), "that at `from`"))
    }

    /// A copier from one to the other.
    fn graph(&self, host: &Host, rate: Option<Rate>) -> Outcome<Spec> {
        let rate = rate.map(|rate| format!("(rate {rate})")).unwrap_or_default();
        let to = self.to.top(TO);
        let mut spec = self.parse(&self.to.statements(TO), &to, &rate)?;
        let new = spec.find(&to).filter(|ix| spec.elements[*ix].ty == "file");
        if let Some(ix) = new
            && is_missing(&spec, ix)
        {
            let size = Size(self.size(host)?).to_string();
            spec.elements[ix].params.set("size", &size);
        }
        Ok(spec)
    }

    /// Bytes of the backup.
    fn size(&self, host: &Host) -> Outcome<u64> {
        let endless = format!("element {TO} (type null) (size {})\n", 1_u64 << 60);
        let graph = self.build(host, &self.parse(&endless, TO, "")?)?;
        let node = graph.node(&self.from.top(FROM));
        Ok(node.map_or(0, |node| graph.geometry(node).size))
    }

    fn parse(&self, to: &str, top: &str, rate: &str) -> Outcome<Spec> {
        let text = format!(
            "{}\n{to}\nelement {COPY} (type copy) (frozen yes) {rate}\n({COPY}, from) -> {}\n({COPY}, to) -> {top}\n",
            self.from.statements(FROM),
            self.from.top(FROM)
        );
        let (name, opened) = (Path::new(NAME), self.here.join("restore.mason"));
        let parsed = parse_checked(&NoFiles, name, opened, text, &Defines::new(), catalogue());
        parsed.map_err(|diagnostics| self.failed(Failure::new(diagnostics.first_line())))
    }
}

/// True for a file that is not there and of which nobody has said how large it is.
fn is_missing(spec: &Spec, ix: usize) -> bool {
    let params = &spec.elements[ix].params;
    let path = params.get("path").and_then(|values| values.first());
    params.get("size").is_none() && path.is_some_and(|path| !path.folder().join(path.text()).exists())
}

/// Waits until everything is copied and flushed, and compared if that is wanted.
fn copy(disk: &Arc<Disk>, verify: bool) -> Outcome<Progress> {
    let ask = || {
        let told = disk.graph().get(COPY, "progress").map_err(|error| Failure::from_error(&error))?;
        serde_json::from_str::<Progress>(&told).map_err(Failure::new)
    };
    let over = |progress: &Progress| matches!(&*progress.state, "clean" | "waiting" | "differs");
    let copied = watch(ask()?, ask, over, line)?;
    let well = |progress: Progress| match &*progress.state {
        "clean" => Ok(progress),
        // It is not tried again.
        _ => Err(Failure::new(printable_lines(
            progress.error.split("; tried again").next().unwrap_or_default(),
        ))),
    };
    let copied = well(copied)?;
    if !verify {
        return Ok(copied);
    }
    disk.graph().call(COPY, "verify", "").map_err(|error| Failure::from_error(&error))?;
    let compared = well(watch(ask()?, ask, over, line)?)?;
    // One that has ended early says why.
    match compared.verified == compared.total {
        true => Ok(compared),
        false => Err(Failure::new(printable_lines(&compared.error))),
    }
}

fn line(progress: &Progress, bar: bool) -> String {
    let done = match &*progress.state {
        "verifying" => progress.verified,
        _ => progress.total.saturating_sub(progress.remaining),
    };
    let bar = if bar { cells(done, progress.total) + " " } else { String::new() };
    let rate =
        if progress.rate_now > 0 { format!(", {}/s", Bytes(progress.rate_now)) } else { String::new() };
    printable(&format!("{bar}{} {} of {}{rate}", progress.state, Bytes(done), Bytes(progress.total)))
}

impl Report {
    fn sentence(&self) -> String {
        let (total, copied, seconds) = (Bytes(self.total), Bytes(self.copied), Seconds(self.seconds));
        let verified = if self.verified.is_some() { ", and both are alike" } else { "" };
        format!("restored: {total} in {seconds}, {copied} of data{verified}")
    }
}
