//! A graph as it is shown: what a graph file says, and what a running graph adds to it. Also the
//! shape in which the control socket answers.

use crate::faults::Fault;
use crate::graphs::CATALOGUE;
use crate::left::Choice;
use blockmason::describe::find;
use blockmason::geometry::NO_LIMIT;
use blockmason::graph::{Graph, OpReading, PlaceReading};
use blockmason::heads::{Finding, Volume};
use blockmason::lang::{Defines, Edit, Sources, Spec};
use blockmason::{Geometry, Op};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;
use utoipa::ToSchema;

/// What `GET /v1/status` answers.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Status {
    /// The version of the program that serves.
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) uptime_seconds: f64,
    pub(crate) graphs: Vec<GraphView>,
}

/// What `POST /v1/handover` is sent.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HandoverRequest {
    /// The new program, absolute; what is now at the path of the running one if it is not given.
    #[schema(value_type = Option<String>)]
    pub(crate) binary: Option<PathBuf>,
    /// How long the new program may take to get ready, and then how long requests may wait; 5 if it is not given.
    pub(crate) deadline_seconds: Option<f64>,
}

/// Another process serves.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct HandedOver {
    /// The number of the process that has served.
    pub(crate) from: u32,
    /// The number of the process that serves.
    pub(crate) to: u32,
    /// How long all of it took.
    pub(crate) took_seconds: f64,
    /// For how long no request was admitted.
    pub(crate) pause_seconds: f64,
}

/// What `GET /v1/daemon` answers: who serves, and how it understands the graph files it is given.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct DaemonView {
    /// The version of the program that serves.
    pub(crate) version: String,
    pub(crate) pid: u32,
    pub(crate) uptime_seconds: f64,
    /// The names of its graphs, in the order in which they were loaded.
    pub(crate) graphs: Vec<String>,
    /// The folder that contains each graph's `${state}`.
    #[schema(value_type = Option<String>)]
    pub(crate) state: Option<PathBuf>,
    /// What `${run}` means.
    #[schema(value_type = String)]
    pub(crate) run: PathBuf,
    /// Parameters of graph files that do not set them: the `-D` of `mason run`.
    #[schema(value_type = Vec<DefineView>)]
    pub(crate) defines: Defines,
}

/// One `-D KEY=VALUE`.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes `Define` to the document of the API")]
pub(crate) struct DefineView {
    /// The parameter.
    key: String,
    /// Its value.
    value: String,
    /// The folder that the value starts in if it is a relative path.
    folder: String,
}

/// What `POST /v1/graphs` is sent: a graph file and all that it includes, as text, so that the daemon reads no
/// file of a client.
#[derive(Deserialize, ToSchema)]
pub(crate) struct GraphTexts {
    /// The graph file first.
    #[schema(value_type = Vec<SourceText>)]
    pub(crate) sources: Sources,
    /// What the client's command line sets; the daemon's own `-D` count where these are silent.
    #[serde(default)]
    #[schema(value_type = Vec<DefineView>)]
    pub(crate) defines: Defines,
    /// Where the graph was left different from its file: `file` serves the file, `left` what was left.
    #[serde(default)]
    pub(crate) as_it: Option<String>,
    /// Serve volumes through another layout than their heads name, and leave the heads as they are.
    #[serde(default)]
    pub(crate) force: bool,
}

impl GraphTexts {
    /// What to serve where a graph was left different from its file.
    pub(crate) fn choice(&self) -> Choice {
        match self.as_it.as_deref() {
            Some("file") => Choice::File,
            Some("left") => Choice::Left,
            _ => Choice::Ask,
        }
    }
}

/// What `POST /v1/graphs/{name}/reload` is sent.
#[derive(Deserialize, ToSchema)]
pub(crate) struct ReloadRequest {
    /// The graph file first, then all that it includes.
    #[schema(value_type = Vec<SourceText>)]
    pub(crate) sources: Sources,
    /// What the client's command line sets.
    #[serde(default)]
    #[schema(value_type = Vec<DefineView>)]
    pub(crate) defines: Defines,
    #[serde(default)]
    pub(crate) options: ChangeOptions,
}

