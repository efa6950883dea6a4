//! Real NBD clients against a served disk.
#![allow(clippy::unwrap_used)]

use blockmason_tests::{Server, client, read};

/// The paper's graph over a real image.
const PAPER: &str = "
    element Guest (type nbd) (listen unix:guest.sock)
    element LocalDisk (type file) (path disk.img) (size 64M)
    (Guest, out) -> (LocalDisk, in)
";

#[test]
fn qemu_io_reads_back_what_it_writes() {
    let server = Server::new(2);
    let (_disk, uris) = server.serve(PAPER).unwrap();
    let script = [
        "write -P 0xab 4096 65536",
        "write -P 1 -f 1 511",
        "flush",
        "read -P 0xab 4096 65536",
        "read -P 1 1 511",
        "read -P 0 512 3584",
        "write -z 8192 4096",
        "read -P 0 8192 4096",
        "discard 1M 1M",
    ];
    let mut args = vec!["-f", "raw", &uris[0]];
    script.iter().for_each(|line| args.extend(["-c", line]));
    let said = client("qemu-io", &args);
    assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
    let image = read(&server.path("disk.img"));
    assert_eq!(image.len(), 64 << 20);
    assert!(image[4096..8192].iter().all(|byte| *byte == 0xab));
    assert!(image[8192..12288].iter().all(|byte| *byte == 0));
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let server = Server::new(1);
    let (_disk, uris) = server.serve(PAPER).unwrap();
    let json: serde_json::Value = serde_json::from_str(&client("nbdinfo", &["--json", &uris[0]])).unwrap();
    let export = &json["exports"][0];
    assert_eq!(export["export-size"], 64 << 20);
    for can in ["can_multi_conn", "can_fua", "can_flush", "can_trim", "can_zero", "can_cache", "can_df"] {
        assert_eq!(export[can], true, "{can}: {json}");
    }
    assert_eq!(export["contexts"][0], "base:allocation");
    assert_eq!(export["block_size_minimum"], 1);
}

#[test]
fn nbdcopy_moves_an_image_there_and_back() {
    let server = Server::new(2);
    let (_disk, uris) = server.serve(PAPER).unwrap();
    let mut image = vec![0; 64 << 20];
    fastrand_fill(&mut image[5 << 20..30 << 20]);
    std::fs::write(server.path("from.img"), &image).unwrap();
    let (from, to) = (server.path("from.img"), server.path("to.img"));
    client("nbdcopy", &["--connections=4", "--flush", from.to_str().unwrap(), &uris[0]]);
    client("nbdcopy", &["--connections=4", &uris[0], to.to_str().unwrap()]);
    assert!(read(&to) == image && read(&server.path("disk.img")) == image);
    client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uris[0], from.to_str().unwrap()]);
}

/// Bytes that do not repeat; a seed of its own, so that a failure repeats.
fn fastrand_fill(bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}
