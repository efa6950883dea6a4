//! From text to statements. The tokens are nom parsers; what a token means depends on where it stands
//! (`=` ends a key but not a value), so there is no separate pass that cuts them.

mod invariant;

use super::ast::{Compound, Element, End, Name, Part, Port, Setting, Statement, Value};
use super::diag::{Bag, Diagnostic};
use super::source::Span;
use nom::branch::alt;
use nom::bytes::complete::{tag, take_until, take_while, take_while1};
use nom::character::complete::{char, multispace1, satisfy};
use nom::combinator::{not, recognize};
use nom::multi::many0_count;
use nom::sequence::{pair, preceded, terminated};
use nom::{IResult, Parser};

/// Compounds defined within compounds.
const DEEPEST: usize = 16;

/// Bytes of a name with its scopes.
const LONGEST_NAME: usize = 255;

/// What a name is, for messages.
const NAMES: &str = "a name begins with an ASCII letter or `_`; letters, digits, `_` and `-` may follow";

/// The words that begin a statement.
const KEYWORDS: [&str; 5] = ["element", "param", "include", "compound", "invariant"];

type Result<T> = std::result::Result<T, Box<Diagnostic>>;
type Token<'a> = IResult<&'a str, &'a str>;

fn is_name_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_'
}

/// One segment of a name: a letter or `_`, then letters, digits, `_` and `-`; `->` ends it.
fn segment(input: &str) -> Token<'_> {
    let inside = take_while1(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let dash = recognize(terminated(char('-'), not(char('>'))));
    recognize(pair(satisfy(is_name_start), many0_count(alt((inside, dash))))).parse(input)
}

/// A name with its compound scopes, `Move.Copy`.
fn dotted(input: &str) -> Token<'_> {
    recognize(pair(segment, many0_count(preceded(char('.'), segment)))).parse(input)
}

/// White space and comments.
fn blank(input: &str) -> Token<'_> {
    let comment = recognize(pair(char('#'), take_while(|c| c != '\n')));
    recognize(many0_count(alt((multispace1, comment)))).parse(input)
}

/// Characters of a word that stand for themselves.
fn plain(input: &str) -> Token<'_> {
    take_while1(|c: char| is_word_char(c) && c != '$').parse(input)
}

/// `${KEY}`, without checking what stands inside.
fn reference(input: &str) -> Token<'_> {
    recognize((tag("${"), take_until("}"), char('}'))).parse(input)
}

/// True if the character may stand in a word.
pub(super) fn is_word_char(c: char) -> bool {
    !c.is_whitespace() && !c.is_control() && !matches!(c, '(' | ')' | '{' | '}' | '"' | ',')
}

/// True if the text is a name without scopes.
pub(super) fn is_name(text: &str) -> bool {
    matches!(segment(text), Ok(("", _)))
}

/// Parses a whole text. What could be understood is returned even if the bag holds errors.
pub(super) fn file(source: u32, text: &str, bag: &mut Bag) -> Vec<Statement> {
    let mut parser = Cursor { source, text, at: 0, depth: 0, bag };
    let mut ports = Vec::new();
    let statements = parser.statements(&mut ports);
    for Port { port, .. } in ports {
        let error = Diagnostic::new("mason::syntax", port.span, "`port` outside of a compound");
        parser.bag.push(error);
    }
    statements
}

/// Parses `(KEY value...)...`, as on a command line.
pub(super) fn settings(source: u32, text: &str, bag: &mut Bag) -> Vec<Setting> {
    let mut parser = Cursor { source, text, at: 0, depth: 0, bag };
    parser.skip();
    let parsed = parser.settings().and_then(|settings| match parser.rest() {
        "" => Ok(settings),
        _ => Err(parser.expected("`(`")),
    });
    parsed.unwrap_or_else(|error| {
        parser.bag.push(*error);
        Vec::new()
    })
}

