//! Which requests are shown.

use super::tree::Tree;
use crate::counters::edge_text;
use crate::failure::{Failure, Outcome};
use crate::hops::HopView;
use crate::output::printable;
use crate::view::GraphView;

/// What one hop of a request must be like.
pub(super) struct Wanted {
    pub(super) at: At,
    pub(super) min_ns: u64,
    pub(super) errors: bool,
}

/// Where it leads.
#[derive(Debug, PartialEq)]
pub(super) enum At {
    Anywhere,
    Element(String),
    /// From an element and its port to an element.
    Edge(String, String, String),
}

impl Wanted {
    pub(super) fn matches(&self, tree: &Tree) -> bool {
        tree.nodes.iter().any(|node| self.matches_hop(&node.hop))
    }

    fn matches_hop(&self, hop: &HopView) -> bool {
        let there = match &self.at {
            At::Anywhere => true,
            At::Element(name) => hop.to == *name,
            At::Edge(from, port, to) => {
                hop.from.as_ref() == Some(from) && hop.port.as_ref() == Some(port) && hop.to == *to
            }
        };
        there && hop.took_ns >= self.min_ns && (hop.error.is_some() || !self.errors)
    }
}

impl At {
    /// An element of the graph, or an edge as it is written in a graph file.
    ///
    /// # Errors
    /// There is none; the sentence names the nearest.
    pub(super) fn parse(text: &str, graph: &GraphView) -> Outcome<At> {
        let Some((from, to)) = text.split_once("->") else {
            let name = text.trim();
            if graph.element(name).is_some() {
                return Ok(At::Element(name.to_owned()));
            }
            let names = graph.elements.iter().map(|element| element.name.as_str());
            return Err(unknown("element", name, names, &graph.name));
        };
        let ((from, port), (to, to_port)) = (end(from, "out"), end(to, "in"));
        let found = graph.edges.iter().find(|edge| {
            (edge.from.as_str(), edge.port.as_str(), edge.to.as_str(), edge.to_port.as_str())
                == (from, port, to, to_port)
        });
        if found.is_some() {
            return Ok(At::Edge(from.to_owned(), port.to_owned(), to.to_owned()));
        }
        let edges: Vec<String> =
            graph.edges.iter().map(|edge| edge_text(&edge.from, &edge.port, &edge.to)).collect();
        Err(unknown("edge", &edge_text(from, port, to), edges.iter().map(String::as_str), &graph.name))
    }
}

/// `(A, port)`, or `A` with the usual port.
fn end<'a>(text: &'a str, usual: &'a str) -> (&'a str, &'a str) {
    let text = text.trim();
    let inner = text.strip_prefix('(').and_then(|text| text.strip_suffix(')'));
    match inner.and_then(|inner| inner.split_once(',')) {
        Some((name, port)) => (name.trim(), port.trim()),
        None => (text, usual),
    }
}

fn unknown<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a str>, graph: &str) -> Failure {
    let hint = blockmason::lang::did_you_mean(name, known);
    let hint = hint.map_or_else(String::new, |hint| format!("; {}", printable(&hint)));
    Failure::new(format!("{} has no {what} {name}{hint}", printable(graph)))
}

#[cfg(test)]
mod tests {
    use super::super::tree::{all, tests::hop};
    use super::*;
    use blockmason::lang::{Defines, NoFiles, parse_checked};

    fn graph() -> GraphView {
        let text = "element Guest (type nbd) element Split (type linear) element A (type mem) (size 1M) \
                    element B (type mem) (size 1M) Guest -> Split (Split, a) -> A (Split, b) -> B";
        let path = "vm.mason".into();
        let spec = parse_checked(
            &NoFiles,
            "vm.mason".as_ref(),
            path,
            text.to_owned(),
            &Defines::new(),
            crate::graphs::CATALOGUE,
        );
        GraphView::of_spec("vm", &spec.unwrap_or_else(|errors| panic!("{}", errors.first_line())))
    }

    #[test]
    fn as_in_a_graph_file() {
        let graph = graph();
        let edge = |port: &str, to: &str| At::Edge("Split".to_owned(), port.to_owned(), to.to_owned());
        let parse = |text| At::parse(text, &graph).map_err(|failure| failure.to_string());
        assert_eq!(parse(" A "), Ok(At::Element("A".to_owned())));
        assert_eq!(parse("(Split,a)->A"), Ok(edge("a", "A")));
        assert_eq!(parse("(Split, b) -> (B, in)"), Ok(edge("b", "B")));
        assert_eq!(parse("Guest -> Split"), Ok(At::Edge("Guest".into(), "out".into(), "Split".into())));
        assert_eq!(parse("Gest"), Err("vm has no element Gest; did you mean `Guest`?".to_owned()));
        assert_eq!(
            parse("(Split, a) -> B"),
            Err("vm has no edge (Split, a) -> B; did you mean `(Split, a) -> A`?".to_owned())
        );
        assert_eq!(parse("Split -> "), Err("vm has no edge Split -> ".to_owned()));
    }

    #[test]
    fn one_hop_must_be_all_that_is_asked_for() {
        let failed = HopView { error: Some("bad".to_owned()), ..hop("3", Some("2"), "A", 10, 20) };
        let tree = &all(vec![failed, hop("2", None, "Guest", 0, 100)])[0];
        let wanted = |to: &str, min_ns, errors| {
            let at = if to.is_empty() { At::Anywhere } else { At::Element(to.to_owned()) };
            Wanted { at, min_ns, errors }.matches(tree)
        };
        assert!(wanted("", 100, false) && wanted("A", 10, true) && wanted("Guest", 100, false));
        assert!(
            !wanted("", 101, false)
                && !wanted("A", 11, true)
                && !wanted("Guest", 0, true)
                && !wanted("B", 0, false)
        );
        assert!(!wanted("", 11, true), "the one that failed was not that slow");
    }
}
