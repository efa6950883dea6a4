//! A ledger with prices: what `mason bill` shows.

use super::{Day, Ledger, book};
use crate::calendar::{Month, date};
use crate::cloud::counts::Call;
use crate::cloud::price::Prices;
use blockmason::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The bill of a ledger that lies in a file, whether somebody keeps it or not. Without prices those that were in use last.
///
/// # Errors
/// It is no ledger; there are no such prices.
pub fn read(path: &Path, prices: Option<&str>) -> Result<Value> {
    let ledger = book::look(path)?;
    let prices = prices.map(str::parse).transpose().map_err(Error::invalid)?;
    Ok(bill(&ledger, &prices.unwrap_or(ledger.prices)))
}

/// # Errors
/// What is wrong with a text as prices.
pub fn check_prices(text: &str) -> Result<(), String> {
    text.parse::<Prices>().map(|_| ())
}

/// # Errors
/// What is wrong with a text as a month.
pub fn check_month(text: &str) -> Result<(), String> {
    text.parse::<Month>().map(|_| ())
}

/// Everything that a ledger says, with prices.
pub(crate) fn bill(ledger: &Ledger, prices: &Prices) -> Value {
    let days: Vec<_> = ledger.days.iter().map(|(day, known)| of_day(ledger, *day, known, prices)).collect();
    let month = Month::of(ledger.today());
    json!({
        "at": ledger.at,
        "stored": ledger.stored,
        "prices": { "put": prices.put, "get": prices.get, "month": prices.month, "out": prices.out },
        "today": { "date": date(ledger.today()), "dollars": ledger.cost_of_day(ledger.today(), prices) },
        "month": {
            "month": month.to_string(),
            "dollars": ledger.cost_of_month(month, prices),
            "forecast": ledger.forecast(prices),
        },
        "days": days,
    })
}

fn of_day(ledger: &Ledger, day: u32, known: &Day, prices: &Prices) -> Value {
    let mut operations = Map::new();
    for (call, (requests, bytes)) in Call::ALL.iter().zip(known.sum.requests.iter().zip(&known.sum.bytes)) {
        let dollars = prices.call(*call, *requests, *bytes);
        let line = json!({ "requests": requests, "bytes": bytes, "dollars": dollars });
        operations.insert(call.name().to_owned(), line);
    }
    json!({
        "date": date(day),
        "operations": operations,
        "storage": { "seconds": known.seconds, "bytes": known.stored(), "dollars": known.storage(day, prices) },
        "dollars": ledger.cost_of_day(day, prices),
    })
}
