//! The language as a whole, against a small table of types.

use super::value::{FilePath, Ref, Service, Size};
use super::*;
use crate::describe::{Catalogue, ElementType, Family, Outs, Param, Ports};
use std::io;

mod docs;
mod edit;
mod invariant;
mod limits;
mod random;
mod right;
// The checker reads these parameters, nobody uses them.
#[allow(dead_code)]
mod table;
mod wrong;

use table::CATALOGUE;

/// Files that a test makes up.
struct Memory(&'static [(&'static str, &'static str)]);

impl Files for Memory {
    fn read(&self, path: &Path) -> io::Result<String> {
        let found = self.0.iter().find(|(known, _)| self.identity(known.as_ref()) == self.identity(path));
        found.map(|(_, text)| (*text).to_owned()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn parse_in(files: &dyn Files, text: &str, defines: &Defines) -> Result<Spec, Diagnostics> {
    parse_with(files, Path::new("vm.mason"), "/srv/vm.mason".into(), text.to_owned(), defines)
}

fn parse(text: &str) -> Result<Spec, Diagnostics> {
    parse_in(&NoFiles, text, &Defines::new())
}

/// The errors of a graph, drawn as plain text; or "fine".
fn errors_with(files: &dyn Files, text: &str, defines: &Defines) -> String {
    let opened = "/srv/vm.mason".into();
    match parse_checked(files, Path::new("vm.mason"), opened, text.to_owned(), defines, CATALOGUE) {
        Ok(_) => String::from("fine"),
        Err(errors) => errors.to_string(),
    }
}

fn errors(text: &str) -> String {
    errors_with(&NoFiles, text, &Defines::new())
}
