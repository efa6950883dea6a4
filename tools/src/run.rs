//! `mason run`: serves graphs until it is told to stop.

use crate::control::daemon::{Daemon, Gone};
use crate::control::server::{serve, serve_metrics};
use crate::failure::{Failure, Outcome};
use crate::folders::make_run;
use crate::graphs::{GraphArgs, GraphFile, Reader};
use crate::handover::taking::take_over;
use crate::handover::{CONTROL, METRICS};
use crate::output;
use crate::socket::{Published, is_served, publish};
use blockmason::Host;
use blockmason::sched::HostConfig;
use rustix::process::{Pid, kill_process};
use std::collections::HashSet;
use std::io::{self, IsTerminal};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// Serve graphs in the foreground.
#[derive(clap::Args)]
#[command(after_help = r#"Examples:
  mason run graphs/quickstart.mason
  mason run vm1.mason -D image=/srv/vm1.img
  mason run vm1.mason vm2.mason --control /run/mason/control.sock
  mason run vm1.mason --metrics tcp:127.0.0.1:9100
  nbdsh -c 'h.connect_command(["mason", "run", "vm1.mason", "--stdio"])' -c 'print(h.get_size())'

When every export accepts, one line on stdout for each: ready ELEMENT URI
SIGTERM or SIGINT: exports close, requests in flight end, everything is flushed, exit 0.
A second one leaves at once, and so does the first before anything serves."#)]
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

    #[command(flatten)]
    left: crate::left::LeftArgs,

    /// Answers GET /metrics here, for Prometheus, to whoever can connect: tcp:127.0.0.1:9100
    /// [default: only on the control socket]
    #[arg(long, value_name = "ADDRESS", value_parser = tcp_address)]
    metrics: Option<String>,

    /// Threads that carry requests [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    shards: Option<u16>,

    /// Serves one NBD client on standard input and output instead of listening, and ends with it
    #[arg(long, conflicts_with = "json")]
    stdio: bool,

    /// Writes the ready lines as JSON objects
    #[arg(long)]
    json: bool,

    /// Goes on where the process at standard input stops
    #[arg(long, hide = true, conflicts_with = "stdio")]
    inherit: bool,
}

/// What a SIGINT or SIGTERM that is not waited for leaves with: 128 and the number of the signal.
const INTERRUPTED: i32 = 130;
const TERMINATED: i32 = 143;

/// How long whoever has asked for a handover may take to hear of it.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(crate) fn main(args: &Args) -> Outcome {
    let reader = args.graph.reader()?;
    // A graph that is handed over is not what its file says.
    let files = if args.inherit { Vec::new() } else { read_files(args, &reader)? };
    let Some(state) = reader.folders.state.clone() else {
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
    let (mut told_to_end, serves) = watch_signals()?;
    runtime.block_on(async {
        let host = Host::start(config).map_err(|error| Failure::from_error(&error))?;
        let client = args.stdio.then(|| blockmason_elements::export::nbd::use_stdio(&host));
        let (daemon, published) = match args.inherit {
            false => start(args, host, reader, files, &serves).await?,
            true => {
                serves.store(true, Ordering::Relaxed);
                go_on(host, reader).await
            }
        };
        notify(sd_notify::NotifyState::Ready);
        let gone = async {
            match &client {
                Some(client) => client.0.notified().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            // Its sender ends with the process.
            _ = told_to_end.wait_for(|told| *told) => {}
            () = gone => {}
            gone = daemon.gone() => leave(gone, false).await,
        }
        // A handover that has begun decides whether there is anything left to stop.
        tokio::select! {
            biased;
            gone = daemon.gone() => leave(gone, true).await,
            () = daemon.settle() => {}
        }
        notify(sd_notify::NotifyState::Stopping);
        drop(published);
        Ok(daemon.stop().await?)
    })
}

fn read_files(args: &Args, reader: &Reader) -> Outcome<Vec<GraphFile>> {
    let files: Vec<GraphFile> =
        args.graphs.iter().map(|path| reader.read_or_say(path)).collect::<Outcome<_>>()?;
    let mut names = HashSet::new();
    if let Some(twice) = files.iter().find(|file| !names.insert(&file.name)) {
        let sentence = format!("{}: another graph is called {} too", twice.path.display(), twice.name);
        return Err(Failure::Usage(sentence));
    }
    Ok(files)
}

/// Serves the graphs of the command line.
async fn start(
    args: &Args,
    host: Arc<Host>,
    reader: Reader,
    files: Vec<GraphFile>,
    serves: &AtomicBool,
) -> Outcome<(Arc<Daemon>, Option<Published>)> {
    let metrics = args.metrics.as_deref().map(bind_metrics).transpose()?;
    let first = files.first().map_or_else(|| "mason".to_owned(), |file| file.name.clone());
    let daemon = Arc::new(Daemon::new(host, reader));
    for file in files {
        if let Err(refusal) = daemon.load(file, args.left.choice(), args.left.heads()).await {
            daemon.stop().await?;
            return Err(refusal.into());
        }
        serves.store(true, Ordering::Relaxed);
    }
    let published = match open_control(args, &daemon, &first) {
        Ok(published) => published,
        Err(failure) => {
            daemon.stop().await?;
            return Err(failure);
        }
    };
    if let Some(listener) = metrics {
        serve_metrics(listener, daemon.clone()).map_err(Failure::new)?;
    }
    if !args.stdio {
        announce(args, &daemon)?;
    }
    Ok((daemon, published))
}

/// Serves what the process at standard input has served.
async fn go_on(host: Arc<Host>, reader: Reader) -> (Arc<Daemon>, Option<Published>) {
    let taken = take_over(host, reader).await;
    let daemon = taken.daemon.clone();
    let sockets = daemon.host.sockets();
    let control = sockets.inherited(CONTROL).map(|socket| serve(socket.into(), daemon.clone()));
    let metrics = sockets.inherited(METRICS).map(|socket| serve_metrics(socket.into(), daemon.clone()));
    for error in [control, metrics].into_iter().flatten().filter_map(Result::err) {
        // The disks are served all the same.
        tracing::error!("a socket of the daemon's own cannot be served any more: {error}");
    }
    taken.serving().await;
    (daemon, taken.published)
}

/// Ends without touching anything: another process serves. If this one was told to end, that one is meant.
async fn leave(gone: Gone, stop: bool) {
    // Whoever has asked for it may take its time.
    let _ = blockmason::rt::timeout(LAST_WORDS, gone.told.wait()).await;
    if stop && let Some(pid) = i32::try_from(gone.to).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, rustix::process::Signal::TERM);
    }
    std::process::exit(0);
}

