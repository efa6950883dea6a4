//! `invariant "SENTENCE": every write path A -> B passes C or D`.

use super::super::ast::{Invariant, Which};
use super::super::diag::Diagnostic;
use super::super::spec::Paths;
use super::{Cursor, Result, blank, dotted, segment};
use nom::Parser;

impl Cursor<'_> {
    /// What follows the word `invariant`.
    pub(super) fn invariant(&mut self) -> Result<Invariant> {
        if !self.rest().starts_with('"') {
            return Err(self.expected("what the invariant says, as a string"));
        }
        let start = self.at;
        let sentence = self.value()?.ok_or_else(|| self.expected("a string"))?;
        if sentence.parts.iter().all(super::is_empty) {
            return Err(self.error(start, "an invariant without a sentence"));
        }
        self.skip();
        self.need(":")?;
        let start = self.at;
        let every = self.keyword("every");
        if !every && !self.keyword("no") {
            return Err(self.wrong_rule("`every` or `no`"));
        }
        let paths = match (self.keyword("write"), self.keyword("read")) {
            (true, _) => Paths::Write,
            (_, true) => Paths::Read,
            _ => Paths::All,
        };
        if !self.keyword("path") {
            return Err(self.wrong_rule(match paths {
                Paths::All => "`path`, `write path` or `read path`",
                Paths::Read | Paths::Write => "`path`",
            }));
        }
        let from = self.which()?;
        self.need("->")?;
        let to = self.which()?;
        let mut passes = Vec::new();
        if self.keyword("passes") {
            passes.push(self.which()?);
            while self.keyword("or") {
                passes.push(self.which()?);
            }
        } else if every {
            return Err(self.wrong_rule("`passes`"));
        }
        let last = passes.last().unwrap_or(&to).name.span;
        let span = self.span(start, last.end() as usize);
        Ok(Invariant { sentence, every, paths, from, to, passes, span })
    }

    /// `NAME` or `any KIND`.
    fn which(&mut self) -> Result<Which> {
        let what = "an element's name, a type, `export` or `sink`";
        let name = self.name(what, dotted)?;
        match name.text.as_str() {
            "any" => Ok(Which { any: true, name: self.name("a type, `export` or `sink`", dotted)? }),
            _ => Ok(Which { any: false, name }),
        }
    }

    /// Takes a word of the rule, and the blanks after it. A word before an arrow is none: it is the
    /// element with which the next statement begins.
    fn keyword(&mut self, word: &str) -> bool {
        let found = segment(self.rest()).is_ok_and(|(rest, taken)| {
            let next = blank.parse(rest).map_or(rest, |(next, _)| next);
            taken == word && !next.starts_with("->") && !rest.starts_with('.')
        });
        if found {
            self.at += word.len();
            self.skip();
        }
        found
    }

    #[cold]
    fn wrong_rule(&mut self, what: &str) -> Box<Diagnostic> {
        let help = "a rule is `every write path A -> B passes TYPE`, or `no path A -> B`";
        Box::new(self.expected(what).help(String::from(help)))
    }
}
