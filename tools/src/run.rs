//! `mason run`: serves graphs until it is told to stop.

use crate::control::server::{Daemon, Served, serve};
use crate::failure::{Failure, Outcome};
use crate::folders::make_run;
use crate::graphs::{GraphArgs, GraphFile};
use crate::output;
use crate::socket::{Published, publish};
use blockmason::sched::{Change, HostConfig};
use blockmason::{Disk, Host};
use std::collections::HashSet;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Serve graphs in the foreground.
#[derive(clap::Args)]
#[command(after_help = r#"Examples:
  mason run graphs/quickstart.mason
  mason run vm1.mason -D image=/srv/vm1.img
  mason run vm1.mason vm2.mason --control /run/mason/control.sock
  nbdsh -c 'h.connect_command(["mason", "run", "vm1.mason", "--stdio"])' -c 'print(h.get_size())'

When every export accepts, one line on stdout for each: ready ELEMENT URI
SIGTERM or SIGINT: exports close, requests in flight end, everything is flushed, exit 0.
A second SIGINT leaves at once."#)]
pub(crate) struct Args {
    /// Graph files
    #[arg(required = true, value_name = "GRAPH")]
    graphs: Vec<PathBuf>,

    #[command(flatten)]
    graph: GraphArgs,

    /// Answers `mason status` and `mason show` here
    /// [default: the first graph's name with .sock in $XDG_RUNTIME_DIR/mason; for root /run/mason, else /tmp/mason-UID]
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Threads that carry requests [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    shards: Option<u16>,

    /// Serves one NBD client on standard input and output instead of listening, and ends with it
    #[arg(long, conflicts_with = "json")]
    stdio: bool,

    /// Writes the ready lines as JSON objects
    #[arg(long)]
    json: bool,
}

/// What a second SIGINT leaves with: 128 and the number of the signal.
const INTERRUPTED: i32 = 130;

pub(crate) fn main(args: &Args) -> Outcome {
    let reader = args.graph.reader()?;
    let files: Vec<GraphFile> =
        args.graphs.iter().map(|path| reader.read_or_say(path)).collect::<Outcome<_>>()?;
    let mut names = HashSet::new();
    if let Some(twice) = files.iter().find(|file| !names.insert(&file.name)) {
        let sentence = format!("{}: another graph is called {} too", twice.path.display(), twice.name);
        return Err(Failure::Usage(sentence));
    }
    let Some(state) = reader.folders.state else {
        return Err(Failure::new("there is no folder for state: give one with --state DIR, or set HOME"));
    };
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("the control threads cannot be started: {error}")))?;
    let mut config = HostConfig::new(state);
    if let Some(shards) = args.shards {
        config.shards = usize::from(shards);
    }
    runtime.block_on(async {
        let mut signals = Signals::watch()?;
        let host = Host::start(config).map_err(|error| Failure::from_error(&error))?;
        let client = args.stdio.then(|| blockmason_elements::export::nbd::use_stdio(&host));
        let served = start(&host, files).await?;
        let control = match open_control(args, &reader.folders.run, served) {
            Ok(control) => control,
            Err((failure, daemon)) => {
                stop(&daemon).await?;
                return Err(failure);
            }
        };
        if client.is_none() {
            announce(args, &control.daemon)?;
        }
        notify(sd_notify::NotifyState::Ready);
        let gone = async {
            match &client {
                Some(client) => client.0.notified().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = signals.first() => {}
            () = gone => {}
        }
        notify(sd_notify::NotifyState::Stopping);
        drop(control.published);
        tokio::select! {
            biased;
            () = signals.interrupt() => std::process::exit(INTERRUPTED),
            stopped = stop(&control.daemon) => stopped,
        }
    })
}

/// A thousand clients need more descriptors than the soft limit usually allows.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Refused or not, it is the best that can be had.
    let _ = setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit });
}

