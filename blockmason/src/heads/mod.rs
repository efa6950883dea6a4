//! Heads of volumes: signatures of the layout that data was written with, compared before a graph is
//! handed over to (Block Mason, section 5). The format and the rules are docs/formats/head.md.
//!
//! [`verify`] comes after a graph has been built and before it is opened; it changes nothing. The
//! [`Plan`] that it returns is begun before anything is opened, completed once everything is, and
//! withdrawn if that fails.

mod diff;
mod file;
mod layout;
mod marks;
mod place;
#[cfg(test)]
mod tests;

pub use file::{Backup, Head, Standing};
pub use marks::{Account, Unkept, alone, put};
pub use place::HeadPlace;

use crate::describe::Outs;
use crate::error::{Error, Kind, Result};
use crate::graph::Graph;
use crate::lang::{ElementSpec, Spec};
use layout::{Label, Layout, is_neighbour};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Bytes of a volume's name.
const NAME: usize = 32;

/// Volumes whose differences one error shows.
const MOST_SHOWN: usize = 4;

/// A volume, its head, and how they fit.
pub struct Volume {
    /// The element that it belongs to.
    pub element: String,
    /// Where the element stands, `vm1.mason:3:9`.
    pub place: String,
    /// Where its head is.
    pub at: HeadPlace,
    /// How the graph and the head fit.
    pub finding: Finding,
    /// The head that is there, if it could be read.
    pub found: Option<Head>,
    /// The name that it has, or is given; a read-only one without a head has none.
    name: Option<String>,
    ways: BTreeSet<Vec<String>>,
}

/// How a graph and a volume's head fit.
#[derive(Debug)]
pub enum Finding {
    /// It is served as it is and has no head.
    Plain,
    /// It has a layout and no head yet.
    New,
    /// The head names this layout.
    Signed,
    /// The head names this layout, and was left by a start that was interrupted.
    Unfinished,
    /// It must not be served so: why, and the difference as a diff, which may be empty.
    Refused(String, Vec<String>),
}

impl Volume {
    /// The head that the layout of the graph asks for; None if the volume is served as it is and has never
    /// moved.
    pub fn wanted(&self) -> Option<Head> {
        let volume = self.name.clone()?;
        let (account, backup) = self.marks();
        let (ways, generation, standing) = (self.ways.clone(), self.generation(), Standing::Active);
        let head = Head { volume, complete: true, ways, generation, standing, account, backup };
        (!head.says_nothing()).then_some(head)
    }

    fn marks(&self) -> (Option<String>, Option<Backup>) {
        self.found.as_ref().map_or((None, None), |head| (head.account.clone(), head.backup.clone()))
    }

    /// How often it has moved.
    pub fn generation(&self) -> u64 {
        self.found.as_ref().map_or(0, |head| head.generation)
    }

    /// Where it stands in a move.
    pub fn standing(&self) -> &Standing {
        self.found.as_ref().map_or(&Standing::Active, |head| &head.standing)
    }

    /// True if its head names other volumes, parts of the same disk.
    pub fn has_neighbours(&self) -> bool {
        self.ways.iter().flatten().any(|line| is_neighbour(line))
    }

    /// What it is called by other volumes.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// What it is called by people.
    pub fn called(&self) -> String {
        self.at.called.clone()
    }

    /// Writes where it stands, under the name `name` if it is given. When this returns, it is durable.
    ///
    /// # Errors
    /// The head cannot be written. What it said before it says still.
    pub fn stand(&self, name: Option<&str>, generation: u64, standing: Standing) -> Result<()> {
        let Some(volume) = name.or(self.name.as_deref()).map(str::to_owned) else {
            let message = "it is read-only and has no head: where it goes cannot be noted";
            return Err(Error::new(Kind::Denied, message).in_element(&self.element));
        };
        let ways = self.ways.clone();
        // What is about to be filled is no volume of which account is kept.
        let (account, _) = self.marks();
        let account = account.filter(|_| !matches!(standing, Standing::Filling(_)));
        let head = Head { volume, complete: true, ways, generation, standing, account, backup: None };
        file::write(&self.at.path, &head)
    }

    /// Puts back the head that was there when it was surveyed, or that none was.
    ///
    /// # Errors
    /// It cannot be written or removed.
    pub fn restore(&self) -> Result<()> {
        match &self.found {
            Some(head) => file::write(&self.at.path, head),
            None => file::remove(&self.at.path),
        }
    }

