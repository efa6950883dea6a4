//! The kinds of values that parameters take. Each displays as an administrator would write it, and
//! reads back what it displays.

use super::parse::shorten;
use super::suggest;
use crate::request::{Class, Op, Origin};
use crate::text_value;
use nom::Parser;
use nom::bytes::complete::take_while_m_n;
use nom::character::complete::char;
use nom::combinator::{all_consuming, opt, rest};
use nom::sequence::preceded;
use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Names by which [`super::de`] knows the types whose meaning depends on where they stand.
pub(super) const PATH: &str = "blockmason::path";
pub(super) const REF: &str = "blockmason::ref";
pub(super) const URI: &str = "blockmason::uri";

/// The largest size and offset: what `off_t` holds.
const LARGEST: u128 = i64::MAX as u128;

/// The longest time, a hundred years: more is a slip of the pen, and the sum of a few still fits.
const LONGEST_NS: u128 = 100 * 366 * 24 * 3600 * 1_000_000_000;

/// A decimal number as written: `1.50` is 150 with two decimals.
struct Decimal {
    digits: u128,
    decimals: u32,
}

impl Decimal {
    /// The number times `factor`, if that is a whole number.
    fn times(&self, factor: u128) -> Option<u128> {
        let product = self.digits.checked_mul(factor)?;
        let divisor = 10u128.pow(self.decimals);
        product.is_multiple_of(divisor).then_some(product / divisor)
    }
}

/// Cuts a text into a number and its unit. At most 20 digits before the point and 9 after it, so that
/// nothing overflows below.
fn quantity(text: &str) -> Option<(Decimal, &str)> {
    let digits = |min, max| take_while_m_n(min, max, |c: char| c.is_ascii_digit());
    let mut parser = all_consuming((digits(1, 20), opt(preceded(char('.'), digits(1, 9))), rest));
    let parsed: nom::IResult<&str, (&str, Option<&str>, &str)> = parser.parse(text);
    let (_, (whole, fraction, unit)) = parsed.ok()?;
    if unit.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let fraction = fraction.unwrap_or("");
    let digits = format!("{whole}{fraction}").parse().ok()?;
    Some((Decimal { digits, decimals: fraction.len() as u32 }, unit))
}

/// The factor of a size's unit; letter case does not matter.
fn binary(unit: &str) -> Option<u128> {
    let lower = unit.to_ascii_lowercase();
    let letter = lower.strip_suffix("ib").filter(|letter| !letter.is_empty()).unwrap_or(&lower);
    let power = match letter {
        "" | "b" if lower == letter => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        "e" => 6,
        _ => return None,
    };
    Some(1 << (10 * power))
}

fn read_size(text: &str) -> Result<u64, String> {
    let wanted = || format!("expected a size such as `4k`, `100M` or `1GiB`, found `{}`", shorten(text));
    let (number, unit) = quantity(text).ok_or_else(wanted)?;
    let Some(factor) = binary(unit) else {
        if ["kb", "mb", "gb", "tb"].contains(&unit.to_ascii_lowercase().as_str()) {
            let letter = &unit[..1];
            return Err(format!("{}; write `{letter}` or `{letter}iB`, powers of 1024", wanted()));
        }
        return Err(wanted());
    };
    let bytes = number.times(factor);
    match bytes {
        Some(bytes) if bytes <= LARGEST => Ok(bytes as u64),
        Some(_) => Err(format!("`{}` is more than the largest size, 8E - 1", shorten(text))),
        None => Err(format!("`{}` is not a whole number of bytes", shorten(text))),
    }
}

/// Writes bytes with the largest unit that divides them.
fn write_size(bytes: u64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let units = ["", "k", "M", "G", "T", "P", "E"];
    let power = if bytes == 0 { 0 } else { (bytes.trailing_zeros() / 10).min(6) };
    write!(f, "{}{}", bytes >> (10 * power), units[power as usize])
}

/// A number of bytes: `512`, `4k`, `1.5G`, `1GiB`. At most `i64::MAX`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        read_size(text).map(Size)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_size(self.0, f)
    }
}

