//! A serde deserializer over the values of an element's parameters.
//!
//! serde stops at the first error. To report all of them, a parameter that failed is left out and the
//! rest is read again until nothing new turns up; the fields of a struct bound the rounds.

use super::params::{Context, Entry, ParamError, Params, Value};
use super::parse::shorten;
use super::source::Span;
use super::suggest;
use super::value::{PATH, REF, URI};
use crate::describe::Param;
use serde::de::value::{BytesDeserializer, StrDeserializer};
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Expected, IntoDeserializer, MapAccess,
    SeqAccess, Unexpected, VariantAccess, Visitor,
};
use std::fmt::{self, Display};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

/// Reads a struct. Defaults come from the table, which may be empty.
pub(super) fn read<T: DeserializeOwned>(
    params: &Params,
    table: &'static [Param],
) -> Result<T, Vec<ParamError>> {
    let mut errors = Vec::new();
    let mut entries = distinct(params, &mut errors);
    missing(params, table, &mut errors);
    let absent = |param: &&Param| params.get(param.name).is_none() && !param.required;
    let defaults: Vec<Entry> =
        table.iter().filter(absent).filter_map(|param| default(params, param)).collect();
    entries.extend(&defaults);
    loop {
        let mut error = match T::deserialize(Run(entries.clone())) {
            Ok(value) if errors.is_empty() => return Ok(value),
            Ok(_) => return Err(errors),
            Err(error) => error,
        };
        match error.culprit.take() {
            Some(culprit) => {
                entries.retain(|entry| entry.key != culprit.key);
                errors.push(error.into_param_error(*culprit));
            }
            // A field is missing: of its own accord, or because its value was left out above.
            None => {
                if errors.is_empty() {
                    errors.push(error.into_missing(params));
                }
                return Err(errors);
            }
        }
    }
}

/// The entries without those that repeat a key.
fn distinct<'a>(params: &'a Params, errors: &mut Vec<ParamError>) -> Vec<&'a Entry> {
    let mut seen = std::collections::HashSet::new();
    let mut keep = Vec::with_capacity(params.entries.len());
    for entry in &params.entries {
        if seen.insert(entry.key.as_str()) {
            keep.push(entry);
            continue;
        }
        errors.push(ParamError {
            code: "mason::duplicate-parameter",
            key: entry.key.clone(),
            message: String::from("it is given twice"),
            help: Some(String::from("a list stands in one pair of parentheses: `(KEY a b c)`")),
            span: entry.span,
            origin: None,
        });
    }
    keep
}

fn missing(params: &Params, table: &[Param], errors: &mut Vec<ParamError>) {
    for param in table.iter().filter(|param| param.required && params.get(param.name).is_none()) {
        errors.push(ParamError {
            code: "mason::missing-parameter",
            key: param.name.to_owned(),
            message: format!("it is missing, a {} must be given", param.kind),
            help: Some(format!("add `({} ...)`", param.name)),
            span: params.span,
            origin: None,
        });
    }
}

/// The entry of a parameter that is not written: its default, or the empty list. An optional one has
/// neither.
fn default(params: &Params, param: &Param) -> Option<Entry> {
    let value = |text: &str| Value {
        text: text.to_owned(),
        span: params.span,
        origin: None,
        context: Arc::new(Context::default()),
        target: None,
    };
    let values = match param.default {
        Some(text) if param.list => text.split_whitespace().map(value).collect(),
        Some(text) => vec![value(text)],
        None if param.list => Vec::new(),
        None => return None,
    };
    Some(Entry { key: param.name.to_owned(), span: params.span, values })
}

/// Why deserialisation stopped.
#[derive(Debug)]
pub(super) struct Failure {
    code: &'static str,
    message: String,
    help: Option<String>,
    /// The field that serde misses.
    field: Option<&'static str>,
    culprit: Option<Box<Culprit>>,
}

/// The entry at fault and the place in it.
#[derive(Debug)]
struct Culprit {
    key: String,
    span: Span,
    origin: Option<Span>,
}

impl Failure {
    fn bad(message: String) -> Self {
        Failure { code: "mason::bad-value", message, help: None, field: None, culprit: None }
    }

