//! The cut-over: the new disk takes over, behind closed gates. Several disks do so at one instant.

use super::graph::{Names, Plan, Renames, Side};
use super::job::Job;
use super::record::{Options as Asked, Phase, Record};
use crate::control::change::How;
use crate::control::daemon::{Daemon, Served};
use crate::control::graph_file::{Sum, is_edited};
use crate::control::refusal::Refusal;
use crate::graphs::CATALOGUE;
use blockmason::io::Replacement;
use blockmason::lang::{Spec, print};
use blockmason::live::Options;
use blockmason::sched::Commit;
use blockmason::{Error, Kind, rt};
use futures::future::join_all;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Lets new disks take over. Those of all graphs do so at one instant: no request is admitted to any of them before
/// all have. `force` for graph files that somebody has edited.
///
/// # Errors
/// The first graph that could not be changed; disks of it are where they were, and may be tried again.
pub(crate) async fn cut_over(
    daemon: &Arc<Daemon>,
    disks: &[(Arc<Served>, Arc<Job>)],
    deadline: Option<f64>,
    force: bool,
) -> Result<(), Refusal> {
    let mut graphs: BTreeMap<String, (Arc<Served>, Vec<Wanted>)> = BTreeMap::new();
    for (served, job) in disks {
        let name = served.live.name().to_owned();
        let wanted = Wanted { job: job.clone(), is_mirror: job.record().options.is_mirror };
        graphs.entry(name).or_insert_with(|| (served.clone(), Vec::new())).1.push(wanted);
    }
    let how = Asking { meeting: Arc::new(Meeting::of(graphs.len())), deadline, force };
    let cuts = graphs.values().map(|(served, jobs)| cut_graph(served, daemon, jobs, &how));
    join_all(cuts).await.into_iter().collect()
}

/// How a cut-over was asked for.
struct Asking {
    meeting: Arc<Meeting>,
    deadline: Option<f64>,
    force: bool,
}

/// A disk that is to cut over.
struct Wanted {
    job: Arc<Job>,
    /// It is the way back.
    is_mirror: bool,
}

async fn cut_graph(
    served: &Arc<Served>,
    daemon: &Arc<Daemon>,
    wanted: &[Wanted],
    how: &Asking,
) -> Result<(), Refusal> {
    let file = served.file_is_ready(how.force);
    if let Err(refusal) = &file {
        how.meeting.fail();
        wanted.iter().for_each(|wanted| wanted.job.held_up(refusal));
        return file;
    }
    let cut = cut(served, daemon, wanted, how).await;
    if let Err(refusal) = &cut {
        how.meeting.fail();
        wanted.iter().for_each(|wanted| wanted.job.not_cut(refusal));
    }
    cut
}

async fn cut(
    served: &Arc<Served>,
    daemon: &Arc<Daemon>,
    wanted: &[Wanted],
    how: &Asking,
) -> Result<(), Refusal> {
    let saving = served.saving.lock().await;
    for Wanted { job, is_mirror } in wanted {
        job.goes_on()?;
        if job.record().options.is_mirror != *is_mirror {
            return Err(Refusal::invalid(format!("{} has just cut over", job.disk())));
        }
    }
    let jobs: Vec<&Arc<Job>> = wanted.iter().map(|wanted| &wanted.job).collect();
    let (off, called_off) = watch::channel(false);
    jobs.iter().for_each(|job| job.cutting(&off));
    let running = served.live.spec();
    let graph = print(&running, CATALOGUE, Path::new("/"));
    let mut records: Vec<Record> = jobs.iter().map(|job| job.record()).collect();
    for record in &mut records {
        record.phase = Phase::Cutting { graph: graph.clone() };
        record.write(daemon, &served.path)?;
    }
    let after = After::of(daemon, &served.path, &running, &records)?;
    let others = served.moves.active().map(|job| job.record());
    let others: Vec<_> = others.filter(|other| records.iter().all(|it| it.names != other.names)).collect();
    let saved = Record::as_saved(&after.spec, &others, &served.path)?;
    let commit = Committing::new(served, &records, &saved, how.force);
    let options = Options {
        deadline: how.deadline.map_or(Options::default().deadline, Duration::from_secs_f64),
        renames: after.renames,
        commit: Some(commit.clone().behind(&how.meeting)),
        flush_by: Some(records.iter().flat_map(flushed).collect()),
        called_off: Some(called_off),
        ..Options::default()
    };
    let how = How { options, dry_run: false, save: false, moves: true };
    let changed = match commit.blocking(Committing::make_ready).await {
        Ok(()) => served.change(&saving, daemon, |_| Ok(after.spec), how).await,
        Err(error) => Err(Refusal::of(&error)),
    };
    let view = match changed {
        Ok(view) => view,
        Err(refusal) => {
            for record in &mut records {
                record.phase = Phase::Copying;
                record.write(daemon, &served.path)?;
            }
            return Err(refusal);
        }
    };
    let pause = Duration::from_secs_f64(view.pause_seconds.unwrap_or(0.0));
    for ((job, record), mirror) in jobs.iter().zip(&records).zip(after.mirrors) {
        if mirror.is_none() {
            record.forget(daemon, &served.path);
        }
        let trouble = commit.trouble();
        let also = trouble.as_ref().map(|trouble| format!("; {trouble}")).unwrap_or_default();
        job.has_cut(pause, mirror, trouble);
        job.say(served, format!("{} is {} now{also}", job.disk(), record.heads.new_called));
    }
    served.note_file(daemon);
    Ok(())
}

