//! The checker: all that can be known to be wrong with a graph before anything is opened.

mod invariant;

use super::diag::{Bag, Diagnostic, Diagnostics};
use super::params::{ParamError, Value};
use super::parse::shorten;
use super::source::Span;
use super::spec::{EdgeSpec, ElementSpec, Spec};
use super::suggest;
use crate::describe::{self, Catalogue, ElementType, Family, Outs};
use crate::graph::places::Shape;
use std::collections::HashMap;

/// The most edges between an export and a sink.
const MAX_DEPTH: usize = 1000;

/// Compares a graph with the table of element types.
///
/// # Errors
/// Everything that is wrong.
pub fn check(spec: &Spec, catalogue: Catalogue) -> Result<(), Diagnostics> {
    let mut bag = Bag::default();
    let mut checker = Checker::new(spec, catalogue);
    checker.types(&mut bag);
    checker.parameters(&mut bag);
    checker.edges(&mut bag);
    checker.out_ports(&mut bag);
    checker.references(&mut bag);
    checker.edge_cycles(&mut bag);
    checker.depth(&mut bag);
    checker.reference_cycles(&mut bag);
    checker.sources(&mut bag);
    if bag.is_empty() {
        // What they say of a graph that is wrong would be wrong too.
        checker.addresses(&mut bag);
        invariant::check(&checker, &mut bag);
    }
    bag.finish(spec.sources.clone())
}

/// What can be said of each element without the others.
pub(super) fn each(spec: &Spec, catalogue: Catalogue, bag: &mut Bag) {
    let checker = Checker::new(spec, catalogue);
    checker.types(bag);
    checker.parameters(bag);
}

struct Checker<'a> {
    spec: &'a Spec,
    catalogue: Catalogue,
    /// The type of each element; None if there is no such type.
    types: Vec<Option<&'static ElementType>>,
    /// The edges that leave each element.
    outs: Vec<Vec<&'a EdgeSpec>>,
    /// The elements that each refers to, and where.
    refs: Vec<Vec<(usize, Span)>>,
}

impl<'a> Checker<'a> {
    fn new(spec: &'a Spec, catalogue: Catalogue) -> Self {
        let types = spec.elements.iter().map(|element| describe::find(catalogue, &element.ty)).collect();
        Checker {
            spec,
            catalogue,
            types,
            outs: spec.edges_by_element(),
            refs: vec![Vec::new(); spec.elements.len()],
        }
    }

