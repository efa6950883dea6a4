//! `mason migrate`: moves a disk to another store while it is in use.

mod progress;

use crate::control::client::{Client, path};
use crate::control::find;
use crate::failure::{Failure, Outcome};
use crate::folders::here;
use crate::jobs::{self, JobArgs};
use crate::output::{self, printable, printable_lines};
use crate::units::{Bytes, Nanos, Seconds};
use crate::view::{CutoverRequest, DiskName, MoveRequest, MoveState, MoveView};
use blockmason::lang::value::Time;
use blockmason::rt;

/// Move a disk to another store while its guests use it.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = "Examples:
  mason migrate vm1 Disk --to 'file (path /fast/vm1.img)'
  mason migrate vm1 Disk --to 'nbd_client (uri nbd://store2/vm1)' --rate 200M/s --verify
  mason migrate vm1 Disk --to 'file (path b.img)' --cutover manual --until ready
  mason migrate cutover vm1 Disk
  mason migrate vm1 Disk --to 'file (path b.img)' --keep-mirror
  mason migrate vm1 Disk --back           the old disk, kept the same, takes over again
  mason migrate status
  mason migrate wait --until ready        for a move that goes on

What guests change goes to both disks from the start, and guests are answered by the old one.
The rest is copied in the background, holes and zeros without their bytes. When both are the
same the new disk takes over: requests wait until those in flight have ended and the new disk
has flushed. The graph file is written anew.

The daemon does all this. When this command is interrupted the move goes on, and `mason migrate
status` tells how far it is; when the daemon ends, whatever ends it, it goes on at the next
start. Until the new disk has taken over, the old one has everything.

