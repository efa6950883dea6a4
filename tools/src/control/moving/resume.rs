//! What becomes of moves that were under way when the process ended.

use super::cut::After;
use super::graph::Side;
use super::job::Job;
use super::record::{Phase, Record};
use crate::control::daemon::{Daemon, Served};
use crate::control::graph_file::{Sum, is_edited};
use crate::control::refusal::Refusal;
use crate::graphs::{CATALOGUE, GraphFile};
use crate::left::{Choice, Left, parse_printed};
use blockmason::io::{remove_file, replace_file};
use blockmason::lang::{Spec, print};
use blockmason::live::{Diff, Heads};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a graph starts with that had moves under way.
pub(crate) struct Resumed {
    /// The moves that go on.
    records: Vec<Record>,
    /// What has become of the others, in sentences.
    said: Vec<String>,
    /// What the graph file is known to say: it may have been edited since a move began.
    known: Option<Sum>,
}

impl Resumed {
    /// Decides for each move of a graph file which side is the disk, and makes the graph that follows; None if there
    /// is nothing of a move. What a cut-over had still to do is done here.
    ///
    /// # Errors
    /// What is left of a move cannot be understood, or written.
    pub(crate) fn of(
        daemon: &Daemon,
        path: &Path,
        file: GraphFile,
        left: &Left,
        choice: Choice,
    ) -> Result<(GraphFile, Option<Resumed>), Refusal> {
        Record::sweep(daemon, path);
        let records = Record::read_all(daemon, path)?;
        if records.is_empty() {
            return Ok((left.choose(file, choice)?, None));
        }
        let known = records.iter().find_map(|record| record.graph_file).or_else(|| Sum::read(path));
        let mut resumed = Resumed { records: Vec::new(), said: Vec::new(), known };
        let cutting = records.iter().find_map(|record| match &record.phase {
            Phase::Cutting { graph } => Some(graph.clone()),
            Phase::Copying | Phase::GivingUp => None,
        });
        let mut spec = match cutting {
            Some(graph) => parse(path, graph)?,
            None if choice == Choice::File => file.spec.clone(),
            None => left.choose(file.clone(), Choice::Left)?.spec,
        };
        let (cut, others): (Vec<_>, Vec<_>) = records
            .into_iter()
            .partition(|record| matches!(record.phase, Phase::Cutting { .. }) && record.heads.have_cut());
        if !cut.is_empty() {
            let after = After::of(daemon, path, &spec, &cut)?;
            let saved = Record::as_saved(&after.spec, &others, path)?;
            match is_edited(path, resumed.known) {
                // The cut-over has written it.
                _ if Diff::between(&file.spec, &saved, CATALOGUE).is_empty() => {
                    resumed.known = Sum::read(path)
                }
                // What serves is left beside it for the next start, which asks.
                Some(edited) => resumed.said.push(format!("{edited}, and does not say where the disk is")),
                None => resumed.write(path, &saved)?,
            }
            spec = resumed.finish(daemon, path, after, cut)?;
        }
        for record in others {
            if !record.names.are_in(&spec) {
                if record.options.is_mirror {
                    resumed.write_without(daemon, path, &spec)?;
                }
                resumed.give_up(daemon, path, &record, "its graph was left without it")?;
                continue;
            }
            // The graph file has had a mirror since its cut-over.
            let unwanted = choice == Choice::File && !record.options.is_mirror;
            let why = match record.heads.lost() {
                _ if record.phase == Phase::GivingUp => Some("that was under way".to_owned()),
                _ if unwanted => Some("its graph file is served".to_owned()),
                lost => lost,
            };
            match why {
                Some(why) => spec = resumed.take_out(daemon, path, &record, &spec, &why)?,
                None => resumed.go_on(daemon, path, record)?,
            }
        }
        Ok((file.with(spec), Some(resumed)))
    }

    /// The new disks of these moves are the disks.
    fn finish(
        &mut self,
        daemon: &Daemon,
        path: &Path,
        after: After,
        cut: Vec<Record>,
    ) -> Result<Spec, Refusal> {
        for (record, mirror) in cut.into_iter().zip(after.mirrors) {
            let heads = &record.heads;
            heads.finish_cut(record.options.keep_mirror).map_err(|error| Refusal::of(&error))?;
            let disk = &record.names.disk;
            self.said.push(format!("{disk} has moved: it is {} now", heads.new_called));
            match mirror {
                Some(mirror) => self.go_on(daemon, path, mirror)?,
                None => record.forget(daemon, path),
            }
        }
        Ok(after.spec)
    }

    fn go_on(&mut self, daemon: &Daemon, path: &Path, mut record: Record) -> Result<(), Refusal> {
        record.phase = Phase::Copying;
        record.graph_file = self.known;
        // Which file the map is about was not noted.
        if record.heads.files.is_none() && !record.options.is_mirror {
            noted(remove_file(&Record::map(daemon, path, &record.names)))?;
        }
        record.write(daemon, path)?;
        let (disk, heads) = (&record.names.disk, &record.heads);
        self.said.push(match record.options.is_mirror {
            true => format!("{disk} is {}, and its mirror {} goes on", heads.old_called, heads.new_called),
            false => format!("{disk} is {}, and its move to {} goes on", heads.old_called, heads.new_called),
        });
        self.records.push(record);
        Ok(())
    }

    fn give_up(&mut self, daemon: &Daemon, path: &Path, record: &Record, why: &str) -> Result<(), Refusal> {
        let heads = &record.heads;
        let given_up = if record.options.is_mirror { heads.part() } else { heads.stay() };
        if let Err(error) = given_up {
            tracing::warn!(
                "{}: its head cannot say that it does not move any more: {error}",
                heads.old_called
            );
        }
        record.forget(daemon, path);
        let (disk, old, new) = (&record.names.disk, &heads.old_called, &heads.new_called);
        self.said.push(format!("{disk} is {old}, as before; its move to {new} was given up: {why}"));
        Ok(())
    }

