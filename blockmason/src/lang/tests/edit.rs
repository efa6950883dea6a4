//! Single edits of a graph.

use super::*;

const GRAPH: &str = "element Guest (type nbd) (listen unix:vm.sock) element Tee (type tee)
    element Log (type debug_log) element Old (type file) (path a.img) element New (type file) (path b.img)
    Guest -> Log -> Tee (Tee, old) -> Old (Tee, new) -> New";

fn edited(edits: &[Edit]) -> Result<Spec, Diagnostics> {
    let spec = parse(GRAPH).unwrap();
    check(&spec, CATALOGUE).unwrap();
    edit(&spec, edits, "vm (edited)", Path::new("/home"), CATALOGUE)
}

/// The edges of the graph after an edit, or what is wrong with it.
fn edges(edits: &[Edit]) -> String {
    match edited(edits) {
        Ok(spec) => spec.edges.iter().map(|edge| spec.edge_text(edge)).collect::<Vec<_>>().join("; "),
        Err(errors) => errors.first_line(),
    }
}

fn text(text: &str) -> String {
    text.to_owned()
}

fn insert(element: &str, above: &str, below: &str) -> Edit {
    Edit::Insert { element: text(element), above: text(above), below: text(below) }
}

fn replace(element: &str, by: &str) -> Edit {
    Edit::Replace { element: text(element), by: text(by) }
}

fn remove(element: &str) -> Edit {
    Edit::Remove { element: text(element) }
}

const BEFORE: &str = "Guest -> Log; Log -> Tee; (Tee, old) -> Old; (Tee, new) -> New";

#[test]
fn no_edit_changes_nothing() {
    assert_eq!(edges(&[]), BEFORE);
    let spec = parse(GRAPH).unwrap();
    assert_eq!(edited(&[]).unwrap().elements.len(), spec.elements.len());
    // Paths mean what they meant, wherever the edit comes from.
    let path = edited(&[]).unwrap().elements[3].params.get("path").unwrap()[0].text().to_owned();
    assert_eq!(path, "/srv/a.img");
}

#[test]
fn elements_are_inserted_into_edges() {
    let with = "Guest -> Log; Log -> P; (Tee, old) -> Old; (Tee, new) -> New; P -> Tee";
    assert_eq!(edges(&[insert("element P (type debug_log)", "Log", "Tee")]), with);
    assert_eq!(edges(&[insert("P (type debug_log)", "(Log, out)", "Tee")]), with);
    assert_eq!(edges(&[insert("debug_log", "Log", "Tee")]), with.replace("P", "DebugLog"));
    let twice = edges(&[insert("debug_log", "Log", "Tee"), insert("debug_log", "Log", "DebugLog")]);
    assert!(twice.contains("Log -> DebugLog2") && twice.contains("DebugLog2 -> DebugLog"), "{twice}");
    assert_eq!(
        edges(&[insert("debug_log", "(Tee, new)", "New")]),
        "Guest -> Log; Log -> Tee; (Tee, old) -> Old; (Tee, new) -> DebugLog; DebugLog -> New"
    );
    assert_eq!(
        edges(&[insert("debug_log", "Guest", "Tee")]),
        "edit:1:1: there is no edge Guest -> Tee (from Guest lead: Guest -> Log)"
    );
    assert_eq!(
        edges(&[insert("(type debug_log)", "Guest", "Log")]),
        "edit:1:9: expected the element's name, found `(`"
    );
}

#[test]
fn what_led_to_an_element_that_goes_leads_on() {
    assert_eq!(edges(&[remove("Log")]), "Guest -> Tee; (Tee, old) -> Old; (Tee, new) -> New");
    // A leg of a variadic element goes with its sink.
    assert_eq!(edges(&[remove("New")]), "Guest -> Log; Log -> Tee; (Tee, old) -> Old");
    assert_eq!(
        edges(&[remove("Tee")]),
        "edit:1:1: Log leads to Tee, and would lead nowhere (connect Log to something else in the same command)"
    );
    assert_eq!(edges(&[remove("Lug")]), "edit:1:1: there is no element Lug (did you mean `Log`?)");
    assert!(edges(&[remove("Guest")]).contains("the graph has no export"));
}

