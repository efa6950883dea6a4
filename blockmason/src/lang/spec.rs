//! A graph file after expansion: elements and edges, nothing else.

use super::params::Params;
use super::source::{Place, Sources, Span};
use std::sync::Arc;

/// A graph as written, flat: parameters are replaced, files included, compounds expanded.
#[derive(Clone, Debug)]
pub struct Spec {
    /// In the order of their statements.
    pub elements: Vec<ElementSpec>,
    /// In the order of their statements, which matters for the edges that leave one variadic element.
    pub edges: Vec<EdgeSpec>,
    /// What must hold, in the order of their statements.
    pub invariants: Vec<Invariant>,
    /// The texts.
    pub sources: Arc<Sources>,
}

/// One element.
#[derive(Clone, Debug)]
pub struct ElementSpec {
    /// Its name; inside a compound with the names of the compounds around it, `Move.Copy`.
    pub name: String,
    /// The name of its type, `debug_log`.
    pub ty: String,
    /// Where its type stands.
    pub ty_span: Span,
    /// Where its name stands.
    pub span: Span,
    /// The compound that it belongs to was instantiated here.
    pub via: Option<Span>,
    /// Its parameters, without the type.
    pub params: Params,
}

/// One edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeSpec {
    /// Index of the upper element.
    pub from: usize,
    /// Its out port.
    pub from_port: String,
    /// Index of the lower element.
    pub to: usize,
    /// Its in port.
    pub to_port: String,
    /// Where the edge stands.
    pub span: Span,
}

/// A rule about the paths of the graph, `every write path A -> B passes C`.
#[derive(Clone, Debug)]
pub struct Invariant {
    /// What it says, in the administrator's words.
    pub sentence: String,
    /// True if every path passes one of `passes`; false if none does, or if there is none at all where
    /// `passes` is empty.
    pub every: bool,
    /// The paths it is about.
    pub paths: Paths,
    /// Where they begin.
    pub from: Group,
    /// Where they end.
    pub to: Group,
    /// What they pass.
    pub passes: Vec<Group>,
    /// Where the rule stands.
    pub span: Span,
    /// The compound that it belongs to was instantiated here.
    pub via: Option<Span>,
    /// The compound instance in which its names were looked up, `Move.`; or empty.
    pub(super) scope: String,
}

/// Which paths an invariant is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paths {
    /// All.
    All,
    /// Those that a read can travel.
    Read,
    /// Those that a change can travel: a write, a discard, a write of zeros.
    Write,
}

/// Some elements of a graph.
#[derive(Clone, Debug)]
pub struct Group {
    /// Which.
    pub what: What,
    /// Where they are named.
    pub span: Span,
}

/// Which elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// The one with this index.
    Element(usize),
    /// All of a type or family: `any file`, `any sink`.
    Any(String),
}

impl Spec {
    /// A graph without elements.
    pub fn empty(sources: Arc<Sources>) -> Spec {
        Spec { elements: Vec::new(), edges: Vec::new(), invariants: Vec::new(), sources }
    }

    /// The place where an element stands: `vm1.mason:12:9`.
    pub fn place(&self, element: &ElementSpec) -> Place {
        self.sources.place(element.span)
    }

    /// The index of the element with that full name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.elements.iter().position(|element| element.name == name)
    }

    /// The out ports that edges give an element, in the order of the edges. Walks over all edges; for
    /// every element of a large graph use [`Spec::edges_by_element`].
    pub fn outs(&self, element: usize) -> impl Iterator<Item = &str> {
        self.edges.iter().filter(move |edge| edge.from == element).map(|edge| edge.from_port.as_str())
    }

    /// The element with that index and all that it leads to, itself first.
    pub fn reached(&self, from: usize) -> Vec<usize> {
        let outs = self.edges_by_element();
        let (mut reached, mut next) = (vec![from], 0);
        let mut seen = vec![false; self.elements.len()];
        seen[from] = true;
        while let Some(&ix) = reached.get(next) {
            next += 1;
            let more = outs[ix].iter().map(|edge| edge.to);
            reached.extend(more.filter(|to| !std::mem::replace(&mut seen[*to], true)));
        }
        reached
    }

    /// The edges that leave each element, in their order.
    pub fn edges_by_element(&self) -> Vec<Vec<&EdgeSpec>> {
        let mut outs = vec![Vec::new(); self.elements.len()];
        for edge in &self.edges {
            outs[edge.from].push(edge);
        }
        outs
    }
}

/// Equal if elements, edges and invariants are, wherever they stand.
impl PartialEq for Spec {
    fn eq(&self, other: &Self) -> bool {
        let key = |edge: &EdgeSpec| (edge.from, edge.from_port.clone(), edge.to, edge.to_port.clone());
        self.elements == other.elements
            && self.edges.iter().map(key).eq(other.edges.iter().map(key))
            && self.invariants == other.invariants
    }
}

/// Equal if sentence and rule are, wherever they stand.
impl PartialEq for Invariant {
    fn eq(&self, other: &Self) -> bool {
        let key = |it: &Self| (it.every, it.paths, it.from.clone(), it.to.clone(), it.passes.clone());
        self.sentence == other.sentence && key(self) == key(other)
    }
}

/// Equal if they are the same elements.
impl PartialEq for Group {
    fn eq(&self, other: &Self) -> bool {
        self.what == other.what
    }
}

/// Equal if name, type and parameters are, wherever they stand.
impl PartialEq for ElementSpec {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name && self.ty == other.ty && self.params == other.params
    }
}
