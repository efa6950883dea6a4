//! `mason`: serves disks from graphs of block elements, and checks, shows and measures such graphs.
//! One file for each command.

mod activate;
mod active;
mod backup;
mod bench;
#[cfg(feature = "s3")]
mod bill;
#[cfg(feature = "s3")]
mod buckets;
mod check;
mod completions;
mod control;
mod counters;
mod edit;
mod elements;
mod events;
mod failure;
mod faults;
mod folders;
mod graphs;
mod handlers;
mod handover;
mod hops;
mod jobs;
mod left;
mod load;
mod logs;
mod marks;
mod migrate;
mod openapi;
mod output;
mod places;
mod pools;
mod progress;
mod record;
mod reload;
mod replay;
mod restore;
mod run;
mod show;
mod sign;
mod socket;
mod status;
mod top;
mod trace;
mod trial;
mod units;
mod unload;
mod view;

use clap::{CommandFactory, Parser};
use std::process::ExitCode;

/// Serve virtual disks from graphs of block elements.
#[derive(Parser)]
#[command(name = "mason", version, max_term_width = 100, subcommand_required = true)]
#[command(
    after_help = "Exit status: 0 if it was done, 1 if not, with the reason in one sentence on stderr, 2 if it was asked for in the wrong way."
)]
struct Cli {
    #[command(flatten)]
    logs: logs::LogArgs,

    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Run(run::Args),
    Check(check::Args),
    Show(show::Args),
    Sign(sign::Args),
    Bench(bench::Args),
    Replay(replay::Args),
    Elements(elements::Args),
    Status(status::Args),
    Top(top::Args),
    Trace(trace::Args),
    Load(load::Args),
    Unload(unload::Args),
    Activate(activate::Args),
    Reload(reload::Args),
    Add(edit::AddArgs),
    Remove(edit::RemoveArgs),
    Connect(edit::ConnectArgs),
    Disconnect(edit::DisconnectArgs),
    Insert(edit::InsertArgs),
    Replace(edit::ReplaceArgs),
    Save(reload::SaveArgs),
    Try(trial::TryArgs),
    Commit(trial::CommitArgs),
    Discard(trial::DiscardArgs),
    Migrate(migrate::Args),
    Backup(backup::Args),
    Restore(restore::Args),
    Handover(handover::Args),
    #[cfg(feature = "s3")]
    Bucket(buckets::Args),
    #[cfg(feature = "s3")]
    Bill(bill::Args),
    Pool(pools::pool::Args),
    Volume(pools::volume::Args),
    Events(events::Args),
    Get(handlers::GetArgs),
    Set(handlers::SetArgs),
    Call(handlers::CallArgs),
    Completions(completions::Args),
    #[command(hide = true)]
    Man(completions::ManArgs),
    #[command(hide = true)]
    Openapi(openapi::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.logs.start();
    let outcome = match &cli.command {
        Command::Run(args) => run::main(args),
        Command::Check(args) => check::main(args),
        Command::Show(args) => show::main(args),
        Command::Sign(args) => sign::main(args),
        Command::Bench(args) => bench::main(args),
        Command::Replay(args) => replay::main(args),
        Command::Elements(args) => elements::main(args),
        Command::Completions(args) => completions::main(args, Cli::command()),
        Command::Man(args) => completions::man(args, Cli::command()),
        Command::Status(args) => status::main(args),
        Command::Top(args) => top::main(args),
        Command::Trace(args) => trace::main(args),
        Command::Load(args) => load::main(args),
        Command::Unload(args) => unload::main(args),
        Command::Activate(args) => activate::main(args),
        Command::Reload(args) => reload::main(args),
        Command::Add(args) => edit::add(args),
        Command::Remove(args) => edit::remove(args),
        Command::Connect(args) => edit::connect(args),
        Command::Disconnect(args) => edit::disconnect(args),
        Command::Insert(args) => edit::insert(args),
        Command::Replace(args) => edit::replace(args),
        Command::Save(args) => reload::save(args),
        Command::Try(args) => trial::try_graph(args),
        Command::Commit(args) => trial::commit(args),
        Command::Discard(args) => trial::discard(args),
        Command::Migrate(args) => migrate::main(args),
        Command::Backup(args) => backup::main(args),
        Command::Restore(args) => restore::main(args),
        Command::Handover(args) => handover::main(args),
        #[cfg(feature = "s3")]
        Command::Bill(args) => bill::main(args),
        #[cfg(feature = "s3")]
        Command::Bucket(args) => buckets::main(args),
        Command::Pool(args) => pools::pool::main(args),
        Command::Volume(args) => pools::volume::main(args),
        Command::Events(args) => events::main(args),
        Command::Get(args) => handlers::get(args),
        Command::Set(args) => handlers::set(args),
        Command::Call(args) => handlers::call(args),
        Command::Openapi(args) => openapi::main(args),
    };
    outcome.map_or_else(failure::Failure::report, |()| ExitCode::SUCCESS)
}
