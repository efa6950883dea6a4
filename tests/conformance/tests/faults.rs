//! The suite against a server that breaks one rule: the right test fails, and nothing hangs or crashes.
#![allow(clippy::disallowed_methods, reason = "no shards here: a program of its own, in real time")]

mod mini;

use mini::Fault;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn run(fault: Fault, args: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("a directory");
    let socket = dir.path().join("s");
    mini::serve(&socket, fault);
    let mut suite = Command::new(env!("CARGO_BIN_EXE_nbd-conformance"));
    suite
        .arg(format!("nbd+unix:///?socket={}", socket.display()))
        .args(["--write", "--timeout", "2"])
        .args(args);
    suite.output().expect("the suite runs")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_server_without_fault_passes() {
    let output = run(Fault::Nothing, &[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let shown = text(&output);
    assert!(!shown.lines().any(|line| line.starts_with("warn")), "{shown}");
}

#[test]
fn each_fault_fails_the_test_meant_for_it() {
    let faults = [
        (Fault::UnknownHandshakeFlag, "handshake.known-flags-only"),
        (Fault::AcceptsUnknownClientFlags, "handshake.unknown-client-flag"),
        (Fault::ForgetsZeroes, "export-name.zeroes"),
        (Fault::NoFlagBit, "flags.has-flags"),
        (Fault::AcksUnknownOptions, "option.unknown"),
        (Fault::LeavesOptionData, "option.unknown-with-data"),
        (Fault::SilentAbort, "option.abort"),
        (Fault::PadsGo, "go.no-padding"),
        (Fault::GoDiffers, "go.same-as-info"),
        (Fault::LateExportItem, "info.export-item"),
        (Fault::BadBlockSizes, "info.block-sizes"),
        (Fault::AcceptsBrokenMeta, "meta.list-malformed"),
        (Fault::SelectsUnknownLeaf, "meta.set-unknown-leaf"),
        (Fault::SimpleAfterNegotiation, "read.structured"),
        (Fault::WrongCookie, "read.cookies"),
        (Fault::WrongData, "write.read-back"),
        (Fault::GapInChunks, "read.whole-chunks"),
        (Fault::OverlappingChunks, "read.whole-chunks"),
        (Fault::ChunkOutside, "read.structured"),
        (Fault::SplitsDf, "read.df"),
        (Fault::PayloadAfterError, "read.error-simple"),
        (Fault::LeavesWritePayload, "refuse.write-flags"),
        (Fault::StatusTooLong, "status.req-one"),
        (Fault::StatusEmpty, "status.walk"),
        (Fault::DataToldAsZero, "status.written-is-data"),
        (Fault::TwoContexts, "status.one-chunk-each"),
        (Fault::IgnoresDisc, "disc.closes"),
        (Fault::SimpleAfterExtended, "extended.write"),
        (Fault::WrongExtendedOffset, "extended.read"),
        (Fault::CompactStatus, "extended.status"),
        (Fault::WrongDescriptorCount, "extended.status"),
        (Fault::HighStatusBits, "status.reserved-flags"),
        (Fault::LeavesExtendedPayload, "extended.payload-on-read"),
        (Fault::ExtendedUnsupportedGo, "extended.go-not-unsup"),
        (Fault::StatusPayloadFlag, "flags.payload-needs-extended"),
    ];
    for (fault, name) in faults {
        let output = run(fault, &["--only", name]);
        let shown = text(&output);
        let failed = shown.lines().any(|line| line.starts_with(&format!("FAIL {name} ")));
        assert!(failed && output.status.code() == Some(1), "{fault:?} should fail {name}:\n{shown}");
    }
}

#[test]
fn hostile_servers_neither_hang_nor_crash_the_suite() {
    let hostile = [
        (Fault::WrongOptionEcho, "option.unknown", 2),
        (Fault::HugeOptionReply, "option.list", 2),
        (Fault::EndlessOptionReplies, "option.list", 2),
        (Fault::EndlessChunks, "read.structured", 1),
        (Fault::HugeChunk, "read.structured", 1),
        (Fault::EndlessSilence, "read.simple", 1),
    ];
    for (fault, name, code) in hostile {
        let begun = Instant::now();
        let output = run(fault, &["--only", name, "--test-timeout", "3"]);
        let shown = text(&output);
        assert_eq!(output.status.code(), Some(code), "{fault:?}\n{shown}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{fault:?} took {:?}", begun.elapsed());
    }
}

#[test]
fn expectations_turn_known_faults_into_success_and_notice_when_they_vanish() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("expect");
    std::fs::write(&file, "option.abort # it leaves without a word\n").expect("a file");
    let file = file.to_str().expect("a path");
    let only = ["--only", "option.abort", "--expect", file];
    let known =
        run(Fault::SilentAbort, &["--only", "option.list", "--only", "option.abort", "--expect", file]);
    assert_eq!(known.status.code(), Some(1), "two more tests of ABORT fail:\n{}", text(&known));
    let vanished = run(Fault::Nothing, &only);
    assert_eq!(vanished.status.code(), Some(1), "{}", text(&vanished));
    assert!(text(&vanished).contains("vanished: option.abort"), "{}", text(&vanished));
}

#[test]
fn json_is_one_document_with_every_test() {
    let output = run(Fault::Nothing, &["--json", "--only", "read."]);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let tests = document["tests"].as_array().expect("tests");
    assert!(tests.len() > 10);
    assert!(tests.iter().any(|test| test["name"] == "read.simple" && test["verdict"] == "pass"));
}

#[test]
fn what_cannot_run_exits_with_2() {
    for args in
        [&["nbd+unix:///?socket=/nonexistent/socket"][..], &["http://x/"], &["nbds://localhost/"], &[]]
    {
        let output =
            Command::new(env!("CARGO_BIN_EXE_nbd-conformance")).args(args).output().expect("the suite runs");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
    let unknown = run(Fault::Nothing, &["--only", "no-such-test"]);
    assert_eq!(unknown.status.code(), Some(2));
}
