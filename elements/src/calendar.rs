//! Days and months of UTC, counted from January 1970.

use blockmason::rt;
use std::fmt;
use std::str::FromStr;
use std::time::UNIX_EPOCH;

/// Seconds of a day: UTC as computers keep it has no leap seconds.
pub(crate) const DAY: u64 = 86_400;

/// The last second of the year 9999: what comes later is a clock gone wrong.
pub(crate) const LAST: u64 = 253_402_300_799;

/// The day of a time, both since 1970.
pub(crate) fn day_of(seconds: u64) -> u32 {
    (seconds.min(LAST) / DAY) as u32
}

fn is_leap(year: u32) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Days before a year, which is 1970 or later.
fn before_year(year: u32) -> u32 {
    let leaps = |year: u32| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

/// A month: so many after January 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Month(pub(crate) u32);

impl Month {
    /// That of a day.
    pub(crate) fn of(day: u32) -> Month {
        // Years have 365.2425 days: the guess is wrong by one at the most.
        let mut year = 1970 + (u64::from(day) * 400 / 146_097) as u32;
        while before_year(year) > day {
            year -= 1;
        }
        while before_year(year + 1) <= day {
            year += 1;
        }
        let mut month = Month((year - 1970) * 12);
        while month.next().first_day() <= day {
            month = month.next();
        }
        month
    }

    pub(crate) fn next(self) -> Month {
        Month(self.0 + 1)
    }

    fn year(self) -> u32 {
        1970 + self.0 / 12
    }

    /// Days since 1970.
    pub(crate) fn first_day(self) -> u32 {
        let lengths = [31, 28 + u32::from(is_leap(self.year())), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        before_year(self.year()) + lengths[..self.0 as usize % 12].iter().sum::<u32>()
    }

    /// How many days it has.
    pub(crate) fn days(self) -> u32 {
        self.next().first_day() - self.first_day()
    }
}

impl fmt::Display for Month {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}", self.year(), self.0 % 12 + 1)
    }
}

impl FromStr for Month {
    type Err = String;

    fn from_str(text: &str) -> Result<Month, String> {
        let wrong =
            || format!("expected a month from 1970-01 to 9999-12 such as 2026-11, found `{text:.40}`");
        let digits = |text: &str, len| text.len() == len && text.bytes().all(|byte| byte.is_ascii_digit());
        let (year, month) = text.split_once('-').ok_or_else(wrong)?;
        if !digits(year, 4) || !digits(month, 2) {
            return Err(wrong());
        }
        match (year.parse::<u32>(), month.parse::<u32>()) {
            (Ok(year @ 1970..), Ok(month @ 1..=12)) => Ok(Month((year - 1970) * 12 + month - 1)),
            _ => Err(wrong()),
        }
    }
}

/// A day as people write it, `2026-11-30`.
pub(crate) fn date(day: u32) -> String {
    let month = Month::of(day);
    format!("{month}-{:02}", day - month.first_day() + 1)
}

/// Seconds since 1970.
pub(crate) fn seconds() -> u64 {
    rt::wall_clock().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A time of day, `2026-11-30 12:00:00 UTC`.
pub(crate) fn clock(seconds: u64) -> String {
    let (of_day, date) = (seconds % DAY, date(day_of(seconds)));
    format!("{date} {:02}:{:02}:{:02} UTC", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_that_are_known() {
        let known = [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_709_251_199, "2024-02-29"),
            (1_735_689_599, "2024-12-31"),
            (1_735_689_600, "2025-01-01"),
            (4_107_542_400, "2100-03-01"),
            (LAST, "9999-12-31"),
            (u64::MAX, "9999-12-31"),
        ];
        for (seconds, wanted) in known {
            assert_eq!(date(day_of(seconds)), wanted, "{seconds}");
        }
    }

    /// Counted on day by day, every day until the year 9999 is where it belongs.
    #[test]
    fn every_day_has_its_month() {
        let (mut day, mut month) = (0, Month(0));
        while day <= day_of(LAST) {
            let first = month.first_day();
            assert_eq!(first, day, "{month}");
            let days = month.days();
            assert!((28..=31).contains(&days), "{month} has {days}");
            for at in [first, first + 1, first + days - 1] {
                assert_eq!(Month::of(at), month, "{at}");
            }
            (day, month) = (first + days, month.next());
        }
        assert_eq!((day - 1, month.to_string().as_str()), (day_of(LAST), "10000-01"));
    }

    #[test]
    fn months_are_read_as_they_are_written() {
        for text in ["1970-01", "2026-11", "9999-12"] {
            assert_eq!(text.parse::<Month>().unwrap().to_string(), text);
        }
        for text in ["", "2026", "2026-00", "2026-13", "1969-12", "2026-1", "+026-11", "2026-11-30"] {
            assert!(text.parse::<Month>().is_err(), "{text}");
        }
    }
}
