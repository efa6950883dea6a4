//! Graph files as commands take them: path, parameters, the two folders that graphs may name.

use crate::failure::{Failure, Outcome};
use crate::folders::{Folders, make_run, make_state};
use crate::logs::colours;
use blockmason::graph::Graph;
use blockmason::graph::build::Builder;
use blockmason::lang::{Defines, Diagnostics, Spec, Style};
use std::path::{Path, PathBuf};

/// The table of types that this program serves.
pub(crate) use blockmason_elements::ALL as CATALOGUE;

/// What every command that reads graph files takes.
#[derive(clap::Args)]
pub(crate) struct GraphArgs {
    /// Sets a parameter of the graphs, used there as ${KEY}
    #[arg(short = 'D', long = "define", value_name = "KEY=VALUE")]
    defines: Vec<String>,

    /// Keeps state here; a graph finds its own folder below as ${state}
    /// [default: $XDG_STATE_HOME/mason, else ~/.local/state/mason; for root /var/lib/mason]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
}

/// A graph file that has been read.
pub(crate) struct GraphFile {
    /// The stem of the file.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) spec: Spec,
    /// What `${state}` and `${run}` meant, unless `-D` said something else.
    state: Option<PathBuf>,
    run: Option<PathBuf>,
}

/// Reads graphs with one set of parameters.
pub(crate) struct Reader {
    pub(crate) folders: Folders,
    /// Where relative paths of the command line start.
    pub(crate) here: PathBuf,
    given: Defines,
}

impl GraphArgs {
    /// Checks the parameters.
    pub(crate) fn reader(&self) -> Outcome<Reader> {
        let here = std::env::current_dir()
            .map_err(|error| Failure::new(format!("the current folder is not to be found: {error}")))?;
        let mut given = Defines::new();
        for define in &self.defines {
            given.set_from(define, &here).map_err(|error| Failure::Usage(format!("-D: {error}")))?;
        }
        Ok(Reader { folders: Folders::find(self.state.as_deref()), here, given })
    }
}

impl Reader {
    /// Reads and checks a graph; opens nothing but graph files.
    pub(crate) fn read(&self, path: &Path) -> Result<GraphFile, Diagnostics> {
        let name = name_of(path);
        let given = |key| self.given.iter().any(|define| define.key == key);
        let state = self.folders.state.as_ref().filter(|_| !given("state")).map(|state| state.join(&name));
        let run = (!given("run")).then(|| self.folders.run.clone());
        let mut own = Defines::new();
        for (key, folder) in [("state", &state), ("run", &run)] {
            // A folder whose name is no text cannot be written in a graph either.
            if let Some(text) = folder.as_ref().and_then(|folder| folder.to_str()) {
                own.set(key, text, &self.here);
            }
        }
        let spec = blockmason::lang::load(path, &self.given.clone().or(&own))?;
        blockmason::lang::check(&spec, CATALOGUE)?;
        Ok(GraphFile { name, path: path.to_owned(), spec, state, run })
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
    /// Makes the folders that the graph names as `${state}` and `${run}`.
    pub(crate) fn make_folders(&self) -> Outcome {
        match &self.state {
            Some(state) if self.names(state) => make_state(state)?,
            _ => {}
        }
        match &self.run {
            Some(run) if self.names(run) => make_run(run),
            _ => Ok(()),
        }
    }

    /// True if a value of the graph has this folder in it.
    fn names(&self, folder: &Path) -> bool {
        let Some(folder) = folder.to_str() else { return false };
        let entries = self.spec.elements.iter().flat_map(|element| element.params.entries());
        entries.flat_map(|entry| entry.values()).any(|value| value.text().contains(folder))
    }

    /// Makes its elements: files are opened, and created where the graph says so.
    pub(crate) fn build(&self, state_dir: &Path, shards: usize) -> Outcome<Graph> {
        self.make_folders()?;
        let builder = Builder { catalogue: CATALOGUE, name: &self.name, state_dir, shards };
        builder.build(&self.spec).map_err(|error| Failure::in_graph(&error, &self.spec))
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
