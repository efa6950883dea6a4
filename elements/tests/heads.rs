//! Heads of volumes over the elements of the library: which changes of a graph are refused, and which are
//! no harm.
#![allow(clippy::unwrap_used, reason = "tests panic")]

use blockmason::Graph;
use blockmason::graph::build::Builder;
use blockmason::heads::{Finding, Head, Names, Plan, Volume, survey, verify};
use blockmason::lang::{Defines, NoFiles, Spec, parse_checked};
use blockmason_elements::ALL;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A folder with images `a.img`, `b.img` and so on, of different sizes.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Home {
        let home = Home(tempfile::tempdir().unwrap());
        "abcdef".chars().zip(1..).for_each(|(name, size)| home.image(&format!("{name}.img"), size << 20));
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn image(&self, name: &str, size: u64) {
        std::fs::File::create(self.path(name)).unwrap().set_len(size).unwrap();
    }

    fn build(&self, text: &str) -> (Spec, Graph) {
        let opened = self.path("vm.mason");
        let spec =
            parse_checked(&NoFiles, "vm.mason".as_ref(), opened, text.to_owned(), &Defines::new(), ALL);
        let spec = spec.unwrap_or_else(|errors| panic!("{errors}\n{text}"));
        let state = self.path("state");
        let builder = Builder { catalogue: ALL, name: "vm", state_dir: &state, shards: 1 };
        let graph = builder.build(&spec).unwrap_or_else(|error| panic!("{error}\n{text}"));
        (spec, graph)
    }

    fn verify(&self, text: &str) -> blockmason::Result<Plan> {
        let (spec, graph) = self.build(text);
        verify(&[(&spec, &graph)], &[])
    }

    /// As a start that succeeds.
    fn start(&self, text: &str) {
        let plan = self.verify(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        plan.begin().unwrap();
        // As elements that are opened.
        let missing = self.survey(text, Names::Keep).into_iter().filter_map(|volume| volume.at.missing);
        missing.for_each(|image| drop(std::fs::File::create(image).unwrap().set_len(2 << 20)));
        plan.complete().unwrap();
        assert!(self.verify(text).unwrap().is_empty(), "nothing is left to do:\n{text}");
    }

    fn refusal(&self, text: &str) -> String {
        let refused = self.verify(text).err();
        refused.unwrap_or_else(|| panic!("it is not refused:\n{text}")).to_string()
    }

    fn survey(&self, text: &str, names: Names) -> Vec<Volume> {
        let (spec, graph) = self.build(text);
        survey(&[(&spec, &graph)], names).unwrap()
    }

    /// As `mason sign --yes`.
    fn adopt(&self, text: &str) {
        let plan = Plan::of(self.survey(text, Names::Adopt).iter());
        plan.begin().unwrap();
        plan.complete().unwrap();
    }

    /// What is in the folder that is no image.
    fn heads(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let name =
            |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let names = entries.map(name).filter(|name| !name.ends_with(".img"));
        names.map(|name| (name.clone(), std::fs::read(self.path(&name)).unwrap())).collect()
    }
}

/// `Guest` above `top`, and the file elements `A`, `B` and so on that the graph names.
fn graph(top: &str, rest: &str) -> String {
    let mut text = format!("element Guest (type nbd) (listen unix:x)\nGuest -> {top}\n{rest}\n");
    for name in ["A", "B", "C", "D"] {
        if rest.contains(&format!("-> {name}\n")) || top == name {
            let image = name.to_lowercase();
            text += &format!("element {name} (type file) (path {image}.img)\n");
        }
    }
    text
}

/// The same graph with one thing written otherwise.
fn with(text: &str, was: &str, is: &str) -> String {
    assert_eq!(text.matches(was).count(), 1, "{was}\n{text}");
    text.replace(was, is)
}

fn swapped(text: &str, one: &str, other: &str) -> String {
    with(&with(&with(text, one, "@"), other, one), "@", other)
}

/// Every refused graph names a difference, and no graph changes a head by being compared.
fn refused(home: &Home, texts: &[String]) {
    let before = home.heads();
    for text in texts {
        let refusal = home.refusal(text);
        let shows = |sign: &str| refusal.lines().any(|line| line.starts_with(&format!("    {sign} ")));
        assert!(shows("-") || shows("+"), "{refusal}\n{text}");
        assert!(refusal.contains("mason sign"), "{refusal}");
        assert_eq!(home.heads(), before);
    }
}

fn accepted(home: &Home, texts: &[String]) {
    let before = home.heads();
    for text in texts {
        let plan = home.verify(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert!(plan.is_empty(), "{text}");
        assert_eq!(home.heads(), before);
    }
}

const STRIPE: &str = "element S (type stripe) (chunk 64k)\n(S, x) -> A\n(S, y) -> B\n";

/// What is no harm to any layout with an element `S` over the volume `A`.
fn harmless(text: &str, top: &str) -> Vec<String> {
    let other = format!("{text}element Other (type nbd) (listen unix:x) (name other)\nOther -> {top}\n");
    let watched =
        with(text, &format!("Guest -> {top}\n"), &format!("Guest -> P -> {top}\nelement P (type probe)\n"));
    let below = with(text, "-> A\n", "-> P -> A\nelement P (type probe)\n");
    let sealed = with(
        text,
        &format!("Guest -> {top}\n"),
        &format!("Guest -> R -> {top}\nelement R (type readonly)\n"),
    );
    let named = text
        .replace("Guest", "Host")
        .replace("S", "Zz")
        .replace("A\n", "Aa\n")
        .replace("element A ", "element Aa ");
    let path = with(text, "(path a.img)", "(path ../DIR/./a.img)");
    vec![text.to_owned(), other, watched, below, sealed, named, path]
}

fn dir(home: &Home, text: &str) -> String {
    text.replace("DIR", home.0.path().file_name().unwrap().to_str().unwrap())
}

#[test]
fn a_stripe() {
    let home = Home::new();
    let text = graph("S", STRIPE);
    home.start(&text);
    assert_eq!(home.heads().len(), 2);
    refused(
        &home,
        &[
            swapped(&text, "(S, x) -> A\n", "(S, y) -> B\n"),
            swapped(&text, "a.img", "b.img"),
            with(&text, "64k", "128k"),
            with(&text, "(type stripe) (chunk 64k)", "(type linear)"),
            graph("S", &format!("{STRIPE}(S, z) -> C\n")),
            graph("S", &format!("element S (type stripe)\n(S, z) -> C\n{}", &STRIPE[36..])),
            graph("S", "element S (type stripe) (chunk 64k)\n(S, x) -> A\n"),
            graph("S", "element S (type stripe) (chunk 64k)\n(S, x) -> A\n(S, y) -> A\n"),
            graph("A", ""),
            graph("B", ""),
            graph("W", &format!("element W (type slice)\nW -> S\n{STRIPE}")),
            with(&text, "-> A\n", "-> W -> A\nelement W (type slice)\n"),
            with(&text, "b.img", "c.img"),
            graph("S", &with(STRIPE, "-> B\n", "-> M\nelement M (type mem) (size 1M)\n")),
            format!("{text}element Other (type nbd) (listen unix:x) (name other)\nOther -> A\n"),
        ],
    );
    let mut fine: Vec<String> = harmless(&text, "S").iter().map(|text| dir(&home, text)).collect();
    fine.push(with(&text, "64k", "65536"));
    fine.push(with(&text, " (chunk 64k)", ""));
    fine.push(with(&with(&text, "(S, x)", "(S, second)"), "(S, y)", "(S, first)"));
    accepted(&home, &fine);
}

#[test]
fn a_row() {
    let home = Home::new();
    let rest = "element S (type linear)\n(S, x) -> A\n(S, y) -> B\n(S, z) -> C\n";
    let text = graph("S", rest);
    home.start(&text);
    refused(
        &home,
        &[
            swapped(&text, "(S, x) -> A\n", "(S, y) -> B\n"),
            swapped(&text, "(S, y) -> B\n", "(S, z) -> C\n"),
            swapped(&text, "b.img", "c.img"),
            with(&text, "(type linear)", "(type stripe)"),
            with(&text, "(S, z) -> C\n", "(S, z) -> C\n(S, w) -> M\nelement M (type mem) (size 1M)\n"),
            graph("S", "element S (type linear)\n(S, x) -> A\n(S, y) -> B\n"),
            graph("S", "element S (type linear)\n(S, x) -> B\n(S, y) -> C\n"),
            graph("C", ""),
        ],
    );
    accepted(&home, &harmless(&text, "S").iter().map(|text| dir(&home, text)).collect::<Vec<_>>());
    home.image("c.img", 9 << 20);
    accepted(&home, std::slice::from_ref(&text));
    home.image("b.img", 9 << 20);
    let refusal = home.refusal(&text);
    assert!(refusal.contains("    -   sizes 1M 2M\n    +   sizes 1M 9M\n"), "{refusal}");
}

#[test]
fn windows_of_one_disk() {
    let home = Home::new();
    let two = "element S (type slice) (length 256k)\nelement T (type slice) (offset 256k) (length 512k)\n\
               element Other (type nbd) (listen unix:x) (name other)\nOther -> T\nT -> A\nS -> A\n";
    let text = graph("S", two);
    home.start(&text);
    assert_eq!(home.heads().len(), 1);
    let one = graph("S", "element S (type slice) (length 256k)\nS -> A\n");
    refused(
        &home,
        &[
            text.replace("256k", "128k"),
            with(&text, "(length 512k)", ""),
            with(&one, "(length 256k)", "(length 256k) (offset 4k)"),
            with(&one, " (length 256k)", ""),
            with(&one, "S -> A\n", "S -> U -> A\nelement U (type slice)\n"),
            graph("A", ""),
            format!(
                "{two}Guest -> A\nelement Guest (type nbd) (listen unix:x)\nelement A (type file) (path a.img)\nelement More (type nbd) (listen unix:x) (name more)\nMore -> S\n"
            ),
        ],
    );
    accepted(
        &home,
        &[one.clone(), with(&one, "256k", "262144"), with(&one, "(length 256k)", "(offset 0) (length 256k)")],
    );
    accepted(&home, &harmless(&one, "S").iter().map(|text| dir(&home, text)).collect::<Vec<_>>());
}

#[test]
fn layouts_within_layouts() {
    let home = Home::new();
    let rest = "element S (type stripe) (chunk 4k)\nelement L (type linear)\nelement W (type slice) (offset 1M)\n\
                (S, x) -> L\n(S, y) -> W\n(L, x) -> A\n(L, y) -> B\nW -> C\n";
    let text = graph("S", rest);
    home.start(&text);
    refused(
        &home,
        &[
            swapped(&text, "(L, x) -> A\n", "(L, y) -> B\n"),
            swapped(&text, "(S, x) -> L\n", "(S, y) -> W\n"),
            swapped(&text, "b.img", "c.img"),
            with(&text, "4k", "8k"),
            with(&text, "(offset 1M)", "(offset 0)"),
            with(&text, "(type slice) (offset 1M)", "(type probe)"),
            with(&text, "Guest -> S\n", "Guest -> V -> S\nelement V (type slice)\n"),
            with(&text, "(S, x) -> L\n", "(S, x) -> A\n")
                + "Other -> L\nelement Other (type nbd) (listen unix:x) (name other)\n",
        ],
    );
    accepted(&home, &harmless(&text, "S").iter().map(|text| dir(&home, text)).collect::<Vec<_>>());
}

#[test]
fn volumes_without_a_layout_have_no_head() {
    let home = Home::new();
    let text = with(&graph("A", ""), "Guest -> A", "Guest -> P -> A\nelement P (type probe)");
    home.start(&text);
    assert!(home.heads().is_empty());
    let [volume] = home.survey(&text, Names::Keep).try_into().ok().unwrap();
    assert!(matches!(volume.finding, Finding::Plain) && volume.wanted().is_none());
    home.start(&graph("S", STRIPE));
}

#[test]
fn the_refusal_reads_like_a_diff() {
    let home = Home::new();
    home.start(&graph("S", STRIPE));
    let refusal = home.refusal(&with(&graph("S", STRIPE), "64k", "128k"));
    let folder = home.0.path().canonicalize().unwrap();
    let head = folder.join("a.img.mason-head");
    let name = |text: &str| text.split("  member 1: ").nth(1).unwrap().lines().next().unwrap().to_owned();
    let expected = format!(
        "A (vm.mason:7:9): its layout is another one: {}\n    - stripe (chunk 64k) member 0 of 2\n    \
         + stripe (chunk 128k) member 0 of 2\n        member 1: {}\nB (vm.mason:8:9): its layout",
        head.display(),
        name(&refusal)
    );
    assert!(refusal.starts_with(&expected), "{refusal}");
    let plain = home.refusal(&graph("A", ""));
    assert!(
        plain.contains("    - stripe (chunk 64k) member 0 of 2\n")
            && plain.contains("    + served as it is\n")
    );
    let blank = home.refusal(&with(&graph("S", STRIPE), "b.img", "c.img"));
    assert!(
        blank.contains(&format!("-   member 1: {}\n    +   member 1: (without a head)\n", name(&refusal))),
        "{blank}"
    );
}

/// Every point at which writing the heads can be cut off: each is missing, begun or complete. None is
/// complete before all are begun.
#[test]
fn a_start_that_was_cut_off_is_taken_up_again() {
    let text = graph("S", "element S (type stripe)\n(S, x) -> A\n(S, y) -> B\n(S, z) -> C\n");
    for states in 0..27u32 {
        let home = Home::new();
        let plan = home.verify(&text).unwrap();
        plan.begin().unwrap();
        let begun = home.heads();
        plan.complete().unwrap();
        let complete = home.heads();
        assert_eq!((begun.len(), complete.len()), (3, 3));
        let state = |nth: usize| states / 3u32.pow(nth as u32) % 3;
        for (nth, (name, bytes)) in begun.iter().enumerate() {
            match state(nth) {
                0 => std::fs::remove_file(home.path(name)).unwrap(),
                1 => std::fs::write(home.path(name), bytes).unwrap(),
                _ => std::fs::write(home.path(name), &complete[name]).unwrap(),
            }
        }
        let has = |wanted| (0..3).any(|nth| state(nth) == wanted);
        if has(0) && has(2) {
            // No start leaves this: a head was lost, or a blank disk is in the place of another.
            home.refusal(&text);
            continue;
        }
        home.start(&text);
        assert!(home.heads().values().all(|bytes| Head::decode(bytes).unwrap().complete));
        if !has(0) {
            assert_eq!(home.heads(), complete, "no volume changes its name");
        }
        home.refusal(&swapped(&text, "a.img", "b.img"));
    }
}

#[test]
fn a_start_that_fails_leaves_nothing_and_one_that_was_cut_off_guards_its_layout() {
    let home = Home::new();
    let text = graph("S", STRIPE);
    let plan = home.verify(&text).unwrap();
    plan.begin().unwrap();
    home.refusal(&with(&text, "64k", "128k"));
    home.refusal(&graph("A", ""));
    plan.withdraw();
    assert!(home.heads().is_empty());
    // A head that was there before stays.
    home.verify(&text).unwrap().begin().unwrap();
    home.verify(&text).unwrap().withdraw();
    assert_eq!(home.heads().len(), 2);
    home.start(&text);
}

#[test]
fn a_head_that_cannot_be_written_stops_the_start() {
    let home = Home::new();
    let long = format!("{}.img", "x".repeat(247));
    home.image(&long, 1 << 20);
    let text = with(&graph("S", STRIPE), "b.img", &long);
    let error = home.verify(&text).unwrap().begin().unwrap_err().to_string();
    assert!(error.contains("mason-head: the head cannot be written"), "{error}");
    assert!(home.heads().is_empty(), "the first one has been taken back");
    home.start(&with(&text, "(path x", "(head b.head) (path x"));
    assert!(home.heads().contains_key("b.head"));
    // What is served as it is needs no head, whatever its name.
    home.image(&long.replace('x', "y"), 1);
    home.start(&with(&graph("A", ""), "a.img", &long.replace('x', "y")));
}

#[test]
fn read_only_volumes_are_compared_and_not_written() {
    let home = Home::new();
    let text = graph("S", STRIPE);
    let sealed = text.replace("b.img)", "b.img) (readonly yes)");
    home.start(&sealed);
    assert_eq!(home.heads().len(), 1);
    home.start(&sealed);
    home.refusal(&with(&sealed, "64k", "128k"));
    let home = Home::new();
    home.start(&text);
    let before = home.heads();
    home.start(&sealed);
    assert_eq!(home.heads(), before);
    home.refusal(&swapped(&sealed, "(S, x) -> A\n", "(S, y) -> B\n"));
}

#[test]
fn an_image_that_is_gone_is_not_made_anew() {
    let home = Home::new();
    let text = with(&graph("S", STRIPE), "(path b.img)", "(path b.img) (size 2M)");
    home.start(&text);
    std::fs::remove_file(home.path("b.img")).unwrap();
    let refusal = home.refusal(&text);
    assert!(refusal.contains("b.img is gone, but its head is there"), "{refusal}");
    // On purpose.
    let plan = Plan::of(home.survey(&text, Names::Adopt).iter());
    plan.begin().unwrap();
    home.start(&text);
    // Heads come before the images of a first start.
    let home = Home::new();
    std::fs::remove_file(home.path("b.img")).unwrap();
    home.verify(&text).unwrap().begin().unwrap();
    home.verify(&text).unwrap();
}

#[test]
fn a_copy_is_told_from_its_original() {
    let home = Home::new();
    home.start(&graph("S", STRIPE));
    std::fs::copy(home.path("a.img.mason-head"), home.path("c.img.mason-head")).unwrap();
    // In the place of its original a copy is as good.
    home.start(&with(&graph("S", STRIPE), "a.img", "c.img"));
    let both = graph("S", "element S (type stripe) (chunk 64k)\n(S, x) -> A\n(S, y) -> C\n");
    let refusal = home.refusal(&both);
    assert!(refusal.contains("names the same volume as") && refusal.contains("one is a copy"), "{refusal}");
    home.adopt(&both);
    home.start(&both);
}

#[test]
fn adopting() {
    let home = Home::new();
    let text = graph("S", STRIPE);
    home.start(&text);
    let before = home.heads();
    for changed in [
        with(&text, "64k", "128k"),
        swapped(&text, "a.img", "b.img"),
        graph("S", &format!("{STRIPE}(S, z) -> C\n")),
        with(&text, "b.img", "d.img"),
        text.clone(),
    ] {
        home.verify(&changed).unwrap_err();
        home.adopt(&changed);
        home.start(&changed);
    }
    let name = |heads: &BTreeMap<String, Vec<u8>>| Head::decode(&heads["a.img.mason-head"]).unwrap().volume;
    assert_eq!(name(&home.heads()), name(&before), "a volume keeps its name");
    std::fs::write(home.path("a.img.mason-head"), "{}").unwrap();
    assert!(home.refusal(&text).contains("no sound head"));
    home.adopt(&text);
    home.start(&text);
    let [a, _] = home.survey(&graph("S", STRIPE), Names::Keep).try_into().ok().unwrap();
    blockmason::heads::remove(&a).unwrap();
    assert!(!home.path("a.img.mason-head").exists());
}

#[test]
fn graphs_that_share_a_disk_are_one() {
    let home = Home::new();
    let window =
        |offset: &str| graph("S", &format!("element S (type slice) (offset {offset}) (length 4k)\nS -> A\n"));
    let (one, two) = (home.build(&window("0")), home.build(&window("4k")));
    let both = [(&one.0, &one.1), (&two.0, &two.1)];
    let plan = verify(&both, &[]).unwrap();
    plan.begin().unwrap();
    plan.complete().unwrap();
    assert!(verify(&both, &[]).unwrap().is_empty() && verify(&both[1..], &[]).unwrap().is_empty());
    home.refusal(&window("8k"));
}

#[test]
fn layouts_of_any_size_are_answered() {
    let home = Home::new();
    // Diamonds of stripes: two to the power of thirty ways to one disk.
    let mut rest = String::new();
    for nth in 0..30 {
        let next = if nth == 29 { "A".to_owned() } else { format!("S{}", nth + 1) };
        rest += &format!(
            "element S{nth} (type stripe) (chunk 512)\n(S{nth}, x) -> {next}\n(S{nth}, y) -> {next}\n"
        );
    }
    home.image("a.img", 1 << 20);
    let refusal = home.refusal(&graph("S0", &rest));
    assert!(refusal.contains("too large for a head"), "{refusal}");
    // The same in memory has no head, and no limit.
    home.start(
        &graph("S0", &rest.replace("-> A\n", "-> M\n"))
            .replace("Guest ->", "element M (type mem) (size 1M)\nGuest ->"),
    );
}
