//! A graph of elements, assembled and ready to carry requests. Immutable: a change is a new graph.

pub mod build;
pub(crate) mod edge;
pub mod handlers;
mod order;
pub(crate) mod places;
pub(crate) mod tally;

pub use order::{Conflict, PlaceReading};
pub use tally::{EdgeReading, Histogram, Moved, OpReading, SourceReading};

use crate::describe::{ElementType, Outs};
use crate::element::{Children, Element};
use crate::error::{Error, Result};
use crate::geometry::Geometry;
use crate::request::Op;
use crate::sched::{Coalesced, Order, RangeLock};
use edge::Edge;
use std::any::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tally::Tally;
use tokio::sync::{Notify, watch};

/// An element with its name. Two graphs share it where name, type and parameters are the same.
pub struct Instance {
    /// The full name in the graph, `Move.Copy`.
    pub name: String,
    /// Its type.
    pub ty: &'static ElementType,
    /// Where it stands in the graph file, `vm1.mason:3:1`.
    pub place: String,
    /// The element itself.
    pub element: Arc<dyn Element>,
    /// Orders overlapping changes where the framework reads, modifies and writes.
    pub(crate) ranges: RangeLock,
    /// Orders overlapping requests of the streams that meet above a mirror or a serialiser. Here, so that
    /// two graphs that share the instance share the order.
    pub(crate) order: RangeLock,
    /// Shares the flushes that dependent requests wait for.
    pub(crate) flushes: Coalesced,
}

impl Instance {
    /// An instance.
    pub fn new(
        name: impl Into<String>,
        ty: &'static ElementType,
        place: impl Into<String>,
        element: Arc<dyn Element>,
    ) -> Arc<Instance> {
        Arc::new(Instance {
            name: name.into(),
            ty,
            place: place.into(),
            element,
            ranges: RangeLock::default(),
            order: RangeLock::default(),
            flushes: Coalesced::default(),
        })
    }

    /// The same element under another name, for a graph that takes over behind a gate: who holds ranges of the
    /// one is not known to the other.
    pub(crate) fn renamed(&self, name: &str, place: String) -> Arc<Instance> {
        Instance::new(name, self.ty, place, self.element.clone())
    }
}

/// An edge to be, by the indices of its ends.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The upper end.
    pub from: usize,
    /// Its out port.
    pub port: String,
    /// The lower end.
    pub to: usize,
}

/// One element's place in a graph.
pub(crate) struct Node {
    pub(crate) instance: Arc<Instance>,
    /// The same as `instance.element`, one pointer nearer.
    pub(crate) element: Arc<dyn Element>,
    /// Its out edges are `edges[first_edge..][..edge_count]`, in the order of its ports.
    pub(crate) first_edge: u32,
    pub(crate) edge_count: u32,
    pub(crate) geometry: Geometry,
    pub(crate) prepared: Option<Box<dyn Any + Send + Sync>>,
    /// Of a serialiser: what its requests are ordered by.
    pub(crate) order: Option<Order>,
}

/// A graph. Requests enter at its sources and travel along its edges.
pub struct Graph {
    name: String,
    pub(crate) nodes: Vec<Node>,
    pub(crate) edges: Vec<Edge>,
    identities: HashSet<usize>,
    pub(crate) tallies: Vec<Arc<Tally>>,
    /// The edges at which overlapping requests are ordered, group by group.
    places: Vec<Vec<usize>>,
    failed: AtomicBool,
    /// Tells the work of its own of every element to end; replaced when it may begin anew.
    closing: Mutex<watch::Sender<bool>>,
    pub(crate) lanes: Lanes,
    /// Those of them with something in flight that must not be left behind.
    pub(crate) needed: Lanes,
    /// Elements whose detached work may be left behind.
    left_behind: Mutex<Vec<u32>>,
    /// Another graph has taken over without that work.
    is_left: AtomicBool,
    /// Counts the elements whose work of their own goes on.
    pub(crate) runs: Lanes,
}

/// Counts who carries requests of a graph, and tells when the last one has left.
#[derive(Default)]
pub(crate) struct Lanes {
    count: AtomicUsize,
    empty: Notify,
}

