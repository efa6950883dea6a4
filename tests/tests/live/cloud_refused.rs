//! What keeps a disk in a bucket from being served is one line that says what to do about it, of the daemon as of the
//! command that looks at the disk.

use crate::cloud::Cloud;
use blockmason_tests::control::Ended;
use blockmason_tests::mason::until;
use blockmason_tests::raw::Raw;
use mason_bucket::{Action, Operation, Rule};

/// Something that is wrong.
struct Case {
    what: &'static str,
    /// Makes it so.
    make: fn(&mut Cloud),
    /// What is said of it.
    says: &'static str,
}

const CASES: &[Case] = &[
    Case {
        what: "a wrong secret",
        make: |cloud| cloud.keys(cloud.server.access(), "not-the-secret"),
        says: "SignatureDoesNotMatch",
    },
    Case {
        what: "a key that nobody knows",
        make: |cloud| cloud.keys("nobody", "not-the-secret"),
        // As this server calls it.
        says: "NotSignedUp",
    },
    Case {
        what: "half a key",
        make: |cloud| drop(cloud.site.write(".aws/credentials", "[default]\naws_access_key_id = me\n")),
        says: "its profile \"default\" has no aws_secret_access_key",
    },
    Case {
        what: "no key at all",
        make: |cloud| std::fs::remove_file(cloud.site.path(".aws/credentials")).unwrap(),
        says: "there are no credentials in the environment or in ~/.aws/credentials, and the machine has no role: ",
    },
    Case {
        what: "a bucket that is not there",
        make: |cloud| cloud.server.fault(Rule::always(Action::ErrorBefore(404, "NoSuchBucket"))),
        says: "there is no such bucket",
    },
    Case {
        what: "a disk that is not there",
        make: |cloud| assert!(cloud.server.store().delete("vms", "vm1/volume")),
        says: "there is no volume",
    },
    Case {
        what: "a clock that is wrong",
        make: |cloud| cloud.server.fault(Rule::always(Action::CLOCK_SKEW)),
        says: "this machine's clock and the server's differ too much",
    },
    Case {
        what: "another region",
        make: |cloud| cloud.server.fault(Rule::always(Action::ErrorBefore(301, "PermanentRedirect"))),
        says: "the bucket is in another region",
    },
    Case {
        what: "no right to read",
        make: |cloud| deny(cloud, Operation::Get),
        says: "the store does not give it: the server says AccessDenied",
    },
    Case {
        what: "no right to list",
        make: |cloud| deny(cloud, Operation::List),
        says: "the store does not list it: the server says AccessDenied",
    },
    Case {
        what: "a newer format",
        make: |cloud| spoil(cloud, |text| text.replace("\"version\": 1", "\"version\": 2")),
        says: "the volume is of format 2",
    },
    Case {
        what: "a feature that nobody knows",
        make: |cloud| spoil(cloud, |text| text.replace("[]", "[\"striped\"]")),
        says: "a newer program has made it",
    },
    Case {
        what: "something else of that name",
        make: |cloud| spoil(cloud, |_| "hello".to_owned()),
        says: "no volume of Block Mason",
    },
];

/// What only whoever opens it finds.
const OPENING: &[Case] = &[
    Case {
        what: "no right to write",
        make: |cloud| deny(cloud, Operation::Put),
        says: "the store does not take it: the server says AccessDenied",
    },
    Case {
        what: "another host that has it open",
        make: |cloud| {
            let claim = r#"{"epoch":1,"host":"elsewhere","machine":"another","process":7,"time":1764475200}"#;
            cloud.server.store().put("vms", &format!("vm1/claim/{:016x}", u64::MAX - 1), claim);
        },
        says: "has had it open since 2025-11-30 04:00:00 UTC (process 7): if that host is dead, say so with `mason bucket take`",
    },
];

fn deny(cloud: &Cloud, operation: Operation) {
    cloud.server.fault(Rule::always(Action::DENIED).on(operation));
}

fn spoil(cloud: &Cloud, change: impl Fn(String) -> String) {
    let object = cloud.server.store().get("vms", "vm1/volume").unwrap();
    let text = change(String::from_utf8(object.bytes.to_vec()).unwrap());
    cloud.server.store().put("vms", "vm1/volume", text);
}

/// Takes as long as commands are patient with a store: `tests/long` has that time.
#[test]
#[ignore = "a minute, asked for by tests/long"]
fn a_store_that_is_not_there_is_one_line() {
    let case = Case {
        what: "a store that is not there",
        make: |cloud| cloud.server.stop(),
        says: "Connection refused",
    };
    let cloud = made(&case);
    let ended = cloud.bucket("stat", &[]);
    // Whoever waits for half a minute is told why.
    let (first, rest) = ended.err.split_once('\n').unwrap();
    assert!(first.contains(&cloud.server.endpoint()) && first.contains("it is tried again"), "{ended:?}");
    refused(&case, "stat", &Ended { err: rest.to_owned(), ..ended });
    refused(&case, "run", &run(&cloud));
}

#[test]
fn a_key_that_opens_nothing_is_seen_in_the_status() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with("(size 32M)");
    let daemon = cloud.run();
    Raw::ready(daemon.socket()).write(0, &[1; 4096]);
    cloud.drain();
    daemon.stop_well();
    cloud.site.write("vm1.key", [8; 32]);
    let daemon = cloud.run();
    until("it is said", || cloud.site.mason(&["status"]).done().contains("Secret does not work: "));
    cloud.site.write("vm1.key", [7; 32]);
    daemon.kill();
    let daemon = cloud.run();
    assert_eq!(Raw::ready(daemon.socket()).read(0, 4096), [1; 4096]);
    assert!(!cloud.site.mason(&["status"]).done().contains("does not work"));
    daemon.stop_well();
}

/// A disk of which this is true.
fn made(case: &Case) -> Cloud {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with("(size 32M)");
    (case.make)(&mut cloud);
    cloud
}

fn run(cloud: &Cloud) -> Ended {
    cloud.mason(&["run", "cloud.mason", "--control", "c.sock"])
}

/// It has ended with 1 and said so in one line, without what nobody may see.
#[track_caller]
fn refused(case: &Case, who: &str, ended: &Ended) {
    let told = format!("{}, {who}: {:?}", case.what, ended);
    println!("{}, {who}: {}", case.what, ended.err.trim_end());
    assert_eq!((ended.code, ended.out.as_str()), (Some(1), ""), "{told}");
    let lines: Vec<&str> = ended.err.lines().collect();
    assert!(lines.len() == 1 && lines[0].starts_with("mason: ") && lines[0].len() < 400, "{told}");
    assert!(lines[0].contains(case.says) && !lines[0].contains("not-the-secret"), "{told}");
}

#[test]
fn what_is_wrong_is_one_line() {
    for case in CASES {
        let cloud = made(case);
        refused(case, "run", &run(&cloud));
        refused(case, "stat", &cloud.bucket("stat", &[]));
        refused(case, "check", &cloud.bucket("check", &[]));
    }
}

#[test]
fn what_is_wrong_when_it_is_opened_is_one_line() {
    for case in OPENING {
        refused(case, "run", &run(&made(case)));
    }
}
