//! The layout of a graph's volumes, in the words of docs/formats/head.md: the same for every graph that
//! finds the same data in the same places.

use super::file::{LARGEST, Way, too_large};
use crate::describe::{ElementType, Outs, Param};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::lang::value::{ByteRange, OpsRate, Percent, Rate, Size, Time};
use crate::lang::{ElementSpec, Spec, quote};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::{Display, Write};
use std::rc::Rc;
use std::str::FromStr;

/// Different ways to one volume.
const MOST_WAYS: usize = 64;

/// What a sink is called by its neighbours.
#[derive(Clone)]
pub(super) struct Label {
    pub(super) text: String,
    /// The index of its volume, if it has a head.
    pub(super) volume: Option<usize>,
}

/// One graph, ready to be described.
pub(super) struct Layout<'a> {
    spec: &'a Spec,
    graph: &'a Graph,
    /// Of each element its type and its place in the graph.
    known: Vec<(&'static ElementType, usize)>,
    /// Of each element the ports and what they lead to, in the order that counts.
    outs: Vec<Vec<(&'a str, usize)>>,
    /// What sinks are called.
    labels: &'a [Option<Label>],
    /// True for elements with a volume below; ways to others do not matter.
    leads: Vec<bool>,
    /// Volumes of one name under one layout element.
    pub(super) copies: BTreeSet<(usize, usize)>,
}

impl<'a> Layout<'a> {
    /// `labels` are by the indices of the elements.
    pub(super) fn new(spec: &'a Spec, graph: &'a Graph, labels: &'a [Option<Label>]) -> Result<Layout<'a>> {
        let nodes: HashMap<&str, _> =
            graph.instances().enumerate().map(|(node, it)| (it.name.as_str(), (it.ty, node))).collect();
        let known = spec.elements.iter().map(|element| {
            let known = nodes.get(element.name.as_str()).copied();
            known.ok_or_else(|| Error::internal("an element of the graph file is not in the graph"))
        });
        let known: Vec<(&ElementType, usize)> = known.collect::<Result<_>>()?;
        let mut outs: Vec<Vec<(&str, usize)>> = vec![Vec::new(); known.len()];
        for edge in &spec.edges {
            outs[edge.from].push((&edge.from_port, edge.to));
        }
        for ((ty, _), outs) in known.iter().zip(&mut outs) {
            if let Outs::Named(names) = ty.ports.out {
                outs.sort_by_key(|(port, _)| names.iter().position(|name| name == port));
            }
        }
        let leads = leads(&outs, labels);
        Ok(Layout { spec, graph, known, outs, labels, leads, copies: BTreeSet::new() })
    }

    /// The ways to each element that has a label; with `from` only those from there.
    pub(super) fn ways(&mut self, from: Option<usize>) -> Result<Vec<(usize, BTreeSet<Rc<Way>>)>> {
        let mut counted = vec![from.is_none(); self.outs.len()];
        from.into_iter().flat_map(|from| self.spec.reached(from)).for_each(|ix| counted[ix] = true);
        let mut waiting = vec![0; self.outs.len()];
        let edges =
            self.outs.iter().zip(&counted).filter(|(_, counted)| **counted).flat_map(|(outs, _)| outs);
        edges.for_each(|(_, to)| waiting[*to] += 1);
        let mut ways: Vec<BTreeSet<Rc<Way>>> = vec![BTreeSet::new(); self.outs.len()];
        let begins = |ix: &usize| waiting[*ix] == 0 && counted[*ix] && self.leads[*ix];
        let mut ready: Vec<usize> = (0..waiting.len()).filter(begins).collect();
        // What a copier reads and writes is no way to serve a volume.
        let enters = |ix: &&usize| !self.known[**ix].0.serialises;
        ready.iter().filter(enters).for_each(|ix| ways[*ix] = BTreeSet::from([Rc::default()]));
        let mut ended = Vec::new();
        while let Some(ix) = ready.pop() {
            let own = std::mem::take(&mut ways[ix]);
            let parts = self.parts(ix)?;
            for position in 0..self.outs[ix].len() {
                let to = self.outs[ix][position].1;
                if !self.leads[to] {
                    continue;
                }
                match &parts {
                    None => ways[to].extend(own.iter().cloned()),
                    Some(parts) => {
                        let step = self.step(ix, position, parts);
                        for way in &own {
                            let longer = Rc::new([way.as_slice(), step.as_slice()].concat());
                            if longer.iter().map(String::len).sum::<usize>() > LARGEST {
                                return Err(too_large());
                            }
                            ways[to].insert(longer);
                        }
                    }
                }
                if ways[to].len() > MOST_WAYS {
                    return Err(too_large().in_element(&self.spec.elements[to].name));
                }
                waiting[to] -= 1;
                if waiting[to] == 0 {
                    ready.push(to);
                }
            }
            if self.labels[ix].is_some() {
                ended.push((ix, own));
            }
        }
        Ok(ended)
    }

    /// The volumes below each part of a layout element; None for an element that is none.
    fn parts(&mut self, ix: usize) -> Result<Option<Vec<String>>> {
        if !self.known[ix].0.layout {
            return Ok(None);
        }
        let mut names: BTreeMap<String, usize> = BTreeMap::new();
        let mut parts = Vec::with_capacity(self.outs[ix].len());
        let mut bytes = 0;
        for position in 0..self.outs[ix].len() {
            let below = self.below(self.outs[ix][position].1);
            let texts: BTreeSet<&str> = below.iter().map(|label| label.text.as_str()).collect();
            parts.push(texts.into_iter().collect::<Vec<_>>().join(" "));
            for (label, volume) in below.iter().filter_map(|label| Some((label, label.volume?))) {
                let first = *names.entry(label.text.clone()).or_insert(volume);
                if first != volume && label.text.len() == super::NAME {
                    self.copies.insert((first.min(volume), first.max(volume)));
                }
            }
            bytes += parts.last().map_or(0, String::len);
            if bytes > LARGEST {
                return Err(too_large().in_element(&self.spec.elements[ix].name));
            }
        }
        Ok(Some(parts))
    }

    /// What is called by a name below an element, itself included.
    fn below(&self, ix: usize) -> Vec<&'a Label> {
        let mut seen = BTreeSet::from([ix]);
        let mut work = vec![ix];
        let mut found = Vec::new();
        while let Some(ix) = work.pop() {
            found.extend(self.labels[ix].as_ref());
            work.extend(self.outs[ix].iter().map(|(_, to)| *to).filter(|to| seen.insert(*to)));
        }
        found
    }

    /// The lines of a layout element on the way to one of its parts.
    fn step(&self, ix: usize, position: usize, parts: &[String]) -> Vec<String> {
        let (ty, _) = self.known[ix];
        let outs = &self.outs[ix];
        let mut line = ty.name.to_owned();
        line += &parameters(&self.spec.elements[ix], ty);
        let part = |nth: usize| match ty.ports.out {
            Outs::Variadic { .. } => format!("member {nth}"),
            Outs::Named(_) | Outs::None => format!("port {}", outs[nth].0),
        };
        // Writing to a String cannot fail.
        let _ = match ty.ports.out {
            Outs::Variadic { .. } => write!(line, " {} of {}", part(position), outs.len()),
            Outs::Named(names) if names.len() > 1 => write!(line, " {}", part(position)),
            Outs::Named(_) | Outs::None => Ok(()),
        };
        let mut lines = vec![line];
        if ty.sizes && outs.len() > 1 {
            let below = outs[..outs.len() - 1].iter().map(|(_, to)| self.graph.geometry(self.known[*to].1));
            let sizes: Vec<String> = below.map(|geometry| Size(geometry.size).to_string()).collect();
            lines.push(format!("  sizes {}", sizes.join(" ")));
        }
        for (nth, volumes) in parts.iter().enumerate().filter(|(nth, _)| *nth != position) {
            lines.push(format!("  {}: {volumes}", part(nth)));
        }
        lines.iter().map(|line| plain(line)).collect()
    }
}

/// Which elements have a volume below them, themselves included.
fn leads(outs: &[Vec<(&str, usize)>], labels: &[Option<Label>]) -> Vec<bool> {
    let mut above: Vec<Vec<usize>> = vec![Vec::new(); outs.len()];
    for (ix, outs) in outs.iter().enumerate() {
        outs.iter().for_each(|(_, to)| above[*to].push(ix));
    }
    let volume = |label: &Option<Label>| label.as_ref().is_some_and(|label| label.volume.is_some());
    let mut leads = vec![false; outs.len()];
    let mut work: Vec<usize> = (0..outs.len()).filter(|ix| volume(&labels[*ix])).collect();
    while let Some(ix) = work.pop() {
        if !std::mem::replace(&mut leads[ix], true) {
            work.extend(&above[ix]);
        }
    }
    leads
}

/// True if the line says what a neighbouring part is.
pub(super) fn is_neighbour(line: &str) -> bool {
    line.starts_with("  member ") || line.starts_with("  port ")
}

/// ` (chunk 64k)`: the parameters that are part of the layout, each in one way of writing.
fn parameters(element: &ElementSpec, ty: &ElementType) -> String {
    let place = |param: &&Param| {
        matches!(param.kind, "path" | "URI") || param.refers.is_some() || ty.tuning.contains(&param.name)
    };
    let mut text = String::new();
    for param in ty.params.iter().filter(|param| !place(param)) {
        let given = element.params.get(param.name);
        let given = given.map(|values| values.iter().map(|value| value.text()).collect::<Vec<_>>());
        let Some(values) = given.or_else(|| Some(param.default?.split_whitespace().collect())) else {
            continue;
        };
        let values: Vec<String> = values.iter().map(|value| quote(&canonical(param.kind, value))).collect();
        text += &format!(" ({} {})", param.name, values.join(" "));
    }
    text
}

/// A value of a kind, in the words that all ways of writing it share.
fn canonical(kind: &str, text: &str) -> String {
    fn again<T: FromStr + Display>(text: &str) -> Option<String> {
        text.parse::<T>().ok().map(|value| value.to_string())
    }
    let known = match kind {
        "size" => again::<Size>(text),
        "duration" => again::<Time>(text),
        "rate" => again::<Rate>(text),
        "requests per second" => again::<OpsRate>(text),
        "percentage" => again::<Percent>(text),
        "range of bytes" => again::<ByteRange>(text),
        "number" => again::<i128>(text).or_else(|| again::<f64>(text)),
        "yes or no" => match text {
            "true" => Some("yes".to_owned()),
            "false" => Some("no".to_owned()),
            _ => None,
        },
        _ => None,
    };
    known.unwrap_or_else(|| text.to_owned())
}

/// Without control characters, which a value of the command line may hold.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_compared_by_meaning() {
        for (kind, one, other) in [
            ("size", "4k", "4096"),
            ("duration", "1s", "1000ms"),
            ("rate", "1M/s", "1024k/s"),
            ("percentage", "5%", "5.0%"),
            ("range of bytes", "0-4k", "0-4096"),
            ("number", "7", "007"),
            ("number", "0.5", "0.50"),
            ("yes or no", "yes", "true"),
            ("text", "a", "a"),
        ] {
            assert_eq!(canonical(kind, one), canonical(kind, other));
        }
        assert_ne!(canonical("size", "4k"), canonical("size", "4k1"));
        assert_eq!(plain("a\u{1b}\u{85}b"), "a\\u{1b}\\u{85}b");
    }
}
