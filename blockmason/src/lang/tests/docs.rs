//! The examples of the language's reference are what they say they are.

use super::*;

const REFERENCE: &str = include_str!("../../../../docs/language.md");

/// The fenced blocks with the words after their fences, in order.
fn blocks() -> Vec<(&'static str, &'static str)> {
    let mut parts = REFERENCE.split("```").skip(1);
    let mut blocks = Vec::new();
    while let Some(block) = parts.next() {
        blocks.push(block.split_once('\n').unwrap());
        parts.next();
    }
    blocks
}

/// The blocks that say which file they are.
struct Files;

impl super::Files for Files {
    fn read(&self, path: &Path) -> io::Result<String> {
        let name = path.strip_prefix("/srv").unwrap().display().to_string();
        let found = blocks().into_iter().find(|(info, _)| *info == format!("mason {name}"));
        found.map(|(_, text)| text.to_owned()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

#[test]
fn the_examples_of_the_reference_are_right() {
    let right: Vec<_> = blocks().into_iter().filter(|(info, _)| *info == "mason").collect();
    assert!(right.len() >= 5);
    for (_, text) in right {
        assert_eq!(errors_with(&Files, text, &Defines::new()), "fine", "{text}");
    }
}

#[test]
fn the_errors_of_the_reference_are_those() {
    let blocks = blocks();
    let wrong: Vec<_> = blocks.windows(2).filter(|pair| pair[0].0 == "mason wrong").collect();
    assert!(!wrong.is_empty());
    for pair in wrong {
        assert_eq!(errors(pair[0].1), pair[1].1);
    }
}

#[test]
fn fences_are_known() {
    let known =
        |info: &str| matches!(info, "mason" | "mason wrong" | "text") || info.starts_with("mason lib/");
    assert!(blocks().iter().all(|(info, _)| known(info)));
}
