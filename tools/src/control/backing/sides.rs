//! The volumes of a backup, and what their heads say: of whose changes account is kept, and which backup the target holds.

use super::account::Account;
use super::graph::Names;
use super::record::Record;
use crate::control::daemon::{Daemon, Served};
use crate::control::moving::same;
use crate::control::refusal::Refusal;
use crate::marks;
use blockmason::Error;
use blockmason::graph::Graph;
use blockmason::heads::{self, Backup, Head, Standing, Volume};
use blockmason::lang::Spec;
use blockmason_elements::nbd::uri::{Address, Uri};
use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Both sides, from a graph that is built and not open.
pub(super) struct Sides {
    disk: Vec<Volume>,
    target: Vec<Volume>,
    /// Those of the target that are written.
    written: Vec<Volume>,
    /// Other volumes of the graph as it runs.
    others: Vec<Volume>,
    /// What the target holds.
    held: Result<Option<Backup>, String>,
}

impl Served {
    /// Both sides of the graph of a backup.
    pub(super) async fn sides(
        &self,
        daemon: &Daemon,
        next: &Spec,
        names: &Names,
        incremental: bool,
    ) -> Result<Sides, Refusal> {
        let (running, now, owned) = (self.live.disk().graph(), self.live.spec(), names.clone());
        let keep = if incremental { heads::Names::Keep } else { heads::Names::Overwrite };
        let look = move |next: &Spec, built: &Graph| {
            // As it is served: the `cow` above it is none of its layout.
            let disk = heads::below(&now, &running, &owned.disk)?;
            let target = heads::alone(next, built, &owned.to, keep)?;
            let written = marks::written(next, &owned.to);
            let is_written = |volume: &Volume| written.contains(&volume.element);
            let written =
                heads::alone(next, built, &owned.to, keep)?.into_iter().filter(is_written).collect();
            let all = heads::survey(&[(&now, &running)], heads::Names::Keep)?;
            let is = |one: &Volume, other: &Volume| one.at.path == other.at.path;
            let others = all.into_iter().filter(|volume| !disk.iter().any(|one| is(one, volume))).collect();
            let held = marks::held(next, built, &target, &owned.to);
            Ok(Sides { disk, target, written, others, held })
        };
        let sides: Result<Sides, Error> = self.built(daemon, next, look).await;
        let sides = sides.map_err(|error| names.in_words(Refusal::in_graph(&error, next)))?;
        self.leads_back(&sides.target, names).map(|()| sides)
    }

    /// # Errors
    /// The target is the disk itself, by way of an export of this graph.
    fn leads_back(&self, target: &[Volume], names: &Names) -> Result<(), Refusal> {
        let running = self.live.spec();
        for (export, uri) in self.live.exports() {
            let Ok(uri) = uri.parse::<Uri>() else { continue };
            let same = |volume: &&Volume| {
                let client = volume.at.called.parse::<Uri>();
                client.is_ok_and(|client| {
                    client.export == uri.export && one_server(&client.address, &uri.address)
                })
            };
            if let Some(volume) = target.iter().find(same)
                && reaches(&running, &export, &names.disk)
            {
                let message =
                    format!("{}: it is the disk {} itself, by way of {export}", volume.called(), names.disk);
                return Err(Refusal::invalid(message));
            }
        }
        Ok(())
    }
}

impl Sides {
    /// Whether the target may be written.
    pub(super) fn may_write(&self, force: bool) -> Result<(), Refusal> {
        for new in &self.target {
            let called = new.called();
            if let Some(old) = self.disk.iter().find(|old| same(old, new)) {
                return Err(Refusal::invalid(format!("{called}: it is the disk {} itself", old.element)));
            }
            if let Some(other) = self.others.iter().find(|other| same(other, new)) {
                return Err(Refusal::busy(format!("{called}: it is {} of this graph", other.element)));
            }
        }
        for new in &self.written {
            let called = new.called();
            if new.at.read_only {
                return Err(Refusal::new("denied", format!("{called}: it is read-only")));
            }
            let leftover = matches!(new.standing(), Standing::Filling(_) | Standing::Moved(_));
            let backup = new.found.as_ref().is_some_and(|head| head.backup.is_some());
            if new.found.is_some() && !leftover && !backup && !force {
                let message = format!(
                    "{called}: its head says that it is a volume that somebody uses: --force overwrites it"
                );
                return Err(Refusal::busy(message));
            }
        }
        Ok(())
    }

    /// True if the heads of the disk say that nobody has written there without account.
    pub(super) fn are_kept(&self, account: &Account) -> bool {
        let kept = |volume: &Volume| {
            volume.found.as_ref().is_some_and(|head| head.account.as_ref() == Some(&account.name))
        };
        self.disk.iter().filter(|volume| !volume.at.read_only).all(kept)
    }

