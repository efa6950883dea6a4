//! What each element looks like from above, where streams of requests meet, and where they are ordered.

use crate::units::{Bytes, table};
use crate::view::{EdgeView, ElementView, GeometryView, GraphView, PlaceView};
use std::fmt::Write;

/// A table of geometries, what the framework does on the edges, the in ports with several edges, and the
/// places at which overlapping requests are ordered.
pub(super) fn draw(graph: &GraphView) -> String {
    let head = ["element", "type", "operations", "size", "min", "preferred", "max", "notes"];
    let rows = graph.elements.iter().map(row).collect();
    let mut out = format!("{}  {}\n\n{}", graph.name, graph.file, table(&head, rows, 3..7));
    let served: Vec<String> = graph.elements.iter().flat_map(services).collect();
    if !served.is_empty() {
        let _ = write!(out, "\nThe framework, on the way into an element:\n{}", served.concat());
    }
    let signed = graph.elements.iter().filter_map(|element| Some((&element.name, element.head.as_ref()?)));
    let signed: Vec<String> = signed.map(|(name, head)| format!("  {name}: {head}\n")).collect();
    if !signed.is_empty() {
        let _ = write!(out, "\nVolumes with a layout:\n{}", signed.concat());
    }
    let above = graph.above();
    let met = graph.elements.iter().filter_map(|element| meeting(element, above.get(element.name.as_str())?));
    let met: Vec<String> = met.collect();
    if !met.is_empty() {
        let _ = write!(out, "\nIn ports with several edges:\n{}", met.concat());
    }
    let ordered: Vec<String> = graph.ordered.iter().map(|group| order(group)).collect();
    if !ordered.is_empty() {
        let _ = write!(
            out,
            "\nOverlapping requests are ordered, those of one line together:\n{}",
            ordered.concat()
        );
    }
    out
}

fn row(element: &ElementView) -> Vec<String> {
    let mut row = vec![element.name.clone(), element.ty.clone()];
    match &element.geometry {
        Some(geometry) => row.extend([
            geometry.operations.join(" "),
            Bytes(geometry.size).to_string(),
            Bytes(geometry.min_block.into()).to_string(),
            Bytes(geometry.preferred_block.into()).to_string(),
            geometry.max_len.map_or_else(|| "any".to_owned(), |max| Bytes(max.into()).to_string()),
            notes(geometry),
        ]),
        None => row.extend(["unknown".to_owned()]),
    }
    row
}

fn notes(geometry: &GeometryView) -> String {
    let notes = [
        (geometry.needs_flush, "flush for durability"),
        (geometry.read_only, "read-only"),
        (geometry.rotational, "rotational"),
    ];
    let notes: Vec<&str> = notes.iter().filter(|(holds, _)| *holds).map(|(_, note)| *note).collect();
    notes.join(", ")
}

/// What the framework does so that the element sees only what it can take.
fn services(element: &ElementView) -> Vec<String> {
    let Some(geometry) = &element.geometry else { return Vec::new() };
    let mut lines = Vec::new();
    if geometry.min_block > 1 {
        let block = Bytes(geometry.min_block.into());
        lines.push(format!("  {}: reads, modifies and writes blocks of {block}\n", element.name));
    }
    if let Some(max) = geometry.max_len {
        lines.push(format!("  {}: splits requests at {}\n", element.name, Bytes(max.into())));
    }
    lines
}

/// The edges that meet at an element, if there are several.
fn meeting(element: &ElementView, edges: &[&EdgeView]) -> Option<String> {
    let ends: Vec<String> = edges.iter().map(|edge| format!("({}, {})", edge.from, edge.port)).collect();
    (ends.len() > 1).then(|| format!("  ({}, in) <- {}\n", element.name, ends.join(", ")))
}

/// The edges at which the requests of one group are ordered.
fn order(group: &[PlaceView]) -> String {
    let places: Vec<String> =
        group.iter().map(|place| format!("({}, {}) -> {}", place.from, place.port, place.to)).collect();
    format!("  {}\n", places.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_listed_group_by_group() {
        let place = |from: &str, port: &str, to: &str| PlaceView {
            from: from.to_owned(),
            port: port.to_owned(),
            to: to.to_owned(),
        };
        let graph = GraphView {
            name: "vm1".to_owned(),
            file: "vm1.mason".to_owned(),
            elements: Vec::new(),
            edges: Vec::new(),
            references: Vec::new(),
            ordered: vec![
                vec![place("Guest", "out", "Tee"), place("Copy", "from", "Old")],
                vec![place("Other", "out", "Tee2")],
            ],
            live: None,
        };
        let drawn = draw(&graph);
        let expected = "\nOverlapping requests are ordered, those of one line together:\n  \
                        (Guest, out) -> Tee, (Copy, from) -> Old\n  (Other, out) -> Tee2\n";
        assert!(drawn.ends_with(expected), "{drawn}");
    }
}