    fn at(mut self, entry: &Entry, value: Option<&Value>) -> Self {
        self.culprit.get_or_insert_with(|| {
            Box::new(Culprit {
                key: entry.key.clone(),
                span: value.map_or(entry.span, |value| value.span),
                origin: value.and_then(|value| value.origin),
            })
        });
        self
    }

    fn into_param_error(self, culprit: Culprit) -> ParamError {
        let Culprit { key, span, origin, .. } = culprit;
        ParamError { code: self.code, key, message: self.message, help: self.help, span, origin }
    }

    fn into_missing(self, params: &Params) -> ParamError {
        let help = self.field.map(|field| format!("add `({field} ...)`"));
        ParamError {
            code: self.code,
            key: self.field.unwrap_or_default().to_owned(),
            message: self.message,
            help,
            span: params.span,
            origin: None,
        }
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl serde::de::Error for Failure {
    fn custom<T: Display>(message: T) -> Self {
        Failure::bad(message.to_string())
    }

    fn invalid_type(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        match unexpected {
            Unexpected::Str(text) => Failure::bad(format!("expected {expected}, found `{}`", shorten(text))),
            other => Failure::bad(format!("expected {expected}, found {other}")),
        }
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(unexpected, expected)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let words = suggest::list(expected.iter().copied());
        let mut failure = Failure::bad(format!("expected one of {words}, found `{}`", shorten(variant)));
        failure.help = suggest::did_you_mean(variant, expected.iter().copied());
        failure
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let known = format!("it takes {}", suggest::list(expected.iter().copied()));
        Failure {
            code: "mason::unknown-parameter",
            message: String::from("there is no such parameter"),
            help: Some(suggest::did_you_mean(field, expected.iter().copied()).unwrap_or(known)),
            field: None,
            culprit: None,
        }
    }

    fn missing_field(field: &'static str) -> Self {
        Failure {
            code: "mason::missing-parameter",
            message: String::from("it is missing"),
            help: None,
            field: Some(field),
            culprit: None,
        }
    }
}

/// One attempt at the whole struct.
struct Run<'a>(Vec<&'a Entry>);

impl<'de> Deserializer<'de> for Run<'_> {
    type Error = Failure;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        visitor.visit_map(Entries { list: self.0, at: 0 })
    }

    /// Refuses unknown keys whether or not the struct asks for it.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failure> {
        use serde::de::Error;
        match self.0.iter().find(|entry| !fields.contains(&entry.key.as_str())) {
            Some(entry) => Err(Failure::unknown_field(&entry.key, fields).at(entry, None)),
            None => self.deserialize_any(visitor),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct Entries<'a> {
    list: Vec<&'a Entry>,
    at: usize,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = Failure;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Failure> {
        let Some(entry) = self.list.get(self.at) else { return Ok(None) };
        let key: StrDeserializer<'_, Failure> = entry.key.as_str().into_deserializer();
        seed.deserialize(key).map(Some).map_err(|failure| failure.at(entry, None))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Failure> {
        let Some(entry) = self.list.get(self.at) else {
            return Err(Failure::bad(String::from("a value without a key")));
        };
        self.at += 1;
        let values = Values { entry, values: &entry.values };
        seed.deserialize(values).map_err(|failure| failure.at(entry, entry.values.first()))
    }
}

/// The values of one entry, or one element of its list.
#[derive(Clone, Copy)]
struct Values<'a> {
    entry: &'a Entry,
    values: &'a [Value],
}

impl<'a> Values<'a> {
    fn one(&self, expected: &dyn Expected) -> Result<&'a Value, Failure> {
        match self.values {
            [value] => Ok(value),
            [] => Err(Failure::bad(format!("expected {expected}, found no value"))),
            [_, second, ..] => {
                let message = format!("expected one value, found {}", self.values.len());
                Err(Failure::bad(message).at(self.entry, Some(second)))
            }
        }
    }

    /// A whole number in the range of the field's type.
    fn number<T: std::str::FromStr + Display>(&self, min: T, max: T) -> Result<T, Failure> {
        let text = self.one(&"a whole number")?.text();
        text.parse().map_err(|_| {
            let number = text.strip_prefix('-').unwrap_or(text);
            let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
            let wanted =
                if digits { format!("a number from {min} to {max}") } else { "a whole number".into() };
            Failure::bad(format!("expected {wanted}, found `{}`", shorten(text)))
        })
    }
}

