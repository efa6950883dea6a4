//! Each fault does what it says, and the server shows what came to it.

use crate::client::{BUCKET, Client, put, status};
use aws_sdk_s3::types::BucketVersioningStatus;
use mason_bucket::{Action, Entry, Hold, Operation, Rule, Settings, until};
use std::time::{Duration, Instant};

#[test]
fn errors_before_leave_nothing_and_errors_after_leave_it_done() {
    let (server, client) = Client::of_server();
    let refusals = [
        (Action::SLOW_DOWN, 503),
        (Action::CONFLICT, 409),
        (Action::DENIED, 403),
        (Action::CLOCK_SKEW, 403),
        (Action::ErrorBefore(500, "InternalError"), 500),
    ];
    for (action, status) in refusals {
        server.fault(Rule::once(action).on(Operation::Put));
        assert_eq!(client.put("before", b"x"), Err(Some(status)));
        assert_eq!(client.get("before"), Err(Some(404)));
    }
    server.fault(Rule::once(Action::ErrorAfter(500, "InternalError")).on(Operation::Put));
    assert_eq!(client.put("after", b"x"), Err(Some(500)));
    assert_eq!(client.get("after").unwrap(), b"x");
    server.fault(Rule::once(Action::MISSING).on(Operation::Get));
    assert_eq!(client.get("after"), Err(Some(404)));
    assert_eq!(client.get("after").unwrap(), b"x");
}

#[test]
fn the_code_of_an_error_arrives() {
    use aws_sdk_s3::error::ProvideErrorMetadata;
    let (server, client) = Client::of_server();
    server.fault(Rule::once(Action::CLOCK_SKEW));
    let error = client.wait(client.s3.get_object().bucket(BUCKET).key("x").send()).unwrap_err();
    assert_eq!(error.code(), Some("RequestTimeTooSkewed"));
    server.fault(Rule::once(Action::MISSING));
    let error = client.wait(client.s3.head_object().bucket(BUCKET).key("x").send()).unwrap_err();
    assert_eq!(status(&error), Some(404));
}

#[test]
fn a_closed_connection_is_no_answer() {
    let (server, client) = Client::of_server();
    server.fault(Rule::once(Action::CloseBefore).on(Operation::Put));
    assert_eq!(client.put("key", b"x"), Err(None));
    assert_eq!(server.store().keys(BUCKET), [""; 0]);
    server.fault(Rule::once(Action::CloseAfter).on(Operation::Put));
    assert_eq!(client.put_if_absent("key", b"x"), Err(None));
    // Who then asks again finds what was put by himself.
    assert_eq!(client.put_if_absent("key", b"x"), Err(Some(412)));
    assert_eq!(client.get("key").unwrap(), b"x");
}

#[test]
fn a_held_put_lands_after_its_client_has_gone() {
    let (server, client) = Client::of_server();
    let hold = Hold::default();
    server.fault(Rule::once(Action::Hold(hold.clone())).on(Operation::Put).prefix("late/"));
    let late = client.spawn(put(client.s3.clone(), "late/1".to_owned(), b"old".to_vec(), false));
    hold.wait(1);
    late.abort();
    assert!(client.wait(late).unwrap_err().is_cancelled());
    assert_eq!(client.put("late/1", b"new"), Ok("\"22af645d1859cb5ca6da0c484f1f37ea\"".to_owned()));
    hold.release();
    until("the late PUT", || server.store().get(BUCKET, "late/1").unwrap().bytes == "old");
}

#[test]
fn a_held_delete_lands_after_the_server_was_down() {
    let (mut server, client) = Client::of_server();
    client.put("key", b"old").unwrap();
    let hold = Hold::default();
    server.fault(Rule::once(Action::Hold(hold.clone())).on(Operation::Delete));
    let s3 = client.s3.clone();
    let late = client.spawn(async move { s3.delete_object().bucket(BUCKET).key("key").send().await });
    hold.wait(1);
    server.stop();
    assert_eq!(status(&client.wait(late).unwrap().unwrap_err()), None);
    assert_eq!(client.get("key"), Err(None));
    server.start();
    assert_eq!(client.get("key").unwrap(), b"old");
    hold.release();
    until("the late DELETE", || server.store().get(BUCKET, "key").is_none());
}

#[test]
fn a_body_that_breaks_off_does_nothing() {
    use std::io::{Read, Write};
    let (server, client) = Client::of_server();
    client.put("key", b"whole").unwrap();
    let mut socket = std::net::TcpStream::connect(server.endpoint().trim_start_matches("http://")).unwrap();
    write!(socket, "PUT /{BUCKET}/key HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf of it").unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    // The server has seen the end of it when it closes the connection.
    assert_eq!(socket.read_to_end(&mut Vec::new()).unwrap(), 0);
    assert_eq!(client.get("key").unwrap(), b"whole");
    assert_eq!(server.count(Operation::Put), 1);
}

#[test]
fn answers_are_cut_and_spoilt() {
    let (server, client) = Client::of_server();
    let bytes = vec![0; 200_000];
    client.put("key", &bytes).unwrap();
    server.fault(Rule::once(Action::TruncateBody(100_000)).on(Operation::Get));
    let answer = client.s3.get_object().bucket(BUCKET).key("key");
    let answer = client.wait(answer.send()).unwrap();
    assert_eq!(answer.content_length(), Some(200_000));
    let mut body = answer.body;
    let mut arrived = 0;
    let broken = client.wait(async {
        loop {
            match body.next().await {
                Some(Ok(piece)) => arrived += piece.len(),
                Some(Err(_)) => break true,
                None => break false,
            }
        }
    });
    assert_eq!((arrived, broken), (100_000, true));
    server.fault(Rule::once(Action::FlipBit(17)).on(Operation::Get));
    let mut spoilt = bytes.clone();
    spoilt[2] = 2;
    assert_eq!(client.get("key").unwrap(), spoilt);
    assert_eq!(client.get("key").unwrap(), bytes);
}