/// What `POST /v1/graphs/{name}/edits` is sent.
#[derive(Deserialize, ToSchema)]
pub(crate) struct EditRequest {
    /// Each an object: `edit` is `add`, `remove`, `connect`, `disconnect`, `insert` or `replace`; the other
    /// fields are what that needs.
    #[schema(value_type = Vec<Object>)]
    pub(crate) edits: Vec<Edit>,
    /// Relative paths in the edits start here.
    #[schema(value_type = String)]
    pub(crate) folder: PathBuf,
    #[serde(default)]
    pub(crate) options: ChangeOptions,
}

/// How a graph is to be changed.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ChangeOptions {
    /// Only say what would change.
    pub(crate) dry_run: bool,
    /// Write the graph as it then runs into its file.
    pub(crate) save: bool,
    /// Send clients away that cannot live with it, instead of refusing.
    pub(crate) disconnect: bool,
    /// Serve volumes through another layout than their heads name, and leave the heads as they are.
    pub(crate) force: bool,
    /// Make the layout of the graph that of its volumes.
    pub(crate) sign: bool,
    /// How long requests in flight may take to end. Default: 5.
    pub(crate) deadline_seconds: Option<f64>,
}

/// What a change has come to, or would.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ChangeView {
    /// False after a dry run.
    pub(crate) done: bool,
    /// False if the graphs are the same.
    pub(crate) changes: bool,
    /// What changes, for people.
    pub(crate) text: String,
    /// What changes: elements and what becomes of them, edges, and whether requests wait at a gate.
    #[schema(value_type = Object)]
    pub(crate) diff: serde_json::Value,
    /// For how long no request was admitted.
    pub(crate) pause_seconds: Option<f64>,
    pub(crate) took_seconds: Option<f64>,
    /// Requests that are still on their way in the graph before.
    pub(crate) left: Vec<String>,
    /// True if the graph now runs differently from its file.
    pub(crate) differs_from_file: bool,
    /// The graph file that gives the same result.
    pub(crate) graph: String,
}

/// A graph file.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes `Source` to the document of the API")]
pub(crate) struct SourceText {
    /// What messages call it.
    path: String,
    /// Its absolute path: relative paths in it start in its folder.
    opened: String,
    text: String,
}

/// A graph in a list.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct GraphSummary {
    pub(crate) name: String,
    /// The graph file, as it was named.
    pub(crate) file: String,
    /// Its absolute path.
    #[schema(value_type = String)]
    pub(crate) path: PathBuf,
    /// True once an element has panicked: the graph answers errors until it is reloaded.
    pub(crate) failed: bool,
    /// True while it only listens, until it is activated.
    #[serde(default)]
    pub(crate) standby: bool,
    pub(crate) exports: Vec<ExportView>,
}

/// What became of a graph that was to be activated.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Activated {
    pub(crate) graph: String,
    /// False if it served before.
    pub(crate) activated: bool,
}

/// A handler of an element of a running graph.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct HandlerView {
    pub(crate) element: String,
    pub(crate) handler: String,
    /// `read`, `read_write` or `call`.
    pub(crate) access: String,
    /// Its value, if it can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) value: Option<String>,
    /// Why it has no value now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// The value of a handler.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct HandlerValue {
    /// As an administrator writes it.
    pub(crate) value: String,
}

/// Something to do with a pool.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PoolRequest {
    /// Its path, absolute.
    pub(crate) pool: String,
    /// What to do: an object whose `do` names it, `{"do": "snapshot", "volumes": ["vm1"], "name": "monday"}`.
    pub(crate) operation: serde_json::Value,
}

/// What a handler is called with.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct HandlerArgument {
    #[serde(default)]
    pub(crate) argument: String,
}

/// An event.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes `Event` to the document of the API")]
pub(crate) struct EventView {
    /// Counts from 1, without gaps.
    number: u64,
    /// Seconds since 1970.
    time: f64,
    graph: String,
    element: Option<String>,
    /// `loaded`, `stands_by`, `unloaded`, `reload`, `reload_failed`, `handed_over`, `handover_failed`, `error`, `failed`,
    /// `notice`, `threshold`.
    kind: String,
    /// One sentence for people.
    message: String,
    /// Details for programs.
    fields: Option<HashMap<String, String>>,
}

