//! The NBD client against servers of others and our own.
#![allow(clippy::unwrap_used)]

use blockmason::testing::{TestDisk, play_against_model};
use blockmason::{Data, Flags, Host, Kind, Op, Request};
use blockmason_tests::{Server, client};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// A server that does not outlive its test. It is handed its socket, so that a client may connect
/// before it has come up.
struct Daemon(Child);

impl Daemon {
    fn start(listener: &UnixListener, program: &str, args: &[&str]) -> Daemon {
        // LISTEN_PID must name the process that the shell becomes.
        let child = Command::new("sh")
            .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 0</dev/null", program])
            .args(args)
            .stdin(Stdio::from(OwnedFd::from(listener.try_clone().unwrap())))
            .spawn();
        Daemon(child.unwrap_or_else(|error| panic!("{program} cannot be started: {error}")))
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Far {
    folder: tempfile::TempDir,
    listener: UnixListener,
}

impl Far {
    fn new() -> Far {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("far.sock")).unwrap();
        Far { folder, listener }
    }

    fn nbdkit(&self, args: &[&str]) -> Daemon {
        Daemon::start(&self.listener, "nbdkit", &[&["-f"], args].concat())
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// The element that connects to it.
    fn element(&self, more: &str) -> String {
        let socket = self.path("far.sock");
        format!("element R (type nbd_client) (uri nbd+unix:///?socket={}) {more}\n", socket.display())
    }
}

/// Runs a test on a shard whose clock is the real one, since real servers know no other.
fn on_shard<T>(body: impl AsyncFnOnce(Arc<Host>) -> T) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default()).unwrap();
    runtime.block_on(async {
        let all = body(Host::on_this_thread(1, Path::new("/nonexistent")));
        tokio::time::timeout(Duration::from_secs(60), all).await.expect("a test that ends")
    })
}

async fn disk(host: &Arc<Host>, element: &str) -> TestDisk {
    TestDisk::new(host, blockmason_elements::ALL, element, "R").await.unwrap()
}

fn get(disk: &TestDisk, handler: &str) -> String {
    let graph = disk.disk.graph();
    graph.instances().find(|instance| instance.name == "R").unwrap().element.get(handler).unwrap()
}

fn call(disk: &TestDisk, handler: &str) {
    let graph = disk.disk.graph();
    graph.instances().find(|instance| instance.name == "R").unwrap().element.call(handler, "").unwrap();
}

#[test]
fn behaves_like_a_vector_over_any_server() {
    let servers: &[&[&str]] = &[
        &["memory", "300k"],
        &["--filter=multi-conn", "memory", "300k", "multi-conn-mode=disable"],
        &[
            "--filter=blocksize-policy",
            "memory",
            "300k",
            "blocksize-minimum=512",
            "blocksize-maximum=64k",
            "blocksize-error-policy=error",
        ],
        &["--filter=fua", "memory", "300k"],
        &["--filter=nozero", "--filter=noextents", "--no-sr", "memory", "300k"],
        &["--filter=delay", "memory", "300k", "rdelay=1ms"],
    ];
    for (seed, args) in servers.iter().enumerate() {
        let far = Far::new();
        let _daemon = far.nbdkit(args);
        on_shard(async |host| {
            let disk = disk(&host, &far.element("")).await;
            assert_eq!(disk.size(), 300 << 10, "{args:?}");
            play_against_model(&disk, seed as u64, 300).await;
            assert_eq!(get(&disk, "reconnects"), "0");
            disk.disk.stop().await.unwrap();
        });
    }
}

#[test]
fn behaves_like_a_vector_over_qemu_and_its_extended_headers() {
    let far = Far::new();
    let image = far.path("disk.img");
    std::fs::write(&image, vec![0; 300 << 10]).unwrap();
    let args = ["-t", "-f", "raw", "-x", "", "--discard=unmap", "-e", "4", image.to_str().unwrap()];
    let _daemon = Daemon::start(&far.listener, "qemu-nbd", &args);
    on_shard(async |host| {
        let disk = disk(&host, &far.element("")).await;
        play_against_model(&disk, 77, 300).await;
        assert_eq!(get(&disk, "reconnects"), "0");
        disk.disk.stop().await.unwrap();
    });
}

