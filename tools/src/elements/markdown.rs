//! The reference as pages that stand in the repository.

use super::{access, common, families, handover, kind, one_line, ports, presence, survives};
use crate::failure::{Failure, Outcome};
use crate::graphs::CATALOGUE;
use blockmason::describe::ElementType;
use blockmason::graph::handlers::{COMMON, SOURCE};
use std::fmt::Write;
use std::path::Path;

/// The first line of every page.
const GENERATED: &str = "<!-- Written by `mason elements --markdown docs/elements`. -->\n\n";

/// Writes all pages. Those of types that are gone are removed.
pub(super) fn write(folder: &Path) -> Outcome {
    let refused = |what: &Path, error: std::io::Error| {
        Failure::new(format!("{}: it cannot be written: {error}", what.display()))
    };
    std::fs::create_dir_all(folder).map_err(|error| refused(folder, error))?;
    let pages = pages();
    for entry in folder.read_dir().map_err(|error| refused(folder, error))?.flatten() {
        let path = entry.path();
        let known = pages.iter().any(|(name, _)| entry.file_name() == name.as_str());
        let ours = || std::fs::read_to_string(&path).is_ok_and(|text| text.starts_with(GENERATED));
        if !known && ours() {
            std::fs::remove_file(&path).map_err(|error| refused(&path, error))?;
        }
    }
    for (name, text) in pages {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(|error| refused(&path, error))?;
    }
    Ok(())
}

/// The name of every page's file, and its text.
fn pages() -> Vec<(String, String)> {
    let mut pages = vec![("README.md".to_owned(), index())];
    pages.extend(CATALOGUE.iter().map(|ty| (format!("{}.md", ty.name), page(ty))));
    pages
}

fn index() -> String {
    let mut out = format!("{GENERATED}# Elements\n\nWhat a graph can be made of. ");
    out += "`mason elements TYPE` shows the same pages on a terminal.\n";
    for (family, types) in families() {
        // Writing to a String cannot fail.
        let _ = write!(out, "\n## {family}\n\n| type | what it does |\n|---|---|\n");
        for ty in types {
            let _ = writeln!(out, "| [`{0}`]({0}.md) | {1} |", ty.name, cell(ty.summary));
        }
    }
    out += "\n## Handlers of every element\n\n| name | access | meaning |\n|---|---|---|\n";
    let also = SOURCE.iter().map(|handler| (handler, ", where requests enter a graph"));
    for (handler, rest) in COMMON.iter().map(|handler| (handler, "")).chain(also) {
        let _ = writeln!(out, "| `{}` | {} | {}{rest} |", handler.name, access(handler), cell(handler.doc));
    }
    out
}

fn page(ty: &ElementType) -> String {
    let mut out = format!("{GENERATED}# {}\n\n*{}*: {}.\n\n", ty.name, ty.family.name(), ty.summary);
    let _ = write!(out, "{}\n\n", ty.doc.trim());
    let _ = writeln!(out, "- Ports: {}.", ports(ty));
    let _ = writeln!(out, "- Acknowledged writes outlive {}.", survives(ty));
    let _ = writeln!(out, "- A reload replaces it {}.", handover(ty));
    if !ty.provides.is_empty() {
        let _ = writeln!(out, "- Elements that refer to it find: {}.", ty.provides.join(", "));
    }
    if ty.layout {
        out += "- It is part of the layout: the data makes sense only below the same graph.\n";
    }
    if !ty.params.is_empty() {
        out += "\n## Parameters\n\n| name | value | | meaning |\n|---|---|---|---|\n";
    }
    for param in ty.params {
        let (kind, presence) = (cell(&kind(param)), cell(&presence(param)));
        let _ = writeln!(out, "| `{}` | {kind} | {presence} | {} |", param.name, cell(param.doc));
    }
    if !ty.handlers.is_empty() {
        out += "\n## Handlers\n\n| name | access | meaning |\n|---|---|---|\n";
    }
    for handler in ty.handlers {
        let _ = writeln!(out, "| `{}` | {} | {} |", handler.name, access(handler), cell(handler.doc));
    }
    let _ = writeln!(out, "\n[Every such element](README.md#handlers-of-every-element) has: {}.", common(ty));
    let _ = write!(out, "\n## Example\n\n```\n{}\n```\n", ty.example.trim_end());
    out
}

/// A text as a cell of a table.
fn cell(text: &str) -> String {
    one_line(text).replace('|', "\\|")
}