/// A graph.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct GraphView {
    pub(crate) name: String,
    /// The graph file.
    pub(crate) file: String,
    /// In the order of the file.
    pub(crate) elements: Vec<ElementView>,
    /// In the order of the file.
    pub(crate) edges: Vec<EdgeView>,
    /// What elements refer to without sending requests there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) references: Vec<ReferenceView>,
    /// The edges at which overlapping requests are ordered, those together that are ordered as one. Known
    /// once the graph has been built.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) ordered: Vec<Vec<PlaceView>>,
    /// Only of a running graph.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) live: Option<LiveView>,
}

/// An element.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ElementView {
    pub(crate) name: String,
    #[serde(rename = "type")]
    pub(crate) ty: String,
    pub(crate) family: String,
    /// `vm1.mason:3:9`.
    pub(crate) place: String,
    pub(crate) parameters: Vec<ParameterView>,
    /// Known once the graph has been built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) geometry: Option<GeometryView>,
    /// How the head of its volume and the graph fit; of a graph file that has been built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) head: Option<String>,
}

/// A parameter as given.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ParameterView {
    pub(crate) name: String,
    pub(crate) values: Vec<String>,
}

/// An edge.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct EdgeView {
    pub(crate) from: String,
    pub(crate) port: String,
    pub(crate) to: String,
    pub(crate) to_port: String,
    /// Requests so far, of a running graph.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) requests: Option<u64>,
    /// Their lengths together, of a running graph.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) bytes: Option<u64>,
    /// Over some time, where somebody has looked twice: `mason show --interval`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rate: Option<RateView>,
}

/// What an edge carries.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct RateView {
    pub(crate) requests_per_second: f64,
    pub(crate) bytes_per_second: f64,
}

/// A reference: `(test Dirty)`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ReferenceView {
    pub(crate) from: String,
    pub(crate) parameter: String,
    pub(crate) to: String,
}

/// An edge at which overlapping requests are ordered.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct PlaceView {
    pub(crate) from: String,
    pub(crate) port: String,
    pub(crate) to: String,
}

/// What an element looks like from above; lengths in bytes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct GeometryView {
    pub(crate) size: u64,
    pub(crate) min_block: u32,
    pub(crate) preferred_block: u32,
    /// None if any length may enter.
    pub(crate) max_len: Option<u32>,
    /// The operations done at little cost below; the framework does the others by means of these.
    pub(crate) operations: Vec<String>,
    pub(crate) needs_flush: bool,
    pub(crate) rotational: bool,
    pub(crate) read_only: bool,
}

/// What only a running graph has.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct LiveView {
    /// True once an element has panicked: the graph answers errors until it is reloaded.
    pub(crate) failed: bool,
    /// True while it only listens, until it is activated.
    #[serde(default)]
    pub(crate) standby: bool,
    /// Bytes of requests in flight.
    pub(crate) in_flight_bytes: u64,
    /// How often clients have had to wait while the graph was changed.
    #[serde(default)]
    pub(crate) gated: u64,
    pub(crate) exports: Vec<ExportView>,
    #[serde(default)]
    pub(crate) faults: Vec<Fault>,
    pub(crate) sources: Vec<SourceView>,
}

/// Where clients connect.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ExportView {
    pub(crate) element: String,
    pub(crate) uri: String,
}

/// What has entered at a source.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct SourceView {
    pub(crate) element: String,
    /// Those operations that came.
    pub(crate) operations: Vec<OpView>,
}

/// What has entered of one operation. Latencies are in nanoseconds, at most 12.5 % too high.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct OpView {
    pub(crate) operation: String,
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
    pub(crate) errors: u64,
    pub(crate) p50_ns: u64,
    pub(crate) p90_ns: u64,
    pub(crate) p99_ns: u64,
    pub(crate) p999_ns: u64,
    pub(crate) max_ns: u64,
}

