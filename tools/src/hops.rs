//! A hop of a sampled request, as the control socket and `mason trace` show it.

use blockmason::sched::Hop;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

/// One hop of a sampled request: from an edge into the element below, until its reply. Times are in
/// nanoseconds; those of the start count from the start of the daemon.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct HopView {
    /// The client's request that it belongs to: shard and number.
    pub(crate) root: String,
    /// The hop's own name.
    pub(crate) hop: String,
    /// The hop in which it was made; none of a client's request at its source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parent: Option<String>,
    /// The request: the same on several hops where it was only handed on.
    pub(crate) request: String,
    pub(crate) graph: String,
    /// The element above; none of a client's request at its source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<String>,
    /// Its out port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) port: Option<String>,
    /// The element that it leads to.
    pub(crate) to: String,
    pub(crate) operation: String,
    /// First byte.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) length: u64,
    /// `fua`, `may_unmap`, `fast_only`, `one`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) flags: Vec<String>,
    /// `guest`, `copy`, `prefetch`, `write_back` or `internal`.
    pub(crate) origin: String,
    pub(crate) shard: usize,
    pub(crate) start_ns: u64,
    pub(crate) took_ns: u64,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// A line of a trace.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum TraceLine {
    /// Hops that were lost so far, since nobody took them in time.
    Dropped { dropped: u64 },
    /// The next hop.
    Hop(Box<HopView>),
}

impl HopView {
    /// A hop in a daemon that was started at `started`.
    pub(crate) fn of(hop: &Hop, started: Instant) -> HopView {
        let (from, port) = hop.way.from.clone().unzip();
        HopView {
            root: id(hop.root),
            hop: id(hop.number),
            parent: hop.parent.map(id),
            request: id(hop.request),
            graph: hop.way.graph.clone(),
            from,
            port,
            to: hop.way.to.clone(),
            operation: hop.op.name().to_owned(),
            offset: hop.offset,
            length: hop.len,
            flags: hop.flags.names().map(str::to_owned).collect(),
            origin: hop.origin.name().to_owned(),
            shard: hop.shard,
            start_ns: hop.start.saturating_duration_since(started).as_nanos() as u64,
            took_ns: hop.took.as_nanos() as u64,
            error: hop.error.as_deref().map(str::to_owned),
        }
    }

    /// When it ended.
    pub(crate) fn end_ns(&self) -> u64 {
        self.start_ns.saturating_add(self.took_ns)
    }
}

/// As text, since numbers of this size are not exact in every reader of JSON: the shard that gave it, and the
/// shard's count.
fn id(id: u64) -> String {
    format!("{}-{}", id >> 48, id & ((1 << 48) - 1))
}
