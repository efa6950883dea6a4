//! Heads as files: what is written reads back, and nothing else is believed.

use super::file::{read, remove, write};
use super::*;
use proptest::prelude::*;

fn head(ways: &[&[&str]]) -> Head {
    let ways = ways.iter().map(|way| way.iter().map(|line| (*line).to_owned()).collect()).collect();
    Head {
        volume: "0123456789abcdef0123456789abcdef".to_owned(),
        complete: true,
        ways,
        generation: 0,
        standing: Standing::Active,
        account: None,
        backup: None,
    }
}

fn text(head: &Head) -> String {
    String::from_utf8(head.encode().unwrap()).unwrap()
}

fn refused(bytes: &[u8]) -> String {
    with_source(&Head::decode(bytes).unwrap_err())
}

/// The example of the format's description is one.
#[test]
fn the_description_shows_a_head() {
    let description = include_str!("../../../docs/formats/head.md");
    let example = description.split("```json\n").nth(1).unwrap().split("```").next().unwrap();
    let head = Head::decode(example.as_bytes()).unwrap();
    assert_eq!(text(&head), example);
}

#[test]
fn what_is_no_head_is_refused() {
    let good = head(&[&["slice (offset 1M)"], &[]]);
    let text = text(&good);
    assert_eq!(Head::decode(text.as_bytes()).unwrap(), good);
    for (was, is, says) in [
        ("1M", "2M", "checksum"),
        ("true", "false", "checksum"),
        ("0123456789abcdef0", "1123456789abcdef0", "checksum"),
        ("0123456789abcdef0", "0123456789ABCDEF0", "name"),
        ("0123456789abcdef0", "0", "name"),
        ("1M", "\\u001b[2J", "no text"),
        ("slice (offset 1M)", "", "no text"),
        ("\"mason-head\": 1", "\"mason-head\": 2", "checksum"),
        ("\"mason-head\": 1", "\"mason-head\": 3", "checksum"),
        ("\"mason-head\": 1", "\"mason-head\": 4", "version 4, this program knows 3"),
        ("\"mason-head\": 1", "\"mason-head\": 1, \"more\": 1", "unknown field"),
        ("\"mason-head\": 1", "\"mason\": 1", "missing field"),
        ("\"complete\": true,", "", "missing field"),
        ("[]", "[], []", "checksum"),
        ("[]", "[1]", "expected a string"),
        ("}", "", "EOF"),
        ("{", "[[[[", "not understood"),
    ] {
        assert!(text.contains(was));
        let found = refused(text.replace(was, is).as_bytes());
        assert!(found.contains(says), "{was} -> {is}: {found}");
    }
    assert!(refused(&[b' '; 70_000]).contains("64 KiB"));
    assert!(refused("[".repeat(60_000).as_bytes()).contains("not understood"));
    assert!(refused(b"\xff\xfe").contains("not understood"));
    assert!(refused(b"").contains("EOF"));
    let lines = format!("[{}\"x\"]", "\"x\",".repeat(5000));
    assert!(refused(text.replace("[]", &lines).as_bytes()).contains("too long"));
}

#[test]
fn a_head_says_where_its_volume_stands_in_a_move() {
    for (generation, standing) in [
        (0, Standing::Moving("/b.img".to_owned())),
        (3, Standing::Active),
        (4, Standing::Filling("nbd://h/x".to_owned())),
        (u64::MAX, Standing::Moved("/b.img".to_owned())),
    ] {
        let good = Head { generation, standing, ..head(&[&[]]) };
        let text = text(&good);
        assert_eq!(Head::decode(text.as_bytes()).unwrap(), good);
        for (was, is, says) in [
            ("\"mason-head\": 2", "\"mason-head\": 1", "checksum"),
            ("\"generation\"", "\"generation\": 7, \"x\"", "unknown field"),
            ("\"state\": \"", "\"state\": \"x", "state is unknown"),
            ("\"state\": \"active\"", "\"state\": \"moved\"", "state is unknown"),
            ("/b.img", "/c.img", "checksum"),
            ("/b.img", "\\n", "none"),
            ("\"state\": \"moved\"", "\"state\": \"moving\"", "checksum"),
        ] {
            if text.contains(was) {
                let found = refused(text.replace(was, is).as_bytes());
                assert!(found.contains(says), "{was} -> {is}: {found}");
            }
        }
    }
}