struct Cursor<'a> {
    source: u32,
    text: &'a str,
    /// Always on a character boundary, and after blanks unless a token was just taken.
    at: usize,
    depth: usize,
    bag: &'a mut Bag,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn span(&self, start: usize, end: usize) -> Span {
        Span { source: self.source, start: start as u32, len: end.saturating_sub(start) as u32 }
    }

    fn skip(&mut self) {
        self.take(blank);
    }

    /// Takes a token if it stands here, without the blanks after it.
    fn take(&mut self, token: fn(&str) -> Token<'_>) -> Option<&'a str> {
        let (_, taken) = token(self.rest()).ok()?;
        self.at += taken.len();
        Some(taken)
    }

    /// Takes a mark and the blanks after it.
    fn mark(&mut self, mark: &str) -> bool {
        let found = self.rest().starts_with(mark);
        if found {
            self.at += mark.len();
            self.skip();
        }
        found
    }

    fn need(&mut self, mark: &str) -> Result<()> {
        if self.mark(mark) { Ok(()) } else { Err(self.expected(&format!("`{mark}`"))) }
    }

    /// Takes a name and the blanks after it.
    fn name(&mut self, what: &str, token: fn(&str) -> Token<'_>) -> Result<Name> {
        let start = self.at;
        let Some(text) = self.take(token) else {
            let error = self.expected(what);
            return Err(if self.letter() { Box::new(error.help(String::from(NAMES))) } else { error });
        };
        let span = self.span(start, self.at);
        if text.len() > LONGEST_NAME {
            let message = format!("a name of more than {LONGEST_NAME} bytes");
            return Err(Box::new(Diagnostic::new("mason::too-large", span, message)));
        }
        if self.letter() {
            let end = self.at + self.rest().find(|c: char| !c.is_alphanumeric()).unwrap_or(self.rest().len());
            let message = format!("`{}` is no name", shorten(&self.text[start..end]));
            let error = Diagnostic::new("mason::syntax", self.span(start, end), message);
            return Err(Box::new(error.help(String::from(NAMES))));
        }
        self.skip();
        Ok(Name { text: text.to_owned(), span })
    }

    /// True if a letter or digit stands here that cannot be in a name.
    fn letter(&self) -> bool {
        self.rest().starts_with(char::is_alphanumeric)
    }

    #[cold]
    fn expected(&self, what: &str) -> Box<Diagnostic> {
        let rest = self.rest();
        let word = rest.find(|c| !is_word_char(c)).unwrap_or(rest.len());
        let (found, len) = match rest.chars().next() {
            None => return self.cut_short(what),
            Some(c) if word == 0 => (format!("{c:?}").replace('\'', "`"), c.len_utf8()),
            Some(_) => (format!("`{}`", shorten(&rest[..word])), word),
        };
        let message = format!("expected {what}, found {found}");
        let error = Diagnostic::new("mason::syntax", self.span(self.at, self.at + len), message);
        Box::new(error.here(format!("expected {what}")))
    }

    /// What was expected where the text ends.
    fn cut_short(&self, what: &str) -> Box<Diagnostic> {
        let end = self.text.trim_end().len();
        let message = format!("expected {what}, found the end of the file");
        let error = Diagnostic::new("mason::syntax", self.span(end, end), message);
        Box::new(error.here(format!("expected {what}")))
    }

    fn error(&self, start: usize, message: impl Into<String>) -> Box<Diagnostic> {
        Box::new(Diagnostic::new("mason::syntax", self.span(start, self.at), message))
    }

    /// Statements up to the end of the text, or inside a compound up to its `}`.
    fn statements(&mut self, ports: &mut Vec<Port>) -> Vec<Statement> {
        let mut statements = Vec::new();
        self.skip();
        while !self.rest().is_empty() && !self.bag.is_full() {
            if self.depth > 0 && self.rest().starts_with('}') {
                break;
            }
            let start = self.at;
            match self.statement(ports) {
                Ok(Some(statement)) => statements.push(statement),
                Ok(None) => {}
                Err(error) => {
                    self.bag.push(*error);
                    self.recover(start);
                }
            }
        }
        statements
    }

    /// Goes on at the next line that looks like the start of a statement. Such a line inside a broken
    /// statement is nearly always one: what is missing is the end of the one before.
    fn recover(&mut self, start: usize) {
        let mut at = start;
        loop {
            let rest = self.text.get(at..).unwrap_or("");
            let Some(next) = rest.find('\n') else { break self.at = self.text.len() };
            at += next + 1;
            let line = self.text[at..].trim_start_matches([' ', '\t']);
            let keyword =
                |k: &&str| line.strip_prefix(*k).is_some_and(|l| l.starts_with(char::is_whitespace));
            let closes = self.depth > 0 && line.starts_with('}');
            if KEYWORDS.iter().any(keyword) || closes || starts_edge(line) {
                self.at = self.text.len() - line.len();
                return;
            }
        }
    }

    fn statement(&mut self, ports: &mut Vec<Port>) -> Result<Option<Statement>> {
        if self.rest().starts_with('(') {
            return self.chain().map(Some);
        }
        if self.rest().starts_with("->") {
            let help = String::from("an end of an edge is written `NAME` or `(NAME, PORT)`, with a comma");
            return Err(Box::new(self.expected("the upper end of an edge before its `->`").help(help)));
        }
        let start = self.at;
        let word = self.name("a statement", dotted)?;
        if self.rest().starts_with("->") {
            self.at = start;
            return self.chain().map(Some);
        }
        Ok(Some(match word.text.as_str() {
            "element" => Statement::Element(self.element()?),
            "param" => self.param()?,
            "include" => Statement::Include(self.include()?),
            "compound" => Statement::Compound(self.compound(start)?),
            "port" if self.depth > 0 => {
                ports.push(self.port()?);
                return Ok(None);
            }
            "invariant" => Statement::Invariant(self.invariant()?),
            _ => return Err(self.no_statement(&word)),
        }))
    }

    #[cold]
    fn no_statement(&self, word: &Name) -> Box<Diagnostic> {
        if word.text == "port" {
            return Box::new(Diagnostic::new("mason::syntax", word.span, "`port` outside of a compound"));
        }
        let message = format!("`{}` begins no statement", shorten(&word.text));
        let error = Diagnostic::new("mason::syntax", word.span, message);
        let near = super::suggest::did_you_mean(&word.text, KEYWORDS.into_iter().chain(["port"]));
        let help = near.unwrap_or_else(|| {
            String::from("a statement is `element NAME (type TYPE) ...`, `A -> B`, `(A, PORT) -> (B, PORT)`, `param`, `include`, `compound` or `invariant`")
        });
        Box::new(error.here("expected a statement").help(help))
    }

    fn element(&mut self) -> Result<Element> {
        let name = self.name("the element's name", dotted)?;
        let settings = self.settings()?;
        Ok(Element { name, settings })
    }

    /// `(KEY value...)...` up to what is none, an edge's `(A, p)` among it.
    fn settings(&mut self) -> Result<Vec<Setting>> {
        let mut settings = Vec::new();
        while self.rest().starts_with('(') && !starts_edge(self.rest()) {
            let open = self.at;
            self.need("(")?;
            let key = self.name("a parameter's name", segment)?;
            if self.rest().starts_with('=') && key.span.end() as usize == self.at {
                let help = format!("write `({} VALUE)`, without `=`", key.text);
                return Err(Box::new(self.expected("a value or `)`").help(help)));
            }
            let values = self.values()?;
            if !self.mark(")") {
                return Err(self.unclosed(open));
            }
            settings.push(Setting { key, values });
        }
        Ok(settings)
    }

    #[cold]
    fn unclosed(&self, open: usize) -> Box<Diagnostic> {
        let mut error = *self.expected("a value or `)`");
        if self.rest().starts_with(',') {
            error = error.help(String::from("values are separated by white space"));
        }
        Box::new(error.label(self.span(open, open + 1), "this `(` is not closed"))
    }

    /// Values up to something that is none.
    fn values(&mut self) -> Result<Vec<Value>> {
        let mut values = Vec::new();
        while let Some(value) = self.value()? {
            values.push(value);
            self.skip();
        }
        Ok(values)
    }

    fn value(&mut self) -> Result<Option<Value>> {
        let start = self.at;
        let mut parts = Vec::new();
        if self.rest().starts_with('"') {
            self.string(&mut parts)?;
        } else {
            self.word(&mut parts)?;
            if parts.is_empty() {
                return Ok(None);
            }
        }
        Ok(Some(Value { parts, span: self.span(start, self.at) }))
    }

    fn word(&mut self, parts: &mut Vec<Part>) -> Result<()> {
        loop {
            if self.rest().starts_with("${") {
                parts.push(self.reference()?);
            } else if let Some(text) = self.take(plain) {
                push_text(parts, text);
            } else if self.rest().starts_with('$') {
                self.at += 1;
                push_text(parts, "$");
            } else {
                return Ok(());
            }
        }
    }

    fn reference(&mut self) -> Result<Part> {
        let start = self.at;
        let Some(text) = self.take(reference) else {
            self.at += 2;
            return Err(self.error(start, "`${` without its `}`"));
        };
        let key = &text[2..text.len() - 1];
        if !is_name(key) {
            let error = self.error(start, format!("{:?} is no parameter's name", shorten(key)));
            return Err(Box::new(error.help(String::from("write `${KEY}`"))));
        }
        Ok(Part::Param(Name { text: key.to_owned(), span: self.span(start, self.at) }))
    }

    /// A string ends on its line; `\"`, `\\`, `\$`, `\n` and `\t` stand for what they look like.
    fn string(&mut self, parts: &mut Vec<Part>) -> Result<()> {
        let start = self.at;
        self.at += 1;
        push_text(parts, "");
        loop {
            let here = self.at;
            let Some(c) = self.rest().chars().next() else { return Err(self.endless(start)) };
            if self.rest().starts_with("${") {
                parts.push(self.reference()?);
                continue;
            }
            self.at += c.len_utf8();
            match c {
                '"' => return Ok(()),
                '\n' => {
                    self.at = here;
                    return Err(self.endless(start));
                }
                '\\' => {
                    let escape = self.rest().chars().next().and_then(unescape);
                    let Some(text) = escape else {
                        return Err(Box::new(
                            self.error(here, "unknown escape in a string").help(String::from(
                                "these are known: `\\\"`, `\\\\`, `\\$`, `\\n` and `\\t`",
                            )),
                        ));
                    };
                    self.at += 1;
                    push_text(parts, text);
                }
                c if c.is_control() && c != '\t' => {
                    return Err(self.error(here, "a control character in a string"));
                }
                _ => push_text(parts, &self.text[here..self.at]),
            }
        }
    }

    #[cold]
    fn endless(&self, start: usize) -> Box<Diagnostic> {
        Box::new(
            self.error(start, "a string without its end").here("the closing `\"` must stand on this line"),
        )
    }

    fn chain(&mut self) -> Result<Statement> {
        let mut ends = vec![self.end()?];
        if !self.rest().starts_with("->") {
            return Err(self.expected("`->`"));
        }
        while self.mark("->") {
            ends.push(self.end()?);
        }
        Ok(Statement::Chain(ends))
    }

    fn end(&mut self) -> Result<End> {
        let start = self.at;
        if !self.mark("(") {
            let name = self.name("an element's name or `(NAME, PORT)`", dotted)?;
            return Ok(End { span: name.span, name, port: None });
        }
        let name = self.name("an element's name", dotted)?;
        self.need(",")?;
        let port = self.name("a port's name", segment)?;
        let span = self.span(start, self.at + 1);
        self.need(")")?;
        Ok(End { name, port: Some(port), span })
    }

    fn param(&mut self) -> Result<Statement> {
        let key = self.name("a parameter's name", segment)?;
        self.need("=")?;
        let value = self.value()?;
        let value = value.ok_or_else(|| self.expected("a value"))?;
        self.skip();
        Ok(Statement::Param { key, value })
    }

    fn include(&mut self) -> Result<Name> {
        if !self.rest().starts_with('"') {
            return Err(self.expected("the path of a graph file as a string"));
        }
        let start = self.at;
        let mut parts = Vec::new();
        self.string(&mut parts)?;
        let span = self.span(start, self.at);
        self.skip();
        match parts.as_slice() {
            [Part::Text(path)] if !path.is_empty() => Ok(Name { text: path.clone(), span }),
            [Part::Text(_)] => Err(Box::new(Diagnostic::new("mason::include", span, "an empty path"))),
            _ => {
                let error = Diagnostic::new("mason::include", span, "a parameter in the path of an include");
                Err(Box::new(error.help(String::from("files are included before parameters are known"))))
            }
        }
    }

    fn compound(&mut self, start: usize) -> Result<Compound> {
        let name = self.name("the compound's name", segment)?;
        self.need("(")?;
        let mut keys = Vec::new();
        while !self.mark(")") {
            let key = self.name("a parameter's name or `)`", segment)?;
            let mut default = None;
            if self.mark("=") {
                let value = self.value()?;
                default = Some(value.ok_or_else(|| self.expected("a value"))?);
                self.skip();
            }
            keys.push((key, default));
        }
        if self.depth == DEEPEST {
            let message = format!("compounds nested more than {DEEPEST} deep");
            return Err(Box::new(Diagnostic::new("mason::too-large", name.span, message)));
        }
        self.need("{")?;
        self.depth += 1;
        let mut ports = Vec::new();
        let body = self.statements(&mut ports);
        self.depth -= 1;
        if !self.mark("}") {
            let open = self.span(start, start + "compound".len());
            return Err(Box::new(self.expected("`}`").label(open, "this compound is not closed")));
        }
        Ok(Compound { name, keys, body, ports })
    }

    fn port(&mut self) -> Result<Port> {
        let port = self.name("a port's name", segment)?;
        self.need("=")?;
        let target = self.end()?;
        match target.port {
            Some(inner) => Ok(Port { port, name: target.name, inner }),
            None => {
                let error = Diagnostic::new("mason::syntax", target.span, "expected `(NAME, PORT)`");
                Err(Box::new(error))
            }
        }
    }
}

/// True if the text starts with `(NAME,`: nothing else has a comma there.
fn starts_edge(text: &str) -> bool {
    let mut head = (char('('), blank, dotted, blank, char(','));
    head.parse(text).is_ok() || {
        let mut arrow = (dotted, blank, tag("->"));
        arrow.parse(text).is_ok()
    }
}

fn unescape(c: char) -> Option<&'static str> {
    Some(match c {
        '"' => "\"",
        '\\' => "\\",
        '$' => "$",
        'n' => "\n",
        't' => "\t",
        _ => return None,
    })
}

fn push_text(parts: &mut Vec<Part>, text: &str) {
    match parts.last_mut() {
        Some(Part::Text(last)) => last.push_str(text),
        _ => parts.push(Part::Text(text.to_owned())),
    }
}

/// True if nothing is written there.
fn is_empty(part: &Part) -> bool {
    matches!(part, Part::Text(text) if text.trim().is_empty())
}

/// For messages: no more than 40 characters.
pub(super) fn shorten(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
