//! Texts that ask for too much.

use super::*;
use std::fmt::Write;

/// The codes of the errors, each once.
fn codes(text: &str) -> Vec<&'static str> {
    let errors = parse(text).unwrap_err();
    let mut codes: Vec<_> = errors.iter().map(|error| error.code).collect();
    codes.sort();
    codes.dedup();
    codes
}

#[test]
fn ten_thousand_elements() {
    let mut text = String::new();
    for i in 0..10_000 {
        match i % 500 {
            0 => writeln!(text, "element E{i} (type nbd) (listen unix:/s{i})\nE{i} -> E{}", i + 1),
            499 => writeln!(text, "element E{i} (type null)"),
            _ => writeln!(text, "element E{i} (type debug_log) (logfile log{i})\nE{i} -> E{}", i + 1),
        }
        .unwrap();
    }
    let spec = parse(&text).unwrap();
    assert_eq!(spec.elements.len(), 10_000);
    check(&spec, CATALOGUE).unwrap();
}

#[test]
fn chains_that_would_overflow_a_stack() {
    for (length, fits) in [(999, true), (1000, false), (5000, false)] {
        let mut text = String::from("element Guest (type nbd) (listen unix:/s)\nGuest -> E0\n");
        for i in 0..length {
            writeln!(text, "element E{i} (type debug_log) (logfile log)\nE{i} -> E{}", i + 1).unwrap();
        }
        writeln!(text, "element E{length} (type null)").unwrap();
        let checked = check(&parse(&text).unwrap(), CATALOGUE);
        assert_eq!(checked.is_ok(), fits, "{length}");
    }
}

#[test]
fn a_hundred_errors_are_kept() {
    let mut text = String::new();
    for i in 0..5_000 {
        writeln!(text, "element Element{i} (type null)\nElement{i} -> Elemnt{i}").unwrap();
    }
    let errors = parse(&text).unwrap_err();
    assert_eq!((errors.iter().count(), errors.count()), (100, 5_000));
    assert!(errors.to_string().ends_with("5000 errors, the first 100 are shown\n"));
}

#[test]
fn compounds_nested_too_deep() {
    let deep = "compound C () { ".repeat(5_000);
    assert_eq!(codes(&deep), ["mason::syntax", "mason::too-large"]);
}

#[test]
fn compounds_that_explode() {
    let mut text = String::from("compound C0 () { element A (type null) }\n");
    for i in 1..12 {
        let inner: String = (0..10).map(|j| format!("element E{j} (type C{}) ", i - 1)).collect();
        writeln!(text, "compound C{i} () {{ {inner} }}").unwrap();
    }
    text.push_str("element X (type C11)");
    assert_eq!(codes(&text), ["mason::too-large"]);
}

#[test]
fn parameters_that_explode() {
    let mut text = String::from("param p0 = xxxxxxxxxxxxxxxx\n");
    for i in 1..15 {
        writeln!(text, "param p{i} = {}", format!("${{p{}}}", i - 1).repeat(16)).unwrap();
    }
    assert_eq!(codes(&text), ["mason::too-large"]);
}

#[test]
fn parameters_that_need_too_many() {
    let mut text = String::from("param p99 = x\n");
    for i in 0..99 {
        writeln!(text, "param p{i} = ${{p{}}}", i + 1).unwrap();
    }
    assert_eq!(codes(&text), ["mason::param-cycle"]);
}

#[test]
fn values_that_fill_memory() {
    let value = "x".repeat(60 << 10);
    let elements: String =
        (0..1000).map(|i| format!("element E{i} (type null) (v ${{v}} ${{v}}) ")).collect();
    assert_eq!(codes(&format!("param v = {value}\n{elements}")), ["mason::too-large"]);
}

#[test]
fn compounds_that_waste_time() {
    let params: String = (0..2_000).map(|i| format!("param p{i} = x\n")).collect();
    let uses: String = (0..50_000).map(|i| format!("element E{i} (type C)\n")).collect();
    assert_eq!(codes(&format!("compound C () {{ {params} }}\n{uses}")), ["mason::too-large"]);
}

#[test]
fn files_that_are_too_large() {
    assert_eq!(codes(&" ".repeat((4 << 20) + 1)), ["mason::too-large"]);
    parse(&" ".repeat(4 << 20)).unwrap();
}

/// Every file includes another one.
struct Endless;

impl Files for Endless {
    fn read(&self, path: &Path) -> io::Result<String> {
        Ok(format!("include \"{}x\"", path.file_name().unwrap_or_default().display()))
    }
}

#[test]
fn includes_without_end() {
    let errors = parse_in(&Endless, "include \"x\"", &Defines::new()).unwrap_err();
    assert_eq!(errors.iter().map(|error| error.code).collect::<Vec<_>>(), ["mason::too-large"]);
}

#[test]
fn terminals_are_safe() {
    let shown = errors("element A (type \u{1b}]0;x\u{7} \u{9b}31m)\n");
    assert!(!shown.contains(|c: char| c.is_control() && c != '\n'), "{shown:?}");
}

/// Texts that make a careless parser, expander or drawing slow, deep or wide.
#[test]
fn large_nonsense_is_answered() {
    let texts = [
        "element a (b\n".repeat(40_000),
        format!("element a (b\n{}", "element c\n".repeat(40_000)),
        "x".repeat(500_000),
        format!("element a (type {})", "x".repeat(500_000)),
        format!("element {} (type y) a -> b", "x".repeat(500_000)),
        format!("element {} (type y) a -> b", "x.".repeat(200_000)),
        "\"".repeat(500_000),
        format!("element a (v {})", "$".repeat(500_000)),
        format!("element a (v {})", "${".repeat(200_000)),
        format!("element a (v \"{}\")", "${a}".repeat(100_000)),
        format!("element a (v {})", "a ".repeat(200_000)),
        format!("element a {}", "(v)".repeat(200_000)),
        format!("element a (type null) {}a", "a -> ".repeat(100_000)),
        format!("element a (type tee) {}", "(a, b) -> a ".repeat(40_000)),
        "element a (type null)\n".repeat(20_000),
        (0..20_000).map(|i| format!("aaaaaa{i} -> b{i}\n")).collect(),
        "include \"x\"\n".repeat(40_000),
        (0..20_000).map(|i| format!("param p{i} = ${{p{}}}\n", i / 2 + 7)).collect(),
        "element a (type null) a -> bbb ".repeat(20_000),
        (0..20_000).map(|i| format!("element e{i} (type nuull)\n")).collect(),
    ];
    for text in texts {
        let shown = errors(&text);
        assert!(shown.starts_with("mason::") && shown.len() < 100_000, "{}", &text[..40]);
    }
}
