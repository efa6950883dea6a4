//! The conformance suite, which has a codec of its own, against this server: no deviation is known, and
//! none is allowed.
#![allow(clippy::unwrap_used)]

use blockmason_tests::{Server, client_output, program};

/// Runs the suite and returns the names of the tests that it skipped.
fn conforms(uri: &str, more: &[&str]) -> Vec<String> {
    let suite = program("nbd-conformance");
    let args: Vec<&str> = more.iter().copied().chain([uri]).collect();
    let output = client_output(suite.to_str().unwrap(), &args);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let skipped = text.lines().filter_map(|line| line.strip_prefix("skip "));
    skipped.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn the_papers_graph_conforms() {
    let server = Server::new(2);
    let graph = "
        element Guest (type nbd) (listen unix:guest.sock)
        element MyDebug (type debug.log) (logfile request.log)
        element LocalDisk (type file) (path disk.img) (size 8G)
        Guest -> MyDebug
        (MyDebug, out) -> (LocalDisk, in)
    ";
    let (_disk, uris) = server.serve(graph).unwrap();
    let skipped = conforms(&uris[0], &["--write"]);
    // What needs TLS, a read-only export, a second export or a lesser server.
    let expected = [
        "tls.",
        "read-only.",
        "meta.set-other-export",
        "limits.",
        "refuse.fua-unoffered",
        "zeroes.fast-unoffered",
        "extended.long-read",
        "handshake.unoffered-client-flag",
    ];
    let odd: Vec<_> = skipped.iter().filter(|name| !expected.iter().any(|e| name.starts_with(e))).collect();
    assert!(odd.is_empty(), "skipped without a known reason: {odd:?}");
}

#[test]
fn two_exports_on_one_listener_conform_one_of_them_read_only() {
    let server = Server::new(2);
    let graph = "
        element One (type nbd) (listen unix:guest.sock) (name one)
        element Two (type nbd) (listen unix:guest.sock) (name two) (description \"sealed\")
        element Sealed (type readonly)
        element Disk (type mem) (size 6G)
        One -> Disk
        Two -> Sealed -> Disk
    ";
    let (_disk, uris) = server.serve(graph).unwrap();
    for (uri, wanted) in [(&uris[0], "meta.set-other-export"), (&uris[1], "read-only.write")] {
        let skipped = conforms(uri, &["--write"]);
        assert!(!skipped.iter().any(|name| name == wanted), "{wanted} was to run: {skipped:?}");
    }
}

#[test]
fn tls_conforms_offered_and_required() {
    for tls in ["offered", "required"] {
        let server = Server::new(1);
        blockmason_tests::certificates(server.folder.path());
        let graph = format!(
            "element Guest (type nbd) (listen unix:guest.sock) (tls {tls}) (tls_certificates .)
             element Disk (type mem) (size 6G)
             Guest -> Disk"
        );
        let (_disk, uris) = server.serve(&graph).unwrap();
        let ca = server.path("ca-cert.pem");
        let more = ["--write", "--ca", ca.to_str().unwrap(), "--tls-host", "localhost"];
        let skipped = conforms(&uris[0], &more);
        assert!(!skipped.iter().any(|name| name == "tls.handshake"), "{skipped:?}");
    }
}
