use super::*;
use blockmason::Host;
use blockmason::sched::HostConfig;
use blockmason::testing::{TestDisk, graph, live, play_against_model, run};

static WITH_CLIENT: &[&ElementType] = &[
    &blockmason::testing::CLIENT,
    &TYPE,
    &crate::sink::mem::TYPE,
    &crate::fault::delay::TYPE,
    &crate::fault::error::TYPE,
];

async fn serve(host: &Arc<Host>, notify: &str, below: &str) -> (TestDisk, Arc<dyn Element>) {
    let text = format!("element N (type notify) {notify} {below} element M (type mem) (size 1M)");
    let chain = if below.is_empty() { "N -> M" } else { "N -> B -> M" };
    let graph = graph(host, WITH_CLIENT, &format!("{text} {chain}"), "N").unwrap();
    let element = graph.instances().find(|instance| instance.name == "N").unwrap().element.clone();
    (TestDisk::serve(host, graph).await, element)
}

/// A script in the folder, as the parameter that runs it. A shell reads it: a file that was just written
/// may not be run while another test starts a process.
fn script(folder: &std::path::Path, text: &str, argument: &str) -> String {
    let path = folder.join("script");
    std::fs::write(&path, text).unwrap();
    format!("(exec /bin/sh {} {argument})", path.display())
}

fn notice(message: &str) -> Event {
    Event::new(EventKind::Notice, "test", message)
}

fn fields(events: &mut Follower) -> Vec<String> {
    let all = events.take(100).events;
    let thresholds = all.iter().filter(|event| event.kind == EventKind::Threshold);
    thresholds.map(|event| format!("{} {}", event.fields["quantity"], event.fields["state"])).collect()
}

