//! Invariants that hold, and a naive reading of what they say: every path, one by one.

use super::*;
use crate::describe::{Carries, find};
use proptest::prelude::*;

const GRAPH: &str = "
    element Guest (type nbd) (listen unix:/s)
    element Backup (type nbd) (listen unix:/t)
    element Log (type debug_log)
    element Sealed (type readonly)
    element Disk (type file) (path disk.img)
    Guest -> Log -> Disk
    Backup -> Sealed -> Disk
";

/// What is said of `GRAPH` with one more statement.
fn with(rule: &str) -> String {
    errors(&format!("{GRAPH} invariant \"x\": {rule}\n"))
}

#[test]
fn rules_that_hold() {
    for rule in [
        "every path Guest -> Disk passes Log",
        "every path Guest -> Disk passes debug_log",
        "every path Guest -> Disk passes debug.log",
        "every path any nbd -> any file passes any debug_log or readonly",
        "every write path export -> sink passes debug_log",
        "every path Guest -> sink passes export",
        "every path export -> Disk passes Disk",
        "no path Guest -> Sealed",
        "no write path Backup -> Disk",
        "no write path Backup -> Sealed",
        "no path Guest -> Disk passes readonly",
        "no path Disk -> Guest",
        "no write path export -> sink passes Sealed",
        "every path Guest\n-> # to the disk\nDisk passes Log",
    ] {
        assert_eq!(with(rule), "fine", "{rule}");
    }
}

#[test]
fn rules_that_do_not_hold() {
    for (rule, path) in [
        ("every path export -> Disk passes Log", "Backup -> Sealed -> Disk"),
        ("every read path export -> sink passes debug_log", "Backup -> Sealed -> Disk"),
        ("no path Guest -> Disk", "Guest -> Log -> Disk"),
        ("no write path export -> file", "Guest -> Log -> Disk"),
        ("no read path Backup -> sink passes readonly", "Backup -> Sealed -> Disk"),
        ("no path Log -> Disk", "Log -> Disk"),
        ("no path Guest -> Disk passes file", "Guest -> Log -> Disk"),
    ] {
        let shown = with(rule);
        assert!(shown.contains(&format!("does not hold: {path}\n")), "{rule}: {shown}");
    }
}

/// A word of the rule is a name again where the next statement begins.
#[test]
fn words_of_rules_are_names_too() {
    let text = "element passes (type nbd) (listen unix:/s) element or (type null) element every (type nbd) (listen unix:/s)
        invariant \"one\": no path or -> passes passes -> or
        invariant \"two\": every path passes -> or passes passes or or
        every -> or";
    let spec = parse(text).unwrap();
    check(&spec, CATALOGUE).unwrap();
    assert_eq!((spec.edges.len(), spec.invariants.len()), (2, 2));
    assert_eq!(spec.invariants[0].passes, []);
    assert_eq!(spec.invariants[1].passes.len(), 2);
}

#[test]
fn invariants_are_part_of_the_graph() {
    let spec = |rule: &str| parse(&format!("{GRAPH} param who = nobody invariant {rule}")).unwrap();
    let one = spec("\"${who} \\\"writes\\\"\": no write path Backup -> any file");
    assert_eq!(one.invariants[0].sentence, "nobody \"writes\"");
    assert_eq!(one, spec("\"nobody \\\"writes\\\"\": no write path Backup -> file"));
    assert_ne!(one, spec("\"nobody \\\"writes\\\"\": no path Backup -> file"));
    assert_ne!(one, spec("\"nobody \\\"writes\\\"\": no write path Guest -> file"));
    assert_ne!(one, spec("\"somebody\": no write path Backup -> file"));
    assert_ne!(one, parse(GRAPH).unwrap());
}

/// Chains of diamonds have more paths than could be looked at.
#[test]
fn many_paths_take_no_longer() {
    let mut text = String::from("element G (type nbd) (listen unix:/s) element D (type null) G -> F0\n");
    for n in 0..400 {
        text += &format!("element F{n} (type filter)\nelement A{n} (type debug_log)\n");
        let next = if n == 399 { String::from("D") } else { format!("F{}", n + 1) };
        text += &format!("(F{n}, yes) -> A{n} -> {next}\n(F{n}, no) -> {next}\n");
    }
    assert_eq!(errors(&format!("{text} invariant \"x\": every path G -> D passes F399")), "fine");
    let shown = errors(&format!("{text} invariant \"x\": every path G -> D passes debug_log"));
    assert!(shown.contains("does not hold: G -> F0 -> F1 ->"), "{shown}");
    assert!(shown.contains("-> ... ->"), "{shown}");
}

#[test]
fn large_graphs_with_many_invariants_are_bounded() {
    let chain: String = (0..20_000)
        .map(|n| format!("element A{n} (type null) G{n} -> A{n}\nelement G{n} (type nbd) (listen unix:/s)\n"))
        .collect();
    let rules: String =
        (0..2000).map(|n| format!("invariant \"x\": no path export -> A{n} passes tee\n")).collect();
    let shown = errors(&format!("{chain}{rules}"));
    assert!(shown.starts_with("mason::too-large"), "{}", &shown[..200]);
    let rules: String = (0..10_001).map(|_| "invariant \"x\": no path A0 -> G0\n").collect();
    assert!(errors(&format!("{chain}{rules}")).contains("more than 10000 invariants"));
}

const TYPES: [&str; 5] = ["debug_log", "readonly", "tee", "linear", "tee"];

