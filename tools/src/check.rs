//! `mason check`: what is wrong with graph files, before anything is opened.

use crate::failure::{Failure, Outcome};
use crate::graphs::{GraphArgs, say};
use crate::output::{json, printable};
use blockmason::lang::Spec;
use std::path::PathBuf;

/// Check graph files without opening anything that they name.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason check vm1.mason
  mason check graphs/*.mason
  mason check vm1.mason -D image=/srv/vm1.img
  mason check --json vm1.mason | jq '.graphs[].errors[].message'

Exits with 0 if all graphs are good, else with 1. Errors go to stderr, with --json to stdout; so do notes on what is good
and hardly ever meant, such as a cache on an SSD above the element that encrypts.")]
pub(crate) struct Args {
    /// Graph files
    #[arg(required = true, value_name = "GRAPH")]
    graphs: Vec<PathBuf>,

    #[command(flatten)]
    graph: GraphArgs,

    /// Writes one JSON object to stdout
    #[arg(long)]
    json: bool,
}

fn advise(spec: &Spec) {
    for line in blockmason_elements::advice(spec) {
        eprintln!("note: {}", printable(&line));
    }
}

pub(crate) fn main(args: &Args) -> Outcome {
    let reader = args.graph.reader()?;
    let mut reports = Vec::new();
    let mut good = true;
    for path in &args.graphs {
        let read = reader.read(path);
        good &= read.is_ok();
        let mut report = match &read {
            Ok(file) => {
                serde_json::json!({ "count": 0, "errors": [], "advice": blockmason_elements::advice(&file.spec) })
            }
            Err(diagnostics) => diagnostics.to_json(),
        };
        report["graph"] = path.display().to_string().into();
        reports.push(report);
        match &read {
            _ if args.json => {}
            Ok(file) => advise(&file.spec),
            Err(diagnostics) => say(diagnostics),
        }
    }
    if args.json {
        json(&serde_json::json!({ "ok": good, "graphs": reports }))?;
    }
    if good { Ok(()) } else { Err(Failure::Said) }
}
