//! `mason backup`: the disk at one instant, while guests go on.

mod hook;

use crate::control::backing;
use crate::control::client::{Client, path};
use crate::control::find;
use crate::failure::{Failure, Outcome};
use crate::folders::{Folders, here};
use crate::jobs::{self, JobArgs};
use crate::output::{self, printable, printable_lines};
use crate::progress::{cells, watch};
use crate::units::{Bytes, Nanos, Seconds};
use crate::view::{BackupRequest, BackupState, BackupView};
use blockmason::lang::value::Time;
use std::path::PathBuf;

/// Back a disk up, as it is at one instant, while its guests use it.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = "Examples:
  mason backup vm1 Disk --to 'file (path /backup/vm1.img)'
  mason backup vm1 Disk --to 'file (path /backup/vm1.img)' --incremental
  mason backup vm1 Disk --to 'nbd_client (uri nbd://store2/vm1)' --rate 50M/s
  mason backup vm1 Disk --to 'file (path b.img)' --before 'ssh vm1 fsfreeze -f /' --after 'ssh vm1 fsfreeze -u /'
  mason backup status

The backup is the disk as it is when this command has paused its guests for a moment. From
then on what they write goes to an overlay in the state folder, which takes as much room
there as they change meanwhile; the disk below stands still and is copied. At the end,
whatever it is, the overlay is merged into the disk. No guest waits for the target.

An element ELEMENT_changes stays in the graph and keeps account of what has changed since,
so that the next backup can be incremental: it writes only that, to a target that has the
last backup, or to a `cow` above it. The target's head says which backup it has; another
one is refused.

The daemon does all this. When this command is interrupted the backup goes on, and `mason
backup abort` ends it; when the daemon ends, whatever ends it, the backup is given up, and
everything that guests have written is there at the next start. So it is with
`mason unload`.

A target that is there and large enough is overwritten; a file that is not there becomes
as large as the disk.")]
pub(crate) struct Args {
    #[command(subcommand)]
    what: Option<What>,

    #[command(flatten)]
    begin: BeginArgs,
}

#[derive(clap::Args)]
struct BeginArgs {
    /// The running graph's name, or the path of its file
    #[arg(required = true, value_name = "GRAPH")]
    graph: Option<String>,

    /// The element that is the disk
    #[arg(required = true, value_name = "ELEMENT")]
    element: Option<String>,

    /// Where the backup goes: a type and its parameters, or statements whose first element is it
    #[arg(long, value_name = "DISK", required = true)]
    to: Option<String>,

    /// Copies only what has changed since the last backup, which the target has
    #[arg(long)]
    incremental: bool,

    /// How fast it is copied at the most, 50M/s
    #[arg(long, value_name = "RATE")]
    rate: Option<String>,

    /// A command that is run before the instant, for 30 s at the most: it makes guests write what they hold
    #[arg(long, value_name = "COMMAND")]
    before: Option<String>,

    /// A command that is run right after it, whatever has come of it
    #[arg(long, value_name = "COMMAND")]
    after: Option<String>,

    /// How long the target may fail before the backup is given up
    #[arg(long, value_name = "TIME", default_value = "30s")]
    patience: Time,

    /// Writes the graph as it then runs into its file, so that account is kept of changes also after a restart
    #[arg(long)]
    save: bool,

    /// Overwrites a target whose head says that it is somebody's volume; with --incremental, writes to one that does not say
    /// that it has the last backup
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    shared: JobArgs,
}

#[derive(clap::Subcommand)]
enum What {
    /// Shows how far backups are
    Status(StatusArgs),
    /// Gives a backup up; one that waits for its end is tried again at once
    Abort(AbortArgs),
    /// Drops what was written to a disk while it was backed up, after the daemon has ended in the middle
    Discard(DiscardArgs),
}

#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason backup discard vm1.mason Disk --yes

What guests have written since that backup began is lost, for good, and the disk is as it
was then: for a disk that a backup is to be restored to. Else start the graph, which
merges it. No daemon may serve the graph.")]
struct DiscardArgs {
    /// The graph's file
    #[arg(value_name = "GRAPH")]
    graph: PathBuf,

    /// The disk
    #[arg(value_name = "ELEMENT")]
    element: String,

    /// Says that it is meant
    #[arg(long)]
    yes: bool,

    /// Keeps state here [default: as `mason run`]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

#[derive(clap::Args)]
struct StatusArgs {
    /// The graph's name, or the path of its file [default: all]
    #[arg(value_name = "GRAPH")]
    graph: Option<String>,

    #[command(flatten)]
    shared: JobArgs,
}

#[derive(clap::Args)]
struct AbortArgs {
    /// The graph's name, or the path of its file
    #[arg(value_name = "GRAPH")]
    graph: String,

    /// The disk
    #[arg(value_name = "ELEMENT")]
    element: String,