#[test]
fn a_head_says_what_is_known_of_backups() {
    let account = "ab".repeat(16);
    let backup = Backup { account: account.clone(), number: 7 };
    let overlaid = Standing::Overlaid("/state/overlay.cow".to_owned());
    let plain = head(&[]);
    for good in [
        Head { account: Some(account.clone()), ..plain.clone() },
        Head { account: Some(account), standing: overlaid.clone(), ..plain.clone() },
        Head {
            backup: Some(backup),
            generation: 2,
            standing: Standing::Filling("x".to_owned()),
            ..plain.clone()
        },
        Head { standing: overlaid, ..head(&[&[]]) },
    ] {
        assert!(!good.says_nothing());
        let text = text(&good);
        assert_eq!(Head::decode(text.as_bytes()).unwrap(), good);
        for (was, is, says) in [
            ("\"mason-head\": 3", "\"mason-head\": 2", "checksum"),
            ("abab\"", "abac\"", "checksum"),
            ("abab\"", "ABAB\"", "account's name"),
            ("\"number\": 7", "\"number\": 8", "checksum"),
            ("\"number\": 7", "\"number\": 7, \"x\": 1", "unknown field"),
            ("\"state\": \"overlaid\"", "\"state\": \"moved\"", "checksum"),
        ] {
            if text.contains(was) {
                let found = refused(text.replace(was, is).as_bytes());
                assert!(found.contains(says), "{was} -> {is}: {found}");
            }
        }
    }
    assert!(plain.says_nothing() && head(&[&[]]).says_nothing());
    assert!(!head(&[&["slice"]]).says_nothing());
}

#[test]
fn a_head_that_says_nothing_goes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("head");
    let marked = Head { account: Some("ab".repeat(16)), ..head(&[]) };
    put(&path, &marked).unwrap();
    // Account is kept of a volume, not of what it was before.
    restand(&path, 0, Standing::Moving("x".to_owned())).unwrap();
    assert_eq!(read(&path).unwrap().unwrap().account, marked.account);
    restand(&path, 0, Standing::Moved("x".to_owned())).unwrap();
    assert_eq!(read(&path).unwrap().unwrap().account, None);
    restand(&path, 0, Standing::Active).unwrap();
    assert_eq!(read(&path).unwrap(), None);
}

#[test]
fn what_is_too_large_is_not_written() {
    let many = Head { ways: BTreeSet::from([vec!["x".to_owned(); 5000]]), ..head(&[]) };
    let long = Head { ways: BTreeSet::from([vec!["x".repeat(70_000)]]), ..head(&[]) };
    for head in [many, long] {
        assert!(head.encode().unwrap_err().to_string().contains("too large"));
    }
}

#[test]
fn a_file_is_replaced_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("heads/nested/one");
    assert_eq!(read(&path).unwrap(), None);
    for head in [head(&[&["a"]]), head(&[&["b"], &["c"]])] {
        write(&path, &head).unwrap();
        assert_eq!(read(&path).unwrap(), Some(head));
    }
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left");
    remove(&path).unwrap();
    remove(&path).unwrap();
    assert_eq!(read(&path).unwrap(), None);
}

#[test]
fn only_regular_files_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    assert!(read(&pipe).unwrap_err().to_string().contains("no regular file"));
    assert!(read(folder.path()).unwrap_err().to_string().contains("no regular file"));
    assert!(read("/dev/zero".as_ref()).unwrap_err().to_string().contains("no regular file"));
    std::fs::write(folder.path().join("file"), "").unwrap();
    assert!(read(&folder.path().join("file")).unwrap_err().to_string().contains("no sound head"));
    assert_eq!(read(&folder.path().join("file/below")).unwrap(), None);
    let error = write(&folder.path().join("file/below"), &head(&[])).unwrap_err();
    assert!(error.to_string().contains("cannot be written"), "{error}");
    assert_eq!(read(&folder.path().join("x".repeat(300))).unwrap(), None);
}

#[test]
fn names_are_all_different() {
    let names: HashSet<String> = (0..100).map(|_| random_name().unwrap()).collect();
    assert!(names.len() == 100 && names.iter().all(|name| name.len() == NAME));
}

proptest! {
    #[test]
    fn heads_read_back(ways in proptest::collection::btree_set(proptest::collection::vec("[ -~ä]{1,20}", 0..5), 0..4), complete: bool) {
        let head = Head { complete, ways, ..head(&[]) };
        prop_assert_eq!(Head::decode(&head.encode().unwrap()).unwrap(), head);
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Head::decode(&bytes);
    }

    /// One changed byte is noticed, or means the same.
    #[test]
    fn damage_is_noticed(at: prop::sample::Index, byte: u8) {
        let good = head(&[&["stripe (chunk 64k) member 0 of 2", "  member 1: x"], &["slice (offset 1M)"]]);
        let mut bytes = good.encode().unwrap();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(read) = Head::decode(&bytes) {
            prop_assert_eq!(read, good);
        }
    }
}
