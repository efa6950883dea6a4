//! What stores ask for: a table of prices, and sums by it.

use super::counts::{Call, Counts, Sum};
use std::fmt;
use std::str::FromStr;

/// Prices in dollars. The default is that of S3 Standard in us-east-1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Prices {
    /// Of 1000 puts or listings.
    pub(crate) put: f64,
    /// Of 1000 gets or heads.
    pub(crate) get: f64,
    /// Of a GB (10^9 bytes) that is stored for a month.
    pub(crate) month: f64,
    /// Of a GB that leaves the cloud.
    pub(crate) out: f64,
}

/// S3 Standard, us-east-1, the first 50 TB of a month; what is fetched stays in the region.
pub(crate) const STANDARD: Prices = Prices { put: 0.005, get: 0.0004, month: 0.023, out: 0.0 };

/// Nothing costs anything: only counts are of interest.
const NONE: Prices = Prices { put: 0.0, get: 0.0, month: 0.0, out: 0.0 };

/// Bytes of a GB on a bill.
pub(crate) const GB: f64 = 1e9;

impl Prices {
    /// What so many requests of a kind cost, and the bytes that they have moved. Deleting is free.
    pub(crate) fn call(&self, call: Call, requests: u64, bytes: u64) -> f64 {
        let thousands = requests as f64 / 1000.0;
        match call {
            Call::Put | Call::List => thousands * self.put,
            Call::Get => thousands * self.get + bytes as f64 / GB * self.out,
            Call::Head => thousands * self.get,
            Call::Delete => 0.0,
        }
    }

    /// What all requests of a sum cost.
    pub(crate) fn sum(&self, sum: &Sum) -> f64 {
        let all = Call::ALL.iter().zip(sum.requests.iter().zip(&sum.bytes));
        all.map(|(call, (requests, bytes))| self.call(*call, *requests, *bytes)).sum()
    }

    /// What everything costs that has been counted.
    pub(crate) fn counted(&self, counts: &Counts) -> f64 {
        Call::ALL.iter().map(|call| self.call(*call, counts.requests(*call), counts.bytes(*call))).sum()
    }

    /// What so many bytes cost each month.
    pub(crate) fn storage(&self, bytes: u64) -> f64 {
        bytes as f64 / GB * self.month
    }

    /// The prices that words name: a table, S3 Standard if there is none, with some prices of one's own.
    pub(crate) fn of(words: &[Word]) -> Prices {
        let table = words.iter().find_map(|word| match word {
            Word::Table(table) => Some(table.prices()),
            Word::Own(..) => None,
        });
        let mut prices = table.unwrap_or(STANDARD);
        for word in words {
            match word {
                Word::Table(_) => {}
                Word::Own(What::Put, Dollars(dollars)) => prices.put = *dollars,
                Word::Own(What::Get, Dollars(dollars)) => prices.get = *dollars,
                Word::Own(What::Month, Dollars(dollars)) => prices.month = *dollars,
                Word::Own(What::Out, Dollars(dollars)) => prices.out = *dollars,
            }
        }
        prices
    }
}

impl FromStr for Prices {
    type Err = String;

    /// Words with spaces or commas in between.
    fn from_str(text: &str) -> Result<Prices, String> {
        let words = text.split([' ', ',']).filter(|word| !word.is_empty());
        let words = words.map(str::parse).collect::<Result<Vec<Word>, _>>()?;
        check(&words)?;
        Ok(Prices::of(&words))
    }
}

/// # Errors
/// No prices are named, or one of them twice.
pub(crate) fn check(words: &[Word]) -> Result<(), String> {
    let kind = |word: &Word| match word {
        Word::Table(_) => "a table",
        Word::Own(What::Put, _) => "`put`",
        Word::Own(What::Get, _) => "`get`",
        Word::Own(What::Month, _) => "`month`",
        Word::Own(What::Out, _) => "`out`",
    };
    let doubled =
        words.iter().enumerate().find(|(at, word)| words[..*at].iter().any(|it| kind(it) == kind(word)));
    match doubled {
        Some((_, word)) => Err(format!("{} is named twice", kind(word))),
        None if words.is_empty() => Err("no prices are named".to_owned()),
        None => Ok(()),
    }
}

blockmason::words! {
    /// A table that has a name.
    pub(crate) enum Table {
        /// Amazon's S3 Standard, us-east-1.
        Standard = "s3_standard",
        /// Nothing costs anything.
        None = "none",
    }
}

impl Table {
    fn prices(self) -> Prices {
        match self {
            Table::Standard => STANDARD,
            Table::None => NONE,
        }
    }
}

blockmason::words! {
    /// What has a price.
    pub(crate) enum What {
        /// 1000 puts or listings.
        Put = "put",
        /// 1000 gets or heads.
        Get = "get",
        /// A GB that is stored for a month.
        Month = "month",
        /// A GB that is fetched.
        Out = "out",
    }
}

/// An amount of money: `5`, `0.25`. Up to a billion.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub(crate) struct Dollars(pub(crate) f64);

impl FromStr for Dollars {
    type Err = String;

    fn from_str(text: &str) -> Result<Dollars, String> {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        match text.parse() {
            Ok(dollars) if plain && (0.0..=1e9).contains(&dollars) => Ok(Dollars(dollars)),
            _ => Err(format!("expected dollars such as `5` or `0.25`, found `{text:.40}`")),
        }
    }
}

impl fmt::Display for Dollars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A table, or a price that is other than in it: `put=0.0045`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Word {
    Table(Table),
    Own(What, Dollars),
}

impl FromStr for Word {
    type Err = String;

    fn from_str(text: &str) -> Result<Word, String> {
        match text.split_once('=') {
            Some((what, dollars)) => Ok(Word::Own(what.parse()?, dollars.parse()?)),
            None => text.parse().map(Word::Table),
        }
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Word::Table(table) => table.fmt(f),
            Word::Own(what, dollars) => write!(f, "{what}={dollars}"),
        }
    }
}

blockmason::text_value!(Word, "table or price");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bill_is_what_the_table_says() {
        let sum = Sum { requests: [1000, 9_000, 1_000, 1000, 1_000_000], bytes: [5, 2_000_000_000, 0, 0, 0] };
        let prices = Prices { out: 0.09, ..STANDARD };
        assert!((prices.sum(&sum) - (0.01 + 0.004 + 0.18)).abs() < 1e-9);
        assert!((prices.storage(10_000_000_000) - 0.23).abs() < 1e-9);
        let counts = Counts::default();
        (0..1000).for_each(|_| counts.add(Call::Put, 1));
        assert!((prices.counted(&counts) - 0.005).abs() < 1e-9);
    }

    #[test]
    fn words_make_a_table() {
        let parsed = |text: &str| text.parse::<Prices>();
        assert_eq!(parsed("s3_standard"), Ok(STANDARD));
        assert_eq!(parsed("out=0.09"), Ok(Prices { out: 0.09, ..STANDARD }));
        assert_eq!(parsed("put=1,none get=2"), Ok(Prices { put: 1.0, get: 2.0, month: 0.0, out: 0.0 }));
        for text in [
            "",
            "gold",
            "put",
            "put=",
            "put=-1",
            "put=inf",
            "put=nan",
            "put=1e3",
            "put=.",
            "put=1 put=2",
            "none none",
            "put=9999999999",
        ] {
            assert!(parsed(text).is_err(), "{text}");
        }
        for text in ["none", "month=0.023"] {
            assert_eq!(text.parse::<Word>().unwrap().to_string(), text);
        }
    }
}
