//! Everything that is counted, in the text format of Prometheus, version 0.0.4. Counters of a graph begin anew
//! when it is reloaded.

use super::daemon::{Daemon, Served};
use blockmason::graph::{Histogram, Moved, SourceReading};
use blockmason::{Graph, Op, rt};
use std::fmt::{Display, Write};
use std::sync::Arc;
use std::time::SystemTime;

/// What the answer is called in HTTP.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The bounds of the buckets that latencies are shown in, as powers of two of nanoseconds: 4 us to 17 s. At
/// these a bucket of the histogram itself ends, so every count is exact.
const POWERS: std::ops::RangeInclusive<u32> = 12..=34;

/// One graph at one moment.
struct Snapshot {
    served: Arc<Served>,
    graph: Arc<Graph>,
    /// By element; None unless requests enter the graph there.
    sources: Vec<Option<SourceReading>>,
}

impl Snapshot {
    fn new(served: Arc<Served>) -> Snapshot {
        let graph = served.live.disk().graph();
        let source = |node| graph.is_source(node).then(|| graph.read_source(node));
        let sources = (0..graph.instances().count()).map(source).collect();
        Snapshot { served, graph, sources }
    }

    fn name(&self) -> &str {
        self.served.live.name()
    }

    /// The elements at which requests enter, with what has.
    fn sources(&self) -> impl Iterator<Item = (&str, &SourceReading)> {
        let names = self.graph.instances().map(|instance| instance.name.as_str());
        names.zip(&self.sources).filter_map(|(name, source)| Some((name, source.as_ref()?)))
    }
}

/// All of it.
pub(crate) fn text(daemon: &Daemon) -> String {
    let graphs: Vec<Snapshot> = daemon.served().into_iter().map(Snapshot::new).collect();
    let mut page = Page::default();
    process(&mut page, daemon);
    states(&mut page, &graphs);
    edges(&mut page, &graphs);
    elements(&mut page, &graphs);
    latencies(&mut page, &graphs);
    reloads(&mut page, &graphs);
    page.0
}

