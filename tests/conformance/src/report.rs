//! Outcomes of tests, how they are shown, and how they compare with what was expected.

use crate::cases::Case;
use crate::stop::Stop;
use serde::Serialize;
use std::collections::BTreeMap;

/// How a test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    Pass,
    /// Passed, but a SHOULD was broken.
    Warn,
    Skip,
    Fail,
}

/// A test and how it ended.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) says: &'static str,
    pub(crate) verdict: Verdict,
    /// Why it was skipped or failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// Broken SHOULDs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) warnings: Vec<String>,
}

impl Line {
    /// The line of `case` after it ended with `result` and left `warnings`.
    pub(crate) fn new(case: &'static Case, result: Result<(), Stop>, warnings: Vec<String>) -> Self {
        let (verdict, reason) = match result {
            Ok(()) if warnings.is_empty() => (Verdict::Pass, None),
            Ok(()) => (Verdict::Warn, None),
            Err(Stop::Skip(why)) => (Verdict::Skip, Some(why)),
            Err(stop) => (Verdict::Fail, Some(stop.to_string())),
        };
        Self { name: case.name, says: case.says, verdict, reason, warnings }
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = match self.verdict {
            Verdict::Pass => "ok",
            Verdict::Warn => "warn",
            Verdict::Skip => "skip",
            Verdict::Fail => "FAIL",
        };
        write!(out, "{word:<4} {:<32} ", self.name)?;
        // The text comes partly from the server's numbers and strings; keep it to one line.
        let text = match &self.reason {
            Some(reason) if self.verdict == Verdict::Skip => format!("skipped: {reason}"),
            Some(reason) => format!("{reason} (must: {})", self.says),
            None if self.warnings.is_empty() => self.says.to_owned(),
            None => self.warnings.join("; "),
        };
        out.write_str(&text.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'"))
    }
}

/// The deviations a server is known for, by test name: whether the test fails every time.
pub(crate) type Expected = BTreeMap<String, bool>;

/// Parses an expectation file: lines of `NAME  # reason`, blank lines and lines of comment. `?NAME` is a test
/// that fails now and then.
///
/// # Errors
/// A line without reason, or a name that is no test.
pub(crate) fn parse_expected(text: &str) -> Result<Expected, String> {
    let mut expected = Expected::new();
    for (at, line) in text.lines().enumerate() {
        let (name, reason) = line.split_once('#').unwrap_or((line, ""));
        let (name, reason) = (name.trim(), reason.trim());
        let (name, always) = name.strip_prefix('?').map_or((name, true), |name| (name, false));
        if name.is_empty() {
            continue;
        }
        if reason.is_empty() {
            return Err(format!("line {}: '{name}' has no '# reason'", at + 1));
        }
        if !crate::cases::all().any(|case| case.name == name) {
            return Err(format!("line {}: there is no test '{name}'", at + 1));
        }
        expected.insert(name.to_owned(), always);
    }
    Ok(expected)
}

/// The whole run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) tests: Vec<Line>,
    /// Failures that were not expected.
    pub(crate) new: Vec<&'static str>,
    /// Expected failures that passed.
    pub(crate) vanished: Vec<&'static str>,
}

impl Report {
    pub(crate) fn new(tests: Vec<Line>, expected: &Expected) -> Self {
        let pick = |wanted: &dyn Fn(&Line) -> bool| {
            tests.iter().filter(|line| wanted(line)).map(|line| line.name).collect()
        };
        let new = pick(&|line| line.verdict == Verdict::Fail && !expected.contains_key(line.name));
        let passed = |line: &Line| matches!(line.verdict, Verdict::Pass | Verdict::Warn);
        let vanished = pick(&|line| passed(line) && expected.get(line.name) == Some(&true));
        Self { tests, new, vanished }
    }

    /// Whether the server did as it should, or as was expected of it.
    pub(crate) fn good(&self) -> bool {
        self.new.is_empty() && self.vanished.is_empty()
    }

    /// One line that sums up, and one for each difference from what was expected.
    pub(crate) fn summary(&self) -> String {
        let count = |verdict| self.tests.iter().filter(|line| line.verdict == verdict).count();
        let known = count(Verdict::Fail) - self.new.len();
        let mut text = format!(
            "{} tests: {} ok, {} with warnings, {} skipped, {} failed ({known} of them expected)",
            self.tests.len(),
            count(Verdict::Pass),
            count(Verdict::Warn),
            count(Verdict::Skip),
            count(Verdict::Fail),
        );
        for name in &self.vanished {
            text.push_str(&format!("\nvanished: {name} was expected to fail and did not"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, result: Result<(), Stop>) -> Line {
        let case = crate::cases::all().find(|case| case.name == name).expect("a test");
        Line::new(case, result, vec![])
    }

    #[test]
    fn differences_from_the_expected_are_found() {
        let expected = parse_expected(
            "# a comment\n\nread.simple # it cannot\nread.df  # nor that\ndisc.closes # x\n?read.in-flight # luck\n",
        );
        let expected = expected.expect("a good file");
        let tests = vec![
            line("read.simple", Ok(())),
            line("read.df", Err(Stop::Fail("no".into()))),
            line("read.cookies", Err(Stop::Silent("READ".into()))),
            line("disc.closes", Err(Stop::Skip("no".into()))),
            line("read.in-flight", Ok(())),
        ];
        let report = Report::new(tests, &expected);
        assert_eq!(report.new, ["read.cookies"]);
        assert_eq!(report.vanished, ["read.simple"]);
        assert!(!report.good());
    }

    #[test]
    fn expectations_need_a_known_name_and_a_reason() {
        assert!(parse_expected("read.simple").is_err());
        assert!(parse_expected("no.such-test # why").is_err());
    }

    #[test]
    fn a_line_stays_one_line() {
        let shown = line("read.df", Err(Stop::Fail("a\nb\u{1b}[2J".into()))).to_string();
        assert!(!shown.contains(|c: char| c.is_control()), "{shown}");
    }
}
