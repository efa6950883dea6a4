//! The asking end of the control socket.

use super::STATUS;
use crate::failure::{Failure, Outcome};
use crate::folders::Folders;
use crate::view::Status;
use axum::body::{Body, to_bytes};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// A daemon that does not answer within this time counts as one that hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest answer that is read, in bytes.
const LONGEST_ANSWER: usize = 256 << 20;

/// Which daemon is meant.
#[derive(clap::Args)]
pub(crate) struct ControlArgs {
    /// The control socket of the daemon [default: the only one in $XDG_RUNTIME_DIR/mason; for root
    /// /run/mason, else /tmp/mason-UID]
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
}

impl ControlArgs {
    /// Asks the daemon that is meant for its status.
    pub(crate) fn status(&self) -> Outcome<Status> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(Failure::new)?.block_on(async {
            match &self.control {
                Some(path) => ask(path).await.map_err(|error| refused(path, &error)),
                None => only_daemon(&Folders::find(None).run).await,
            }
        })
    }
}

fn refused(path: &Path, error: &str) -> Failure {
    Failure::new(format!("{}: {error}", path.display()))
}

/// The status of the only daemon that answers in a folder.
async fn only_daemon(folder: &Path) -> Outcome<Status> {
    let mut answers = Vec::new();
    let mut silent = Vec::new();
    for path in sockets(folder) {
        match ask(&path).await {
            Ok(status) => answers.push((path, status)),
            Err(error) => silent.push(refused(&path, &error)),
        }
    }
    match answers.len() {
        1 => Ok(answers.swap_remove(0).1),
        0 => Err(silent.pop().unwrap_or_else(|| {
            Failure::new(format!("no daemon runs: there is no control socket in {}", folder.display()))
        })),
        _ => {
            let name = |(path, status): &(PathBuf, Status)| {
                let graphs: Vec<_> = status.graphs.iter().map(|graph| graph.name.as_str()).collect();
                format!("{} (process {}: {})", path.display(), status.pid, graphs.join(", "))
            };
            let list: Vec<_> = answers.iter().map(name).collect();
            Err(Failure::new(format!(
                "several daemons run, name one with --control PATH: {}",
                list.join(", ")
            )))
        }
    }
}

/// Every socket in a folder that is named like a control socket.
fn sockets(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let is_socket = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|ty| ty.is_socket());
    let paths = entries.filter(is_socket).map(|entry| entry.path());
    let mut paths: Vec<_> = paths.filter(|path| path.extension().is_some_and(|e| e == "sock")).collect();
    paths.sort();
    paths
}

/// Asks one daemon. What goes wrong is said in a sentence without the path.
async fn ask(path: &Path) -> Result<Status, String> {
    match blockmason::rt::timeout(PATIENCE, exchange(path)).await {
        Some(Ok(status)) => Ok(status),
        Some(Err(error)) => Err(error),
        None => Err(format!("the daemon has not answered in {} s", PATIENCE.as_secs())),
    }
}

async fn exchange(path: &Path) -> Result<Status, String> {
    let stream = UnixStream::connect(path).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "no daemon runs there: there is no such socket".to_owned(),
        std::io::ErrorKind::ConnectionRefused => "no daemon runs there: the socket is a dead one".to_owned(),
        _ => format!("the daemon cannot be reached: {error}"),
    })?;
    let broken = |error: &dyn std::fmt::Display| format!("this is no control socket of mason: {error}");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
    let request = Request::get(STATUS).header("host", "mason").body(Body::empty()).map_err(|e| broken(&e))?;
    let answer = async move {
        let answer = sender.send_request(request).await.map_err(|e| broken(&e))?;
        let (head, body) = answer.into_parts();
        let body = to_bytes(Body::new(body), LONGEST_ANSWER).await.map_err(|e| broken(&e))?;
        Ok::<_, String>((head.status, body))
    };
    // The connection ends with its sender; what goes wrong with it is seen by that.
    let (answer, _) = tokio::join!(answer, connection);
    let (status, body) = answer?;
    if status != StatusCode::OK {
        return Err(format!("the daemon answers {status}"));
    }
    serde_json::from_slice(&body).map_err(|e| broken(&e))
}
