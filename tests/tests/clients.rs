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

#[test]
fn nbdsh_uses_every_command() {
    let server = Server::new(2);
    let (_disk, uris) = server.serve(PAPER).unwrap();
    // python3-libnbd is for Debian's Python, not for any other that comes first in the path.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/every_command.py");
    client("/usr/bin/python3", &[script, &uris[0]]);
}

#[test]
fn fio_verifies_what_it_wrote_over_four_connections() {
    let server = Server::new(2);
    let (_disk, uris) = server.serve(PAPER).unwrap();
    let uri = format!("--uri={}", uris[0]);
    let name = ["--name=verify", "--ioengine=nbd", &uri, "--rw=randrw", "--verify=crc32c", "--do_verify=1"];
    let shape = ["--bsrange=512-64k", "--iodepth=16", "--fsync=64", "--numjobs=4", "--thread"];
    let space = [
        "--size=16M",
        "--offset_increment=16M",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--output-format=json",
    ];
    let said = client("fio", &[&name[..], &shape, &space].concat());
    let json: serde_json::Value = serde_json::from_str(&said[said.find('{').unwrap()..]).unwrap();
    let jobs = json["jobs"].as_array().unwrap();
    assert_eq!(jobs.len(), 4);
    for job in jobs {
        assert_eq!(job["error"], 0, "{said}");
        assert!(job["write"]["io_bytes"].as_u64().unwrap() > 1 << 20, "{said}");
    }
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let server = Server::new(2);
    let (_disk, uris) = server.serve(PAPER).unwrap();
    let mut image = vec![0; 64 << 20];
    fastrand_fill(&mut image[1 << 20..3 << 20]);
    fastrand_fill(&mut image[40 << 20..41 << 20]);
    let (from, back) = (server.path("from.img"), server.path("back.qcow2"));
    std::fs::write(&from, &image).unwrap();
    let (from, back) = (from.to_str().unwrap(), back.to_str().unwrap());
    client("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", from, &uris[0]]);
    client("qemu-img", &["compare", "-f", "raw", "-F", "raw", from, &uris[0]]);
    let map = client("qemu-img", &["map", "-f", "raw", "--output=json", &uris[0]]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let data = map.as_array().unwrap().iter().filter(|extent| extent["data"] == true);
    let data: Vec<_> = data.map(|extent| [&extent["start"], &extent["length"]]).collect();
    assert_eq!(data, [[1 << 20, 2 << 20], [40 << 20, 1 << 20]], "{map}");
    client("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uris[0], back]);
    client("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", back, &uris[0]]);
}

#[test]
fn qemu_img_bench_writes_and_reads() {
    let server = Server::new(2);
    let (_disk, uris) = server.serve(PAPER).unwrap();
    let count = ["bench", "-f", "raw", "-c", "4000", "-d", "64", "-s", "4096"];
    let write = ["-w", "--pattern=17", "--flush-interval=500", &uris[0]];
    client("qemu-img", &[&count[..], &write].concat());
    client("qemu-img", &[&count[..], &[&uris[0]]].concat());
    assert!(read(&server.path("disk.img"))[..4000 * 4096].iter().all(|byte| *byte == 17));
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

#[test]
fn a_reply_that_is_being_sent_is_sent_to_its_end_when_the_disk_stops() {
    let server = Server::new(1);
    let graph = "element Guest (type nbd) (listen unix:guest.sock) element Disk (type null) Guest -> Disk";
    let (disk, _) = server.serve(graph).unwrap();
    let mut client = blockmason_tests::raw::Raw::ready(&server.path("guest.sock"));
    client.request(0, 0, 32 << 20);
    // The header is here, so the rest is on its way, and far too long for the socket's buffer.
    assert_eq!(client.reply(), 0);
    let reader = std::thread::spawn(move || client.bytes(32 << 20).len());
    server.wait(disk.stop()).unwrap();
    assert_eq!(reader.join().unwrap(), 32 << 20);
}

#[test]
fn a_folder_with_a_space_in_its_name() {
    let server = Server::new(1);
    let folder = server.path("two words");
    std::fs::create_dir(&folder).unwrap();
    let spec = blockmason::lang::parse_str(
        "spaced.mason",
        "element Guest (type nbd) (listen unix:s) element Disk (type mem) (size 1M) Guest -> Disk",
        &folder,
        &Default::default(),
    );
    let spec = spec.unwrap();
    blockmason::lang::check(&spec, blockmason_elements::ALL).unwrap_or_else(|errors| panic!("{errors}"));
}

#[test]
fn clients_see_what_has_changed() {
    let server = Server::new(2);
    let graph = "
        element Guest (type nbd) (listen unix:guest.sock) (dirty_map Nightly Hourly)
        element Nightly (type log_dirty) (initially clean) (written dirty) (file nightly.map)
        element Hourly (type log_dirty) (initially clean) (written dirty) (granule 1M)
        element Disk (type file) (path disk.img) (size 64M)
        Guest -> Nightly -> Hourly -> Disk
    ";
    let (_disk, uris) = server.serve(graph).unwrap();
    client("qemu-io", &["-f", "raw", &uris[0], "-c", "write 1M 64k", "-c", "discard 40M 100k"]);
    let seen = |context: &str| {
        let map = client("nbdinfo", &["--json", &format!("--map={context}"), &uris[0]]);
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let dirty = map.as_array().unwrap().iter().filter(|extent| extent["type"] == 1);
        dirty
            .map(|extent| [&extent["offset"], &extent["length"]].map(|n| n.as_u64().unwrap()))
            .collect::<Vec<_>>()
    };
    assert_eq!(seen("qemu:dirty-bitmap:Nightly"), [[1 << 20, 64 << 10], [40 << 20, 128 << 10]]);
    assert_eq!(seen("x-mason:dirty"), seen("qemu:dirty-bitmap:Nightly"));
    assert_eq!(seen("qemu:dirty-bitmap:Hourly"), [[1 << 20, 1 << 20], [40 << 20, 1 << 20]]);
    // qemu shows what is dirty in the place of what is data.
    let path = server.path("guest.sock");
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:Nightly",
        path.display()
    );
    let map = client("qemu-img", &["map", "--output=json", "--image-opts", &image]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let dirty = map.as_array().unwrap().iter().filter(|extent| extent["data"] == false);
    let dirty: Vec<_> = dirty.map(|extent| [&extent["start"], &extent["length"]]).collect();
    assert_eq!(dirty, [[1 << 20, 64 << 10], [40 << 20, 128 << 10]], "{map}");
}

#[test]
fn a_map_of_another_disk_is_not_offered() {
    let server = Server::new(1);
    let graph = "
        element Guest (type nbd) (listen unix:guest.sock) (dirty_map Log)
        element Part (type slice) (offset 1M)
        element Log (type log_dirty)
        element Disk (type mem) (size 64M)
        Guest -> Part -> Log -> Disk
    ";
    let error = server.serve(graph).err().unwrap().to_string();
    assert!(error.contains("Log has the map of a disk of 67108864 bytes"), "{error}");
}