text_value!(Size, "size");

const TIMES: [(&str, u128); 6] = [
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// A duration: `10ms`, `1.5s`, `2h`. At most a hundred years, in steps of a nanosecond.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub std::time::Duration);

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || format!("expected a duration such as `10ms` or `5s`, found `{}`", shorten(text));
        let (number, unit) = quantity(text).ok_or_else(wanted)?;
        let factor = TIMES.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
        let factor = match (factor, unit) {
            (Some(factor), _) => factor,
            (None, "") if number.digits == 0 => 1,
            (None, "") => return Err(format!("{}; units are ns, us, ms, s, m and h", wanted())),
            (None, _) => return Err(wanted()),
        };
        match number.times(factor) {
            Some(ns) if ns <= LONGEST_NS => Ok(Time(std::time::Duration::from_nanos_u128(ns))),
            Some(_) => Err(format!("`{}` is more than a hundred years", shorten(text))),
            None => Err(format!("`{}` is not a whole number of nanoseconds", shorten(text))),
        }
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ns = self.0.as_nanos();
        let unit = TIMES.iter().find(|(_, factor)| ns != 0 && ns.is_multiple_of(*factor));
        let (name, factor) = unit.unwrap_or(&("s", 1));
        write!(f, "{}{name}", ns / factor)
    }
}

text_value!(Time, "duration");

/// Bytes in a second: `50M/s`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(pub u64);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || format!("expected a rate such as `50M/s`, found `{}`", shorten(text));
        read_size(text.strip_suffix("/s").ok_or_else(wanted)?).map(Rate)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_size(self.0, f)?;
        f.write_str("/s")
    }
}

text_value!(Rate, "rate");

/// Requests in a second: `1000/s`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpsRate(pub u64);

impl FromStr for OpsRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits =
            text.strip_suffix("/s").filter(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
        let number = digits.and_then(|digits| digits.parse().ok());
        let wanted = || format!("expected a number of requests such as `1000/s`, found `{}`", shorten(text));
        number.map(OpsRate).ok_or_else(wanted)
    }
}

impl fmt::Display for OpsRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", self.0)
    }
}

text_value!(OpsRate, "requests per second");

/// From 0 to 100 percent: `10%`, `0.5%`.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub struct Percent(pub f64);

impl Percent {
    /// From 0 to 1.
    pub fn fraction(self) -> f64 {
        self.0 / 100.0
    }
}

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = match quantity(text) {
            Some((_, "%")) => text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok()),
            _ => None,
        };
        match number {
            Some(number) if number <= 100.0 => Ok(Percent(number)),
            Some(_) => Err(format!("`{}` is more than 100%", shorten(text))),
            None => Err(format!("expected a percentage such as `10%`, found `{}`", shorten(text))),
        }
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}%", self.0)
    }
}

text_value!(Percent, "percentage");

/// A half-open range of bytes: `4k-64k` holds 4096 and not 65536; `1M-` has no end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// The first byte.
    pub start: u64,
    /// One past the last byte; greater than `start`.
    pub end: Option<u64>,
}

impl ByteRange {
    /// True if the byte is in it.
    pub fn contains(&self, offset: u64) -> bool {
        offset >= self.start && self.end.is_none_or(|end| offset < end)
    }
}

impl FromStr for ByteRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || format!("expected a range such as `4k-64k` or `1M-`, found `{}`", shorten(text));
        let (start, end) = text.split_once('-').ok_or_else(wanted)?;
        let start = read_size(start).map_err(|_| wanted())?;
        let end = match end {
            "" => None,
            end => Some(read_size(end).map_err(|_| wanted())?),
        };
        if end.is_some_and(|end| end <= start) {
            return Err(format!("`{}` is an empty range; its end is the byte after its last", shorten(text)));
        }
        Ok(ByteRange { start, end })
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_size(self.start, f)?;
        f.write_str("-")?;
        self.end.map_or(Ok(()), |end| write_size(end, f))
    }
}