    fn element(&self, index: usize) -> &'a ElementSpec {
        &self.spec.elements[index]
    }

    /// The elements whose type is known.
    fn known(&self) -> impl Iterator<Item = (usize, &'a ElementSpec, &'static ElementType)> {
        let known = self.types.iter().enumerate();
        let spec = self.spec;
        known.filter_map(move |(index, ty)| ty.map(|ty| (index, &spec.elements[index], ty)))
    }

    fn types(&self, bag: &mut Bag) {
        for (element, ty) in self.spec.elements.iter().zip(&self.types) {
            if ty.is_none() {
                let message =
                    format!("element `{}`: there is no type `{}`", element.name, shorten(&element.ty));
                let near = suggest::did_you_mean(&element.ty, self.catalogue.iter().map(|ty| ty.name));
                let help = near.unwrap_or_else(|| String::from("`mason elements` lists the types"));
                let error = Diagnostic::new("mason::unknown-type", element.ty_span, message).help(help);
                bag.push(within(element, error));
            }
        }
    }

    fn parameters(&self, bag: &mut Bag) {
        for (_, element, ty) in self.known() {
            for error in (ty.check)(&element.params).err().unwrap_or_default() {
                bag.push(within(element, parameter(element, ty, error)));
            }
        }
    }

    /// Both ends of every edge are ports of that direction.
    fn edges(&self, bag: &mut Bag) {
        for edge in &self.spec.edges {
            let (from, to) = (self.element(edge.from), self.element(edge.to));
            if let Some(ty) = self.types[edge.from] {
                self.leaves(edge, from, ty, bag);
            }
            match self.types[edge.to] {
                Some(ty) if !ty.ports.input => {
                    let message = format!("an edge enters `{}`, where requests begin", to.name);
                    let error = Diagnostic::new("mason::orientation", edge.span, message);
                    let help = format!("`{}` has no in port; is the edge the wrong way round?", ty.name);
                    bag.push(error.label(to.span, format!("of the type `{}`", ty.name)).help(help));
                }
                Some(ty) if edge.to_port != "in" => {
                    let message =
                        format!("element `{}` ({}) has no in port `{}`", to.name, ty.name, edge.to_port);
                    let error = Diagnostic::new("mason::unknown-port", edge.span, message);
                    bag.push(error.help(String::from("its in port is `in`")));
                }
                _ => {}
            }
        }
    }

    /// The element that an edge leaves has the port.
    fn leaves(&self, edge: &EdgeSpec, from: &ElementSpec, ty: &ElementType, bag: &mut Bag) {
        let (name, port) = (&from.name, &edge.from_port);
        let error = match ty.ports.out {
            Outs::None => {
                let message = format!("an edge leaves `{name}`, where requests end");
                Diagnostic::new("mason::orientation", edge.span, message)
                    .label(from.span, format!("of the type `{}`", ty.name))
                    .help(format!("`{}` has no out port; is the edge the wrong way round?", ty.name))
            }
            Outs::Named(ports) if !ports.contains(&port.as_str()) => {
                let message = format!("element `{name}` ({}) has no out port `{port}`", ty.name);
                let near = suggest::did_you_mean(port, ports.iter().copied());
                let help = near
                    .unwrap_or_else(|| format!("its out ports: {}", suggest::list(ports.iter().copied())));
                Diagnostic::new("mason::unknown-port", edge.span, message).help(help)
            }
            Outs::Variadic { .. } if port == "out" => {
                let message = format!("element `{name}` ({}) has no out port of its own", ty.name);
                Diagnostic::new("mason::unknown-port", edge.span, message)
                    .help(format!("give each edge a name: `({name}, NAME) -> ...`"))
            }
            _ => return,
        };
        bag.push(error);
    }

    /// Every out port has one edge.
    fn out_ports(&self, bag: &mut Bag) {
        for (index, element, ty) in self.known() {
            let mut taken: HashMap<&str, &EdgeSpec> = HashMap::new();
            for edge in &self.outs[index] {
                if let Some(first) = taken.insert(&edge.from_port, edge) {
                    let message = format!("two edges leave port `{}` of `{}`", edge.from_port, element.name);
                    let error = Diagnostic::new("mason::port-taken", edge.span, message);
                    bag.push(error.label(first.span, "the first").help(String::from(
                        "a request leaves by one edge; a tee or another element with several out ports shares it out",
                    )));
                }
            }
            match ty.ports.out {
                Outs::None => {}
                // Where an edge names an unknown port, that is the mistake.
                Outs::Named(ports) if taken.keys().any(|port| !ports.contains(port)) => {}
                Outs::Named(ports) => {
                    for port in ports.iter().filter(|port| !taken.contains_key(**port)) {
                        let message =
                            format!("no edge leaves port `{port}` of `{}` ({})", element.name, ty.name);
                        let error = Diagnostic::new("mason::unconnected-port", element.span, message);
                        let edge = match *port {
                            "out" => format!("add `{} -> ELEMENT`", element.name),
                            port => format!("add `({}, {port}) -> ELEMENT`", element.name),
                        };
                        bag.push(within(element, error.help(edge)));
                    }
                }
                Outs::Variadic { min } if self.outs[index].len() < min => {
                    let count = taken.len();
                    let message = format!(
                        "element `{}` ({}) needs {min} out edges or more, it has {count}",
                        element.name, ty.name
                    );
                    let error = Diagnostic::new("mason::unconnected-port", element.span, message);
                    bag.push(within(
                        element,
                        error.help(format!("add `({}, NAME) -> ELEMENT`", element.name)),
                    ));
                }
                Outs::Variadic { .. } => {}
            }
        }
    }

    /// Every element reference means an element that provides the service.
    fn references(&mut self, bag: &mut Bag) {
        let spec = self.spec;
        let names: HashMap<&str, usize> =
            spec.elements.iter().enumerate().map(|(index, element)| (element.name.as_str(), index)).collect();
        let known: Vec<_> = self.known().collect();
        for (index, element, ty) in known {
            for param in ty.params {
                let (Some(service), Some(values)) = (param.refers, element.params.get(param.name)) else {
                    continue;
                };
                for value in values {
                    let message = match names.get(value.target()) {
                        None if !bag.wants("mason::unknown-element", value.span) => continue,
                        None => unknown_reference(element, value, names.keys().copied()),
                        Some(target) => {
                            self.refs[index].push((*target, value.span));
                            match self.serves(*target, service) {
                                true => continue,
                                false => self.wrong_service(element, *target, value, service),
                            }
                        }
                    };
                    bag.push(within(element, message));
                }
            }
        }
    }

    fn serves(&self, index: usize, service: &str) -> bool {
        self.types[index].is_none_or(|ty| ty.provides.contains(&service))
    }

    fn wrong_service(&self, element: &ElementSpec, index: usize, value: &Value, service: &str) -> Diagnostic {
        let target = self.element(index);
        let message = format!(
            "element `{}` needs a {service}, which `{}` ({}) does not provide",
            element.name, target.name, target.ty
        );
        let able = self.catalogue.iter().filter(|ty| ty.provides.contains(&service)).map(|ty| ty.name);
        let help = format!("types that provide a {service}: {}", suggest::list(able));
        Diagnostic::new("mason::reference", value.span, message).label(target.span, "this one").help(help)
    }

    fn edge_cycles(&self, bag: &mut Bag) {
        let next = |index: usize| self.outs[index].iter().map(|edge| (edge.to, edge.span)).collect();
        for (path, span) in cycles(self.spec.elements.len(), next) {
            let names = self.path(&path);
            let error =
                Diagnostic::new("mason::cycle", span, format!("requests would go in circles: {names}"));
            bag.push(error.here("this edge closes the circle"));
        }
    }

    /// Every element on a request's way has a frame on its shard's stack.
    fn depth(&self, bag: &mut Bag) {
        let mut above = vec![0; self.spec.elements.len()];
        self.spec.edges.iter().for_each(|edge| above[edge.to] += 1);
        let mut depth = vec![0; above.len()];
        let mut ready: Vec<usize> = (0..above.len()).filter(|index| above[*index] == 0).collect();
        while let Some(index) = ready.pop() {
            for edge in &self.outs[index] {
                depth[edge.to] = depth[edge.to].max(depth[index] + 1);
                if depth[edge.to] > MAX_DEPTH {
                    let message = format!("more than {MAX_DEPTH} elements follow each other");
                    return bag.push(Diagnostic::new("mason::too-large", edge.span, message));
                }
                above[edge.to] -= 1;
                if above[edge.to] == 0 {
                    ready.push(edge.to);
                }
            }
        }
    }

    fn reference_cycles(&self, bag: &mut Bag) {
        for (path, span) in cycles(self.spec.elements.len(), |index| self.refs[index].clone()) {
            let names = self.path(&path);
            let error = Diagnostic::new(
                "mason::cycle",
                span,
                format!("elements refer to each other in a circle: {names}"),
            );
            bag.push(error.here("this reference closes the circle"));
        }
    }

    /// `A -> B -> A`, shortened in the middle where it is long.
    fn path(&self, path: &[usize]) -> String {
        let mut names: Vec<&str> = path.iter().map(|index| self.element(*index).name.as_str()).collect();
        if names.len() > 12 {
            names.splice(6..names.len() - 5, ["..."]);
        }
        names.join(" -> ")
    }

    /// There is an export, and requests or references reach every element.
    fn sources(&self, bag: &mut Bag) {
        let known = self.types.iter().all(Option::is_some);
        if known && !self.known().any(|(_, _, ty)| ty.family == Family::Export) {
            let exports = self.catalogue.iter().filter(|ty| ty.family == Family::Export).map(|ty| ty.name);
            let message = "the graph has no export: no client could use it";
            let error = Diagnostic::new("mason::no-export", self.beginning(), message);
            bag.push(error.help(format!("these types are exports: {}", suggest::list(exports))));
            // Nothing is reached then, which goes without saying.
            return;
        }
        let mut reached = vec![false; self.spec.elements.len()];
        // An element of an unknown type may be a source.
        let source = |ty: &Option<&'static ElementType>| ty.is_none_or(|ty| !ty.ports.input);
        let mut work: Vec<usize> = (0..reached.len()).filter(|index| source(&self.types[*index])).collect();
        while let Some(index) = work.pop() {
            if !std::mem::replace(&mut reached[index], true) {
                work.extend(self.outs[index].iter().map(|edge| edge.to));
                work.extend(self.refs[index].iter().map(|(target, _)| *target));
            }
        }
        for (element, _) in self.spec.elements.iter().zip(&reached).filter(|(_, reached)| !**reached) {
            let message = format!("nothing reaches element `{}`", element.name);
            let error = Diagnostic::new("mason::unreached", element.span, message);
            let help = format!("add an edge to it, `ELEMENT -> {}`, or take it out", element.name);
            bag.push(within(element, error.help(help)));
        }
    }

    /// Where overlapping requests of several streams are ordered, they count addresses alike.
    fn addresses(&self, bag: &mut Bag) {
        let Some(types) = self.types.iter().copied().collect::<Option<Vec<_>>>() else { return };
        let edges = &self.spec.edges;
        let ends: Vec<_> = edges.iter().map(|edge| (edge.from, edge.to)).collect();
        let Some(clash) = Shape::new(&types, &ends).clash() else { return };
        let message = clash.message(&ends, |index| &self.element(index).name);
        let span = |way: &[usize]| way.last().map_or(self.beginning(), |edge| edges[*edge].span);
        let mut error = Diagnostic::new("mason::addresses", span(&clash.ways[0]), message)
            .here("one way ends here")
            .label(span(&clash.ways[1]), "the other one here");
        for index in &clash.between {
            let element = self.element(*index);
            error = error.label(element.span, format!("`{}` changes data or addresses", element.ty));
        }
        let between = clash.between.iter().map(|index| self.element(*index).name.as_str());
        bag.push(error.help(format!(
            "what changes data or addresses must lie on both ways or on neither: move {}",
            suggest::list(between)
        )));
    }

    /// The beginning of the graph file.
    fn beginning(&self) -> Span {
        Span { source: 0, start: 0, len: 0 }
    }
}

