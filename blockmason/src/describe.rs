//! What a type of element says of itself, as data: the checker, `mason elements`, the reference
//! pages and the registry test read it; nothing of it is on the data path.

use crate::element::Element;
use crate::error::Error;
use crate::lang::value::{Ref, Service};
use crate::lang::{ParamError, Params};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// One type of element. The library's table is a slice of references to these.
pub struct ElementType {
    /// The name in the graph language, `debug_log`.
    pub name: &'static str,
    /// One line, no full stop: "passes requests through and records them".
    pub summary: &'static str,
    /// What it does, when to use it, its order, durability and error rules. Markdown.
    pub doc: &'static str,
    /// Where it stands in the library and in a graph.
    pub family: Family,
    /// Its parameters, from the doc comments of its parameter struct (see [`crate::params!`]).
    pub params: &'static [Param],
    /// Its ports.
    pub ports: Ports,
    /// Values to read, set or call while the graph runs.
    pub handlers: &'static [Handler],
    /// Names of the service traits that it offers to element references (`dirty_map`, `meter`).
    pub provides: &'static [&'static str],
    /// True if it only routes or watches: data and addresses below it are those above it.
    pub passes_through: bool,
    /// True if the graph must be the same at the next start for the data to make sense: it stands in the
    /// heads of the volumes below, see [`crate::heads`].
    pub layout: bool,
    /// Parameters of a layout type that may change from start to start all the same.
    pub tuning: &'static [&'static str],
    /// True if the sizes of its parts, but for the last one's, belong to the layout.
    pub sizes: bool,
    /// How a reload replaces it.
    pub handover: Handover,
    /// What acknowledged writes outlive, as far as this element is concerned.
    pub survives: Survives,
    /// True if a request that changes data goes down several of its out ports at the same address: all of
    /// them see overlapping requests in one order, which is kept on every way into it.
    pub mirrors: bool,
    /// True if it reads and writes on its own account, a copier: it may hold ranges while others wait
    /// ([`Cx::hold`](crate::Cx::hold)). Its requests are ordered with those of all others that reach what
    /// lies below its ports.
    pub serialises: bool,
    /// Which requests it lets through, by its parameters, which have been checked; what invariants
    /// about read and write paths go by.
    pub carries: fn(&Params) -> Carries,
    /// A small graph that checks and runs as it stands, with an export, in a folder of its own.
    pub example: &'static str,
    /// Deserialises the parameters and drops them again: the checker's call.
    pub check: fn(&Params) -> Result<(), Vec<ParamError>>,
    /// Makes an instance. May open files and sockets; spawns nothing and changes nothing that a
    /// rolled-back reload would have to undo.
    pub build: fn(&Build<'_>) -> Result<Arc<dyn Element>, Error>,
}

impl ElementType {
    /// What most types leave as it is: `..ElementType::BASE`. Whoever forgets a name, a summary or
    /// `build` is told by the tests that walk the table.
    pub const BASE: ElementType = ElementType {
        name: "",
        summary: "",
        doc: "",
        family: Family::Route,
        params: &[],
        ports: Ports::THROUGH,
        handlers: &[],
        provides: &[],
        passes_through: false,
        layout: false,
        tuning: &[],
        sizes: false,
        handover: Handover::Gate,
        survives: Survives::Power,
        mirrors: false,
        serialises: false,
        carries: |_| Carries::ALL,
        example: "",
        check: |_| Ok(()),
        build: |_| Err(Error::internal("a type that cannot be built")),
    };

    /// True if two graphs that differ only in such elements, each with one out port, may run beside each
    /// other. Not so for what orders overlapping requests: without it, or with another one, they
    /// would be ordered differently.
    pub(crate) fn comes_and_goes(&self) -> bool {
        self.handover == Handover::Free && !self.mirrors && !self.serialises
    }
}

/// What [`ElementType::build`] is given.
pub struct Build<'a> {
    /// The element's full name in its graph, `Move.Copy`.
    pub name: &'a str,
    /// The graph's name.
    pub graph: &'a str,
    /// The parameters, checked before.
    pub params: &'a Params,
    /// Where state may be kept (`--state`).
    pub state_dir: &'a Path,
    /// The elements of the graph that have been made so far: all that this one refers to.
    pub others: &'a HashMap<String, Arc<dyn Element>>,
}