A new disk that is there and large enough is overwritten; a file that is not there becomes as
large as the old disk.")]
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

    /// Where it moves to: a type and its parameters, or statements whose first element takes its place
    #[arg(long, value_name = "DISK", required_unless_present = "back")]
    to: Option<String>,

    /// Goes back to the old disk, which --keep-mirror has kept the same
    #[arg(long, conflicts_with_all = ["to", "rate", "bandwidth_when_busy", "verify", "keep_mirror", "force"])]
    back: bool,

    /// How fast it is copied at the most, 50M/s
    #[arg(long, value_name = "RATE")]
    rate: Option<String>,

    /// The same while guests read or write
    #[arg(long, value_name = "RATE")]
    bandwidth_when_busy: Option<String>,

    /// Compares both disks before the cut-over, while guests go on
    #[arg(long)]
    verify: bool,

    /// Keeps the old disk as a mirror after the cut-over, so that --back is instant
    #[arg(long)]
    keep_mirror: bool,

    /// When the new disk takes over: once both are the same, or when `mason migrate cutover` says so
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    cutover: When,

    /// What this command waits for: that the move has begun, that both disks are the same, or the cut-over
    #[arg(long, value_name = "WHAT", default_value = "done")]
    until: Until,

    /// How long the new disk may fail before the move is given up
    #[arg(long, value_name = "TIME", default_value = "30s")]
    patience: Time,

    /// Overwrites a new disk whose head says that it is somebody's volume
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    shared: JobArgs,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum When {
    Auto,
    Manual,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Until {
    Begun,
    Ready,
    Done,
}

#[derive(clap::Subcommand)]
enum What {
    /// Shows how far moves are
    Status(SomeArgs),
    /// Waits for a move that goes on, and shows how far it is
    Wait(WaitArgs),
    /// Stops the copier for a while; what guests change goes to both disks all the same
    Pause(OneArgs),
    /// Lets the copier go on
    Resume(OneArgs),
    /// Gives a move up, or lets go of a mirror: the disk is what it is
    Abort(OneArgs),
    /// Lets new disks take over; several do so at one instant
    Cutover(CutArgs),
}

#[derive(clap::Args)]
struct SomeArgs {
    /// The graph's name, or the path of its file [default: all]
    #[arg(value_name = "GRAPH")]
    graph: Option<String>,

    #[command(flatten)]
    shared: JobArgs,
}

#[derive(clap::Args)]
struct OneArgs {
    /// The graph's name, or the path of its file [default: the only one]
    #[arg(value_name = "GRAPH")]
    graph: Option<String>,

    /// The disk [default: the only one that moves]
    #[arg(value_name = "ELEMENT")]
    element: Option<String>,

    #[command(flatten)]
    shared: JobArgs,
}

#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason migrate wait
  mason migrate wait vm1 Disk --until ready --timeout 10m")]
struct WaitArgs {
    #[command(flatten)]
    which: OneArgs,

    /// What it waits for: that the move has begun, that both disks are the same, or the cut-over
    #[arg(long, value_name = "WHAT", default_value = "done")]
    until: Until,

    /// How long it waits at the most
    #[arg(long, value_name = "TIME")]
    timeout: Option<Time>,
}

#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason migrate cutover vm1 Disk
  mason migrate cutover vm1 Disk vm2 Data     both at one instant")]
struct CutArgs {
    /// Graphs and disks in turn [default: the only disk that moves]
    #[arg(value_name = "GRAPH ELEMENT")]
    disks: Vec<String>,

    /// How long requests in flight may take to end before the cut-over is given up
    #[arg(long, value_name = "TIME", default_value = "5s")]
    deadline: Time,

    /// Overwrites a graph file that was edited since it was loaded
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    shared: JobArgs,
}

pub(crate) fn main(args: &Args) -> Outcome {
    match &args.what {
        None if args.begin.back => back(&args.begin),
        None => begin(&args.begin),
        Some(What::Status(args)) => status(args),
        Some(What::Wait(args)) => wait(args),
        Some(What::Pause(args)) => ask(args, "pause"),
        Some(What::Resume(args)) => ask(args, "resume"),
        Some(What::Abort(args)) => abort(args),
        Some(What::Cutover(args)) => cutover(args),
    }
}

fn begin(args: &BeginArgs) -> Outcome {
    let (client, _) = args.shared.control.connect()?;
    let graph = find::graph(&client, args.graph.as_deref())?;
    let folder = here()?;
    let request = MoveRequest {
        element: args.element.clone().unwrap_or_default(),
        to: args.to.clone().unwrap_or_default(),
        folder,
        rate: args.rate.clone(),
        busy_rate: args.bandwidth_when_busy.clone(),
        verify: args.verify,
        manual: args.cutover == When::Manual,
        keep_mirror: args.keep_mirror,
        force: args.force,
        patience_seconds: Some(args.patience.0.as_secs_f64()),
    };
    let begun: MoveView = client.post(&path(&["v1", "graphs", &graph.name, "moves"]), &request)?;
    let last = progress::follow(&client, begun, args.until.enough())?;
    say(&last, &args.shared)
}

impl Until {
    /// Whether a state is enough.
    fn enough(self) -> fn(MoveState) -> bool {
        match self {
            Until::Begun => |_| true,
            Until::Ready => |state| state == MoveState::Ready || over(state),
            Until::Done => over,
        }
    }
}

fn wait(args: &WaitArgs) -> Outcome {
    let OneArgs { graph, element, shared } = &args.which;
    let (client, _) = shared.control.connect()?;
    let view = only(&client, graph.as_deref(), element.as_deref())?;
    let end = args.timeout.as_ref().map(|timeout| rt::now() + timeout.0);
    let enough = args.until.enough();
    let last = progress::follow_until(&client, view, enough, end)?;
    say(&last, shared)?;
    if enough(last.state) { Ok(()) } else { Err(Failure::new("it has not come that far in time")) }
}

fn over(state: MoveState) -> bool {
    state.is_over() || state == MoveState::Mirroring
}

/// Says how far it has come. A move that was given up is a failure, and one that cannot cut over, or whose graph file
/// does not say so.
fn say(last: &MoveView, shared: &JobArgs) -> Outcome {
    if shared.json {
        output::json(last)?;
    } else {
        output::text(&(sentence(last) + "\n"))?;
    }
    match last.state {
        MoveState::Aborted => Err(Failure::Said),
        _ if last.trouble.is_some() => Err(Failure::Said),
        _ => Ok(()),
    }
}

fn back(args: &BeginArgs) -> Outcome {
    let (client, _) = args.shared.control.connect()?;
    let graph = find::graph(&client, args.graph.as_deref())?;
    let element = args.element.as_deref().unwrap_or_default();
    let before: MoveView = client.get(&path(&["v1", "graphs", &graph.name, "moves", element]))?;
    if before.state != MoveState::Mirroring {
        let message = format!("{element} of {} has no mirror to go back to", graph.name);
        return Err(Failure::new(printable(&message)));
    }
    let asked: MoveView =
        client.post(&path(&["v1", "graphs", &graph.name, "moves", element, "cutover"]), &())?;
    let last = progress::follow(&client, asked, MoveState::is_over)?;
    say(&last, &args.shared)
}

fn moves(client: &Client, graph: Option<&str>) -> Outcome<Vec<MoveView>> {
    jobs::list(client, graph, "moves")
}

fn status(args: &SomeArgs) -> Outcome {
    let (client, _) = args.shared.control.connect()?;
    let all = moves(&client, args.graph.as_deref())?;
    if args.shared.json {
        return output::json(&all);
    }
    if all.is_empty() {
        return output::text("no disk is being moved\n");
    }
    output::text(&all.iter().map(|view| sentence(view) + "\n").collect::<String>())
}

/// The move that is meant.
fn only(client: &Client, graph: Option<&str>, element: Option<&str>) -> Outcome<MoveView> {
    let mut all = moves(client, graph)?;
    let given_up = all.iter().filter(|view| view.state == MoveState::Aborted);
    let given_up: String = given_up.map(|view| format!("\n{}", sentence(view))).collect();
    all.retain(|view| element.map_or(!view.state.is_over(), |element| view.element == element));
    match (all.len(), element) {
        (1, _) => Ok(all.swap_remove(0)),
        (0, Some(element)) => Err(Failure::new(format!("{} is not being moved", printable(element)))),
        (0, None) => Err(Failure::new(format!("no disk is being moved{given_up}"))),
        (..) => {
            let names: Vec<_> = all.iter().map(|view| format!("{} {}", view.graph, view.element)).collect();
            Err(Failure::new(printable(&format!("several disks move, name one: {}", names.join(", ")))))
        }
    }
}

fn ask_for(client: &Client, args: &OneArgs, what: &str) -> Outcome<MoveView> {
    let view = only(client, args.graph.as_deref(), args.element.as_deref())?;
    client.post(&path(&["v1", "graphs", &view.graph, "moves", &view.element, what]), &())
}

fn ask(args: &OneArgs, what: &str) -> Outcome {
    let (client, _) = args.shared.control.connect()?;
    let view = ask_for(&client, args, what)?;
    if args.shared.json { output::json(&view) } else { Ok(()) }
}

fn abort(args: &OneArgs) -> Outcome {
    let (client, _) = args.shared.control.connect()?;
    let asked = ask_for(&client, args, "abort")?;
    let last = progress::follow(&client, asked, MoveState::is_over)?;
    if args.shared.json { output::json(&last) } else { output::text(&(sentence(&last) + "\n")) }
}

fn cutover(args: &CutArgs) -> Outcome {
    let (client, _) = args.shared.control.connect()?;
    let disks = match args.disks.as_slice() {
        [] => {
            let view = only(&client, None, None)?;
            vec![DiskName { graph: view.graph, element: view.element }]
        }
        names if names.len() % 2 == 0 => names
            .chunks(2)
            .map(|pair| {
                let graph = find::graph(&client, Some(&pair[0]))?.name;
                Ok(DiskName { graph, element: pair[1].clone() })
            })
            .collect::<Outcome<_>>()?,
        _ => return Err(Failure::Usage("each disk is named by its graph and its element".to_owned())),
    };
    let deadline_seconds = Some(args.deadline.0.as_secs_f64());
    let request = CutoverRequest { disks, deadline_seconds, force: args.force };
    let views: Vec<MoveView> = client.post("/v1/cutover", &request)?;
    if args.shared.json {
        output::json(&views)?;
    } else {
        output::text(&views.iter().map(|view| sentence(view) + "\n").collect::<String>())?;
    }
    if views.iter().any(|view| view.trouble.is_some()) { Err(Failure::Said) } else { Ok(()) }
}

/// How far a move is, in a line.
fn sentence(view: &MoveView) -> String {
    let name = format!("{} {}: {}", view.graph, view.element, view.state.name());
    let how_far = match view.state {
        MoveState::Copying | MoveState::Paused => {
            let done = view.total.saturating_sub(view.remaining);
            let rate = format!(", {}/s", Bytes(view.rate));
            let rate = if view.state == MoveState::Paused { String::new() } else { rate };
            format!(", {} of {}{rate}", Bytes(done), Bytes(view.total))
        }
        MoveState::Verifying => format!(", {} of {}", Bytes(view.verified), Bytes(view.total)),
        MoveState::Ready | MoveState::Cutting => String::new(),
        MoveState::Mirroring | MoveState::Done | MoveState::Aborted => {
            let pause = view
                .pause_seconds
                .map(|pause| format!(", requests waited for {}", Nanos((pause * 1e9) as u64)));
            let copied = format!(" in {}, {} copied", Seconds(view.seconds), Bytes(view.copied));
            copied + &pause.unwrap_or_default()
        }
    };
    let message = if view.message.is_empty() { String::new() } else { format!("; {}", view.message) };
    printable_lines(&format!("{name}{how_far}{message}"))
}
