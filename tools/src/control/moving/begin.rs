//! How a move begins.

use super::graph::{Names, Plan, Target};
use super::job::Job;
use super::record::{Heads, Options, Record};
use crate::control::daemon::{Daemon, Served};
use crate::control::refusal::Refusal;
use crate::graphs::CATALOGUE;
use crate::view::{MoveRequest, MoveView};
use blockmason::describe::{Family, Survives, find};
use blockmason::graph::Graph;
use blockmason::graph::build::{Builder, connections};
use blockmason::heads::{self, Standing, Volume};
use blockmason::lang::{ElementSpec, Spec};
use blockmason::live::{self, Fate};
use blockmason::{Error, rt};
use blockmason_elements::nbd::uri::{Address, Uri};
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

/// How long the new disk may fail if nothing else is said, in seconds.
const PATIENCE: f64 = 30.0;

/// Both sides, from a graph that is built and not open.
struct Sides {
    old: Vec<Volume>,
    new: Vec<Volume>,
    /// Other volumes of the graph as it runs.
    others: Vec<Volume>,
    /// What the new side is called where it keeps nothing.
    fleeting: Option<&'static str>,
    /// Bytes of both disks.
    sizes: [u64; 2],
}

impl Served {
    /// Puts a mirror in the place of a disk, and begins to copy.
    ///
    /// # Errors
    /// The disk cannot move there. Nothing has changed, but for an empty file that may have been made.
    pub(crate) async fn begin_move(
        self: &Arc<Self>,
        daemon: &Arc<Daemon>,
        request: &MoveRequest,
    ) -> Result<MoveView, Refusal> {
        let saving = self.saving.lock().await;
        if self.trial().is_some() {
            return Err(self.on_trial());
        }
        self.not_backing_up()?;
        // What is written there late must not overwrite what a next move writes.
        let left = self.live.disk().has_left_behind().await.map_err(|error| Refusal::of(&error))?;
        if left {
            let message = "the new disk of a move that was given up has not answered all that it was asked: try again \
                           when it has, or after a restart";
            return Err(Refusal::busy(message.to_owned()));
        }
        let disk = &request.element;
        if let Some(job) = self.moves.active().find(|job| job.names().has(disk)) {
            return Err(Refusal::busy(self.on_the_move(&job)));
        }
        let running = self.live.spec();
        let place = running.find(disk).ok_or_else(|| {
            Refusal::not_found(format!("there is no element {disk} in {}", self.live.name()))
        })?;
        if running.edges.iter().all(|edge| edge.to != place) {
            return Err(Refusal::invalid(format!("{disk} is where requests enter, and no disk")));
        }
        let target = Target::new(&request.to);
        if let Some(better) = target.should_be() {
            let message =
                format!("{}: --to takes a type and its parameters: --to {better}", request.to.trim());
            return Err(Refusal::invalid(message));
        }
        let names = Names { new: target.top(&Names::of(disk, false).new), ..Names::of(disk, false) };
        let map = Record::map(daemon, &self.path, &names);
        let copy = copier(request);
        let plan = Plan { map: &map, clean: false, copy: &copy };
        let mut next = names.with_mirror(&running, &target, &plan, &request.folder)?;
        not_itself(&running, &next, &names.new)?;
        self.size_of_new(&mut next, &names.disk, &names.new);
        make_folder(&Record::folder(daemon, &self.path, disk))?;
        let sides = match self.survey(daemon, &next, &names.disk, &names.new).await {
            Ok(sides) => sides.check(&names, request).map(|()| sides),
            Err(error) => Err(Refusal::in_graph(&error, &next)),
        };
        let sides = sides.inspect_err(|_| Record::clear(daemon, &self.path, disk))?;
        let mut record = Record::new(names, request.to.trim().to_owned(), sides.heads(), options(request));
        record.graph_file = self.known();
        let moving = [self.moves.heads(), record.heads.all()].concat();
        let stand = || sides.stand(&record.heads).map_err(|error| Refusal::of(&error));
        let begun = match record.write(daemon, &self.path).and_then(|()| stand()) {
            Ok(()) => self.change_to(&saving, daemon, next, live::Heads::Moving(moving)).await,
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = begun {
            sides.restore();
            record.forget(daemon, &self.path);
            return Err(refusal);
        }
        let job = Job::start(record, self, daemon);
        self.moves.add(job.clone());
        job.say(self, format!("{} is on its way to {}", job.disk(), job.to()));
        Ok(job.view(self))
    }

    /// A file that is not there yet becomes as large as the disk.
    pub(in crate::control) fn size_of_new(&self, next: &mut Spec, disk: &str, new: &str) {
        let graph = self.live.disk().graph();
        let Some(size) = graph.node(disk).map(|node| graph.geometry(node).size) else { return };
        let Some(ix) = next.find(new).filter(|ix| next.elements[*ix].ty == "file") else { return };
        let params = &mut next.elements[ix].params;
        let path = params.get("path").and_then(|values| values.first());
        let missing = path.is_some_and(|path| !path.folder().join(path.text()).exists());
        if missing && params.get("size").is_none() {
            params.set("size", &blockmason::lang::value::Size(size).to_string());
        }
    }

    /// Both sides of the graph as it would be.
    async fn survey(&self, daemon: &Daemon, next: &Spec, disk: &str, new: &str) -> Result<Sides, Error> {
        let (running, now) = (self.live.disk().graph(), self.live.spec());
        let (disk, new) = (disk.to_owned(), new.to_owned());
        let look = move |next: &Spec, built: &Graph| Sides::of(next, built, (&disk, &new), &now, &running);
        self.built(daemon, next, look).await
    }

    /// Builds the graph once as it would be, and looks at it: what is wrong with it shows now.
    pub(in crate::control) async fn built<T: Send + 'static>(
        &self,
        daemon: &Daemon,
        next: &Spec,
        look: impl FnOnce(&Spec, &Graph) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let running = self.live.disk().graph();
        let diff = self.live.diff(next);
        let stays = |name: &str| matches!(diff.fate(name), Some(Fate::Kept | Fate::Set));
        let kept = running.instances().filter(|instance| stays(&instance.name));
        let kept: HashMap<_, _> = kept.map(|it| (it.name.clone(), it.clone())).collect();
        let (state_dir, shards) = (daemon.host.state_dir().to_owned(), daemon.host.shards());
        let (name, next) = (self.live.name().to_owned(), next.clone());
        let build = move || {
            let builder = Builder { catalogue: CATALOGUE, name: &name, state_dir: &state_dir, shards };
            let built = builder.assemble(&builder.instances(&next, &kept)?, &connections(&next))?;
            look(&next, &built)
        };
        rt::blocking(build).await.unwrap_or_else(|| Err(Error::internal("an element panicked")))
    }
}

