//! Graphs that are as they should be, and what they mean.

use super::*;

/// `A -> B` for every edge, with the ports.
fn edges(spec: &Spec) -> Vec<String> {
    let name = |index: usize| spec.elements[index].name.as_str();
    let edge = |e: &EdgeSpec| format!("{}.{} -> {}.{}", name(e.from), e.from_port, name(e.to), e.to_port);
    spec.edges.iter().map(edge).collect()
}

fn names(spec: &Spec) -> Vec<&str> {
    spec.elements.iter().map(|element| element.name.as_str()).collect()
}

const REST: &str = "element Guest (type nbd) (listen unix:vm.sock) Guest -> MyDebug
                    element LocalDisk (type file) (path disk.img)";

#[test]
fn the_papers_example() {
    let paper = "element MyDebug\n    (type debug_log)\n    (logfile /var/log/request.log)\n\n(MyDebug, out) -> (LocalDisk, in)\n";
    let spec = parse(&format!("{paper}{REST}")).unwrap();
    check(&spec, CATALOGUE).unwrap();
    assert_eq!(names(&spec), ["MyDebug", "Guest", "LocalDisk"]);
    assert_eq!(spec.elements[0].ty, "debug_log");
    assert_eq!(spec.place(&spec.elements[0]).to_string(), "vm.mason:1:9");
    assert_eq!(edges(&spec), ["MyDebug.out -> LocalDisk.in", "Guest.out -> MyDebug.in"]);
    let logfile = spec.elements[0].params.get("logfile").unwrap();
    assert_eq!(logfile[0].text(), "/var/log/request.log");
}

#[test]
fn the_papers_table() {
    let paper =
        "element MyDebug (type debug.log) (logfile /var/log/request.log) (MyDebug, out) -> (LocalDisk, in)";
    let spec = parse(&format!("{paper} {REST}")).unwrap();
    check(&spec, CATALOGUE).unwrap();
    assert_eq!(spec.elements[0].ty, "debug_log");
}

#[test]
fn chains_and_ports() {
    let text = "A->B -> C\nA -> (T, left) -> B\nA -> (B, in) -> C\n(A, x) -> (B, y)
        element A (type null) element B (type null) element C (type null) element T (type null)";
    let expected = [
        "A.out -> B.in",
        "B.out -> C.in",
        "A.out -> T.in",
        "T.left -> B.in",
        "A.out -> B.in",
        "B.out -> C.in",
        "A.x -> B.y",
    ];
    assert_eq!(edges(&parse(text).unwrap()), expected);
}

#[test]
fn words_strings_and_comments() {
    let text = "element A # a comment\n (type null)(uri nbd://h/x?a=b#c) (s \"a # \\\"b\\\" \\$ \\\\ ${k}\\n\") # (no)
        (list a b${k}c $ 5$) (dash a->b) (empty)\nparam k = \"two words\"\nparam-eter -> A\nelement param-eter (type null)";
    let spec = parse(text).unwrap();
    let values =
        |key: &str| spec.elements[0].params.get(key).unwrap().iter().map(Value::text).collect::<Vec<_>>();
    assert_eq!(values("uri"), ["nbd://h/x?a=b#c"]);
    assert_eq!(values("s"), ["a # \"b\" $ \\ two words\n"]);
    assert_eq!(values("list"), ["a", "btwo wordsc", "$", "5$"]);
    assert_eq!(values("dash"), ["a->b"]);
    assert!(values("empty").is_empty());
    assert_eq!(edges(&spec), ["param-eter.out -> A.in"]);
}

#[test]
fn keywords_are_names_too() {
    let spec = parse("element element (type null) element compound (type null) element -> compound").unwrap();
    assert_eq!(edges(&spec), ["element.out -> compound.in"]);
}

fn path(spec: &Spec, element: &str) -> String {
    let index = spec.find(element).unwrap();
    table::File::from(&spec.elements[index].params).unwrap().path.to_string()
}