impl Served {
    /// Notes in the records of all moves that go on what the graph file is known to say.
    fn note_file(&self, daemon: &Daemon) {
        for job in self.moves.active() {
            let record = job.revise(|record| record.graph_file = self.known());
            // The disk has moved, and no error may say otherwise. Of a mirror, the record that is there finds it so at
            // the next start, and makes this one.
            if let Err(refusal) = record.write(daemon, &self.path) {
                tracing::warn!("{}", refusal.message);
            }
        }
    }
}

/// By which ports of the copier everything is flushed that has to be durable: the old disk need not be any more,
/// unless it is a mirror from now on, of which the map says that it is clean.
fn flushed(record: &Record) -> Vec<(String, String)> {
    let ports: &[&str] = if record.options.keep_mirror { &["to", "from"] } else { &["to"] };
    ports.iter().map(|port| (record.names.copy.clone(), (*port).to_owned())).collect()
}

/// The graph after the cut-over.
pub(super) struct After {
    pub(super) spec: Spec,
    renames: Renames,
    /// Of each move, what keeps its old disk as a mirror.
    pub(super) mirrors: Vec<Option<Record>>,
}

impl After {
    /// Of a graph in which all of these moves go on.
    pub(super) fn of(
        daemon: &Daemon,
        file: &Path,
        running: &Spec,
        moves: &[Record],
    ) -> Result<After, Refusal> {
        let mut after = After { spec: running.clone(), renames: Renames::new(), mirrors: Vec::new() };
        for record in moves {
            let (spec, renames, mirror) = match record.options.keep_mirror {
                false => {
                    let (spec, renames) = record.names.without_mirror(&after.spec, Side::New, file)?;
                    (spec, renames, None)
                }
                true => after.reversed(daemon, file, record)?,
            };
            after.spec = spec;
            after.renames.extend(renames);
            after.mirrors.push(mirror);
        }
        Ok(after)
    }

    fn reversed(
        &self,
        daemon: &Daemon,
        file: &Path,
        record: &Record,
    ) -> Result<(Spec, Renames, Option<Record>), Refusal> {
        let map = Record::map(daemon, file, &Names::of(&record.names.disk, true));
        let plan = Plan { map: &map, clean: true, copy: "" };
        let (spec, names, renames) = record.names.reversed(&self.spec, &plan, file)?;
        let options = Asked {
            manual: true,
            is_mirror: true,
            keep_mirror: false,
            verify: false,
            ..record.options.clone()
        };
        let to = record.heads.old_called.clone();
        Ok((spec, renames, Some(Record::new(names, to, record.heads.reversed(), options))))
    }
}

/// What makes the cut-over one that cannot be taken back.
#[derive(Clone)]
struct Committing {
    served: Arc<Served>,
    records: Arc<Vec<Record>>,
    /// The graph file may be overwritten whoever has edited it.
    force: bool,
    /// What the graph file says from now on.
    text: Arc<str>,
    /// The same, ready to be put into place; none where there is no graph file.
    file: Arc<Mutex<Option<Replacement>>>,
    /// Why it is not in place.
    trouble: Arc<Mutex<Option<String>>>,
}

impl Committing {
    fn new(served: &Arc<Served>, records: &[Record], saved: &Spec, force: bool) -> Committing {
        let folder = served.path.parent().unwrap_or(Path::new("/"));
        Committing {
            served: served.clone(),
            records: Arc::new(records.to_vec()),
            force,
            text: print(saved, CATALOGUE, folder).into(),
            file: Arc::default(),
            trouble: Arc::default(),
        }
    }

    /// Does what asks file systems, where waiting harms nobody.
    async fn blocking(
        &self,
        what: impl FnOnce(&Committing) -> Result<(), Error> + Send + 'static,
    ) -> Result<(), Error> {
        let own = self.clone();
        let done = rt::blocking(move || what(&own)).await;
        done.unwrap_or_else(|| Err(Error::internal("the cut-over panicked")))
    }

