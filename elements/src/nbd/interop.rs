//! Handshakes with the programs of others, where they are installed: nbdkit, qemu-nbd, nbdinfo.

use super::client::{self, ClientTls, Wanted};
use super::meta::ALLOCATION;
use super::server::tests::Shelf;
use super::server::{self, TlsPolicy};
use super::wire::{
    Command, CommandFlags, Reply, ReplyStyle, RequestHeader, TransmissionFlags, decode_reply, decode_request,
    encode_request, encode_request_extended,
};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command as Program, Output, Stdio};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// True if the program can be run; else says on standard error that the test did not test.
fn installed(program: &str) -> bool {
    let found = Program::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: {program} is not installed, so nothing was tested against it");
    }
    found
}

/// A child that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// nbdkit on one end of a socket pair.
fn nbdkit(arguments: &[&str]) -> (Killed, tokio::net::UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    let input = OwnedFd::from(far.try_clone().unwrap());
    let child = Program::new("nbdkit")
        .args(["-s", "-f"])
        .args(arguments)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(OwnedFd::from(far)))
        .spawn()
        .unwrap();
    near.set_nonblocking(true).unwrap();
    (Killed(child), tokio::net::UnixStream::from_std(near).unwrap())
}

/// Sends a request and reads the header of its reply, the connection's last.
async fn ask<S: AsyncRead + AsyncWrite + Unpin>(server: &mut client::Server<S>, command: Command) -> Reply {
    let request = RequestHeader {
        flags: CommandFlags::NONE,
        command,
        cookie: 0x0123_4567_89ab_cdef,
        offset: 0,
        len: 512,
    };
    match server.style {
        ReplyStyle::Extended => server.stream.write_all(&encode_request_extended(&request)).await.unwrap(),
        _ => server.stream.write_all(&encode_request(&request).unwrap()).await.unwrap(),
    }
    server.stream.flush().await.unwrap();
    let mut bytes = Vec::new();
    loop {
        if let Some((reply, _)) = decode_reply(server.style, &bytes).unwrap() {
            return reply;
        }
        assert_ne!(server.stream.read_buf(&mut bytes).await.unwrap(), 0, "the server hung up");
    }
}

#[track_caller]
fn assert_answers(reply: Reply) {
    let cookie = match reply {
        Reply::Simple { cookie, .. } => cookie,
        Reply::Chunk(chunk) => {
            assert!(
                chunk.check(chunk.kind == super::wire::ChunkType::BLOCK_STATUS_EXT, 512).is_ok(),
                "{chunk:?}"
            );
            chunk.cookie
        }
    };
    assert_eq!(cookie, 0x0123_4567_89ab_cdef);
}

#[tokio::test]
async fn the_client_gets_on_with_nbdkit() {
    if !installed("nbdkit") {
        return;
    }
    for style in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
        let (_child, stream) = nbdkit(&["memory", "1M"]);
        let wanted = Wanted { style, contexts: &[ALLOCATION, "who:knows"], ..Wanted::default() };
        let mut server = client::connect(stream, &wanted).await.unwrap();
        assert_eq!(server.size, 1 << 20);
        assert!(server.flags.contains(TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH));
        assert_eq!(server.contexts.len(), usize::from(style != ReplyStyle::Simple));
        assert_answers(ask(&mut server, Command::READ).await);
    }
    let (_child, stream) = nbdkit(&["memory", "1M"]);
    let listed = client::list(stream, &ClientTls::Off).await.unwrap();
    assert_eq!(listed.len(), 1);
    // Newstyle as it was before options had replies: NBD_OPT_EXPORT_NAME is all there is.
    let (_child, stream) = nbdkit(&["--mask-handshake=0", "memory", "1M"]);
    let server = client::connect(stream, &Wanted::default()).await.unwrap();
    assert_eq!((server.size, server.style, server.blocks), (1 << 20, ReplyStyle::Simple, None));
    let (_child, stream) = nbdkit(&["-o", "memory", "1M"]);
    let error = client::connect(stream, &Wanted::default()).await.unwrap_err();
    assert!(error.to_string().contains("oldstyle"), "{error}");
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn the_client_gets_on_with_nbdkit_under_tls() {
    if !installed("nbdkit") {
        return;
    }
    let folder = super::tls_tests::certificates();
    let certificates = format!("--tls-certificates={}", folder.path().display());
    let identity = super::tls::client_identity(folder.path(), "localhost").unwrap();
    for extra in [&[][..], &["--tls-verify-peer"]] {
        let arguments = [&["--tls=require", &certificates][..], extra, &["memory", "1M"]].concat();
        let (_child, stream) = nbdkit(&arguments);
        let tls = ClientTls::Required(identity.clone());
        let wanted =
            Wanted { style: ReplyStyle::Structured, contexts: &[ALLOCATION], tls, ..Wanted::default() };
        let mut server = client::connect(stream, &wanted).await.unwrap();
        assert!(server.stream.is_tls());
        assert_eq!((server.size, server.contexts.len()), (1 << 20, 1));
        assert_answers(ask(&mut server, Command::BLOCK_STATUS).await);
    }
}

