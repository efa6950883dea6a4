//! The README says what is there.
#![allow(clippy::unwrap_used)]

use blockmason_tests::mason::workspace;
use std::fs;

#[test]
fn its_table_has_every_element() {
    let readme = fs::read_to_string(workspace().join("README.md")).unwrap();
    let table = readme.split("|---|---|---|\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let row = |ty: &&blockmason::describe::ElementType| {
        let (name, family) = (ty.name, ty.family.name());
        format!("| [`{name}`](docs/elements/{name}.md) | {family} | {} |", ty.summary)
    };
    let expected: Vec<_> = blockmason_elements::ALL.iter().map(row).collect();
    assert!(table.lines().eq(&expected), "it should be:\n{}", expected.join("\n"));
}

#[test]
fn links_lead_somewhere() {
    for page in ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] {
        let text = fs::read_to_string(workspace().join(page)).unwrap();
        let targets = text.split("](").skip(1).map(|rest| rest.split([')', '#']).next().unwrap());
        for target in targets.filter(|target| !target.starts_with("http")) {
            assert!(workspace().join(target).exists(), "{page} links to {target}");
        }
    }
}
