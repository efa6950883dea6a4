//! Random texts: nothing panics, and what is printed reads back.

use super::*;
use proptest::prelude::*;

/// Pieces of graph files, in an order that makes no sense.
fn soup() -> impl Strategy<Value = String> {
    let token = prop_oneof![
        Just("element"),
        Just("compound"),
        Just("param"),
        Just("include"),
        Just("port"),
        Just("type"),
        Just("("),
        Just(")"),
        Just("{"),
        Just("}"),
        Just(","),
        Just("->"),
        Just("="),
        Just("\""),
        Just("\\"),
        Just("${"),
        Just("${A}"),
        Just("$"),
        Just("#"),
        Just("\n"),
        Just("A"),
        Just("B"),
        Just("file"),
        Just("nbd"),
        Just("tee"),
        Just("element A (type nbd) (listen unix:x)"),
        Just("element B (type file) (path x)"),
        Just("A -> B"),
        Just("element C (type A)"),
        Just("compound A (B C=${B}) {"),
        Just("(type tee)"),
        Just("ü"),
        Just("\u{0}"),
        Just("param A = ${B}"),
        Just("port in = (A, in)"),
        Just("invariant \"x\":"),
        Just("every"),
        Just("no"),
        Just("write"),
        Just("path"),
        Just("A -> B passes file"),
        Just("invariant \"x\": no path A -> B"),
        Just("invariant \"x\": every write path any export -> B passes tee"),
        Just("or"),
        Just("any"),
        Just("4k"),
        Just("A.B"),
        Just("-"),
        Just("."),
    ];
    proptest::collection::vec((token, prop_oneof![Just(""), Just(" "), Just("\n")]), 0..60)
        .prop_map(|tokens| tokens.into_iter().flat_map(|(token, blank)| [token, blank]).collect())
}

fn survives(text: &str) {
    let mut defines = Defines::new();
    defines.set("A", "x", "/");
    match parse_in(&NoFiles, text, &defines) {
        Ok(spec) => {
            let _ = check(&spec, CATALOGUE).map_err(|errors| (errors.to_string(), errors.to_json()));
        }
        Err(errors) => {
            assert!(errors.count() > 0);
            assert!(errors.to_string().contains("mason::"));
            let _ = errors.to_json();
        }
    }
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-zA-Z0-9/._:#=$-]{0,12}", "[ -~]{0,12}", any::<String>().prop_map(printable)]
}

/// What a value can hold: no control characters but tabs and line ends.
fn printable(text: String) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// Elements by number, with keys and values, and edges between them.
type Graph = (Vec<Vec<(String, Vec<String>)>>, Vec<(usize, String, usize, String)>);

fn graph() -> impl Strategy<Value = Graph> {
    let name = || "[a-zA-Z_][a-zA-Z0-9_-]{0,6}";
    let settings = proptest::collection::vec((name(), proptest::collection::vec(text(), 0..4)), 0..4);
    let elements = proptest::collection::vec(settings, 1..6);
    let edge = (any::<prop::sample::Index>(), name(), any::<prop::sample::Index>(), name());
    (elements, proptest::collection::vec(edge, 0..8)).prop_map(|(elements, edges)| {
        let count = elements.len();
        let edge = |(from, out, to, into): (prop::sample::Index, _, prop::sample::Index, _)| {
            (from.index(count), out, to.index(count), into)
        };
        (elements, edges.into_iter().map(edge).collect())
    })
}

fn build((elements, edges): Graph) -> Spec {
    let context = Arc::new(params::Context { folder: "/srv".into(), scope: String::new() });
    let value = |text: String| Value {
        text,
        span: Span::default(),
        origin: None,
        context: context.clone(),
        target: None,
    };
    let entry = |(key, values): (String, Vec<String>)| Entry {
        key,
        span: Span::default(),
        values: values.into_iter().map(value).collect(),
    };
    let element = |(index, settings): (usize, Vec<(String, Vec<String>)>)| {
        let entries = settings.into_iter().filter(|(key, _)| key != "type").map(entry).collect();
        ElementSpec {
            name: format!("E{index}.x-{index}"),
            ty: String::from("some_type"),
            ty_span: Span::default(),
            span: Span::default(),
            via: None,
            params: Params { entries, span: Span::default() },
        }
    };
    let edge =
        |(from, from_port, to, to_port)| EdgeSpec { from, from_port, to, to_port, span: Span::default() };
    Spec {
        elements: elements.into_iter().enumerate().map(element).collect(),
        edges: edges.into_iter().map(edge).collect(),
        invariants: Vec::new(),
        sources: Arc::new(Sources::default()),
    }
}

proptest! {
    #[test]
    fn any_text_survives(text in any::<String>()) {
        survives(&text);
    }

    #[test]
    fn any_bytes_survive(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        survives(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn any_tokens_survive(text in soup()) {
        survives(&text);
    }

    #[test]
    fn what_is_printed_reads_back(graph in graph()) {
        let spec = build(graph);
        let printed = print(&spec, CATALOGUE, "/srv".as_ref());
        let again = parse(&printed).map_err(|errors| TestCaseError::fail(format!("{errors}\n{printed}")))?;
        prop_assert_eq!(again, spec);
    }
}