impl GraphView {
    /// What a graph file says.
    pub(crate) fn of_spec(name: &str, spec: &Spec) -> GraphView {
        let name_of = |ix: usize| spec.elements[ix].name.clone();
        let edge = |edge: &blockmason::lang::EdgeSpec| EdgeView {
            from: name_of(edge.from),
            port: edge.from_port.clone(),
            to: name_of(edge.to),
            to_port: edge.to_port.clone(),
            requests: None,
            bytes: None,
            rate: None,
        };
        let mut references = Vec::new();
        for element in &spec.elements {
            let table = find(CATALOGUE, &element.ty).map_or(&[][..], |ty| ty.params);
            for param in table.iter().filter(|param| param.refers.is_some()) {
                for value in element.params.get(param.name).unwrap_or_default() {
                    let (from, parameter) = (element.name.clone(), param.name.to_owned());
                    references.push(ReferenceView { from, parameter, to: value.target().to_owned() });
                }
            }
        }
        GraphView {
            name: name.to_owned(),
            file: spec.sources.get(0).map_or_else(String::new, |source| source.path().display().to_string()),
            elements: spec.elements.iter().map(|element| ElementView::of(element, spec)).collect(),
            edges: spec.edges.iter().map(edge).collect(),
            references,
            ordered: Vec::new(),
            live: None,
        }
    }

    /// The same with what the built graph knows of its elements.
    pub(crate) fn with_geometry(mut self, graph: &Graph) -> GraphView {
        let names = graph.instances().map(|instance| instance.name.as_str());
        let nodes: HashMap<&str, usize> = names.zip(0..).collect();
        for element in &mut self.elements {
            let node = nodes.get(element.name.as_str());
            element.geometry = node.map(|node| GeometryView::of(&graph.geometry(*node)));
        }
        let place = |place: PlaceReading| PlaceView { from: place.from, port: place.port, to: place.to };
        let groups = graph.places().into_iter();
        self.ordered = groups.map(|group| group.into_iter().map(place).collect()).collect();
        self
    }

    /// The same with what the volumes' heads say.
    pub(crate) fn with_heads(mut self, volumes: &[Volume]) -> GraphView {
        for volume in volumes {
            let element = self.elements.iter_mut().find(|element| element.name == volume.element);
            let path = volume.at.path.display();
            if let Some(element) = element {
                element.head = match &volume.finding {
                    Finding::Plain => None,
                    Finding::New => Some(format!("no head yet, {path} is to be written")),
                    Finding::Signed => Some(format!("signed in {path}")),
                    Finding::Unfinished => Some(format!("signed by an interrupted start in {path}")),
                    Finding::Refused(why, _) => Some(format!("refused: {why}")),
                };
            }
        }
        self
    }

    /// The same with what the edges have carried.
    pub(crate) fn with_counters(mut self, graph: &Graph) -> GraphView {
        let readings = graph.read_edges();
        let readings: HashMap<_, _> =
            readings.iter().map(|reading| ((&reading.from, &reading.port), reading)).collect();
        for edge in &mut self.edges {
            let reading = readings.get(&(&edge.from, &edge.port));
            edge.requests = reading.map(|reading| reading.requests);
            edge.bytes = reading.map(|reading| reading.bytes);
        }
        self
    }

    /// The element of that name.
    pub(crate) fn element(&self, name: &str) -> Option<&ElementView> {
        self.elements.iter().find(|element| element.name == name)
    }

    /// The edges that leave each element, in the order of the file.
    pub(crate) fn below(&self) -> HashMap<&str, Vec<&EdgeView>> {
        self.edges_by(|edge| &edge.from)
    }

    /// The edges that arrive at each element, in the order of the file.
    pub(crate) fn above(&self) -> HashMap<&str, Vec<&EdgeView>> {
        self.edges_by(|edge| &edge.to)
    }

    fn edges_by(&self, end: fn(&EdgeView) -> &String) -> HashMap<&str, Vec<&EdgeView>> {
        let mut found: HashMap<&str, Vec<&EdgeView>> = HashMap::new();
        for edge in &self.edges {
            found.entry(end(edge)).or_default().push(edge);
        }
        found
    }
}

impl ElementView {
    fn of(element: &blockmason::lang::ElementSpec, spec: &Spec) -> ElementView {
        let parameter = |entry: &blockmason::lang::Entry| ParameterView {
            name: entry.key().to_owned(),
            values: entry.values().iter().map(|value| value.text().to_owned()).collect(),
        };
        let ty = find(CATALOGUE, &element.ty);
        ElementView {
            name: element.name.clone(),
            ty: ty.map_or(element.ty.as_str(), |ty| ty.name).to_owned(),
            family: ty.map_or("", |ty| ty.family.name()).to_owned(),
            place: spec.place(element).to_string(),
            parameters: element.params.entries().iter().map(parameter).collect(),
            geometry: None,
            head: None,
        }
    }
}