#[test]
fn edges_come_and_go_and_what_nothing_reaches_goes_along() {
    let connect = |edge: &str| Edit::Connect { edge: text(edge) };
    let disconnect = |edge: &str| Edit::Disconnect { edge: text(edge) };
    assert_eq!(edges(&[disconnect("(Tee, new) -> New")]), "Guest -> Log; Log -> Tee; (Tee, old) -> Old");
    assert_eq!(edited(&[disconnect("(Tee, new) -> New")]).unwrap().find("New"), None);
    assert_eq!(edges(&[connect("Log -> Old")]), "Guest -> Log; Log -> Old");
    assert_eq!(edges(&[connect("(Tee, more) -> Old")]), format!("{BEFORE}; (Tee, more) -> Old"));
    assert_eq!(
        edges(&[disconnect("Log -> Old")]),
        "edit:1:1: there is no such edge (from Log lead: Log -> Tee)"
    );
    assert!(edges(&[connect("Log")]).starts_with("edit:1:1: `Log` begins no statement"));
    assert!(
        edges(&[connect("Log -> Nowhere")]).contains("no element"),
        "{}",
        edges(&[connect("Log -> Nowhere")])
    );
}

#[test]
fn an_element_makes_room_for_others() {
    let by = "element Both (type linear) element Low (type throttle) (rate 1M/s) (Both, a) -> Low -> Old (Both, b) -> Old";
    assert_eq!(
        edges(&[replace("Old", by)]),
        "Guest -> Log; Log -> Tee; (Tee, old) -> Both; (Tee, new) -> New; (Both, a) -> Low; Low -> Old; (Both, b) -> Old"
    );
    // And back.
    let spec = edited(&[replace("Old", by)]).unwrap();
    let back = edit(
        &spec,
        &[remove("Low"), Edit::Connect { edge: text("(Tee, old) -> Old") }],
        "vm",
        Path::new("/"),
        CATALOGUE,
    );
    let back = back.unwrap();
    assert_eq!(back.edges.len(), 4);
    assert_eq!(edges(&[replace("Log", "element T (type throttle) (rate 1M/s)")]), BEFORE.replace("Log", "T"));
    assert_eq!(edges(&[replace("New", "element N (type null)")]), BEFORE.replace("New", "N"));
    let anew = edited(&[replace("New", "(type null)")]).unwrap();
    assert_eq!(anew.elements[anew.find("New").unwrap()].ty, "null");
}

#[test]
fn more_statements_and_what_is_wrong_with_them() {
    let add = |more: &str| Edit::Add { text: text(more) };
    assert_eq!(
        edges(&[add("element P (type debug_log) Log -> P -> Tee")]),
        "Guest -> Log; Log -> P; (Tee, old) -> Old; (Tee, new) -> New; P -> Tee"
    );
    assert!(
        edges(&[add("element P (type debug_log) P -> Tee")]).contains("reaches"),
        "an element that nothing reaches"
    );
    assert!(edges(&[add("element Log (type debug_log)")]).contains("Log"));
    assert!(edges(&[add("include \"x.mason\"")]).contains("includes no file"));
    assert!(edges(&[add("element P (type probe) Log -> P -> Tee")]).contains("probe"));
    let kept = edited(&[add("invariant \"kept\": every path Guest -> Old passes debug_log")]).unwrap();
    assert_eq!(kept.invariants.len(), 1);
    let broken = edit(&kept, &[remove("Log")], "vm", Path::new("/"), CATALOGUE).unwrap_err();
    assert!(broken.to_string().contains("kept"), "{broken}");
}

proptest::proptest! {
    /// Whatever an edit says, it makes a good graph or an error.
    #[test]
    fn no_edit_panics(words in proptest::collection::vec("[A-Za-z(), >\"${}#-]{0,20}|element |Guest|Tee| -> |\\(type null\\)", 0..8), kind in 0..6) {
        let all = words.concat();
        let first = words.first().cloned().unwrap_or_default();
        let edit = match kind {
            0 => Edit::Add { text: all },
            1 => Edit::Remove { element: all },
            2 => Edit::Connect { edge: all },
            3 => Edit::Disconnect { edge: all },
            4 => Edit::Insert { element: all, above: first.clone(), below: first },
            _ => Edit::Replace { element: first, by: all },
        };
        let _ = edited(&[edit]);
    }
}
