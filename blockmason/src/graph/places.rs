//! Where overlapping requests are ordered, from the shape of a graph alone: the checker and the assembly ask
//! the same.
//!
//! One order is needed above every mirror, whose legs must agree, and above all that a serialiser's ports
//! lead to, where it meets the requests of others. These elements, and those on ways between them, are a
//! *region*. Every edge that enters a region is a *place*: who comes through it is ordered. A way that
//! leaves a region never comes back to it, so each request passes one place at the most, whatever it
//! becomes further down passes none, and nobody who holds a range waits for another one.
//!
//! Regions from which requests reach a common element are one group, and share one order.

use crate::describe::ElementType;

/// What is ordered together.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Group {
    /// The mirrors and serialisers that it is made for, by index.
    pub(crate) members: Vec<usize>,
    /// The edges whose requests are ordered.
    pub(crate) places: Vec<usize>,
    /// The elements that requests reach from there.
    pub(crate) below: Vec<usize>,
}

/// Two ways from places of one group to one element, on which its addresses differ.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Clash {
    /// The element.
    pub(crate) at: usize,
    /// Both ways, each from its place to `at`, as edges.
    pub(crate) ways: [Vec<usize>; 2],
    /// The elements on one of them that change addresses or data.
    pub(crate) between: Vec<usize>,
}

/// The elements and edges of a graph, and what is known of each element.
pub(crate) struct Shape<'a> {
    types: &'a [&'static ElementType],
    edges: &'a [(usize, usize)],
    /// The edges that enter each element.
    above: Vec<Vec<usize>>,
    /// Every element after all that are above it. Circles are left out.
    order: Vec<usize>,
    /// Elements that are in a region or below one.
    below: Vec<bool>,
    region: Vec<bool>,
}

impl<'a> Shape<'a> {
    /// A graph of these elements; an edge is the indices of its ends, the upper one first.
    pub(crate) fn new(types: &'a [&'static ElementType], edges: &'a [(usize, usize)]) -> Shape<'a> {
        let mut above = vec![Vec::new(); types.len()];
        edges.iter().enumerate().for_each(|(ix, (_, to))| above[*to].push(ix));
        let order = parents_first(&above, edges);
        let mut shape =
            Shape { types, edges, above, order, below: vec![false; types.len()], region: Vec::new() };
        if types.iter().any(|ty| ty.mirrors || ty.serialises) {
            shape.find_regions();
        }
        shape
    }

    fn find_regions(&mut self) {
        let count = self.types.len();
        let mut reached = vec![false; count];
        for &ix in &self.order {
            let mut from = self.above[ix].iter().map(|edge| self.edges[*edge].0);
            reached[ix] = from.any(|from| reached[from] || self.types[from].serialises);
        }
        let seed = |ix: usize| reached[ix] || self.types[ix].mirrors;
        let mut above = vec![false; count];
        for &ix in &self.order {
            let mut from = self.above[ix].iter().map(|edge| self.edges[*edge].0);
            self.below[ix] = seed(ix) || from.any(|from| self.below[from]);
        }
        for &ix in self.order.iter().rev() {
            above[ix] |= seed(ix);
            if above[ix] {
                self.above[ix].iter().for_each(|edge| above[self.edges[*edge].0] = true);
            }
        }
        self.region = self.below.iter().zip(above).map(|(below, above)| *below && above).collect();
    }

    fn is_place(&self, edge: usize) -> bool {
        let (from, to) = self.edges[edge];
        self.region[to] && !self.region[from]
    }

    fn is_member(&self, ix: usize) -> bool {
        self.types[ix].mirrors || self.types[ix].serialises
    }

