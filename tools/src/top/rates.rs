//! Rates: what lies between two looks at the counters.

use crate::counters::{Bucket, CountersView, EdgeCounters, GraphCounters, OpCounters};
use serde::Serialize;

/// What a look shows.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct View {
    pub(super) version: String,
    pub(super) pid: u32,
    pub(super) uptime_seconds: f64,
    /// What the rates are of; 0 in a first look, which has none.
    pub(super) seconds: f64,
    pub(super) graphs: Vec<GraphRates>,
}

/// A graph.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct GraphRates {
    pub(super) name: String,
    pub(super) file: String,
    pub(super) failed: bool,
    /// URIs.
    pub(super) exports: Vec<String>,
    pub(super) in_flight: u64,
    pub(super) in_flight_bytes: u64,
    pub(super) sampled_every: u64,
    /// Sources first, by operation; then edges.
    pub(super) rows: Vec<Row>,
}

/// A source's operation, or an edge.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Row {
    /// `source` or `edge`.
    pub(super) kind: &'static str,
    pub(super) name: String,
    /// A source's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) operation: Option<String>,
    pub(super) requests_per_second: f64,
    pub(super) bytes_per_second: f64,
    /// Of a source, of the requests that were answered in this time; at most 12.5 % too high.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) p50_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) p99_ns: Option<u64>,
    /// Of an edge, of the sampled requests that were answered in this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sampled_mean_ns: Option<u64>,
    /// Of a source: answered with an error in this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) errors: Option<u64>,
    /// Since the counter began.
    pub(super) requests: u64,
}

/// Looks in a row.
#[derive(Default)]
pub(super) struct Rates {
    before: Option<CountersView>,
}

impl Rates {
    /// The rates between the look before and this one. Another daemon begins anew.
    pub(super) fn next(&mut self, now: CountersView) -> View {
        let same =
            |before: &CountersView| before.pid == now.pid && before.uptime_seconds < now.uptime_seconds;
        let before = self.before.take().filter(same);
        let seconds = before.as_ref().map_or(0.0, |before| now.uptime_seconds - before.uptime_seconds);
        let graph = |graph: &GraphCounters| {
            let old = before.iter().flat_map(|before| &before.graphs).find(|old| old.name == graph.name);
            GraphRates::between(old, graph, seconds)
        };
        let view = View {
            version: now.version.clone(),
            pid: now.pid,
            uptime_seconds: now.uptime_seconds,
            seconds,
            graphs: now.graphs.iter().map(graph).collect(),
        };
        self.before = Some(now);
        view
    }
}

/// What a counter has gained. One that is smaller than before, or was not there, has begun anew.
fn gained(before: Option<u64>, now: u64) -> u64 {
    before.and_then(|before| now.checked_sub(before)).unwrap_or(now)
}

fn rate(gained: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { gained as f64 / seconds } else { 0.0 }
}

impl GraphRates {
    fn between(before: Option<&GraphCounters>, now: &GraphCounters, seconds: f64) -> GraphRates {
        let mut rows = Vec::new();
        for source in &now.sources {
            let old = before.and_then(|old| old.sources.iter().find(|old| old.element == source.element));
            for op in &source.operations {
                let old = old.and_then(|old| old.operations.iter().find(|old| old.operation == op.operation));
                rows.push(Row::source(&source.element, old, op, seconds));
            }
            if source.operations.is_empty() {
                rows.push(Row { kind: "source", name: source.element.clone(), ..Row::default() });
            }
        }
        for edge in &now.edges {
            let same =
                |old: &&EdgeCounters| (&old.from, &old.port, &old.to) == (&edge.from, &edge.port, &edge.to);
            let old = before.and_then(|old| old.edges.iter().find(same));
            rows.push(Row::edge(old, edge, seconds));
        }
        GraphRates {
            name: now.name.clone(),
            file: now.file.clone(),
            failed: now.failed,
            exports: now.exports.iter().map(|export| export.uri.clone()).collect(),
            in_flight: now.in_flight,
            in_flight_bytes: now.in_flight_bytes,
            sampled_every: now.sampled_every,
            rows,
        }
    }
}

impl Row {
    fn source(name: &str, before: Option<&OpCounters>, now: &OpCounters, seconds: f64) -> Row {
        // A histogram that has begun anew has done so as a whole.
        let before = before.filter(|before| before.requests <= now.requests);
        let old = |bucket: &Bucket| {
            let known = before.and_then(|old| old.latency.iter().find(|old| old.up_to_ns == bucket.up_to_ns));
            known.map(|old| old.requests)
        };
        let since = now
            .latency
            .iter()
            .map(|bucket| Bucket { requests: gained(old(bucket), bucket.requests), ..*bucket });
        let since: Vec<Bucket> = if seconds > 0.0 { since.collect() } else { Vec::new() };
        let new = |value: fn(&OpCounters) -> u64| gained(before.map(value), value(now));
        Row {
            kind: "source",
            name: name.to_owned(),
            operation: Some(now.operation.clone()),
            requests_per_second: rate(new(|op| op.requests), seconds),
            bytes_per_second: rate(new(|op| op.bytes), seconds),
            p50_ns: quantile(&since, 0.5),
            p99_ns: quantile(&since, 0.99),
            sampled_mean_ns: None,
            errors: (seconds > 0.0).then(|| new(|op| op.errors)),
            requests: now.requests,
        }
    }