#[test]
fn conditions_can_be_ignored() {
    let (server, client) = Client::of_server();
    server.fault(Rule::always(Action::IgnoreConditions));
    client.put_if_absent("key", b"first").unwrap();
    client.put_if_absent("key", b"second").unwrap();
    assert_eq!(client.get("key").unwrap(), b"second");
    server.clear_faults();
    assert_eq!(client.put_if_absent("key", b"third"), Err(Some(412)));
}

#[test]
fn rules_choose_by_operation_key_and_count() {
    let (server, client) = Client::of_server();
    let rule = Rule::always(Action::SLOW_DOWN).on(Operation::Put).key(|key| key.ends_with("/x"));
    server.fault(rule.skip(1).times(2));
    let outcomes = ["a/x", "a/y", "b/x", "b/y", "c/x", "d/x"].map(|key| client.put(key, b"").is_ok());
    assert_eq!(outcomes, [true, true, false, true, false, true]);
    assert!(client.get("a/x").is_ok());
    // Two rules at once: it waits, then nothing is answered.
    let time = Duration::from_millis(50);
    server.fault(Rule::once(Action::Delay(time)));
    server.fault(Rule::once(Action::CloseAfter));
    let begun = now();
    assert_eq!(client.put("e", b""), Err(None));
    assert!(begun.elapsed() >= time);
}

#[test]
fn the_log_and_latency_show_what_was_sent() {
    let (server, client) = Client::of_server();
    let latency = Duration::from_millis(30);
    server.set_latency(latency);
    let begun = now();
    client.put("a b/key", b"going in").unwrap();
    assert!(begun.elapsed() >= latency);
    server.set_latency(Duration::ZERO);
    server.store().put(BUCKET, "a b/key", "coming out");
    client.get("a b/key").unwrap();
    server.fault(Rule::once(Action::CloseBefore));
    client.delete("a b/key").unwrap_err();
    let entry = |operation, received, sent, status| {
        let key = "a b/key".to_owned();
        Entry { operation, key, received, sent, status }
    };
    let expected = [
        entry(Operation::Put, 8, 0, Some(200)),
        entry(Operation::Get, 0, 10, Some(200)),
        entry(Operation::Delete, 0, 0, None),
    ];
    assert_eq!(server.log(), expected);
    assert_eq!(server.count(Operation::Put), 1);
    client.wait(client.s3.list_objects_v2().bucket(BUCKET).prefix("a b").send()).unwrap();
    let last = server.log().pop().unwrap();
    assert_eq!((last.operation, last.key.as_str()), (Operation::List, "a b"));
    server.clear_log();
    assert!(server.log().is_empty());
}

#[test]
fn every_byte_that_comes_and_goes_is_kept_once_that_is_wanted() {
    let (server, client) = Client::of_server();
    client.put("before", b"unseen").unwrap();
    assert!(server.capture().is_empty());
    // Connections that are there already are not looked at.
    let client = Client::new(&server.endpoint(), server.access(), server.secret());
    client.put("key", b"going in").unwrap();
    server.store().put(BUCKET, "key", "coming out");
    client.get("key").unwrap();
    let captured = server.capture();
    let holds = |way: usize, text: &str| {
        captured.iter().any(|both| both[way].windows(text.len()).any(|some| some == text.as_bytes()))
    };
    assert!(holds(0, "going in") && holds(0, "authorization: AWS4") && !holds(0, "unseen"));
    assert!(holds(1, "coming out") && holds(1, "HTTP/1.1 200") && !holds(1, "going in"));
    assert!(server.capture().is_empty());
}

#[test]
fn tests_reach_into_the_store() {
    let (server, client) = Client::of_server();
    client.put("key", b"good").unwrap();
    server.store().corrupt(BUCKET, "key", |bytes| bytes.truncate(2));
    assert_eq!(client.get("key").unwrap(), b"go");
    assert!(server.store().delete(BUCKET, "key"));
    assert!(!server.store().delete(BUCKET, "key"));
    assert_eq!(client.get("key"), Err(Some(404)));
}

#[test]
fn buckets_say_what_tests_set() {
    let (server, client) = Client::of_server();
    let public = || {
        let answer = client.wait(client.s3.get_public_access_block().bucket(BUCKET).send()).unwrap();
        !answer.public_access_block_configuration().unwrap().block_public_policy().unwrap()
    };
    assert!(!public());
    let settings = Settings {
        versioning: Some("Enabled"),
        expire_after_days: Some(30),
        object_lock: true,
        public: true,
    };
    server.store().set(settings);
    assert!(public());
    let versioning = client.wait(client.s3.get_bucket_versioning().bucket(BUCKET).send()).unwrap();
    assert_eq!(versioning.status(), Some(&BucketVersioningStatus::Enabled));
    let lifecycle = client.s3.get_bucket_lifecycle_configuration().bucket(BUCKET).send();
    let lifecycle = client.wait(lifecycle).unwrap();
    assert_eq!(lifecycle.rules()[0].expiration().unwrap().days(), Some(30));
    client.wait(client.s3.get_object_lock_configuration().bucket(BUCKET).send()).unwrap();
}

#[allow(clippy::disallowed_methods, reason = "the server runs in real time")]
fn now() -> Instant {
    Instant::now()
}