impl GeometryView {
    fn of(geometry: &Geometry) -> GeometryView {
        let operations = Op::ALL.iter().filter(|op| geometry.ops.has(**op) && **op != Op::Control);
        GeometryView {
            size: geometry.size,
            min_block: geometry.min_block,
            preferred_block: geometry.preferred_block,
            max_len: (geometry.max_len < NO_LIMIT).then_some(geometry.max_len),
            operations: operations.map(|op| op.name().to_owned()).collect(),
            needs_flush: geometry.needs_flush,
            rotational: geometry.rotational,
            read_only: geometry.read_only,
        }
    }
}

impl SourceView {
    /// What has entered a graph at one of its elements.
    pub(crate) fn read(graph: &Graph, node: usize, element: &str) -> SourceView {
        let reading = graph.read_source(node);
        let came = Op::ALL.iter().zip(&reading.ops).filter(|(_, op)| op.requests > 0);
        let operations = came.map(|(op, reading)| OpView::of(*op, reading)).collect();
        SourceView { element: element.to_owned(), operations }
    }
}

impl OpView {
    /// One operation's reading.
    pub(crate) fn of(op: Op, reading: &OpReading) -> OpView {
        OpView {
            operation: op.name().to_owned(),
            requests: reading.requests,
            bytes: reading.bytes,
            errors: reading.errors,
            p50_ns: reading.quantile_ns(0.5),
            p90_ns: reading.quantile_ns(0.9),
            p99_ns: reading.quantile_ns(0.99),
            p999_ns: reading.quantile_ns(0.999),
            max_ns: reading.quantile_ns(1.0),
        }
    }
}

/// What `POST /v1/graphs/{name}/moves` is sent.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MoveRequest {
    /// The disk: an element of the graph.
    pub(crate) element: String,
    /// Where it moves to: `file (path b.img)`, or statements whose first element takes its place.
    pub(crate) to: String,
    /// Relative paths in `to` start here.
    #[schema(value_type = String)]
    pub(crate) folder: PathBuf,
    /// How fast it is copied at the most, `50M/s`; without a limit if it is not given.
    pub(crate) rate: Option<String>,
    /// The same while guests are active.
    pub(crate) busy_rate: Option<String>,
    /// Compare both sides before the cut-over.
    pub(crate) verify: bool,
    /// Cut over only when asked to.
    pub(crate) manual: bool,
    /// Keep the old disk as a mirror.
    pub(crate) keep_mirror: bool,
    /// Overwrite a disk whose head says that it is a volume.
    pub(crate) force: bool,
    /// How long the new disk may fail before the move is given up. Default: 30.
    pub(crate) patience_seconds: Option<f64>,
}

/// What `POST /v1/graphs/{name}/backups` is sent.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct BackupRequest {
    /// The disk: an element of the graph.
    pub(crate) element: String,
    /// Where the backup goes: `file (path b.img)`, or statements whose first element is it.
    pub(crate) to: String,
    /// Relative paths in `to` start here.
    #[schema(value_type = String)]
    pub(crate) folder: PathBuf,
    /// Copy only what has changed since the last backup, which `to` has.
    pub(crate) incremental: bool,
    /// How fast it is copied at the most, `50M/s`; without a limit if it is not given.
    pub(crate) rate: Option<String>,
    /// Overwrite a disk whose head says that it is a volume.
    pub(crate) force: bool,
    /// Write the graph as it then runs into its file, so that account is kept of changes also after a restart.
    pub(crate) save: bool,
    /// How long the target may fail before the backup is given up. Default: 30.
    pub(crate) patience_seconds: Option<f64>,
}