    /// The groups, in the order of their first members.
    pub(crate) fn groups(&self) -> Vec<Group> {
        let mut sets = Sets::new(self.types.len());
        for (from, to) in self.edges {
            if self.below[*from] || self.types[*from].serialises {
                sets.unite(*from, *to);
            }
        }
        let mut groups: Vec<Group> = Vec::new();
        let mut of_set = vec![None; self.types.len()];
        for ix in (0..self.types.len()).filter(|ix| self.is_member(*ix)) {
            let group = *of_set[sets.find(ix)].get_or_insert_with(|| {
                groups.push(Group { members: Vec::new(), places: Vec::new(), below: Vec::new() });
                groups.len() - 1
            });
            groups[group].members.push(ix);
        }
        for ix in (0..self.types.len()).filter(|ix| self.below[*ix]) {
            // What is below a region is of the set of a member.
            let Some(group) = of_set[sets.find(ix)] else { continue };
            groups[group].below.push(ix);
            let places = self.above[ix].iter().copied().filter(|edge| self.is_place(*edge));
            groups[group].places.extend(places);
        }
        groups.iter_mut().for_each(|group| group.places.sort_unstable());
        groups
    }

    /// An element that requests reach from several places of a group, counting its addresses in
    /// different ways, so that one order of ranges means nothing there.
    pub(crate) fn clash(&self) -> Option<Clash> {
        // For each element the first ones of its group's regions by which requests come to it, and the
        // last ones on the way that changed addresses: the same if that is one.
        let mut known = vec![Came::default(); self.types.len()];
        for &ix in self.order.iter().filter(|ix| self.below[**ix]) {
            let came = self.above[ix].iter().filter_map(|edge| self.came(*edge, &known));
            known[ix] = came.fold(Came::default(), Came::and);
            if (known[ix].entry, known[ix].space) == (Of::Several, Of::Several) {
                return Some(self.draw(ix, &known));
            }
        }
        None
    }

    /// How requests come along an edge; None if they were not ordered above.
    fn came(&self, edge: usize, known: &[Came]) -> Option<Came> {
        let (from, to) = self.edges[edge];
        if self.is_place(edge) {
            return Some(Came { entry: Of::One(to), space: Of::One(usize::MAX) });
        }
        let keeps = self.types[from].passes_through || self.types[from].mirrors;
        let space = if keeps { known[from].space } else { Of::One(from) };
        self.below[from].then_some(Came { space, ..known[from] })
    }

    fn draw(&self, at: usize, known: &[Came]) -> Clash {
        let came: Vec<(usize, Came)> =
            self.above[at].iter().filter_map(|edge| Some((*edge, self.came(*edge, known)?))).collect();
        let differ = |a: Of, b: Of| a != b || a == Of::Several;
        let pairs = came.iter().enumerate().flat_map(|(ix, a)| came[ix + 1..].iter().map(move |b| (a, b)));
        let pair = pairs
            .filter(|(a, b)| differ(a.1.space, b.1.space))
            .max_by_key(|(a, b)| differ(a.1.entry, b.1.entry));
        // Several entries and spaces came by several edges: an element above, with both, would have
        // been found before.
        let ways = pair.map_or([Vec::new(), Vec::new()], |(a, b)| [self.way(a.0), self.way(b.0)]);
        let inside = |way: &Vec<usize>| way[1..].iter().map(|edge| self.edges[*edge].0).collect::<Vec<_>>();
        let [one, other] = [inside(&ways[0]), inside(&ways[1])];
        let alone = one.iter().filter(|ix| !other.contains(ix));
        let alone = alone.chain(other.iter().filter(|ix| !one.contains(ix))).copied();
        let between =
            alone.filter(|ix| !self.types[*ix].passes_through && !self.types[*ix].mirrors).collect();
        Clash { at, ways, between }
    }

    /// The way from a place down to an edge, by the first edges that lead there.
    fn way(&self, mut edge: usize) -> Vec<usize> {
        let mut way = vec![edge];
        while !self.is_place(edge) {
            let up = self.above[self.edges[edge].0].iter().copied();
            let Some(next) = up.clone().find(|up| self.is_place(*up) || self.below[self.edges[*up].0]) else {
                break;
            };
            edge = next;
            way.push(edge);
        }
        way.reverse();
        way
    }
}

/// Nothing, one, or more than one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Of {
    #[default]
    None,
    One(usize),
    Several,
}

impl Of {
    fn and(self, other: Of) -> Of {
        match (self, other) {
            (Of::None, of) | (of, Of::None) => of,
            (a, b) if a == b => a,
            _ => Of::Several,
        }
    }
}

