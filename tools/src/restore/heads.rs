//! What the heads of both disks have to say to a restore: whether the one is a whole backup, and whether the other one may be
//! overwritten.

use super::{Disks, FROM, TO};
use crate::failure::{Failure, Outcome};
use crate::marks;
use crate::units::Bytes;
use blockmason::Graph;
use blockmason::heads::{self, Names, Standing, Volume};
use blockmason::lang::Spec;
use std::collections::HashSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// The volumes that are written.
pub(super) struct Overwritten {
    volumes: Vec<Volume>,
    from: String,
}

impl Overwritten {
    /// Of a graph that is built and not open. Changes nothing.
    pub(super) fn of(disks: &Disks, spec: &Spec, graph: &Graph, force: bool) -> Outcome<Overwritten> {
        let failed = |error| Failure::from_error(&error);
        let (from, to) = (disks.from.top(FROM), disks.to.top(TO));
        let backup = heads::alone(spec, graph, &from, Names::Keep).map_err(failed)?;
        let all = heads::alone(spec, graph, &to, Names::Overwrite).map_err(failed)?;
        for one in &backup {
            if let Some(other) = all.iter().find(|other| other.at.path == one.at.path) {
                return Err(Failure::new(format!("{}: --from and --to are the same disk", other.called())));
            }
        }
        if !force {
            whole(spec, graph, &backup, &from)?;
        }
        let written: HashSet<_> = marks::written(spec, &to);
        let volumes: Vec<_> = all.into_iter().filter(|it| written.contains(&it.element)).collect();
        volumes.iter().try_for_each(|volume| may_go(volume, force))?;
        let called: Vec<_> = backup.iter().map(Volume::called).collect();
        let from = if called.is_empty() { "memory".to_owned() } else { called.join(", ") };
        Ok(Overwritten { volumes, from })
    }

    /// Says, durably, that they are about to be filled. No account is kept of that, so none is named any more.
    pub(super) fn begin(&self) -> Outcome {
        self.stand(&Standing::Filling(self.from.clone()))
    }

    /// They are disks.
    pub(super) fn complete(&self) -> Outcome {
        self.stand(&Standing::Active)
    }

    /// Nothing was written.
    pub(super) fn take_back(&self) {
        for volume in &self.volumes {
            if let Err(error) = volume.restore() {
                tracing::warn!("{}: its head cannot be put back: {error}", volume.called());
            }
        }
    }

    fn stand(&self, standing: &Standing) -> Outcome {
        for volume in &self.volumes {
            if let Some(head) = volume.overwritten(standing.clone()) {
                heads::put(&volume.at.path, &head).map_err(|error| Failure::from_error(&error))?;
            }
        }
        Ok(())
    }
}

/// Whether a backup is complete.
fn whole(spec: &Spec, graph: &Graph, backup: &[Volume], top: &str) -> Outcome {
    let refused = |called: String, why: String| {
        Failure::new(format!("{called}: {why}. To restore what is there all the same: --force"))
    };
    if let Some((volume, why)) = backup.iter().find_map(|volume| Some((volume, volume.elsewhere()?))) {
        return Err(refused(volume.called(), why));
    }
    let held = marks::held(spec, graph, backup, top);
    held.map(drop).map_err(|why| refused("--from".to_owned(), why))
}

/// Whether what a volume holds may be overwritten.
fn may_go(volume: &Volume, force: bool) -> Outcome {
    let called = volume.called();
    if let Standing::Overlaid(overlay) = volume.standing() {
        return Err(Failure::new(format!(
            "{called}: what was written while it was backed up is in {overlay}, and the next start of its graph merges \
             that into the disk. Start it once, or drop that by `mason backup discard`"
        )));
    }
    if force || volume.at.missing.is_some() {
        return Ok(());
    }
    let found = volume.found.as_ref();
    let what = match volume.standing() {
        Standing::Filling(_) | Standing::Moved(_) => return Ok(()),
        _ if found.is_some_and(|head| head.backup.is_some()) => "it holds a backup".to_owned(),
        _ if found.is_some() => "its head says that it is a disk".to_owned(),
        _ => match there(Path::new(&called)) {
            None => return Ok(()),
            Some(what) => format!("{what} is there already"),
        },
    };
    Err(Failure::new(format!("{called}: {what}, which would be overwritten: --force does it")))
}

/// What there is in an image, if there may be anything.
fn there(image: &Path) -> Option<String> {
    let meta = image.metadata().ok()?;
    if meta.file_type().is_block_device() {
        return Some("a device".to_owned());
    }
    // A file of holes holds nothing.
    let may_hold = meta.is_file() && meta.len() > 0 && meta.blocks() > 0;
    may_hold.then(|| format!("a file of {}", Bytes(meta.len())))
}
