//! `mason completions` and the hidden `mason man`.

use crate::failure::{Failure, Outcome};
use crate::output;
use clap::Command;
use std::path::{Path, PathBuf};

/// Write a script that completes mason's commands and options in a shell.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason completions bash > ~/.local/share/bash-completion/completions/mason
  mason completions zsh > ~/.zfunc/_mason")]
pub(crate) struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

/// Write man pages.
#[derive(clap::Args)]
pub(crate) struct ManArgs {
    /// The folder for the pages; made if it is missing
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn main(args: &Args, mut cli: Command) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut cli, "mason", &mut script);
    output::text(&String::from_utf8_lossy(&script))
}

pub(crate) fn man(args: &ManArgs, mut cli: Command) -> Outcome {
    let refused =
        |path: &Path, error| Failure::new(format!("{}: it cannot be written: {error}", path.display()));
    std::fs::create_dir_all(&args.out).map_err(|error| refused(&args.out, error))?;
    cli.build();
    for command in std::iter::once(&cli)
        .chain(cli.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help"))
    {
        let page = clap_mangen::Man::new(command.clone());
        let path = args.out.join(page.get_filename());
        let written = std::fs::File::create(&path).and_then(|mut file| page.render(&mut file));
        written.map_err(|error| refused(&path, error))?;
    }
    Ok(())
}