/// Adds the place where the compound around an element is used.
fn within(element: &ElementSpec, error: Diagnostic) -> Diagnostic {
    within_span(element.via, error)
}

fn within_span(via: Option<Span>, error: Diagnostic) -> Diagnostic {
    error.label_maybe(via, "in the compound made here")
}

fn parameter(element: &ElementSpec, ty: &ElementType, error: ParamError) -> Diagnostic {
    let ParamError { code, key, message, help, span, origin } = error;
    let message = match code {
        "mason::unknown-parameter" => {
            format!("element `{}` ({}) has no parameter `{key}`", element.name, ty.name)
        }
        "mason::missing-parameter" => {
            format!("element `{}` ({}) needs the parameter `{key}`", element.name, ty.name)
        }
        _ => format!("element `{}`: parameter `{key}`: {message}", element.name),
    };
    Diagnostic::new(code, span, message).label_maybe(origin, "the value comes from here").help(help)
}

fn unknown_reference<'a>(
    element: &ElementSpec,
    value: &Value,
    names: impl Iterator<Item = &'a str>,
) -> Diagnostic {
    let message =
        format!("element `{}` refers to `{}`, which is no element", element.name, shorten(value.text()));
    Diagnostic::new("mason::unknown-element", value.span, message)
        .help(suggest::did_you_mean(value.text(), names))
}

/// One circle for each edge that closes one: the elements on it, the first again at the end, and the
/// place of the closing edge. A walk with its own stack, since graphs may be deep.
fn cycles(count: usize, next: impl Fn(usize) -> Vec<(usize, Span)>) -> Vec<(Vec<usize>, Span)> {
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        New,
        Open,
        Done,
    }
    let mut state = vec![State::New; count];
    let mut found = Vec::new();
    for start in 0..count {
        if state[start] != State::New {
            continue;
        }
        state[start] = State::Open;
        let mut stack = vec![(start, next(start).into_iter())];
        while let Some((index, rest)) = stack.last_mut() {
            let Some((target, span)) = rest.next() else {
                state[*index] = State::Done;
                stack.pop();
                continue;
            };
            match state[target] {
                State::New => {
                    state[target] = State::Open;
                    stack.push((target, next(target).into_iter()));
                }
                State::Open if found.len() < 16 => {
                    let from = stack.iter().position(|(index, _)| *index == target).unwrap_or(0);
                    let mut path: Vec<usize> = stack[from..].iter().map(|(index, _)| *index).collect();
                    path.push(target);
                    found.push((path, span));
                }
                _ => {}
            }
        }
    }
    found
}
