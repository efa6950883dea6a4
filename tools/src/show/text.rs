//! A graph as a tree of text.

use super::live::carried;
use super::{parameters, ports};
use crate::output::printable;
use crate::view::{EdgeView, ElementView, GraphView};
use std::collections::{HashMap, HashSet};
use std::fmt::Write;

/// Draws the sources and what lies below each. What was drawn before is only named again, with `^`.
pub(super) fn draw(graph: &GraphView) -> String {
    let mut out = format!("{}  {}\n", printable(&graph.name), printable(&graph.file));
    let above = graph.above();
    let elements = graph.elements.iter().map(|element| (element.name.as_str(), element)).collect();
    let mut tree = Tree { elements, below: graph.below(), out: &mut out, drawn: HashSet::new() };
    for element in graph.elements.iter().filter(|element| !above.contains_key(element.name.as_str())) {
        tree.draw(&element.name);
    }
    for reference in &graph.references {
        let line = format!("{} refers to {} ({})", reference.from, reference.to, reference.parameter);
        let _ = writeln!(out, "{}", printable(&line));
    }
    out
}

struct Tree<'a> {
    elements: HashMap<&'a str, &'a ElementView>,
    below: HashMap<&'a str, Vec<&'a EdgeView>>,
    out: &'a mut String,
    drawn: HashSet<&'a str>,
}

/// An element still to be drawn: what stands before it, behind it, and before the lines below it.
struct Todo<'a> {
    head: String,
    tail: String,
    indent: String,
    name: &'a str,
}

impl<'a> Tree<'a> {
    /// Draws an element and all below it. Without recursion: a chain may be very long. For the same
    /// reason only what has several out ports moves what is below it to the right.
    fn draw(&mut self, name: &'a str) {
        let mut todo = vec![Todo { head: String::new(), tail: String::new(), indent: String::new(), name }];
        while let Some(Todo { head, tail, indent, name }) = todo.pop() {
            if !self.drawn.insert(name) {
                let _ = writeln!(self.out, "{head}{} ^{tail}", printable(name));
                continue;
            }
            self.element(&head, name, &tail);
            let edges = self.below.remove(name).unwrap_or_default();
            let indent = if edges.len() > 1 { format!("{indent}   ") } else { indent };
            for edge in edges.into_iter().rev() {
                let ports = ports(edge);
                let space = if ports.is_empty() { "" } else { " " };
                let head = format!("{indent}{}{space}-> ", printable(&ports));
                todo.push(Todo { head, tail: counters(edge), indent: indent.clone(), name: &edge.to });
            }
        }
    }

    fn element(&mut self, head: &str, name: &str, tail: &str) {
        let Some(element) = self.elements.get(name) else { return };
        let _ = write!(self.out, "{head}{}  {}", printable(name), printable(&element.ty));
        let given = parameters(element);
        if !given.is_empty() {
            let _ = write!(self.out, "  {given}");
        }
        let _ = writeln!(self.out, "{tail}");
    }
}

fn counters(edge: &EdgeView) -> String {
    carried(edge).map_or_else(String::new, |carried| format!("  [{carried}]"))
}
