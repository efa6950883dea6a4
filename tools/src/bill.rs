//! `mason bill`: what a disk in a bucket has cost, by day and operation.

use crate::control::client::{Client, path};
use crate::control::find::{self, ControlArgs};
use crate::failure::{Failure, Outcome};
use crate::output::{self, printable};
use crate::units::{Bytes, table};
use crate::view::{HandlerArgument, HandlerValue, HandlerView};
use blockmason_elements::cloud::ledger;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Show what a disk in a bucket has cost, by day and operation.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason bill
  mason bill --graph cloud --month 2026-11
  mason bill --ledger vm1.ledger
  mason bill --ledger vm1.ledger --prices none,put=0.0045,get=0.00036,month=0.015
  mason bill --json | jq .month.forecast

It is counted by the element `meter`, at its prices: `mason elements meter`. The days are those of UTC. The provider's bill is
the one that counts.")]
pub(crate) struct Args {
    /// The meter [default: the only one of the graph]
    element: Option<String>,

    /// The graph's name, or the path of its file [default: the only one]
    #[arg(long, value_name = "GRAPH")]
    graph: Option<String>,

    #[command(flatten)]
    control: ControlArgs,

    /// Reads the ledger in this file, and asks no daemon
    #[arg(long, value_name = "FILE", conflicts_with_all = ["element", "graph", "control"])]
    ledger: Option<PathBuf>,

    /// The days of this month, as 2026-11 [default: of the present one; with --json all days]
    #[arg(long, value_name = "MONTH", value_parser = month)]
    month: Option<String>,

