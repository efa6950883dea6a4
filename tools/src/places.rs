//! Places in a text that nobody has written: they are said in the words of the command line.

/// Says places in the text `name`, `NAME:5:9`, by what is asked for each line.
pub(crate) fn in_words(message: &str, name: &str, words: impl Fn(usize) -> &'static str) -> String {
    let mut out = String::with_capacity(message.len());
    let mut rest = message;
    while let Some(at) = rest.find(name) {
        let after = &rest[at + name.len()..];
        match number(after).and_then(|(line, after)| Some((line, number(after)?.1))) {
            Some((line, after)) => {
                out += &rest[..at];
                out += words(line);
                rest = after;
            }
            None => {
                out += &rest[..at + name.len()];
                rest = after;
            }
        }
    }
    out + rest
}

/// `:5`, and what comes after it.
fn number(text: &str) -> Option<(usize, &str)> {
    let text = text.strip_prefix(':')?;
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    Some((text[..end].parse().ok()?, &text[end..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_become_words() {
        let words = |line| if line < 3 { "--from" } else { "--to" };
        for (text, says) in [
            ("x (restore:3:9): full", "x (--to): full"),
            ("restore:1:30: restore: no", "--from: restore: no"),
            ("restore:1", "restore:1"),
            ("restore:5:6 and restore:2:1", "--to and --from"),
            ("", ""),
        ] {
            assert_eq!(in_words(text, "restore", words), says);
        }
    }
}