    /// Why it must not be served, nor signed, by whoever does not know of a move.
    pub fn elsewhere(&self) -> Option<String> {
        let generation = self.generation();
        match self.standing() {
            Standing::Active => None,
            Standing::Moving(to) => Some(format!(
                "it is on its way to {to}, and only the daemon that moves it knows which of the two is newer"
            )),
            Standing::Filling(from) => {
                Some(format!("it is being filled from {from}, and is not, or not always, the whole disk"))
            }
            Standing::Moved(to) => {
                Some(format!("it has moved to {to} (generation {generation}); this is what it was before"))
            }
            Standing::Overlaid(overlay) => Some(format!(
                "what was written while it was backed up is in {overlay}: start its graph once, which merges that"
            )),
        }
    }

    /// From the head that is there to the one that the layout asks for, as a diff.
    pub fn difference(&self) -> Vec<String> {
        let none = BTreeSet::new();
        diff::diff(self.found.as_ref().map_or(&none, |head| &head.ways), &self.ways)
    }

    fn judge(&self, head: Result<Option<Head>>, moving: &[PathBuf]) -> Finding {
        let head = match head {
            Ok(Some(head)) => head,
            Ok(None) if self.wanted().is_some() => return Finding::New,
            Ok(None) => return Finding::Plain,
            Err(error) => return Finding::Refused(with_source(&error), Vec::new()),
        };
        if let Some(why) = self.elsewhere().filter(|_| !moving.contains(&self.at.path)) {
            return Finding::Refused(why, Vec::new());
        }
        let known = |ways: &BTreeSet<Vec<String>>| ways.is_subset(&head.ways);
        let elements = |ways: &BTreeSet<Vec<String>>| -> BTreeSet<Vec<String>> {
            ways.iter().map(|way| way.iter().filter(|line| !is_neighbour(line)).cloned().collect()).collect()
        };
        match &self.at.missing {
            _ if !head.complete && elements(&self.ways).is_subset(&elements(&head.ways)) => {
                Finding::Unfinished
            }
            // What is to be filled need not be there yet; and what is on the move is open, and saved by that.
            Some(image)
                if head.complete
                    && !matches!(head.standing, Standing::Filling(_))
                    && !moving.contains(&self.at.path) =>
            {
                let message = format!("{} is gone, but its head is there", image.display());
                Finding::Refused(message, Vec::new())
            }
            // It says nothing of a layout.
            _ if head.complete && head.ways.is_empty() => match self.ways.iter().any(|way| !way.is_empty()) {
                true => Finding::New,
                false => Finding::Signed,
            },
            _ if head.complete && known(&self.ways) => Finding::Signed,
            _ => {
                let message = format!("its layout is another one: {}", self.at.path.display());
                Finding::Refused(message, diff::diff(&head.ways, &self.ways))
            }
        }
    }
}

/// How names are given to the volumes of a survey.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Names {
    /// Those of the heads; new ones where there is no head.
    Keep,
    /// New ones also for copies, and for volumes that are gone: for adopting the layout of a graph.
    Adopt,
    /// New ones, but for what is a disk in use: for volumes that are overwritten.
    Overwrite,
}

/// The volumes of graphs that are built and not open, and how their heads fit. Changes nothing.
///
/// # Errors
/// A layout that is too large. What is wrong with a head is a finding.
pub fn survey(graphs: &[(&Spec, &Graph)], names: Names) -> Result<Vec<Volume>> {
    survey_from(graphs, names, &[], None)
}

/// With `from`, the ways are those from that element.
fn survey_from(
    graphs: &[(&Spec, &Graph)],
    names: Names,
    moving: &[PathBuf],
    from: Option<&str>,
) -> Result<Vec<Volume>> {
    let (mut volumes, sinks) = volumes(graphs);
    let mut heads = Vec::with_capacity(volumes.len());
    let mut taken = HashSet::new();
    for volume in &mut volumes {
        let head = file::read(&volume.at.path);
        volume.found = head.as_ref().ok().cloned().flatten();
        let kept = |head: &&Head| match names {
            Names::Keep => true,
            Names::Adopt => volume.at.missing.is_none() && !taken.contains(&head.volume),
            Names::Overwrite => head.standing == Standing::Active && head.backup.is_none(),
        };
        volume.name = match volume.found.as_ref().filter(kept) {
            Some(head) => Some(head.volume.clone()),
            None if volume.at.read_only => None,
            None => Some(random_name()?),
        };
        taken.extend(volume.name.clone());
        heads.push(head);
    }
    let mut copies = HashMap::new();
    for ((spec, graph), sinks) in graphs.iter().zip(&sinks) {
        let labels = labels(spec, graph, sinks, &volumes);
        let mut layout = Layout::new(spec, graph, &labels)?;
        for (element, ways) in layout.ways(from.and_then(|name| spec.find(name)))? {
            if let Some(volume) = sinks[element] {
                volumes[volume].ways.extend(ways.iter().map(|way| way.to_vec()));
            }
        }
        // A volume that moves is for a while in two places.
        let moves = |ix: usize| matches!(volumes[ix].standing(), Standing::Filling(_) | Standing::Moved(_));
        for (one, other) in layout.copies.into_iter().filter(|(one, other)| !moves(*one) && !moves(*other)) {
            copies.insert(one, volumes[other].at.path.clone());
            copies.insert(other, volumes[one].at.path.clone());
        }
    }
    let fresh = volumes.iter().filter(|volume| volume.found.is_none());
    let fresh: HashSet<String> = fresh.filter_map(|volume| volume.name.clone()).collect();
    for (ix, (volume, head)) in volumes.iter_mut().zip(heads).enumerate() {
        volume.finding = volume.judge(head, moving);
        if let Finding::Refused(_, lines) = &mut volume.finding {
            lines.iter_mut().for_each(|line| *line = without(line, &fresh));
        }
        if let Some(other) = copies.get(&ix) {
            let message = format!("its head names the same volume as {}: one is a copy", other.display());
            volume.finding = Finding::Refused(message, Vec::new());
        }
    }
    Ok(volumes)
}