    /// Does what can be done while guests go on.
    fn make_ready(&self) -> Result<(), Error> {
        self.is_in_place()?;
        if self.served.known().is_some() {
            let file = Replacement::prepare(&self.served.path, self.text.as_bytes()).map_err(|error| {
                Error::io(error, "the graph file could not be written anew").with_path(&self.served.path)
            })?;
            *self.file.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
        }
        Ok(())
    }

    /// Whether names lead to the images, and the graph file is the one that is known.
    fn is_in_place(&self) -> Result<(), Error> {
        for record in self.records.iter() {
            self.served.are_in_place(record).map_err(|error| {
                Error::new(Kind::Unavailable, format!("{} stays where it is: {error}", record.names.disk))
            })?;
        }
        match is_edited(&self.served.path, self.served.known()).filter(|_| !self.force) {
            Some(edited) => Err(Error::new(Kind::Busy, edited)),
            None => Ok(()),
        }
    }

    fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Done once the gates of all graphs are closed and nothing is in flight in any; returns when all have done it.
    fn behind(self, meeting: &Arc<Meeting>) -> Commit {
        let (all, meeting) = (Arc::new(self), meeting.clone());
        Arc::new(move || {
            let (all, meeting) = (all.clone(), meeting.clone());
            Box::pin(async move {
                all.are_same()?;
                all.blocking(Committing::is_in_place).await?;
                meeting.arrive(0).await?;
                all.blocking(Committing::commit).await?;
                // It is done here, whatever comes of the others.
                let _ = meeting.arrive(1).await;
                Ok(())
            })
        })
    }

    /// What was on its way when the gate closed may have failed on the new disk.
    fn are_same(&self) -> Result<(), Error> {
        for record in self.records.iter() {
            let remaining = self.served.live.get(&record.names.copy, "remaining")?;
            if remaining != "0" {
                let message = format!(
                    "the new disk still lacks {remaining} bytes: something has failed there just now"
                );
                return Err(Error::new(Kind::Busy, message));
            }
        }
        Ok(())
    }

    fn commit(&self) -> Result<(), Error> {
        for (ix, record) in self.records.iter().enumerate() {
            let Err(error) = record.heads.cut(record.options.keep_mirror) else { continue };
            if self.records[..ix].iter().all(|record| record.heads.take_back().is_ok()) {
                return Err(error);
            }
            // Some are the disk and say so. This one is, too, and its head says no such thing: whoever starts
            // it anew is refused either side and has to say which one is meant.
            tracing::error!("{}: its head cannot say that it is the disk: {error}", record.heads.new_called);
        }
        // The new disks are the disks, durably. What else says so is written at once, since guests wait.
        std::thread::scope(|scope| {
            for record in self.records.iter() {
                scope.spawn(|| {
                    if let Err(error) = record.heads.finish_cut(record.options.keep_mirror) {
                        tracing::warn!("the old disk's head cannot say yet that it has moved: {error}");
                    }
                });
            }
            self.save();
        });
        Ok(())
    }

    /// Makes the graph file say what is served.
    fn save(&self) {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(file) = file else { return };
        let path = &self.served.path;
        if let Err(error) = file.put() {
            let graph = self.served.live.name();
            let trouble = format!(
                "{} could not be written anew and names the old disk: {error}: once that is mended, `mason save {graph}`",
                path.display()
            );
            tracing::error!("{trouble}");
            *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(trouble);
            return;
        }
        self.served.set_known(Some(Sum::of(self.text.as_bytes())));
    }
}

/// Where the changes of several graphs wait for each other, twice.
struct Meeting {
    all: usize,
    here: Mutex<[usize; 2]>,
    changed: watch::Sender<bool>,
}

impl Meeting {
    fn of(all: usize) -> Meeting {
        Meeting { all, here: Mutex::default(), changed: watch::channel(false).0 }
    }

    /// One does not come: nobody waits for it.
    fn fail(&self) {
        self.changed.send_replace(true);
    }

    async fn arrive(&self, round: usize) -> Result<(), Error> {
        let here = |count: usize| {
            let mut here = self.here.lock().unwrap_or_else(PoisonError::into_inner);
            here[round] += count;
            here[round] == self.all
        };
        let mut changed = self.changed.subscribe();
        if here(1) {
            self.changed.send_modify(|_| ());
            return Ok(());
        }
        let met = changed.wait_for(|failed| *failed || here(0)).await;
        match met.is_ok_and(|failed| !*failed || here(0)) {
            true => Ok(()),
            false => Err(Error::new(Kind::Busy, "another disk that was to cut over with it could not")),
        }
    }
}
