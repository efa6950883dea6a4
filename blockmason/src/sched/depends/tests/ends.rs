//! How it ends: a panic, a drain, a graph that has failed, and wakes from other threads.

use super::*;

#[test]
fn a_panic_fails_what_depends_on_it() {
    at("element Top (type panic) element A (type sink) Top -> A", |bench| {
        let (mut first, mut second) = (bench.write(0, 512), bench.write(4096, 512));
        bench.cx().add_dependency(&mut second, &mut first, Until::Completed).unwrap();
        let mut second = bench.send(second);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(bench.send(first))));
        assert!(caught.is_err());
        assert_eq!(second.error().kind(), Kind::Unavailable);
        assert!(issued().is_empty());
    });
}

#[test]
fn nothing_is_left_when_all_is_done() {
    at(MIRROR, |bench| {
        let cx = bench.cx();
        let [mut a, mut b, mut c] = [0, 1, 2].map(|ix| bench.write(ix * 4096, 512));
        cx.add_dependency(&mut b, &mut a, Until::Durable).unwrap();
        cx.add_dependency(&mut c, &mut b, Until::Completed).unwrap();
        let watches = [&a, &b].map(|req| Arc::downgrade(&ties(req).unwrap().own.as_ref().unwrap().0));
        let [mut a, mut b, mut c] = [a, b, c].map(|req| bench.send(req));
        for sink in ["A", "B"] {
            done(sink, 0);
        }
        assert!(a.is_ok() && b.reply().is_none());
        drop(a);
        for sink in ["A", "B"] {
            answer(sink, Op::Flush, 0, Ok(Answer::Done));
        }
        assert!(b.reply().is_none());
        for sink in ["A", "B"] {
            done(sink, 4096);
        }
        assert!(b.is_ok() && c.reply().is_none());
        for sink in ["A", "B"] {
            done(sink, 8192);
        }
        assert!(c.is_ok());
        assert!(watches.iter().all(|watch| watch.strong_count() == 0));
    });
}

const PAIR: &str = "element Top (type pair) element H (type hop) element A (type sink) Top -> H -> A";

#[test]
fn a_drain_waits_for_what_is_held_and_lets_it_end() {
    run(1, async |host| {
        EVENTS.take();
        PARKED.take();
        let disk = TestDisk::new(&host, ALL, PAIR, "Top").await.unwrap();
        let mut reply = disk.send(Request::write(0, Data::zeros(512)));
        settle().await;
        assert_eq!(issued(), ["A write 0"], "the second one is held");
        let before = disk.disk.graph();
        let next = graph(&host, ALL, &PAIR.replace("Top", "Up"), "Up").unwrap();
        let change = tokio::task::spawn_local({
            let disk = disk.disk.clone();
            async move { disk.replace(next, &Default::default()).await.map(drop) }
        });
        settle().await;
        // The disk's own, before the gate closes.
        answer_flushes().await;
        assert!(!change.is_finished() && !before.is_drained());
        done("A", 0);
        settle().await;
        answer_flushes().await;
        assert!(issued().contains(&"A write 4096".to_owned()), "{:?}", issued());
        assert!(!change.is_finished() && !before.is_drained(), "the dependent is under way");
        done("A", 4096);
        settle().await;
        answer_flushes().await;
        change.await.unwrap().unwrap();
        assert!(reply.try_recv().unwrap().is_ok() && before.is_drained());
    });
}

#[test]
fn a_failed_graph_answers_what_is_held() {
    run(1, async |host| {
        EVENTS.take();
        PARKED.take();
        let text = "element Top (type panic) element P (type pair) element A (type sink) Top -> P -> A";
        let disk = TestDisk::new(&host, ALL, text, "Top").await.unwrap();
        let reply = disk.send(Request::write(512, Data::zeros(512)));
        settle().await;
        assert_eq!(issued(), ["A write 512"]);
        assert!(disk.write(0, b"x").await.is_err());
        assert!(reply.await.unwrap().is_err());
    });
}

#[test]
fn wakes_cross_threads() {
    let req = Request::write(0, Data::zeros(1));
    let watch = Arc::new(Watch::new(&req, "X", Weak::new(), true));
    let token = Token(watch.clone());
    let after = After { watch, until: Until::Completed, path: Vec::new() };
    let waiter = std::thread::spawn(move || futures::executor::block_on(after.ended()));
    let issue = token.0.issue().then(|| Issue(token.0.clone())).unwrap();
    std::thread::spawn(move || issue.end(&Ok(Answer::Done))).join().unwrap();
    waiter.join().unwrap().unwrap();
    fn crosses<T: Send + Sync>() {}
    crosses::<Ties>();
}
