//! The tests. Each has a name that stays, because tables and expectation files refer to it.

mod extended;
mod handshake;
mod info;
mod limits;
mod meta;
mod options;
mod order;
mod read;
mod refuse;
mod status;
mod tls;
mod write;
mod zero;

use crate::context::Context;
use crate::stop::Check;

/// A named test.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// What a server must do, in one line.
    pub(crate) says: &'static str,
    /// Whether the test sends requests that change the export.
    pub(crate) writes: bool,
    pub(crate) run: fn(&Context<'_>) -> Check,
}

/// A test that does not change the export.
const fn reads(name: &'static str, says: &'static str, run: fn(&Context<'_>) -> Check) -> Case {
    Case { name, says, writes: false, run }
}

/// A test that changes the export, or would change that of a broken server.
const fn writes(name: &'static str, says: &'static str, run: fn(&Context<'_>) -> Check) -> Case {
    Case { name, says, writes: true, run }
}

/// All tests in the order they run.
pub(crate) fn all() -> impl Iterator<Item = &'static Case> {
    [
        handshake::CASES,
        options::CASES,
        info::CASES,
        meta::CASES,
        tls::CASES,
        read::CASES,
        write::CASES,
        zero::CASES,
        refuse::CASES,
        limits::CASES,
        status::CASES,
        order::CASES,
        extended::CASES,
        zero::LAST,
        order::LAST,
        extended::LAST,
    ]
    .into_iter()
    .flatten()
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_unique_and_plain() {
        let names: Vec<_> = super::all().map(|case| case.name).collect();
        let unique: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
        for name in names {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let (group, rest) = name.split_once('.').expect("a group and a name");
            assert!(group.chars().all(plain) && rest.chars().all(plain), "{name}");
        }
    }
}
