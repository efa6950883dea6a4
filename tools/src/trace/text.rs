//! A request as a tree of text.

use super::tree::{Node, Tree};
use crate::counters::edge_text;
use crate::hops::HopView;
use crate::output::printable;
use crate::units::{Exact, Nanos};

/// Above the first tree.
pub(super) const HEAD: &str = "     since     took     self  element\n";

/// Levels that move the name to the right.
const MOST_INDENT: usize = 24;

/// One line for each hop. Columns are as wide as this tree needs.
pub(super) fn draw(tree: &Tree) -> String {
    let Some(top) = tree.nodes.first() else { return String::new() };
    let begin = top.hop.start_ns;
    let names: Vec<String> = tree.nodes.iter().map(name).collect();
    let asked: Vec<String> = tree.nodes.iter().map(|node| asked(&node.hop)).collect();
    let width = |column: &[String], least: usize| {
        column.iter().map(|text| text.chars().count()).max().unwrap_or(0).max(least)
    };
    let (name_width, asked_width) = (width(&names, 24), width(&asked, 16));
    let mut out = String::from("\n");
    for ((node, name), asked) in tree.nodes.iter().zip(&names).zip(&asked) {
        let since = format!("+{}", Nanos(node.hop.start_ns.saturating_sub(begin)));
        let (took, own) = (Nanos(node.hop.took_ns).to_string(), Nanos(node.self_ns).to_string());
        let result = node.hop.error.as_deref().map_or_else(|| "ok".to_owned(), printable);
        out +=
            &format!("{since:>10} {took:>8} {own:>8}  {name:name_width$}  {asked:asked_width$}  {result}\n");
    }
    out
}

/// The element; the edge, where an element has several.
fn name(node: &Node) -> String {
    let way = match (&node.hop.from, &node.hop.port) {
        (Some(from), Some(port)) if port != "out" => edge_text(from, port, &node.hop.to),
        _ => node.hop.to.clone(),
    };
    let late = if node.depth == 0 && node.hop.parent.is_some() { "(later) " } else { "" };
    format!("{}{late}{}", "  ".repeat(node.depth.min(MOST_INDENT)), printable(&way))
}

/// `write 4k at 1M fua`.
fn asked(hop: &HopView) -> String {
    let mut text = hop.operation.clone();
    if !matches!(hop.operation.as_str(), "flush" | "control") {
        text += &format!(" {} at {}", Exact(hop.length), Exact(hop.offset));
    }
    for flag in &hop.flags {
        text += &format!(" {flag}");
    }
    if hop.origin != "guest" {
        text += &format!(" ({})", hop.origin);
    }
    printable(&text)
}

#[cfg(test)]
mod tests {
    use super::super::tree::{all, tests::hop};
    use super::*;

    #[test]
    fn columns_stand_below_each_other() {
        let to_disk = HopView {
            port: Some("a".to_owned()),
            error: Some("Disk: write at 1048576: out of \x1b[2Jspace".to_owned()),
            flags: vec!["fua".to_owned()],
            origin: "internal".to_owned(),
            ..hop("3", Some("2"), "Disk", 1_600, 2_500_000)
        };
        let flush = HopView { operation: "flush".to_owned(), ..hop("2", None, "Guest", 100, 3_000_100) };
        let trees = all(vec![to_disk, flush]);
        let wanted = "
      +0ns    3.0ms  501.6us  Guest                     flush                            ok
    +1.5us    2.5ms    2.5ms    (Above, a) -> Disk      write 4k at 1M fua (internal)  Disk: write at 1048576: out of ?[2Jspace
";
        let drawn = draw(&trees[0]);
        assert_eq!(drawn.replace(' ', ""), wanted.replace(' ', ""), "{drawn}");
        let column = |line: &str, word: &str| line.find(word).unwrap();
        let lines: Vec<_> = drawn.lines().skip(1).collect();
        assert_eq!(column(lines[0], "ok"), column(lines[1], "Disk: "));
        assert_eq!(column(lines[0], "flush"), column(lines[1], "write 4k"));
    }
}
