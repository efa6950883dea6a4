//! A pool that many things are done with, one after the other.

use super::ask;
use crate::control::find::ControlArgs;
use crate::failure::{Failure, Outcome};
use blockmason_elements::parallax::tool::{self, Open, Operation};
use serde_json::Value;
use std::path::Path;

/// A pool that is open here, or that a daemon serves.
pub(super) struct Pool<'a> {
    path: &'a Path,
    control: &'a ControlArgs,
    here: Option<Open>,
}

impl<'a> Pool<'a> {
    /// Opens it, unless somebody else has it: whoever is asked then says why that cannot be, if it cannot.
    pub(super) fn reach(path: &'a Path, control: &'a ControlArgs) -> Pool<'a> {
        Pool { path, control, here: tool::open(path).ok() }
    }

    /// True if a daemon has it, which serves others meanwhile.
    pub(super) fn is_served(&self) -> bool {
        self.here.is_none()
    }

    pub(super) fn ask(&self, operation: &Operation) -> Outcome<Value> {
        match &self.here {
            Some(open) => open.carry_out(operation).map_err(|error| Failure::from_error(&error)),
            None => ask(self.path, operation, self.control),
        }
    }

    /// What `mason pool list` knows of a volume, if it is there.
    pub(super) fn find(&self, name: &str) -> Outcome<Option<Value>> {
        let found = self.ask(&Operation::List)?;
        let mut volumes = found["volumes"].as_array().into_iter().flatten();
        Ok(volumes.find(|volume| volume["name"] == name).cloned())
    }

    /// The same of a volume that has to be there.
    pub(super) fn volume(&self, name: &str) -> Outcome<Value> {
        self.find(name)?.ok_or_else(|| Failure::new(format!("there is no volume {name}")))
    }
}

/// Why nothing is done with what was no disk at any time.
pub(super) fn half_received(name: &str) -> Failure {
    Failure::new(format!(
        "{name} is being received: send the rest, or give it up with mason volume receive --abort"
    ))
}