/// The volumes of all graphs, each once, and for each graph the volume of each element.
fn volumes(graphs: &[(&Spec, &Graph)]) -> (Vec<Volume>, Vec<Vec<Option<usize>>>) {
    let mut volumes: Vec<Volume> = Vec::new();
    let mut known: HashMap<PathBuf, usize> = HashMap::new();
    let mut sinks = Vec::with_capacity(graphs.len());
    for (spec, graph) in graphs {
        let instances: HashMap<_, _> = graph.instances().map(|it| (it.name.as_str(), it)).collect();
        let mut volume_of = |element: &ElementSpec| {
            let at = instances.get(element.name.as_str())?.element.head()?;
            let next = volumes.len();
            let ix = *known.entry(at.path.clone()).or_insert(next);
            match volumes.get_mut(ix) {
                // One that may write is enough.
                Some(volume) => volume.at.read_only &= at.read_only,
                None => volumes.push(Volume {
                    element: element.name.clone(),
                    place: spec.place(element).to_string(),
                    at,
                    finding: Finding::Plain,
                    found: None,
                    name: None,
                    ways: BTreeSet::new(),
                }),
            }
            Some(ix)
        };
        sinks.push(spec.elements.iter().map(&mut volume_of).collect());
    }
    (volumes, sinks)
}

/// What the sinks of a graph are called by their neighbours.
fn labels(spec: &Spec, graph: &Graph, sinks: &[Option<usize>], volumes: &[Volume]) -> Vec<Option<Label>> {
    let types: HashMap<&str, _> = graph.instances().map(|it| (it.name.as_str(), it.ty)).collect();
    let label = |(element, sink): (&ElementSpec, &Option<usize>)| match sink {
        Some(volume) => {
            let name = volumes[*volume].name.as_deref();
            let text = name.unwrap_or("read-only without a head").to_owned();
            Some(Label { text, volume: Some(*volume) })
        }
        None => {
            let ty = types.get(element.name.as_str()).filter(|ty| ty.ports.out == Outs::None)?;
            Some(Label { text: ty.name.to_owned(), volume: None })
        }
    };
    spec.elements.iter().zip(sinks).map(label).collect()
}

/// A name that no other volume, or account, has.
///
/// # Errors
/// The system gives no random numbers.
pub fn random_name() -> Result<String> {
    let mut bytes = [0; NAME / 2];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    match got {
        Ok(count) if count == bytes.len() => {
            Ok(bytes.iter().fold(String::new(), |name, byte| format!("{name}{byte:02x}")))
        }
        _ => Err(Error::new(Kind::Unavailable, "the system gives no random numbers to name a volume with")),
    }
}

