//! Graph files as commands take them: path, parameters, the two folders that graphs may name.

use crate::failure::{Failure, Outcome};
use crate::folders::{Folders, here, make_run, make_state};
use crate::logs::colours;
use blockmason::graph::Graph;
use blockmason::graph::build::Builder;
use blockmason::lang::{
    Defines, Diagnostics, Disk, Files, Sources, Spec, Style, load_checked, parse_checked,
};
use std::path::{Path, PathBuf};

/// The table of types that this program serves.
pub(crate) use blockmason_elements::ALL as CATALOGUE;

/// What every command that reads graph files takes.
#[derive(clap::Args)]
pub(crate) struct GraphArgs {
    #[command(flatten)]
    defines: DefineArgs,

    /// Keeps state here; a graph finds its own folder below as ${state}
    /// [default: $XDG_STATE_HOME/mason, else ~/.local/state/mason; for root /var/lib/mason]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

/// Parameters on a command line.
#[derive(clap::Args)]
pub(crate) struct DefineArgs {
    /// Sets a parameter of the graphs, used there as ${KEY}
    #[arg(short = 'D', long = "define", value_name = "KEY=VALUE")]
    defines: Vec<String>,
}

impl DefineArgs {
    /// The current folder, where relative paths start, and the parameters.
    pub(crate) fn read(&self) -> Outcome<(PathBuf, Defines)> {
        let here = here()?;
        let mut given = Defines::new();
        for define in &self.defines {
            given.set_from(define, &here).map_err(|error| Failure::Usage(format!("-D: {error}")))?;
        }
        Ok((here, given))
    }
}

/// A graph file that has been read.
#[derive(Clone)]
pub(crate) struct GraphFile {
    /// The stem of the file.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) spec: Spec,
    /// What `${state}` and `${run}` mean, where it is ours to say.
    state: Option<PathBuf>,
    run: Option<PathBuf>,
}

/// Reads graphs with one set of parameters.
#[derive(Clone)]
pub(crate) struct Reader {
    pub(crate) folders: Folders,
    /// Where relative paths of the command line start.
    pub(crate) here: PathBuf,
    /// The `-D` of the command line.
    pub(crate) given: Defines,
}

impl GraphArgs {
    /// Checks the parameters.
    pub(crate) fn reader(&self) -> Outcome<Reader> {
        let (here, given) = self.defines.read()?;
        Ok(Reader { folders: Folders::find(self.state.as_deref()), here, given })
    }
}

impl Reader {
    /// Reads and checks a graph; opens nothing but graph files.
    ///
    /// `${state}` and `${run}` mean our folders where neither `-D` nor the graph gives them a meaning:
    /// they are defined only when the graph is not complete without.
    pub(crate) fn read(&self, path: &Path) -> Result<GraphFile, Diagnostics> {
        // A pipe can be read no second time, so all ways share the text. What cannot be read at all is
        // for the language to say.
        let (Ok(text), Ok(opened)) = (Disk.read(path), std::path::absolute(path)) else {
            let spec = load_checked(path, &self.given, CATALOGUE)?;
            return Ok(GraphFile {
                name: name_of(path),
                path: path.to_owned(),
                spec,
                state: None,
                run: None,
            });
        };
        self.read_text(&Disk, path, &opened, &text)
    }

    /// Reads and checks a graph from the texts that another process has read.
    pub(crate) fn read_sources(&self, sources: &Sources) -> Result<GraphFile, Diagnostics> {
        let root = sources.get(0);
        let (path, opened, text) =
            root.map_or((Path::new(""), Path::new(""), ""), |s| (s.path(), s.opened(), s.text()));
        self.read_text(sources, path, opened, text)
    }

    fn read_text(
        &self,
        files: &dyn Files,
        path: &Path,
        opened: &Path,
        text: &str,
    ) -> Result<GraphFile, Diagnostics> {
        let name = name_of(path);
        let state = self.folders.state.as_ref().map(|state| state.join(&name));
        let run = Some(self.folders.run.clone());
        let read = |(state, run): (Option<PathBuf>, Option<PathBuf>)| {
            let defines = self.defines(&state, &run);
            let spec = parse_checked(files, path, opened.to_owned(), text.to_owned(), &defines, CATALOGUE)?;
            Ok(GraphFile { name: name.clone(), path: path.to_owned(), spec, state, run })
        };
        let ways = [(None, None), (state.clone(), None), (None, run.clone())];
        let complete = ways.into_iter().find_map(|way| read(way).ok());
        complete.map_or_else(|| read((state, run)), Ok)
    }

    /// What `-D` says, and where it is silent these folders.
    fn defines(&self, state: &Option<PathBuf>, run: &Option<PathBuf>) -> Defines {
        let mut own = Defines::new();
        for (key, folder) in [("state", state), ("run", run)] {
            // A folder whose name is no text cannot be written in a graph either.
            if let Some(text) = folder.as_ref().and_then(|folder| folder.to_str()) {
                own.set(key, text, &self.here);
            }
        }
        self.given.clone().or(&own)
    }

    /// As [`read`](Self::read), with what is wrong drawn on stderr.
    pub(crate) fn read_or_say(&self, path: &Path) -> Outcome<GraphFile> {
        self.read(path).map_err(|diagnostics| {
            say(&diagnostics);
            Failure::Said
        })
    }
}

impl GraphFile {
    /// The same with another graph.
    pub(crate) fn with(self, spec: Spec) -> GraphFile {
        GraphFile { spec, ..self }
    }

    /// Makes the folders that the graph means by `${state}` and `${run}`.
    pub(crate) fn make_folders(&self) -> Outcome {
        self.state.as_deref().map_or(Ok(()), make_state)?;
        self.run.as_deref().map_or(Ok(()), make_run)
    }

    /// Makes its elements: files are opened, and created where the graph says so.
    pub(crate) fn build(&self, state_dir: &Path, shards: usize) -> blockmason::Result<Graph> {
        let builder = Builder { catalogue: CATALOGUE, name: &self.name, state_dir, shards };
        builder.build(&self.spec)
    }
}

/// A graph's name: `vm1.mason` is `vm1`.
pub(crate) fn name_of(path: &Path) -> String {
    path.file_stem().map_or_else(|| "graph".to_owned(), |stem| stem.to_string_lossy().into_owned())
}

/// Draws what is wrong on stderr, with colours on a terminal.
pub(crate) fn say(diagnostics: &Diagnostics) {
    let style = if colours(&std::io::stderr()) { Style::Fancy } else { Style::Plain };
    eprint!("{}", diagnostics.render(style, 100));
}
