//! `mason sign`: makes the layout of a graph that of its volumes.

use crate::failure::{Failure, Outcome};
use crate::graphs::{GraphArgs, GraphFile};
use crate::output;
use blockmason::heads::{self, Finding, Names, Plan, Volume};
use std::path::PathBuf;

/// Make the layout of graphs that of their volumes: write the volumes' heads anew.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason sign vm1.mason                what the heads say, and what would change
  mason sign vm1.mason --yes          a member was added on purpose: adopt it
  mason sign a.mason b.mason --yes    two graphs serve parts of one disk
  mason sign vm1.mason --remove --yes the graph serves its volumes as they are from now on

`mason run` signs volumes that have no head yet by itself. A head that is there is replaced or removed with
--yes only. Graphs that share a volume are signed together: a head holds all ways to it. No daemon may serve
the volumes meanwhile. The data stays as it is: sign what you know to be right.")]
pub(crate) struct Args {
    /// Graph files
    #[arg(required = true, value_name = "GRAPH")]
    graphs: Vec<PathBuf>,

    #[command(flatten)]
    graph: GraphArgs,

    /// Removes the heads of volumes that the graphs serve without a layout
    #[arg(long)]
    remove: bool,

    /// Replaces or removes heads that are there
    #[arg(long)]
    yes: bool,
}

pub(crate) fn main(args: &Args) -> Outcome {
    let reader = args.graph.reader()?;
    let files: Vec<GraphFile> =
        args.graphs.iter().map(|path| reader.read_or_say(path)).collect::<Outcome<_>>()?;
    let state = reader.folders.state.clone().unwrap_or_default();
    let graphs = files
        .iter()
        .map(|file| file.build(&state, 1).map_err(|error| Failure::in_graph(&error, &file.spec)))
        .collect::<Outcome<Vec<_>>>()?;
    let built: Vec<_> = files.iter().map(|file| &file.spec).zip(&graphs).collect();
    let failed = |error| Failure::from_error(&error);
    let volumes = heads::survey(&built, Names::Adopt).map_err(failed)?;
    if let Some((volume, why)) = volumes.iter().find_map(|volume| Some((volume, volume.elsewhere()?))) {
        let help = "remove its head by hand if it is to be a disk of its own";
        return Err(Failure::new(format!("{} ({}): {why}; {help}", volume.element, volume.place)));
    }
    let needless = |volume: &&Volume| volume.wanted().is_none() && !matches!(volume.finding, Finding::Plain);
    let replaced = |volume: &&Volume| {
        let wanted = volume.wanted().filter(|_| !volume.at.read_only);
        let there = !matches!(volume.finding, Finding::New | Finding::Unfinished);
        there && wanted.is_some_and(|wanted| volume.found.as_ref() != Some(&wanted))
    };
    let (needless, replaced): (Vec<_>, Vec<_>) =
        (volumes.iter().filter(needless).collect(), volumes.iter().filter(replaced).collect());
    output::text(&volumes.iter().map(describe).collect::<String>())?;
    if args.remove {
        return remove(&needless, args.yes);
    }
    if let Some(volume) = needless.first() {
        let message = "has a head, and the graph serves it as it is: --remove removes the head";
        return Err(Failure::new(format!("{} ({}): {message}", volume.element, volume.place)));
    }
    if !replaced.is_empty() && !args.yes {
        return Err(Failure::new(format!("{} heads would be replaced: say --yes as well", replaced.len())));
    }
    let plan = Plan::of(volumes.iter());
    plan.begin().map_err(failed)?;
    // Where an image is still to be made, the start that makes it completes the heads.
    match volumes.iter().all(|volume| volume.at.missing.is_none()) {
        true => plan.complete().map_err(failed),
        false => Ok(()),
    }
}

fn remove(needless: &[&Volume], yes: bool) -> Outcome {
    match (needless.len(), yes) {
        (0, _) => {
            Err(Failure::new("no volume of the graphs has a head and no layout: there is nothing to remove"))
        }
        (count, false) => Err(Failure::new(format!("{count} heads would be removed: say --yes as well"))),
        (_, true) => {
            needless.iter().try_for_each(|volume| heads::remove(volume).map_err(|e| Failure::from_error(&e)))
        }
    }
}

/// What is known of a volume: its head, and how it differs from the graph.
fn describe(volume: &Volume) -> String {
    let difference: String = volume.difference().iter().map(|line| format!("    {line}\n")).collect();
    let (state, difference) = match &volume.finding {
        Finding::Plain => ("no layout, no head".to_owned(), String::new()),
        Finding::Refused(why, _) => (why.clone(), difference),
        Finding::New => ("not signed yet".to_owned(), difference),
        Finding::Signed if difference.is_empty() => ("signed".to_owned(), String::new()),
        Finding::Signed => ("signed, with more than the graph has".to_owned(), difference),
        Finding::Unfinished => ("signed by a start that was interrupted".to_owned(), difference),
    };
    format!("{} ({}): {state}\n{difference}", volume.element, volume.place)
}
