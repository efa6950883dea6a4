//! Changes of graphs that serve, and what is left of them for the next start.

use super::backing::forget_maps;
use super::daemon::{Daemon, Served};
use super::graph_file::Sum;
use super::refusal::Refusal;
use crate::graphs::CATALOGUE;
use crate::view::{ChangeOptions, ChangeView};
use blockmason::Error;
use blockmason::io::replace_file;
use blockmason::lang::{Edit, Spec, edit, print};
use blockmason::live::{Diff, Heads, Options, Report};
use std::path::Path;
use std::time::Duration;
use tokio::sync::MutexGuard;

/// Why a change ended before its time.
pub(super) enum Stop {
    Failed(Error),
    Refused(Refusal),
    /// Nothing else was wanted.
    DryRun(Box<(Spec, Diff)>),
}

/// How a graph is changed.
pub(super) struct How {
    pub(super) options: Options,
    /// Only says what would change.
    pub(super) dry_run: bool,
    /// Writes the graph as it then runs into its file.
    pub(super) save: bool,
    /// It is part of a move or of a backup.
    pub(super) moves: bool,
}

impl How {
    /// As somebody has asked for it.
    pub(super) fn asked(asked: &ChangeOptions) -> How {
        let options = Options {
            deadline: asked.deadline_seconds.map_or(Options::default().deadline, seconds),
            disconnect: asked.disconnect,
            heads: match (asked.sign, asked.force) {
                (true, _) => Heads::Sign,
                (_, true) => Heads::Ignore,
                _ => Heads::Verify,
            },
            ..Options::default()
        };
        How { options, dry_run: asked.dry_run, save: asked.save, moves: false }
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Failed(error)
    }
}

impl Served {
    /// Replaces the graph.
    pub(crate) async fn reload(
        &self,
        daemon: &Daemon,
        next: Spec,
        options: &ChangeOptions,
    ) -> Result<ChangeView, Refusal> {
        let saving = self.saving.lock().await;
        if self.trial().is_some() {
            return Err(self.on_trial());
        }
        let source = next
            .sources
            .get(0)
            .filter(|source| source.opened().canonicalize().is_ok_and(|it| it == self.path));
        let read = source.map(|source| Sum::of(source.text().as_bytes()));
        let view = self.change(&saving, daemon, |_| Ok(next), How::asked(options)).await?;
        // What is written anew with --save is known already.
        if let Some(read) = read.filter(|_| view.done && !options.save && self.known().is_some()) {
            self.set_known(Some(read));
        }
        Ok(view)
    }

    /// Replaces the graph as a step of a move or a backup.
    pub(super) async fn change_to(
        &self,
        saving: &MutexGuard<'_, ()>,
        daemon: &Daemon,
        next: Spec,
        heads: Heads,
    ) -> Result<ChangeView, Refusal> {
        let options = Options { heads, ..Options::default() };
        let how = How { options, dry_run: false, save: false, moves: true };
        self.change(saving, daemon, |_| Ok(next), how).await
    }

    /// Makes single edits. Relative paths in them start in `folder`.
    pub(crate) async fn edit(
        &self,
        daemon: &Daemon,
        edits: &[Edit],
        folder: &Path,
        options: &ChangeOptions,
    ) -> Result<ChangeView, Refusal> {
        let name = format!("{} (edited)", self.live.name());
        let make = |spec: &Spec| {
            let edited = edit(spec, edits, &name, folder, CATALOGUE);
            edited.map_err(|diagnostics| Stop::Refused(Refusal::graph(&diagnostics)))
        };
        let saving = self.saving.lock().await;
        if self.trial().is_some() {
            return Err(self.on_trial());
        }
        self.change(&saving, daemon, make, How::asked(options)).await
    }

