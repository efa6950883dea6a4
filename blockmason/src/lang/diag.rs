//! What is wrong with a graph, and how it is shown.

use super::source::{Place, Source, Sources, Span};
use miette::{
    GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, MietteError, MietteSpanContents,
    Severity, SourceSpan, SpanContents,
};
use std::collections::HashSet;
use std::fmt;
use std::io::IsTerminal;
use std::ops::Range;
use std::sync::Arc;

/// Errors kept for one graph. Whoever mends these runs the check again anyway.
const MOST: usize = 100;

/// One error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Stable, for scripts: `mason::unknown-type`.
    pub code: &'static str,
    /// One sentence without a full stop that names the element, if there is one.
    pub message: String,
    /// Where: the first is the place of the error, the others explain it.
    pub labels: Vec<Label>,
    /// What to do about it.
    pub help: Option<String>,
}

/// A place and what is to be said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The place.
    pub span: Span,
    /// A few words, may be empty.
    pub text: String,
}

impl Diagnostic {
    /// An error at a place.
    pub fn new(code: &'static str, span: Span, message: impl Into<String>) -> Self {
        let labels = vec![Label { span, text: String::new() }];
        Diagnostic { code, message: message.into(), labels, help: None }
    }

    /// Says something of the place of the error itself.
    pub fn here(mut self, text: impl Into<String>) -> Self {
        self.labels[0].text = text.into();
        self
    }

    /// Points at another place.
    pub fn label(mut self, span: Span, text: impl Into<String>) -> Self {
        self.labels.push(Label { span, text: text.into() });
        self
    }

    /// Points at another place, if there is one.
    pub fn label_maybe(self, span: Option<Span>, text: &str) -> Self {
        match span {
            Some(span) => self.label(span, text),
            None => self,
        }
    }

    /// Says what to do.
    pub fn help(mut self, help: impl Into<Option<String>>) -> Self {
        self.help = help.into().or(self.help);
        self
    }

    /// The place of the error.
    pub fn span(&self) -> Span {
        self.labels[0].span
    }
}

/// Collects errors; at most [`MOST`] are kept, and one of a kind for each place, so that a compound
/// that is used a hundred times does not report a mistake in its body a hundred times.
#[derive(Debug, Default)]
pub(super) struct Bag {
    list: Vec<Diagnostic>,
    seen: HashSet<(&'static str, Span)>,
    dropped: usize,
}

impl Bag {
    pub(super) fn push(&mut self, diagnostic: Diagnostic) {
        if self.list.len() >= MOST {
            self.dropped += 1;
        } else if self.seen.insert((diagnostic.code, diagnostic.span())) {
            self.list.push(diagnostic);
        }
    }

    /// False if an error of this kind at this place would not be kept: it need not be worded then.
    pub(super) fn wants(&mut self, code: &'static str, span: Span) -> bool {
        let full = self.is_full();
        self.dropped += usize::from(full);
        !full && !self.seen.contains(&(code, span))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.list.len() >= MOST
    }

    /// The errors in the order of their places, or nothing if there are none.
    pub(super) fn finish(mut self, sources: Arc<Sources>) -> Result<(), Diagnostics> {
        if self.list.is_empty() {
            return Ok(());
        }
        self.list.sort_by_key(Diagnostic::span);
        Err(Diagnostics { sources, list: self.list, dropped: self.dropped })
    }
}

/// How [`Diagnostics::render`] draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// ASCII without colours, for logs and pipes.
    Plain,
    /// Line drawing characters and colours, for a terminal.
    Fancy,
}

impl Style {
    /// Fancy on a terminal, unless `NO_COLOR` is set; else plain.
    pub fn detect(stream: &impl IsTerminal) -> Self {
        match stream.is_terminal() && std::env::var_os("NO_COLOR").is_none() {
            true => Style::Fancy,
            false => Style::Plain,
        }
    }
}

/// All the errors of one graph, never none of them.
#[derive(Clone, Debug)]
pub struct Diagnostics {
    sources: Arc<Sources>,
    list: Vec<Diagnostic>,
    dropped: usize,
}

impl Diagnostics {
    /// A single error.
    pub(super) fn one(sources: Sources, diagnostic: Diagnostic) -> Self {
        Diagnostics { sources: Arc::new(sources), list: vec![diagnostic], dropped: 0 }
    }

