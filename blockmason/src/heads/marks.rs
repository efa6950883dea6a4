//! What heads say of backups: the account that is kept of a volume's changes, and the backup that a volume holds.
//!
//! A mark is true until somebody writes who does not attend to it. So a graph that is about to serve a volume otherwise
//! takes its marks away before, durably.

use super::file::is_name;
use super::{Finding, Head, Names, Standing, Volume, file, survey_from};
use crate::describe::Outs;
use crate::error::Result;
use crate::graph::{Graph, Instance};
use crate::lang::Spec;
use crate::lang::value::Service;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

/// The name of the account that an element keeps of all changes that pass it: 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account(pub String);

impl FromStr for Account {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Account, String> {
        let wanted = || format!("expected 32 hexadecimal digits in lower case, found `{text:.40}`");
        is_name(text).then(|| Account(text.to_owned())).ok_or_else(wanted)
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

crate::text_value!(Account, "name");

impl Service for Account {
    const NAME: &'static str = "account";
}

/// Heads whose marks a graph makes untrue, as they are without them.
#[derive(Debug, Default)]
pub struct Unkept(HashMap<PathBuf, Head>);

impl Unkept {
    /// Those of a graph that is built and not open. Changes nothing.
    pub fn of(spec: &Spec, graph: &Graph) -> Unkept {
        let mut unkept: HashMap<PathBuf, Head> = HashMap::new();
        let instances: HashMap<_, _> = graph.instances().map(|it| (it.name.as_str(), it)).collect();
        for (ix, element) in spec.elements.iter().enumerate() {
            let at = instances.get(element.name.as_str()).and_then(|instance| instance.element.head());
            let Some(at) = at.filter(|at| !at.read_only) else { continue };
            let before = || file::read(&at.path);
            // What cannot be read marks nothing.
            let Ok(Some(head)) = unkept.get(&at.path).cloned().map_or_else(before, |head| Ok(Some(head)))
            else {
                continue;
            };
            let kept = |account: &String| is_kept(spec, &instances, ix, account);
            let next = Head { account: head.account.clone().filter(kept), backup: None, ..head.clone() };
            if next != head {
                unkept.insert(at.path, next);
            }
        }
        Unkept(unkept)
    }

    /// Takes the marks away. When this returns that is durable.
    ///
    /// # Errors
    /// A head cannot be written.
    pub fn forget(&self) -> Result<()> {
        self.0.iter().try_for_each(|(path, head)| put(path, head))
    }

    /// The same for a head that is about to be written.
    pub(super) fn apply(&self, path: &Path, head: &mut Head) {
        if let Some(unkept) = self.0.get(path) {
            head.account.clone_from(&unkept.account);
            head.backup = None;
        }
    }
}

/// True if all changes that reach an element pass one that keeps this account.
fn is_kept(spec: &Spec, instances: &HashMap<&str, &Arc<Instance>>, sink: usize, account: &str) -> bool {
    let instance = |ix: usize| instances.get(spec.elements[ix].name.as_str());
    let keeps = |ix: usize| {
        let kept = instance(ix).and_then(|it| it.element.provide(Account::NAME)?.downcast::<Account>().ok());
        kept.is_some_and(|kept| kept.0 == account)
    };
    // A copier only reads what its first port leads to.
    let reads = |from: usize, port: &str| {
        let ty = instance(from).map(|it| it.ty).filter(|ty| ty.serialises);
        ty.is_some_and(|ty| matches!(ty.ports.out, Outs::Named([first, ..]) if *first == port))
    };
    let (mut seen, mut work) = (HashSet::from([sink]), vec![sink]);
    while let Some(ix) = work.pop() {
        if keeps(ix) {
            continue;
        }
        let above: Vec<_> = spec.edges.iter().filter(|edge| edge.to == ix).collect();
        if above.is_empty() {
            return false;
        }
        let writes = above.into_iter().filter(|edge| !reads(edge.from, &edge.from_port));
        work.extend(writes.map(|edge| edge.from).filter(|from| seen.insert(*from)));
    }
    true
}

impl Volume {
    /// What its head is to say of a volume whose content is replaced. A disk in use stays the same volume.
    pub fn overwritten(&self, standing: Standing) -> Option<Head> {
        let found =
            self.found.as_ref().filter(|head| head.standing == Standing::Active && head.backup.is_none());
        let (ways, generation) = match found {
            Some(head) => (head.ways.clone(), head.generation),
            // One that is served as it is may be served in any way.
            None if self.ways.iter().all(Vec::is_empty) => Default::default(),
            None => (self.ways.clone(), 0),
        };
        let volume = self.name()?.to_owned();
        Some(Head { volume, complete: true, ways, generation, standing, account: None, backup: None })
    }

    /// Why it must not be written as what its head says it is: its place among others is another one.
    pub fn misplaced(&self) -> Option<&str> {
        match &self.finding {
            Finding::Refused(why, _) if self.elsewhere().is_none() => Some(why),
            _ => None,
        }
    }
}

/// Writes a head, or removes it if it says nothing. When this returns, it is durable.
///
/// # Errors
/// It cannot be written or removed. What it said before it says still.
pub fn put(path: &Path, head: &Head) -> Result<()> {
    if head.says_nothing() { file::remove(path) } else { file::write(path, head) }
}

/// The volumes below an element, with the ways to them that begin there: of a disk that is served by itself.
///
/// # Errors
/// As [`survey`](super::survey).
pub fn alone(spec: &Spec, graph: &Graph, element: &str, names: Names) -> Result<Vec<Volume>> {
    only_below(survey_from(&[(spec, graph)], names, &[], Some(element))?, spec, graph, element)
}

/// Those that requests reach from an element.
pub(super) fn only_below(
    volumes: Vec<Volume>,
    spec: &Spec,
    graph: &Graph,
    element: &str,
) -> Result<Vec<Volume>> {
    let reached = spec.find(element).into_iter().flat_map(|ix| spec.reached(ix));
    let names: HashSet<&str> = reached.map(|ix| spec.elements[ix].name.as_str()).collect();
    // By their places: a volume that several elements store is called by the first of them.
    let sinks = graph.instances().filter(|instance| names.contains(instance.name.as_str()));
    let places: HashSet<PathBuf> =
        sinks.filter_map(|instance| instance.element.head()).map(|at| at.path).collect();
    Ok(volumes.into_iter().filter(|volume| places.contains(&volume.at.path)).collect())
}