/// How requests come to an element.
#[derive(Clone, Copy, Default)]
struct Came {
    /// Where they entered the region.
    entry: Of,
    /// What last changed their addresses.
    space: Of,
}

impl Came {
    fn and(self, other: Came) -> Came {
        Came { entry: self.entry.and(other.entry), space: self.space.and(other.space) }
    }
}

fn parents_first(above: &[Vec<usize>], edges: &[(usize, usize)]) -> Vec<usize> {
    let mut below = vec![Vec::new(); above.len()];
    edges.iter().for_each(|(from, to)| below[*from].push(*to));
    let mut waiting: Vec<usize> = above.iter().map(Vec::len).collect();
    let mut order: Vec<usize> = (0..above.len()).filter(|ix| waiting[*ix] == 0).collect();
    let mut next = 0;
    while let Some(&ix) = order.get(next) {
        next += 1;
        for &child in &below[ix] {
            waiting[child] -= 1;
            if waiting[child] == 0 {
                order.push(child);
            }
        }
    }
    order
}

/// Disjoint sets of elements.
struct Sets(Vec<usize>);

impl Sets {
    fn new(count: usize) -> Sets {
        Sets((0..count).collect())
    }

    fn find(&mut self, mut ix: usize) -> usize {
        while self.0[ix] != ix {
            self.0[ix] = self.0[self.0[ix]];
            ix = self.0[ix];
        }
        ix
    }