    /// The number of errors found, those beyond the first hundred included.
    pub fn count(&self) -> usize {
        self.list.len() + self.dropped
    }

    /// The errors in the order of their places; a hundred at most.
    pub fn iter(&self) -> impl Iterator<Item = &Diagnostic> {
        self.list.iter()
    }

    /// The place of an error.
    pub fn place(&self, diagnostic: &Diagnostic) -> Place {
        self.sources.place(diagnostic.span())
    }

    /// The texts that the errors point into.
    pub fn sources(&self) -> &Arc<Sources> {
        &self.sources
    }

    /// The first error in one line: `vm1.mason:3:15: unknown type `fiel` (did you mean `file`?)`.
    pub fn first_line(&self) -> String {
        self.list.first().map_or_else(String::new, |first| {
            let help = first.help.as_ref().map_or_else(String::new, |help| format!(" ({help})"));
            format!("{}: {}{help}", self.place(first), first.message)
        })
    }

    /// Draws every error with its source lines. Long messages are wrapped at `width` columns if fancy,
    /// and left whole if plain.
    pub fn render(&self, style: Style, width: usize) -> String {
        let theme = match style {
            Style::Plain => GraphicalTheme::none(),
            Style::Fancy => GraphicalTheme::unicode(),
        };
        let handler = GraphicalReportHandler::new_themed(theme)
            .with_wrap_lines(style == Style::Fancy)
            .with_width(width)
            .with_links(false)
            .with_context_lines(1);
        let texts: Vec<Arc<Text<'_>>> = self.sources.iter().map(Text::new).collect();
        let mut out = String::new();
        for diagnostic in &self.list {
            let drawn = Drawn::new(diagnostic, &self.sources, &texts);
            // Writing to a String cannot fail; a source that miette cannot slice leaves the message.
            if handler.render_report(&mut out, &drawn).is_err() {
                out.push_str(&format!("{}: {}\n", self.place(diagnostic), diagnostic.message));
            }
            out.push('\n');
        }
        out.push_str(&self.tally());
        out
    }

    fn tally(&self) -> String {
        let noun = if self.count() == 1 { "error" } else { "errors" };
        let shown = if self.dropped > 0 {
            format!(", the first {} are shown", self.list.len())
        } else {
            String::new()
        };
        format!("{} {noun}{shown}\n", self.count())
    }

    /// For programs: `{"count": 1, "errors": [{"code", "message", "file", "line", "column", "length",
    /// "help", "also": [{"text", "file", "line", "column", "length"}]}]}`. Lines and columns count
    /// from 1, columns in characters, lengths in bytes; `help` may be null.
    pub fn to_json(&self) -> serde_json::Value {
        let errors: Vec<_> = self.list.iter().map(|d| self.error_to_json(d)).collect();
        serde_json::json!({ "count": self.count(), "errors": errors })
    }

    fn error_to_json(&self, diagnostic: &Diagnostic) -> serde_json::Value {
        let mut also = diagnostic.labels.iter().map(|label| {
            let place = self.sources.place(label.span);
            serde_json::json!({
                "text": label.text, "file": place.file, "line": place.line, "column": place.column,
                "length": label.span.len,
            })
        });
        let mut error = also.next().unwrap_or_default();
        error["code"] = diagnostic.code.into();
        error["message"] = diagnostic.message.as_str().into();
        error["help"] = diagnostic.help.as_deref().into();
        error["also"] = also.collect();
        error
    }
}

/// As [`Style::Plain`].
impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(Style::Plain, 100))
    }
}

impl std::error::Error for Diagnostics {}

/// Longer lines are not drawn, in bytes: nobody could read them, and miette panics beyond 65,535 columns.
const LONGEST_LINE: usize = 4096;

/// One source as it is drawn.
#[derive(Debug)]
struct Text<'a> {
    source: &'a Source,
    /// The text with harmless characters, of the same length.
    text: String,
}

impl<'a> Text<'a> {
    fn new(source: &'a Source) -> Arc<Self> {
        Arc::new(Text { source, text: source.text().chars().map(harmless).collect() })
    }

    /// What of a span is drawn: the part on its first line. None if a line about it is too long.
    fn clip(&self, span: Span) -> Option<Range<usize>> {
        let line = self.source.line_of(span.start as usize);
        let long = |line: usize| self.source.line(line).len() > LONGEST_LINE;
        if (line.saturating_sub(1)..=line + 1).any(long) {
            return None;
        }
        let start = span.start as usize;
        Some(start..(span.end() as usize).min(self.source.line(line).end).max(start))
    }
}

