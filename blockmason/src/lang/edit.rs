//! Single edits of a graph: what an administrator says of one element or edge, as a new graph.
//!
//! An edit is made on the flat text of the graph and read back, so that what is wrong with it is
//! reported as for any graph file. What nothing reaches any more after an edit goes with it.

use super::ast::{End, Statement};
use super::diag::{Bag, Diagnostic, Diagnostics};
use super::print::{print_element, print_invariants};
use super::source::{Sources, Span};
use super::spec::Spec;
use super::{Defines, NoFiles, parse, parse_checked};
use crate::describe::{self, Catalogue, Outs};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

/// One edit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "edit", rename_all = "snake_case", deny_unknown_fields)]
pub enum Edit {
    /// More statements. An edge from a port that has one takes its place.
    Add {
        /// In the graph language.
        text: String,
    },
    /// An element less. What led to it leads to what it led to.
    Remove {
        /// Its name.
        element: String,
    },
    /// An edge, or a chain of them. An edge from a port that has one takes its place.
    Connect {
        /// `A -> B`
        edge: String,
    },
    /// An edge less.
    Disconnect {
        /// `(Tee, new) -> B`
        edge: String,
    },
    /// An element into an edge.
    Insert {
        /// `element P (type probe)`, or `P (type probe)`, or only a type: `probe`.
        element: String,
        /// The upper end of the edge, `A` or `(A, port)`.
        above: String,
        /// The lower end.
        below: String,
    },
    /// Other statements in the place of an element. What led to it leads to the first element of
    /// them, which has its edges too unless the statements give it others.
    Replace {
        /// Its name. It may stay, behind what takes its place.
        element: String,
        /// In the graph language; `(type ...) ...` defines the element itself anew.
        by: String,
    },
}

/// Makes edits, one after the other, of a checked graph. Relative paths in them start in `folder`.
/// Messages call the text `name`.
///
/// # Errors
/// What an edit names and is not there; everything that is wrong with the graph that comes out.
pub fn edit(
    spec: &Spec,
    edits: &[Edit],
    name: &str,
    folder: &Path,
    catalogue: Catalogue,
) -> Result<Spec, Diagnostics> {
    let mut draft = Draft::of(spec, catalogue, folder);
    for edit in edits {
        draft.make(edit)?;
    }
    draft.prune();
    let file = Path::new(name).file_name().unwrap_or("graph".as_ref());
    let opened = folder.join(file);
    parse_checked(&NoFiles, Path::new(name), opened, draft.text(), &Defines::new(), catalogue)
}

/// An edge by the names of its ends.
#[derive(Clone, PartialEq)]
struct Edge {
    from: String,
    port: String,
    to: String,
    to_port: String,
}

/// A graph on its way to another.
struct Draft<'a> {
    catalogue: Catalogue,
    spec: &'a Spec,
    /// Each element's name and text.
    elements: Vec<(String, String)>,
    edges: Vec<Edge>,
    rest: String,
    /// Elements that came with an edit: that nothing reaches them is a mistake.
    new: BTreeSet<String>,
}

/// What the text of an edit says.
struct Fragment {
    elements: Vec<(String, String)>,
    edges: Vec<Edge>,
    /// Everything else, as it was written.
    rest: String,
}