impl Build<'_> {
    /// The parameters as the element's own struct: `build.read(Params::from)`.
    ///
    /// # Errors
    /// The checker has been over them; what is wrong all the same is one sentence.
    pub fn read<T>(&self, from: fn(&Params) -> Result<T, Vec<ParamError>>) -> Result<T, Error> {
        from(self.params).map_err(|errors| {
            let all: Vec<_> = errors.iter().map(ToString::to_string).collect();
            Error::invalid(all.join("; "))
        })
    }

    /// The service of the element that a parameter refers to. An element that is rebuilt rebuilds those that
    /// refer to it, so it may be kept.
    ///
    /// # Errors
    /// [`Kind::Internal`](crate::Kind::Internal) if the element declares the service and does not provide it.
    pub fn refer<T: Service + ?Sized + 'static>(&self, to: &Ref<T>) -> Result<Arc<T>, Error> {
        let provided = self.others.get(to.name()).and_then(|other| other.provide(T::NAME));
        let service =
            provided.and_then(|service| service.downcast().ok()).map(|service: Box<Arc<T>>| *service);
        service.ok_or_else(|| Error::internal(format!("{} provides no {}", to.name(), T::NAME)))
    }
}

/// Where a type stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Requests enter here.
    Export,
    /// Requests end here.
    Sink,
    /// Decides where requests go, or watches them.
    Route,
    /// Changes data or addresses.
    Transform,
    /// Brings one disk up to date with another one.
    Migrate,
    /// A volume of a pool.
    Parallax,
    /// Breaks things on purpose.
    Fault,
}

impl Family {
    /// The word of the reference pages, `sink`.
    pub fn name(self) -> &'static str {
        match self {
            Family::Export => "export",
            Family::Sink => "sink",
            Family::Route => "route",
            Family::Transform => "transform",
            Family::Migrate => "migrate",
            Family::Parallax => "parallax",
            Family::Fault => "fault",
        }
    }
}

/// The ports of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// True if it has the port `in`; exports and other sources have none.
    pub input: bool,
    /// Its out ports.
    pub out: Outs,
}

/// The out ports of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outs {
    /// None: it is a sink.
    None,
    /// These, each with exactly one edge.
    Named(&'static [&'static str]),
    /// Any names that its edges give it, at least `min` of them, in the order of the edges.
    Variadic {
        /// The fewest that make sense.
        min: usize,
    },
}

impl Ports {
    /// `in` and `out`: what most elements have.
    pub const THROUGH: Ports = Ports { input: true, out: Outs::Named(&["out"]) };
    /// Only `in`.
    pub const SINK: Ports = Ports { input: true, out: Outs::None };
    /// Only `out`.
    pub const SOURCE: Ports = Ports { input: false, out: Outs::Named(&["out"]) };
}

/// Which requests an element lets through, or takes if it is a sink. What is in doubt is let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carries {
    /// Reads.
    pub reads: bool,
    /// Changes: writes, discards, writes of zeros. One of them is enough.
    pub writes: bool,
}

impl Carries {
    /// Everything, in whole or in part.
    pub const ALL: Carries = Carries { reads: true, writes: true };
    /// No change of the disk below.
    pub const NO_WRITES: Carries = Carries { reads: true, writes: false };
}

/// One parameter.
#[derive(Clone, Copy, Debug)]
pub struct Param {
    /// The key in the graph language.
    pub name: &'static str,
    /// What kind of value it takes, in the words of the reference: `size`, `path`, `yes or no`.
    pub kind: &'static str,
    /// Its doc comment.
    pub doc: &'static str,
    /// The default as an administrator would write it; None if it must be given or may be absent.
    pub default: Option<&'static str>,
    /// True if it must be given.
    pub required: bool,
    /// True if it takes any number of values.
    pub list: bool,
    /// The service trait that the referenced element must provide, for an element reference.
    pub refers: Option<&'static str>,
}

/// A named value to read, write or call on a running element (Click's handlers).
#[derive(Clone, Copy, Debug)]
pub struct Handler {
    /// Its name, `rate`.
    pub name: &'static str,
    /// What can be done with it.
    pub access: Access,
    /// One line.
    pub doc: &'static str,
}

/// What can be done with a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `mason get`.
    Read,
    /// `mason get` and `mason set`.
    ReadWrite,
    /// `mason call`.
    Call,
}

/// How a reload replaces an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// Correctness does not depend on seeing every request: swapped without a pause.
    Free,
    /// Sources are gated and requests in flight end before the new one takes over.
    Gate,
}

/// What acknowledged writes outlive. Ordered: a graph is as good as its least element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Survives {
    /// Nothing: they are in this process's memory.
    Nothing,
    /// The death of this process.
    Process,
    /// Loss of power, once flushed.
    Power,
}

/// The library's table of types.
pub type Catalogue = &'static [&'static ElementType];

/// The type of that name.
pub fn find(catalogue: Catalogue, name: &str) -> Option<&'static ElementType> {
    // The paper writes `debug.log` for the type `debug_log`.
    let plain = name.replace('.', "_");
    catalogue.iter().copied().find(|ty| ty.name == plain)
}
