//! Reads a graph file and all that it includes.

use super::ast::{Name, Statement};
use super::diag::{Bag, Diagnostic};
use super::files::{Files, LARGEST_FILE};
use super::parse;
use super::source::{Sources, Span};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Files within files within files.
const DEEPEST: usize = 16;

/// Bytes of all files of one graph together.
const LARGEST_TOTAL: usize = 16 << 20;

/// Files of one graph.
const MOST_FILES: usize = 1000;

/// One parsed file.
pub(super) struct File {
    pub(super) folder: PathBuf,
    pub(super) body: Vec<Statement>,
}

/// All the files of a graph, the graph file first.
#[derive(Default)]
pub(super) struct Loaded {
    pub(super) files: Vec<File>,
    /// Index of the file that an include statement means, by the place of its path.
    pub(super) includes: HashMap<Span, usize>,
}

pub(super) struct Loader<'a> {
    pub(super) disk: &'a dyn Files,
    pub(super) sources: &'a mut Sources,
    pub(super) bag: &'a mut Bag,
    loaded: Loaded,
    known: HashMap<PathBuf, usize>,
    /// The files being read, each included by the one before.
    open: Vec<PathBuf>,
    bytes: usize,
}

impl<'a> Loader<'a> {
    pub(super) fn new(disk: &'a dyn Files, sources: &'a mut Sources, bag: &'a mut Bag) -> Self {
        let loaded = Loaded::default();
        Loader { disk, sources, bag, loaded, known: HashMap::new(), open: Vec::new(), bytes: 0 }
    }

    /// Parses the text of the graph file, which messages call `path` and which stands at `opened`.
    pub(super) fn root(mut self, path: &Path, opened: PathBuf, text: String) -> Loaded {
        let identity = self.disk.identity(&opened);
        self.file(path, opened, text, identity);
        self.loaded
    }

    /// Parses a text, and the files that it includes, and returns its index.
    fn file(&mut self, path: &Path, opened: PathBuf, text: String, identity: PathBuf) -> usize {
        self.bytes += text.len();
        let folder = opened.parent().unwrap_or(Path::new("/")).to_path_buf();
        let source = self.sources.add_file(path, opened, text);
        let index = self.loaded.files.len();
        self.loaded.files.push(File { folder: folder.clone(), body: Vec::new() });
        self.known.insert(identity.clone(), index);
        let text = self.sources.get(source).map_or("", |source| source.text());
        if text.len() > LARGEST_FILE {
            let span = Span { source, start: 0, len: 0 };
            let message = format!("the file is larger than {} MiB", LARGEST_FILE >> 20);
            self.bag.push(Diagnostic::new("mason::too-large", span, message));
            return index;
        }
        let body = parse::file(source, text, self.bag);
        self.open.push(identity);
        self.includes(&body, path.parent().unwrap_or(Path::new("")), &folder);
        self.open.pop();
        self.loaded.files[index].body = body;
        index
    }

    /// Reads the files that these statements include. `shown` is the folder as messages write it.
    fn includes(&mut self, body: &[Statement], shown: &Path, folder: &Path) {
        for statement in body {
            match statement {
                Statement::Include(name) => self.include(name, shown, folder),
                Statement::Compound(compound) => self.includes(&compound.body, shown, folder),
                _ => {}
            }
        }
    }

    fn include(&mut self, name: &Name, shown: &Path, folder: &Path) {
        if self.bag.is_full() {
            return;
        }
        let path = shown.join(&name.text);
        let opened = folder.join(&name.text);
        let identity = self.disk.identity(&opened);
        if let Some(at) = self.open.iter().position(|open| *open == identity) {
            let names = self.open[at..].iter().chain([&identity]).map(|p| short(p));
            let cycle = names.collect::<Vec<_>>().join(" -> ");
            let message = format!("`{}` includes itself", name.text);
            self.bag.push(Diagnostic::new("mason::include-cycle", name.span, message).help(cycle));
            return;
        }
        if let Some(index) = self.known.get(&identity) {
            self.loaded.includes.insert(name.span, *index);
            return;
        }
        if self.open.len() >= DEEPEST || self.loaded.files.len() >= MOST_FILES {
            let message = match self.open.len() >= DEEPEST {
                true => format!("files are included more than {DEEPEST} deep"),
                false => format!("the graph has more than {MOST_FILES} files"),
            };
            self.bag.push(Diagnostic::new("mason::too-large", name.span, message));
            return;
        }
        match self.disk.read(&opened) {
            Ok(text) if self.bytes + text.len() > LARGEST_TOTAL => {
                let message = format!("the files of the graph are larger than {} MiB", LARGEST_TOTAL >> 20);
                self.bag.push(Diagnostic::new("mason::too-large", name.span, message));
            }
            Ok(text) => {
                let index = self.file(&path, opened, text, identity);
                self.loaded.includes.insert(name.span, index);
            }
            Err(error) => {
                let message = format!("cannot read `{}`: {}", path.display(), reason(&error));
                let error = Diagnostic::new("mason::include", name.span, message);
                let help = format!("the path is relative to the folder of this file, {}", folder.display());
                self.bag.push(error.help(help));
            }
        }
    }
}

/// What an I/O error says, in our words where they are plainer.
pub(super) fn reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => String::from("there is no such file"),
        std::io::ErrorKind::PermissionDenied => String::from("permission is missing"),
        std::io::ErrorKind::InvalidData => String::from("it is not UTF-8 text"),
        std::io::ErrorKind::IsADirectory => String::from("it is a folder"),
        _ => error.to_string(),
    }
}

fn short(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}
