//! A conformance suite for NBD servers: one named test for each thing the specification demands of a server.
//!
//! Written from `doc/proto.md` of the repository NetworkBlockDevice/nbd at commit
//! 89ba7b5379548d6ebbfa36db15f2b8e3787a09ea, and for extended headers from the same file on the branch
//! `extension-ext-header` at commit e6f3b94a9345cd36d36774694ab298e25003afe6.
//!
//! A broken MUST fails a test, a broken SHOULD is a warning. The codec is the suite's own and shares nothing
//! with any NBD implementation, so that a mistake cannot cancel out against itself.

#![allow(clippy::disallowed_methods, reason = "no shards here: a program of its own, in real time")]

mod cases;
mod context;
mod coverage;
mod haggle;
#[cfg(test)]
mod musts;
mod pending;
mod probe;
mod report;
mod session;
mod stop;
mod transport;
mod uri;
mod wire;

use cases::Case;
use clap::Parser;
use context::{Context, Target, TlsTarget};
use probe::Facts;
use report::{Expected, Line, Report};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use stop::Stop;
use uri::{Place, Uri};

/// Tests whether an NBD server does what the specification of the protocol demands.
///
/// Exits with 0 if all is as it should be (or as --expect says), 1 on deviations, 2 if the tests could not run.
#[derive(Debug, Parser)]
#[command(name = "nbd-conformance")]
struct Args {
    /// The server and export: nbd://HOST:PORT/NAME or nbd+unix:///NAME?socket=PATH, with nbds for TLS.
    #[arg(required_unless_present = "list")]
    uri: Option<Uri>,
    /// Also run the tests that write. They DESTROY what the export holds. Without this they are skipped.
    #[arg(long)]
    write: bool,
    /// Run only the tests whose name contains this text; may be given more than once.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// A file with the tests this server is known to fail, one line each: NAME # reason.
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
    /// List the tests and end.
    #[arg(long)]
    list: bool,
    /// Print one JSON document instead of lines.
    #[arg(long)]
    json: bool,
    /// The certificate authority for nbds URIs, a PEM file.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The host name in the server's certificate, if it is not the URI's.
    #[arg(long, value_name = "NAME")]
    tls_host: Option<String>,
    /// Seconds to wait for any one answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
    /// Seconds any one test may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86400))]
    test_timeout: u64,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.list {
        let said = list(&args.only);
        return if said.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(2) };
    }
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(text) => {
            eprintln!("nbd-conformance: {text}");
            ExitCode::from(2)
        }
    }
}

fn chosen(only: &[String]) -> impl Iterator<Item = &'static Case> + '_ {
    cases::all().filter(|case| only.is_empty() || only.iter().any(|text| case.name.contains(text.as_str())))
}

fn list(only: &[String]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for case in chosen(only) {
        let mark = if case.writes { "write" } else { "-" };
        writeln!(out, "{:<32} {mark:<5} {}", case.name, case.says)?;
    }
    Ok(())
}

/// Runs the tests; true if all went as it should.
fn run(args: &Args) -> Result<bool, String> {
    let target = target(args)?;
    let expected = match &args.expect {
        None => Expected::new(),
        Some(path) => {
            let said = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
            let text = std::fs::read_to_string(path).map_err(|error| said(&error))?;
            report::parse_expected(&text).map_err(|error| said(&error))?
        }
    };
    if chosen(&args.only).next().is_none() {
        return Err("no test has such a name; --list shows them".into());
    }
    let facts = Facts::probe(&target).map_err(|stop| stop.to_string())?;
    let broken = |error: std::io::Error| format!("cannot print: {error}");
    let mut lines = Vec::new();
    let mut alive = true;
    for case in chosen(&args.only) {
        let line = one(case, &target, &facts, &mut alive);
        if !args.json {
            writeln!(std::io::stdout(), "{line}").map_err(broken)?;
        }
        lines.push(line);
    }
    let report = Report::new(lines, &expected);
    let text = if args.json {
        serde_json::to_string_pretty(&report).map_err(|error| error.to_string())?
    } else {
        report.summary()
    };
    writeln!(std::io::stdout(), "{text}").map_err(broken)?;
    Ok(report.good())
}

/// Runs one test. Clears `alive` when the server cannot be connected to after it.
fn one(case: &'static Case, target: &Target, facts: &Facts, alive: &mut bool) -> Line {
    let context = Context::new(target, facts);
    let mut result = match (*alive, case.writes && !target.write) {
        (false, _) => stop::skip("the server is gone"),
        (true, true) => stop::skip("it writes, and --write was not given"),
        (true, false) => (case.run)(&context),
    };
    let warnings = context.notes.take();
    let clean = matches!(result, Ok(()) if warnings.is_empty()) || matches!(result, Err(Stop::Skip(_)));
    if !clean && Context::new(target, facts).plain().is_err() {
        *alive = false;
        let said = result.err().map(|stop| format!(": {stop}")).unwrap_or_default();
        result = stop::fail(format!("the server is gone after this test{said}"));
    }
    Line::new(case, result, warnings)
}

fn target(args: &Args) -> Result<Target, String> {
    let uri = args.uri.clone().ok_or("no URI")?;
    let tls = match (uri.tls, &args.ca) {
        (false, None) => None,
        (true, Some(ca)) => {
            let host = match (&args.tls_host, &uri.place) {
                (Some(host), _) | (None, Place::Tcp(host, _)) => host.clone(),
                (None, Place::Unix(_)) => "localhost".to_owned(),
            };
            let config = transport::tls_config(ca, false)?;
            Some(TlsTarget { host, config, config_12: transport::tls_config(ca, true)? })
        }
        (true, None) => return Err("an nbds URI needs --ca FILE".into()),
        (false, Some(_)) => return Err("--ca is for nbds URIs".into()),
    };
    let (step, test) = (Duration::from_secs(args.timeout), Duration::from_secs(args.test_timeout));
    Ok(Target { uri, tls, step, test, write: args.write })
}
