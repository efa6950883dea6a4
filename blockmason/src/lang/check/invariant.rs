//! Whether the invariants of a graph hold.
//!
//! No path is ever listed: a walk over (element, passed one of `passes`) finds the shortest path that
//! breaks the rule in time linear in the graph, however many paths there are.

use super::super::diag::{Bag, Diagnostic};
use super::super::parse::shorten;
use super::super::spec::{EdgeSpec, Group, Invariant, Paths, What};
use super::super::suggest;
use super::{Checker, within_span};
use crate::describe::{Carries, Family};
use std::collections::{HashMap, VecDeque};

/// Elements and edges looked at for all invariants of one graph.
const MOST_STEPS: usize = 50_000_000;

/// Edges of a path that are pointed at.
const MOST_LABELS: usize = 10;

const FAMILIES: [Family; 6] =
    [Family::Export, Family::Sink, Family::Route, Family::Transform, Family::Parallax, Family::Fault];

/// Reports every invariant that does not hold, or that could not fail to. The graph is right otherwise.
pub(super) fn check(checker: &Checker<'_>, bag: &mut Bag) {
    if checker.spec.invariants.is_empty() {
        return;
    }
    let mut walker = Walker::new(checker);
    for invariant in &checker.spec.invariants {
        let groups = [&invariant.from, &invariant.to].into_iter().chain(&invariant.passes);
        let mut named = true;
        for group in groups.filter(|group| walker.is_wrong(invariant, group)) {
            named = false;
            if bag.wants(walker.code(group), group.span) {
                bag.push(within_span(invariant.via, walker.wrong(invariant, group)));
            }
        }
        if !named {
            continue;
        }
        let empty = [&invariant.from, &invariant.to].map(|group| walker.empty(invariant, group));
        if let Some(error) = empty.into_iter().flatten().next() {
            bag.push(within_span(invariant.via, error));
            continue;
        }
        let broken = walker.walk(invariant);
        if walker.steps > MOST_STEPS {
            let message = "the invariants of the graph take too long to check";
            let error = Diagnostic::new("mason::too-large", invariant.span, message);
            return bag.push(error.help(String::from("there are too many for so many elements and edges")));
        }
        if let Some(path) = broken {
            bag.push(within_span(invariant.via, walker.broken(invariant, &path)));
        }
    }
}

/// An element on a walk, and whether the walk has passed what the invariant wants by then.
type State = (usize, bool);

/// A path that breaks an invariant: the edges in their order.
type Path<'a> = Vec<&'a EdgeSpec>;

struct Walker<'a> {
    checker: &'a Checker<'a>,
    /// The elements of each type and family that occurs.
    kinds: HashMap<&'static str, Vec<usize>>,
    carries: Vec<Carries>,
    /// For each state the number of the last walk that came there, and the edge and state it came from.
    seen: Vec<usize>,
    came: Vec<Option<(State, &'a EdgeSpec)>>,
    walk: usize,
    steps: usize,
}

impl<'a> Walker<'a> {
    fn new(checker: &'a Checker<'a>) -> Self {
        let mut kinds: HashMap<&str, Vec<usize>> = HashMap::new();
        let mut carries = vec![Carries::ALL; checker.spec.elements.len()];
        for (index, element, ty) in checker.known() {
            kinds.entry(ty.name).or_default().push(index);
            kinds.entry(ty.family.name()).or_default().push(index);
            carries[index] = (ty.carries)(&element.params);
        }
        let states = carries.len() * 2;
        Walker { checker, kinds, carries, seen: vec![0; states], came: vec![None; states], walk: 0, steps: 0 }
    }

    fn members(&self, group: &'a Group) -> &[usize] {
        match &group.what {
            What::Element(index) => std::slice::from_ref(index),
            What::Any(kind) => self.kinds.get(kind.as_str()).map_or(&[], Vec::as_slice),
        }
    }

    fn is_in(&self, group: &Group, index: usize) -> bool {
        match &group.what {
            What::Element(element) => *element == index,
            What::Any(kind) => {
                self.checker.types[index].is_some_and(|ty| ty.name == kind || ty.family.name() == kind)
            }
        }
    }

    fn is_kind(&self, word: &str) -> bool {
        FAMILIES.iter().any(|family| family.name() == word)
            || self.checker.catalogue.iter().any(|ty| ty.name == word)
    }

    /// True if a name of an invariant means nothing, or two things.
    fn is_wrong(&self, invariant: &Invariant, group: &Group) -> bool {
        match &group.what {
            What::Any(kind) => !self.is_kind(kind),
            What::Element(index) => self.is_kind(local(invariant, &self.checker.spec.elements[*index].name)),
        }
    }

