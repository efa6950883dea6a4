//! `mason elements`: the reference of the element library, from the types' own descriptions.

mod json;
mod markdown;
mod text;

use crate::failure::{Failure, Outcome};
use crate::graphs::CATALOGUE;
use crate::output;
use blockmason::describe::{ElementType, Outs, find};
use std::path::PathBuf;

/// List the types of elements, or describe one of them.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason elements
  mason elements file
  mason elements --json | jq '.[].name'
  mason elements --markdown docs/elements")]
pub(crate) struct Args {
    /// A type
    #[arg(value_name = "TYPE", conflicts_with = "markdown")]
    name: Option<String>,

    /// Writes a JSON array of descriptions
    #[arg(long)]
    json: bool,

    /// Writes a page for each type and an index into this folder
    #[arg(long, value_name = "DIR", conflicts_with = "json")]
    markdown: Option<PathBuf>,
}

pub(crate) fn main(args: &Args) -> Outcome {
    if let Some(folder) = &args.markdown {
        return markdown::write(folder);
    }
    match &args.name {
        Some(name) => {
            let ty = find(CATALOGUE, name).ok_or_else(|| unknown(name))?;
            if args.json { output::json(&[json::describe(ty)]) } else { output::text(&text::page(ty)) }
        }
        None if args.json => output::json(&CATALOGUE.iter().map(|ty| json::describe(ty)).collect::<Vec<_>>()),
        None => output::text(&text::list()),
    }
}

fn unknown(name: &str) -> Failure {
    Failure::new(format!("there is no type {name}; `mason elements` lists all of them"))
}

/// The types with the name of their family, in the order of the families.
fn families() -> Vec<(&'static str, Vec<&'static ElementType>)> {
    let mut families: Vec<(&str, Vec<&ElementType>)> = Vec::new();
    for ty in CATALOGUE {
        let family = ty.family.name();
        match families.iter_mut().find(|(known, _)| *known == family) {
            Some((_, types)) => types.push(ty),
            None => families.push((family, vec![ty])),
        }
    }
    families
}

/// The ports in words.
fn ports(ty: &ElementType) -> String {
    let out = match ty.ports.out {
        Outs::None => "none".to_owned(),
        Outs::Named(names) => names.join(", "),
        Outs::Variadic { min } => format!("any names, at least {min}, in the order of the edges"),
    };
    format!("in: {}; out: {out}", if ty.ports.input { "in" } else { "none" })
}

/// What acknowledged writes outlive, in words.
fn survives(ty: &ElementType) -> &'static str {
    use blockmason::describe::Survives;
    match ty.survives {
        Survives::Nothing => "nothing: they are in this process's memory",
        Survives::Process => "the death of this process",
        Survives::Power => "the death of this process, and once flushed loss of power",
    }
}

/// What a reload does.
fn handover(ty: &ElementType) -> &'static str {
    use blockmason::describe::Handover;
    match ty.handover {
        Handover::Free => "without a pause",
        Handover::Gate => "behind a gate: requests in flight end first",
    }
}

/// What can be done with a handler.
fn access(handler: &blockmason::describe::Handler) -> &'static str {
    use blockmason::describe::Access;
    match handler.access {
        Access::Read => "read",
        Access::ReadWrite => "read and write",
        Access::Call => "call",
    }
}

/// The names of the handlers that the framework gives an element of this type: `requests`, `bytes`.
fn common(ty: &ElementType) -> String {
    let own = |name: &str| ty.handlers.iter().any(|handler| handler.name == name);
    let names = ty.all_handlers().map(|handler| handler.name).filter(|name| !own(name));
    names.collect::<Vec<_>>().join(", ")
}

/// How often a parameter is given.
fn presence(param: &blockmason::describe::Param) -> String {
    match (param.default, param.required) {
        (Some(""), _) => "default empty".to_owned(),
        (Some(default), _) => format!("default {default}"),
        (None, true) => "required".to_owned(),
        (None, false) => "optional".to_owned(),
    }
}

/// The kind of a parameter's value.
fn kind(param: &blockmason::describe::Param) -> String {
    let kind = match param.refers {
        Some(service) => format!("an element that provides {service}"),
        None => param.kind.to_owned(),
    };
    if param.list { format!("list of {kind}") } else { kind }
}

/// A doc comment as one line: line breaks in it mean nothing.
fn one_line(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ")
}
