//! A graph that listens, and serves when it is told to.

use super::{Heads, Live, Setup, Signing};
use crate::error::{Error, Kind, Result};
use crate::events::EventKind;
use crate::lang::Spec;
use crate::sched::Host;
use std::sync::Arc;

impl Live {
    /// As [`start`](Self::start); but if a source of the graph [stands by](crate::Element::stands_by), all sources are opened
    /// and nothing else: clients connect and learn how large the disk is, what they ask for waits, and no volume is claimed
    /// before [`activate`](Self::activate).
    ///
    /// # Errors
    /// The first element that cannot be built or opened; everything is closed again.
    pub async fn stand_by(host: &Arc<Host>, setup: Setup, spec: Spec, heads: Heads) -> Result<Arc<Live>> {
        Live::begin(host, setup, spec, heads, true).await
    }

    /// Opens all that a graph that stands by has not opened yet, claims its volumes, and serves. False if it serves already.
    ///
    /// # Errors
    /// What cannot be opened, or belongs to somebody else; the graph stands by as before.
    pub async fn activate(&self) -> Result<bool> {
        let _changing = self.changing.lock().await;
        let (spec, heads) = {
            let state = self.state();
            let Some(heads) = state.standby.clone() else { return Ok(false) };
            (state.spec.clone(), heads)
        };
        let graph = self.disk.graph();
        let signed = Signing::begin(&spec, &graph, &heads, false)?;
        self.disk.activate().await.inspect_err(|_| signed.plan.withdraw())?;
        signed.complete();
        self.state().standby = None;
        self.publish(EventKind::Loaded, "the graph serves", &[]);
        Ok(true)
    }

    /// Whether it has not been activated yet.
    pub fn stands_by(&self) -> bool {
        self.state().standby.is_some()
    }

    pub(super) fn not_standing_by(&self) -> Result<()> {
        match self.stands_by() {
            true => Err(Error::new(
                Kind::Unavailable,
                format!("{0} stands by: `mason activate {0}` first", self.name()),
            )),
            false => Ok(()),
        }
    }
}