fn process(page: &mut Page, daemon: &Daemon) {
    page.family("mason_build_info", "gauge", "Which program serves; always 1.");
    page.sample("mason_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.family("mason_start_time_seconds", "gauge", "When the daemon was started, in seconds since 1970.");
    let now = rt::wall_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let started = now.saturating_sub(daemon.started.elapsed()).as_secs_f64();
    page.sample("mason_start_time_seconds", &[], started);
    page.family("mason_shards", "gauge", "Threads that carry requests.");
    page.sample("mason_shards", &[], daemon.host.shards());
}

fn states(page: &mut Page, graphs: &[Snapshot]) {
    page.family(
        "mason_graph_failed",
        "gauge",
        "1 once an element has panicked, until the graph is reloaded.",
    );
    for graph in graphs {
        page.sample("mason_graph_failed", &[("graph", graph.name())], u8::from(graph.graph.is_failed()));
    }
    page.family("mason_graph_in_flight_bytes", "gauge", "Bytes of requests in flight.");
    for graph in graphs {
        let used = graph.served.live.disk().budget().used();
        page.sample("mason_graph_in_flight_bytes", &[("graph", graph.name())], used);
    }
}

fn edges(page: &mut Page, graphs: &[Snapshot]) {
    let mut each = |name: &str, help: &str, ops: &[Op], value: fn(&Moved) -> u64| {
        page.family(name, "counter", help);
        for graph in graphs {
            for edge in graph.graph.read_edges() {
                for op in ops {
                    let labels = [
                        ("graph", graph.name()),
                        ("from", &edge.from),
                        ("port", &edge.port),
                        ("to", &edge.to),
                        ("operation", op.name()),
                    ];
                    page.sample(name, &labels, value(&edge.ops[*op as usize]));
                }
            }
        }
    };
    each("mason_edge_requests_total", "Requests that an edge has carried.", &Op::ALL, |moved| moved.requests);
    let moving = [Op::Read, Op::Write];
    each("mason_edge_bytes_total", "Bytes that an edge has carried.", &moving, |moved| moved.bytes);
}

fn elements(page: &mut Page, graphs: &[Snapshot]) {
    let mut each = |name: &str, help: &str, ops: &[Op], value: fn(&Moved) -> u64| {
        page.family(name, "counter", help);
        for graph in graphs {
            for (instance, arrived) in graph.graph.instances().zip(graph.graph.arrived()) {
                for op in ops {
                    let labels = [
                        ("graph", graph.name()),
                        ("element", &instance.name),
                        ("type", instance.ty.name),
                        ("operation", op.name()),
                    ];
                    page.sample(name, &labels, value(&arrived[*op as usize]));
                }
            }
        }
    };
    let help = "Requests that have come to an element, from clients or by its edges.";
    each("mason_element_requests_total", help, &Op::ALL, |moved| moved.requests);
    let help = "Bytes that these requests have read and written.";
    each("mason_element_bytes_total", help, &[Op::Read, Op::Write], |moved| moved.bytes);
    let name = "mason_source_errors_total";
    page.family(name, "counter", "Requests of clients that were answered with an error.");
    for graph in graphs {
        for (element, source) in graph.sources() {
            for op in Op::ALL {
                let labels = [("graph", graph.name()), ("element", element), ("operation", op.name())];
                page.sample(name, &labels, source.ops[op as usize].errors);
            }
        }
    }
}

fn latencies(page: &mut Page, graphs: &[Snapshot]) {
    let name = "mason_source_latency_seconds";
    page.family(name, "histogram", "Time from a client's request to its answer.");
    for graph in graphs {
        for (element, source) in graph.sources() {
            for op in Op::ALL {
                let labels = [("graph", graph.name()), ("element", element), ("operation", op.name())];
                let reading = &source.ops[op as usize];
                page.histogram(name, &labels, &reading.latency, reading.latency_sum_ns);
            }
        }
    }
}

fn reloads(page: &mut Page, graphs: &[Snapshot]) {
    page.family("mason_graph_reloads_total", "counter", "Changes of a graph while it served.");
    for graph in graphs {
        let (done, failed) = graph.served.live.reloads();
        for (result, count) in [("done", done), ("failed", failed)] {
            let labels = [("graph", graph.name()), ("result", result)];
            page.sample("mason_graph_reloads_total", &labels, count);
        }
    }
    let name = "mason_graph_reload_pause_seconds";
    page.family(name, "histogram", "For how long no request was admitted while a graph was changed.");
    for graph in graphs {
        let (pauses, sum_ns) = graph.served.live.pauses();
        page.histogram(name, &[("graph", graph.name())], &pauses, sum_ns);
    }
}

/// The text as it grows. Writing to a String cannot fail.
#[derive(Default)]
struct Page(String);

impl Page {
    /// Begins a family; its samples follow.
    fn family(&mut self, name: &str, ty: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {ty}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (ix, (key, value)) in labels.iter().enumerate() {
            let before = if ix == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{before}{key}=\"{}\"", escaped(value));
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.0, "{end} {value}");
    }

    /// `buckets` are those of a [`Histogram`].
    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], buckets: &[u64], sum_ns: u64) {
        let (mut seen, mut next) = (0, 0);
        let bucket = format!("{name}_bucket");
        for power in POWERS {
            let end = Histogram::bucket(1 << power);
            seen += buckets.get(next..end).unwrap_or_default().iter().sum::<u64>();
            next = end;
            let le = seconds(Histogram::upper_ns(end - 1)).to_string();
            self.sample(&bucket, &[labels, &[("le", &le)]].concat(), seen);
        }
        // One reading of the counts for all of it: they must fit together.
        let count: u64 = buckets.iter().sum();
        self.sample(&bucket, &[labels, &[("le", "+Inf")]].concat(), count);
        self.sample(&format!("{name}_sum"), labels, seconds(sum_ns));
        self.sample(&format!("{name}_count"), labels, count);
    }
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// A label's value.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_may_be_anything() {
        let mut page = Page::default();
        page.sample("m", &[("a", "x\\y\"z\n"), ("b", "")], 1);
        assert_eq!(page.0, "m{a=\"x\\\\y\\\"z\\n\",b=\"\"} 1\n");
    }

    #[test]
    fn a_histogram_counts_what_is_below_each_bound() {
        let histogram = Histogram::default();
        for ns in [1, 4095, 4096, 1_000_000, 1 << 40] {
            histogram.record(ns);
        }
        let mut page = Page::default();
        page.histogram("h", &[], &histogram.read(), histogram.sum_ns());
        let lines: Vec<_> = page.0.lines().collect();
        assert_eq!(lines[..2], ["h_bucket{le=\"0.000004095\"} 2", "h_bucket{le=\"0.000008191\"} 3"]);
        assert!(page.0.contains("h_bucket{le=\"0.001048575\"} 4\n"), "{}", page.0);
        assert_eq!(
            lines[lines.len() - 3..],
            ["h_bucket{le=\"+Inf\"} 5", "h_sum 1099.512635968", "h_count 5"]
        );
    }
}