/// Real time: the test's own thread waits for what another one does.
fn wait_for(what: &str, done: impl Fn() -> bool) {
    // The clock of the runtime may stand still.
    let since = rt::wall_clock();
    while !done() {
        let waited = rt::wall_clock().duration_since(since).unwrap_or_default();
        assert!(waited < Duration::from_secs(30), "{what} does not happen");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

#[test]
fn is_the_disk_below_it() {
    run(1, async |host| {
        let (disk, _) = serve(&host, "(latency 50ms) (errors 5)", "").await;
        play_against_model(&disk, 1, 200).await;
    });
}

#[test]
fn errors_are_told_once_above_and_once_below() {
    run(1, async |host| {
        let (disk, _) = serve(&host, "(errors 2)", "element B (type error) (op read)").await;
        let mut events = host.events().follow(0);
        let fail = async |count| {
            for _ in 0..count {
                disk.read(0, 1).await.unwrap_err();
            }
            rt::sleep(Duration::from_secs(10)).await;
        };
        rt::sleep(Duration::from_secs(1)).await;
        fail(2).await;
        assert!(fields(&mut events).is_empty(), "as many as are allowed");
        fail(3).await;
        fail(5).await;
        assert_eq!(fields(&mut events), ["errors above"]);
        fail(0).await;
        fail(1).await;
        assert_eq!(fields(&mut events), ["errors below"]);
        // What a client should not ask for is no error of the disk.
        for _ in 0..5 {
            disk.op(blockmason::Op::Control, 0, 0).await.unwrap_err();
        }
        fail(0).await;
        assert!(fields(&mut events).is_empty());
    });
}

#[test]
fn latency_is_told_once_above_and_once_below() {
    run(1, async |host| {
        let (disk, _) = serve(&host, "(latency 50ms)", "element B (type delay) (write 100ms)").await;
        let mut events = host.events().follow(0);
        for _ in 0..200 {
            disk.read(0, 1).await.unwrap();
        }
        disk.write(0, &[1]).await.unwrap();
        rt::sleep(Duration::from_secs(11)).await;
        assert!(fields(&mut events).is_empty(), "one of 200 may be slow");
        for _ in 0..2 {
            disk.write(0, &[1]).await.unwrap();
            rt::sleep(Duration::from_secs(10)).await;
        }
        assert_eq!(fields(&mut events), ["latency above"]);
        rt::sleep(Duration::from_secs(10)).await;
        assert_eq!(fields(&mut events), ["latency below"]);
    });
}

#[test]
fn a_disk_that_answers_nothing_is_above() {
    run(1, async |host| {
        let (disk, _) = serve(&host, "(latency 50ms)", "element B (type delay) (read 35s)").await;
        let mut events = host.events().follow(0);
        rt::sleep(Duration::from_secs(1)).await;
        let reply = disk.send(Request::read(0, 1));
        rt::sleep(Duration::from_secs(21)).await;
        assert_eq!(fields(&mut events), ["latency above"]);
        reply.await.unwrap().unwrap();
        rt::sleep(Duration::from_secs(25)).await;
        assert_eq!(fields(&mut events), ["latency below"]);
    });
}

#[test]
fn what_is_over_the_rate_or_not_asked_for_is_not_told() {
    run(1, async |host| {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let exec = script(folder.path(), "cat >>\"$1\"", &out.display().to_string());
        let notify = format!("(on notice) {exec} (rate 2) (per 1m)");
        let (_disk, element) = serve(&host, &notify, "").await;
        for number in 0..5 {
            host.events().publish(notice(&format!("number {number}")));
        }
        host.events().publish(Event::new(EventKind::Notice, "other", "of another graph"));
        host.events().publish(Event::new(EventKind::Error, "test", "not asked for"));
        rt::sleep(Duration::from_secs(60)).await;
        assert_eq!(element.get("suppressed").unwrap(), "3");
        host.events().publish(notice("the next"));
        rt::sleep(Duration::from_secs(1)).await;
        wait_for("the third", || element.get("sent").unwrap() == "3");
        let text = std::fs::read_to_string(out).unwrap();
        let mut told: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        told.sort_by_key(|event| event["number"].as_u64());
        let told: Vec<_> = told.iter().map(|event| (&event["message"], &event["suppressed"])).collect();
        let expected = [("number 0", 0), ("number 1", 0), ("the next", 3)]
            .map(|(message, suppressed)| (message.into(), suppressed.into()));
        assert!(told.iter().zip(&expected).all(|(told, (a, b))| *told == (a, b)), "{text}");
        assert_eq!(told.len(), 3);
    });
}

#[test]
fn a_flood_neither_grows_nor_delays_anything() {
    run(1, async |host| {
        let (disk, element) = serve(&host, "(exec sleep 60) (rate 1000) (per 1s)", "").await;
        let since = rt::now();
        for number in 0..10_000 {
            // An element for each, or the bus itself would hold them back.
            host.events().publish(notice("flood").of(&format!("E{number}")));
            if number % 100 == 0 {
                disk.read(0, 512).await.unwrap();
            }
        }
        disk.read(0, 512).await.unwrap();
        assert_eq!(rt::now(), since, "no request has waited");
        rt::sleep(Duration::from_millis(1)).await;
        let left_out: u64 = element.get("suppressed").unwrap().parse().unwrap();
        // Of the others some wait in the queue, some are told; none has ended.
        assert!((10_000 - QUEUE as u64 - 5..=10_000).contains(&left_out), "{left_out}");
        assert_eq!((element.get("sent").unwrap(), element.get("failed").unwrap()), ("0".into(), "0".into()));
    });
}

#[test]
fn a_change_of_the_graph_loses_no_event() {
    run(1, async |host| {
        let text = |rate| {
            format!(
                "element Client (type client) element N (type notify) (on loaded reload reload_failed) (exec /bin/true) \
                 element E (type error) (probability {rate}) element M (type mem) (size 1M) Client -> N -> E -> M"
            )
        };
        let (live, _disk) = live(&host, WITH_CLIENT, &text("0%")).await.unwrap();
        let graph = live.disk().graph();
        let element = graph.instances().find(|instance| instance.name == "N").unwrap().element.clone();
        drop(graph);
        for rate in ["1%", "2%", "3%"] {
            let next = blockmason::testing::checked(WITH_CLIENT, &text(rate)).unwrap();
            live.reload(next, &blockmason::live::Options::default()).await.unwrap();
        }
        rt::sleep(Duration::from_secs(1)).await;
        wait_for("all four", || element.get("sent").unwrap() == "4");
        live.stop().await.unwrap();
    });
}

/// A host with shards and a clock of its own, as in production.
#[test]
fn a_test_is_told_and_failures_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let host = Host::start(HostConfig { shards: 2, ..HostConfig::new(folder.path()) }).unwrap();
    runtime.block_on(async {
        let exec = script(folder.path(), "echo $MASON_MESSAGE; test $MASON_MESSAGE = fine", "");
        let text = format!("element N (type notify) {exec} element M (type mem) (size 1M) N -> M");
        let graph = graph(&host, WITH_CLIENT, &text, "N").unwrap();
        let element = graph.instances().find(|instance| instance.name == "N").unwrap().element.clone();
        assert!(element.call("test", "").is_err(), "it is not open");
        let disk = blockmason::sched::Disk::serve(&host, graph).await.unwrap();
        element.call("test", "fine").unwrap();
        wait_for("a test", || element.get("sent").unwrap() == "1");
        assert_eq!(element.get("last").unwrap(), "notice 0: sent");
        element.call("test", "broken").unwrap();
        wait_for("a failure", || element.get("failed").unwrap() == "1");
        let last = element.get("last").unwrap();
        assert!(last.contains("exit status 1") && last.contains("\"broken\""), "{last}");
        assert!(element.get("colour").is_err() && element.call("tests", "").is_err());
        disk.stop().await.unwrap();
        assert!(element.call("test", "").is_err(), "it is closed");
    });
}

#[test]
fn what_makes_no_sense_is_refused() {
    let wrong = |params: &str| {
        let params = Written::parse("test", params, "/srv".as_ref()).unwrap();
        let errors = check(&params).err().unwrap_or_default();
        errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    };
    for (params, part) in [
        ("", "nothing to do"),
        ("(exec x) (on unloaded)", "mason events"),
        ("(exec x) (on everything)", "reload_failed"),
        ("(exec x) (rate 0)", "1 to 1000"),
        ("(exec x) (per 10ms)", "per: expected at least 1s"),
        ("(errors 5) (window 0s)", "window: expected"),
        (r#"(exec "")"#, "no name"),
        ("(webhook https://a/)", "https"),
    ] {
        assert!(wrong(params).contains(part), "{params}: {}", wrong(params));
    }
    assert_eq!(wrong("(on error failed) (exec /bin/x --y) (webhook unix:x.sock) (latency 50ms)"), "");
}
