//! The graphs of a move: the one with a mirror in the place of a disk, and the ones without it again.
//!
//! All of them are made from the graph as it runs, so that what else has been changed meanwhile stays.

use crate::control::refusal::Refusal;
use crate::graphs::CATALOGUE;
use blockmason::lang::{Edit, Spec, edit};
use blockmason::live::{Diff, Fate};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What the elements of a move are called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Names {
    /// The disk that moves.
    pub(super) disk: String,
    /// Where it moves to.
    pub(super) new: String,
    pub(super) tee: String,
    pub(super) leg: String,
    pub(super) retry: String,
    pub(super) dirty: String,
    pub(super) copy: String,
}

/// Which of the two goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Old,
    New,
}

/// What is known of a move when its graph is made.
pub(super) struct Plan<'a> {
    /// Where the map of what differs is kept.
    pub(super) map: &'a Path,
    /// True if both are the same at this instant.
    pub(super) clean: bool,
    /// Parameters of the copier: `(rate 50M/s)`.
    pub(super) copy: &'a str,
}

impl Names {
    /// Of a move of `disk`, or, once it has moved, of its mirror.
    pub(super) fn of(disk: &str, mirror: bool) -> Names {
        let move_or_back = if mirror { "_back" } else { "" };
        let name = |role: &str| format!("{disk}{move_or_back}_{role}");
        Names {
            disk: disk.to_owned(),
            new: name(if mirror { "old" } else { "new" }),
            tee: name("tee"),
            leg: name("leg"),
            retry: name("retry"),
            dirty: name("dirty"),
            copy: name("copy"),
        }
    }

    /// The elements between the graph and the two disks.
    pub(super) fn between(&self) -> [&str; 5] {
        [&self.tee, &self.leg, &self.retry, &self.dirty, &self.copy]
    }

    /// True if that element is part of the move.
    pub(super) fn has(&self, name: &str) -> bool {
        self.between().contains(&name) || self.disk == name || self.new == name
    }

    /// True if a change leaves the elements of the move, and what leads from one to the other, as they are.
    pub(super) fn untouched(&self, before: &Spec, next: &Spec) -> bool {
        let all = self.between().into_iter().chain([self.disk.as_str(), self.new.as_str()]);
        // Not by their text: an edit may write the same path in another way.
        let diff = Diff::between(before, next, CATALOGUE);
        let same = |name: &str| matches!(diff.fate(name), Some(Fate::Kept | Fate::Set));
        let edges = |spec: &Spec| -> Vec<String> {
            let ours = |ix: usize| self.between().contains(&spec.elements[ix].name.as_str());
            let edges = spec.edges.iter().filter(|edge| ours(edge.from));
            let mut edges: Vec<_> = edges.map(|edge| spec.edge_text(edge)).collect();
            edges.sort();
            edges
        };
        all.into_iter().all(same) && edges(before) == edges(next)
    }

    /// True if `spec` has this mirror.
    pub(super) fn are_in(&self, spec: &Spec) -> bool {
        self.between().iter().all(|name| spec.find(name).is_some()) && spec.find(&self.disk).is_some()
    }

    /// The statements of the mirror, but for the new disk.
    fn mirror(&self, plan: &Plan<'_>) -> String {
        let Names { disk, new, tee, leg, retry, dirty, copy } = self;
        let (map, initially) = (plan.map.display(), if plan.clean { "clean" } else { "dirty" });
        let options = plan.copy;
        format!(
            "element {tee} (type tee) (primary old) (log {dirty})\n\
             element {leg} (type filter) (drop read flush cache extents)\n\
             element {retry} (type on_error) (retry 0) (then ignore) (mark {dirty})\n\
             element {dirty} (type log_dirty) (file \"{map}\") (initially {initially})\n\
             element {copy} (type copy) (only {dirty}) {options}\n\
             ({tee}, old) -> {disk}\n\
             ({tee}, new) -> {leg} -> {retry}\n\
             ({retry}, to) -> {dirty} -> {new}\n\
             ({copy}, from) -> {disk}\n\
             ({copy}, to) -> {dirty}\n"
        )
    }

    /// The graph in which what reaches the disk reaches the new one, too. `target` is the type and parameters of
    /// the new disk, or statements of which the first one is that.
    pub(super) fn with_mirror(
        &self,
        spec: &Spec,
        target: &Target,
        plan: &Plan<'_>,
        folder: &Path,
    ) -> Result<Spec, Refusal> {
        let new = Edit::Add { text: target.statements(&self.new) };
        let by = Edit::Replace { element: self.disk.clone(), by: self.mirror(plan) };
        // In one text the new disk would be reached by nothing for a moment.
        self.edited(spec, &[by, new], folder)
    }

