//! Wrong graphs and right ones, against a small table of types.

use super::value::{FilePath, Ref, Service, Size};
use super::*;
use crate::describe::{Catalogue, ElementType, Family, Handover, Outs, Param, Ports, Survives};

// The checker reads the parameters, nobody uses them.
#[allow(dead_code)]
mod table;

use table::CATALOGUE;

fn parse(text: &str) -> Result<Spec, Diagnostics> {
    parse_with(&NoFiles, Path::new("vm.mason"), "/srv/vm.mason".into(), text.to_owned(), &Defines::new())
}

/// The errors of a graph, drawn as plain text; or "fine".
fn errors(text: &str) -> String {
    match parse(text).and_then(|spec| check(&spec, CATALOGUE)) {
        Ok(()) => String::from("fine"),
        Err(errors) => errors.to_string(),
    }
}

#[test]
fn the_papers_example() {
    let text = "element MyDebug\n    (type debug_log)\n    (logfile /var/log/request.log)\n\n(MyDebug, out) -> (LocalDisk, in)\n
        element LocalDisk (type file) (path disk.img) element Guest (type nbd) (listen unix:vm.sock) Guest -> MyDebug";
    let spec = parse(text).unwrap();
    check(&spec, CATALOGUE).unwrap();
    assert_eq!(spec.elements[0].name, "MyDebug");
    assert_eq!(spec.elements[0].ty, "debug_log");
    assert_eq!(spec.place(&spec.elements[0]).to_string(), "vm.mason:1:9");
    assert_eq!((spec.edges[0].from, spec.edges[0].to), (0, 1));
}

#[test]
fn shows_errors() {
    println!(
        "{}",
        errors(
            "element A (type fiel) (path x)\nelement B (type file) (pth x) (size 4kb)\nA->B\nelement C (type file"
        )
    );
    println!(
        "{}",
        errors(
            "element A (type fiel) (path x)\nelement B (type file) (pth x) (size 4kb)\nA->B\nB -> A\nelement C (type file)"
        )
    );
}