    fn unite(&mut self, a: usize, b: usize) {
        let (a, b) = (self.find(a), self.find(b));
        self.0[a] = b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::describe::{Outs, Ports};
    use crate::lang::{Defines, parse_str};
    use std::path::Path;

    const MANY: Ports = Ports { input: true, out: Outs::Variadic { min: 1 } };
    const FROM_TO: Ports = Ports { input: false, out: Outs::Variadic { min: 0 } };
    static TYPES: &[&ElementType] = &[
        &ElementType { name: "guest", ports: Ports::SOURCE, ..ElementType::BASE },
        &ElementType { name: "tee", ports: MANY, mirrors: true, ..ElementType::BASE },
        &ElementType { name: "copy", ports: FROM_TO, serialises: true, ..ElementType::BASE },
        &ElementType { name: "pass", passes_through: true, ..ElementType::BASE },
        &ElementType { name: "switch", ports: MANY, passes_through: true, ..ElementType::BASE },
        &ElementType { name: "slice", ..ElementType::BASE },
        &ElementType { name: "linear", ports: MANY, ..ElementType::BASE },
        &ElementType { name: "sink", ports: Ports::SINK, ..ElementType::BASE },
    ];

    /// The names of elements are made of their types, `Tee2`, and numbered ports of those with many.
    /// Answers the places, group by group, and the clash: `G>Tee C>Old; G2>Tee2 ! Old by Slice`.
    fn placed(edges: &str) -> String {
        let mut text = String::new();
        let mut names: Vec<&str> = Vec::new();
        let pairs: Vec<(&str, &str)> =
            edges.split_whitespace().map(|edge| edge.split_once('>').unwrap()).collect();
        for name in pairs.iter().flat_map(|(from, to)| [*from, *to]) {
            if !names.contains(&name) {
                names.push(name);
                let ty = name.trim_end_matches(|c: char| c.is_ascii_digit()).to_lowercase();
                text += &format!("element {name} (type {ty})\n");
            }
        }
        let ports = |name: &str| {
            let ty = name.trim_end_matches(|c: char| c.is_ascii_digit()).to_lowercase();
            TYPES.iter().find(|known| known.name == ty).unwrap().ports.out
        };
        for (ix, (from, to)) in pairs.iter().enumerate() {
            text += &match ports(from) {
                Outs::Variadic { .. } => format!("({from}, p{ix}) -> {to}\n"),
                _ => format!("{from} -> {to}\n"),
            };
        }
        let spec = parse_str("t.mason", &text, Path::new("."), &Defines::new()).unwrap();
        let types: Vec<_> =
            spec.elements.iter().map(|element| crate::describe::find(TYPES, &element.ty).unwrap()).collect();
        let ends: Vec<_> = spec.edges.iter().map(|edge| (edge.from, edge.to)).collect();
        let shape = Shape::new(&types, &ends);
        let name = |ix: usize| spec.elements[ix].name.as_str();
        let drawn = |edge: &usize| format!("{}>{}", name(ends[*edge].0), name(ends[*edge].1));
        let groups = shape.groups();
        let group = |group: &Group| group.places.iter().map(drawn).collect::<Vec<_>>().join(" ");
        let mut found = groups.iter().map(group).collect::<Vec<_>>().join("; ");
        if let Some(clash) = shape.clash() {
            let between: Vec<_> = clash.between.iter().map(|ix| name(*ix)).collect();
            found += &format!(" ! {} by {}", name(clash.at), between.join(" "));
        }
        found
    }

    #[test]
    fn where_requests_are_ordered() {
        for (edges, expected) in [
            // Nothing is duplicated and nobody copies: nothing is ordered.
            ("Guest>Sink", ""),
            ("Guest1>Sink Guest2>Sink", ""),
            ("Guest>Linear Linear>Sink1 Linear>Sink2", ""),
            // A mirror, and every way into it.
            ("Guest>Tee Tee>Sink1 Tee>Sink2", "Guest>Tee"),
            ("Guest1>Tee Guest2>Slice Slice>Tee Tee>Sink1 Tee>Sink2", "Guest1>Tee Slice>Tee"),
            // Who writes to one leg alone changes that leg only.
            ("Guest1>Tee Tee>Slice Slice>Sink1 Tee>Sink2 Guest2>Sink1", "Guest1>Tee"),
            // Two mirrors that have nothing in common, and two that have.
            (
                "Guest1>Tee1 Tee1>Sink1 Tee1>Sink2 Guest2>Tee2 Tee2>Sink3 Tee2>Sink4",
                "Guest1>Tee1; Guest2>Tee2",
            ),
            (
                "Guest1>Tee1 Tee1>Sink1 Tee1>Sink2 Guest2>Tee2 Tee2>Sink1 Tee2>Sink2",
                "Guest1>Tee1 Guest2>Tee2",
            ),
            // A mirror below a mirror: the outermost ways in, also those that enter between them.
            ("Guest>Tee1 Tee1>Tee2 Tee1>Sink1 Tee2>Sink2 Tee2>Sink3", "Guest>Tee1"),
            (
                "Guest1>Tee1 Tee1>Pass Pass>Tee2 Tee1>Sink1 Tee2>Sink2 Tee2>Sink3 Guest2>Pass",
                "Guest1>Tee1 Guest2>Pass",
            ),
            // The migration: what the guest does is ordered above the tee, with what the copier does.
            (
                "Guest>Tee Tee>Sink1 Tee>Pass Pass>Sink2 Copy>Sink1 Copy>Sink2",
                "Guest>Tee Copy>Sink1 Copy>Sink2",
            ),
            // A copier behind the guest's back: the guest where it enters what the copier reaches.
            ("Guest>Pass Pass>Sink1 Copy>Sink1 Copy>Sink2", "Pass>Sink1 Copy>Sink1 Copy>Sink2"),
            ("Guest>Slice Slice>Pass Pass>Sink1 Copy>Pass Copy>Sink2", "Slice>Pass Copy>Pass Copy>Sink2"),
            // A copier that nobody meets, and two that meet.
            ("Guest>Sink Copy>Sink1 Copy>Sink2", "Copy>Sink1 Copy>Sink2"),
            (
                "Copy1>Sink1 Copy1>Sink2 Copy2>Sink2 Copy2>Sink3",
                "Copy1>Sink1 Copy1>Sink2 Copy2>Sink2 Copy2>Sink3",
            ),
            // A copier joins what would be apart.
            (
                "Guest1>Tee1 Tee1>Sink1 Tee1>Sink2 Guest2>Tee2 Tee2>Sink3 Tee2>Sink4 Copy>Sink1 Copy>Sink3",
                "Guest1>Tee1 Guest2>Tee2 Copy>Sink1 Copy>Sink3",
            ),
        ] {
            assert_eq!(placed(edges), expected, "{edges}");
        }
    }

    #[test]
    fn addresses_that_mean_something_else_on_another_way() {
        for (edges, expected) in [
            // One way in: whatever lies below it.
            ("Guest>Tee Tee>Slice1 Slice1>Sink Tee>Slice2 Slice2>Sink", "Guest>Tee"),
            // Several ways into the same element: they count alike from there on.
            (
                "Guest1>Slice1 Slice1>Tee Guest2>Slice2 Slice2>Tee Tee>Slice Slice>Sink1 Tee>Sink2",
                "Slice1>Tee Slice2>Tee",
            ),
            (
                "Guest1>Tee1 Tee1>Pass Guest2>Tee2 Tee2>Pass Pass>Slice Slice>Sink1 Tee1>Sink2 Tee2>Sink3",
                "Guest1>Tee1 Guest2>Tee2",
            ),
            // The copier's addresses are not the guest's.
            (
                "Guest>Tee Tee>Sink1 Tee>Slice Slice>Sink2 Copy>Sink1 Copy>Sink2",
                "Guest>Tee Copy>Sink1 Copy>Sink2 ! Sink2 by Slice",
            ),
            (
                "Guest>Slice Slice>Sink1 Copy>Slice Copy>Sink1",
                "Guest>Slice Copy>Slice Copy>Sink1 ! Sink1 by Slice",
            ),
            // Two mirrors of slices of the same sinks.
            (
                "Guest1>Tee1 Tee1>Slice1 Slice1>Sink1 Tee1>Sink2 Guest2>Tee2 Tee2>Slice2 Slice2>Sink1 Tee2>Sink3",
                "Guest1>Tee1 Guest2>Tee2 ! Sink1 by Slice1 Slice2",
            ),
            // ... found at the first element that they share, not further down.
            (
                "Guest1>Tee1 Tee1>Slice1 Slice1>Pass Pass>Sink1 Tee1>Sink2 Guest2>Tee2 Tee2>Pass Tee2>Sink3",
                "Guest1>Tee1 Guest2>Tee2 ! Pass by Slice1",
            ),
        ] {
            assert_eq!(placed(edges), expected, "{edges}");
        }
    }

    /// What the module says of ways holds for any graph.
    #[test]
    fn every_way_passes_one_place_at_the_most() {
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..2000 {
            let count = rng.usize(4..14);
            let mut types: Vec<_> = (0..count).map(|_| TYPES[rng.usize(0..TYPES.len())]).collect();
            types[0] = TYPES[0];
            let pairs = (0..count).flat_map(|from| (from + 1..count).map(move |to| (from, to)));
            let pairs = pairs.filter(|(_, to)| types[*to].ports.input);
            let mut edges: Vec<_> = pairs.filter(|_| rng.u8(0..4) == 0).collect();
            // Requests reach every element.
            let lonely = |ix: &usize| types[*ix].ports.input && edges.iter().all(|(_, to)| to != ix);
            let more: Vec<_> = (1..count).filter(lonely).map(|ix| (0, ix)).collect();
            edges.splice(0..0, more);
            let shape = Shape::new(&types, &edges);
            let groups = shape.groups();
            for (ix, group) in groups.iter().enumerate() {
                for other in &groups[ix + 1..] {
                    assert!(group.below.iter().all(|node| !other.below.contains(node)), "groups are apart");
                }
            }
            let places: Vec<usize> = groups.iter().flat_map(|group| group.places.clone()).collect();
            // The places on any way to each element, the fewest and the most. Edges are sorted by their upper
            // ends, which come before all that is below them.
            let mut passed = vec![None; count];
            for (ix, (from, to)) in edges.iter().enumerate() {
                let place = usize::from(places.contains(&ix));
                let (least, most) = passed[*from].unwrap_or((0, 0));
                let (l, m) = passed[*to].unwrap_or((usize::MAX, 0));
                passed[*to] = Some((l.min(least + place), m.max(most + place)));
            }
            for (passed, ty) in passed.iter().zip(&types).filter_map(|(passed, ty)| Some(((*passed)?, ty))) {
                assert!(passed.1 <= 1, "{edges:?}");
                assert!(!ty.mirrors || passed.0 == 1, "every way into a mirror is ordered, {edges:?}");
            }
        }
    }
}