    /// The mirror the other way round: the new disk answers and is called as the old one was, which is kept up to
    /// date. Both are the same at this instant.
    pub(super) fn reversed(
        &self,
        spec: &Spec,
        plan: &Plan<'_>,
        file: &Path,
    ) -> Result<(Spec, Names, Renames), Refusal> {
        let back = Names::of(&self.disk, true);
        // The disks keep their names until the rest is in order.
        let mirror = Names { disk: self.new.clone(), new: self.disk.clone(), ..back.clone() };
        let mut edits = vec![Edit::Add { text: mirror.mirror(plan) }];
        edits.extend(self.edges_to_tee(spec, &mirror.tee));
        edits.push(Edit::Remove { element: self.copy.clone() });
        let mut next = self.edited(spec, &edits, folder_of(file))?;
        let renames = vec![(self.new.clone(), back.disk.clone()), (self.disk.clone(), back.new.clone())];
        rename(&mut next, &renames);
        Ok((next, back, renames))
    }

    /// The graph with one of the two in the place of the mirror, and who goes on under another name.
    pub(super) fn without_mirror(
        &self,
        spec: &Spec,
        side: Side,
        file: &Path,
    ) -> Result<(Spec, Renames), Refusal> {
        let stays = match side {
            Side::Old => &self.disk,
            Side::New => &self.new,
        };
        let mut edits = self.edges_to_tee(spec, stays);
        edits.push(Edit::Remove { element: self.copy.clone() });
        let mut next = self.edited(spec, &edits, folder_of(file))?;
        let renames = match side {
            Side::Old => Vec::new(),
            Side::New => vec![(self.new.clone(), self.disk.clone())],
        };
        rename(&mut next, &renames);
        Ok((next, renames))
    }

    /// What leads to the mirror leads to `to`.
    fn edges_to_tee(&self, spec: &Spec, to: &str) -> Vec<Edit> {
        let tee = spec.find(&self.tee);
        let above = spec.edges.iter().filter(|edge| Some(edge.to) == tee);
        let connect = |edge: &blockmason::lang::EdgeSpec| Edit::Connect {
            edge: format!("({}, {}) -> {to}", spec.elements[edge.from].name, edge.from_port),
        };
        above.map(connect).collect()
    }

    fn edited(&self, spec: &Spec, edits: &[Edit], folder: &Path) -> Result<Spec, Refusal> {
        let name = format!("moving {}", self.disk);
        edit(spec, edits, &name, folder, CATALOGUE).map_err(|diagnostics| Refusal::graph(&diagnostics))
    }
}

/// Paths of a graph file that are relative start here, and stay so.
fn folder_of(file: &Path) -> &Path {
    file.parent().unwrap_or(Path::new("/"))
}

/// Names from now on, by those before.
pub(super) type Renames = Vec<(String, String)>;

/// At once: two may change places.
fn rename(spec: &mut Spec, renames: &Renames) {
    for element in &mut spec.elements {
        if let Some((_, to)) = renames.iter().find(|(from, _)| *from == element.name) {
            element.name.clone_from(to);
        }
    }
}

/// Where a disk is to move, as an administrator writes it.
pub(crate) struct Target(String);

impl Target {
    /// `file (path b.img)`, or statements of a graph whose first element takes the disk's place.
    pub(crate) fn new(text: &str) -> Target {
        Target(text.trim().to_owned())
    }

    /// True if it is no type, but a place where a disk may be. What should be said instead.
    pub(super) fn should_be(&self) -> Option<String> {
        let place = self.0.as_str();
        let is_type = |c: char| c.is_ascii_alphanumeric() || c == '_' || c.is_whitespace();
        let alone = place.contains(['/', '.', ':']) && !place.contains('(') && !self.is_statements();
        if place.is_empty() || !alone || place.chars().all(is_type) {
            return None;
        }
        let disk = if place.contains("://") { "nbd_client (uri " } else { "file (path " };
        Some(format!("'{disk}{place})'"))
    }

    /// As it was given.
    pub(crate) fn text(&self) -> &str {
        &self.0
    }

    /// True if it is several statements, whose elements have names of their own.
    fn is_statements(&self) -> bool {
        self.0.starts_with("element ")
    }

    pub(crate) fn statements(&self, name: &str) -> String {
        if self.is_statements() {
            return self.0.clone();
        }
        if self.0.starts_with('(') {
            return format!("element {name} {}\n", self.0);
        }
        let (ty, parameters) = self.0.split_once(char::is_whitespace).unwrap_or((&self.0, ""));
        format!("element {name} (type {ty}) {parameters}\n")
    }

    /// What its first element is called.
    pub(crate) fn top(&self, otherwise: &str) -> String {
        let named = self.0.strip_prefix("element ").map(str::trim_start);
        let name = named.and_then(|text| text.split(|c: char| c.is_whitespace() || c == '(').next());
        name.unwrap_or(otherwise).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::left::parse_printed;
    use blockmason::lang::print;

    fn spec(text: &str) -> Spec {
        parse_printed(Path::new("t.mason"), Path::new("/srv/t.mason"), text.to_owned()).unwrap()
    }

    fn vm1() -> Spec {
        spec(
            "element Guest (type nbd) (listen unix:/g.sock)\nelement Other (type nbd) (listen unix:/o.sock)\n\
             element Log (type debug_log)\nelement Disk (type file) (path /a.img)\n\
             Guest -> Log -> Disk\nOther -> Disk\n",
        )
    }

    fn plan() -> Plan<'static> {
        Plan { map: Path::new("/map"), clean: false, copy: "(rate 1M/s)" }
    }