/// Client, export on three shards, client with one connection on one of them, nbdkit.
#[test]
fn requests_cross_to_the_shard_that_has_the_connection() {
    let far = Far::new();
    let _daemon = far.nbdkit(&["--filter=multi-conn", "memory", "300k", "multi-conn-mode=disable"]);
    let server = Server::new(3);
    let text = format!("element Guest (type nbd) (listen unix:near.sock)\n{}Guest -> R", far.element(""));
    let (served, _) = server.serve(&text).unwrap();
    let near = format!(
        "element R (type nbd_client) (uri nbd+unix:///?socket={})",
        server.path("near.sock").display()
    );
    on_shard(async |host| {
        // One after the other they land on all shards.
        for seed in 0..4 {
            let disk = disk(&host, &near).await;
            play_against_model(&disk, seed, 150).await;
            disk.disk.stop().await.unwrap();
        }
    });
    let graph = served.graph();
    let remote = graph.instances().find(|instance| instance.name == "R").unwrap();
    assert_eq!(remote.element.get("connections").unwrap(), "1");
}

#[test]
fn several_connections_where_the_server_offers_it() {
    let far = Far::new();
    let _daemon = far.nbdkit(&["memory", "64M"]);
    let server = Server::new(2);
    let text = format!("element Guest (type nbd) (listen unix:near.sock)\n{}Guest -> R", far.element(""));
    let (served, uris) = server.serve(&text).unwrap();
    let image = server.path("from.img");
    std::fs::write(&image, vec![0xa5; 64 << 20]).unwrap();
    client("nbdcopy", &["--connections=4", "--flush", image.to_str().unwrap(), &uris[0]]);
    client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uris[0], image.to_str().unwrap()]);
    let graph = served.graph();
    let remote = graph.instances().find(|instance| instance.name == "R").unwrap();
    assert_eq!(remote.element.get("connections").unwrap(), "2");
    assert_eq!(remote.element.get("state").unwrap(), "connected");
}

#[test]
fn errors_are_the_servers_own() {
    let far = Far::new();
    let _daemon = far.nbdkit(&[
        "--filter=error",
        "memory",
        "1M",
        "error-pread=EIO",
        "error-pread-rate=100%",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
        "error-trim=EPERM",
        "error-trim-rate=100%",
    ]);
    on_shard(async |host| {
        let disk = disk(&host, &far.element("")).await;
        assert_eq!(disk.read(0, 512).await.unwrap_err().kind(), Kind::Io);
        let error = disk.write(512, &[1; 512]).await.unwrap_err();
        assert_eq!(error.kind(), Kind::NoSpace);
        assert!(error.to_string().starts_with("R: write at 512: the server says NBD_ENOSPC"), "{error}");
        assert_eq!(disk.op(Op::Discard, 0, 512).await.unwrap_err().kind(), Kind::Denied);
        disk.op(Op::Flush, 0, 0).await.unwrap();
        assert_eq!(get(&disk, "reconnects"), "0", "an error is no reason to leave");
        disk.disk.stop().await.unwrap();
    });
}

#[test]
fn flags_reach_the_server() {
    let far = Far::new();
    let log = far.path("log");
    let logfile = format!("logfile={}", log.display());
    let mut daemon = far.nbdkit(&["--filter=log", "memory", "1M", &logfile]);
    on_shard(async |host| {
        let disk = disk(&host, &far.element("")).await;
        disk.submit(Request::write(0, Data::copy_of(&[1; 512])).with(Flags::FUA)).await.unwrap();
        disk.submit(Request::new(Op::WriteZeroes, 512, 512).with(Flags::MAY_UNMAP)).await.unwrap();
        disk.submit(Request::new(Op::WriteZeroes, 1024, 512).with(Flags::FAST_ONLY)).await.unwrap();
        disk.submit(Request::new(Op::Discard, 2048, 512).with(Flags::FUA)).await.unwrap();
        disk.op(Op::Cache, 4096, 512).await.unwrap();
        disk.submit(Request::new(Op::Extents, 0, 8192).with(Flags::ONE)).await.unwrap();
        disk.op(Op::Flush, 0, 0).await.unwrap();
        disk.disk.stop().await.unwrap();
        drop(disk);
    });
    terminate(&daemon.0);
    daemon.0.wait().unwrap();
    let log = std::fs::read_to_string(log).unwrap();
    for line in [
        "Write id=1 offset=0x0 count=0x200 fua=1",
        "Zero id=2 offset=0x200 count=0x200 trim=1 fua=0 fast=0",
        "Zero id=3 offset=0x400 count=0x200 trim=0 fua=0 fast=1",
        "Trim id=4 offset=0x800 count=0x200 fua=1",
        "Cache id=5 offset=0x1000 count=0x200",
        "req_one=1",
        "Flush",
    ] {
        assert!(log.contains(line), "no {line:?} in\n{log}");
    }
}