    /// The graph without its moves: it could not be served with them, and the old disks are the disks. From here on no
    /// start goes by their maps, since guests may go on with those alone.
    ///
    /// # Errors
    /// The graph cannot be made, or that not be noted.
    pub(crate) fn alone(
        &mut self,
        daemon: &Daemon,
        path: &Path,
        file: &GraphFile,
    ) -> Result<GraphFile, Refusal> {
        let mut spec = file.spec.clone();
        for record in &self.records {
            spec = record.names.without_mirror(&spec, Side::Old, path)?.0;
        }
        self.note(daemon, path, &Phase::GivingUp)?;
        Ok(file.clone().with(spec))
    }

    /// The old disks alone could not be served either: nothing is given up for that.
    ///
    /// # Errors
    /// It cannot be noted: the next start gives the moves up.
    pub(crate) fn goes_on_later(mut self, daemon: &Daemon, path: &Path) -> Result<(), Refusal> {
        self.note(daemon, path, &Phase::Copying)
    }

    fn note(&mut self, daemon: &Daemon, path: &Path, phase: &Phase) -> Result<(), Refusal> {
        self.records.iter_mut().try_for_each(|record| {
            record.phase = phase.clone();
            record.write(daemon, path)
        })
    }

    /// The old disks alone are served. What cannot be noted now is at the next start.
    pub(crate) fn fell_back(mut self, daemon: &Daemon, path: &Path, spec: &Spec, why: &str) -> Resumed {
        for record in std::mem::take(&mut self.records) {
            self.said.retain(|said| !said.starts_with(&format!("{} is ", record.names.disk)));
            // The graph file has had a mirror since its cut-over.
            let written = if record.options.is_mirror { self.write(path, spec) } else { Ok(()) };
            if let Err(refusal) = written.and_then(|()| self.give_up(daemon, path, &record, why)) {
                tracing::warn!("{}", refusal.message);
            }
        }
        self
    }

    /// The graph without a move that is given up.
    fn take_out(
        &mut self,
        daemon: &Daemon,
        path: &Path,
        record: &Record,
        spec: &Spec,
        why: &str,
    ) -> Result<Spec, Refusal> {
        let spec = record.names.without_mirror(spec, Side::Old, path)?.0;
        match record.options.is_mirror {
            true => self.write_without(daemon, path, &spec)?,
            false => noted(Left::of(daemon.host.state_dir(), path).remember(&spec))?,
        }
        self.give_up(daemon, path, record, why)?;
        Ok(spec)
    }

    /// The graph file has had a mirror since its cut-over. Now it says what is served.
    fn write_without(&mut self, daemon: &Daemon, path: &Path, spec: &Spec) -> Result<(), Refusal> {
        let left = Left::of(daemon.host.state_dir(), path);
        if let Some(edited) = is_edited(path, self.known) {
            self.said.push(format!("{edited}, and still has the mirror in it"));
            return noted(left.remember(spec));
        }
        self.write(path, spec)?;
        noted(left.forget())
    }

    /// Makes the graph file say what is served: a cut-over does that, too.
    fn write(&mut self, path: &Path, spec: &Spec) -> Result<(), Refusal> {
        let text = print(spec, CATALOGUE, path.parent().unwrap_or(Path::new("/")));
        replace_file(path, text.as_bytes()).map_err(|error| {
            let message = format!("{}: the graph file cannot be written: {error}", path.display());
            Refusal::new("unavailable", message)
        })?;
        self.known = Some(Sum::of(text.as_bytes()));
        Ok(())
    }

    /// What heads have to say of the graph: volumes of moves that go on may be on the move.
    pub(crate) fn heads(&self, asked: Heads) -> Heads {
        match asked {
            Heads::Verify => Heads::Moving(self.records.iter().flat_map(|it| it.heads.all()).collect()),
            asked => asked,
        }
    }

    /// True if moves go on.
    pub(crate) fn goes_on(&self) -> bool {
        !self.records.is_empty()
    }

    /// Of a graph that has come from another process, with all its moves.
    pub(crate) fn arrived(daemon: &Daemon, path: &Path, spec: &Spec) -> Result<Resumed, Refusal> {
        let records = Record::read_all(daemon, path)?;
        let records: Vec<_> = records.into_iter().filter(|record| record.names.are_in(spec)).collect();
        let known = records.iter().find_map(|record| record.graph_file);
        Ok(Resumed { records, said: Vec::new(), known })
    }

    /// The graph serves: attends to what goes on, and says what has become of all.
    pub(crate) fn attend(self, served: &Arc<Served>, daemon: &Arc<Daemon>) {
        if self.known.is_some() && served.known().is_some() {
            served.set_known(self.known);
        }
        for record in self.records {
            served.moves.add(Job::start(record, served, daemon));
        }
        for said in self.said {
            tracing::warn!("{}: {said}", served.file);
            let graph = served.live.name();
            let event = blockmason::events::Event::new(blockmason::events::EventKind::Notice, graph, said);
            daemon.host.events().publish(event);
        }
    }
}

fn noted(left: std::io::Result<()>) -> Result<(), Refusal> {
    left.map_err(|error| Refusal::new("unavailable", format!("what is left cannot be noted: {error}")))
}

fn parse(path: &Path, text: String) -> Result<Spec, Refusal> {
    let name = PathBuf::from(format!("{} (amid a move)", path.display()));
    parse_printed(&name, path, text).map_err(|diagnostics| Refusal::graph(&diagnostics))
}