    fn file() -> &'static Path {
        Path::new("/srv/t.mason")
    }

    fn edges(spec: &Spec) -> Vec<String> {
        let mut edges: Vec<_> = spec.edges.iter().map(|edge| spec.edge_text(edge)).collect();
        edges.sort();
        edges
    }

    fn mirrored(to: &str) -> (Names, Spec) {
        let target = Target::new(to);
        let names = Names { new: target.top("Disk_new"), ..Names::of("Disk", false) };
        let next = names.with_mirror(&vm1(), &target, &plan(), Path::new("/srv")).unwrap();
        (names, next)
    }

    #[test]
    fn everything_that_led_to_the_disk_leads_to_the_mirror_and_back() {
        let (names, moving) = mirrored("file (path b.img)");
        assert!(names.are_in(&moving) && !names.are_in(&vm1()));
        let into_tee = edges(&moving).into_iter().filter(|edge| edge.ends_with("-> Disk_tee"));
        assert_eq!(into_tee.collect::<Vec<_>>(), ["Log -> Disk_tee", "Other -> Disk_tee"]);
        let (old, renames) = names.without_mirror(&moving, Side::Old, file()).unwrap();
        assert_eq!((edges(&old), old.elements.len(), renames), (edges(&vm1()), 4, vec![]));
        let (new, renames) = names.without_mirror(&moving, Side::New, file()).unwrap();
        assert_eq!((edges(&new), new.elements.len()), (edges(&vm1()), 4));
        assert_eq!(renames, [("Disk_new".to_owned(), "Disk".to_owned())]);
        assert!(print(&new, CATALOGUE, Path::new("/")).contains("/srv/b.img"));
    }

    #[test]
    fn the_mirror_turned_round_has_the_old_disk_on_its_leg() {
        let (names, moving) = mirrored("file (path b.img)");
        let (reversed, back, renames) = names.reversed(&moving, &plan(), file()).unwrap();
        assert!(back.are_in(&reversed) && !names.between().iter().any(|name| reversed.find(name).is_some()));
        let path = |spec: &Spec, name: &str| {
            spec.elements[spec.find(name).unwrap()].params.get("path").unwrap()[0].text().to_owned()
        };
        assert_eq!((path(&reversed, "Disk"), path(&reversed, &back.new)), ("b.img".into(), "/a.img".into()));
        assert_eq!(renames.len(), 2);
        let (home, _) = back.without_mirror(&reversed, Side::New, file()).unwrap();
        assert_eq!((edges(&home), path(&home, "Disk")), (edges(&vm1()), "/a.img".to_owned()));
    }

    #[test]
    fn a_place_is_no_target_and_says_how_it_would_be_one() {
        let said = |text: &str| Target::new(text).should_be();
        assert_eq!(said("/no/such.img").as_deref(), Some("'file (path /no/such.img)'"));
        assert_eq!(said("nbd://far/vm1").as_deref(), Some("'nbd_client (uri nbd://far/vm1)'"));
        for fine in ["file (path /b.img)", "mem", "null (size 1.5G)", "element B (type file) (path ./b)", ""]
        {
            assert_eq!(said(fine), None, "{fine}");
        }
    }

    #[test]
    fn a_target_may_be_several_elements() {
        let to = "element Both (type linear) element A (type file) (path x) element B (type file) (path y) \
                  (Both, a) -> A (Both, b) -> B";
        let (names, moving) = mirrored(to);
        assert_eq!(names.new, "Both");
        let (new, _) = names.without_mirror(&moving, Side::New, file()).unwrap();
        assert!(new.find("Both").is_none() && edges(&new).contains(&"(Disk, a) -> A".to_owned()));
    }

    #[test]
    fn other_changes_leave_a_move_untouched() {
        let (names, moving) = mirrored("null (size 1G)");
        let insert = |element: &str, above: &str, below: &str| Edit::Insert {
            element: element.to_owned(),
            above: above.to_owned(),
            below: below.to_owned(),
        };
        let edited = |edit| names.edited(&moving, &[edit], Path::new("/")).unwrap();
        assert!(names.untouched(&moving, &edited(insert("probe", "Guest", "Log"))));
        assert!(!names.untouched(&moving, &edited(insert("probe", "Disk_dirty", "Disk_new"))));
        assert!(!names.untouched(&moving, &edited(Edit::Remove { element: "Disk_leg".to_owned() })));
        assert!(!names.untouched(&moving, &vm1()));
    }
}
