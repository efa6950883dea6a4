//! Writes a graph as a graph file.

use super::params::{Entry, Value};
use super::parse::is_word_char;
use super::spec::{EdgeSpec, ElementSpec, Group, Invariant, Paths, Spec, What};
use crate::describe::{self, Catalogue, Param};
use std::fmt::Write;
use std::path::Path;

/// Writes a graph as a graph file that reads back as the same graph when it stands in `folder`.
///
/// The graph is flat, as it was expanded: no parameters, includes or compounds. The table of types says
/// which values are paths (those of other folders are written with their folder) and which are
/// element references (written with their full name).
pub fn print(spec: &Spec, catalogue: Catalogue, folder: &Path) -> String {
    let mut out = String::new();
    for element in &spec.elements {
        print_element(&mut out, element, catalogue, folder);
    }
    for edge in &spec.edges {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{}", spec.edge_text(edge));
    }
    print_invariants(&mut out, spec);
    out
}

impl Spec {
    /// The invariants as an administrator would write them.
    pub fn invariant_text(&self) -> String {
        let mut out = String::new();
        print_invariants(&mut out, self);
        out
    }
}

pub(super) fn print_invariants(out: &mut String, spec: &Spec) {
    for invariant in &spec.invariants {
        let _ = writeln!(out, "invariant {}: {}", string(&invariant.sentence), rule(spec, invariant));
    }
}

impl Spec {
    /// An edge as an administrator would write it.
    pub fn edge_text(&self, edge: &EdgeSpec) -> String {
        let (from, to) = (&self.elements[edge.from].name, &self.elements[edge.to].name);
        format!("{} -> {}", end(from, &edge.from_port, "out"), end(to, &edge.to_port, "in"))
    }
}

/// The rule of an invariant as it is written outside of compounds.
fn rule(spec: &Spec, invariant: &Invariant) -> String {
    let group = |group: &Group| match &group.what {
        What::Element(index) => spec.elements[*index].name.clone(),
        What::Any(kind) => format!("any {kind}"),
    };
    let all = if invariant.every { "every" } else { "no" };
    let paths = match invariant.paths {
        Paths::All => "path",
        Paths::Read => "read path",
        Paths::Write => "write path",
    };
    let passes: Vec<String> = invariant.passes.iter().map(group).collect();
    let passes = match passes.as_slice() {
        [] => String::new(),
        some => format!(" passes {}", some.join(" or ")),
    };
    format!("{all} {paths} {} -> {}{passes}", group(&invariant.from), group(&invariant.to))
}

pub(super) fn end(name: &str, port: &str, default: &str) -> String {
    if port == default { name.to_owned() } else { format!("({name}, {port})") }
}

pub(super) fn print_element(out: &mut String, element: &ElementSpec, catalogue: Catalogue, folder: &Path) {
    let table = describe::find(catalogue, &element.ty).map_or(&[][..], |ty| ty.params);
    let _ = write!(out, "element {}\n    (type {})\n", element.name, quote(&element.ty));
    for entry in element.params.entries() {
        let param = table.iter().find(|param| param.name == entry.key());
        print_entry(out, entry, param, folder);
    }
    out.push('\n');
}

fn print_entry(out: &mut String, entry: &Entry, param: Option<&Param>, folder: &Path) {
    let _ = write!(out, "    ({}", entry.key());
    for value in entry.values() {
        out.push(' ');
        out.push_str(&quote(&meaning_in(value, param, folder)));
    }
    out.push_str(")\n");
}

/// What a value means, wherever it stands: paths are absolute, references full names.
pub(crate) fn meaning(value: &Value, param: Option<&Param>) -> String {
    meaning_in(value, param, Path::new(""))
}

/// The text that means the same in `folder` and outside of compounds.
fn meaning_in(value: &Value, param: Option<&Param>, folder: &Path) -> String {
    match param {
        Some(param) if param.refers.is_some() => value.target().to_owned(),
        Some(param) if param.kind == "path" && value.folder() != folder => {
            value.folder().join(value.text()).display().to_string()
        }
        Some(param) if param.kind == "URI" && value.folder() != folder => {
            super::value::resolve_unix(value.text(), value.folder())
        }
        _ => value.text().to_owned(),
    }
}

/// A word if it can be one, else a string.
pub(crate) fn quote(text: &str) -> String {
    let word =
        !text.is_empty() && !text.starts_with('#') && !text.contains("${") && text.chars().all(is_word_char);
    if word {
        return text.to_owned();
    }
    string(text)
}

fn string(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '$' => out.push_str("\\$"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