/// Asks a process to end.
fn terminate(child: &Child) {
    client("kill", &["-TERM", &child.id().to_string()]);
}

#[test]
fn a_request_waits_for_the_server_to_come_back() {
    let far = Far::new();
    let mut daemon = far.nbdkit(&["memory", "1M"]);
    on_shard(async |host| {
        let disk = disk(&host, &far.element("(reconnect 60s)")).await;
        disk.write(0, &[1; 512]).await.unwrap();
        daemon.kill();
        let waiting = disk.send(Request::write(512, Data::copy_of(&[2; 512])));
        daemon = far.nbdkit(&["memory", "1M"]);
        waiting.await.unwrap().unwrap();
        assert_eq!(disk.read(512, 512).await.unwrap(), [2; 512]);
        assert_eq!(get(&disk, "reconnects"), "1");
        call(&disk, "reconnect");
        assert_eq!(disk.read(512, 512).await.unwrap(), [2; 512]);
        disk.disk.stop().await.unwrap();
    });
}

#[test]
fn without_patience_requests_fail_until_the_server_is_back() {
    let far = Far::new();
    let mut daemon = far.nbdkit(&["memory", "1M"]);
    on_shard(async |host| {
        let disk = disk(&host, &far.element("(reconnect 0s)")).await;
        disk.write(0, &[1; 512]).await.unwrap();
        daemon.kill();
        let error = disk.read(0, 512).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert_eq!(get(&disk, "state"), "connecting");
        let error = disk.read(0, 512).await.unwrap_err();
        assert!(error.to_string().contains("is away: "), "{error}");
        daemon = far.nbdkit(&["memory", "1M"]);
        while disk.read(0, 512).await.is_err() {
            tokio::task::yield_now().await;
        }
        disk.disk.stop().await.unwrap();
    });
}

#[test]
fn nobody_there_is_one_sentence() {
    let far = Far::new();
    let element = far.element("");
    drop(far.listener);
    on_shard(async |host| {
        let error = TestDisk::new(&host, blockmason_elements::ALL, &element, "R").await.err().unwrap();
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.to_string().contains("cannot be reached: Connection refused"), "{error}");
    });
}

/// The shipped graph, before nbdkit.
#[test]
fn the_proxy_serves_a_disk_on() {
    let far = Far::new();
    let _daemon = far.nbdkit(&["memory", "1M"]);
    let server = Server::new(2);
    let text = std::fs::read_to_string("../graphs/proxy.mason").unwrap();
    let socket = far.path("far.sock");
    let text = text.replace("nbd://127.0.0.1:10809/", &format!("nbd+unix:///?socket={}", socket.display()));
    let (_disk, uris) = server.serve(&text).unwrap();
    let script = ["write -P 7 4096 65536", "flush", "read -P 7 4096 65536", "read -P 0 0 4096"];
    let mut args = vec!["-f", "raw", &uris[0]];
    script.iter().for_each(|line| args.extend(["-c", line]));
    let said = client("qemu-io", &args);
    assert!(!said.contains("failed") && !said.contains("rror"), "{said}");
}

#[test]
fn fua_is_a_flush_where_the_server_has_none() {
    let far = Far::new();
    let log = far.path("log");
    let logfile = format!("logfile={}", log.display());
    let mut daemon = far.nbdkit(&["--filter=log", "--filter=fua", "memory", "1M", &logfile]);
    on_shard(async |host| {
        let disk = disk(&host, &far.element("")).await;
        disk.submit(Request::write(0, Data::copy_of(&[1; 512])).with(Flags::FUA)).await.unwrap();
        disk.disk.stop().await.unwrap();
    });
    terminate(&daemon.0);
    daemon.0.wait().unwrap();
    let log = std::fs::read_to_string(log).unwrap();
    let (write, flush) = (log.find("Write id=1 offset=0x0 count=0x200 fua=0"), log.find("Flush id=2"));
    assert!(write.is_some() && write < flush, "{log}");
}

const BLOCK: u64 = 512;
const BLOCKS: u64 = 64;

