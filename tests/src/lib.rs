//! What the cross-crate tests share: disks served in this process, and real clients.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "tests panic")]

pub mod control;
pub mod fuzz;
pub mod handover;
pub mod history;
pub mod ledger;
pub mod mason;
pub mod mounts;
pub mod raw;
pub mod stamps;

use blockmason::graph::build::Builder;
use blockmason::lang::{Defines, check, parse_str};
use blockmason::sched::{Change, HostConfig};
use blockmason::{Disk, Graph, Host};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

/// Graphs served in this process, in a temporary folder.
pub struct Server {
    /// Where relative paths of graphs start.
    pub folder: tempfile::TempDir,
    /// The shards.
    pub host: Arc<Host>,
    runtime: tokio::runtime::Runtime,
}

impl Server {
    /// A server with so many shards.
    pub fn new(shards: usize) -> Server {
        let folder = tempfile::tempdir().unwrap();
        let config = HostConfig { shards, ..HostConfig::new(folder.path()) };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        Server { folder, host: Host::start(config).unwrap(), runtime: runtime.unwrap() }
    }

    /// Builds a graph.
    pub fn graph(&self, text: &str) -> blockmason::Result<Arc<Graph>> {
        let folder = self.folder.path();
        let spec = parse_str("test.mason", text, folder, &Defines::new());
        let spec = spec.unwrap_or_else(|errors| panic!("{}", errors.first_line()));
        if let Err(errors) = check(&spec, blockmason_elements::ALL) {
            panic!("{}", errors.first_line());
        }
        let builder = Builder {
            catalogue: blockmason_elements::ALL,
            name: "test",
            state_dir: folder,
            shards: self.host.shards(),
        };
        builder.build(&spec).map(Arc::new)
    }

    /// Serves a graph. Returns the URIs of its exports.
    pub fn serve(&self, text: &str) -> blockmason::Result<(Arc<Disk>, Vec<String>)> {
        let graph = self.graph(text)?;
        self.wait(async {
            let disk = Disk::new(&self.host, graph.name()).await?;
            let changed = disk.replace(graph, &Change::default()).await?;
            Ok((disk, changed.announced.into_iter().map(|(_, uri)| uri).collect()))
        })
    }

    /// Waits for something of the control plane.
    pub fn wait<T>(&self, what: impl Future<Output = T>) -> T {
        self.runtime.block_on(what)
    }

    /// The path of a file in the server's folder.
    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }
}

/// Runs a client to its end and returns what it printed; panics if it failed.
pub fn client(program: &str, args: &[&str]) -> String {
    let output = client_output(program, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {}\n{text}{complaint}", output.status);
    text
}

/// Runs a client to its end.
pub fn client_output(program: &str, args: &[&str]) -> Output {
    let started = Command::new(program).args(args).stdin(std::process::Stdio::null()).output();
    started.unwrap_or_else(|error| panic!("{program} cannot be started ({error}): tests/run installs it"))
}

/// The file's bytes.
pub fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// A program of this workspace, built beside the running test.
pub fn program(name: &str) -> std::path::PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(built.exists(), "{} is missing: cargo build --workspace", built.display());
    built
}

/// An authority, and a server's certificate for `localhost` under it, as PEM files in `folder`.
pub fn certificates(folder: &Path) {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let authority = rcgen::CertifiedIssuer::self_signed(params, key).unwrap();
    let server_key = rcgen::KeyPair::generate().unwrap();
    let server = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let server = server.signed_by(&server_key, &authority).unwrap();
    std::fs::write(folder.join("ca-cert.pem"), authority.pem()).unwrap();
    std::fs::write(folder.join("server-cert.pem"), server.pem()).unwrap();
    std::fs::write(folder.join("server-key.pem"), server_key.serialize_pem()).unwrap();
}