    /// Other prices: `s3_standard` or `none`, and in dollars `put=` and `get=` for 1000, `month=` for a GB stored,
    /// `out=` for a GB fetched; with commas in between [default: those of the meter]
    #[arg(long, value_name = "PRICES", value_parser = prices)]
    prices: Option<String>,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

fn month(text: &str) -> Result<String, String> {
    ledger::check_month(text).map(|()| text.to_owned())
}

fn prices(text: &str) -> Result<String, String> {
    ledger::check_prices(text).map(|()| text.to_owned())
}

pub(crate) fn main(args: &Args) -> Outcome {
    let mut bill = match &args.ledger {
        Some(file) => {
            let bill = ledger::read(file, args.prices.as_deref());
            bill.map_err(|error| Failure::from_error(&error))?
        }
        None => ask(args)?,
    };
    if args.month.is_some() || !args.json {
        let month = args.month.clone().unwrap_or_else(|| text(&bill["month"]["month"]));
        if let Some(days) = bill["days"].as_array_mut() {
            days.retain(|day| text(&day["date"]).starts_with(&month));
        }
    }
    if args.json { output::json(&bill) } else { output::text(&drawn(&bill, args.month.as_deref())) }
}

/// The bill of a running meter.
fn ask(args: &Args) -> Outcome<Value> {
    let (client, _) = args.control.connect()?;
    let graph = find::graph(&client, args.graph.as_deref())?;
    let element = meter(&client, &graph.name, args.element.as_deref())?;
    let bill = path(&["v1", "graphs", &graph.name, "elements", &element, "handlers", "bill"]);
    let argument = HandlerArgument { argument: args.prices.clone().unwrap_or_default() };
    let answer: HandlerValue = client.post(&bill, &argument)?;
    let wrong =
        || Failure::new(format!("{} gives no bill that this program understands", printable(&element)));
    let mut bill: Value = serde_json::from_str(&answer.value).map_err(|_| wrong())?;
    let known = bill.as_object_mut().ok_or_else(wrong)?;
    known.insert("graph".to_owned(), json!(graph.name));
    known.insert("element".to_owned(), json!(element));
    Ok(bill)
}

/// The name of the meter that is meant.
fn meter(client: &Client, graph: &str, wanted: Option<&str>) -> Outcome<String> {
    let handlers: Vec<HandlerView> = client.get(&path(&["v1", "graphs", graph, "handlers"]))?;
    let bills = handlers.iter().filter(|handler| handler.handler == "bill" && handler.access == "call");
    let meters: Vec<_> = bills.map(|handler| handler.element.as_str()).collect();
    let graph = printable(graph);
    let names = printable(&meters.join(", "));
    match (wanted, &meters[..]) {
        (Some(wanted), _) if meters.contains(&wanted) => Ok(wanted.to_owned()),
        (None, [only]) => Ok((*only).to_owned()),
        (_, []) => {
            Err(Failure::new(format!("{graph} has no meter: `mason elements meter` says how to put one in")))
        }
        (Some(wanted), _) => Err(Failure::new(format!("{wanted} is no meter of {graph}, but {names}"))),
        (None, _) => Err(Failure::Usage(format!("{graph} has several meters, name one: {names}"))),
    }
}

fn text(value: &Value) -> String {
    printable(value.as_str().unwrap_or_default())
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn dollars(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// In the order in which they are shown.
const OPERATIONS: [&str; 5] = ["put", "get", "head", "list", "delete"];

/// The rows of a day.
fn rows(day: &Value) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut row = |what: &str, requests: String, bytes: u64, cost: f64| {
        let date = if rows.is_empty() { text(&day["date"]) } else { String::new() };
        let bytes = if bytes > 0 { Bytes(bytes).to_string() } else { String::new() };
        rows.push(vec![date, what.to_owned(), requests, bytes, format!("{cost:.4}")]);
    };
    for name in OPERATIONS {
        let line = &day["operations"][name];
        if number(&line["requests"]) > 0 {
            row(
                name,
                number(&line["requests"]).to_string(),
                number(&line["bytes"]),
                dollars(&line["dollars"]),
            );
        }
    }
    let storage = &day["storage"];
    row("stored", String::new(), number(&storage["bytes"]), dollars(&storage["dollars"]));
    row("all", String::new(), 0, dollars(&day["dollars"]));
    rows
}

fn drawn(bill: &Value, month: Option<&str>) -> String {
    let days = bill["days"].as_array().map_or(&[][..], Vec::as_slice);
    let mut out = String::new();
    if !days.is_empty() {
        let head = ["day", "operation", "requests", "bytes", "dollars"];
        out += &table(&head, days.iter().flat_map(rows).collect(), 2..5);
        out.push('\n');
    }
    let mut line = |what: &str, value: String| out += &format!("  {what:<12}{value}\n");
    match month.filter(|month| text(&bill["month"]["month"]) != *month) {
        Some(month) => {
            // A sum of nothing would be -0.
            let sum = days.iter().fold(0.0, |sum, day| sum + dollars(&day["dollars"]));
            line(month, format!("{sum:.4} $"));
        }
        None => {
            line("today", format!("{:.4} $", dollars(&bill["today"]["dollars"])));
            let forecast = bill["month"]["forecast"].as_f64();
            let forecast = forecast.map(|sum| format!(", {sum:.2} $ at its end if it goes on so"));
            let spent = dollars(&bill["month"]["dollars"]);
            line("this month", format!("{spent:.4} ${}", forecast.unwrap_or_default()));
            line("stored", Bytes(number(&bill["stored"])).to_string());
        }
    }
    let prices = &bill["prices"];
    let price = |name: &str| format!("{name}={}", dollars(&prices[name]));
    line("prices", ["put", "get", "month", "out"].map(price).join(" "));
    let steps: Vec<_> = bill["steps"].as_array().into_iter().flatten().map(text).collect();
    if !steps.is_empty() {
        let raised = ["day", "month"].map(|period| (period, dollars(&bill["raised"][period])));
        let raised = raised.into_iter().filter(|(_, by)| *by > 0.0);
        let raised: String = raised.map(|(period, by)| format!("; {by} $ more this {period}")).collect();
        line("budget", format!("{}{raised}; now: {}", steps.join(", "), text(&bill["state"])));
    }
    out
}
