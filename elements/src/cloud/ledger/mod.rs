//! What a volume has cost, by day: counts of requests, and what was stored. docs/formats/ledger.md.

mod bill;
mod book;
mod format;
#[cfg(test)]
mod tests;

pub(crate) use bill::bill;
pub use bill::{check_month, check_prices, read};
pub(crate) use book::Book;

use super::counts::Sum;
use super::price::{GB, Prices, STANDARD};
use crate::calendar::{DAY, LAST, Month, day_of};
use std::collections::BTreeMap;

/// Days that are kept.
pub(crate) const MOST_DAYS: usize = 400;

/// A clock that goes ahead by more is wrong, or was: in seconds.
const LONGEST: u64 = MOST_DAYS as u64 * DAY;

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Ledger {
    /// The volume's id.
    pub(crate) volume: [u8; 16],
    /// When it was looked at last, in seconds since 1970; 0 before the first time.
    pub(crate) at: u64,
    /// Bytes stored then.
    pub(crate) stored: u64,
    /// By days since 1970.
    pub(crate) days: BTreeMap<u32, Day>,
    /// Those that were in use last.
    pub(crate) prices: Prices,
    /// What the budget of a day is raised by, and which day.
    pub(crate) raised_day: (u32, f64),
    /// The same of a month.
    pub(crate) raised_month: (u32, f64),
}

/// What is known of a day.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Day {
    /// Seconds of which it is known what was stored.
    pub(crate) seconds: u64,
    pub(crate) sum: Sum,
    /// What was stored, added up over these seconds.
    pub(crate) byte_seconds: u128,
}

impl Ledger {
    pub(crate) fn new(volume: [u8; 16]) -> Ledger {
        let days = BTreeMap::new();
        let raised = (0, 0.0);
        Ledger { volume, at: 0, stored: 0, days, prices: STANDARD, raised_day: raised, raised_month: raised }
    }

    /// It is `now`, in seconds since 1970, and so many bytes are stored from now on, if that is known. What was stored until
    /// now is added to the days since.
    pub(crate) fn pass(&mut self, now: u64, stored: Option<u64>) {
        let now = now.min(LAST);
        let wrong = now + DAY < self.at || now > self.at.saturating_add(LONGEST);
        if self.at == 0 || wrong {
            self.at = now;
        }
        while self.at < now {
            let end = ((self.at / DAY + 1) * DAY).min(now);
            let (seconds, stored) = (end - self.at, self.stored);
            let day = self.days.entry(day_of(self.at)).or_default();
            day.seconds += seconds;
            let more = u128::from(stored) * u128::from(seconds);
            day.byte_seconds = day.byte_seconds.saturating_add(more);
            self.at = end;
        }
        self.stored = stored.unwrap_or(self.stored);
        self.forget();
    }

    /// Requests that were made just now.
    pub(crate) fn count(&mut self, more: &Sum) {
        if *more != Sum::default() {
            self.days.entry(self.today()).or_default().sum.add(more);
            self.forget();
        }
    }

    fn forget(&mut self) {
        let today = self.today();
        while self.days.len() > MOST_DAYS {
            // Where the clock was set back, later days are those that never were.
            match self.days.first_key_value() {
                Some((day, _)) if *day != today => self.days.pop_first(),
                _ => self.days.pop_last(),
            };
        }
    }

    /// The day of the last look.
    pub(crate) fn today(&self) -> u32 {
        day_of(self.at)
    }

    /// What a day has cost until now, in dollars.
    pub(crate) fn cost_of_day(&self, day: u32, prices: &Prices) -> f64 {
        self.days.get(&day).map_or(0.0, |it| prices.sum(&it.sum) + it.storage(day, prices))
    }

    /// What a month has cost until now, in dollars.
    pub(crate) fn cost_of_month(&self, month: Month, prices: &Prices) -> f64 {
        // A sum of nothing would be -0.
        let days = self.days_of(month).map(|(day, _)| self.cost_of_day(*day, prices));
        days.fold(0.0, |sum, day| sum + day)
    }

    pub(crate) fn days_of(&self, month: Month) -> impl Iterator<Item = (&u32, &Day)> {
        self.days.range(month.first_day()..month.next().first_day())
    }

    /// What this month will have cost at its end if it goes on as in the days of it that are known; None after less than an
    /// hour.
    pub(crate) fn forecast(&self, prices: &Prices) -> Option<f64> {
        let month = Month::of(self.today());
        let known: u64 = self.days_of(month).map(|(_, day)| day.seconds).sum();
        let left = (u64::from(month.next().first_day()) * DAY).saturating_sub(self.at);
        let spent = self.cost_of_month(month, prices);
        (known >= 3600).then(|| spent + spent / known as f64 * left as f64)
    }
}

impl Day {
    /// What storing has cost on that day: each day has its share of its month.
    pub(crate) fn storage(&self, day: u32, prices: &Prices) -> f64 {
        let month = u64::from(Month::of(day).days()) * DAY;
        self.byte_seconds as f64 / month as f64 / GB * prices.month
    }

    /// What was stored on average, in bytes.
    pub(crate) fn stored(&self) -> u64 {
        self.byte_seconds.checked_div(u128::from(self.seconds)).unwrap_or(0) as u64
    }
}