text_value!(ByteRange, "range of bytes");

/// Makes a type whose values have names one that a parameter can have.
macro_rules! named_value {
    ($type:ty, $kind:literal) => {
        impl FromStr for $type {
            type Err = String;

            fn from_str(word: &str) -> Result<Self, String> {
                let found = Self::ALL.into_iter().find(|value| value.name() == word);
                let names = || suggest::list(Self::ALL.iter().map(|value| value.name()));
                found.ok_or_else(|| format!("expected one of {}, found `{}`", names(), shorten(word)))
            }
        }

        text_value!($type, $kind);
    };
}

named_value!(Op, "operation");
named_value!(Origin, "origin");
named_value!(Class, "class");

/// A URI or socket address: `nbd://host/disk`, `tcp:127.0.0.1:10809`, `unix:/run/vm.sock`. A relative
/// path right after `unix:`, or after `?socket=` of `nbd+unix:`, starts in the folder that the value
/// stands in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uri(String);

impl Uri {
    /// The whole text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands before the first colon, `nbd+unix`.
    pub fn scheme(&self) -> &str {
        self.0.split_once(':').map_or("", |(scheme, _)| scheme)
    }

    /// What stands after the first colon.
    pub fn rest(&self) -> &str {
        self.0.split_once(':').map_or("", |(_, rest)| rest)
    }
}

impl FromStr for Uri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let scheme_char = |b: u8| b.is_ascii_alphanumeric() || b"+-.".contains(&b);
        let valid = text.split_once(':').is_some_and(|(scheme, rest)| {
            scheme.starts_with(|c: char| c.is_ascii_alphabetic())
                && scheme.bytes().all(scheme_char)
                && !rest.is_empty()
        });
        // The folder that a relative path starts in may have a space in its name.
        let spaces = text.starts_with("unix:") || !text.contains(char::is_whitespace);
        if valid && spaces && !text.contains(char::is_control) {
            return Ok(Uri(text.to_owned()));
        }
        Err(format!(
            "expected a URI such as `nbd://host/disk` or `unix:/run/vm.sock`, found `{}`",
            shorten(text)
        ))
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

text_value!(Uri, "URI", URI);

/// Makes the path of a `unix:` address absolute, and that of `?socket=` behind a scheme that ends in
/// `+unix`.
pub(super) fn resolve_unix(uri: &str, folder: &Path) -> String {
    match uri.strip_prefix("unix:") {
        Some(path) if !path.is_empty() && !path.starts_with('/') => {
            return format!("unix:{}", folder.join(path).display());
        }
        _ => {}
    }
    let unix = uri.split_once(':').is_some_and(|(scheme, _)| scheme.to_ascii_lowercase().ends_with("+unix"));
    let socket = uri.find(['?', '&']).and_then(|query| Some(query + uri[query..].find("socket=")? + 7));
    // %00 begins an abstract name, %2F is a slash.
    let absolute = |path: &str| ["/", "%00", "%2F", "%2f", "&"].iter().any(|sign| path.starts_with(sign));
    match socket {
        Some(at) if unix && at < uri.len() && !absolute(&uri[at..]) => {
            format!("{}{}/{}", &uri[..at], percent_encode(folder), &uri[at..])
        }
        _ => uri.to_owned(),
    }
}

/// A path as a part of a query.
fn percent_encode(path: &Path) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                text.push(char::from(*byte));
            }
            _ => drop(write!(text, "%{byte:02X}")),
        }
    }
    text
}

/// A path; a relative one starts in the folder that the value stands in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FilePath(pub PathBuf);

impl std::ops::Deref for FilePath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for FilePath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for FilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl Serialize for FilePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for FilePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_newtype_struct(PATH, PathVisitor)
    }
}

struct PathVisitor;

impl<'de> Visitor<'de> for PathVisitor {
    type Value = FilePath;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path")
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<FilePath, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_str<E: de::Error>(self, path: &str) -> Result<FilePath, E> {
        Ok(FilePath(PathBuf::from(path)))
    }