    fn edge(before: Option<&EdgeCounters>, now: &EdgeCounters, seconds: f64) -> Row {
        let before = before.filter(|old| old.requests <= now.requests && old.sampled <= now.sampled);
        let new = |value: fn(&EdgeCounters) -> u64| gained(before.map(value), value(now));
        let (sampled, ns) = (new(|edge| edge.sampled), new(|edge| edge.sampled_ns));
        Row {
            kind: "edge",
            name: now.name(),
            requests_per_second: rate(new(|edge| edge.requests), seconds),
            bytes_per_second: rate(new(|edge| edge.bytes), seconds),
            sampled_mean_ns: if seconds > 0.0 { ns.checked_div(sampled) } else { None },
            requests: now.requests,
            ..Row::default()
        }
    }
}

/// The latency that a share of the requests stayed within; none if there were none.
fn quantile(buckets: &[Bucket], share: f64) -> Option<u64> {
    let all: u64 = buckets.iter().map(|bucket| bucket.requests).sum();
    let wanted = (all as f64 * share).ceil() as u64;
    let mut seen = 0;
    let within = buckets.iter().filter(|bucket| bucket.requests > 0).find(|bucket| {
        seen += bucket.requests;
        seen >= wanted
    });
    within.map(|bucket| bucket.up_to_ns)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::counters::SourceCounters;

    /// A graph with one source and one edge that have seen so many requests of 4 KiB.
    pub(crate) fn counters(pid: u32, uptime: f64, requests: u64) -> CountersView {
        let latency = vec![Bucket { up_to_ns: 1000, requests }];
        let op = OpCounters {
            operation: "read".into(),
            requests,
            bytes: requests * 4096,
            errors: requests / 10,
            latency,
        };
        let edge = EdgeCounters {
            from: "Guest".into(),
            port: "out".into(),
            to: "Disk".into(),
            requests,
            bytes: requests * 4096,
            sampled: requests / 10,
            sampled_ns: requests / 10 * 500,
        };
        let graph = GraphCounters {
            name: "vm".into(),
            file: "vm.mason".into(),
            sampled_every: 1024,
            sources: vec![SourceCounters { element: "Guest".into(), operations: vec![op] }],
            edges: vec![edge],
            ..GraphCounters::default()
        };
        CountersView { version: "0".into(), pid, uptime_seconds: uptime, graphs: vec![graph] }
    }

    fn look(rates: &mut Rates, pid: u32, uptime: f64, requests: u64) -> Vec<(f64, Option<u64>)> {
        let view = rates.next(counters(pid, uptime, requests));
        view.graphs[0].rows.iter().map(|row| (row.requests_per_second, row.p50_ns)).collect()
    }

    #[test]
    fn rates_are_differences() {
        let mut rates = Rates::default();
        assert_eq!(look(&mut rates, 1, 10.0, 1000), [(0.0, None), (0.0, None)], "a first look has none");
        assert_eq!(look(&mut rates, 1, 12.0, 1200), [(100.0, Some(1000)), (100.0, None)]);
        let view = rates.next(counters(1, 13.0, 1300));
        let (source, edge) = (&view.graphs[0].rows[0], &view.graphs[0].rows[1]);
        assert_eq!((source.bytes_per_second, source.errors), (409_600.0, Some(10)));
        assert_eq!((edge.sampled_mean_ns, edge.name.as_str()), (Some(500), "Guest -> Disk"));
        assert_eq!(look(&mut rates, 1, 14.0, 1300), [(0.0, None), (0.0, None)], "nothing came");
    }

    #[test]
    fn counters_that_begin_anew_are_never_absurd() {
        let mut rates = Rates::default();
        look(&mut rates, 1, 10.0, 1000);
        assert_eq!(
            look(&mut rates, 1, 12.0, 100),
            [(50.0, Some(1000)), (50.0, None)],
            "the graph was loaded anew"
        );
        assert_eq!(look(&mut rates, 2, 0.5, 5000), [(0.0, None), (0.0, None)], "another daemon");
        assert_eq!(look(&mut rates, 2, 1.5, 5010), [(10.0, Some(1000)), (10.0, None)]);
        // Time that does not pass.
        assert_eq!(look(&mut rates, 2, 1.5, 9000), [(0.0, None), (0.0, None)]);
        let mut gone = counters(2, 3.0, 9000);
        gone.graphs.clear();
        assert!(rates.next(gone).graphs.is_empty());
        assert_eq!(look(&mut rates, 2, 5.0, 20)[0].0, 10.0, "a graph that has come since the look before");
    }

    #[test]
    fn quantiles_of_what_came_since() {
        let latency = |counts: &[(u64, u64)]| {
            counts
                .iter()
                .map(|(up_to_ns, requests)| Bucket { up_to_ns: *up_to_ns, requests: *requests })
                .collect()
        };
        let op =
            |requests, counts| OpCounters { requests, latency: latency(counts), ..OpCounters::default() };
        let before = op(1000, &[(10, 1000)]);
        let now = op(1100, &[(10, 1001), (50, 98), (900, 1)]);
        let row = Row::source("Guest", Some(&before), &now, 1.0);
        assert_eq!((row.p50_ns, row.p99_ns), (Some(50), Some(50)));
        let row = Row::source("Guest", None, &now, 1.0);
        assert_eq!((row.p50_ns, row.p99_ns), (Some(10), Some(50)));
    }
}
