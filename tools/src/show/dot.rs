//! A graph for Graphviz.

use super::live::carried;
use super::{parameters, ports};
use crate::view::GraphView;
use std::fmt::Write;

/// Draws the graph in the DOT language: elements as boxes, references as dashed lines.
pub(super) fn draw(graph: &GraphView) -> String {
    let mut out = format!("digraph {} {{\n    node [shape=box];\n", quote(&graph.name));
    for element in &graph.elements {
        let label = format!("{}\n{}\n{}", element.name, element.ty, parameters(element));
        let _ = writeln!(out, "    {} [label={}];", quote(&element.name), quote(label.trim_end()));
    }
    for edge in &graph.edges {
        let mut label = ports(edge);
        if let Some(carried) = carried(edge) {
            let _ = write!(label, "\n{carried}");
        }
        let (from, to) = (quote(&edge.from), quote(&edge.to));
        let _ = writeln!(out, "    {from} -> {to} [label={}];", quote(label.trim_start()));
    }
    for reference in &graph.references {
        let (from, to) = (quote(&reference.from), quote(&reference.to));
        let _ = writeln!(out, "    {from} -> {to} [style=dashed, label={}];", quote(&reference.parameter));
    }
    out + "}\n"
}

/// A string of the DOT language.
fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => out.push('?'),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    #[test]
    fn quotes() {
        assert_eq!(super::quote("a\"b\\c\nd\x1b"), r#""a\"b\\c\nd?""#);
    }
}
