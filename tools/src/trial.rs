//! `mason try`, `mason commit` and `mason discard`: a graph on trial.

use crate::control::client::{Client, path};
use crate::control::find;
use crate::failure::{Failure, Outcome};
use crate::graphs::DefineArgs;
use crate::output;
use crate::reload::{ChangeArgs, read, summary};
use crate::units::Bytes;
use crate::view::{ChangeView, HandlerView};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Duration;

/// Run another graph over copies on write: its disks stay as they are until it is kept.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason try new.mason --graph vm1
  mason commit --graph vm1        keeps what was written meanwhile
  mason discard --graph vm1       goes back to the instant of `mason try`

Every disk of the graph gets an overlay in the state folder, as large as what is written. Until it is kept or
given up, the graph cannot be changed otherwise. If the daemon ends meanwhile, `mason run --as-left` goes on
with the trial.")]
pub(crate) struct TryArgs {
    /// The graph file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    #[command(flatten)]
    defines: DefineArgs,

    #[command(flatten)]
    change: ChangeArgs,
}

/// Keep a graph that is being tried, with what was written.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason commit
  mason commit --graph vm1 --save

Everything that was written is merged into the disks while clients go on; then the overlays are taken out.
It goes on when this command is interrupted; after a failure or a crash, `mason commit` goes on where it was.")]
pub(crate) struct CommitArgs {
    #[command(flatten)]
    change: ChangeArgs,
}

/// Give up a graph that is being tried, and all that was written.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason discard
  mason discard --graph vm1 --disconnect

The graph before runs again, and the disks are as they were at the instant of `mason try`. Refused while a
client is connected: a mounted file system must not be rolled back beneath its cache. --disconnect sends
clients away.")]
pub(crate) struct DiscardArgs {
    #[command(flatten)]
    change: ChangeArgs,
}

pub(crate) fn try_graph(args: &TryArgs) -> Outcome {
    if let Some(option) = args.change.written_by() {
        let sentence = format!("{option} is for what stays: give it to `mason commit`");
        return Err(Failure::Usage(sentence));
    }
    let (client, graph, request) = read(&args.file, &args.defines, &args.change)?;
    let view: ChangeView = client.post(&path(&["v1", "graphs", &graph.name, "try"]), &request)?;
    // That it differs from its file is what a trial is; there is nothing to save before `mason commit`.
    let differs_from_file = view.differs_from_file && args.change.json;
    let view = ChangeView { differs_from_file, ..view };
    show(&args.change, &view)
}

pub(crate) fn commit(args: &CommitArgs) -> Outcome {
    let (client, _) = args.change.control.connect()?;
    let graph = find::graph(&client, args.change.graph.as_deref())?;
    let progress = Progress::start(&client, &graph.name)?;
    let view = client.post(&path(&["v1", "graphs", &graph.name, "commit"]), &args.change.options());
    progress.end();
    show(&args.change, &view?)
}

pub(crate) fn discard(args: &DiscardArgs) -> Outcome {
    let (client, _) = args.change.control.connect()?;
    let graph = find::graph(&client, args.change.graph.as_deref())?;
    let view: ChangeView =
        client.post(&path(&["v1", "graphs", &graph.name, "discard"]), &args.change.options())?;
    show(&args.change, &view)
}

fn show(change: &ChangeArgs, view: &ChangeView) -> Outcome {
    if change.json { output::json(view) } else { output::text(&summary(view)) }
}

/// Says on stderr, from time to time, how much is left to merge.
struct Progress {
    stop: mpsc::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

/// Between two lines.
const EVERY: Duration = Duration::from_secs(1);

impl Progress {
    fn start(client: &Client, graph: &str) -> Outcome<Progress> {
        let (stop, stopped) = mpsc::channel::<()>();
        let client = Client::new(client.socket())?;
        let handlers = path(&["v1", "graphs", graph, "handlers"]);
        let thread = std::thread::spawn(move || {
            let terminal = std::io::stderr().is_terminal();
            while stopped.recv_timeout(EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
                // What goes wrong is said by the command itself.
                let Ok(all) = client.get::<Vec<HandlerView>>(&handlers) else { continue };
                let left =
                    all.iter().filter(|one| one.handler == "remaining" && one.element.ends_with("_try"));
                let bytes: u64 = left.filter_map(|one| one.value.as_ref()?.parse::<u64>().ok()).sum();
                let end = if terminal { "\x1b[K\r" } else { "\n" };
                eprint!("{} left to merge{end}", Bytes(bytes));
            }
            if terminal {
                eprint!("\x1b[K");
            }
        });
        Ok(Progress { stop, thread })
    }

    fn end(self) {
        // It has ended by itself, or is about to.
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}