impl Sides {
    /// Of the next graph; what else there is, from the one that runs: the new disk must be none of it.
    fn of(
        next: &Spec,
        graph: &Graph,
        (disk, new): (&str, &str),
        now: &Spec,
        running: &Graph,
    ) -> Result<Sides, Error> {
        let fleeting = fleeting(next, new);
        let size = |name: &str| graph.node(name).map_or(0, |node| graph.geometry(node).size);
        let sizes = [size(disk), size(new)];
        let old = heads::below(next, graph, disk)?;
        let new = heads::below(next, graph, new)?;
        let all = heads::survey(&[(now, running)], heads::Names::Keep)?;
        let is = |one: &Volume, other: &Volume| one.at.path == other.at.path;
        let others = all.into_iter().filter(|volume| !old.iter().any(|one| is(one, volume)));
        let others = others.collect();
        Ok(Sides { old, new, others, fleeting, sizes })
    }

    /// Whether the disk may move there.
    fn check(&self, names: &Names, request: &MoveRequest) -> Result<(), Refusal> {
        self.check_new(request.force)?;
        let [old, new] = self.sizes;
        if request.keep_mirror && new > old {
            let message = format!(
                "{} has {old} bytes and what it moves to {new}: it could not be its mirror afterwards, which is as large",
                names.disk
            );
            return Err(Refusal::invalid(message));
        }
        if let Some(what) = self.fleeting.filter(|_| !request.force) {
            let message = format!("{}: the disk would move to {what}: --force does so", names.new);
            return Err(Refusal::invalid(message));
        }
        let neighbours = self.old.iter().any(Volume::has_neighbours);
        if neighbours && (self.old.len(), self.new.len()) != (1, 1) {
            let message = format!(
                "{} is a part of a larger disk, and its volumes and those that it moves to are not one each: \
                 move them one by one",
                names.disk
            );
            return Err(Refusal::new("unsupported", message));
        }
        Ok(())
    }

    /// Whether the new side may be overwritten.
    fn check_new(&self, force: bool) -> Result<(), Refusal> {
        for new in &self.new {
            if let Some(old) = self.old.iter().find(|old| same(old, new)) {
                let message = format!("{}: it is the disk {} itself", new.called(), old.element);
                return Err(Refusal::invalid(message));
            }
            if let Some(other) = self.others.iter().find(|other| same(other, new)) {
                let message = format!("{}: it is {} of this graph", new.called(), other.element);
                return Err(Refusal::busy(message));
            }
            if new.at.read_only {
                return Err(Refusal::new("denied", format!("{}: it is read-only", new.called())));
            }
            let leftover = matches!(new.standing(), Standing::Filling(_) | Standing::Moved(_));
            if new.found.is_some() && !leftover && !force {
                let message = format!(
                    "{}: its head says that it is a volume that somebody uses: --force overwrites it",
                    new.called()
                );
                return Err(Refusal::busy(message));
            }
        }
        Ok(())
    }