    /// Whether what has changed since the last backup makes the target one.
    pub(super) fn may_follow(&self, account: &Account, names: &Names, force: bool) -> Result<(), Refusal> {
        let Names { disk, .. } = names;
        if !self.are_kept(account) {
            let message = format!(
                "{disk} was written to since its last backup by somebody who has kept no account of it: begin with a \
                 backup without --incremental"
            );
            return Err(Refusal::invalid(message));
        }
        let called: Vec<_> = self.written.iter().map(Volume::called).collect();
        let called = if called.is_empty() { "the target".to_owned() } else { called.join(", ") };
        let last = account.last.map(|number| Backup { account: account.name.clone(), number });
        let refused = |what: String, help: &str| Err(Refusal::invalid(format!("{called}: {what}: {help}")));
        let full = "name the target of the last backup, or make a backup without --incremental";
        if self.held.as_ref().is_ok_and(Option::is_none)
            && self.target.iter().any(|volume| volume.at.missing.is_some())
        {
            return refused("it is not there, and a new one does not hold the last backup".to_owned(), full);
        }
        if force {
            return Ok(());
        }
        let either = "name the target of the last backup, make one without --incremental, or, if you know better, --force";
        match &self.held {
            Err(why) => refused(why.clone(), either),
            Ok(None) => refused(format!("nothing says that it holds the last backup of {disk}"), either),
            Ok(held) if *held != last => {
                let number = last.map_or(0, |last| last.number);
                let what = match held {
                    Some(held) if held.account == account.name => {
                        format!(
                            "it holds backup {} of {disk}, and changes are counted from {number}",
                            held.number
                        )
                    }
                    _ => "it holds a backup of another disk, or of before account was kept".to_owned(),
                };
                refused(what, either)
            }
            Ok(_) => match self.written.iter().find_map(Volume::misplaced) {
                Some(why) => refused(why.to_owned(), either),
                None => Ok(()),
            },
        }
    }

    /// The heads of the disk, and those of what is written.
    pub(super) fn heads(&self) -> [Vec<PathBuf>; 2] {
        let paths = |volumes: &[Volume]| -> Vec<PathBuf> {
            let ours = volumes.iter().filter(|volume| !volume.at.read_only);
            ours.map(|volume| volume.at.path.clone()).collect()
        };
        [paths(&self.disk), paths(&self.written)]
    }

    /// Writes down what is about to be true: the target is being filled, and the disk is below an overlay.
    pub(super) fn stand(
        &self,
        account: &Account,
        incremental: bool,
        called: String,
        overlay: &Path,
    ) -> Result<(), Error> {
        for volume in &self.written {
            let filling = Standing::Filling(called.clone());
            let number = account.last.filter(|_| incremental);
            // It can be tried again: what has changed since that one is copied then, too.
            let backup = number.map(|number| Backup { account: account.name.clone(), number });
            let found = volume.found.clone().filter(|_| incremental);
            let head = found.map(|head| Head { standing: filling.clone(), account: None, ..head });
            if let Some(head) = head.or_else(|| volume.overwritten(filling)) {
                heads::put(&volume.at.path, &Head { backup, ..head })?;
            }
        }
        for volume in self.disk.iter().filter(|volume| !volume.at.read_only) {
            let head = volume.found.clone().or_else(|| volume.overwritten(Standing::Active));
            let Some(mut head) = head else { continue };
            if head.standing == Standing::Active {
                head.standing = Standing::Overlaid(overlay.display().to_string());
            }
            heads::put(&volume.at.path, &Head { account: Some(account.name.clone()), ..head })?;
        }
        Ok(())
    }

    /// Puts all heads back.
    pub(super) fn restore(&self) {
        for volume in self.disk.iter().filter(|volume| !volume.at.read_only).chain(&self.written) {
            if let Err(error) = volume.restore() {
                tracing::warn!("{}: its head cannot be put back: {error}", volume.called());
            }
        }
    }
}

impl Record {
    /// The target is complete and durable: its heads say which backup it holds.
    pub(super) fn stand_complete(&self) -> Result<(), Error> {
        let backup = Backup { account: self.account.clone(), number: self.number };
        change(&self.target_heads, |head| {
            Some(Head { standing: Standing::Active, backup: Some(backup.clone()), ..head })
        })
    }

    /// What was written since is dropped: nobody has account of that.
    pub(super) fn stand_dropped(&self) -> Result<(), Error> {
        change(&self.disk_heads, |head| {
            let overlaid = matches!(head.standing, Standing::Overlaid(_));
            overlaid.then_some(Head { standing: Standing::Active, account: None, ..head })
        })
    }

    /// Everything is in the disk.
    pub(super) fn stand_merged(&self) -> Result<(), Error> {
        change(&self.disk_heads, |head| {
            let overlaid = matches!(head.standing, Standing::Overlaid(_));
            overlaid.then_some(Head { standing: Standing::Active, ..head })
        })
    }
}

/// True if a client that asks there finds that server, as far as can be told.
fn one_server(client: &Address, server: &Address) -> bool {
    match (client, server) {
        (Address::Unix(client), Address::Unix(server)) => {
            let id = |path: &Path| path.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
            client == server || id(client).is_some_and(|client| Some(client) == id(server))
        }
        (Address::Tcp { host, port }, Address::Tcp { host: listens, port: at }) => {
            port == at && (host == listens || matches!(host.as_str(), "localhost" | "127.0.0.1" | "::1"))
        }
        _ => false,
    }
}

/// True if requests that enter at one element may reach another.
fn reaches(spec: &Spec, from: &str, to: &str) -> bool {
    let (mut seen, mut work) = (HashSet::new(), Vec::from_iter(spec.find(from)));
    while let Some(ix) = work.pop() {
        if seen.insert(ix) {
            work.extend(spec.edges.iter().filter(|edge| edge.from == ix).map(|edge| edge.to));
        }
    }
    spec.find(to).is_some_and(|to| seen.contains(&to))
}

/// Changes the heads that are there.
fn change(paths: &[PathBuf], next: impl Fn(Head) -> Option<Head>) -> Result<(), Error> {
    for path in paths {
        if let Some(head) = heads::read(path)?.and_then(&next) {
            heads::put(path, &head)?;
        }
    }
    Ok(())
}