    fn visit_bytes<E: de::Error>(self, path: &[u8]) -> Result<FilePath, E> {
        use std::os::unix::ffi::OsStrExt;
        Ok(FilePath(PathBuf::from(std::ffi::OsStr::from_bytes(path))))
    }
}

/// A service that elements offer to others: `impl Service for dyn DirtyMap`.
pub trait Service {
    /// Its name in [`crate::describe::ElementType::provides`], `dirty_map`.
    const NAME: &'static str;
}

/// The name of another element, which provides the service `T`.
pub struct Ref<T: ?Sized> {
    name: String,
    service: PhantomData<fn(&T)>,
}

impl<T: ?Sized> Ref<T> {
    /// The element's full name in the graph.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl<T: ?Sized> Clone for Ref<T> {
    fn clone(&self) -> Self {
        Ref { name: self.name.clone(), service: PhantomData }
    }
}

impl<T: ?Sized> PartialEq for Ref<T> {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl<T: ?Sized> fmt::Debug for Ref<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ref").field(&self.name).finish()
    }
}

impl<T: ?Sized> fmt::Display for Ref<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl<T: ?Sized> Serialize for Ref<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.name)
    }
}

impl<'de, T: ?Sized> Deserialize<'de> for Ref<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = super::kind::TextVisitor::new("an element's name");
        let name: String = deserializer.deserialize_newtype_struct(REF, text)?;
        Ok(Ref { name, service: PhantomData })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn size(text: &str) -> Result<u64, String> {
        text.parse().map(|Size(bytes)| bytes)
    }

    #[test]
    fn sizes() {
        let right = [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("4k", 4096),
            ("4K", 4096),
            ("4KiB", 4096),
            ("1.5G", 3 << 29),
            ("100M", 100 << 20),
            ("2t", 2 << 40),
            ("7E", 7 << 60),
            ("9223372036854775807", i64::MAX as u64),
        ];
        for (text, bytes) in right {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        let wrong = [
            "",
            "k",
            "-1",
            "+1",
            "1.k",
            ".5k",
            "0.3k",
            "1e3",
            "4kB",
            "4MB",
            "4x",
            "4 k",
            "0x10",
            "1.2.3",
            "8E",
            "iB",
            "4iB",
            "4BiB",
            "NaN",
            "inf",
            "9223372036854775808",
            "99999999999999999999999",
            "4\u{fc}",
            "\u{664}",
        ];
        for text in wrong {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times() {
        let time = |text: &str| text.parse().map(|Time(time)| time);
        assert_eq!(time("10ms"), Ok(Duration::from_millis(10)));
        assert_eq!(time("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(time("0"), Ok(Duration::ZERO));
        assert_eq!(time("2h"), Ok(Duration::from_secs(7200)));
        for text in ["", "10", "s", "-1s", "10S", "0.5ns", "1000000h", "99999999999999999999h", "1e3s"] {
            assert!(time(text).is_err(), "{text}");
        }
        assert!(time("10").unwrap_err().contains("units are"));
    }

    #[test]
    fn rates_percentages_and_ranges() {
        assert_eq!("50M/s".parse(), Ok(Rate(50 << 20)));
        assert_eq!("1000/s".parse(), Ok(OpsRate(1000)));
        assert_eq!("0.5%".parse(), Ok(Percent(0.5)));
        assert_eq!(Percent(50.0).fraction(), 0.5);
        let range: ByteRange = "4k-64k".parse().unwrap();
        assert!(
            range.contains(4096) && range.contains(65535) && !range.contains(65536) && !range.contains(0)
        );
        let range: ByteRange = "1M-".parse().unwrap();
        assert!(range.contains(u64::MAX) && !range.contains(0));
        assert!(["50M", "M/s", "50M/m", "-1/s"].iter().all(|text| text.parse::<Rate>().is_err()));
        assert!(["1k/s", "/s", "+1/s", "1"].iter().all(|text| text.parse::<OpsRate>().is_err()));
        assert!(
            ["100.1%", "10", "%", "-1%", "NaN%", "1e1%"].iter().all(|text| text.parse::<Percent>().is_err())
        );
        assert!(
            ["", "-", "4k", "-4k", "8k-4k", "4k-4k", "1-2-3"].iter().all(|t| t.parse::<ByteRange>().is_err())
        );
    }

    #[test]
    fn uris() {
        let uri: Uri = "nbd+unix:///vm1?socket=/run/x".parse().unwrap();
        assert_eq!((uri.scheme(), uri.rest()), ("nbd+unix", "///vm1?socket=/run/x"));
        assert!(
            ["", "x", ":x", "tcp:", "1a:x", "a b:c", "tcp:a b", "/x"]
                .iter()
                .all(|t| t.parse::<Uri>().is_err())
        );
        assert_eq!("unix:/a b/s".parse::<Uri>().unwrap().rest(), "/a b/s");
        assert_eq!(resolve_unix("unix:vm.sock", "/srv".as_ref()), "unix:/srv/vm.sock");
        assert_eq!(resolve_unix("unix:/vm.sock", "/srv".as_ref()), "unix:/vm.sock");
        assert_eq!(resolve_unix("tcp:host", "/srv".as_ref()), "tcp:host");
        let nbd = |socket: &str| {
            let uri = resolve_unix(&format!("nbd+unix:///disk?{socket}"), "/a b".as_ref());
            uri.strip_prefix("nbd+unix:///disk?").unwrap().to_owned()
        };
        assert_eq!(nbd("socket=vm.sock"), "socket=/a%20b/vm.sock");
        assert_eq!(nbd("tls-hostname=x&socket=vm.sock"), "tls-hostname=x&socket=/a%20b/vm.sock");
        for absolute in ["socket=/run/vm.sock", "socket=%2Frun", "socket=%00name", "socket=", "other=vm"] {
            assert_eq!(nbd(absolute), absolute);
        }
        assert_eq!(resolve_unix("nbd://h/?socket=x", "/srv".as_ref()), "nbd://h/?socket=x");
    }

    #[test]
    fn values_pass_through_json() {
        assert_eq!(serde_json::to_string(&Size(4096)).unwrap(), "\"4k\"");
        assert_eq!(serde_json::from_str::<Size>("\"4k\"").unwrap(), Size(4096));
        assert_eq!(serde_json::from_str::<FilePath>("\"a/b\"").unwrap().0, Path::new("a/b"));
        assert_eq!(serde_json::from_str::<Ref<str>>("\"Dirty\"").unwrap().name(), "Dirty");
    }

    proptest! {
        #[test]
        fn what_is_displayed_reads_back(bytes in 0..=i64::MAX as u64, ns in 0..=u64::MAX / 8, ops: u64, tenth in 0..=1000u32) {
            prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
            prop_assert_eq!(Size(bytes >> 33 << 33).to_string().parse(), Ok(Size(bytes >> 33 << 33)));
            prop_assert_eq!(Rate(bytes).to_string().parse(), Ok(Rate(bytes)));
            prop_assert_eq!(OpsRate(ops).to_string().parse(), Ok(OpsRate(ops)));
            let time = Time(Duration::from_nanos(ns));
            prop_assert_eq!(time.to_string().parse(), Ok(time));
            let percent = Percent(f64::from(tenth) / 10.0);
            prop_assert_eq!(percent.to_string().parse(), Ok(percent));
            let range = ByteRange { start: bytes / 2, end: Some(bytes / 2 + 1) };
            prop_assert_eq!(range.to_string().parse(), Ok(range));
        }

        #[test]
        fn no_text_panics(text in "[0-9.kKMGTiBsmunh%/eE+-]{0,24}", any: String) {
            for text in [text, any] {
                let _ = text.parse::<Size>();
                let _ = text.parse::<Time>();
                let _ = text.parse::<Rate>();
                let _ = text.parse::<OpsRate>();
                let _ = text.parse::<Percent>();
                let _ = text.parse::<ByteRange>();
                let _ = text.parse::<Uri>();
            }
        }
    }
}
