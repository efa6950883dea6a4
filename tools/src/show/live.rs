//! What the edges of a running graph carry.

use crate::units::Bytes;
use crate::view::{EdgeView, GraphView, RateView};
use std::time::Duration;

/// Gives each edge its rates since `before`. A counter that has begun anew meanwhile counts from there.
pub(super) fn set_rates(graph: &mut GraphView, before: &[GraphView], time: Duration) {
    let old = before.iter().find(|old| old.name == graph.name);
    for edge in &mut graph.edges {
        let same = |old: &&EdgeView| (&old.from, &old.port, &old.to) == (&edge.from, &edge.port, &edge.to);
        let old = old.and_then(|old| old.edges.iter().find(same));
        let gained = |old: Option<u64>, now: u64| old.and_then(|old| now.checked_sub(old)).unwrap_or(now);
        let (Some(requests), Some(bytes)) = (edge.requests, edge.bytes) else { continue };
        let per_second = |gained: u64| gained as f64 / time.as_secs_f64().max(1e-9);
        edge.rate = Some(RateView {
            requests_per_second: per_second(gained(old.and_then(|old| old.requests), requests)),
            bytes_per_second: per_second(gained(old.and_then(|old| old.bytes), bytes)),
        });
    }
}

/// What an edge carries, or has carried; nothing of a graph that does not run.
pub(super) fn carried(edge: &EdgeView) -> Option<String> {
    match (&edge.rate, edge.requests, edge.bytes) {
        (Some(rate), ..) => {
            let bytes = Bytes(rate.bytes_per_second as u64);
            Some(format!("{:.0} requests/s, {bytes}/s", rate.requests_per_second))
        }
        (None, Some(requests), Some(bytes)) => Some(format!("{requests} requests, {}", Bytes(bytes))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(requests: u64) -> EdgeView {
        EdgeView {
            from: "A".to_owned(),
            port: "out".to_owned(),
            to: "B".to_owned(),
            to_port: "in".to_owned(),
            requests: Some(requests),
            bytes: Some(requests * 1024),
            rate: None,
        }
    }

    #[test]
    fn rates_are_never_absurd() {
        let graph = |requests| GraphView {
            ordered: Vec::new(),
            name: "vm".to_owned(),
            file: String::new(),
            elements: Vec::new(),
            edges: vec![edge(requests)],
            references: Vec::new(),
            live: None,
        };
        for (before, now, wanted) in [
            (100, 300, "100 requests/s, 100k/s"),
            (300, 100, "50 requests/s, 50k/s"),
            (7, 7, "0 requests/s, 0/s"),
        ] {
            let mut now = graph(now);
            set_rates(&mut now, &[graph(before)], Duration::from_secs(2));
            assert_eq!(carried(&now.edges[0]).unwrap(), wanted);
        }
        assert_eq!(carried(&edge(3)).unwrap(), "3 requests, 3k");
        assert!(carried(&EdgeView { requests: None, ..edge(3) }).is_none());
    }
}