/// A graph without circles: each element's type, and edges from lower to higher numbers.
fn graph() -> impl Strategy<Value = (Vec<usize>, Vec<(usize, usize)>)> {
    proptest::collection::vec(0..TYPES.len(), 2..9).prop_flat_map(|types| {
        let count = types.len();
        let edge = (0..count - 1).prop_flat_map(move |from| (Just(from), from + 1..count));
        (Just(types), proptest::collection::vec(edge, 0..30))
    })
}

fn group(count: usize) -> impl Strategy<Value = What> {
    prop_oneof![
        (0..count).prop_map(What::Element),
        prop::sample::select(&TYPES).prop_map(|kind| What::Any(kind.to_owned())),
        Just(What::Any(String::from("route"))),
    ]
}

fn invariant(count: usize) -> impl Strategy<Value = Invariant> {
    let paths = prop_oneof![Just(Paths::All), Just(Paths::Read), Just(Paths::Write)];
    let passes = proptest::collection::vec(group(count), 0..3);
    (any::<bool>(), paths, group(count), group(count), passes).prop_map(|(every, paths, from, to, passes)| {
        let group = |what| Group { what, span: Span::default() };
        Invariant {
            sentence: String::from("a \"rule\""),
            // Every path passes something.
            every: every && !passes.is_empty(),
            paths,
            from: group(from),
            to: group(to),
            passes: passes.into_iter().map(group).collect(),
            span: Span::default(),
            via: None,
            scope: String::new(),
        }
    })
}

/// The graph as a text: every element with a source above it, so that nothing else is wrong. Of a tee's
/// edges each has a name of its own; the other types have one out port, or two ends as a tee.
fn text((types, edges): &(Vec<usize>, Vec<(usize, usize)>)) -> String {
    let mut text = String::from("element End (type null)\n");
    for (n, ty) in types.iter().enumerate() {
        text += &format!(
            "element E{n} (type {}) element G{n} (type nbd) (listen unix:/s) G{n} -> E{n}\n",
            TYPES[*ty]
        );
        let outs: Vec<_> = edges.iter().filter(|(from, _)| *from == n).collect();
        match TYPES[*ty] {
            "tee" | "linear" => {
                text += &format!("(E{n}, end) -> End\n");
                text.extend(
                    outs.iter().enumerate().map(|(port, (_, to))| format!("(E{n}, p{port}) -> E{to}\n")),
                );
            }
            _ => text += &outs.first().map_or(format!("E{n} -> End\n"), |(_, to)| format!("E{n} -> E{to}\n")),
        }
    }
    text
}

/// Every path from `at` on, as lists of elements.
fn paths_from(spec: &Spec, at: usize, path: &mut Vec<usize>, found: &mut Vec<Vec<usize>>) {
    path.push(at);
    if path.len() > 1 {
        found.push(path.clone());
    }
    for edge in spec.edges.iter().filter(|edge| edge.from == at) {
        paths_from(spec, edge.to, path, found);
    }
    path.pop();
}

/// What an invariant says, word by word.
fn holds(spec: &Spec, invariant: &Invariant) -> bool {
    let is_in = |group: &Group, index: usize| match &group.what {
        What::Element(element) => *element == index,
        What::Any(kind) => {
            spec.elements[index].ty == *kind
                || find(CATALOGUE, &spec.elements[index].ty).unwrap().family.name() == kind
        }
    };
    let travels = |index: usize| {
        let ty = find(CATALOGUE, &spec.elements[index].ty).unwrap();
        let Carries { reads, writes } = (ty.carries)(&spec.elements[index].params);
        [true, reads, writes][invariant.paths as usize]
    };
    let mut all = Vec::new();
    (0..spec.elements.len()).for_each(|start| paths_from(spec, start, &mut Vec::new(), &mut all));
    all.retain(|path| {
        is_in(&invariant.from, path[0])
            && is_in(&invariant.to, path[path.len() - 1])
            && path.iter().all(|index| travels(*index))
    });
    let passes = |path: &Vec<usize>| {
        path.iter().any(|index| invariant.passes.iter().any(|group| is_in(group, *index)))
    };
    match (invariant.every, invariant.passes.is_empty()) {
        (true, _) => all.iter().all(passes),
        (false, true) => all.is_empty(),
        (false, false) => !all.iter().any(passes),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn the_checker_finds_what_a_list_of_all_paths_shows(
        (graph, invariant) in graph().prop_flat_map(|graph| { let count = graph.0.len() * 2 + 1; (Just(graph), invariant(count)) })
    ) {
        let mut spec = parse(&text(&graph)).unwrap();
        prop_assert!(check(&spec, CATALOGUE).is_ok());
        let names: Vec<String> = spec.elements.iter().map(|element| element.name.clone()).collect();
        let empty = |group: &Group| matches!(&group.what, What::Any(kind) if kind != "route" && spec.elements.iter().all(|element| element.ty != *kind));
        let vacuous = empty(&invariant.from) || empty(&invariant.to);
        let holds = holds(&spec, &invariant);
        spec.invariants.push(invariant);
        let printed = print(&spec, CATALOGUE, "/srv".as_ref());
        prop_assert_eq!(&parse(&printed).unwrap(), &spec, "{}", printed);
        match check(&spec, CATALOGUE) {
            Ok(()) => prop_assert!(holds && !vacuous, "{}", printed),
            Err(errors) => {
                let error = errors.iter().next().unwrap();
                prop_assert_eq!(error.code == "mason::vacuous-invariant", vacuous, "{} {}", errors, printed);
                prop_assert!(vacuous || !holds, "{} {}", errors, printed);
                if let Some((_, path)) = error.message.split_once("does not hold: ") {
                    prop_assert!(path.split(" -> ").all(|name| name == "..." || names.iter().any(|n| n == name)));
                }
            }
        }
    }
}