impl Lanes {
    pub(crate) fn enter(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn leave(&self) {
        if self.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.empty.notify_waiters();
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Waits until nobody is left.
    pub(crate) async fn emptied(&self) {
        loop {
            let left = self.empty.notified();
            if self.is_empty() {
                return;
            }
            left.await;
        }
    }
}

impl Graph {
    /// Assembles a graph whose requests will be carried by `shards` shards. The checker has been
    /// over it: what is wrong here is a sentence about the graph all the same, never a panic.
    pub fn assemble(
        name: &str,
        instances: &[Arc<Instance>],
        connections: &[Connection],
        shards: usize,
    ) -> Result<Graph> {
        let ports = sort_ports(instances, connections)?;
        let order = children_first(instances, &ports)?;
        let mut edges = Vec::with_capacity(connections.len());
        let mut geometries: Vec<Option<Geometry>> = vec![None; instances.len()];
        let mut nodes: Vec<Option<Node>> = instances.iter().map(|_| None).collect();
        for ix in order {
            let instance = &instances[ix];
            let children: Vec<_> = ports[ix]
                .iter()
                .map(|(port, to)| geometries[*to].map(|geometry| (port.to_string(), geometry)))
                .collect::<Option<_>>()
                .ok_or_else(|| Error::internal("an element was reached before what lies below it"))?;
            let prepared = instance
                .element
                .prepare(Children { ports: &children })
                .map_err(|error| error.in_element(&instance.name))?;
            geometries[ix] = Some(prepared.geometry);
            let first_edge = edges.len() as u32;
            for ((port, to), (_, geometry)) in ports[ix].iter().zip(&children) {
                edges.push(Edge::new(ix as u32, port, *to as u32, geometry, prepared.demand));
            }
            nodes[ix] = Some(Node {
                instance: instance.clone(),
                element: instance.element.clone(),
                first_edge,
                edge_count: edges.len() as u32 - first_edge,
                geometry: prepared.geometry,
                prepared: prepared.state,
                order: None,
            });
        }
        let mut nodes: Vec<Node> = nodes.into_iter().flatten().collect();
        let locked: HashSet<u32> = edges.iter().filter(|edge| edge.locks).map(|edge| edge.to).collect();
        edges.iter_mut().filter(|edge| locked.contains(&edge.to)).for_each(Edge::lock_changes);
        let places = order::apply(&mut nodes, &mut edges)?;
        let tallies = (0..shards).map(|_| Arc::new(Tally::new(&nodes, edges.len()))).collect();
        Ok(Graph {
            name: name.to_owned(),
            identities: instances.iter().map(identity).collect(),
            nodes,
            edges,
            tallies,
            places,
            failed: AtomicBool::new(false),
            closing: Mutex::new(watch::channel(false).0),
            lanes: Lanes::default(),
            needed: Lanes::default(),
            left_behind: Mutex::default(),
            is_left: AtomicBool::new(false),
            runs: Lanes::default(),
        })
    }

    /// Goes on with the counters of the graph before: those of sources with the same name, and of edges
    /// between the same elements and ports.
    pub(crate) fn continue_counting(&mut self, before: &Graph) {
        let name = |graph: &Graph, node: u32| graph.nodes[node as usize].instance.name.clone();
        let key =
            |graph: &Graph, edge: &Edge| (name(graph, edge.from), edge.port.clone(), name(graph, edge.to));
        let edges = before.edges.iter().enumerate().map(|(ix, edge)| (key(before, edge), ix));
        let edges: HashMap<_, _> = edges.collect();
        let kept = self.edges.iter().enumerate();
        let kept = kept.filter_map(|(ix, edge)| Some((ix, *edges.get(&key(self, edge))?)));
        let kept: Vec<(usize, usize)> = kept.collect();
        let sources =
            self.sources().filter_map(|ix| Some((ix, before.source(&self.nodes[ix].instance.name)?)));
        let sources: Vec<(usize, usize)> = sources.collect();
        for (ix, old) in &kept {
            self.edges[*ix].traced = before.edges[*old].traced.clone();
        }
        // Nobody else has the tallies of a graph that is being built.
        for (tally, before) in self.tallies.iter_mut().filter_map(Arc::get_mut).zip(&before.tallies) {
            kept.iter().for_each(|(ix, old)| tally.edges[*ix] = before.edges[*old].clone());
            sources.iter().for_each(|(ix, old)| tally.sources[*ix] = before.sources[*old].clone());
        }
    }

    /// The graph's name: the stem of its file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its instances, in the order of the graph file.
    pub fn instances(&self) -> impl Iterator<Item = &Arc<Instance>> {
        self.nodes.iter().map(|node| &node.instance)
    }

    /// The index of an element.
    pub fn node(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.instance.name == name)
    }

    /// The index of a source, which no edge leads to.
    pub fn source(&self, name: &str) -> Option<usize> {
        self.node(name).filter(|node| !self.nodes[*node].instance.ty.ports.input)
    }

    /// The index of an out port.
    ///
    /// # Errors
    /// The element has no such port.
    pub(crate) fn port(&self, node: usize, name: &str) -> Result<usize> {
        let Node { first_edge, edge_count, instance, .. } = &self.nodes[node];
        let mut edges = self.edges[*first_edge as usize..][..*edge_count as usize].iter();
        let none = || Error::internal(format!("it has no port {name}")).in_element(&instance.name);
        edges.position(|edge| &*edge.port == name).ok_or_else(none)
    }

    /// True if requests of clients enter at this element.
    pub fn is_source(&self, node: usize) -> bool {
        !self.nodes[node].instance.ty.ports.input
    }

    /// What an element looks like from above.
    pub fn geometry(&self, node: usize) -> Geometry {
        self.nodes[node].geometry
    }

    /// What lies below the only out port of an element, an export above all.
    pub fn below(&self, node: usize) -> Result<Geometry> {
        let node = &self.nodes[node];
        match &self.edges[node.first_edge as usize..][..node.edge_count as usize] {
            [edge] => Ok(self.nodes[edge.to as usize].geometry.above()),
            edges => Err(Error::internal(format!("one out port was expected, not {}", edges.len()))),
        }
    }

    /// True once an element of this graph has panicked: it answers nothing but errors until reloaded.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// True if it had not failed before.
    pub(crate) fn fail(&self) -> bool {
        !self.failed.swap(true, Ordering::Relaxed)
    }

    /// Tells the work of its own of every element to end.
    pub(crate) fn announce_closing(&self) {
        self.closing_sender().send_replace(true);
    }

    /// Takes the announcement back for what starts from now on; what has heard it ends all the same.
    pub(crate) fn forget_closing(&self) {
        *self.closing_sender() = watch::channel(false).0;
    }

    pub(crate) fn closing(&self) -> watch::Receiver<bool> {
        self.closing_sender().subscribe()
    }

    fn closing_sender(&self) -> MutexGuard<'_, watch::Sender<bool>> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if nothing of this graph is in flight on any shard. A graph that shards still admit into
    /// may have something the next moment.
    pub fn is_drained(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Waits until nothing of this graph is in flight on any shard.
    pub async fn drained(&self) {
        self.lanes.emptied().await;
    }

    /// Says of which elements the detached work [need not end](crate::sched::Change::leave_behind) before another graph
    /// takes over.
    pub(crate) fn leave_behind(&self, elements: &[String]) {
        let nodes = elements.iter().filter_map(|name| self.node(name));
        *self.left_behind() = nodes.map(|node| node as u32).collect();
    }

    /// True if the detached work of that element may be left behind.
    pub(crate) fn leaves_behind(&self, node: u32) -> bool {
        self.left_behind().contains(&node)
    }

    /// Another graph has taken over, and what is in flight here was left behind.
    pub(crate) fn set_left(&self) {
        self.is_left.store(true, Ordering::Release);
    }

    pub(crate) fn is_left(&self) -> bool {
        self.is_left.load(Ordering::Acquire)
    }

    fn left_behind(&self) -> MutexGuard<'_, Vec<u32>> {
        self.left_behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing is in flight but what may be left behind.
    pub(crate) async fn only_left(&self) {
        self.needed.emptied().await;
    }

    /// True if that instance, not only one like it, is part of this graph.
    pub(crate) fn has(&self, instance: &Arc<Instance>) -> bool {
        self.identities.contains(&identity(instance))
    }

    /// The indices of its sources.
    pub(crate) fn sources(&self) -> impl Iterator<Item = usize> {
        (0..self.nodes.len()).filter(|node| !self.nodes[*node].instance.ty.ports.input)
    }

    /// The graph without the elements that need not see every request: each other instance, by its name too, and
    /// what its out ports lead to. Two graphs that are equal in this can take over from each other
    /// without a pause.
    pub(crate) fn contracted(&self) -> BTreeMap<(usize, &str), Vec<(&str, usize)>> {
        let identity = |node: usize| identity(&self.nodes[node].instance);
        let name = |node: usize| self.nodes[node].instance.name.as_str();
        let through = |node: usize| {
            let node = &self.nodes[node];
            (node.instance.ty.comes_and_goes() && node.edge_count == 1).then_some(node.first_edge)
        };
        let behind = |mut node: usize| {
            while let Some(edge) = through(node) {
                node = self.edges[edge as usize].to as usize;
            }
            identity(node)
        };
        let stays = (0..self.nodes.len()).filter(|node| through(*node).is_none());
        let ports = |node: usize| {
            let Node { first_edge, edge_count, .. } = self.nodes[node];
            let edges = &self.edges[first_edge as usize..][..edge_count as usize];
            edges.iter().map(|edge| (&*edge.port, behind(edge.to as usize))).collect()
        };
        stays.map(|node| ((identity(node), name(node)), ports(node))).collect()
    }

    /// What every edge has carried so far, on all shards.
    pub fn read_edges(&self) -> Vec<EdgeReading> {
        let reading = |(ix, edge): (usize, &Edge)| {
            let mut ops = [Moved::default(); Op::ALL.len()];
            self.tallies.iter().for_each(|tally| tally.edges[ix].read(&mut ops));
            let (sampled, sampled_ns) = edge.traced.read();
            EdgeReading {
                from: self.nodes[edge.from as usize].instance.name.clone(),
                port: edge.port.to_string(),
                to: self.nodes[edge.to as usize].instance.name.clone(),
                requests: ops.iter().map(|op| op.requests).sum(),
                bytes: ops.iter().map(|op| op.bytes).sum(),
                ops,
                sampled,
                sampled_ns,
            }
        };
        self.edges.iter().enumerate().map(reading).collect()
    }

    /// What has come to each element, from clients or by its edges, by operation in the order of [`Op::ALL`].
    pub fn arrived(&self) -> Vec<[Moved; Op::ALL.len()]> {
        let mut arrived = vec![[Moved::default(); Op::ALL.len()]; self.nodes.len()];
        for (ix, edge) in self.edges.iter().enumerate() {
            let ops = &mut arrived[edge.to as usize];
            self.tallies.iter().for_each(|tally| tally.edges[ix].read(ops));
        }
        for node in self.sources() {
            for (sum, op) in arrived[node].iter_mut().zip(&self.read_source(node).ops) {
                sum.requests += op.requests;
                sum.bytes += op.bytes;
            }
        }
        arrived
    }

    /// How many requests of clients have entered so far, on all shards, answered or not. What a serialiser does on
    /// its own account does not count.
    pub(crate) fn guest_requests(&self) -> u64 {
        let clients =
            self.nodes.iter().filter(|node| !node.instance.ty.ports.input && !node.instance.ty.serialises);
        let edges = clients.flat_map(|node| node.first_edge..node.first_edge + node.edge_count);
        let carried =
            |edge: u32| self.tallies.iter().map(|tally| tally.edges[edge as usize].requests()).sum::<u64>();
        edges.map(carried).sum()
    }

    /// What has entered at an element, on all shards; nothing for one that is no source.
    pub fn read_source(&self, node: usize) -> SourceReading {
        let mut reading = SourceReading::default();
        for tally in &self.tallies {
            tally.read_source(node, &mut reading);
        }
        reading
    }
}

/// What tells an instance from one like it: its element, which it keeps when it is renamed.
fn identity(instance: &Arc<Instance>) -> usize {
    Arc::as_ptr(&instance.element).cast::<()>() as usize
}

/// Each element's out ports with what they lead to, in the type's order or that of the edges.
fn sort_ports<'a>(
    instances: &[Arc<Instance>],
    connections: &'a [Connection],
) -> Result<Vec<Vec<(&'a str, usize)>>> {
    let mut ports: Vec<Vec<(&str, usize)>> = instances.iter().map(|_| Vec::new()).collect();
    for Connection { from, port, to } in connections {
        if *from >= instances.len() || *to >= instances.len() {
            return Err(Error::internal("an edge leads out of the graph"));
        }
        ports[*from].push((port, *to));
    }
    for (instance, ports) in instances.iter().zip(&mut ports) {
        if let Outs::Named(names) = instance.ty.ports.out {
            let place = |port: &str| names.iter().position(|name| *name == port);
            ports.sort_by_key(|(port, _)| place(port));
            if ports.len() != names.len() || ports.iter().zip(names).any(|((port, _), name)| port != name) {
                let message = format!("its out ports are {names:?}, each with one edge");
                return Err(Error::invalid(message).in_element(&instance.name));
            }
        }
    }
    Ok(ports)
}

/// An order in which every element comes after all that lies below it.
fn children_first(instances: &[Arc<Instance>], ports: &[Vec<(&str, usize)>]) -> Result<Vec<usize>> {
    let mut waiting: Vec<usize> = ports.iter().map(Vec::len).collect();
    let mut above: Vec<Vec<usize>> = vec![Vec::new(); instances.len()];
    for (ix, ports) in ports.iter().enumerate() {
        for (_, to) in ports {
            above[*to].push(ix);
        }
    }
    let mut order: Vec<usize> = (0..instances.len()).filter(|ix| waiting[*ix] == 0).collect();
    let mut next = 0;
    while let Some(&ix) = order.get(next) {
        next += 1;
        for &parent in &above[ix] {
            waiting[parent] -= 1;
            if waiting[parent] == 0 {
                order.push(parent);
            }
        }
    }
    match waiting.iter().position(|left| *left > 0) {
        None => Ok(order),
        Some(ix) => Err(Error::invalid("it is part of a circle").in_element(&instances[ix].name)),
    }
}
