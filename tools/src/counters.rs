//! What `GET /v1/counters` answers.

use crate::view::{ExportView, GraphSummary};
use blockmason::graph::{Graph, Histogram, OpReading};
use blockmason::{Disk, Op};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The counters of every graph.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct CountersView {
    /// The version of the program that serves.
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) uptime_seconds: f64,
    /// In the order in which they were loaded.
    pub(crate) graphs: Vec<GraphCounters>,
}

/// The counters of a graph.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct GraphCounters {
    pub(crate) name: String,
    /// The graph file.
    pub(crate) file: String,
    /// True once an element has panicked: the graph answers errors until it is reloaded.
    pub(crate) failed: bool,
    pub(crate) exports: Vec<ExportView>,
    /// Clients' requests in flight.
    pub(crate) in_flight: u64,
    /// Bytes of them.
    pub(crate) in_flight_bytes: u64,
    /// One client's request in so many is sampled.
    pub(crate) sampled_every: u64,
    pub(crate) sources: Vec<SourceCounters>,
    pub(crate) edges: Vec<EdgeCounters>,
}

/// What has entered at a source.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct SourceCounters {
    pub(crate) element: String,
    /// Those operations that came.
    pub(crate) operations: Vec<OpCounters>,
}

/// What has entered of one operation.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct OpCounters {
    pub(crate) operation: String,
    /// Answered.
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
    pub(crate) errors: u64,
    /// Latencies: the buckets that are not empty, in order.
    pub(crate) latency: Vec<Bucket>,
}

/// A bucket of a histogram.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub(crate) struct Bucket {
    /// The longest duration in it.
    pub(crate) up_to_ns: u64,
    pub(crate) requests: u64,
}

/// What an edge has carried.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct EdgeCounters {
    pub(crate) from: String,
    pub(crate) port: String,
    pub(crate) to: String,
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
    /// Requests of which a sample was taken, answered.
    pub(crate) sampled: u64,
    /// How long those took together, from the edge down and back.
    pub(crate) sampled_ns: u64,
}

impl GraphCounters {
    /// Reads a running graph.
    pub(crate) fn read(summary: GraphSummary, disk: &Disk, in_flight: u64) -> GraphCounters {
        let graph = disk.graph();
        let sources = graph.instances().enumerate().filter(|(_, instance)| !instance.ty.ports.input);
        GraphCounters {
            name: summary.name,
            file: summary.file,
            failed: summary.failed,
            exports: summary.exports,
            in_flight,
            in_flight_bytes: disk.budget().used(),
            sampled_every: disk.sampled_every(),
            sources: sources
                .map(|(node, instance)| SourceCounters::read(&graph, node, &instance.name))
                .collect(),
            edges: graph.read_edges().into_iter().map(EdgeCounters::of).collect(),
        }
    }
}

impl SourceCounters {
    fn read(graph: &Graph, node: usize, element: &str) -> SourceCounters {
        let reading = graph.read_source(node);
        let came = Op::ALL.iter().zip(&reading.ops).filter(|(_, op)| op.requests > 0);
        SourceCounters {
            element: element.to_owned(),
            operations: came.map(|(op, reading)| OpCounters::of(*op, reading)).collect(),
        }
    }
}

impl OpCounters {
    fn of(op: Op, reading: &OpReading) -> OpCounters {
        let buckets = reading.latency.iter().enumerate().filter(|(_, requests)| **requests > 0);
        OpCounters {
            operation: op.name().to_owned(),
            requests: reading.requests,
            bytes: reading.bytes,
            errors: reading.errors,
            latency: buckets
                .map(|(ix, requests)| Bucket { up_to_ns: Histogram::upper_ns(ix), requests: *requests })
                .collect(),
        }
    }
}

impl EdgeCounters {
    fn of(edge: blockmason::graph::EdgeReading) -> EdgeCounters {
        EdgeCounters {
            from: edge.from,
            port: edge.port,
            to: edge.to,
            requests: edge.requests,
            bytes: edge.bytes,
            sampled: edge.sampled,
            sampled_ns: edge.sampled_ns,
        }
    }

    /// As an administrator writes it.
    pub(crate) fn name(&self) -> String {
        edge_text(&self.from, &self.port, &self.to)
    }
}

/// An edge as an administrator writes it: `A -> B`, `(A, port) -> B`.
pub(crate) fn edge_text(from: &str, port: &str, to: &str) -> String {
    if port == "out" { format!("{from} -> {to}") } else { format!("({from}, {port}) -> {to}") }
}
