//! What a change of graph comes to, element by element and edge by edge. Opens nothing.

use crate::describe::{self, Access, Catalogue, ElementType, Outs};
use crate::lang::{ElementSpec, Spec, meaning};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;

/// The difference between two graphs, and how the one can take over from the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// Every element of either graph: those of the next in its order, then those that go.
    pub elements: Vec<ElementDiff>,
    /// Edges that come, as an administrator would write them.
    pub edges_added: Vec<String>,
    /// Edges that go.
    pub edges_removed: Vec<String>,
    /// Elements whose edges change their order, which is part of the layout.
    pub reordered: Vec<String>,
    /// True if requests wait at a gate while the graph changes.
    pub gate: bool,
    /// True if what must hold, the invariants, is said differently.
    pub invariants: bool,
    /// True if data would be looked for elsewhere: the sinks differ, or the elements that lay data out.
    pub layout: bool,
}

/// What becomes of one element.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ElementDiff {
    /// Its name.
    pub name: String,
    /// Its type; of one that changes it, the next.
    #[serde(rename = "type")]
    pub ty: String,
    /// What becomes of it.
    pub fate: Fate,
    /// The parameters that change.
    pub parameters: Vec<ParamDiff>,
}

/// What becomes of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// The same instance serves on.
    Kept,
    /// The same instance serves on, with parameters set by its handlers.
    Set,
    /// A new instance takes its place, and takes over what it has learnt.
    Rebuilt,
    /// It is new.
    Added,
    /// It goes.
    Removed,
}

/// A parameter that changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamDiff {
    /// Its key.
    pub key: String,
    /// What it was; None if it was not given and has no default.
    pub before: Option<String>,
    /// What it will be.
    pub after: Option<String>,
}

impl Diff {
    /// The difference between two checked graphs.
    pub fn between(before: &Spec, next: &Spec, catalogue: Catalogue) -> Diff {
        let elements = elements(before, next, catalogue);
        let gate = gate(before, next, catalogue, &elements);
        let (had, has) = (edges(before), edges(next));
        let reordered = reordered(before, next, catalogue);
        let only = |a: &BTreeSet<String>, b: &BTreeSet<String>| a.difference(b).cloned().collect();
        let layout = layout(before, next, catalogue, &elements);
        let (edges_added, edges_removed) = (only(&has, &had), only(&had, &has));
        let invariants = before.invariant_text() != next.invariant_text();
        Diff { elements, edges_added, edges_removed, reordered, gate, invariants, layout }
    }

    /// True if the graphs are the same.
    pub fn is_empty(&self) -> bool {
        self.elements.iter().all(|element| element.fate == Fate::Kept)
            && self.edges_added.is_empty()
            && self.edges_removed.is_empty()
            && self.reordered.is_empty()
            && !self.invariants
    }

    /// What becomes of an element of the next graph.
    pub fn fate(&self, name: &str) -> Option<Fate> {
        let of_next = |element: &&ElementDiff| element.name == name && element.fate != Fate::Removed;
        self.elements.iter().find(of_next).map(|element| element.fate)
    }
}

fn by_name(spec: &Spec) -> HashMap<&str, &ElementSpec> {
    spec.elements.iter().map(|element| (element.name.as_str(), element)).collect()
}

fn elements(before: &Spec, next: &Spec, catalogue: Catalogue) -> Vec<ElementDiff> {
    let (had, has) = (by_name(before), by_name(next));
    let mut diffs: Vec<ElementDiff> = Vec::with_capacity(next.elements.len());
    for element in &next.elements {
        let ty = describe::find(catalogue, &element.ty);
        let old = had.get(element.name.as_str());
        let same_type =
            old.filter(|old| describe::find(catalogue, &old.ty).map(|t| t.name) == ty.map(|t| t.name));
        let (fate, parameters) = match (same_type, ty) {
            (Some(old), Some(ty)) => {
                let parameters = parameters(old, element, ty);
                (fate_of(&parameters, ty), parameters)
            }
            _ if old.is_some() => (Fate::Rebuilt, Vec::new()),
            _ => (Fate::Added, Vec::new()),
        };
        diffs.push(ElementDiff { name: element.name.clone(), ty: element.ty.clone(), fate, parameters });
    }
    rebuild_users(&mut diffs, next, catalogue);
    for element in before.elements.iter().filter(|element| !has.contains_key(element.name.as_str())) {
        let (name, ty) = (element.name.clone(), element.ty.clone());
        diffs.push(ElementDiff { name, ty, fate: Fate::Removed, parameters: Vec::new() });
    }
    diffs
}

/// True if one may go on as the other: their types are the same, and what their parameters mean.
pub(super) fn alike(old: &ElementSpec, new: &ElementSpec, catalogue: Catalogue) -> bool {
    let (was, is) = (describe::find(catalogue, &old.ty), describe::find(catalogue, &new.ty));
    was.zip(is).is_some_and(|(was, is)| was.name == is.name && parameters(old, new, is).is_empty())
}

