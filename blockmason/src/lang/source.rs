//! The texts a graph was read from, and places in them.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A range of bytes in one of the [`Sources`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Span {
    /// Index into the sources.
    pub source: u32,
    /// First byte.
    pub start: u32,
    /// Length in bytes.
    pub len: u32,
}

impl Span {
    /// One past the last byte.
    pub fn end(self) -> u32 {
        self.start + self.len
    }

    /// From the start of `self` to the end of `last`, which stands in the same source.
    pub(super) fn to(self, last: Span) -> Span {
        Span { len: last.end().saturating_sub(self.start), ..self }
    }
}

/// One text: a graph file, or a value of the command line.
#[derive(Debug, Serialize, Deserialize)]
pub struct Source {
    path: PathBuf,
    opened: PathBuf,
    text: String,
    #[serde(skip)]
    lines: OnceLock<Vec<u32>>,
}

impl Source {
    /// What messages call it: the path as the administrator wrote it, or `-D`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path at which it was read; empty for a value of the command line.
    pub fn opened(&self) -> &Path {
        &self.opened
    }

    /// Its text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Where each line starts.
    fn lines(&self) -> &[u32] {
        self.lines.get_or_init(|| {
            let ends = self.text.bytes().enumerate().filter(|(_, b)| *b == b'\n');
            std::iter::once(0).chain(ends.map(|(i, _)| i as u32 + 1)).collect()
        })
    }

    /// The bytes of a line, with its end; lines count from 0.
    pub(super) fn line(&self, line: usize) -> std::ops::Range<usize> {
        let at = |line: usize| self.lines().get(line).map_or(self.text.len(), |start| *start as usize);
        at(line)..at(line + 1)
    }

    /// The line of a byte, from 0.
    pub(super) fn line_of(&self, at: usize) -> usize {
        self.lines().partition_point(|start| *start as usize <= at).saturating_sub(1)
    }

    /// Line and column of a byte, both from 1; the column counts characters.
    fn line_column(&self, at: usize) -> (usize, usize) {
        let lines = self.lines();
        let line = self.line_of(at) + 1;
        let start = lines.get(line.wrapping_sub(1)).map_or(0, |s| *s as usize);
        let before = self.text.get(start..at.min(self.text.len())).unwrap_or("");
        (line, before.chars().count() + 1)
    }
}

/// The texts that one graph was read from, each file once; the graph file itself is the first.
///
/// They can be serialised, so that a client may read files and a daemon parse them; see
/// [`super::parse_sources`].
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Sources(Vec<Source>);

impl Sources {
    /// Adds a text that is no file and returns its index.
    pub(super) fn add(&mut self, name: &str, text: impl Into<String>) -> u32 {
        self.add_file(Path::new(name), PathBuf::new(), text.into())
    }

    /// Adds the text of a file and returns its index.
    pub(super) fn add_file(&mut self, path: &Path, opened: PathBuf, text: String) -> u32 {
        self.0.push(Source { path: path.to_path_buf(), opened, text, lines: OnceLock::new() });
        (self.0.len() - 1) as u32
    }

    /// The text with that index.
    pub fn get(&self, source: u32) -> Option<&Source> {
        self.0.get(source as usize)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Source> {
        self.0.iter()
    }

    /// The place where a span starts.
    pub fn place(&self, span: Span) -> Place {
        match self.get(span.source) {
            Some(source) => {
                let (line, column) = source.line_column(span.start as usize);
                Place { file: source.path.display().to_string(), line, column }
            }
            None => Place { file: String::new(), line: 0, column: 0 },
        }
    }
}

/// A place in a graph file as people read it. Displays as `vm1.mason:12:5`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_count_lines_and_characters() {
        let mut sources = Sources::default();
        let source = sources.add("a.mason", "one\nzwei ä ö\n\nx");
        let at = |start| sources.place(Span { source, start, len: 1 }).to_string();
        assert_eq!(at(0), "a.mason:1:1");
        assert_eq!(at(3), "a.mason:1:4");
        assert_eq!(at(4), "a.mason:2:1");
        assert_eq!(at(12), "a.mason:2:8");
        assert_eq!(at(15), "a.mason:3:1");
        assert_eq!(at(16), "a.mason:4:1");
        assert_eq!(at(9999), "a.mason:4:2");
    }
}
