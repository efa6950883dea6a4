//! What a graph file says, before parameters, includes and compounds are expanded.

use super::source::Span;
use super::spec::Paths;

/// A name, key or port and its place.
#[derive(Clone, Debug)]
pub(super) struct Name {
    pub(super) text: String,
    pub(super) span: Span,
}

/// One statement.
#[derive(Debug)]
pub(super) enum Statement {
    Element(Element),
    Chain(Vec<End>),
    Param { key: Name, value: Value },
    Include(Name),
    Compound(Compound),
    Invariant(Invariant),
}

/// `element NAME (KEY value...)...`
#[derive(Debug)]
pub(super) struct Element {
    pub(super) name: Name,
    pub(super) settings: Vec<Setting>,
}

/// `(KEY value...)`
#[derive(Debug)]
pub(super) struct Setting {
    pub(super) key: Name,
    pub(super) values: Vec<Value>,
}

/// One end of an edge: `NAME` or `(NAME, PORT)`.
#[derive(Debug)]
pub(super) struct End {
    pub(super) name: Name,
    pub(super) port: Option<Name>,
    pub(super) span: Span,
}

/// `compound NAME (KEY[=value]...) { ... }`
#[derive(Debug)]
pub(super) struct Compound {
    pub(super) name: Name,
    pub(super) keys: Vec<(Name, Option<Value>)>,
    pub(super) body: Vec<Statement>,
    pub(super) ports: Vec<Port>,
}

/// `port PORT = (NAME, PORT)`
#[derive(Debug)]
pub(super) struct Port {
    pub(super) port: Name,
    pub(super) name: Name,
    pub(super) inner: Name,
}

/// `invariant "SENTENCE": every write path A -> B passes C or D`
#[derive(Debug)]
pub(super) struct Invariant {
    pub(super) sentence: Value,
    pub(super) every: bool,
    pub(super) paths: Paths,
    pub(super) from: Which,
    pub(super) to: Which,
    pub(super) passes: Vec<Which>,
    /// The rule, without the sentence.
    pub(super) span: Span,
}

/// Some elements: `NAME`, or `any KIND`.
#[derive(Debug)]
pub(super) struct Which {
    pub(super) any: bool,
    pub(super) name: Name,
}

/// A word or a string.
#[derive(Debug)]
pub(super) struct Value {
    pub(super) parts: Vec<Part>,
    pub(super) span: Span,
}

/// A piece of a value.
#[derive(Debug)]
pub(super) enum Part {
    Text(String),
    /// `${KEY}`
    Param(Name),
}