#[tokio::test]
async fn the_client_gets_on_with_qemu_nbd() {
    if !installed("qemu-nbd") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(3 << 20).unwrap();
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    // The listening socket is handed over, so there is nothing to wait for.
    let script = "export LISTEN_PID=$$ LISTEN_FDS=1; exec qemu-nbd -t -f raw -x disk -D line -e 8 \"$0\" 3<&0 0</dev/null";
    let child =
        Program::new("sh").args(["-c", script]).arg(&image).stdin(OwnedFd::from(listener)).spawn().unwrap();
    let _child = Killed(child);
    let connect = || tokio::net::UnixStream::connect(&socket);
    for style in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
        let wanted = Wanted { export: "disk", style, contexts: &[ALLOCATION], ..Wanted::default() };
        let mut server = client::connect(connect().await.unwrap(), &wanted).await.unwrap();
        assert_eq!(server.size, 3 << 20);
        assert!(server.blocks.is_some());
        if server.style != style {
            eprintln!("SKIPPED: this qemu-nbd knows no extended headers");
        }
        assert_eq!(server.contexts.len(), usize::from(style != ReplyStyle::Simple));
        assert_answers(ask(&mut server, Command::READ).await);
        if style != ReplyStyle::Simple {
            let mut server = client::connect(connect().await.unwrap(), &wanted).await.unwrap();
            assert_answers(ask(&mut server, Command::BLOCK_STATUS).await);
        }
    }
    let wanted = Wanted { export: "nothing", ..Wanted::default() };
    let error = client::connect(connect().await.unwrap(), &wanted).await.unwrap_err();
    assert!(error.to_string().contains("NBD_REP_ERR_UNKNOWN"), "{error}");
    let listed = client::list(connect().await.unwrap(), &ClientTls::Off).await.unwrap();
    assert_eq!((listed[0].name.as_str(), listed[0].description.as_str()), ("disk", "line"));
}

/// Serves handshakes on a loopback port while `program` runs with its number, and gives its output.
/// After the handshake the only request that is understood is NBD_CMD_DISC, as all others end it too.
async fn serve_while(policy: TlsPolicy, program: impl FnOnce(u16) -> Program) -> Output {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut program = program(listener.local_addr().unwrap().port());
    let child = program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    #[allow(clippy::disallowed_methods, reason = "a test waits for another process, which no ring can do")]
    let waiting = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    let mut waiting = std::pin::pin!(waiting);
    let shelf = Shelf::default();
    loop {
        let stream = tokio::select! {
            output = &mut waiting => return output.unwrap(),
            accepted = listener.accept() => accepted.unwrap().0,
        };
        let negotiated = server::negotiate(stream, &shelf, &policy).await;
        if let Ok(Some(mut negotiated)) = negotiated {
            let mut bytes = [0; 28];
            if negotiated.stream.read_exact(&mut bytes).await.is_ok() {
                assert_eq!(decode_request(&bytes).unwrap().command, Command::DISC);
            }
            let _ = negotiated.stream.shutdown().await;
        }
    }
}

fn nbdinfo(arguments: &[&str], uri: String) -> Program {
    let mut program = Program::new("nbdinfo");
    program.args(["--json", "--no-content"]).args(arguments).arg(uri);
    program
}

#[track_caller]
fn parse(output: &Output) -> serde_json::Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[track_caller]
fn assert_is_disk(export: &serde_json::Value) {
    assert_eq!(export["export-name"], "disk");
    assert_eq!(export["description"], "the disk");
    assert_eq!(export["export-size"], 1 << 20);
    assert_eq!(export["contexts"], serde_json::json!([ALLOCATION, "x-mason:dirty"]));
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["can_df"], true);
}

#[tokio::test]
async fn nbdinfo_gets_on_with_the_server() {
    if !installed("nbdinfo") {
        return;
    }
    let output =
        serve_while(TlsPolicy::Off, |port| nbdinfo(&[], format!("nbd://127.0.0.1:{port}/disk"))).await;
    let report = parse(&output);
    assert_eq!(report["structured"], true);
    assert_is_disk(&report["exports"][0]);
    let output =
        serve_while(TlsPolicy::Off, |port| nbdinfo(&["--list"], format!("nbd://127.0.0.1:{port}"))).await;
    let report = parse(&output);
    assert_eq!(report["exports"][0]["export-name"], "");
    assert_is_disk(&report["exports"][1]);
    let output =
        serve_while(TlsPolicy::Off, |port| nbdinfo(&[], format!("nbd://127.0.0.1:{port}/nothing"))).await;
    assert!(!output.status.success());
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn nbdinfo_gets_on_with_the_server_under_tls() {
    use super::tls::{ClientCertificates, server_config};
    if !installed("nbdinfo") {
        return;
    }
    let folder = super::tls_tests::certificates();
    let policy = TlsPolicy::Required(server_config(folder.path(), ClientCertificates::Required).unwrap());
    let certificates = folder.path().display().to_string();
    let uri = |port| format!("nbds://localhost:{port}/disk?tls-certificates={certificates}");
    let report = parse(&serve_while(policy.clone(), |port| nbdinfo(&[], uri(port))).await);
    assert_eq!(report["TLS"], true);
    assert_is_disk(&report["exports"][0]);
    let output = serve_while(policy, |port| nbdinfo(&[], format!("nbd://127.0.0.1:{port}/disk"))).await;
    assert!(!output.status.success());
}
