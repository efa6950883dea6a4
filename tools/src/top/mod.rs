//! `mason top`: what goes on in a running daemon, again and again.

mod plain;
mod rates;
#[cfg(feature = "tui")]
mod screen;
#[cfg(feature = "tui")]
mod terminal;

use crate::control::client::Client;
use crate::control::find::ControlArgs;
use crate::counters::CountersView;
use crate::failure::{Failure, Outcome};
use crate::output;
use blockmason::lang::value::Time;
use rates::{Rates, View};
#[cfg(feature = "tui")]
use std::io::IsTerminal;
use std::time::Duration;

/// Watch the graphs of a running daemon: requests, bytes and latencies of sources and edges.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason top
  mason top --once                    one table, of one second
  mason top --json --count 10 | jq '.graphs[0].rows[0].requests_per_second'

Sources show what clients see, by operation; edges what they carry. MEAN is from the edge down and back, of the
sampled requests only. Keys: q quits, arrows scroll, tab is the next graph, s sorts, / filters, p pauses, h helps.
Where stdout is no terminal, tables follow each other.")]
pub(crate) struct Args {
    /// How long one look takes
    #[arg(long, value_name = "DURATION", default_value = "1s")]
    interval: Time,

    /// Ends after so many looks
    #[arg(long, value_name = "N")]
    count: Option<u64>,

    /// One look, as a table
    #[arg(long, conflicts_with = "count")]
    once: bool,

    /// Writes one JSON object a line for each look
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

/// The shortest interval: less measures the measuring.
const SHORTEST: Duration = Duration::from_millis(50);

pub(crate) fn main(args: &Args) -> Outcome {
    if args.interval.0 < SHORTEST {
        return Err(Failure::Usage("--interval: at least 50ms".to_owned()));
    }
    #[cfg(feature = "tui")]
    if !args.json && !args.once && args.count.is_none() && std::io::stdout().is_terminal() {
        return terminal::watch(&args.control, args.interval.0);
    }
    print(args)
}

/// Prints one look after the other.
fn print(args: &Args) -> Outcome {
    let (client, _) = args.control.connect()?;
    let mut rates = Rates::default();
    rates.next(look(&client)?);
    let mut left = if args.once { Some(1) } else { args.count };
    while left != Some(0) {
        wait(&client, args.interval.0);
        let view = rates.next(look(&client)?);
        let text = if args.json { json(&view)? } else { plain::text(&view, !args.once) };
        if !output::open_text(&text)? {
            break;
        }
        left = left.map(|left| left - 1);
    }
    Ok(())
}

fn look(client: &Client) -> Outcome<CountersView> {
    client.get("/v1/counters")
}

fn wait(client: &Client, time: Duration) {
    client.block_on(blockmason::rt::sleep(time));
}

fn json(view: &View) -> Outcome<String> {
    Ok(serde_json::to_string(view).map_err(Failure::new)? + "\n")
}
