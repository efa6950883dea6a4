//! The order of overlapping requests in an assembled graph: which edges keep it, who holds and who waits.
//!
//! The map of a group's ranges belongs to the instance of one of its members, its leader. A reload without a
//! pause keeps all mirrors and serialisers and the edges between them (see [`Graph::contracted`]), so both
//! graphs have the same groups with the same leaders, and requests of both are ordered by the one map, however
//! long they run beside each other. A reload that adds a copier or a mirror, or moves one, goes through
//! the gate: once everything in the old graph has ended, nobody holds anything that the new one would have
//! to know of, and a new map is as good as the old one.

use super::places::{Clash, Shape};
use super::{Edge, Graph, Node};
use crate::error::{Error, Result};
use crate::sched::{Claim, Order};
use std::fmt;

/// An edge at which overlapping requests are ordered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaceReading {
    /// The element above.
    pub from: String,
    /// Its out port.
    pub port: String,
    /// The element below.
    pub to: String,
}

/// A claim on ranges, and the element above which it stands.
#[derive(Clone, Debug)]
pub struct Conflict {
    /// The element.
    pub element: String,
    /// The claim.
    pub claim: Claim,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Claim { holder, ranges, since, waits_for, .. } = &self.claim;
        let time = crate::rt::now().saturating_duration_since(*since);
        let ranges: Vec<_> = ranges.iter().map(|range| format!("{}..{}", range.start, range.end)).collect();
        let state = match waits_for {
            0 => "holds".to_owned(),
            1 => "waits for an earlier one to release".to_owned(),
            more => format!("waits for {more} earlier ones to release"),
        };
        let (element, doing, ranges) = (&self.element, holder.doing, ranges.join(", "));
        write!(f, "{element}: request {}, {doing}, {state} {ranges}, for {time:.1?}", holder.root)
    }
}

/// Finds the places of a graph and makes their edges slow. Returns these edges, group by group.
pub(super) fn apply(nodes: &mut [Node], edges: &mut [Edge]) -> Result<Vec<Vec<usize>>> {
    let types: Vec<_> = nodes.iter().map(|node| node.instance.ty).collect();
    let ends: Vec<_> = edges.iter().map(|edge| (edge.from as usize, edge.to as usize)).collect();
    let shape = Shape::new(&types, &ends);
    if let Some(clash) = shape.clash() {
        return Err(refuse(nodes, &ends, &clash));
    }
    let mut places = Vec::new();
    for group in shape.groups() {
        // Mirrors first: copiers come and go. By name, so that the order of the file does not matter.
        let rank = |ix: &&usize| (!nodes[**ix].instance.ty.mirrors, &nodes[**ix].instance.name);
        let Some(leader) = group.members.iter().min_by_key(rank) else { continue };
        let leader = nodes[*leader].instance.clone();
        // Whoever completes a block changes all of it, wherever that is done.
        let within = edges.iter().filter(|edge| group.below.contains(&(edge.to as usize)));
        let block = within.map(|edge| edge.mask + 1).max().unwrap_or(1);
        let order = Order::new(leader, block);
        group.places.iter().for_each(|edge| edges[*edge].set_order(order.clone()));
        for ix in group.members.iter().filter(|ix| types[**ix].serialises) {
            nodes[*ix].order = Some(order.clone());
        }
        places.push(group.places);
    }
    Ok(places)
}

/// The checker says the same with places.
fn refuse(nodes: &[Node], ends: &[(usize, usize)], clash: &Clash) -> Error {
    Error::invalid(clash.message(ends, |ix| &nodes[ix].instance.name))
}

impl Clash {
    /// What is wrong, in a sentence.
    pub(crate) fn message<'n>(&self, ends: &[(usize, usize)], name: impl Fn(usize) -> &'n str) -> String {
        let way = |way: &Vec<usize>| {
            let above = way.first().map(|edge| name(ends[*edge].0));
            let names: Vec<&str> =
                above.into_iter().chain(way.iter().map(|edge| name(ends[*edge].1))).collect();
            names.join(" -> ")
        };
        let [one, other] = [way(&self.ways[0]), way(&self.ways[1])];
        let at = name(self.at);
        format!(
            "overlapping requests cannot be ordered: {one} and {other} count the addresses of {at} differently"
        )
    }
}

impl Graph {
    /// The edges at which overlapping requests are ordered, those together that share one map.
    pub fn places(&self) -> Vec<Vec<PlaceReading>> {
        let reading = |ix: &usize| {
            let edge = &self.edges[*ix];
            PlaceReading {
                from: self.nodes[edge.from as usize].instance.name.clone(),
                port: edge.port.to_string(),
                to: self.nodes[edge.to as usize].instance.name.clone(),
            }
        };
        self.places.iter().map(|group| group.iter().map(reading).collect()).collect()
    }

    /// Every request that holds ranges or waits for them, element by element in the order of arrival:
    /// what keeps this graph from draining, if anything of the framework's does.
    pub fn conflicts(&self) -> Vec<Conflict> {
        let mut found = Vec::new();
        for instance in self.instances() {
            for claim in instance.order.claims().into_iter().chain(instance.ranges.claims()) {
                found.push(Conflict { element: instance.name.clone(), claim });
            }
        }
        found
    }
}
