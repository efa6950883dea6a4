//! NBD URIs: `nbd://host:port/export`, `nbds+unix:///export?socket=/run/nbd.sock`.

use super::wire::{DEFAULT_PORT, MAX_STRING};
use blockmason::{Error, Result};
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

/// Where an export is to be found.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uri {
    /// True for `nbds` and `nbds+unix`: TLS, or no connection at all.
    pub tls: bool,
    /// The server.
    pub address: Address,
    /// The export's name; empty for the default export.
    pub export: String,
    /// `tls-certificates`: the folder of the PEM files.
    pub certificates: Option<PathBuf>,
    /// `tls-hostname`: the name that the server's certificate must carry, where it is not the host's.
    pub hostname: Option<String>,
}

/// The server of a URI.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A host name or an IP address (without brackets), and a port.
    Tcp {
        /// Never empty.
        host: String,
        /// 10809 unless written.
        port: u16,
    },
    /// A unix socket. One that begins with a NUL byte is in the abstract name space.
    Unix(PathBuf),
}

impl Uri {
    /// The name that the server's certificate must carry: `tls-hostname`, else the host; None for a unix
    /// socket without `tls-hostname`.
    pub fn server_name(&self) -> Option<&str> {
        match (&self.hostname, &self.address) {
            (Some(name), _) => Some(name),
            (None, Address::Tcp { host, .. }) => Some(host),
            (None, Address::Unix(_)) => None,
        }
    }
}

impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Uri> {
        let (scheme, rest) = text.split_once("://").ok_or_else(|| {
            Error::invalid(format!("{text:?} is no NBD URI, such as nbd://host:10809/export"))
        })?;
        let (tls, unix) = match scheme.to_ascii_lowercase().as_str() {
            "nbd" => (false, false),
            "nbds" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            other => {
                return Err(Error::invalid(format!(
                    "{other:?} is no scheme of NBD URIs: nbd, nbds, nbd+unix, nbds+unix"
                )));
            }
        };
        if rest.contains('#') {
            return Err(Error::invalid("an NBD URI has no fragment: write # as %23"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = text_of(path, "the export's name")?;
        if export.len() > MAX_STRING || export.contains('\0') {
            return Err(Error::invalid("the export's name is too long or holds a NUL"));
        }
        let parameters = Parameters::parse(query)?;
        let address = match (unix, parameters.socket) {
            (true, Some(socket)) if authority.is_empty() => Address::Unix(socket),
            (true, Some(_)) => {
                return Err(Error::invalid(
                    "a URI of a unix socket has no host: nbd+unix:///export?socket=...",
                ));
            }
            (true, None) => return Err(Error::invalid("nbd+unix needs ?socket=PATH")),
            (false, Some(_)) => return Err(Error::invalid("socket= belongs to nbd+unix and nbds+unix")),
            (false, None) => parse_authority(authority)?,
        };
        let Parameters { certificates, hostname, .. } = parameters;
        Ok(Uri { tls, address, export, certificates, hostname })
    }
}

/// The part of a URI after the question mark.
#[derive(Default)]
struct Parameters {
    socket: Option<PathBuf>,
    certificates: Option<PathBuf>,
    hostname: Option<String>,
}

impl Parameters {
    fn parse(query: &str) -> Result<Parameters> {
        let mut found = Parameters::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let taken = match key {
                "socket" => found.socket.replace(path_of(value, key)?).is_some(),
                "tls-certificates" => found.certificates.replace(path_of(value, key)?).is_some(),
                "tls-hostname" => found.hostname.replace(text_of(value, key)?).is_some(),
                "tls-type" if value == "x509" => false,
                "tls-verify-peer" if value == "1" => false,
                "tls-type" => {
                    return Err(Error::unsupported("of the values of tls-type only x509 is supported"));
                }
                "tls-verify-peer" => {
                    return Err(Error::unsupported(
                        "servers are always verified: trust theirs with tls-certificates, and name it with tls-hostname",
                    ));
                }
                _ => return Err(Error::invalid(format!("{key:?} is no parameter of NBD URIs known here"))),
            };
            if taken {
                return Err(Error::invalid(format!("{key:?} is given twice")));
            }
        }
        Ok(found)
    }
}

fn parse_authority(authority: &str) -> Result<Address> {
    if authority.contains('@') {
        return Err(Error::unsupported("a user name serves TLS with shared keys, which is not supported"));
    }
    let bad = || Error::invalid(format!("{authority:?} is no host and port"));
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or_else(bad)?;
            host.parse::<std::net::Ipv6Addr>().map_err(|_| bad())?;
            (host.to_owned(), rest.strip_prefix(':').or((rest.is_empty()).then_some("")).ok_or_else(bad)?)
        }
        None => {
            let (host, port) = authority.split_once(':').unwrap_or((authority, ""));
            (text_of(host, "the host")?, port)
        }
    };
    if host.is_empty() || host.contains('\0') {
        return Err(Error::invalid("the URI names no host"));
    }
    let port = match port {
        "" => DEFAULT_PORT,
        digits if digits.bytes().all(|digit| digit.is_ascii_digit()) => digits.parse().map_err(|_| bad())?,
        _ => return Err(bad()),
    };
    Ok(Address::Tcp { host, port })
}

