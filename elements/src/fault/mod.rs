//! Elements that break things on purpose, and what they share: the choice of the requests to hit.

pub mod delay;
pub mod error;
pub mod flip;
pub mod log_writes;

use blockmason::lang::value::{ByteRange, Percent};
use blockmason::{Cx, Error, Request, Result};
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many requests to hit: a number, or `unlimited`, which is `u64::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Count(u64);

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Count, String> {
        match text {
            "unlimited" => Ok(Count(u64::MAX)),
            _ => match text.parse() {
                Ok(number) => Ok(Count(number)),
                Err(_) => Err(format!("expected a number or `unlimited`, found `{text:.40}`")),
            },
        }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == u64::MAX { f.write_str("unlimited") } else { self.0.fmt(f) }
    }
}

blockmason::text_value!(Count, "number or `unlimited`");

/// Which of the requests that an element could hit are hit. One for all shards.
pub(crate) struct Chance {
    range: Option<ByteRange>,
    state: Mutex<State>,
}

struct State {
    /// Requests to let pass before the first one may be hit.
    pass: u64,
    /// Requests left to hit.
    count: Count,
    probability: Percent,
    /// Requests hit so far.
    hits: u64,
}

impl Chance {
    pub(crate) fn new(range: Option<ByteRange>, pass: u64, count: Count, probability: Percent) -> Chance {
        Chance { range, state: Mutex::new(State { pass, count, probability, hits: 0 }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides about one request, and counts it if it is to be hit.
    pub(crate) fn hits(&self, req: &Request, cx: Cx<'_>) -> bool {
        let (start, end) = self.bounds();
        let touched = req.op.has_range() && req.offset < end && req.end() > start;
        if self.range.is_some() && !touched {
            return false;
        }
        let mut state = self.state();
        if state.pass > 0 {
            state.pass -= 1;
            return false;
        }
        let chosen = state.count.0 > 0 && cx.rng(|rng| rng.f64()) < state.probability.fraction();
        if chosen {
            state.hits += 1;
            if state.count.0 != u64::MAX {
                state.count.0 -= 1;
            }
        }
        chosen
    }

    /// The first byte of the range, and the one behind it.
    pub(crate) fn bounds(&self) -> (u64, u64) {
        self.range.map_or((0, u64::MAX), |range| (range.start, range.end.unwrap_or(u64::MAX)))
    }

    /// The handlers `probability`, `count`, and `hits` under the element's own word for it.
    pub(crate) fn get(&self, handler: &str, hits: &str) -> Result<String> {
        let state = self.state();
        match handler {
            "probability" => Ok(state.probability.to_string()),
            "count" => Ok(state.count.to_string()),
            _ if handler == hits => Ok(state.hits.to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }

    /// Sets `probability` or `count`.
    pub(crate) fn set(&self, handler: &str, value: &str) -> Result<()> {
        match handler {
            "probability" => self.state().probability = value.parse().map_err(Error::invalid)?,
            "count" => self.state().count = value.parse().map_err(Error::invalid)?,
            _ => return Err(Error::no_handler(handler)),
        }
        Ok(())
    }
}
