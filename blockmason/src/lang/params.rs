//! The parameters of one element, as text with places; [`Params::deserialize`] makes values of them.

use super::ast::{Part, Setting};
use super::de;
use super::diag::{Bag, Diagnostics};
use super::parse;
use super::source::{Sources, Span};
use crate::describe::Param;
use serde::de::DeserializeOwned;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where a value was written, as far as its meaning depends on it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Context {
    /// Relative paths start here.
    pub(super) folder: PathBuf,
    /// The compound instance in which element references are looked up first, `Move.`; or empty.
    pub(super) scope: String,
}

/// One value of a parameter.
#[derive(Clone, Debug)]
pub struct Value {
    pub(super) text: String,
    pub(super) span: Span,
    pub(super) origin: Option<Span>,
    pub(super) context: Arc<Context>,
    pub(super) target: Option<String>,
}

impl Value {
    /// The text, with its parameters replaced.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The folder that a relative path starts in.
    pub fn folder(&self) -> &Path {
        &self.context.folder
    }

    /// The full name of the element that the value means if it is an element reference: inside a
    /// compound, `Dirty` means the compound's own `Move.Dirty` if there is one.
    pub fn target(&self) -> &str {
        self.target.as_deref().unwrap_or(&self.text)
    }

    /// Where it stands.
    pub fn span(&self) -> Span {
        self.span
    }
}

/// One parameter as written: a key and its values.
#[derive(Clone, Debug)]
pub struct Entry {
    pub(super) key: String,
    pub(super) span: Span,
    pub(super) values: Vec<Value>,
}

impl Entry {
    /// The key.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Its values; more than one make a list.
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// Where the key stands.
    pub fn span(&self) -> Span {
        self.span
    }
}

/// The parameters of one element as written, in their order. Equal if keys, texts and the folders of
/// the values are equal, wherever they stand.
#[derive(Clone, Debug, Default)]
pub struct Params {
    pub(super) entries: Vec<Entry>,
    pub(super) span: Span,
}

impl PartialEq for Params {
    fn eq(&self, other: &Self) -> bool {
        let same =
            |a: &Value, b: &Value| a.text == b.text && a.target() == b.target() && a.folder() == b.folder();
        self.entries.len() == other.entries.len()
            && self.entries.iter().zip(&other.entries).all(|(a, b)| {
                a.key == b.key
                    && a.values.len() == b.values.len()
                    && a.values.iter().zip(&b.values).all(|(a, b)| same(a, b))
            })
    }
}

impl Params {
    /// Reads `(KEY value...)...`, as written after an element's name or on a command line; relative
    /// paths start in `folder`. `name` is what messages call the text.
    pub fn parse(name: &str, text: &str, folder: &Path) -> Result<Params, Diagnostics> {
        let (mut sources, mut bag) = (Sources::default(), Bag::default());
        let source = sources.add(name, text);
        let context = Arc::new(Context { folder: folder.to_path_buf(), scope: String::new() });
        let settings = parse::settings(source, text, &mut bag);
        let entries = settings.into_iter().map(|setting| literal(setting, &context, &mut bag)).collect();
        bag.finish(Arc::new(sources))?;
        Ok(Params { entries, span: Span { source, start: 0, len: text.len() as u32 } })
    }

    /// The parameters in the order in which they were written.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Gives a key this one value, instead of those that it has.
    pub fn set(&mut self, key: &str, text: &str) {
        let context = Arc::new(Context::default());
        let value = Value { text: text.to_owned(), span: self.span, origin: None, context, target: None };
        match self.entries.iter_mut().find(|entry| entry.key == key) {
            Some(entry) => entry.values = vec![value],
            None => self.entries.push(Entry { key: key.to_owned(), span: self.span, values: vec![value] }),
        }
    }

    /// The values of a key, if it is given.
    pub fn get(&self, key: &str) -> Option<&[Value]> {
        self.entries.iter().find(|entry| entry.key == key).map(Entry::values)
    }

    /// An error about a parameter that cannot stand as it is beside the others, for a type's own
    /// check: at the key, or at the element where the key is not written.
    pub fn error(&self, key: &str, message: impl Into<String>) -> ParamError {
        let entry = self.entries.iter().find(|entry| entry.key == key);
        ParamError {
            code: "mason::bad-value",
            key: key.to_owned(),
            message: message.into(),
            help: None,
            span: entry.map_or(self.span, |entry| entry.span),
            origin: None,
        }
    }

    /// Makes a struct of them: keys are fields, one value is a scalar, several are a list. Unknown
    /// keys, doubled ones and values that do not fit are all reported.
    pub fn deserialize<T: DeserializeOwned>(&self) -> Result<T, Vec<ParamError>> {
        de::read(self, &[])
    }

    /// As [`Params::deserialize`], with the defaults of a table: what [`crate::params!`] calls.
    pub fn deserialize_with<T: DeserializeOwned>(
        &self,
        table: &'static [Param],
    ) -> Result<T, Vec<ParamError>> {
        de::read(self, table)
    }
}

/// An entry without `${...}`, which has no meaning outside a graph.
fn literal(setting: Setting, context: &Arc<Context>, bag: &mut Bag) -> Entry {
    let mut values = Vec::with_capacity(setting.values.len());
    for value in setting.values {
        let mut text = String::new();
        for part in value.parts {
            match part {
                Part::Text(part) => text.push_str(&part),
                Part::Param(key) => bag.push(super::diag::Diagnostic::new(
                    "mason::undefined",
                    key.span,
                    format!("no parameter `{}` here", key.text),
                )),
            }
        }
        values.push(Value { text, span: value.span, origin: None, context: context.clone(), target: None });
    }
    Entry { key: setting.key.text, span: setting.key.span, values }
}

/// What is wrong with a parameter, and where. Displays as `size: expected a size ..., found `4kk``.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamError {
    /// Stable, for scripts: `mason::bad-value`.
    pub code: &'static str,
    /// The parameter.
    pub key: String,
    /// What is wrong with it, without the parameter's name.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// The value or key, or the whole element if the parameter is missing.
    pub span: Span,
    /// Where the value comes from if it is that of a `param`, of `-D` or of a compound.
    pub origin: Option<Span>,
}

impl fmt::Display for ParamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.message)
    }
}

impl std::error::Error for ParamError {}
