//! The servers of the tests by hand, and for tests that are not in Rust.
#![allow(clippy::unwrap_used, reason = "it is a tool of tests")]

use clap::{Parser, Subcommand};
use mason_bucket::{Rgw, Server};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// An S3 server in memory. It says where it is in one line of JSON, and ends with SIGTERM, SIGINT or its standard input.
#[derive(Parser)]
struct Cli {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The access key.
    #[arg(long, default_value = "mason")]
    access: String,
    /// The secret key.
    #[arg(long, default_value = "mason-secret")]
    secret: String,
    /// Milliseconds that are added to each request.
    #[arg(long, default_value_t = 0)]
    latency: u64,
    /// A bucket that is there from the start.
    #[arg(long)]
    bucket: Vec<String>,
    #[command(subcommand)]
    other: Option<Other>,
}

#[derive(Subcommand)]
enum Other {
    /// Ceph's RGW instead. A line `restart` on standard input kills its gateway and starts it again; then there is a line
    /// as at first
    Rgw {
        /// An empty folder for it.
        #[arg(long)]
        folder: PathBuf,
    },
}

fn main() {
    let cli = Cli::parse();
    if let Some(Other::Rgw { folder }) = cli.other {
        std::fs::create_dir_all(&folder).unwrap();
        let Some(mut rgw) = Rgw::start(&folder.canonicalize().unwrap()) else { std::process::exit(1) };
        say(&rgw.endpoint(), rgw.access(), rgw.secret());
        return wait(|line| {
            assert_eq!(line, "restart", "there is nothing else to be asked for");
            rgw.restart_radosgw();
            say(&rgw.endpoint(), rgw.access(), rgw.secret());
        });
    }
    let server = Server::on(cli.listen, &cli.access, &cli.secret)
        .unwrap_or_else(|error| panic!("{} cannot be listened on: {error}", cli.listen));
    server.set_latency(Duration::from_millis(cli.latency));
    cli.bucket.iter().for_each(|bucket| server.store().create_bucket(bucket));
    say(&server.endpoint(), server.access(), server.secret());
    wait(|line| panic!("there is nothing to be asked for, as `{line}`"));
}

fn say(endpoint: &str, access: &str, secret: &str) {
    println!("{}", serde_json::json!({ "endpoint": endpoint, "access": access, "secret": secret }));
}

/// Until somebody wants it to end; what he asks for before is done.
fn wait(mut asked: impl FnMut(&str)) {
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        // How it ends is no matter.
        for line in std::io::stdin().lines().map_while(Result::ok) {
            let _ = tell.send(line);
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).unwrap();
        let mut interrupt = signal(SignalKind::interrupt()).unwrap();
        loop {
            tokio::select! {
                _ = terminate.recv() => return,
                _ = interrupt.recv() => return,
                line = told.recv() => match line {
                    Some(line) => asked(&line),
                    None => return,
                },
            }
        }
    });
}