    fn heads(&self) -> Heads {
        let paths = |volumes: &[Volume]| volumes.iter().map(|volume| volume.at.path.clone()).collect();
        let called = |volumes: &[Volume], otherwise: &str| {
            let names: Vec<_> = volumes.iter().map(Volume::called).collect();
            if names.is_empty() { otherwise.to_owned() } else { names.join(", ") }
        };
        Heads {
            generation: self.old.iter().map(Volume::generation).max().unwrap_or(0),
            old: paths(&self.old),
            new: paths(&self.new),
            old_called: called(&self.old, "memory"),
            new_called: called(&self.new, self.fleeting.unwrap_or("memory")),
            files: None,
        }
    }

    /// Writes down that the one is filled and the other is on its way, the first one first: until then it is
    /// nothing.
    fn stand(&self, heads: &Heads) -> Result<(), Error> {
        // The volume keeps its name where one moves to one, so that its neighbours know it again.
        let name = match (&self.old[..], &self.new[..]) {
            ([old], [_]) => old.name(),
            _ => None,
        };
        for new in &self.new {
            new.stand(name, heads.generation, Standing::Filling(heads.old_called.clone()))?;
        }
        for old in &self.old {
            old.stand(None, heads.generation, Standing::Moving(heads.new_called.clone()))?;
        }
        Ok(())
    }

    /// Puts all heads back.
    fn restore(&self) {
        for volume in self.old.iter().chain(&self.new) {
            if let Err(error) = volume.restore() {
                tracing::warn!("{}: its head cannot be put back: {error}", volume.called());
            }
        }
    }
}

/// An element and all that it leads to.
fn reached<'a>(spec: &'a Spec, element: &str) -> impl Iterator<Item = &'a ElementSpec> {
    spec.find(element).into_iter().flat_map(|ix| spec.reached(ix)).map(|ix| &spec.elements[ix])
}

/// What a disk is called that keeps nothing, if one of those below an element is such a one.
fn fleeting(spec: &Spec, element: &str) -> Option<&'static str> {
    let types = reached(spec, element).filter_map(|element| find(CATALOGUE, &element.ty));
    let mut sinks = types.filter(|ty| ty.family == Family::Sink && ty.survives == Survives::Nothing);
    Some(match sinks.next()?.name {
        "null" => "null, which forgets everything at once",
        _ => "memory",
    })
}

/// The unix sockets that an element names by a parameter.
fn sockets(element: &ElementSpec, parameter: &str) -> Vec<(u64, u64)> {
    let values = element.params.get(parameter).into_iter().flatten();
    let paths = values.filter_map(|value| {
        let text = value.text();
        let path = match text.parse::<Uri>().map(|uri| uri.address) {
            Ok(Address::Unix(path)) => path,
            Ok(Address::Tcp { .. }) => return None,
            Err(_) => text.strip_prefix("unix:")?.into(),
        };
        let meta = value.folder().join(path).metadata().ok()?;
        Some((meta.dev(), meta.ino()))
    });
    paths.collect()
}

/// # Errors
/// The new side is an export of the graph itself: what is written there would come back here, and wait for itself.
fn not_itself(running: &Spec, next: &Spec, new: &str) -> Result<(), Refusal> {
    let there: Vec<_> = reached(next, new).flat_map(|element| sockets(element, "uri")).collect();
    let is_there = |own: &&ElementSpec| sockets(own, "listen").iter().any(|socket| there.contains(socket));
    match running.elements.iter().find(is_there) {
        None => Ok(()),
        Some(own) => {
            let message = format!("{new}: {} of this graph serves it: it would wait for itself", own.name);
            Err(Refusal::invalid(message))
        }
    }
}

/// True if two volumes are one, by whatever names.
pub(in crate::control) fn same(one: &Volume, other: &Volume) -> bool {
    let file = |volume: &Volume| {
        let meta = Path::new(&volume.called()).metadata().ok()?;
        Some((meta.dev(), meta.ino(), meta.rdev()))
    };
    one.at.path == other.at.path || file(one).is_some_and(|one| Some(one) == file(other))
}

/// The parameters of the copier.
fn copier(request: &MoveRequest) -> String {
    let parameter = |name: &str, value: &Option<String>| {
        value.as_ref().map(|value| format!("({name} {value}) ")).unwrap_or_default()
    };
    parameter("rate", &request.rate) + &parameter("busy_rate", &request.busy_rate)
}

fn options(request: &MoveRequest) -> Options {
    Options {
        verify: request.verify,
        manual: request.manual,
        keep_mirror: request.keep_mirror,
        is_mirror: false,
        patience_seconds: request.patience_seconds.unwrap_or(PATIENCE),
    }
}

fn make_folder(path: &Path) -> Result<(), Refusal> {
    std::fs::create_dir_all(path).map_err(|error| {
        Refusal::new("unavailable", format!("{}: the folder cannot be made: {error}", path.display()))
    })
}
