//! `/metrics`, held against a strict reading of the text format, version 0.0.4.

use crate::harness::{Home, MASON};
use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

/// A sample: its name, labels and value.
type Sample = (String, BTreeMap<String, String>, f64);

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == ':')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (key, after) = rest.split_once("=\"")?;
            let mut value = String::new();
            let mut chars = after.char_indices();
            let end = loop {
                match chars.next()? {
                    (at, '"') => break at,
                    (_, '\\') => value.push(match chars.next()?.1 {
                        'n' => '\n',
                        c @ ('\\' | '"') => c,
                        _ => return None,
                    }),
                    (_, c) => value.push(c),
                }
            };
            if !is_name(key) || key.contains(':') || labels.insert(key.to_owned(), value).is_some() {
                return None;
            }
            rest = &after[end + 1..];
            match rest.strip_prefix(',') {
                Some(more) => rest = more,
                None => break,
            }
        }
        rest = rest.strip_prefix('}')?;
    }
    let value = rest.strip_prefix(' ')?.parse().ok()?;
    is_name(name).then(|| (name.to_owned(), labels, value))
}

/// Every sample, having checked what a strict reader checks: families in one piece, each with one HELP and
/// one TYPE before its samples, names that fit the type, no series twice, histograms that add up.
fn parse(text: &str) -> Vec<Sample> {
    assert!(text.ends_with('\n'));
    let (mut families, mut series) = (HashSet::new(), HashSet::new());
    let (mut family, mut ty) = (String::new(), String::new());
    let mut samples = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            family = help.split_once(' ').unwrap().0.to_owned();
            assert!(is_name(&family) && family.starts_with("mason_"), "{line}");
            assert!(families.insert(family.clone()), "twice: {line}");
            let (name, of) = lines.next().unwrap().strip_prefix("# TYPE ").unwrap().split_once(' ').unwrap();
            assert_eq!(name, family);
            of.clone_into(&mut ty);
            assert!(["counter", "gauge", "histogram"].contains(&of), "{of}");
            assert_eq!(family.ends_with("_total"), ty == "counter", "{family}");
            continue;
        }
        let (name, labels, value) = sample(line).unwrap_or_else(|| panic!("{line}"));
        let rest = name.strip_prefix(&family).unwrap_or_else(|| panic!("{name} among {family}"));
        match ty.as_str() {
            "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&rest), "{name}"),
            _ => assert_eq!(rest, "", "{name}"),
        }
        assert!(value >= 0.0, "{line}");
        assert!(series.insert((name.clone(), labels.clone())), "twice: {line}");
        samples.push((name, labels, value));
    }
    check_histograms(&samples);
    samples
}

fn check_histograms(samples: &[Sample]) {
    let mut counts = BTreeMap::new();
    for (name, labels, value) in samples {
        let Some(family) = name.strip_suffix("_bucket") else { continue };
        let mut labels = labels.clone();
        let le: f64 = labels.remove("le").unwrap().parse().unwrap();
        let (last_le, last) = counts.insert((family.to_owned(), labels), (le, *value)).unwrap_or((0.0, 0.0));
        assert!(le > last_le && *value >= last, "{name} {le}");
    }
    for (name, labels, value) in samples {
        let Some(family) = name.strip_suffix("_count") else { continue };
        let (le, last) = counts.remove(&(family.to_owned(), labels.clone())).unwrap();
        assert!(le.is_infinite() && last == *value, "{name}");
    }
    assert!(counts.is_empty());
}

fn value(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    let fits = |found: &&Sample| {
        found.0 == name && labels.iter().all(|(key, value)| found.1.get(*key).is_some_and(|v| v == value))
    };
    let found: Vec<_> = samples.iter().filter(fits).collect();
    assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
    found[0].2
}

#[test]
fn everything_is_counted() {
    let home = Home::new();
    std::fs::rename(home.memory_graph("vm"), home.path("vm \"1\".mason")).unwrap();
    let daemon = home.run(&["vm \"1\".mason", "--control", "c.sock"], 1);
    let mut client = home.nbd_client("vm.nbd");
    for _ in 0..3 {
        client.read(0, 4096).unwrap();
    }
    let answer = home.ask("c.sock", "GET", "/metrics", "");
    let (head, text) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
    let samples = parse(text);
    let vm = ("graph", "vm \"1\"");
    let read = ("operation", "read");
    assert_eq!(value(&samples, "mason_edge_requests_total", &[vm, ("from", "Guest"), read]), 3.0);
    assert_eq!(value(&samples, "mason_edge_bytes_total", &[vm, ("to", "Disk"), read]), 12288.0);
    for element in ["Guest", "Disk"] {
        assert_eq!(value(&samples, "mason_element_requests_total", &[("element", element), read]), 3.0);
    }
    let export = [vm, ("element", "Guest"), read];
    assert_eq!(value(&samples, "mason_source_latency_seconds_count", &export), 3.0);
    assert!(value(&samples, "mason_source_latency_seconds_sum", &export) > 0.0);
    assert_eq!(value(&samples, "mason_source_errors_total", &export), 0.0);
    assert_eq!(value(&samples, "mason_graph_failed", &[vm]), 0.0);
    assert_eq!(value(&samples, "mason_build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);
    drop(client);
    daemon.stop().done();
}

#[test]
fn over_tcp_there_is_nothing_else() {
    let home = Home::new();
    home.memory_graph("vm");
    let mut command = home.command(MASON, &["run", "vm.mason", "--metrics", "tcp:127.0.0.1:0", "-v"]);
    let mut child = command.spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("metrics are at tcp:") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "it says where");
    }
    let address = line.rsplit_once("tcp:").unwrap().1.trim().to_owned();
    let mut ready = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    let get = |path: &str| {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream
            .write_all(format!("GET {path} HTTP/1.1\r\nhost: m\r\nconnection: close\r\n\r\n").as_bytes())
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = get("/metrics");
    parse(answer.split_once("\r\n\r\n").unwrap().1);
    for path in ["/v1/status", "/v1/graphs", "/v1/events?follow=true"] {
        assert!(get(path).starts_with("HTTP/1.1 404"), "{path}");
    }
    let taken = home.mason(&["run", "vm.mason", "--metrics", &format!("tcp:{address}")]).failed();
    assert!(taken.contains(&format!("tcp:{address}: the metrics cannot be served there")), "{taken}");
    assert!(home.mason(&["run", "vm.mason", "--metrics", "9100"]).misused().contains("tcp:127.0.0.1:9100"));
    child.kill().unwrap();
    child.wait().unwrap();
}