/// The signals that end service.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn watch() -> Outcome<Signals> {
        let watch =
            |kind| signal(kind).map_err(|error| Failure::new(format!("signals cannot be watched: {error}")));
        Ok(Signals { interrupt: watch(SignalKind::interrupt())?, terminate: watch(SignalKind::terminate())? })
    }

    /// Where both are there, SIGINT is left to be the second.
    async fn first(&mut self) {
        tokio::select! {
            biased;
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    async fn interrupt(&mut self) {
        self.interrupt.recv().await;
    }
}

/// Builds all graphs, then opens them. On a failure those that serve already are stopped.
async fn start(host: &Arc<Host>, files: Vec<GraphFile>) -> Outcome<Vec<Served>> {
    let mut graphs = Vec::with_capacity(files.len());
    for file in files {
        let graph = file.build(host.state_dir(), host.shards())?;
        graphs.push((file, Arc::new(graph)));
    }
    let mut served = Vec::with_capacity(graphs.len());
    for (file, graph) in graphs {
        match open(host, file, graph).await {
            Ok(disk) => served.push(disk),
            Err(failure) => {
                stop_all(&served).await?;
                return Err(failure);
            }
        }
    }
    Ok(served)
}

async fn open(host: &Arc<Host>, file: GraphFile, graph: Arc<blockmason::Graph>) -> Outcome<Served> {
    let failed = |error| Failure::in_graph(&error, &file.spec);
    let disk = Disk::new(host, graph.name()).await.map_err(failed)?;
    let changed = disk.replace(graph, &Change::default()).await.map_err(failed)?;
    Ok(Served { file, disk, exports: changed.announced })
}

/// The daemon and the name of its control socket, if it has one.
struct Control {
    daemon: Arc<Daemon>,
    published: Option<Published>,
}

/// Opens the control socket. Without one that was asked for by name the daemon comes back to be
/// stopped; without the default one it serves all the same.
fn open_control(
    args: &Args,
    folder: &std::path::Path,
    served: Vec<Served>,
) -> Result<Control, (Failure, Arc<Daemon>)> {
    let name = served.first().map_or("mason", |served| &served.file.name);
    let default = folder.join(format!("{name}.sock"));
    let daemon = Arc::new(Daemon { started: blockmason::rt::now(), served });
    let opened = match &args.control {
        Some(path) => publish(path),
        None => make_run(folder).and_then(|()| publish(&default)),
    };
    let opened = opened.and_then(|(listener, published)| {
        serve(listener, daemon.clone()).map_err(Failure::new)?;
        Ok(published)
    });
    match (opened, &args.control) {
        (Ok(published), _) => Ok(Control { daemon, published: Some(published) }),
        (Err(failure), Some(_)) => Err((failure, daemon)),
        (Err(failure), None) => {
            tracing::warn!("there is no control socket: {failure}");
            Ok(Control { daemon, published: None })
        }
    }
}

/// Says on stdout what serves; a person at a terminal is also told what to try.
fn announce(args: &Args, daemon: &Daemon) -> Outcome {
    let mut lines = String::new();
    let exports = daemon.served.iter().flat_map(|served| &served.exports);
    for (element, uri) in exports.clone() {
        lines += &match args.json {
            true => format!("{}\n", serde_json::json!({ "event": "ready", "element": element, "uri": uri })),
            false => format!("ready {element} {uri}\n"),
        };
    }
    if let (Some((_, uri)), true, false) =
        (exports.clone().next(), std::io::stdout().is_terminal(), args.json)
    {
        lines += &format!("\ntry: nbdinfo '{uri}'\nstop: Ctrl-C\n");
    }
    output::text(&lines)
}

/// Tells the service manager, if there is one.
fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::info!("the service manager cannot be told: {error}");
    }
}

async fn stop(daemon: &Daemon) -> Outcome {
    stop_all(&daemon.served).await
}

/// Stops every disk, whether others fail to flush or not.
async fn stop_all(served: &[Served]) -> Outcome {
    let mut stopped = Ok(());
    for Served { file, disk, .. } in served {
        let flushed = disk.stop().await.map_err(|error| Failure::in_graph(&error, &file.spec));
        stopped = stopped.and(flushed);
    }
    stopped
}