/// Finds lines by the table, where miette would count them from the beginning for every label.
impl miette::SourceCode for Text<'_> {
    fn read_span<'b>(
        &'b self,
        span: &SourceSpan,
        before: usize,
        after: usize,
    ) -> Result<Box<dyn SpanContents<'b> + 'b>, MietteError> {
        let first = self.source.line_of(span.offset()).saturating_sub(before);
        let last = self.source.line_of(span.offset() + span.len()) + after;
        let range = self.source.line(first).start..self.source.line(last).end;
        let text = self.text.get(range.clone()).ok_or(MietteError::OutOfBounds)?;
        let inner = SourceSpan::from((span.offset() - range.start, span.len()));
        let found = text.read_span(&inner, before, after)?;
        let moved = SourceSpan::from((found.span().offset() + range.start, found.span().len()));
        let (data, line, column) = (found.data(), found.line() + first, found.column());
        let name = self.source.path().display().to_string();
        Ok(Box::new(MietteSpanContents::new_named(name, data, moved, line, column, found.line_count())))
    }
}

/// A character as it may be sent to a terminal: control characters become others of the same length, so
/// that a hostile file cannot move the cursor and spans still fit.
fn harmless(c: char) -> char {
    match c {
        '\n' | '\t' => c,
        c if c.is_control() && c.len_utf8() == 1 => '?',
        c if c.is_control() => '\u{b7}',
        c => c,
    }
}

/// One diagnostic in the shape that miette draws. Labels in other files become related advice, since
/// miette draws one source at a time.
#[derive(Debug)]
struct Drawn<'a> {
    inner: MietteDiagnostic,
    source: Option<Arc<Text<'a>>>,
    related: Vec<Drawn<'a>>,
}

impl<'a> Drawn<'a> {
    fn new(diagnostic: &Diagnostic, sources: &Sources, texts: &[Arc<Text<'a>>]) -> Self {
        let home = diagnostic.span().source;
        let (here, there): (Vec<&Label>, Vec<&Label>) =
            diagnostic.labels.iter().partition(|label| label.span.source == home);
        let text = texts.get(home as usize).filter(|text| text.clip(diagnostic.span()).is_some());
        let message = match text {
            Some(_) => diagnostic.message.clone(),
            None => format!("{}: {}", sources.place(diagnostic.span()), diagnostic.message),
        };
        let labeled = here.into_iter().filter_map(|label| {
            let range = text?.clip(label.span)?;
            let words = (!label.text.is_empty()).then(|| label.text.clone());
            Some(match label.span == diagnostic.span() {
                true => LabeledSpan::new_primary_with_span(words, range),
                false => LabeledSpan::new_with_span(words, range),
            })
        });
        let mut inner = MietteDiagnostic::new(message).with_code(diagnostic.code).with_labels(labeled);
        inner.help = diagnostic.help.clone();
        let related = there.into_iter().filter_map(|label| Drawn::advice(label, texts)).collect();
        Drawn { inner, source: text.cloned(), related }
    }

    fn advice(label: &Label, texts: &[Arc<Text<'a>>]) -> Option<Self> {
        let text = texts.get(label.span.source as usize)?;
        let span = LabeledSpan::new_with_span(None, text.clip(label.span)?);
        let inner =
            MietteDiagnostic::new(label.text.clone()).with_severity(Severity::Advice).with_label(span);
        Some(Drawn { inner, source: Some(text.clone()), related: Vec::new() })
    }
}

impl fmt::Display for Drawn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.inner, f)
    }
}

impl std::error::Error for Drawn<'_> {}

impl miette::Diagnostic for Drawn<'_> {
    fn code<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.inner.code()
    }

    fn severity(&self) -> Option<Severity> {
        self.inner.severity()
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.inner.help()
    }

    fn source_code(&self) -> Option<&dyn miette::SourceCode> {
        self.source.as_deref().map(|source| source as &dyn miette::SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        self.inner.labels()
    }

    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn miette::Diagnostic> + 'a>> {
        if self.related.is_empty() {
            return None;
        }
        Some(Box::new(self.related.iter().map(|related| related as &dyn miette::Diagnostic)))
    }
}
