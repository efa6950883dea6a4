//! The account of a disk's changes: its name, and its backups, counted. It is beside the map, MAP.account, and means
//! nothing without it.

use super::graph::Names;
use crate::control::refusal::Refusal;
use crate::record;
use blockmason::heads;
use blockmason::io::remove_file;
use blockmason::lang::Spec;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The newest form of the record.
const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Account {
    version: u32,
    /// What heads call it.
    pub(super) name: String,
    /// The last backup that was complete: changes are counted from it.
    pub(super) last: Option<u64>,
    /// The last number that was given to one.
    pub(super) used: u64,
}

impl Account {
    /// A new one, of which there is no backup.
    pub(super) fn begin() -> Result<Account, Refusal> {
        let name = heads::random_name().map_err(|error| Refusal::of(&error))?;
        Ok(Account { version: VERSION, name, last: None, used: 0 })
    }

    /// The same once that backup is complete.
    pub(super) fn holding(self, number: u64) -> Account {
        Account { last: Some(number), ..self }
    }

    /// That of what keeps account in a graph. None if it has no name, or nothing is known of it.
    pub(super) fn of(spec: &Spec, names: &Names) -> Result<Option<Account>, Refusal> {
        let params = spec.find(&names.changes).map(|log| &spec.elements[log].params);
        let value = |key| Some(params?.get(key)?.first()?.text().to_owned());
        let Some((name, map)) = value("account").zip(map(spec, names)) else { return Ok(None) };
        Ok(Account::read(&map)?.filter(|account| account.name == name))
    }

    /// That of a map.
    pub(super) fn read(map: &Path) -> Result<Option<Account>, Refusal> {
        let path = beside(map);
        let bad = |what: &dyn std::fmt::Display| {
            Refusal::invalid(format!("{}: the account of changes {what}: remove it", path.display()))
        };
        record::read(&path, VERSION, bad)
    }

    /// Writes it, durably.
    pub(super) fn write(&self, map: &Path) -> Result<(), Refusal> {
        let path = beside(map);
        record::write(&path, self).map_err(|error| {
            Refusal::new("unavailable", format!("{}: the account cannot be noted: {error}", path.display()))
        })
    }

    /// Forgets it: nobody keeps it any more.
    pub(super) fn forget(map: &Path) -> std::io::Result<()> {
        remove_file(&beside(map))
    }
}

fn beside(map: &Path) -> PathBuf {
    map.with_extension("account")
}

/// The file of what keeps account.
pub(super) fn map(spec: &Spec, names: &Names) -> Option<PathBuf> {
    let file = spec.elements[spec.find(&names.changes)?].params.get("file")?.first()?;
    Some(file.folder().join(file.text()))
}
