//! The graph language: from the text of a graph file to a checked, flat [`Spec`].
//!
//! [`load`] and [`parse_str`] read, expand parameters, includes and compounds, and open nothing but
//! graph files; [`check`] compares the result with the table of element types. All that is wrong is
//! reported in one go, each error with its place. Every limit (bytes, depth, number of elements) is a
//! constant beside the code that keeps it, so that no text can use unbounded memory or time.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests unwrap"))]

mod ast;
mod check;
mod de;
mod diag;
mod edit;
mod expand;
mod files;
mod kind;
mod load;
mod params;
mod parse;
mod print;
mod source;
mod spec;
mod suggest;
#[cfg(test)]
mod tests;
pub mod value;

pub use check::check;
pub use diag::{Diagnostic, Diagnostics, Label, Style};
pub use edit::{Edit, edit};
pub use files::{Disk, Files, NoFiles};
pub use kind::ParamKind;
pub use params::{Entry, ParamError, Params, Value};
pub use print::print;
pub(crate) use print::{meaning, quote};
pub use source::{Place, Source, Sources, Span};
pub use spec::{EdgeSpec, ElementSpec, Group, Invariant, Paths, Spec, What};
pub use suggest::did_you_mean;

/// What the macros of this module expand to; not for direct use.
#[doc(hidden)]
pub mod macros {
    pub use super::kind::{TextVisitor, WordVisitor, find_word};
    pub use serde::{self, Deserialize, Deserializer, Serialize, Serializer};
}

use crate::describe::Catalogue;
use diag::Bag;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One `-D KEY=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Define {
    /// The parameter.
    pub key: String,
    /// Its value, taken as it is.
    pub value: String,
    /// The folder that the value starts in if it is a relative path.
    pub folder: PathBuf,
}

/// The parameters of a command line, in their order; a later one of the same key wins.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Defines(Vec<Define>);

impl Defines {
    /// None.
    pub fn new() -> Self {
        Defines::default()
    }

    /// Sets a parameter; relative paths start in `folder`.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<String>, folder: impl Into<PathBuf>) {
        let define = Define { key: key.into(), value: value.into(), folder: folder.into() };
        self.0.retain(|known| known.key != define.key);
        self.0.push(define);
    }

    /// Sets a parameter from `KEY=VALUE`.
    ///
    /// # Errors
    /// One sentence if it is not of that form.
    pub fn set_from(&mut self, text: &str, folder: impl Into<PathBuf>) -> Result<(), String> {
        match text.split_once('=') {
            Some((key, value)) if parse::is_name(key) => {
                self.set(key, value, folder);
                Ok(())
            }
            _ => Err(format!("expected KEY=VALUE, found `{}`", parse::shorten(text))),
        }
    }

    /// These, and for keys that they lack those of `defaults`.
    pub fn or(mut self, defaults: &Defines) -> Defines {
        let absent = |define: &&Define| self.0.iter().all(|known| known.key != define.key);
        let more: Vec<Define> = defaults.0.iter().filter(absent).cloned().collect();
        self.0.extend(more);
        self
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Define> {
        self.0.iter()
    }
}

/// Reads a graph file and all that it includes.
///
/// # Errors
/// Everything that is wrong, unreadable files included.
pub fn load(path: &Path, defines: &Defines) -> Result<Spec, Diagnostics> {
    let (opened, text) = open(path)?;
    parse_with(&Disk, path, opened, text, defines)
}

/// [`load`] and [`check`] in one: where names are wrong, wrong types and parameters are reported with
/// them.
///
/// # Errors
/// Everything that is wrong, unreadable files included.
pub fn load_checked(path: &Path, defines: &Defines, catalogue: Catalogue) -> Result<Spec, Diagnostics> {
    let (opened, text) = open(path)?;
    parse_checked(&Disk, path, opened, text, defines, catalogue)
}

/// The absolute path and the text of a graph file.
fn open(path: &Path) -> Result<(PathBuf, String), Diagnostics> {
    let read = Disk.read(path).and_then(|text| Ok((std::path::absolute(path)?, text)));
    read.map_err(|error| {
        let mut sources = Sources::default();
        let source = sources.add_file(path, path.to_path_buf(), String::new());
        let message = format!("cannot read `{}`: {}", path.display(), load::reason(&error));
        let span = Span { source, start: 0, len: 0 };
        Diagnostics::one(sources, Diagnostic::new("mason::unreadable", span, message))
    })
}

/// Reads a graph from a text that is called `name` in messages. Relative paths in it start in
/// `folder`, included files are read from the file system.
///
/// # Errors
/// Everything that is wrong.
pub fn parse_str(name: &str, text: &str, folder: &Path, defines: &Defines) -> Result<Spec, Diagnostics> {
    let file = Path::new(name).file_name().unwrap_or("graph".as_ref());
    parse_with(&Disk, Path::new(name), folder.join(file), text.to_owned(), defines)
}

/// Reads a graph again from the texts that it was read from, without the file system.
///
/// # Errors
/// Everything that is wrong.
pub fn parse_sources(sources: &Sources, defines: &Defines) -> Result<Spec, Diagnostics> {
    let root = sources.get(0);
    let (path, opened, text) =
        root.map_or((Path::new(""), Path::new(""), ""), |s| (s.path(), s.opened(), s.text()));
    parse_with(sources, path, opened.to_path_buf(), text.to_owned(), defines)
}

/// Reads a graph from a text that messages call `path` and that stands at `opened`, whose folder is
/// where relative paths start; included texts come from `files`.
///
/// # Errors
/// Everything that is wrong.
pub fn parse_with(
    files: &dyn Files,
    path: &Path,
    opened: PathBuf,
    text: String,
    defines: &Defines,
) -> Result<Spec, Diagnostics> {
    let (spec, bag) = read(files, path, opened, text, defines);
    bag.finish(spec.sources.clone())?;
    Ok(spec)
}

/// [`parse_with`] and [`check`] in one, as [`load_checked`].
///
/// # Errors
/// Everything that is wrong.
pub fn parse_checked(
    files: &dyn Files,
    path: &Path,
    opened: PathBuf,
    text: String,
    defines: &Defines,
    catalogue: Catalogue,
) -> Result<Spec, Diagnostics> {
    let (spec, mut bag) = read(files, path, opened, text, defines);
    if !bag.is_empty() {
        // With names missing, only what concerns one element can be judged.
        check::each(&spec, catalogue, &mut bag);
    }
    bag.finish(spec.sources.clone())?;
    check(&spec, catalogue)?;
    Ok(spec)
}

/// The graph as far as it could be understood, and the errors.
fn read(files: &dyn Files, path: &Path, opened: PathBuf, text: String, defines: &Defines) -> (Spec, Bag) {
    let (mut sources, mut bag) = (Sources::default(), Bag::default());
    let loaded = load::Loader::new(files, &mut sources, &mut bag).root(path, opened, text);
    let defined = defines.iter().map(|define| {
        let text = format!("{}={}", define.key, define.value);
        let (start, len) = (define.key.len() as u32 + 1, define.value.len() as u32);
        (define.clone(), Span { source: sources.add("-D", text), start, len })
    });
    let defined = defined.collect();
    // After an error in the syntax nothing is expanded: what was not understood would be reported as
    // missing.
    let mut expander = expand::Expander::new(&loaded, &mut bag);
    if !expander.failed() {
        expander.run(defined);
    }
    let (elements, edges, invariants) = (expander.elements, expander.edges, expander.invariants);
    (Spec { elements, edges, invariants, sources: Arc::new(sources) }, bag)
}
