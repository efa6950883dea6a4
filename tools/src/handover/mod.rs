//! `mason handover`: another program goes on with the clients of a running daemon.
//!
//! Here is the command; `giving` is the daemon that goes, `taking` the one that comes, `messages` what they
//! say to each other, and `wire` how (docs/formats/handover.md).

pub(crate) mod giving;
mod messages;
mod successor;
pub(crate) mod taking;
mod wire;

pub(crate) use messages::{CONTROL, METRICS};

use crate::control::find::ControlArgs;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::units::Nanos;
use crate::view::{HandedOver, HandoverRequest};
use blockmason::lang::value::Time;
use std::path::PathBuf;

/// Replace the program of a running daemon, while its clients use their disks.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason handover
  mason handover --binary /opt/mason-0.2/bin/mason
  mason handover --control /run/mason/vm1.sock --deadline 10s --json

The daemon starts the new program with its own arguments, environment and folder, and gives it everything:
graphs as they run, open images with their locks, listening sockets, connections. Clients see a slow request
at most. If the new program fails in any way, the old one goes on.

Disks in memory cannot be handed over. Clients that use TLS are told goodbye and connect again.")]
pub(crate) struct Args {
    /// The new program [default: what is now at the path from which the daemon was started]
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,

    /// How long the new program may take to get ready, and then how long requests may wait
    #[arg(long, value_name = "TIME", default_value = "5s")]
    deadline: Time,

    #[command(flatten)]
    control: ControlArgs,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Outcome {
    let (client, _) = args.control.connect()?;
    let here = |path: &PathBuf| {
        std::path::absolute(path).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
    };
    let request = HandoverRequest {
        binary: args.binary.as_ref().map(here).transpose()?,
        deadline_seconds: Some(args.deadline.0.as_secs_f64()),
    };
    let done: HandedOver = client.post("/v1/handover", &request)?;
    if args.json {
        return output::json(&done);
    }
    let time = |seconds: f64| Nanos((seconds * 1e9) as u64);
    output::text(&format!(
        "handed over from {} to {} in {}, paused for {}\n",
        done.from,
        done.to,
        time(done.took_seconds),
        time(done.pause_seconds)
    ))
}