#[test]
fn relative_paths_start_where_they_stand() {
    let files = Memory(&[(
        "/srv/lib/parts.mason",
        "param folder = images\nelement B (type file) (path b.img)\nelement C (type file) (path ${folder}/c.img)
         compound Disk (path) { element F (type file) (path ${path}) element G (type file) (path own.img) }",
    )]);
    let mut defines = Defines::new();
    defines.set("mine", "d.img", "/home/me");
    let text = "include \"lib/parts.mason\" element A (type file) (path a.img) element D (type file) (path ${mine})
        element E (type file) (path x/${mine}) element H (type Disk) (path h.img) element I (type Disk) (path ${mine})";
    let spec = parse_in(&files, text, &defines).unwrap();
    assert_eq!(path(&spec, "A"), "/srv/a.img");
    assert_eq!(path(&spec, "B"), "/srv/lib/b.img");
    assert_eq!(path(&spec, "C"), "/srv/lib/images/c.img");
    assert_eq!(path(&spec, "D"), "/home/me/d.img");
    assert_eq!(path(&spec, "E"), "/srv/x/d.img");
    assert_eq!(path(&spec, "H.F"), "/srv/h.img");
    assert_eq!(path(&spec, "H.G"), "/srv/lib/own.img");
    assert_eq!(path(&spec, "I.F"), "/home/me/d.img");
}

#[test]
fn the_nearest_parameter_wins() {
    let files = Memory(&[("/srv/lib.mason", "param a = lib\nparam b = lib\nparam c = lib")]);
    let mut defines = Defines::new();
    defines.set_from("a=given=1", "/").unwrap();
    let text =
        "element E (type null) (v ${a} ${b} ${c})\ninclude \"lib.mason\"\nparam a = file\nparam b = file";
    let spec = parse_in(&files, text, &defines).unwrap();
    let values: Vec<_> = spec.elements[0].params.get("v").unwrap().iter().map(Value::text).collect();
    assert_eq!(values, ["given=1", "file", "lib"]);
}

#[test]
fn a_file_included_twice_counts_once() {
    let files = Memory(&[
        ("/srv/a.mason", "include \"c.mason\""),
        ("/srv/b.mason", "include \"./c.mason\""),
        ("/srv/c.mason", "element C (type null)"),
    ]);
    let spec = parse_in(&files, "include \"a.mason\" include \"b.mason\"", &Defines::new()).unwrap();
    assert_eq!(names(&spec), ["C"]);
}

const COMPOUND: &str = "
    element Guest (type nbd) (listen unix:vm.sock)
    Guest -> Move
    element Move (type migrate) (to new.img) (keep read write)
    (Move, old) -> Old
    element Old (type file) (path old.img)

    compound migrate (to keep chance=50%) {
        element Log (type log_dirty)
        element Filter (type filter) (keep ${keep}) (chance ${chance})
        element Clean (type if) (test Log)
        element New (type sink)
        compound sink () { element File (type file) (path ${to}) port in = (File, in) }
        Log -> Filter
        (Filter, yes) -> Clean
        (Clean, yes) -> New
        (Clean, no) -> New
        port in = (Log, in)
        port old = (Filter, no)
    }";

#[test]
fn compounds_become_elements_with_dots() {
    let spec = parse(COMPOUND).unwrap();
    check(&spec, CATALOGUE).unwrap();
    assert_eq!(names(&spec), ["Guest", "Move.Log", "Move.Filter", "Move.Clean", "Move.New.File", "Old"]);
    assert_eq!(
        edges(&spec),
        [
            "Move.Log.out -> Move.Filter.in",
            "Move.Filter.yes -> Move.Clean.in",
            "Move.Clean.yes -> Move.New.File.in",
            "Move.Clean.no -> Move.New.File.in",
            "Guest.out -> Move.Log.in",
            "Move.Filter.no -> Old.in",
        ]
    );
    assert_eq!(path(&spec, "Move.New.File"), "/srv/new.img");
    let clean = table::If::from(&spec.elements[3].params).unwrap();
    assert_eq!(clean.test.name(), "Move.Log");
    let filter = table::Filter::from(&spec.elements[2].params).unwrap();
    assert_eq!(filter.keep, [table::Operation::Read, table::Operation::Write]);
    assert_eq!(filter.chance.to_string(), "50%");
    let via = spec.elements[4].via.unwrap();
    assert_eq!(spec.sources.place(via).to_string(), "vm.mason:12:17");
}

#[test]
fn a_reference_reaches() {
    let text =
        "element G (type nbd) (listen unix:/s) element I (type if) (test Log) element Log (type log_dirty)
        element D (type null) G -> I (I, yes) -> D (I, no) -> D Log -> D";
    assert_eq!(errors(text), "fine");
}

#[test]
fn printing_keeps_meaning() {
    let spec = parse(COMPOUND).unwrap();
    let printed = print(&spec, CATALOGUE, "/elsewhere".as_ref());
    insta::assert_snapshot!("printed", printed);
    let file = "/elsewhere/copy.mason";
    let again = parse_with(&NoFiles, file.as_ref(), file.into(), printed.clone(), &Defines::new()).unwrap();
    check(&again, CATALOGUE).unwrap();
    assert_eq!(edges(&again), edges(&spec));
    assert_eq!(path(&again, "Old"), "/srv/old.img");
    assert_eq!(table::If::from(&again.elements[3].params).unwrap().test.name(), "Move.Log");
    assert_eq!(print(&again, CATALOGUE, "/elsewhere".as_ref()), printed);
}

