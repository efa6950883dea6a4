//! NBD URIs: `nbd://host:port/name`, `nbd+unix:///name?socket=PATH`, and both with `nbds` for TLS.

use std::path::PathBuf;

/// The port registered for NBD, used when a URI names none.
const DEFAULT_PORT: u16 = 10809;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// A unix socket.
    Unix(PathBuf),
    /// A host name or address, and a port.
    Tcp(String, u16),
}

/// What a URI says: the place, the export and whether TLS is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Uri {
    pub(crate) place: Place,
    pub(crate) export: String,
    pub(crate) tls: bool,
}

impl std::str::FromStr for Uri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or("a URI starts with nbd:// or nbd+unix://")?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = percent_decode(path)?;
        let tls = scheme.starts_with("nbds");
        let place = match scheme {
            "nbd" | "nbds" => tcp(authority)?,
            "nbd+unix" | "nbds+unix" if authority.is_empty() => unix(query)?,
            "nbd+unix" | "nbds+unix" => return Err(format!("a unix URI has no host, found '{authority}'")),
            other => return Err(format!("the scheme '{other}' is not nbd, nbds, nbd+unix or nbds+unix")),
        };
        Ok(Uri { place, export, tls })
    }
}

fn tcp(authority: &str) -> Result<Place, String> {
    let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, tail)) => (host, tail.strip_prefix(':')),
        None => match authority.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    if host.is_empty() {
        return Err("the URI names no host".into());
    }
    let port = match port {
        Some(text) => text.parse().map_err(|_| format!("'{text}' is not a port"))?,
        None => DEFAULT_PORT,
    };
    Ok(Place::Tcp(host.to_owned(), port))
}

fn unix(query: &str) -> Result<Place, String> {
    for pair in query.split('&') {
        if let Some(path) = pair.strip_prefix("socket=") {
            return Ok(Place::Unix(PathBuf::from(percent_decode(path)?)));
        }
    }
    Err("a unix URI needs ?socket=PATH".into())
}

fn percent_decode(text: &str) -> Result<String, String> {
    let bad = || format!("'{text}' has a broken %XX");
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            out.push(first);
            continue;
        }
        let pair = tail.get(..2).filter(|pair| pair.iter().all(u8::is_ascii_hexdigit)).ok_or_else(bad)?;
        let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
        out.push(u8::from_str_radix(pair, 16).map_err(|_| bad())?);
        rest = &tail[2..];
    }
    String::from_utf8(out).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Uri, String> {
        text.parse()
    }

    #[test]
    fn the_four_schemes_parse() {
        let uri = parse("nbd://localhost:7/a%20b").expect("a URI");
        assert_eq!(uri, Uri { place: Place::Tcp("localhost".into(), 7), export: "a b".into(), tls: false });
        let uri = parse("nbds://[::1]/").expect("a URI");
        assert_eq!(uri, Uri { place: Place::Tcp("::1".into(), DEFAULT_PORT), export: "".into(), tls: true });
        let uri = parse("nbd+unix:///disk?socket=/run/s").expect("a URI");
        assert_eq!(uri, Uri { place: Place::Unix("/run/s".into()), export: "disk".into(), tls: false });
        assert!(parse("nbds+unix:///?socket=/run/s").expect("a URI").tls);
    }

    #[test]
    fn broken_uris_are_refused() {
        for text in [
            "",
            "nbd:",
            "http://a/",
            "nbd://",
            "nbd://h:99999/",
            "nbd+unix:///x",
            "nbd://h/%4",
            "nbd://h/%+1",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
