//! `mason elements`, completions and man pages.

use crate::harness::{Home, repository};
use std::collections::BTreeMap;
use std::path::Path;

#[test]
fn lists_and_describes() {
    let home = Home::new();
    let list = home.mason(&["elements"]).done();
    assert!(list.contains("sink\n") && list.contains("  file "), "{list}");
    let file = home.mason(&["elements", "file"]).done();
    for part in
        ["path  path, required", "direct  yes or no, default no", "reset  call:", "Example\n  element"]
    {
        assert!(file.contains(part), "{part} in {file}");
    }
    let types = home.mason(&["elements", "--json"]).json();
    let nbd = types.as_array().unwrap().iter().find(|ty| ty["name"] == "nbd").unwrap();
    assert_eq!((&nbd["family"], &nbd["ports"]["in"]), (&"export".into(), &false.into()));
    assert!(home.mason(&["elements", "fiel"]).failed().contains("there is no type fiel"));
}

#[test]
fn the_reference_pages_are_current() {
    let home = Home::new();
    let fresh = home.path("pages");
    home.mason(&["elements", "--markdown", fresh.to_str().unwrap()]).done();
    let checked_in = repository().join("docs/elements");
    assert!(
        pages(&fresh) == pages(&checked_in),
        "docs/elements is out of date: run `cargo run -- elements --markdown docs/elements`"
    );
}

fn pages(folder: &Path) -> BTreeMap<String, String> {
    let entries = folder.read_dir().unwrap().map(Result::unwrap);
    let page = |entry: std::fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), std::fs::read_to_string(entry.path()).unwrap())
    };
    entries.map(page).collect()
}

#[test]
fn pages_of_types_that_are_gone_are_removed_and_others_stay() {
    let home = Home::new();
    let args = ["elements", "--markdown", "pages"];
    home.mason(&args).done();
    let page = std::fs::read_to_string(home.path("pages/file.md")).unwrap();
    home.file("pages/gone.md", &page);
    home.file("pages/guide.md", "# By hand\n");
    home.mason(&args).done();
    assert!(!home.path("pages/gone.md").exists() && home.path("pages/guide.md").exists());
}

#[test]
fn completions_and_man_pages() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(home.mason(&["completions", shell]).done().contains("read-percent"), "{shell}");
    }
    home.mason(&["man", "--out", "man"]).done();
    let run = std::fs::read_to_string(home.path("man/mason-run.1")).unwrap();
    assert!(run.contains("\\-\\-control"), "{run}");
    assert!(home.path("man/mason.1").exists() && !home.path("man/mason-man.1").exists());
}