    fn code(&self, group: &Group) -> &'static str {
        match &group.what {
            What::Any(_) => "mason::unknown-element",
            What::Element(_) => "mason::invariant",
        }
    }

    fn wrong(&self, invariant: &Invariant, group: &Group) -> Diagnostic {
        let (spec, code) = (self.checker.spec, self.code(group));
        match &group.what {
            What::Any(kind) => {
                let message =
                    format!("{}: there is no element, type or family `{}`", quoted(invariant), shorten(kind));
                let families = FAMILIES.map(Family::name);
                let types = self.checker.catalogue.iter().map(|ty| ty.name);
                let names = spec.elements.iter().filter_map(|e| e.name.strip_prefix(&invariant.scope));
                let near = suggest::did_you_mean(kind, names.chain(types).chain(families));
                Diagnostic::new(code, group.span, message).help(near)
            }
            What::Element(index) => {
                let name = local(invariant, &spec.elements[*index].name);
                let message =
                    format!("{}: `{name}` is both an element and a type or family", quoted(invariant));
                let error = Diagnostic::new(code, group.span, message);
                let help =
                    format!("write `any {name}` for the type or family, or give the element another name");
                error.label(spec.elements[*index].span, "the element").help(help)
            }
        }
    }

    /// An end of an invariant that nothing in the graph is: the invariant would hold whatever happens.
    fn empty(&self, invariant: &Invariant, group: &'a Group) -> Option<Diagnostic> {
        let What::Any(kind) = &group.what else { return None };
        if !self.members(group).is_empty() {
            return None;
        }
        let message = format!("{} protects nothing: the graph has no `{kind}`", quoted(invariant));
        let error = Diagnostic::new("mason::vacuous-invariant", group.span, message);
        Some(error.help(String::from("name elements, types or families that the graph has, or take it out")))
    }

    /// True if what the invariant is about can travel through an element.
    fn travels(&self, invariant: &Invariant, index: usize) -> bool {
        let carries = self.carries[index];
        match invariant.paths {
            Paths::All => true,
            Paths::Read => carries.reads,
            Paths::Write => carries.writes,
        }
    }

    /// The shortest path that breaks the invariant.
    fn walk(&mut self, invariant: &'a Invariant) -> Option<Path<'a>> {
        self.walk += 1;
        let passes = |it: &Self, index| invariant.passes.iter().any(|group| it.is_in(group, index));
        // One path without breaks `every`, one path with breaks `no`.
        let breaks = !invariant.every && !invariant.passes.is_empty();
        let mut queue = VecDeque::new();
        for &index in self.members(&invariant.from).to_vec().iter() {
            self.steps += 1;
            let state = (index, passes(self, index));
            if self.travels(invariant, index) && !(invariant.every && state.1) && self.visit(state, None) {
                queue.push_back(state);
            }
        }
        let checker = self.checker;
        while let Some(from) = queue.pop_front() {
            self.steps += 1;
            for edge in &checker.outs[from.0] {
                self.steps += 1 + invariant.passes.len();
                let state = (edge.to, from.1 || passes(self, edge.to));
                if !self.travels(invariant, edge.to) || invariant.every && state.1 {
                    continue;
                }
                if self.is_in(&invariant.to, edge.to) && state.1 == breaks {
                    return Some(self.way(from, edge));
                }
                if self.visit(state, Some((from, edge))) {
                    queue.push_back(state);
                }
            }
            if self.steps > MOST_STEPS {
                return None;
            }
        }
        None
    }

    /// Notes how a state was come to; false if it was before.
    fn visit(&mut self, state: State, came: Option<(State, &'a EdgeSpec)>) -> bool {
        let slot = state.0 * 2 + usize::from(state.1);
        if self.seen[slot] == self.walk {
            return false;
        }
        self.seen[slot] = self.walk;
        self.came[slot] = came;
        true
    }

    /// The edges by which the walk came to `state`, and this last one.
    fn way(&self, mut state: State, last: &'a EdgeSpec) -> Path<'a> {
        let mut path = vec![last];
        while let Some((before, edge)) = self.came[state.0 * 2 + usize::from(state.1)] {
            path.push(edge);
            state = before;
        }
        path.reverse();
        path
    }

    fn broken(&self, invariant: &Invariant, path: &Path<'a>) -> Diagnostic {
        let elements: Vec<usize> =
            path.first().map(|edge| edge.from).into_iter().chain(path.iter().map(|edge| edge.to)).collect();
        let message = format!("{} does not hold: {}", quoted(invariant), self.checker.path(&elements));
        let mut error = Diagnostic::new("mason::invariant", invariant.span, message);
        let spec = self.checker.spec;
        let passed =
            elements.iter().find(|index| invariant.passes.iter().any(|group| self.is_in(group, **index)));
        if let (Some(index), false) = (passed, invariant.every) {
            error = error.label(spec.elements[*index].span, "the path passes this one");
        }
        for (nth, edge) in path.iter().enumerate().take(MOST_LABELS) {
            let text = if path.len() == 1 { String::from("the path") } else { format!("step {}", nth + 1) };
            error = error.label(edge.span, text);
        }
        error.here("the rule").help(match (passed, invariant.every) {
            (_, true) => {
                let wanted = invariant.passes.iter().map(|group| match &group.what {
                    What::Element(index) => spec.elements[*index].name.as_str(),
                    What::Any(kind) => kind,
                });
                let wanted = suggest::list(wanted).replace(" and ", " or ");
                format!("missing on this path: {wanted}")
            }
            (Some(index), false) => {
                let element = &spec.elements[*index];
                format!("`{}` ({}) must not be on this path", element.name, element.ty)
            }
            _ => String::from("there must be no such path"),
        })
    }
}

/// `invariant "all is logged"`, for messages.
fn quoted(invariant: &Invariant) -> String {
    format!("invariant \"{}\"", shorten(&invariant.sentence))
}

/// The name as it is written where the invariant stands.
fn local<'n>(invariant: &Invariant, name: &'n str) -> &'n str {
    name.strip_prefix(&invariant.scope).unwrap_or(name)
}