/// A line of a diff, with the names that were only just made up in words.
fn without(line: &str, fresh: &HashSet<String>) -> String {
    let word = |word| if fresh.contains(word) { "(without a head)" } else { word };
    line.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

fn with_source(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Compares the heads of all volumes of graphs that are built and not open, and says which are to be
/// written. Those whose heads are at `moving` may be on the move: the graph is what moves them. Changes nothing.
///
/// # Errors
/// All volumes that must not be served so, each with the difference.
pub fn verify(graphs: &[(&Spec, &Graph)], moving: &[PathBuf]) -> Result<Plan> {
    let volumes = survey_from(graphs, Names::Keep, moving, None)?;
    let mut text = String::new();
    let refused = volumes.iter().filter_map(|volume| match &volume.finding {
        Finding::Refused(why, lines) => Some((volume, why, lines)),
        Finding::Plain | Finding::New | Finding::Signed | Finding::Unfinished => None,
    });
    let count = refused.clone().count();
    let elsewhere = |volume: &Volume| volume.elsewhere().is_some() && !moving.contains(&volume.at.path);
    let moved = refused.clone().any(|(volume, ..)| elsewhere(volume));
    let mut differ = false;
    for (volume, why, lines) in refused.take(MOST_SHOWN) {
        differ |= !lines.is_empty();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{} ({}): {why}", volume.element, volume.place);
        text.extend(lines.iter().map(|line| format!("    {line}\n")));
    }
    if count > MOST_SHOWN {
        let _ = writeln!(text, "and {} more volumes", count - MOST_SHOWN);
    }
    if count > 0 {
        if differ {
            text += "`-` is what the volume was made with, `+` what the graph says.\n";
        }
        if moved {
            text += "Serve the disk where it is now. To serve this one all the same, and leave its head as it is: --force";
            return Err(Error::invalid(text));
        }
        text += "Correct the graph. To serve it so and leave the heads as they are: --force. To make this the \
                 layout: mason sign, or for a running graph mason reload --sign";
        return Err(Error::invalid(text));
    }
    let new = |volume: &&Volume| matches!(volume.finding, Finding::New | Finding::Unfinished);
    Ok(Plan::of(volumes.iter().filter(new)))
}

/// The heads to be written for a hand-over.
#[derive(Debug, Default)]
pub struct Plan {
    /// Each with what is there now.
    heads: Vec<(PathBuf, Head, Option<Head>)>,
}

impl Plan {
    /// The heads that volumes want and do not have; those of read-only ones stay as they are.
    pub fn of<'a>(volumes: impl Iterator<Item = &'a Volume>) -> Plan {
        let head = |volume: &Volume| {
            let wanted = volume.wanted().filter(|_| !volume.at.read_only)?;
            let differs = volume.found.as_ref() != Some(&wanted);
            differs.then(|| (volume.at.path.clone(), wanted, volume.found.clone()))
        };
        Plan { heads: volumes.filter_map(head).collect() }
    }

    /// Leaves out the marks that are not true any more.
    pub fn without_marks(mut self, of: &Unkept) -> Plan {
        self.heads.iter_mut().for_each(|(path, head, _)| of.apply(path, head));
        self
    }

    /// True if all heads are as they should be.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// Writes the heads, not complete yet. When it returns they are durable.
    ///
    /// # Errors
    /// The first that cannot be written; those that were not there before are removed again.
    pub fn begin(&self) -> Result<()> {
        let begun = self.heads.iter().try_for_each(|(path, head, before)| {
            let begun = Head { complete: false, ..head.clone() };
            if before.as_ref() == Some(&begun) { Ok(()) } else { file::write(path, &begun) }
        });
        if begun.is_err() {
            self.withdraw();
        }
        begun
    }

    /// Completes the heads: the graph has been handed over to. When it returns they are durable.
    ///
    /// # Errors
    /// The first that cannot be written. What is not complete is completed at the next start.
    pub fn complete(&self) -> Result<()> {
        self.heads.iter().try_for_each(|(path, head, _)| file::write(path, head))
    }

    /// Removes the heads that were not there before: the graph is not served.
    pub fn withdraw(&self) {
        for (path, ..) in self.heads.iter().filter(|(_, _, before)| before.is_none()) {
            // One that stays is not complete, and taken up again.
            if let Err(error) = file::remove(path) {
                tracing::warn!("{}", with_source(&error));
            }
        }
    }
}

/// The volumes of a graph that requests reach from an element.
///
/// # Errors
/// As [`survey`].
pub fn below(spec: &Spec, graph: &Graph, element: &str) -> Result<Vec<Volume>> {
    marks::only_below(survey(&[(spec, graph)], Names::Keep)?, spec, graph, element)
}

/// The head at a path; None if there is none.
///
/// # Errors
/// It cannot be read, or is no sound head.
pub fn read(path: &Path) -> Result<Option<Head>> {
    file::read(path)
}

/// Writes where the volume of a head stands, and leaves the rest as it is. A head that says nothing any more, of a
/// volume that is served as it is and has never moved, is removed. When this returns, it is durable.
///
/// # Errors
/// There is no sound head, or it cannot be written. What it said before it says still.
pub fn restand(path: &Path, generation: u64, standing: Standing) -> Result<()> {
    let Some(head) = file::read(path)? else {
        // A move that ended before it began.
        return match standing {
            Standing::Active if generation == 0 => Ok(()),
            _ => {
                Err(Error::new(Kind::Unavailable, "the head of a volume that moves is gone").with_path(path))
            }
        };
    };
    // Account is kept of the volume, not of what it was before or of what it is to be.
    let account = head.account.filter(|_| !matches!(standing, Standing::Moved(_) | Standing::Filling(_)));
    put(path, &Head { generation, standing, account, ..head })
}

/// Removes the head of a volume that is to be served as it is. When it returns, it is gone for good.
///
/// # Errors
/// If it cannot be removed.
pub fn remove(volume: &Volume) -> Result<()> {
    file::remove(&volume.at.path)
}