/// A disk that is backed up.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct BackupView {
    pub(crate) graph: String,
    pub(crate) element: String,
    /// Where the backup goes, as it was asked for.
    pub(crate) to: String,
    pub(crate) incremental: bool,
    pub(crate) state: BackupState,
    /// One sentence for people: what it waits for, or what it came to.
    pub(crate) message: String,
    /// Bytes of the disk, or those that have changed since the last backup.
    pub(crate) total: u64,
    /// Bytes of them that have not been copied.
    pub(crate) remaining: u64,
    /// Bytes that were copied.
    pub(crate) copied: u64,
    /// Bytes of holes and zeros.
    pub(crate) skipped: u64,
    /// Bytes a second, lately.
    pub(crate) rate: u64,
    /// For how long no request was admitted at the begin.
    pub(crate) pause_seconds: f64,
    /// Since it began in this process.
    pub(crate) seconds: f64,
}

/// How far a backup is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BackupState {
    /// The disk stands still and is being copied; what guests write is in an overlay.
    Copying,
    /// Nothing is copied any more, and what guests have written is merged into the disk.
    Merging,
    /// The backup is complete and durable.
    Done,
    /// There is no backup, and the disk has everything.
    Failed,
}

impl BackupState {
    /// True if nothing more will happen.
    pub(crate) fn is_over(self) -> bool {
        matches!(self, BackupState::Done | BackupState::Failed)
    }

    /// The word of the control socket.
    pub(crate) fn name(self) -> &'static str {
        match self {
            BackupState::Copying => "copying",
            BackupState::Merging => "merging",
            BackupState::Done => "done",
            BackupState::Failed => "failed",
        }
    }
}

/// What `POST /v1/cutover` is sent: disks that cut over at one instant.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CutoverRequest {
    pub(crate) disks: Vec<DiskName>,
    /// How long requests in flight may take to end. Default: 5.
    #[serde(default)]
    pub(crate) deadline_seconds: Option<f64>,
    /// Overwrite graph files that somebody has edited since they were loaded.
    #[serde(default)]
    pub(crate) force: bool,
}

/// A disk of a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DiskName {
    pub(crate) graph: String,
    pub(crate) element: String,
}

/// A disk on its way to another store.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct MoveView {
    pub(crate) graph: String,
    pub(crate) element: String,
    /// Where it moves to, as it was asked for.
    pub(crate) to: String,
    pub(crate) state: MoveState,
    /// One sentence for people: what it waits for, or what it came to.
    pub(crate) message: String,
    /// What is wrong with the graph file, so that the disk cannot cut over, or has and the file does not say so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) trouble: Option<String>,
    /// Bytes of the disk.
    pub(crate) total: u64,
    /// Bytes that may differ still.
    pub(crate) remaining: u64,
    /// Bytes that were copied, again and again where guests have changed them.
    pub(crate) copied: u64,
    /// Bytes of holes and zeros.
    pub(crate) skipped: u64,
    /// Bytes a second, lately.
    pub(crate) rate: u64,
    /// Bytes that were compared.
    pub(crate) verified: u64,
    /// Passes over the disk.
    pub(crate) passes: u64,
    /// For how long no request was admitted at the cut-over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pause_seconds: Option<f64>,
    /// Since it began in this process.
    pub(crate) seconds: f64,
}

/// How far a move is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MoveState {
    /// The old disk is being copied, and guests' changes go to both.
    Copying,
    /// Somebody has stopped the copier for a while.
    Paused,
    /// Both sides are being compared.
    Verifying,
    /// Both are the same, and stay so, until somebody asks for the cut-over.
    Ready,
    /// The new disk takes over.
    Cutting,
    /// The new disk has taken over, and the old one is kept the same.
    Mirroring,
    /// The new disk is the disk.
    Done,
    /// The old disk is the disk, as before.
    Aborted,
}

impl MoveState {
    /// True if nothing more will happen.
    pub(crate) fn is_over(self) -> bool {
        matches!(self, MoveState::Done | MoveState::Aborted)
    }

    /// The word of the control socket.
    pub(crate) fn name(self) -> &'static str {
        match self {
            MoveState::Copying => "copying",
            MoveState::Paused => "paused",
            MoveState::Verifying => "verifying",
            MoveState::Ready => "ready",
            MoveState::Cutting => "cutting",
            MoveState::Mirroring => "mirroring",
            MoveState::Done => "done",
            MoveState::Aborted => "aborted",
        }
    }
}