/// `HOST:PORT` of `tcp:HOST:PORT`.
fn tcp_address(text: &str) -> Result<String, String> {
    let address = text.strip_prefix("tcp:").filter(|address| address.contains(':'));
    address.map(str::to_owned).ok_or_else(|| "expected an address such as tcp:127.0.0.1:9100".to_owned())
}

/// Before anything serves, so that nothing does if this cannot be had.
fn bind_metrics(address: &str) -> Outcome<TcpListener> {
    let refused = |error| Failure::new(format!("tcp:{address}: the metrics cannot be served there: {error}"));
    let listener = TcpListener::bind(address).map_err(refused)?;
    tracing::info!("metrics are at tcp:{}", listener.local_addr().map_err(refused)?);
    Ok(listener)
}

/// A thousand clients need more descriptors than the soft limit usually allows.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Refused or not, it is the best that can be had.
    let _ = setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit });
}

/// Watches for the signals that end service, on a thread of its own: whatever the others wait for where they stand, a second one is
/// heard. What is returned becomes true with the first; before something serves, which the other one says, that ends the process.
fn watch_signals() -> Outcome<(watch::Receiver<bool>, Arc<AtomicBool>)> {
    let failed = |error| Failure::new(format!("signals cannot be watched: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let entered = runtime.enter();
    let mut signals = Signals::watch().map_err(failed)?;
    drop(entered);
    let (tell, told) = watch::channel(false);
    let serves = Arc::new(AtomicBool::new(false));
    let has_begun = serves.clone();
    let body = move || {
        runtime.block_on(async move {
            let first = signals.next().await;
            if !has_begun.load(Ordering::Relaxed) {
                std::process::exit(first);
            }
            tell.send_replace(true);
            std::process::exit(signals.next().await);
        });
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(body).map_err(failed)?;
    Ok((told, serves))
}

/// The signals that end service.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn watch() -> io::Result<Signals> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// The next one, as the status to leave with. Where both are there, SIGINT is left to be the second.
    async fn next(&mut self) -> i32 {
        tokio::select! {
            biased;
            _ = self.terminate.recv() => TERMINATED,
            _ = self.interrupt.recv() => INTERRUPTED,
        }
    }
}

/// Opens the control socket. Where none was asked for by name, the daemon serves without it too.
fn open_control(args: &Args, daemon: &Arc<Daemon>, first: &str) -> Outcome<Option<Published>> {
    let folder = &daemon.reader.folders.run;
    let opened = match &args.control {
        Some(path) => publish(path),
        None => make_run(folder).and_then(|()| publish_default(folder, first)),
    };
    let opened = opened.and_then(|(listener, published)| {
        daemon.set_control(published.path().to_owned(), published.identity());
        serve(listener, daemon.clone()).map_err(Failure::new)?;
        Ok(published)
    });
    match (opened, &args.control) {
        (Ok(published), _) => Ok(Some(published)),
        (Err(failure), Some(_)) => Err(failure),
        (Err(failure), None) => {
            tracing::warn!("there is no control socket: {failure}");
            Ok(None)
        }
    }
}

/// Takes the first graph's name, and where another daemon has it already, the process number too.
fn publish_default(folder: &Path, first: &str) -> Outcome<(UnixListener, Published)> {
    let path = folder.join(format!("{first}.sock"));
    publish(&path).or_else(|failure| {
        if !is_served(&path).unwrap_or(false) {
            return Err(failure);
        }
        let own = folder.join(format!("{first}-{}.sock", std::process::id()));
        tracing::info!("{}: another daemon has it, the control socket is {}", path.display(), own.display());
        publish(&own)
    })
}

/// Says on stdout what serves; a person at a terminal is also told what to try.
fn announce(args: &Args, daemon: &Daemon) -> Outcome {
    let mut lines = String::new();
    let served = daemon.served();
    let exports = served.iter().flat_map(|served| served.live.exports());
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
pub(crate) fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::info!("the service manager cannot be told: {error}");
    }
}
