//! What trees ask of a block store that is an element below them, through an element that guards it.
//!
//! It travels as a control request with the verb [`VERB`]: a letter in JSON, whose answer is JSON, too
//! (docs/formats/block-store.md).

use super::below::Below;
use blockmason::{Error, Kind, Request, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The verb of its control requests.
pub(super) const VERB: &str = "block_store";

/// A control request's argument.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Letter {
    pub(super) ask: Ask,
    /// Set by the element that guards the store, whatever was there before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) door: Option<Door>,
}

/// Who guards the way that a letter has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Door {
    /// The name of the element.
    pub(super) name: String,
    /// Whose trees may come this way: of which key, if not of none.
    pub(super) key: String,
}

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Ask {
    /// To use trees of that format, which are made if there are none: a [`Lease`]. Whoever opens them says who it is; nobody
    /// else may come the same way.
    Open { format: u32, opener: u64 },
    /// Some extents, close behind one: a [`Row`].
    Grant { near: u64, epoch: u64 },
    /// That extents go back which are not used: [`Free`].
    Give { first: u64, count: u64 },
    /// How many extents are nobody's: [`Free`].
    Free {},
    /// That whoever opens the trees has to know a feature of them from now on: [`Free`].
    Need { feature: u64 },
}

/// Trees may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lease {
    /// The number of their owner.
    pub(super) owner: u32,
    /// Extents that are nobody's.
    pub(super) free: u64,
}

/// Extents in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) first: u64,
    pub(super) count: u64,
    /// Extents that are nobody's.
    pub(super) free: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Free {
    /// Extents that are nobody's.
    pub(super) free: u64,
}

/// The letter in a request, if it has one.
///
/// # Errors
/// [`Kind::Invalid`] if it cannot be read.
pub(super) fn letter(req: &Request) -> Option<Result<Letter>> {
    let control = req.extra.as_ref().and_then(|extra| extra.control.as_ref());
    let (_, argument) = control.filter(|(verb, _)| verb == VERB)?;
    Some(serde_json::from_str(argument).map_err(|_| Error::invalid("that is no letter to a block store")))
}

/// A letter's or an answer's text.
pub(super) fn text(what: &impl Serialize) -> Result<String> {
    serde_json::to_string(what).map_err(|_| Error::internal("a letter cannot be written"))
}

/// Reads an answer.
pub(super) fn answer<T: DeserializeOwned>(text: &str) -> Result<T> {
    let unknown = |_| Error::new(Kind::Io, "the block store below answers what cannot be understood");
    serde_json::from_str(text).map_err(unknown)
}

/// Asks the block store below.
///
/// # Errors
/// [`Kind::Unsupported`] if there is none; [`Kind::NoSpace`].
pub(super) async fn ask<T: DeserializeOwned>(ask: Ask, below: Below<'_>) -> Result<T> {
    answer(&below.control(VERB, text(&Letter { ask, door: None })?).await?)
}