impl<'a> Draft<'a> {
    fn of(spec: &'a Spec, catalogue: Catalogue, folder: &Path) -> Draft<'a> {
        let text = |element| {
            let mut text = String::new();
            print_element(&mut text, element, catalogue, folder);
            text
        };
        let name = |ix: usize| spec.elements[ix].name.clone();
        let edge = |edge: &super::EdgeSpec| Edge {
            from: name(edge.from),
            port: edge.from_port.clone(),
            to: name(edge.to),
            to_port: edge.to_port.clone(),
        };
        let mut rest = String::new();
        print_invariants(&mut rest, spec);
        Draft {
            catalogue,
            spec,
            elements: spec.elements.iter().map(|element| (element.name.clone(), text(element))).collect(),
            edges: spec.edges.iter().map(edge).collect(),
            rest,
            new: BTreeSet::new(),
        }
    }

    fn make(&mut self, edit: &Edit) -> Result<(), Diagnostics> {
        match edit {
            Edit::Add { text } => self.add(fragment(text)?),
            Edit::Remove { element } => self.remove(element)?,
            Edit::Connect { edge } => self.connect(only_edges(edge)?),
            Edit::Disconnect { edge } => self.disconnect(edge)?,
            Edit::Insert { element, above, below } => self.insert(element, above, below)?,
            Edit::Replace { element, by } => self.replace(element, by)?,
        }
        Ok(())
    }

    fn add(&mut self, fragment: Fragment) {
        self.new.extend(fragment.elements.iter().map(|(name, _)| name.clone()));
        self.elements.extend(fragment.elements);
        self.rest += &fragment.rest;
        self.connect(fragment.edges);
    }

    fn connect(&mut self, edges: Vec<Edge>) {
        for edge in edges {
            let same_port = |other: &&mut Edge| other.from == edge.from && other.port == edge.port;
            match self.edges.iter_mut().find(same_port) {
                Some(other) => *other = edge,
                None => self.edges.push(edge),
            }
        }
    }

    fn disconnect(&mut self, text: &str) -> Result<(), Diagnostics> {
        for edge in only_edges(text)? {
            let Some(at) = self.edges.iter().position(|other| *other == edge) else {
                return Err(wrong(text, "there is no such edge", self.edges_of(&edge.from)));
            };
            self.edges.remove(at);
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), Diagnostics> {
        self.known(name)?;
        let below: Vec<_> = self.edges.iter().filter(|edge| edge.from == name).cloned().collect();
        let single = match below.as_slice() {
            [edge] => Some((edge.to.clone(), edge.to_port.clone())),
            _ => None,
        };
        if let (None, Some(above)) =
            (&single, self.edges.iter().find(|e| e.to == name && !self.is_variadic(&e.from)))
        {
            let help = format!("connect {} to something else in the same command", above.from);
            let message = format!("{} leads to {name}, and would lead nowhere", above.from);
            return Err(wrong(name, message, help));
        }
        self.edges.retain(|edge| edge.from != name && (edge.to != name || single.is_some()));
        if let Some((to, to_port)) = single {
            for edge in self.edges.iter_mut().filter(|edge| edge.to == name) {
                (edge.to, edge.to_port) = (to.clone(), to_port.clone());
            }
        }
        self.elements.retain(|(other, _)| other != name);
        Ok(())
    }

    fn insert(&mut self, element: &str, above: &str, below: &str) -> Result<(), Diagnostics> {
        let fragment = fragment(&self.whole(element))?;
        let Some((name, _)) = fragment.elements.first().cloned() else {
            return Err(wrong(
                element,
                "this is no element",
                "such as `P (type probe)`, or a type".to_owned(),
            ));
        };
        let (from, port) = end(above)?;
        let (to, _) = end(below)?;
        let fits =
            |edge: &Edge| edge.from == from && edge.to == to && port.as_ref().is_none_or(|p| *p == edge.port);
        let found: Vec<usize> = (0..self.edges.len()).filter(|ix| fits(&self.edges[*ix])).collect();
        let [at] = found[..] else {
            let message = match found.len() {
                0 => format!("there is no edge {above} -> {below}"),
                _ => format!("several edges lead from {from} to {to}: name the port, `({from}, PORT)`"),
            };
            return Err(wrong(above, message, self.edges_of(&from)));
        };
        let lower = Edge { from: name.clone(), port: "out".to_owned(), ..self.edges[at].clone() };
        let upper = &mut self.edges[at];
        (upper.to, upper.to_port) = (name, "in".to_owned());
        self.edges.push(lower);
        self.add(fragment);
        Ok(())
    }

    fn replace(&mut self, name: &str, by: &str) -> Result<(), Diagnostics> {
        self.known(name)?;
        let text = if by.trim_start().starts_with('(') && !by.contains("->") {
            format!("element {name} {by}")
        } else {
            by.to_owned()
        };
        let fragment = fragment(&text)?;
        let Some((first, _)) = fragment.elements.first().cloned() else {
            return Err(wrong(by, "there is no element in it", "such as `(type null) (size 1G)`".to_owned()));
        };
        let stays = fragment.elements.iter().all(|(other, _)| other != name)
            && fragment.edges.iter().any(|edge| edge.to == name || edge.from == name);
        for edge in self.edges.iter_mut().filter(|edge| edge.to == name) {
            edge.to = first.clone();
        }
        if !stays {
            let at = self.elements.iter().position(|(other, _)| other == name);
            self.elements.remove(at.unwrap_or(0));
            let has_edges = fragment.edges.iter().any(|edge| edge.from == first);
            self.edges.retain(|edge| edge.from != name || !has_edges);
            for edge in self.edges.iter_mut().filter(|edge| edge.from == name) {
                edge.from = first.clone();
            }
        }
        self.add(fragment);
        Ok(())
    }

    /// `probe` and `P (type probe)` as a statement.
    fn whole(&self, element: &str) -> String {
        let word = element.trim();
        // A single word is a type, known or not: then the message is about types.
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
        if !word.is_empty() && word.chars().all(is_name) {
            let plain: String = word.split(['_', '.']).map(capital).collect();
            let taken = |name: &str| self.elements.iter().any(|(other, _)| other == name);
            let numbered = (2..).map(|n| format!("{plain}{n}"));
            let name =
                std::iter::once(plain.clone()).chain(numbered).find(|name| !taken(name)).unwrap_or(plain);
            return format!("element {name} (type {word})");
        }
        if word.starts_with("element ") { word.to_owned() } else { format!("element {word}") }
    }

    fn known(&self, name: &str) -> Result<(), Diagnostics> {
        if self.elements.iter().any(|(other, _)| other == name) {
            return Ok(());
        }
        let hint = super::did_you_mean(name, self.elements.iter().map(|(name, _)| name.as_str()));
        Err(wrong(name, format!("there is no element {name}"), hint.unwrap_or_default()))
    }

    fn is_variadic(&self, name: &str) -> bool {
        let ty = self.spec.find(name).map(|ix| self.spec.elements[ix].ty.as_str());
        let ty = ty.and_then(|ty| describe::find(self.catalogue, ty));
        ty.is_some_and(|ty| matches!(ty.ports.out, Outs::Variadic { .. }))
    }

    fn edges_of(&self, name: &str) -> String {
        let edges: Vec<_> = self.edges.iter().filter(|e| e.from == name).map(Edge::text).collect();
        if edges.is_empty() { String::new() } else { format!("from {name} lead: {}", edges.join("; ")) }
    }

    /// Takes out what was reached before and is not any more.
    fn prune(&mut self) {
        let is_source = |name: &str| {
            let ty = self.spec.find(name).map(|ix| self.spec.elements[ix].ty.as_str());
            ty.and_then(|ty| describe::find(self.catalogue, ty)).is_some_and(|ty| !ty.ports.input)
        };
        let mut next: HashMap<&str, Vec<&str>> = HashMap::new();
        for edge in &self.edges {
            next.entry(&edge.from).or_default().push(&edge.to);
        }
        for element in &self.spec.elements {
            let ty = describe::find(self.catalogue, &element.ty);
            let params = ty.map_or(&[][..], |ty| ty.params).iter().filter(|param| param.refers.is_some());
            let targets = params.flat_map(|param| element.params.get(param.name).into_iter().flatten());
            next.entry(&element.name).or_default().extend(targets.map(super::Value::target));
        }
        let mut work: Vec<&str> = self.elements.iter().map(|(name, _)| name.as_str()).collect();
        work.retain(|name| self.new.contains(*name) || is_source(name));
        let mut reached: BTreeSet<String> = BTreeSet::new();
        while let Some(name) = work.pop() {
            if reached.insert(name.to_owned()) {
                work.extend(next.get(name).into_iter().flatten());
            }
        }
        self.elements.retain(|(name, _)| reached.contains(name));
        self.edges.retain(|edge| reached.contains(&edge.from));
    }

    fn text(&self) -> String {
        let mut out: String = self.elements.iter().map(|(_, text)| text.as_str()).collect();
        for edge in &self.edges {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{}", edge.text());
        }
        out + &self.rest
    }
}

impl Edge {
    fn text(&self) -> String {
        let end = |name: &str, port: &str, default| super::print::end(name, port, default);
        format!("{} -> {}", end(&self.from, &self.port, "out"), end(&self.to, &self.to_port, "in"))
    }
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// What is wrong with an edit itself.
fn wrong(text: &str, message: impl Into<String>, help: String) -> Diagnostics {
    let mut sources = Sources::default();
    let source = sources.add("edit", text);
    let span = Span { source, start: 0, len: text.len() as u32 };
    let diagnostic = Diagnostic::new("mason::edit", span, message);
    Diagnostics::one(sources, diagnostic.help((!help.is_empty()).then_some(help)))
}

/// Cuts a text into statements. Nothing of it is resolved yet: it may name what is in the graph.
fn fragment(text: &str) -> Result<Fragment, Diagnostics> {
    let (mut sources, mut bag) = (Sources::default(), Bag::default());
    let source = sources.add("edit", text);
    let statements = parse::file(source, text, &mut bag);
    let mut fragment = Fragment { elements: Vec::new(), edges: Vec::new(), rest: String::new() };
    for (statement, span) in statements.iter().zip(extents(&statements, text)) {
        let written = text[span].trim().to_owned() + "\n";
        match statement {
            Statement::Element(element) => fragment.elements.push((element.name.text.clone(), written)),
            Statement::Chain(ends) => fragment.edges.extend(edges(ends)),
            Statement::Include(name) => {
                let message = "an edit includes no file: `mason reload` reads whole graphs";
                bag.push(Diagnostic::new("mason::edit", name.span, message));
            }
            Statement::Param { .. } | Statement::Compound(_) | Statement::Invariant(_) => {
                fragment.rest += &written
            }
        }
    }
    bag.finish(Arc::new(sources))?;
    Ok(fragment)
}

/// Where each statement stands, up to the next one.
fn extents(statements: &[Statement], text: &str) -> Vec<std::ops::Range<usize>> {
    let start = |statement: &Statement| {
        let (keyword, span) = match statement {
            Statement::Chain(ends) => return ends.first().map_or(0, |end| end.span.start as usize),
            Statement::Element(element) => ("element", element.name.span),
            Statement::Param { key, .. } => ("param", key.span),
            Statement::Include(name) => ("include", name.span),
            Statement::Compound(compound) => ("compound", compound.name.span),
            Statement::Invariant(invariant) => ("invariant", invariant.sentence.span),
        };
        text[..span.start as usize].rfind(keyword).unwrap_or(0)
    };
    let starts: Vec<usize> = statements.iter().map(start).collect();
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    starts.iter().copied().zip(ends).map(|(start, end)| start..end).collect()
}

fn edges(ends: &[End]) -> impl Iterator<Item = Edge> {
    ends.windows(2).map(|pair| {
        let port = |end: &End, default: &str| {
            end.port.as_ref().map_or_else(|| default.to_owned(), |p| p.text.clone())
        };
        let (from, to) = (&pair[0], &pair[1]);
        Edge {
            from: from.name.text.clone(),
            port: port(from, "out"),
            to: to.name.text.clone(),
            to_port: port(to, "in"),
        }
    })
}

fn only_edges(text: &str) -> Result<Vec<Edge>, Diagnostics> {
    let fragment = fragment(text)?;
    if fragment.edges.is_empty() || !fragment.elements.is_empty() || !fragment.rest.is_empty() {
        return Err(wrong(text, "this is no edge", "such as `A -> B` or `(Tee, new) -> B`".to_owned()));
    }
    Ok(fragment.edges)
}

/// `A` or `(A, port)`.
fn end(text: &str) -> Result<(String, Option<String>), Diagnostics> {
    let port = |edge: &Edge| text.contains(',').then(|| edge.port.clone());
    let fragment = fragment(&format!("{text} -> X"))?;
    match fragment.edges.first() {
        Some(edge) => Ok((edge.from.clone(), port(edge))),
        None => Err(wrong(text, "this is no end of an edge", "such as `A` or `(A, port)`".to_owned())),
    }
}
