//! Puts a vhost-user-blk export under load, and prints what came of it as a line of JSON.

use blockmason_vhost_tests::load::{Client, Job, Outcome, run};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Puts a vhost-user-blk export under load
#[derive(Parser)]
struct Args {
    /// The export's socket
    socket: PathBuf,
    /// What is done
    #[arg(long, value_enum, default_value = "randread")]
    rw: Pattern,
    /// Queues, each with a thread of its own
    #[arg(long, default_value_t = 1)]
    queues: usize,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 1)]
    depth: usize,
    /// Bytes of a request
    #[arg(long, default_value_t = 4096)]
    block: usize,
    /// For how long
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Looks at the used ring all the time instead of waiting to be called
    #[arg(long)]
    poll: bool,
    /// Uses only so many bytes of the disk
    #[arg(long)]
    span: Option<u64>,
    /// Whose rings: those of libblkio, or plain ones in a sealed memfd
    #[arg(long, value_enum, default_value = "libblkio")]
    client: Driver,
    /// Counts the processor time of this process
    #[arg(long)]
    server_pid: Option<u32>,
    /// Does nothing for so many seconds afterwards, in which the server's processor time is counted again
    #[arg(long, default_value_t = 0.0)]
    idle: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Pattern {
    Randread,
    Randwrite,
    Read,
    Write,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Driver {
    Libblkio,
    Plain,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.queues == 0 || !(1..=1024).contains(&args.depth) || args.block == 0 || args.block % 512 != 0 {
        eprintln!(
            "vhost-load: queues and depth begin at 1, depth ends at 1024, and blocks are multiples of 512"
        );
        return ExitCode::FAILURE;
    }
    let job = Job {
        socket: args.socket,
        queues: args.queues,
        depth: args.depth,
        block: args.block,
        write: matches!(args.rw, Pattern::Randwrite | Pattern::Write),
        sequential: matches!(args.rw, Pattern::Read | Pattern::Write),
        time: Duration::from_secs_f64(args.seconds),
        poll: args.poll,
        span: args.span,
        client: if args.client == Driver::Plain { Client::Plain } else { Client::Libblkio },
        server: args.server_pid,
        idle: Duration::from_secs_f64(args.idle),
    };
    match run(&job) {
        Ok(outcome) => {
            println!("{}", report(&outcome, job.block));
            if outcome.errors > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            eprintln!("vhost-load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn report(outcome: &Outcome, block: usize) -> Value {
    let seconds = outcome.time.as_secs_f64();
    // Seconds for a million requests are microseconds for one.
    let each = |time: Duration| time.as_secs_f64() * 1e6 / outcome.requests as f64;
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let latency = |share| micros(outcome.latencies.percentile(share));
    json!({
        "requests": outcome.requests,
        "errors": outcome.errors,
        "seconds": seconds,
        "iops": outcome.requests as f64 / seconds,
        "bytes_per_second": outcome.requests as f64 * block as f64 / seconds,
        "latency_us": {
            "p50": latency(0.5), "p90": latency(0.9), "p99": latency(0.99), "p999": latency(0.999),
            "max": micros(outcome.latencies.max()),
        },
        "server_cpu_seconds_per_million": outcome.server_cpu.map(each),
        "client_cpu_seconds_per_million": each(outcome.client_cpu),
        "server_idle_cpu_seconds": outcome.server_idle_cpu.map(|time| time.as_secs_f64()),
        "kicks": outcome.kicks,
        "waits": outcome.waits,
    })
}