macro_rules! numbers {
    ($($number:ident $method:ident $visit:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
            let number = self.number($number::MIN, $number::MAX)?;
            visitor.$visit(number)
        }
    )*};
}

impl<'de> Deserializer<'de> for Values<'_> {
    type Error = Failure;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        match self.values {
            [value] => visitor.visit_str(&value.text),
            _ => self.deserialize_seq(visitor),
        }
    }

    numbers! {
        i8 deserialize_i8 visit_i8 i16 deserialize_i16 visit_i16 i32 deserialize_i32 visit_i32
        i64 deserialize_i64 visit_i64 i128 deserialize_i128 visit_i128
        u8 deserialize_u8 visit_u8 u16 deserialize_u16 visit_u16 u32 deserialize_u32 visit_u32
        u64 deserialize_u64 visit_u64 u128 deserialize_u128 visit_u128
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        match self.one(&visitor)?.text() {
            "yes" | "true" => visitor.visit_bool(true),
            "no" | "false" => visitor.visit_bool(false),
            other => Err(Failure::bad(format!("expected `yes` or `no`, found `{}`", shorten(other)))),
        }
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        let text = self.one(&"a number")?.text();
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() => visitor.visit_f64(number),
            _ => Err(Failure::bad(format!("expected a number, found `{}`", shorten(text)))),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        let value = self.one(&visitor)?;
        visitor.visit_str(&value.text)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        visitor.visit_some(self)
    }

    /// Types whose meaning depends on where they stand are told apart by these names.
    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Failure> {
        match name {
            PATH => {
                let value = self.one(&visitor)?;
                if value.text.is_empty() {
                    return Err(Failure::bad(String::from("expected a path, found an empty string")));
                }
                let path = value.folder().join(&value.text);
                visitor.visit_newtype_struct(BytesDeserializer::new(path.as_os_str().as_bytes()))
            }
            REF => {
                let value = self.one(&visitor)?;
                visitor.visit_newtype_struct(StrDeserializer::new(value.target()))
            }
            URI => {
                let value = self.one(&visitor)?;
                let uri = super::value::resolve_unix(&value.text, value.folder());
                visitor.visit_newtype_struct(StrDeserializer::new(&uri))
            }
            _ => visitor.visit_newtype_struct(self),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        visitor.visit_seq(List(self))
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, Failure> {
        if self.values.len() != len {
            return Err(Failure::bad(format!("expected {len} values, found {}", self.values.len())));
        }
        self.deserialize_seq(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failure> {
        let value = self.one(&"a word")?;
        visitor.visit_enum(Word(&value.text))
    }

    serde::forward_to_deserialize_any! {
        char bytes byte_buf unit unit_struct tuple_struct map struct identifier ignored_any
    }
}

/// The values of a list, one at a time.
struct List<'a>(Values<'a>);

impl<'de> SeqAccess<'de> for List<'_> {
    type Error = Failure;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Failure> {
        let Some((first, rest)) = self.0.values.split_first() else { return Ok(None) };
        self.0.values = rest;
        let one = Values { entry: self.0.entry, values: std::slice::from_ref(first) };
        seed.deserialize(one).map(Some).map_err(|failure| failure.at(self.0.entry, Some(first)))
    }
}

/// A word that names a variant.
struct Word<'a>(&'a str);

impl<'de> EnumAccess<'de> for Word<'_> {
    type Error = Failure;
    type Variant = Bare;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Bare), Failure> {
        let word: StrDeserializer<'_, Failure> = StrDeserializer::new(self.0);
        Ok((seed.deserialize(word)?, Bare))
    }
}

/// A variant without fields, the only kind that a word can name.
struct Bare;

impl<'de> VariantAccess<'de> for Bare {
    type Error = Failure;

    fn unit_variant(self) -> Result<(), Failure> {
        Ok(())
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, _seed: S) -> Result<S::Value, Failure> {
        Err(Failure::bad(String::from("a word cannot carry a value")))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, _visitor: V) -> Result<V::Value, Failure> {
        Err(Failure::bad(String::from("a word cannot carry values")))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, Failure> {
        Err(Failure::bad(String::from("a word cannot carry fields")))
    }
}
