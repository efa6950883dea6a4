//! Requests put together from their hops, which come in the order in which they end: what lies below first.

use crate::hops::HopView;
use std::collections::{HashMap, HashSet, VecDeque};

/// Hops that are kept while the one above them has not come. A hop that was lost keeps those below it here
/// until they are too many.
const MOST_WAITING: usize = 1 << 16;

/// Hops that are remembered after they were shown, for those that end after the one above them.
const MOST_SHOWN: usize = 1 << 14;

/// A request with everything that was made of it; or what has outlived the request that it was made in.
pub(super) struct Tree {
    /// Each before those below it; these in the order of their begin.
    pub(super) nodes: Vec<Node>,
}

/// A hop in its place.
pub(super) struct Node {
    pub(super) hop: HopView,
    /// Hops above it in the tree.
    pub(super) depth: usize,
    /// The hop above it in the tree, by its place there.
    pub(super) parent: Option<usize>,
    /// Its time without that in which hops below it went on.
    pub(super) self_ns: u64,
}

impl Tree {
    /// True if it has outlived the request that it was made in.
    pub(super) fn is_late(&self) -> bool {
        self.nodes.first().is_some_and(|top| top.hop.parent.is_some())
    }

    /// Puts together `top` and what of `rest` lies below it; the others stay.
    fn new(top: HopView, rest: &mut Vec<HopView>) -> Tree {
        let mut below: HashMap<String, Vec<HopView>> = HashMap::new();
        for hop in rest.drain(..) {
            below.entry(hop.parent.clone().unwrap_or_default()).or_default().push(hop);
        }
        let mut nodes: Vec<Node> = Vec::new();
        let mut todo = vec![(top, 0, None)];
        // Without recursion: a chain may be very long.
        while let Some((hop, depth, parent)) = todo.pop() {
            let mut children = below.remove(&hop.hop).unwrap_or_default();
            children.sort_by_key(|child| std::cmp::Reverse((child.start_ns, number(&child.hop))));
            let self_ns = hop.took_ns - covered(&hop, &children);
            let ix = nodes.len();
            nodes.push(Node { hop, depth, parent, self_ns });
            todo.extend(children.into_iter().map(|child| (child, depth + 1, Some(ix))));
        }
        rest.extend(below.into_values().flatten());
        Tree { nodes }
    }
}

/// A hop's name counts upwards on its shard.
fn number(hop: &str) -> u64 {
    hop.rsplit_once('-').and_then(|(_, number)| number.parse().ok()).unwrap_or(0)
}

/// For how long of a hop one below it went on.
fn covered(hop: &HopView, children: &[HopView]) -> u64 {
    let mut spans: Vec<_> = children.iter().map(|child| (child.start_ns, child.end_ns())).collect();
    spans.sort_unstable();
    let (mut covered, mut at) = (0, hop.start_ns);
    for (start, end) in spans {
        let (start, end) = (start.max(at), end.min(hop.end_ns()));
        covered += end.saturating_sub(start);
        at = at.max(end);
    }
    covered
}

/// Puts requests together while their hops come.
#[derive(Default)]
pub(super) struct Trees {
    /// Hops by root, whose tree is not complete.
    waiting: HashMap<String, Vec<HopView>>,
    /// Those roots, in the order in which they came; some may have gone.
    order: VecDeque<String>,
    count: usize,
    shown: HashSet<String>,
    shown_order: VecDeque<String>,
    lost: u64,
}

impl Trees {
    /// Takes the next hop; gives the tree that it completes.
    pub(super) fn add(&mut self, hop: HopView) -> Option<Tree> {
        let is_top = hop.parent.as_ref().is_none_or(|parent| self.shown.contains(parent));
        if !is_top {
            self.wait(hop);
            return None;
        }
        let mut rest = self.waiting.remove(&hop.root).unwrap_or_default();
        self.count -= rest.len();
        let tree = Tree::new(hop, &mut rest);
        tree.nodes.iter().for_each(|node| self.remember(&node.hop.hop));
        rest.into_iter().for_each(|hop| self.wait(hop));
        Some(tree)
    }

    /// Hops that will not be shown, since what was above them has not come.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    fn wait(&mut self, hop: HopView) {
        let hops = self.waiting.entry(hop.root.clone()).or_default();
        if hops.is_empty() {
            self.order.push_back(hop.root.clone());
        }
        hops.push(hop);
        self.count += 1;
        while self.count > MOST_WAITING || self.order.len() > MOST_WAITING {
            let Some(root) = self.order.pop_front() else { break };
            let lost = self.waiting.remove(&root).map_or(0, |hops| hops.len());
            self.count -= lost;
            self.lost += lost as u64;
        }
    }

    fn remember(&mut self, hop: &str) {
        if self.shown_order.len() == MOST_SHOWN
            && let Some(oldest) = self.shown_order.pop_front()
        {
            self.shown.remove(&oldest);
        }
        self.shown.insert(hop.to_owned());
        self.shown_order.push_back(hop.to_owned());
    }
}

