//! The cut-over: the new disk takes over, behind closed gates. Several disks do so at one instant.

use super::graph::{Names, Plan, Renames, Side};
use super::job::Job;
use super::record::{Options as Asked, Phase, Record};
use crate::control::change::How;
use crate::control::daemon::{Daemon, Served};
use crate::control::refusal::Refusal;
use crate::graphs::CATALOGUE;
use crate::left::Left;
use blockmason::lang::{Spec, print};
use blockmason::live::Options;
use blockmason::sched::Commit;
use blockmason::{Error, Kind, rt};
use futures::future::join_all;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Lets new disks take over. Those of all graphs do so at one instant: no request is admitted to any of them before
/// all have.
///
/// # Errors
/// The first graph that could not be changed; disks of it are where they were, and may be tried again.
pub(crate) async fn cut_over(
    daemon: &Arc<Daemon>,
    disks: &[(Arc<Served>, Arc<Job>)],
    deadline: Option<f64>,
) -> Result<(), Refusal> {
    let mut graphs: BTreeMap<String, (Arc<Served>, Vec<Wanted>)> = BTreeMap::new();
    for (served, job) in disks {
        let name = served.live.name().to_owned();
        let wanted = Wanted { job: job.clone(), is_mirror: job.record().options.is_mirror };
        graphs.entry(name).or_insert_with(|| (served.clone(), Vec::new())).1.push(wanted);
    }
    let meeting = Arc::new(Meeting::of(graphs.len()));
    let cuts = graphs.values().map(|(served, jobs)| cut_graph(served, daemon, jobs, &meeting, deadline));
    join_all(cuts).await.into_iter().collect()
}

/// A cut-over as it was asked for.
struct Wanted {
    job: Arc<Job>,
    /// It is the way back.
    is_mirror: bool,
}

async fn cut_graph(
    served: &Arc<Served>,
    daemon: &Arc<Daemon>,
    wanted: &[Wanted],
    meeting: &Arc<Meeting>,
    deadline: Option<f64>,
) -> Result<(), Refusal> {
    let cut = cut(served, daemon, wanted, meeting, deadline).await;
    if let Err(refusal) = &cut {
        meeting.fail();
        wanted.iter().for_each(|wanted| wanted.job.not_cut(refusal));
    }
    cut
}

async fn cut(
    served: &Arc<Served>,
    daemon: &Arc<Daemon>,
    wanted: &[Wanted],
    meeting: &Arc<Meeting>,
    deadline: Option<f64>,
) -> Result<(), Refusal> {
    let saving = served.saving.lock().await;
    for Wanted { job, is_mirror } in wanted {
        job.goes_on()?;
        if job.record().options.is_mirror != *is_mirror {
            return Err(Refusal::invalid(format!("{} has just cut over", job.disk())));
        }
    }
    let jobs: Vec<&Arc<Job>> = wanted.iter().map(|wanted| &wanted.job).collect();
    jobs.iter().for_each(|job| job.cutting());
    let running = served.live.spec();
    let graph = print(&running, CATALOGUE, Path::new("/"));
    let mut records: Vec<Record> = jobs.iter().map(|job| job.record()).collect();
    for record in &mut records {
        record.phase = Phase::Cutting { graph: graph.clone() };
        record.write(daemon, &served.path)?;
    }
    let after = After::of(daemon, &served.path, &running, &records)?;
    let commit = Committing {
        served: served.clone(),
        copiers: records.iter().map(|record| record.names.copy.clone()).collect(),
        heads: records.iter().map(|record| (record.heads.clone(), record.options.keep_mirror)).collect(),
        file: served.path.clone(),
        state: daemon.host.state_dir().to_owned(),
        text: print(&after.spec, CATALOGUE, served.path.parent().unwrap_or(Path::new("/"))),
    };
    let options = Options {
        deadline: deadline.map_or(Options::default().deadline, Duration::from_secs_f64),
        renames: after.renames.clone(),
        commit: Some(commit.behind(meeting)),
        flush_by: Some(records.iter().flat_map(flushed).collect()),
        ..Options::default()
    };
    let how = How { options, dry_run: false, save: false, moves: true };
    let changed = served.change(&saving, daemon, |_| Ok(after.spec), how).await;
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
        match &mirror {
            Some(mirror) => {
                // The disk has moved, and no error may say otherwise. The record that is there finds it so at the next
                // start, and makes this one.
                if let Err(refusal) = mirror.write(daemon, &served.path) {
                    tracing::warn!("{}", refusal.message);
                }
            }
            None => record.forget(daemon, &served.path),
        }
        job.has_cut(pause, mirror);
        job.say(served, format!("{} is {} now", job.disk(), record.heads.new_called));
    }
    Ok(())
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
    /// The elements that say what the new disks lack.
    copiers: Vec<String>,
    heads: Vec<(super::record::Heads, bool)>,
    file: PathBuf,
    state: PathBuf,
    /// What the graph file says from now on.
    text: String,
}

impl Committing {
    /// Done once the gates of all graphs are closed and nothing is in flight in any; returns when all have done it.
    fn behind(self, meeting: &Arc<Meeting>) -> Commit {
        let (all, meeting) = (Arc::new(self), meeting.clone());
        Arc::new(move || {
            let (all, meeting) = (all.clone(), meeting.clone());
            Box::pin(async move {
                all.are_same()?;
                meeting.arrive(0).await?;
                let done = rt::blocking(move || all.commit()).await;
                done.unwrap_or_else(|| Err(Error::internal("the cut-over panicked")))?;
                // It is done here, whatever comes of the others.
                let _ = meeting.arrive(1).await;
                Ok(())
            })
        })
    }

    /// What was on its way when the gate closed may have failed on the new disk.
    fn are_same(&self) -> Result<(), Error> {
        for copier in &self.copiers {
            let remaining = self.served.live.get(copier, "remaining")?;
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
        for (ix, (heads, keep_mirror)) in self.heads.iter().enumerate() {
            let Err(error) = heads.cut(*keep_mirror) else { continue };
            if self.heads[..ix].iter().all(|(heads, _)| heads.take_back().is_ok()) {
                return Err(error);
            }
            // Some are the disk and say so. This one is, too, and its head says no such thing: whoever starts
            // it anew is refused either side and has to say which one is meant.
            tracing::error!("{}: its head cannot say that it is the disk: {error}", heads.new_called);
        }
        // The new disks are the disks, durably. What else says so is written at once, since guests wait.
        std::thread::scope(|scope| {
            for (heads, keep_mirror) in &self.heads {
                scope.spawn(|| {
                    if let Err(error) = heads.finish_cut(*keep_mirror) {
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
        let saved = blockmason::io::replace_file(&self.file, self.text.as_bytes());
        if let Err(error) = saved.and_then(|()| Left::of(&self.state, &self.file).forget()) {
            tracing::warn!("{}: the graph file cannot be written: {error}", self.file.display());
        }
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