    /// Makes a change for whoever holds `saving`.
    pub(super) async fn change(
        &self,
        _saving: &MutexGuard<'_, ()>,
        daemon: &Daemon,
        make: impl FnOnce(&Spec) -> Result<Spec, Stop>,
        how: How,
    ) -> Result<ChangeView, Refusal> {
        let file = daemon.reader.read(&self.path).ok().map(|file| file.spec);
        let How { mut options, dry_run, save, moves } = how;
        if !moves {
            self.not_backing_up()?;
        }
        if save && !moves {
            self.not_moving()?;
        }
        if options.heads == Heads::Verify {
            options.heads = Heads::Moving(self.moves.heads());
        }
        let make = |running: &Spec| {
            let next = make(running)?;
            if !moves {
                self.keeps_moves(running, &next)?;
            }
            Ok(next)
        };
        let mut next_spec = None;
        let before = |next: &Spec, diff: &Diff| {
            if dry_run {
                return Err(Stop::DryRun(Box::new((next.clone(), diff.clone()))));
            }
            next_spec = Some(next.clone());
            // Before it takes effect: whatever happens, the next start knows. What another change has noted
            // is forgotten only afterwards: until then its graph serves.
            let noted = if differs(file.as_ref(), next) { self.left.remember(next) } else { Ok(()) };
            noted.map_err(|error| Stop::Refused(not_kept(&error)))
        };
        let changed = self.live.reload_with(&options, make, before).await;
        let report = match changed {
            Ok(report) => report,
            Err(Stop::DryRun(dry)) => return Ok(self.view_of(None, &dry.1, &dry.0, file.as_ref())),
            Err(stop) => {
                self.remember(file.as_ref(), &self.live.spec())?;
                return Err(match stop {
                    Stop::Refused(refusal) => refusal,
                    Stop::Failed(error) => {
                        Refusal::in_graph(&error, &next_spec.unwrap_or_else(|| (*self.live.spec()).clone()))
                    }
                    Stop::DryRun(_) => Refusal::new("internal", "a dry run failed"),
                });
            }
        };
        let running = self.live.spec();
        if !moves && let Err(refusal) = forget_maps(daemon, &self.path, &running) {
            tracing::warn!("{}: {}", self.path.display(), refusal.message);
        }
        if save {
            self.write_file(&running)?;
            return Ok(self.view_of(Some(&report), &report.diff, &running, Some(&running)));
        }
        // A cut-over has written it.
        let file = if moves { daemon.reader.read(&self.path).ok().map(|file| file.spec) } else { file };
        // What differs was noted before. From here on the change is made, and no error may say otherwise.
        if let Err(refusal) = self.remember(file.as_ref(), &running) {
            tracing::warn!("{}: {}", self.path.display(), refusal.message);
        }
        Ok(self.view_of(Some(&report), &report.diff, &running, file.as_ref()))
    }

    /// Notes for the next start where `running` differs from what the file says, and that it does not.
    fn remember(&self, file: Option<&Spec>, running: &Spec) -> Result<(), Refusal> {
        let noted = match differs(file, running) {
            true => self.left.remember(running),
            false => self.left.forget(),
        };
        noted.map_err(|error| not_kept(&error))
    }

    /// After what serves has changed by other ways: a handler that is a parameter was set, a move was taken up.
    pub(super) async fn remember_anew(&self, daemon: &Daemon) -> Result<(), Refusal> {
        let _saving = self.saving.lock().await;
        let file = daemon.reader.read(&self.path).ok().map(|file| file.spec);
        self.remember(file.as_ref(), &self.live.spec())
    }

    /// Replaces the graph file by the graph as it runs.
    pub(crate) async fn save(&self) -> Result<(), Refusal> {
        let _saving = self.saving.lock().await;
        // The file would name overlays that go with the trial.
        if self.trial().is_some() {
            return Err(self.on_trial());
        }
        self.not_moving()?;
        self.not_backing_up()?;
        self.write_file(&self.live.spec())
    }

    pub(super) fn write_file(&self, running: &Spec) -> Result<(), Refusal> {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        let text = print(running, CATALOGUE, folder);
        let cannot = |error: std::io::Error| {
            let what = "the graph runs as asked, and its file cannot be written";
            Refusal::new("unavailable", format!("{}: {what}: {error}", self.path.display()))
        };
        replace_file(&self.path, text.as_bytes()).map_err(cannot)?;
        self.set_known(Some(Sum::of(text.as_bytes())));
        self.left.forget().map_err(cannot)
    }

    fn view_of(&self, report: Option<&Report>, diff: &Diff, spec: &Spec, file: Option<&Spec>) -> ChangeView {
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        ChangeView {
            done: report.is_some(),
            changes: !diff.is_empty(),
            text: diff.to_string(),
            diff: serde_json::to_value(diff).unwrap_or_default(),
            pause_seconds: report.map(|report| report.pause_seconds),
            took_seconds: report.map(|report| report.took_seconds),
            left: report.map_or_else(Vec::new, |report| report.left.clone()),
            differs_from_file: differs(file, spec),
            graph: print(spec, CATALOGUE, folder),
        }
    }
}

fn not_kept(error: &std::io::Error) -> Refusal {
    let sentence = format!("the graph as it runs cannot be kept for the next start: {error}");
    Refusal::new("unavailable", sentence)
}

/// A file that cannot be read says something else.
fn differs(file: Option<&Spec>, running: &Spec) -> bool {
    file.is_none_or(|file| !Diff::between(file, running, CATALOGUE).is_empty())
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
