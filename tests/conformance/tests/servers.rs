//! The suite against real servers, each with the file of what it is known to break.
//!
//! A missing server skips its tests with a message; with `MASON_TESTS_NO_SKIP` in the environment it fails them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A server in a directory of its own, ended on drop. Every server here puts itself into the background once
/// it listens, and says its process id in the file `pid`.
struct Server {
    dir: tempfile::TempDir,
}

impl Server {
    /// Starts `program`; `arguments` gets the directory. None if the program is not installed.
    fn start(program: &str, arguments: impl Fn(&Path) -> Vec<String>) -> Option<Self> {
        if Command::new(program).arg("--version").output().is_err() {
            let no_skip = std::env::var_os("MASON_TESTS_NO_SKIP").is_some();
            assert!(!no_skip, "{program} is not installed and MASON_TESTS_NO_SKIP is set");
            eprintln!("\n*** SKIPPED: {program} is not installed, nothing was tested ***\n");
            return None;
        }
        let dir = tempfile::tempdir().expect("a directory");
        let mut command = Command::new(program);
        command.args(arguments(dir.path())).current_dir(dir.path());
        let started = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        assert!(started.expect("it starts").success(), "{command:?}");
        Some(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the suite against the server.
    fn suite(&self, scheme: &str, export: &str, expect: &str, args: &[&str]) -> Output {
        let expect = Path::new(env!("CARGO_MANIFEST_DIR")).join("expect").join(expect);
        let uri = format!("{scheme}:///{export}?socket={}", self.path("socket").display());
        let mut suite = Command::new(env!("CARGO_BIN_EXE_nbd-conformance"));
        suite.arg(uri).arg("--expect").arg(expect).args(args).output().expect("the suite runs")
    }

    /// Runs all tests, which must go as expected, and at least `least` of them must have run.
    fn conforms(&self, scheme: &str, export: &str, expect: &str, least: usize) {
        let ca = self.path("ca-cert.pem");
        let mut args = vec!["--write", "--timeout", "3"];
        if scheme.starts_with("nbds") {
            args.extend(["--ca", ca.to_str().expect("a path")]);
        }
        let output = self.suite(scheme, export, expect, &args);
        let shown = String::from_utf8_lossy(&output.stdout);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{shown}\n{error}");
        let passed =
            shown.lines().filter(|line| line.starts_with("ok ") || line.starts_with("warn ")).count();
        assert!(passed >= least, "only {passed} tests passed:\n{shown}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The server may have ended already, in a test that servers die of.
        let Ok(pid) = std::fs::read_to_string(self.path("pid")) else { return };
        let _ = Command::new("kill").arg(pid.trim()).stderr(Stdio::null()).status();
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn nbdkit(rest: &str) -> Option<Server> {
    Server::start("nbdkit", |dir| {
        let mut arguments = words("-P pid -U");
        arguments.push(dir.join("socket").display().to_string());
        arguments.extend(words(rest));
        arguments
    })
}

/// Makes the sparse file `disk` of `size` bytes.
fn disk(dir: &Path, size: u64) {
    std::fs::File::create(dir.join("disk")).and_then(|file| file.set_len(size)).expect("a file");
}

fn qemu_nbd(rest: &str, size: u64) -> Option<Server> {
    Server::start("qemu-nbd", |dir| {
        disk(dir, size);
        let mut arguments = words("--fork --pid-file=pid -t -e 0 -f raw -x disk");
        arguments.push(format!("--socket={}", dir.join("socket").display()));
        arguments.extend(words(rest));
        arguments.push("disk".into());
        arguments
    })
}

/// A certificate authority and a server's certificate, under the names nbdkit and qemu look for.
fn certificates(dir: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
    let authority_key = KeyPair::generate().expect("a key");
    let mut authority = CertificateParams::new(vec![]).expect("parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    authority.distinguished_name.push(rcgen::DnType::CommonName, "a test's authority");
    let authority_pem = authority.self_signed(&authority_key).expect("a certificate").pem();
    let key = KeyPair::generate().expect("a key");
    let mut server = CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters");
    server.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    server.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = server.signed_by(&key, &Issuer::new(authority, authority_key)).expect("a certificate");
    for (name, text) in [
        ("ca-cert.pem", authority_pem),
        ("server-cert.pem", certificate.pem()),
        ("server-key.pem", key.serialize_pem()),
    ] {
        std::fs::write(dir.join(name), text).expect("a file");
    }
}

#[test]
fn nbdkit_memory() {
    let Some(server) = nbdkit("memory 64M") else { return };
    server.conforms("nbd+unix", "", "nbdkit.txt", 130);
}

#[test]
fn nbdkit_file() {
    let server = Server::start("nbdkit", |dir| {
        disk(dir, 64 << 20);
        let socket = dir.join("socket");
        words(&format!("-P pid -U {} file {}", socket.display(), dir.join("disk").display()))
    });
    let Some(server) = server else { return };
    server.conforms("nbd+unix", "", "nbdkit.txt", 130);
}

#[test]
fn nbdkit_read_only() {
    let Some(server) = nbdkit("-r memory 64M") else { return };
    server.conforms("nbd+unix", "", "nbdkit.txt", 100);
}

#[test]
fn nbdkit_block_sizes() {
    let sizes = "blocksize-minimum=4096 blocksize-preferred=65536 blocksize-maximum=1M";
    let filter = format!("--filter=blocksize-policy memory 64M {sizes} blocksize-error-policy=error");
    let Some(server) = nbdkit(&filter) else { return };
    server.conforms("nbd+unix", "", "nbdkit.txt", 130);
}

#[test]
fn nbdkit_tls() {
    for mode in ["on", "require"] {
        let server = Server::start("nbdkit", |dir| {
            certificates(dir);
            let (socket, dir) = (dir.join("socket"), dir.display());
            words(&format!("-P pid -U {} --tls={mode} --tls-certificates={dir} memory 64M", socket.display()))
        });
        let Some(server) = server else { return };
        server.conforms("nbds+unix", "", "nbdkit-tls.txt", 130);
    }
}

#[test]
fn qemu_nbd_extended() {
    let Some(server) = qemu_nbd("-A", 8 << 30) else { return };
    server.conforms("nbd+unix", "disk", "qemu-nbd.txt", 150);
}

#[test]
fn qemu_nbd_read_only() {
    let Some(server) = qemu_nbd("-r", 64 << 20) else { return };
    server.conforms("nbd+unix", "disk", "qemu-nbd.txt", 120);
}

#[test]
fn qemu_nbd_tls() {
    let server = Server::start("qemu-nbd", |dir| {
        certificates(dir);
        disk(dir, 64 << 20);
        let (socket, dir) = (dir.join("socket"), dir.display());
        let tls =
            format!("--object tls-creds-x509,id=t,dir={dir},endpoint=server,verify-peer=no --tls-creds t");
        let rest = format!("--fork --pid-file=pid -t -e 0 -f raw -x disk --socket={} disk", socket.display());
        words(&format!("{tls} {rest}"))
    });
    let Some(server) = server else { return };
    server.conforms("nbds+unix", "disk", "qemu-nbd.txt", 150);
}

#[test]
fn qemu_storage_daemon() {
    let server = Server::start("qemu-storage-daemon", |dir| {
        disk(dir, 64 << 20);
        let socket = dir.join("socket");
        words(&format!(
            "--daemonize --pidfile pid --blockdev driver=file,node-name=f,filename=disk,discard=unmap \
             --blockdev driver=raw,node-name=r,file=f \
             --nbd-server addr.type=unix,addr.path={},max-connections=0 \
             --export type=nbd,id=e,node-name=r,name=disk,writable=on",
            socket.display()
        ))
    });
    let Some(server) = server else { return };
    server.conforms("nbd+unix", "disk", "qemu-nbd.txt", 150);
}

#[test]
fn without_write_nothing_is_changed() {
    let before: Vec<u8> = (0..4u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let server = Server::start("nbdkit", |dir| {
        std::fs::write(dir.join("disk"), &before).expect("a file");
        let socket = dir.join("socket");
        words(&format!("-P pid -U {} file {}", socket.display(), dir.join("disk").display()))
    });
    let Some(server) = server else { return };
    let output = server.suite("nbd+unix", "", "nbdkit.txt", &[]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
    let after = std::fs::read(server.path("disk")).expect("the file");
    assert!(before == after, "the export was changed without --write");
}
