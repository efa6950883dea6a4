//! Volumes as text: what comes back is what was there, with its snapshots; what is not whole leaves nothing that looks so.

use crate::Site;
use blockmason_tests::control::{command, mason};
use blockmason_tests::raw::Raw;
use std::io::Write;
use std::process::{Output, Stdio};

const GRAPH: &str = "element Guest (type nbd) (listen unix:vm.nbd)\n\
                     element Disk (type parallax) (pool vms.pool) (volume vm)\n\
                     Guest -> Disk\n";

/// A pool with a volume that has grown between two snapshots.
fn site() -> Site {
    let site = Site::new();
    site.write("vm.mason", GRAPH);
    mason(site.folder(), &["pool", "create", "vms.pool", "--size", "128M"]).done();
    mason(site.folder(), &["volume", "create", "vms.pool", "vm", "--size", "2M"]).done();
    for (snapshot, size, byte) in [("a", "3M", 1u8), ("b", "5M", 2)] {
        let daemon = site.run(&["vm.mason"]);
        let mut raw = Raw::ready(&site.path("vm.nbd"));
        raw.write(u64::from(byte) << 16, &vec![byte; 300_000 / 4096 * 4096]);
        drop(raw);
        site.mason(&["volume", "snapshot", "vms.pool", &format!("vm@{snapshot}")]).done();
        daemon.stop_well();
        mason(site.folder(), &["volume", "resize", "vms.pool", "vm", size]).done();
    }
    site
}

fn dump(site: &Site, name: &str) -> Vec<u8> {
    let done = command(site.folder(), &["volume", "dump", "vms.pool", name]).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    done.stdout
}

fn restore(site: &Site, name: &str, text: &[u8]) -> Output {
    let mut asked = command(site.folder(), &["volume", "restore", "vms.pool", name]);
    let mut asked =
        asked.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It may have ended before it has read all.
    let _ = asked.stdin.take().unwrap().write_all(text);
    asked.wait_with_output().unwrap()
}

/// Names and sizes.
fn list(site: &Site) -> Vec<(String, String)> {
    let said = mason(site.folder(), &["volume", "list", "vms.pool"]).done();
    let row = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        (words.next().unwrap(), words.next().unwrap())
    };
    said.lines().skip(2).map(row).collect()
}

#[test]
fn a_volume_comes_back_with_its_snapshots_and_their_sizes() {
    let site = site();
    let text = dump(&site, "vm");
    assert!(restore(&site, "w", &text).status.success());
    assert!(dump(&site, "w") == text, "what comes back is another volume");
    let sizes: Vec<_> = list(&site).into_iter().filter(|(name, _)| name.starts_with('w')).collect();
    let wanted =
        [("w", "5M"), ("w@a", "2M"), ("w@b", "3M")].map(|(name, size)| (name.to_owned(), size.to_owned()));
    assert_eq!(sizes, wanted);
}

#[test]
fn a_text_that_is_not_whole_leaves_nothing() {
    let site = site();
    let (text, before) = (dump(&site, "vm"), list(&site));
    let header =
        |from: &str, to: &str| String::from_utf8(text.clone()).unwrap().replacen(from, to, 1).into_bytes();
    let bad = [
        ([&text[..], b"junk\n"].concat(), "behind the end"),
        ([&text[..], &text[..]].concat(), "behind the end"),
        (text[..text.len() / 2].to_vec(), "dump"),
        (text[..text.len() - 4].to_vec(), "dump"),
        (header("checksums false", "checksums maybe"), "line 2"),
        (header("ordered false", "ordered 7"), "line 2"),
        (header("mason-volume 1", "mason-volume 2"), "no dump"),
    ];
    for (text, why) in bad {
        let done = restore(&site, "w", &text);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.code() == Some(1) && said.contains(why), "{why}: {said}");
        assert_eq!(list(&site), before, "{why}");
    }
    let said = restore(&site, "vm", &text);
    assert!(String::from_utf8_lossy(&said.stderr).contains("there is a volume vm already"), "{said:?}");
}

/// The tool dies amid the text: what it has made is not taken for the volume.
#[test]
fn a_restore_that_is_killed_leaves_a_part_that_is_called_so() {
    let site = site();
    let text = dump(&site, "vm");
    let mut asked = command(site.folder(), &["volume", "restore", "vms.pool", "w"]);
    let mut asked = asked.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = asked.stdin.take().unwrap();
    // More than a pipe holds: the rest of it has been read when this returns.
    stdin.write_all(&text[..text.len() / 2]).unwrap();
    asked.kill().unwrap();
    asked.wait().unwrap();
    drop(stdin);
    let left: Vec<_> =
        list(&site).into_iter().map(|(name, _)| name).filter(|name| name.starts_with('w')).collect();
    assert!(
        left.iter().any(|name| name == "w.restoring") && !left.iter().any(|name| name == "w"),
        "{left:?}"
    );
    // Snapshots first.
    for name in left.iter().rev() {
        mason(site.folder(), &["volume", "delete", "vms.pool", name]).done();
    }
    assert!(restore(&site, "w", &text).status.success());
    assert!(dump(&site, "w") == text);
}