/// Blocks that say which write they are of.
fn stamp(block: u64, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK as usize];
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes[8..16].copy_from_slice(&version.to_le_bytes());
    bytes
}

fn version(bytes: &[u8], block: u64) -> u64 {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let version = number(8);
    assert!(version == 0 || number(0) == block, "a block of another place");
    version
}

/// Writes a block again and again, one version after the other, and now and then reads it back: never
/// may an older version appear than the last that was answered.
async fn writer(disk: &TestDisk, block: u64, versions: u64, done: &std::cell::Cell<u64>) {
    for next in 1..=versions {
        let write = Request::write(block * BLOCK, Data::copy_of(&stamp(block, next)));
        let write = if next % 7 == 0 { write.with(Flags::FUA) } else { write };
        disk.submit(write).await.unwrap();
        done.set(done.get() + 1);
        if next % 3 == 0 {
            let found = version(&disk.read(block * BLOCK, BLOCK).await.unwrap(), block);
            assert_eq!(found, next, "block {block}");
        }
    }
}

/// A server of an image that is killed five times while every block is written.
struct Ordeal {
    far: Far,
    image: std::path::PathBuf,
    versions: u64,
}

impl Ordeal {
    fn new() -> Ordeal {
        let far = Far::new();
        let image = far.path("disk.img");
        std::fs::write(&image, vec![0; (BLOCK * BLOCKS) as usize]).unwrap();
        Ordeal { far, image, versions: 60 }
    }

    /// The kernel has what the file plugin has answered: its death loses nothing.
    fn daemon(&self, more: &[&str]) -> Daemon {
        let image = self.image.to_str().unwrap();
        let own = ["--filter=delay", "--filter=multi-conn", "file", image, "wdelay=2ms"];
        self.far.nbdkit(&[&own, more].concat())
    }

    async fn run(&self, more: &[&str], mut daemon: Daemon, disks: &[TestDisk]) {
        let done = std::cell::Cell::new(0);
        let disk = |block: u64| &disks[block as usize % disks.len()];
        let writers = (0..BLOCKS).map(|block| writer(disk(block), block, self.versions, &done));
        let killer = async {
            for kill in 1..=5 {
                while done.get() < kill * BLOCKS * self.versions / 8 {
                    tokio::task::yield_now().await;
                }
                daemon.kill();
                daemon = self.daemon(more);
            }
        };
        tokio::join!(futures::future::join_all(writers), killer);
        disks[0].op(Op::Flush, 0, 0).await.unwrap();
        for disk in disks {
            disk.disk.stop().await.unwrap();
        }
        let bytes = std::fs::read(&self.image).unwrap();
        for block in 0..BLOCKS {
            let at = (block * BLOCK) as usize;
            assert_eq!(version(&bytes[at..at + BLOCK as usize], block), self.versions);
        }
    }
}

#[test]
fn a_server_that_is_killed_under_load_loses_and_reorders_nothing() {
    let ordeal = Ordeal::new();
    let daemon = ordeal.daemon(&[]);
    on_shard(async |host| {
        let disk = disk(&host, &ordeal.far.element("(reconnect 60s)")).await;
        // Not the graph, which would never count as drained.
        let remote = disk.disk.graph().instances().find(|instance| instance.name == "R").unwrap().clone();
        ordeal.run(&[], daemon, &[disk]).await;
        let reconnects: u64 = remote.element.get("reconnects").unwrap().parse().unwrap();
        assert!(reconnects >= 5, "{reconnects}");
    });
}

/// The same through three shards, with a connection on each and with one for all.
#[test]
fn killed_under_load_from_several_shards() {
    for more in [&["multi-conn-mode=disable"][..], &[]] {
        let ordeal = Ordeal::new();
        let daemon = ordeal.daemon(more);
        let server = Server::new(3);
        let remote = ordeal.far.element("(reconnect 60s)");
        server
            .serve(&format!("element Guest (type nbd) (listen unix:near.sock)\n{remote}Guest -> R"))
            .unwrap();
        let near = server.path("near.sock");
        let near = format!("element R (type nbd_client) (uri nbd+unix:///?socket={})", near.display());
        on_shard(async |host| {
            let mut disks = Vec::new();
            for _ in 0..5 {
                disks.push(disk(&host, &near).await);
            }
            ordeal.run(more, daemon, &disks).await;
        });
    }
}
