//! What two processes say to each other: docs/formats/handover.md.

use crate::control::graph_file::Sum;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Whoever speaks of something else is no successor.
pub(super) const MAGIC: &str = "mason-handover";

/// The versions of these messages that this program speaks.
pub(super) const VERSIONS: &[u32] = &[1];

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub(super) enum Message {
    /// The new process is there.
    Hello {
        magic: String,
        /// Those that it speaks.
        versions: Vec<u32>,
        /// Of its program, for people.
        version: String,
    },
    /// What it will serve, and what must be open before it can.
    Offer(Box<Offer>),
    /// The graphs are good.
    Prepared,
    /// What an element gives to its successor, with all descriptors of the frame.
    Luggage { graph: String, element: String, version: u32, value: serde_json::Value },
    /// That was all; nothing is in flight.
    Drained,
    /// Everything is built, opened and taken over.
    Ready,
    /// The old process does nothing any more.
    Go,
    /// The new process has heard that, and begins.
    Going,
    /// Requests are admitted.
    Serving,
    /// The new process cannot.
    Refused { sentence: String },
}

impl Message {
    /// What the new process says to it, sooner or later.
    pub(super) fn answer(&self) -> &'static str {
        match self {
            Message::Offer(_) => "prepared",
            Message::Luggage { .. } | Message::Drained => "ready",
            _ => "going",
        }
    }

    /// The word that it begins with.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Message::Hello { .. } => "hello",
            Message::Offer(_) => "offer",
            Message::Prepared => "prepared",
            Message::Luggage { .. } => "luggage",
            Message::Drained => "drained",
            Message::Ready => "ready",
            Message::Go => "go",
            Message::Going => "going",
            Message::Serving => "serving",
            Message::Refused { .. } => "refused",
        }
    }
}

/// Descriptors are named by their place in the frame.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Offer {
    /// Of these messages.
    pub(super) version: u32,
    /// In the order in which they were loaded.
    pub(super) graphs: Vec<GraphOffer>,
    pub(super) images: Vec<ImageOffer>,
    pub(super) sockets: Vec<SocketOffer>,
    /// The control socket; it listens as the socket of this name.
    pub(super) control: Option<ControlOffer>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct GraphOffer {
    pub(super) name: String,
    /// Its file, as messages call it.
    pub(super) file: String,
    /// Its file, absolute.
    pub(super) path: PathBuf,
    /// The graph as it runs, as a graph file in `/`.
    pub(super) text: String,
    /// What its file is known to say.
    #[serde(default)]
    pub(super) known: Option<Sum>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ImageOffer {
    pub(super) path: PathBuf,
    pub(super) write: bool,
    pub(super) direct: bool,
    /// The graph that has it open.
    pub(super) graph: String,
    pub(super) sync_failed: bool,
    pub(super) exclusive: bool,
    pub(super) file: usize,
    pub(super) lock: usize,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SocketOffer {
    pub(super) address: String,
    pub(super) descriptor: usize,
}

/// The names of the daemon's own sockets among the others.
pub(crate) const CONTROL: &str = "control";
pub(crate) const METRICS: &str = "metrics";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ControlOffer {
    pub(super) path: PathBuf,
    /// By which it is known to be ours still.
    pub(super) device: u64,
    pub(super) inode: u64,
}