#[test]
fn sent_texts_mean_the_same() {
    let files = Memory(&[("/srv/lib/a.mason", "element D (type file) (path ${disk}.img)")]);
    let mut defines = Defines::new();
    defines.set("disk", "d", "/home/me");
    let spec = parse_in(&files, "include \"lib/a.mason\"", &defines).unwrap();
    let sent = serde_json::to_string(&*spec.sources).unwrap();
    let received: Sources = serde_json::from_str(&sent).unwrap();
    let again = parse_sources(&received, &defines).unwrap();
    assert_eq!(again, spec);
    assert_eq!(path(&again, "D"), "/home/me/d.img");
    assert_eq!(again.place(&again.elements[0]).to_string(), "lib/a.mason:1:9");
}

#[test]
fn files_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("lib")).unwrap();
    std::fs::write(folder.path().join("vm.mason"), "include \"lib/d.mason\"").unwrap();
    std::fs::write(folder.path().join("lib/d.mason"), "element D (type file) (path d.img)").unwrap();
    let spec = load(&folder.path().join("vm.mason"), &Defines::new()).unwrap();
    assert_eq!(path(&spec, "D"), folder.path().join("lib/d.img").display().to_string());
}

#[test]
fn the_table_of_parameters() {
    let [path, size, direct] = table::File::PARAMS else { panic!("three parameters") };
    assert_eq!((path.name, path.kind, path.doc), ("path", "path", "The image."));
    assert!(path.required && !path.list && path.default.is_none());
    assert_eq!((size.kind, size.required, size.default), ("size", false, None));
    assert_eq!((direct.kind, direct.required, direct.default), ("yes or no", false, Some("no")));
    let [keep, ..] = table::Filter::PARAMS else { panic!("three parameters") };
    assert_eq!((keep.kind, keep.list, keep.required), ("`read` or `write` or `flush`", true, false));
    assert_eq!(table::If::PARAMS[0].refers, Some("dirty_map"));
}

#[test]
fn defaults_are_read_like_written_values() {
    let read =
        |text: &str| table::Throttle::from(&Params::parse("test", text, "/".as_ref()).unwrap()).unwrap();
    let absent = read("(rate 50M/s)");
    assert_eq!((absent.depth, absent.patience), (32, "10s".parse().unwrap()));
    assert_eq!((absent.rate.0, absent.ops), (50 << 20, None));
    let written = read("(rate 50M/s) (depth 32) (patience 10s)");
    assert_eq!(format!("{absent:?}"), format!("{written:?}"));
}

crate::params! {
    struct WrongDefault {
        size: Size = "much",
    }
}

#[test]
fn a_wrong_default_is_an_error() {
    let errors = WrongDefault::from(&Params::default()).unwrap_err();
    assert_eq!(errors[0].to_string(), "size: expected a size such as `4k`, `100M` or `1GiB`, found `much`");
    let params = Params::parse("test", "(size 1)", "/".as_ref()).unwrap();
    assert_eq!(WrongDefault::from(&params).unwrap().size, Size(1));
}

#[derive(Debug, serde::Deserialize)]
struct Plain {
    word: String,
    many: Vec<u8>,
    #[serde(default)]
    pair: (i32, f64),
    some: Option<bool>,
}

#[test]
fn plain_structs_deserialise() {
    let read = |text: &str| Params::parse("test", text, "/".as_ref()).unwrap().deserialize::<Plain>();
    let plain = read("(word x) (many 1) (pair -5 2.5) (some yes)").unwrap();
    assert_eq!(
        (plain.word.as_str(), plain.many, plain.pair, plain.some),
        ("x", vec![1], (-5, 2.5), Some(true))
    );
    let errors = read("(word x y) (many 1 256 x) (pair 1) (some maybe) (other)").unwrap_err();
    let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(
        errors,
        [
            "other: there is no such parameter",
            "word: expected one value, found 2",
            "many: expected a number from 0 to 255, found `256`",
            "pair: expected 2 values, found 1",
            "some: expected `yes` or `no`, found `maybe`",
        ]
    );
    assert_eq!(read("(many)").unwrap_err()[0].to_string(), "word: it is missing");
    assert!(read("(word x) (many) (pair 1 nan)").is_err());
}
