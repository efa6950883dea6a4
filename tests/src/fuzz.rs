//! What arrives from outside, as bytes: one function for each entrance. They take any bytes and panic
//! where a promise is broken; fuzzers and ordinary tests call the same ones.

mod chain;
mod handshake;
mod peer;
mod transmission;
mod vhost_messages;

pub use chain::chain;
pub use handshake::{client, handshake};
pub use transmission::transmission;
pub use vhost_messages::vhost_messages;

use blockmason::lang::{Defines, Files, Spec, check, parse_checked, parse_with, print};
use blockmason_elements::nbd::uri::Uri;
use blockmason_elements::parallax::fuzzing as parallax;
use std::path::{Path, PathBuf};

/// An entrance: its name and its function.
pub type Target = (&'static str, fn(&[u8]));

/// Every entrance, by the name of its fuzz target and its corpus.
pub const TARGETS: &[Target] = &[
    ("graph", graph),
    ("handshake", handshake),
    ("client", client),
    ("transmission", transmission),
    ("uri", uri),
    ("chain", chain),
    ("vhost_messages", vhost_messages),
    ("parallax_structures", parallax::structures),
    ("parallax_pool", parallax::pool),
];

/// The longest input that is worth a try, in bytes; what comes after is not looked at. It bounds the
/// memory of one run, since answers are longer than requests.
pub const MAX_INPUT: usize = 32 << 10;

/// Between a graph file and the files that it includes. No graph file may hold this control character.
const SEPARATOR: char = '\u{1e}';

/// Where the graph stands.
const FOLDER: &str = "/srv";

/// Files `1.mason`, `2.mason` and so on.
struct Parts<'a>(Vec<&'a str>);

impl Files for Parts<'_> {
    fn read(&self, path: &Path) -> std::io::Result<String> {
        let known = path.file_stem().and_then(|name| name.to_str()?.parse::<usize>().ok());
        let text = known.and_then(|part| self.0.get(part)).ok_or(std::io::ErrorKind::NotFound)?;
        Ok((*text).to_owned())
    }
}

/// A graph file, and after each separator (the byte 0x1e) a file that it may include as `1.mason` and so on.
///
/// A valid graph prints as a graph that prints the same; whatever is said of an invalid one can be
/// shown.
pub fn graph(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(&data[..data.len().min(MAX_INPUT)]) else { return };
    let parts = Parts(text.split(SEPARATOR).collect());
    let opened = PathBuf::from(FOLDER).join("graph.mason");
    let (path, text) = (Path::new("graph.mason"), parts.0[0].to_owned());
    let all = blockmason_elements::ALL;
    let parsed = parse_with(&parts, path, opened.clone(), text.clone(), &defines());
    let valid = parsed.and_then(|spec| check(&spec, all).map(|_| spec));
    let at_once = parse_checked(&parts, path, opened, text, &defines(), all);
    assert_eq!(valid.is_ok(), at_once.is_ok(), "checked while it is read or afterwards");
    match at_once {
        Ok(spec) => prints_as_itself(&spec),
        Err(errors) => {
            assert!(errors.count() > 0 && !errors.first_line().is_empty());
            assert!(errors.to_string().contains("mason::"), "{errors}");
            assert!(errors.to_json().is_array() || errors.to_json().is_object());
        }
    }
}

/// What a graph's parameters `${run}` and `${state}` are when it runs.
fn defines() -> Defines {
    let mut defines = Defines::new();
    defines.set("run", "/run/mason", "/");
    defines.set("state", "/var/lib/mason", "/");
    defines
}

fn prints_as_itself(spec: &Spec) {
    let all = blockmason_elements::ALL;
    let printed = print(spec, all, FOLDER.as_ref());
    let opened = PathBuf::from(FOLDER).join("printed.mason");
    let nothing = Parts(Vec::new());
    let again = parse_checked(&nothing, Path::new("printed.mason"), opened, printed.clone(), &defines(), all)
        .unwrap_or_else(|errors| panic!("what was printed is not valid: {errors}\n{printed}"));
    assert_eq!(again.edges.len(), spec.edges.len(), "{printed}");
    assert_eq!(print(&again, all, FOLDER.as_ref()), printed);
}

/// The text of an NBD URI: one that is understood prints as one that means the same.
pub fn uri(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(&data[..data.len().min(MAX_INPUT)]) else { return };
    if let Ok(uri) = text.parse::<Uri>() {
        let printed = uri.to_string();
        assert_eq!(printed.parse::<Uri>().ok(), Some(uri), "{text:?} became {printed:?}");
    }
}