/// The trees of a finished list of hops, oldest first. What is above some of them may be missing.
pub(super) fn all(hops: Vec<HopView>) -> Vec<Tree> {
    let known: HashSet<String> = hops.iter().map(|hop| hop.hop.clone()).collect();
    let is_top = |hop: &HopView| hop.parent.as_ref().is_none_or(|parent| !known.contains(parent));
    let (mut tops, mut rest): (Vec<_>, Vec<_>) = hops.into_iter().partition(is_top);
    tops.sort_by_key(|top| (top.start_ns, number(&top.hop)));
    tops.into_iter().map(|top| Tree::new(top, &mut rest)).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A hop of the root 1, from `start` to `end`.
    pub(crate) fn hop(name: &str, parent: Option<&str>, to: &str, start: u64, end: u64) -> HopView {
        HopView {
            root: "0-1".to_owned(),
            hop: format!("0-{name}"),
            parent: parent.map(|parent| format!("0-{parent}")),
            from: parent.map(|_| "Above".to_owned()),
            port: parent.map(|_| "out".to_owned()),
            to: to.to_owned(),
            operation: "write".to_owned(),
            offset: 1 << 20,
            length: 4096,
            origin: "guest".to_owned(),
            start_ns: start,
            took_ns: end - start,
            ..HopView::default()
        }
    }

    pub(crate) fn names(tree: &Tree) -> Vec<String> {
        tree.nodes
            .iter()
            .map(|node| format!("{}{} {}", " ".repeat(node.depth), node.hop.to, node.self_ns))
            .collect()
    }

    #[test]
    fn a_tree_is_complete_with_its_root() {
        let mut trees = Trees::default();
        let hops = [
            hop("4", Some("3"), "A", 120, 150),
            hop("5", Some("3"), "B", 130, 190),
            hop("3", Some("2"), "Mirror", 110, 200),
        ];
        assert!(hops.into_iter().all(|hop| trees.add(hop).is_none()));
        let tree = trees.add(hop("2", None, "Guest", 100, 210)).unwrap();
        // A and B together cover 70 of the mirror's 90.
        assert_eq!(names(&tree), ["Guest 20", " Mirror 20", "  A 30", "  B 60"]);
        assert_eq!((trees.count, trees.lost()), (0, 0));
    }

    #[test]
    fn what_outlives_its_request_comes_later_with_what_is_below_it() {
        let mut trees = Trees::default();
        assert!(trees.add(hop("4", Some("3"), "Disk", 120, 150)).is_none());
        let tree = trees.add(hop("2", None, "Guest", 100, 110)).unwrap();
        assert_eq!((names(&tree), tree.is_late()), (vec!["Guest 10".to_owned()], false));
        let late = trees.add(hop("3", Some("2"), "Lag", 115, 300)).unwrap();
        assert_eq!((names(&late), late.is_late()), (vec!["Lag 155".to_owned(), " Disk 30".to_owned()], true));
        assert_eq!(trees.count, 0);
    }

    #[test]
    fn what_was_lost_does_not_fill_the_memory() {
        let mut trees = Trees::default();
        for number in 0..3 * MOST_WAITING {
            let lonely = hop("9", Some("8"), "Disk", 1, 2);
            let root = format!("0-{number}");
            assert!(trees.add(HopView { root: root.clone(), hop: root, ..lonely }).is_none());
        }
        assert_eq!(
            (trees.count, trees.order.len(), trees.lost()),
            (MOST_WAITING, MOST_WAITING, 2 * MOST_WAITING as u64)
        );
        for number in 0..3 * MOST_SHOWN {
            let root = format!("1-{number}");
            trees.add(HopView { root: root.clone(), hop: root, ..hop("1", None, "Guest", 1, 2) });
        }
        assert_eq!((trees.shown.len(), trees.shown_order.len()), (MOST_SHOWN, MOST_SHOWN));
    }

    #[test]
    fn a_list_without_its_tops() {
        let trees = all(vec![
            hop("4", Some("3"), "Disk", 120, 150),
            hop("9", Some("8"), "Other", 10, 20),
            hop("3", Some("2"), "Lag", 115, 300),
        ]);
        let found: Vec<_> = trees.iter().map(names).collect();
        assert_eq!(found, [vec!["Other 10"], vec!["Lag 155", " Disk 30"]]);
    }

    #[test]
    fn a_chain_of_any_length() {
        let chain = (1..20_000u64)
            .map(|n| hop(&n.to_string(), (n > 1).then(|| (n - 1).to_string()).as_deref(), "E", n, 50_000));
        let trees = all(chain.collect());
        assert_eq!((trees.len(), trees[0].nodes.last().unwrap().depth), (1, 19_998));
    }
}
