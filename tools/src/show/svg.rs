//! A graph as a picture: a row of boxes for each distance from the sources, edges downwards.

use super::live::carried;
use super::{parameters, ports};
use crate::view::GraphView;
use std::collections::HashMap;
use std::fmt::Write;

const BOX_HEIGHT: usize = 52;
const ROW: usize = 110;
const GAP: usize = 30;
const MARGIN: usize = 20;
/// Width of a character at the size used, a little more than it takes.
const CHARACTER: usize = 8;
/// Characters of one line in a box; more are cut.
const LONGEST: usize = 40;

/// The middle of a box and its width.
#[derive(Clone, Copy)]
struct Place {
    x: usize,
    y: usize,
    width: usize,
}

/// Draws the graph.
pub(super) fn draw(graph: &GraphView) -> String {
    let rows = rows(graph);
    let widths: Vec<usize> = graph
        .elements
        .iter()
        .map(|element| {
            let lines =
                [element.name.as_str(), &element.ty, &parameters(element)].map(|line| line.chars().count());
            lines.into_iter().max().unwrap_or(0).min(LONGEST) * CHARACTER + 16
        })
        .collect();
    let width_of = |row: &Vec<usize>| row.iter().map(|ix| widths[*ix] + GAP).sum::<usize>();
    let width = rows.iter().map(width_of).max().unwrap_or(0);
    let mut places = HashMap::new();
    for (depth, row) in rows.iter().enumerate() {
        let mut x = MARGIN + (width - width_of(row) + GAP) / 2;
        for ix in row {
            let place = Place { x: x + widths[*ix] / 2, y: MARGIN + depth * ROW, width: widths[*ix] };
            places.insert(graph.elements[*ix].name.as_str(), place);
            x += widths[*ix] + GAP;
        }
    }
    let (width, height) = (width + 2 * MARGIN, rows.len().max(1) * ROW - ROW + BOX_HEIGHT + 2 * MARGIN);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\" text-anchor=\"middle\">\n\
         <defs><marker id=\"tip\" markerWidth=\"8\" markerHeight=\"8\" refX=\"8\" refY=\"4\" orient=\"auto\">\
         <path d=\"M0 0 L8 4 L0 8 z\"/></marker></defs>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    draw_edges(graph, &places, &mut out);
    draw_boxes(graph, &places, &mut out);
    out + "</svg>\n"
}

/// The elements of each row, by index: every edge leads to a row further down. Within a row each stands
/// near the middle of what is above it.
fn rows(graph: &GraphView) -> Vec<Vec<usize>> {
    let index: HashMap<&str, usize> =
        graph.elements.iter().enumerate().map(|(ix, element)| (element.name.as_str(), ix)).collect();
    let edges: Vec<(usize, usize)> = graph
        .edges
        .iter()
        .filter_map(|edge| Some((*index.get(edge.from.as_str())?, *index.get(edge.to.as_str())?)))
        .collect();
    let depths = depths(graph.elements.len(), &edges);
    let mut rows = vec![Vec::new(); depths.iter().max().map_or(0, |deepest| deepest + 1)];
    let mut position = vec![0.0; graph.elements.len()];
    for (ix, depth) in depths.iter().enumerate() {
        rows[*depth].push(ix);
    }
    let mut above = vec![Vec::new(); graph.elements.len()];
    for (order, (from, to)) in edges.iter().enumerate() {
        above[*to].push((*from, order));
    }
    for row in &mut rows {
        // Legs of one element stand in the order of its edges.
        let key = |ix: usize| {
            let sum: f64 = above[ix].iter().map(|(from, _)| position[*from]).sum();
            (sum / above[ix].len().max(1) as f64, above[ix].first().map(|(_, order)| *order))
        };
        row.sort_by(|a, b| key(*a).partial_cmp(&key(*b)).unwrap_or(std::cmp::Ordering::Equal));
        let middle = row.len() as f64 / 2.0;
        for (place, ix) in row.iter().enumerate() {
            position[*ix] = place as f64 + 0.5 - middle;
        }
    }
    rows
}

/// The longest way from a source to each element.
fn depths(count: usize, edges: &[(usize, usize)]) -> Vec<usize> {
    let mut below = vec![Vec::new(); count];
    let mut waiting = vec![0; count];
    for (from, to) in edges {
        below[*from].push(*to);
        waiting[*to] += 1;
    }
    let mut depths = vec![0; count];
    let mut order: Vec<usize> = (0..count).filter(|ix| waiting[*ix] == 0).collect();
    while let Some(ix) = order.pop() {
        for to in &below[ix] {
            depths[*to] = depths[*to].max(depths[ix] + 1);
            waiting[*to] -= 1;
            if waiting[*to] == 0 {
                order.push(*to);
            }
        }
    }
    depths
}

fn draw_edges(graph: &GraphView, places: &HashMap<&str, Place>, out: &mut String) {
    let label = |edge| {
        let parts = [Some(ports(edge)).filter(|ports| !ports.is_empty()), carried(edge)];
        parts.into_iter().flatten().collect::<Vec<_>>().join(": ")
    };
    let edges = graph.edges.iter().map(|edge| (&edge.from, &edge.to, label(edge), ""));
    let dashed = " stroke-dasharray=\"4 3\"";
    let references = graph.references.iter().map(|r| (&r.from, &r.to, r.parameter.clone(), dashed));
    for (from, to, label, style) in edges.chain(references) {
        let (Some(from), Some(to)) = (places.get(from.as_str()), places.get(to.as_str())) else { continue };
        let (x1, y1, x2, y2) = (from.x, from.y + BOX_HEIGHT, to.x, to.y);
        let _ = writeln!(
            out,
            "<line x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\" stroke=\"black\"{style} \
             marker-end=\"url(#tip)\"/>"
        );
        if !label.is_empty() {
            let (x, y) = ((x1 + x2) / 2 + 4, (y1 + y2) / 2);
            let label = escape(&label);
            let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"start\">{label}</text>");
        }
    }
}

fn draw_boxes(graph: &GraphView, places: &HashMap<&str, Place>, out: &mut String) {
    for element in &graph.elements {
        let Some(Place { x, y, width }) = places.get(element.name.as_str()) else { continue };
        let left = x - width / 2;
        let _ = writeln!(
            out,
            "<rect x=\"{left}\" y=\"{y}\" width=\"{width}\" height=\"{BOX_HEIGHT}\" rx=\"4\" \
             fill=\"#eef3f8\" stroke=\"#456\"/>"
        );
        let given = parameters(element);
        let lines = [(&element.name, " font-weight=\"bold\""), (&element.ty, ""), (&given, " fill=\"#456\"")];
        for (ix, (line, style)) in lines.iter().enumerate() {
            let (y, line) = (y + 16 + 15 * ix, escape(&shorten(line)));
            let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\"{style}>{line}</text>");
        }
    }
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(LONGEST) {
        Some(_) => text.chars().take(LONGEST - 3).chain("...".chars()).collect(),
        None => text.to_owned(),
    }
}

/// Text as XML has it.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            // Not allowed in XML, not even escaped.
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_is_text() {
        assert_eq!(escape("<a b=\"c\">&\x01"), "&lt;a b=&quot;c&quot;&gt;&amp;?");
        assert_eq!(shorten(&"x".repeat(41)).len(), LONGEST);
    }

    #[test]
    fn every_edge_leads_down() {
        let edges = [(0, 2), (0, 1), (1, 2), (2, 3), (0, 3)];
        let depths = depths(4, &edges);
        assert!(edges.iter().all(|(from, to)| depths[*from] < depths[*to]), "{depths:?}");
    }
}