/// The parameters whose meaning changes. One that is not given means its default.
fn parameters(old: &ElementSpec, new: &ElementSpec, ty: &ElementType) -> Vec<ParamDiff> {
    let (before, after) = (meanings(old, ty), meanings(new, ty));
    let keys: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let diff = |key: &&String| ParamDiff {
        key: (*key).clone(),
        before: before.get(*key).cloned(),
        after: after.get(*key).cloned(),
    };
    keys.iter().map(diff).filter(|diff| diff.before != diff.after).collect()
}

fn meanings(element: &ElementSpec, ty: &ElementType) -> BTreeMap<String, String> {
    let default = |param: &describe::Param| Some((param.name.to_owned(), param.default?.to_owned()));
    let mut meanings: BTreeMap<String, String> = ty.params.iter().filter_map(default).collect();
    for entry in element.params.entries() {
        let param = ty.params.iter().find(|param| param.name == entry.key());
        let values: Vec<_> = entry.values().iter().map(|value| meaning(value, param)).collect();
        meanings.insert(entry.key().to_owned(), values.join(" "));
    }
    meanings
}

/// A parameter that is also a handler to write can change in place, if there is a value to go back to.
fn fate_of(parameters: &[ParamDiff], ty: &ElementType) -> Fate {
    let settable = |diff: &ParamDiff| {
        let writable =
            |handler: &describe::Handler| handler.access == Access::ReadWrite && handler.name == diff.key;
        diff.before.is_some() && diff.after.is_some() && ty.handlers.iter().any(writable)
    };
    match parameters {
        [] => Fate::Kept,
        _ if parameters.iter().all(settable) => Fate::Set,
        _ => Fate::Rebuilt,
    }
}

/// An element that refers to one that is rebuilt is rebuilt too: it would hold the one before.
fn rebuild_users(diffs: &mut [ElementDiff], next: &Spec, catalogue: Catalogue) {
    let mut users: HashMap<&str, Vec<usize>> = HashMap::new();
    for (ix, element) in next.elements.iter().enumerate() {
        let Some(ty) = describe::find(catalogue, &element.ty) else { continue };
        for param in ty.params.iter().filter(|param| param.refers.is_some()) {
            for target in element.params.get(param.name).into_iter().flatten() {
                users.entry(target.target()).or_default().push(ix);
            }
        }
    }
    let new = |diff: &ElementDiff| matches!(diff.fate, Fate::Rebuilt | Fate::Added);
    let mut work: Vec<usize> = (0..diffs.len()).filter(|ix| new(&diffs[*ix])).collect();
    while let Some(ix) = work.pop() {
        for &user in users.get(next.elements[ix].name.as_str()).into_iter().flatten() {
            if !new(&diffs[user]) {
                diffs[user].fate = Fate::Rebuilt;
                work.push(user);
            }
        }
    }
}

fn edges(spec: &Spec) -> BTreeSet<String> {
    spec.edges.iter().map(|edge| spec.edge_text(edge)).collect()
}

/// Variadic elements that keep their ports and change the order.
fn reordered(before: &Spec, next: &Spec, catalogue: Catalogue) -> Vec<String> {
    let ports = |spec: &Spec| -> HashMap<String, Vec<String>> {
        let outs = spec.edges_by_element();
        let of = |ix: usize| outs[ix].iter().map(|edge| spec.edge_text(edge)).collect();
        spec.elements.iter().enumerate().map(|(ix, element)| (element.name.clone(), of(ix))).collect()
    };
    let (had, has) = (ports(before), ports(next));
    let variadic = |element: &&ElementSpec| {
        describe::find(catalogue, &element.ty).is_some_and(|ty| matches!(ty.ports.out, Outs::Variadic { .. }))
    };
    let changed = |element: &&ElementSpec| {
        let (Some(old), Some(new)) = (had.get(&element.name), has.get(&element.name)) else { return false };
        let (a, b): (HashSet<_>, HashSet<_>) = (old.iter().collect(), new.iter().collect());
        let in_both = |all: &[String]| {
            all.iter().filter(|e| a.contains(e) && b.contains(e)).cloned().collect::<Vec<_>>()
        };
        in_both(old) != in_both(new)
    };
    next.elements.iter().filter(variadic).filter(changed).map(|element| element.name.clone()).collect()
}