    #[command(flatten)]
    shared: JobArgs,
}

pub(crate) fn main(args: &Args) -> Outcome {
    match &args.what {
        None => begin(&args.begin),
        Some(What::Status(args)) => status(args),
        Some(What::Abort(args)) => abort(args),
        Some(What::Discard(args)) => discard(args),
    }
}

fn discard(args: &DiscardArgs) -> Outcome {
    if !args.yes {
        let lost = "what guests have written since the backup began would be lost: say --yes as well";
        return Err(Failure::new(format!("{}: {lost}", args.element)));
    }
    let state = Folders::find(args.state.as_deref()).state;
    let state = state.ok_or_else(|| {
        Failure::new("there is no folder for state: give one with --state DIR, or set HOME")
    })?;
    let unknown = |error| Failure::new(format!("{}: {error}", args.graph.display()));
    let file = args.graph.canonicalize().map_err(unknown)?;
    backing::discard(&state, &file, &args.element)?;
    output::text(&format!("{} is as it was when its backup began\n", args.element))
}

fn begin(args: &BeginArgs) -> Outcome {
    let (client, _) = args.shared.control.connect()?;
    let graph = find::graph(&client, args.graph.as_deref())?;
    let folder = here()?;
    let request = BackupRequest {
        element: args.element.clone().unwrap_or_default(),
        to: args.to.clone().unwrap_or_default(),
        folder,
        incremental: args.incremental,
        rate: args.rate.clone(),
        force: args.force,
        save: args.save,
        patience_seconds: Some(args.patience.0.as_secs_f64()),
    };
    let at = path(&["v1", "graphs", &graph.name, "backups"]);
    let (begun, after) = between(args, || client.post::<BackupView>(&at, &request));
    if let Err(failure) = &after {
        eprintln!("mason: {failure}");
    }
    let begun = begun?;
    let name = format!("{} {}", begun.graph, begun.element);
    let goes_on = format!("the backup of {name} goes on; `mason backup abort {name}` ends it");
    hook::say_when_interrupted(printable(&goes_on));
    end(&follow(&client, begun)?, &args.shared)?;
    after.map_err(|_| Failure::Said)
}

/// Does it after the one command has succeeded, and then the other one, whatever has come of it.
fn between<T>(args: &BeginArgs, body: impl FnOnce() -> Outcome<T>) -> (Outcome<T>, Outcome) {
    let waits = hook::outlive_interrupts();
    let before = args.before.as_ref().map_or(Ok(()), |command| hook::run("--before", command));
    let before = before.and_then(|()| waits.go_on());
    let done = before.and_then(|()| body());
    (done, args.after.as_ref().map_or(Ok(()), |command| hook::run("--after", command)))
}

fn follow(client: &Client, begun: BackupView) -> Outcome<BackupView> {
    let at = path(&["v1", "graphs", &begun.graph, "backups", &begun.element]);
    watch(begun, || client.get(&at), |view| view.state.is_over(), line)
}

fn end(last: &BackupView, shared: &JobArgs) -> Outcome {
    if shared.json {
        output::json(last)?;
    } else {
        output::text(&(sentence(last) + "\n"))?;
    }
    if last.state == BackupState::Failed { Err(Failure::Said) } else { Ok(()) }
}

fn status(args: &StatusArgs) -> Outcome {
    let (client, _) = args.shared.control.connect()?;
    let all: Vec<BackupView> = jobs::list(&client, args.graph.as_deref(), "backups")?;
    if args.shared.json {
        return output::json(&all);
    }
    if all.is_empty() {
        return output::text("no disk is being backed up\n");
    }
    output::text(&all.iter().map(|view| sentence(view) + "\n").collect::<String>())
}

fn abort(args: &AbortArgs) -> Outcome {
    let (client, _) = args.shared.control.connect()?;
    let graph = find::graph(&client, Some(&args.graph))?.name;
    let asked = client.post(&path(&["v1", "graphs", &graph, "backups", &args.element, "abort"]), &())?;
    let last = follow(&client, asked)?;
    if args.shared.json { output::json(&last) } else { output::text(&(sentence(&last) + "\n")) }
}

/// How far a backup is, in a line.
fn sentence(view: &BackupView) -> String {
    let name = format!("{} {}: {}", view.graph, view.element, view.state.name());
    let how_far = match view.state {
        BackupState::Copying => {
            let done = view.total.saturating_sub(view.remaining);
            format!(", {} of {}, {}/s", Bytes(done), Bytes(view.total), Bytes(view.rate))
        }
        BackupState::Merging => String::new(),
        BackupState::Done | BackupState::Failed => format!(
            " in {}, {} copied, requests waited for {}",
            Seconds(view.seconds),
            Bytes(view.copied),
            Nanos((view.pause_seconds * 1e9) as u64)
        ),
    };
    let message = if view.message.is_empty() { String::new() } else { format!("; {}", view.message) };
    printable_lines(&format!("{name}{how_far}{message}"))
}

fn line(view: &BackupView, bar: bool) -> String {
    let done = view.total.saturating_sub(view.remaining);
    let bar = if bar { cells(done, view.total) + " " } else { String::new() };
    let mut line = format!("{bar}{} {} of {}", view.state.name(), Bytes(done), Bytes(view.total));
    if view.state == BackupState::Copying && view.rate > 0 {
        let left = Seconds(view.remaining as f64 / view.rate as f64);
        line += &format!(", {}/s, {} left, about {left}", Bytes(view.rate), Bytes(view.remaining));
    }
    if !view.message.is_empty() {
        line += &format!("; {}", view.message);
    }
    printable(&line)
}
