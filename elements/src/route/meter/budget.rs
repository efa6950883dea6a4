//! Budgets: steps at rising amounts, of a day and of a month.

use crate::calendar::Month;
use crate::cloud::ledger::Ledger;
use crate::cloud::price::{Dollars, Prices};
use std::fmt;
use std::str::FromStr;

blockmason::words! {
    /// What happens once so much is spent, and what those before it do. In the order of how much it hinders.
    pub(super) enum Then {
        /// An event.
        Warn = "warn",
        /// The sink does no work in the background.
        StopBackground = "stop_background",
        /// Requests are slowed down.
        Throttle = "throttle",
        /// Changes wait.
        Queue = "queue",
        /// Changes fail.
        ReadOnly = "read_only",
    }
}

impl Then {
    /// As a number from 1, to compare by.
    pub(super) fn level(self) -> u8 {
        self as u8 + 1
    }

    /// None for 0.
    pub(super) fn of_level(level: u8) -> Option<Then> {
        Then::ALL.iter().copied().find(|then| then.level() == level)
    }

    /// What it means for those who are told.
    pub(super) fn meaning(self) -> &'static str {
        match self {
            Then::Warn => "this is a warning",
            Then::StopBackground => "work in the background stops",
            Then::Throttle => "requests are slowed down",
            Then::Queue => "changes wait",
            Then::ReadOnly => "changes are refused",
        }
    }
}

/// `warn=3`: what happens from three dollars on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Step {
    pub(super) then: Then,
    pub(super) dollars: Dollars,
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Step, String> {
        let (then, dollars) = text
            .split_once('=')
            .ok_or_else(|| format!("expected a step and its dollars such as `warn=3`, found `{text:.40}`"))?;
        Ok(Step { then: then.parse()?, dollars: dollars.parse()? })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.then, self.dollars)
    }
}

blockmason::text_value!(Step, "step of a budget");

/// # Errors
/// A step would never be reached before one that hinders more, or is there twice.
pub(super) fn check(steps: &[Step]) -> Result<(), String> {
    for (at, step) in steps.iter().enumerate() {
        for other in &steps[..at] {
            let (low, high) =
                if other.then.level() < step.then.level() { (other, step) } else { (step, other) };
            if low.then == high.then {
                return Err(format!("`{}` is there twice", step.then));
            }
            if low.dollars > high.dollars {
                return Err(format!("`{low}` comes after `{high}`, which includes it"));
            }
        }
    }
    Ok(())
}

/// What a budget is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Period {
    Day,
    Month,
}

impl Period {
    pub(super) fn name(self) -> &'static str {
        match self {
            Period::Day => "day",
            Period::Month => "month",
        }
    }

    /// What the present one has cost.
    pub(super) fn spent(self, ledger: &Ledger, prices: &Prices) -> f64 {
        match self {
            Period::Day => ledger.cost_of_day(ledger.today(), prices),
            Period::Month => ledger.cost_of_month(Month::of(ledger.today()), prices),
        }
    }

    /// What the present one has been raised by.
    pub(super) fn raised(self, ledger: &Ledger) -> f64 {
        let (number, raised) = match self {
            Period::Day => (ledger.today(), ledger.raised_day),
            Period::Month => (Month::of(ledger.today()).0, ledger.raised_month),
        };
        if raised.0 == number { raised.1 } else { 0.0 }
    }

    /// Raises the present one.
    pub(super) fn raise(self, ledger: &mut Ledger, dollars: f64) {
        match self {
            Period::Day => ledger.raised_day = (ledger.today(), dollars),
            Period::Month => ledger.raised_month = (Month::of(ledger.today()).0, dollars),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_rise() {
        let checked = |text: &str| {
            let steps: Result<Vec<Step>, _> = text.split(' ').map(str::parse).collect();
            steps.and_then(|steps| check(&steps))
        };
        for text in ["warn=3", "queue=5 warn=3", "warn=5 queue=5", "warn=0 stop_background=1 read_only=2.5"] {
            assert_eq!(checked(text), Ok(()), "{text}");
        }
        for text in
            ["warn", "warn=", "warn=-1", "stop=3", "warn=3 warn=4", "warn=6 queue=5", "queue=5 warn=6"]
        {
            assert!(checked(text).is_err(), "{text}");
        }
        assert_eq!("stop_background=0.5".parse::<Step>().unwrap().to_string(), "stop_background=0.5");
        assert_eq!(Then::of_level(0), None);
        assert!(Then::ALL.iter().all(|then| Then::of_level(then.level()) == Some(*then)));
    }
}