/// True unless the graphs are equal below their sources, without what only routes or watches.
fn layout(before: &Spec, next: &Spec, catalogue: Catalogue, diffs: &[ElementDiff]) -> bool {
    let places = |ty: &ElementType| ty.layout || ty.ports.out == Outs::None || !ty.passes_through;
    let through = |ty: &ElementType| ty.ports.input && !places(ty);
    // Of sources it only matters what lies below those that are in both.
    let of_both = |diff: &&ElementDiff| {
        let source = describe::find(catalogue, &diff.ty).is_some_and(|ty| !ty.ports.input);
        matches!(diff.fate, Fate::Kept | Fate::Set) || (source && diff.fate == Fate::Rebuilt)
    };
    let both: HashSet<&str> = diffs.iter().filter(of_both).map(|diff| diff.name.as_str()).collect();
    let below = |spec| {
        let all = contracted(spec, catalogue, through);
        let gone = |name: &String| !both.contains(name.as_str());
        let source = |name: &String| {
            let ty = spec_type(spec, name, catalogue);
            ty.is_some_and(|ty| !ty.ports.input)
        };
        let counts = |(name, _): &(String, Ports)| !(gone(name) && source(name));
        all.into_iter().filter(counts).map(|(name, ports)| (gone(&name), name, ports)).collect::<Vec<_>>()
    };
    let (had, has) = (below(before), below(next));
    had != has || had.iter().any(|(gone, ..)| *gone)
}

fn spec_type(spec: &Spec, name: &str, catalogue: Catalogue) -> Option<&'static ElementType> {
    describe::find(catalogue, &spec.elements[spec.find(name)?].ty)
}

/// True unless the graphs are equal without the elements that need not see every request.
fn gate(before: &Spec, next: &Spec, catalogue: Catalogue, diffs: &[ElementDiff]) -> bool {
    let through = ElementType::comes_and_goes;
    let stays = |diff: &&ElementDiff| matches!(diff.fate, Fate::Kept | Fate::Set);
    let staying: HashSet<&str> = diffs.iter().filter(stays).map(|diff| diff.name.as_str()).collect();
    let (had, has) = (contracted(before, catalogue, through), contracted(next, catalogue, through));
    had != has || had.keys().any(|name| !staying.contains(name.as_str()))
}

/// What each out port of an element leads to, in order.
type Ports = Vec<(String, String)>;

/// Each element with what its out ports lead to. Elements with one edge of the types that `through`
/// names are passed through.
fn contracted(
    spec: &Spec,
    catalogue: Catalogue,
    through: impl Fn(&ElementType) -> bool,
) -> BTreeMap<String, Ports> {
    let outs = spec.edges_by_element();
    let types: Vec<_> = spec.elements.iter().map(|element| describe::find(catalogue, &element.ty)).collect();
    let passed: Vec<bool> =
        (0..types.len()).map(|ix| types[ix].is_some_and(&through) && outs[ix].len() == 1).collect();
    let name = |ix: usize| spec.elements[ix].name.clone();
    let behind = |mut ix: usize| {
        while passed[ix] {
            ix = outs[ix][0].to;
        }
        name(ix)
    };
    let ports = |ix: usize| {
        let mut ports: Ports =
            outs[ix].iter().map(|edge| (edge.from_port.clone(), behind(edge.to))).collect();
        if types[ix].is_some_and(|ty| matches!(ty.ports.out, Outs::Named(_))) {
            ports.sort();
        }
        ports
    };
    (0..types.len()).filter(|ix| !passed[*ix]).map(|ix| (name(ix), ports(ix))).collect()
}

impl Diff {
    /// What changes, a line for each element and edge.
    pub fn changes(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_changes(&mut out);
        out
    }

    fn write_changes(&self, f: &mut impl fmt::Write) -> fmt::Result {
        for element in &self.elements {
            let sign = match element.fate {
                Fate::Kept => continue,
                Fate::Set => "~",
                Fate::Rebuilt => "!",
                Fate::Added => "+",
                Fate::Removed => "-",
            };
            write!(f, "{sign} {} ({})", element.name, element.ty)?;
            match element.fate {
                Fate::Set => f.write_str(" changed in place")?,
                Fate::Rebuilt => f.write_str(" rebuilt")?,
                _ => {}
            }
            for ParamDiff { key, before, after } in &element.parameters {
                let show = |value: &Option<String>| value.clone().unwrap_or_else(|| "not given".to_owned());
                write!(f, "; {key}: {} -> {}", show(before), show(after))?;
            }
            writeln!(f)?;
        }
        let edges = self.edges_removed.iter().map(|edge| ("-", edge));
        for (sign, edge) in edges.chain(self.edges_added.iter().map(|edge| ("+", edge))) {
            writeln!(f, "{sign} {edge}")?;
        }
        for element in &self.reordered {
            writeln!(f, "! {element}: its edges in another order")?;
        }
        if self.invariants {
            writeln!(f, "! the invariants")?;
        }
        Ok(())
    }
}

impl fmt::Display for Diff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "nothing changes");
        }
        self.write_changes(f)?;
        let kept = self.elements.iter().filter(|element| element.fate == Fate::Kept).count();
        writeln!(f, "  {kept} kept")?;
        f.write_str(if self.gate {
            "requests wait at a gate while it changes\n"
        } else {
            "without a pause\n"
        })
    }
}
