//! The reference on a terminal.

use super::{access, common, families, handover, kind, one_line, ports, presence, survives};
use blockmason::describe::ElementType;
use blockmason::graph::handlers::{COMMON, SOURCE};
use std::fmt::Write;

/// Columns that text is wrapped at.
const WIDTH: usize = 96;

/// Every type with its line, by family.
pub(super) fn list() -> String {
    let families = families();
    let names = families.iter().flat_map(|(_, types)| types.iter().map(|ty| ty.name.len()));
    let width = names.max().unwrap_or(0);
    let mut out = String::new();
    for (family, types) in families {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{family}");
        for ty in types {
            let _ = writeln!(out, "  {:width$}  {}", ty.name, ty.summary);
        }
    }
    out += "\nHandlers of every element\n";
    for handler in COMMON {
        let _ = writeln!(out, "  {}  {}: {}", handler.name, access(handler), handler.doc);
    }
    out += "Where requests enter a graph, also\n";
    for handler in SOURCE {
        let _ = writeln!(out, "  {}  {}: {}", handler.name, access(handler), handler.doc);
    }
    out + "\n`mason elements TYPE` describes one of them.\n"
}

/// Everything about one type.
pub(super) fn page(ty: &ElementType) -> String {
    let mut out = format!("{} ({}): {}\n\n", ty.name, ty.family.name(), ty.summary);
    for paragraph in ty.doc.split("\n\n") {
        wrap(&mut out, "", paragraph);
        out.push('\n');
    }
    let _ = writeln!(out, "Ports       {}", ports(ty));
    let _ = writeln!(out, "Survival    acknowledged writes outlive {}", survives(ty));
    let _ = writeln!(out, "Reload      {}", handover(ty));
    if !ty.provides.is_empty() {
        let _ = writeln!(out, "Provides    {}", ty.provides.join(", "));
    }
    if ty.layout {
        let _ = writeln!(out, "Layout      the data makes sense only below the same graph");
    }
    if !ty.params.is_empty() {
        out += "\nParameters\n";
    }
    for param in ty.params {
        let _ = writeln!(out, "  {}  {}, {}", param.name, kind(param), presence(param));
        wrap(&mut out, "      ", param.doc);
    }
    out += "\nHandlers\n";
    for handler in ty.handlers {
        let _ = writeln!(out, "  {}  {}: {}", handler.name, access(handler), one_line(handler.doc));
    }
    let _ = writeln!(out, "  and those of every such element: {}", common(ty));
    out += "\nExample\n";
    for line in ty.example.lines() {
        let _ = writeln!(out, "  {line}");
    }
    out
}

/// Appends words in lines of at most [`WIDTH`] columns.
fn wrap(out: &mut String, indent: &str, text: &str) {
    let mut used = 0;
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if used > 0 && used + 1 + length > WIDTH {
            out.push('\n');
            used = 0;
        }
        let before = if used == 0 { indent } else { " " };
        out.push_str(before);
        out.push_str(word);
        used += before.len() + length;
    }
    if used > 0 {
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wraps() {
        let mut out = String::new();
        wrap(&mut out, "  ", &"word ".repeat(30));
        assert!(out.lines().count() == 2 && out.lines().all(|line| line.len() <= WIDTH));
        assert!(out.lines().all(|line| line.starts_with("  w")));
    }
}