/// The bytes that a percent-encoded text stands for.
fn decode(text: &str, what: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        bytes.push(match byte {
            b'%' => {
                let digit = |at: usize| after.get(at).and_then(|&digit| char::from(digit).to_digit(16));
                let (Some(high), Some(low)) = (digit(0), digit(1)) else {
                    return Err(Error::invalid(format!(
                        "{what}: a % must be followed by two hexadecimal digits"
                    )));
                };
                rest = &after[2..];
                (high * 16 + low) as u8
            }
            other => other,
        });
    }
    Ok(bytes)
}

fn text_of(text: &str, what: &str) -> Result<String> {
    String::from_utf8(decode(text, what)?).map_err(|_| Error::invalid(format!("{what} is not UTF-8")))
}

fn path_of(text: &str, what: &str) -> Result<PathBuf> {
    let bytes = decode(text, what)?;
    if bytes.is_empty() {
        return Err(Error::invalid(format!("{what}= names no path")));
    }
    Ok(OsString::from_vec(bytes).into())
}

/// Percent-encodes all but what stands for itself in paths and in queries.
fn encode(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    for &byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
                write!(f, "{}", char::from(byte))?;
            }
            _ => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}

/// As [`encode`], for a host: the characters that end one are encoded too.
fn encode_host(f: &mut fmt::Formatter<'_>, host: &str) -> fmt::Result {
    if host.parse::<std::net::Ipv6Addr>().is_ok() {
        return write!(f, "[{host}]");
    }
    for part in host.split_inclusive([':', '/']) {
        match part.strip_suffix([':', '/']) {
            Some(before) => {
                encode(f, before.as_bytes())?;
                f.write_str(if part.ends_with(':') { "%3A" } else { "%2F" })?;
            }
            None => encode(f, part.as_bytes())?,
        }
    }
    Ok(())
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls { "nbds" } else { "nbd" })?;
        match &self.address {
            Address::Unix(_) => f.write_str("+unix://")?,
            Address::Tcp { host, port } => {
                f.write_str("://")?;
                encode_host(f, host)?;
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
            }
        }
        f.write_str("/")?;
        encode(f, self.export.as_bytes())?;
        let socket = match &self.address {
            Address::Unix(path) => Some(path.as_os_str().as_bytes()),
            Address::Tcp { .. } => None,
        };
        let parameters = [
            ("socket", socket),
            ("tls-certificates", self.certificates.as_ref().map(|path| path.as_os_str().as_bytes())),
            ("tls-hostname", self.hostname.as_ref().map(|name| name.as_bytes())),
        ];
        let given = parameters.into_iter().filter_map(|(key, value)| Some((key, value?)));
        for (place, (key, value)) in given.enumerate() {
            write!(f, "{}{key}=", if place == 0 { '?' } else { '&' })?;
            encode(f, value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Uri {
        text.parse().unwrap()
    }

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn exports_are_named_as_the_specification_shows() {
        let cases = [
            ("nbd://example.com/disk", "disk"),
            ("nbd+unix:///disk?socket=sock", "disk"),
            ("nbd://example.com/", ""),
            ("nbd://example.com", ""),
            ("nbd://example.com//disk", "/disk"),
            ("nbd://example.com/hello%20world", "hello world"),
        ];
        for (text, export) in cases {
            assert_eq!(parse(text).export, export, "{text}");
        }
    }

    #[test]
    fn addresses_and_schemes() {
        let uri = parse("nbds://[::1]:1234/x?tls-certificates=/etc/pki&tls-hostname=a.example");
        assert!(uri.tls);
        assert_eq!(uri.address, tcp("::1", 1234));
        assert_eq!(uri.certificates, Some("/etc/pki".into()));
        assert_eq!(uri.server_name(), Some("a.example"));
        assert_eq!(parse("NBD://host").address, tcp("host", DEFAULT_PORT));
        assert_eq!(parse("nbd://[fe80::1]").address, tcp("fe80::1", DEFAULT_PORT));
        assert_eq!(parse("nbd://127.0.0.1:/").server_name(), Some("127.0.0.1"));
        let uri = parse("nbds+unix:///?socket=%00/abstract");
        assert_eq!(uri.address, Address::Unix("\0/abstract".into()));
        assert_eq!(uri.server_name(), None);
    }

    #[test]
    fn what_is_wrong_is_said() {
        let cases = [
            ("host:10809", "no NBD URI"),
            ("http://host/", "no scheme"),
            ("nbd:///x", "no host"),
            ("nbd://host:70000/", "no host and port"),
            ("nbd://host:+1/", "no host and port"),
            ("nbd://[::1/", "no host and port"),
            ("nbd://[::1]x/", "no host and port"),
            ("nbd://me@host/", "user name"),
            ("nbd://host/%zz", "two hexadecimal"),
            ("nbd://host/%4", "two hexadecimal"),
            ("nbd://host/%ff", "UTF-8"),
            ("nbd://host/%00", "NUL"),
            ("nbd://host/x#y", "fragment"),
            ("nbd://host/?socket=/x", "belongs to nbd+unix"),
            ("nbd+unix:///x", "needs ?socket"),
            ("nbd+unix:///x?socket=", "names no path"),
            ("nbd+unix:///x?socket=a&socket=b", "twice"),
            ("nbd+unix://host/x?socket=a", "no host"),
            ("nbds://host/?tls-type=psk", "only x509"),
            ("nbds://host/?tls-verify-peer=0", "always verified"),
            ("nbds://host/?tls-certificate=x", "no parameter"),
        ];
        for (text, part) in cases {
            let error = text.parse::<Uri>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(
            tls: bool, unix: bool, port: u16,
            host in "[^\0]{1,12}|::1|[a-z.]{1,9}",
            export in "[^\0]{0,20}",
            socket in proptest::collection::vec(any::<u8>(), 1..20),
            certificates in proptest::option::of("/[^\0]{0,20}"),
            hostname in proptest::option::of("[a-z.]{1,20}"),
        ) {
            let address = match unix {
                true => Address::Unix(OsString::from_vec(socket).into()),
                false => Address::Tcp { host, port },
            };
            let certificates = certificates.map(PathBuf::from);
            let uri = Uri { tls, address, export, certificates, hostname };
            let text = uri.to_string();
            prop_assert_eq!(text.parse::<Uri>().ok(), Some(uri), "{}", text);
        }

        #[test]
        fn no_text_panics(text in "(nbds?(\\+unix)?://)?.{0,40}") {
            let _ = text.parse::<Uri>();
        }
    }
}
