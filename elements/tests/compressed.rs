//! What compression saves, and where: real text and a real program, over a file with holes, a pool, and buckets with
//! objects of two sizes. `--nocapture` shows the numbers of docs/compress.md.
#![cfg(all(feature = "compress", feature = "s3"))]
#![allow(clippy::unwrap_used, reason = "tests panic")]

#[path = "kit/buckets.rs"]
#[allow(dead_code, reason = "other tests make their volumes by it")]
mod kit;

use blockmason::testing::{TestDisk, run};
use blockmason::{Data, Op, Request, rt};
use blockmason_elements::ALL;
use blockmason_elements::cloud::tool::{self, Place};
use mason_bucket::{Operation, Server};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Bytes that are written.
const LEN: u64 = 8 * MIB;

/// Source files below a folder, in a row.
fn sources(folder: &Path, into: &mut Vec<u8>) {
    let mut entries: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        match path.is_dir() {
            true => sources(&path, into),
            false => into.extend(std::fs::read(&path).unwrap()),
        }
    }
}

/// The sources of this library and its documentation, as often as it takes: no cluster sees the same twice.
fn text() -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < LEN {
        ["src", "../blockmason/src", "../docs"]
            .iter()
            .for_each(|folder| sources(&root.join(folder), &mut bytes));
    }
    bytes.truncate(LEN as usize);
    bytes
}

/// The beginning of this program.
fn program() -> Vec<u8> {
    let mut bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    bytes.resize(LEN as usize, 0);
    bytes
}

/// Writes bytes to a disk in pieces of a MiB, makes them durable, lets room be given back, and reads them.
async fn fill(disk: &TestDisk, bytes: &[u8]) {
    for (at, piece) in (0..).step_by(MIB as usize).zip(bytes.chunks(MIB as usize)) {
        disk.submit(Request::write(at, Data::copy_of(piece))).await.unwrap();
    }
    disk.op(Op::Flush, 0, 0).await.unwrap();
    rt::sleep(Duration::from_secs(5)).await;
    disk.op(Op::Flush, 0, 0).await.unwrap();
    assert!(disk.read(0, bytes.len() as u64).await.unwrap() == bytes);
}

/// Bytes of blocks that a sparse file has room for.
fn over_file(compress: &str, bytes: &[u8]) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().display();
    let text = format!(
        "{compress} element W (type wal) element D (type file) (path {place}/d.img) (size 64M) \
         element L (type file) (path {place}/l.img) (size 16M) X -> W (W, out) -> D (W, log) -> L"
    );
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, &text, "X").await.unwrap();
        fill(&disk, bytes).await;
        disk.disk.stop().await.unwrap();
    });
    std::fs::metadata(folder.path().join("d.img")).unwrap().blocks() * 512
}

/// Bytes of objects of blocks in a bucket, and bytes and requests that were sent.
fn over_bucket(compress: &str, object: u64, bytes: &[u8]) -> (u64, u64, usize) {
    let (server, folder) = (Server::new(), tempfile::tempdir().unwrap());
    server.store().create_bucket("vms");
    let keys = kit::keys(folder.path(), server.access(), server.secret());
    let place = Place {
        bucket: "vms".to_owned(),
        prefix: "vm1".to_owned(),
        endpoint: Some(server.endpoint().to_owned()),
        region: "us-east-1".to_owned(),
        credentials: Some(keys.clone()),
        ..Place::default()
    };
    tool::create(&place, 64 * MIB, object, true).unwrap();
    let text = format!(
        "{compress} element D (type s3) (bucket vms) (prefix vm1) (endpoint {}) (credentials {}) X -> D",
        server.endpoint(),
        keys.display()
    );
    let sent = run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, &text, "X").await.unwrap();
        fill(&disk, bytes).await;
        let graph = disk.disk.graph();
        graph.call("D", "settle", "").unwrap();
        graph.get("D", "sent").unwrap().parse().unwrap()
    });
    let keys = server.store().keys("vms");
    let blocks = keys.iter().filter(|key| key.contains("/b/"));
    let stored = blocks.map(|key| server.store().get("vms", key).unwrap().bytes.len() as u64).sum();
    (stored, sent, server.count(Operation::Put))
}

const NONE: &str = "element X (type probe)";

#[test]
fn room_is_saved_where_holes_are() {
    for (what, bytes, most) in [("text", text(), 45), ("program", program(), 75)] {
        println!("{what}");
        let plain = over_file(NONE, &bytes);
        assert!(plain >= LEN, "{plain}");
        for params in [
            "(algorithm lz4)",
            "(algorithm zstd)",
            "(algorithm zstd) (level 9)",
            "(algorithm zstd) (cluster 256k)",
        ] {
            let used = over_file(&format!("element X (type compress) (create yes) {params}"), &bytes);
            println!("  file, {params}: {}%", used * 100 / plain);
            let most = if params.contains("lz4") { 80 } else { most };
            assert!(used * 100 < plain * most, "{params}: {used} of {plain}");
        }
        for (params, object, most) in [
            // Objects hold the gaps, too: nothing is saved.
            ("(cluster 64k)", MIB, 125),
            ("(cluster 1M) (unit 64k)", 64 << 10, most),
            ("(cluster 1M) (unit 128k)", 128 << 10, most + 15),
        ] {
            let (stored, sent, puts) = over_bucket(NONE, object, &bytes);
            let compress = format!("element X (type compress) (create yes) (algorithm zstd) {params}");
            let (packed, sent_packed, puts_packed) = over_bucket(&compress, object, &bytes);
            println!(
                "  objects of {}k, {params}: stored {}%, sent {}%, PUTs {puts} and {puts_packed}",
                object >> 10,
                packed * 100 / stored,
                sent_packed * 100 / sent
            );
            assert!(packed * 100 < stored * most, "{params}: {packed} of {stored}");
        }
    }
}
