//! Quantities and tables as people read them.

use std::fmt::{self, Display};
use std::ops::Range;

const UNITS: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];

/// Bytes, exactly where a unit divides them, else with one decimal.
pub(crate) struct Bytes(pub(crate) u64);

impl Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let power = (self.0.max(1).ilog2() / 10) as usize;
        let unit = 1u64 << (10 * power);
        if self.0.is_multiple_of(unit) {
            write!(f, "{}{}", self.0 / unit, UNITS[power])
        } else {
            write!(f, "{:.1}{}", self.0 as f64 / unit as f64, UNITS[power])
        }
    }
}

/// Bytes, always exactly.
pub(crate) struct Exact(pub(crate) u64);

impl Display for Exact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let power = (self.0.trailing_zeros() / 10).min(6) * u32::from(self.0 > 0);
        write!(f, "{}{}", self.0 >> (10 * power), UNITS[power as usize])
    }
}

/// Nanoseconds.
pub(crate) struct Nanos(pub(crate) u64);

impl Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ns if ns < 1_000 => write!(f, "{ns}ns"),
            ns if ns < 1_000_000 => write!(f, "{:.1}us", ns as f64 / 1e3),
            ns if ns < 1_000_000_000 => write!(f, "{:.1}ms", ns as f64 / 1e6),
            ns => write!(f, "{:.1}s", ns as f64 / 1e9),
        }
    }
}

/// A span of seconds.
pub(crate) struct Seconds(pub(crate) f64);

impl Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.0 as u64;
        match (whole / 86400, whole / 3600 % 24, whole / 60 % 60, whole % 60) {
            (0, 0, 0, _) => write!(f, "{:.1}s", self.0),
            (0, 0, minutes, seconds) => write!(f, "{minutes}m {seconds}s"),
            (0, hours, minutes, _) => write!(f, "{hours}h {minutes}m"),
            (days, hours, ..) => write!(f, "{days}d {hours}h"),
        }
    }
}

/// Seconds since 1970 as a time of day, `2026-01-31T12:00:00.250Z`.
pub(crate) struct Stamp(pub(crate) f64);

impl Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Far away from where the arithmetic below ends.
        let millis = (self.0 * 1000.0).clamp(0.0, 1e14) as u64;
        let (seconds, millis) = (millis / 1000, millis % 1000);
        let (year, month, day) = civil(seconds / 86400);
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
    }
}

/// The date so many days after 1970-01-01: year, month, day.
fn civil(mut days: u64) -> (u64, usize, u64) {
    let is_leap =
        |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= months[month] {
        days -= months[month];
        month += 1;
    }
    (year, month + 1, days + 1)
}

/// A table without lines; the columns `numbers` are set flush right.
pub(crate) fn table(head: &[&str], rows: Vec<Vec<String>>, numbers: Range<usize>) -> String {
    use comfy_table::{CellAlignment, Table, TableStyle};
    let mut table = Table::new();
    table.load_style(TableStyle::new()).set_header(head.to_vec()).add_rows(rows);
    for ix in numbers {
        if let Some(column) = table.column_mut(ix) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| format!(" {}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_day() {
        let stamps = [0.0, 951_782_400.25, 1_709_251_199.999, 4_107_542_400.0].map(|s| Stamp(s).to_string());
        let wanted = [
            "1970-01-01T00:00:00.000Z",
            "2000-02-29T00:00:00.250Z",
            "2024-02-29T23:59:59.999Z",
            "2100-03-01T00:00:00.000Z",
        ];
        assert_eq!(stamps, wanted);
    }

    #[test]
    fn quantities() {
        let bytes = [0, 1, 1023, 1024, 1536, 1 << 30, (1 << 30) + 1, u64::MAX].map(|n| Bytes(n).to_string());
        assert_eq!(bytes, ["0", "1", "1023", "1k", "1.5k", "1G", "1.0G", "16.0E"]);
        let exact = [0, 1, 1024, 1536, 1 << 20, (1 << 30) + 4096, u64::MAX].map(|n| Exact(n).to_string());
        assert_eq!(exact, ["0", "1", "1k", "1536", "1M", "1048580k", "18446744073709551615"]);
        let nanos = [999, 1500, 2_500_000, 3_000_000_000].map(|n| Nanos(n).to_string());
        assert_eq!(nanos, ["999ns", "1.5us", "2.5ms", "3.0s"]);
        let spans = [0.25, 61.0, 3700.0, 90000.0].map(|n| Seconds(n).to_string());
        assert_eq!(spans, ["0.2s", "1m 1s", "1h 1m", "1d 1h"]);
    }
}
