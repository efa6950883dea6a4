//! Requests that go down several legs, and what it takes for one to be durable there.

use super::*;

#[test]
fn on_each_leg_a_dependent_waits_for_that_leg_only() {
    for split in [false, true] {
        let halves = "element Top (type halves) element M (type mirror) element A (type sink) \
                      element B (type sink) Top -> M (M, a) -> A (M, b) -> B";
        at(if split { halves } else { MIRROR }, |bench| {
            let len = if split { 1 } else { 512 };
            let (mut first, mut second) = (bench.write(0, len), bench.write(4096, len));
            bench.cx().add_dependency(&mut second, &mut first, Until::Completed).unwrap();
            let (mut second, mut first) = (bench.send(second), bench.send(first));
            assert_eq!(issued(), ["A write 0", "B write 0"]);
            done("B", 0);
            assert!(first.reply().is_none() && second.reply().is_none());
            assert_eq!(issued()[2..], ["B write 4096"], "B need not wait for A");
            fail("A", 0);
            assert!(first.is_ok(), "one leg is enough");
            assert!(second.reply().is_none());
            assert_eq!(issued().len(), 3, "A has not got the first, so it does not get the second");
            done("B", 4096);
            assert!(second.is_ok());
        });
    }
}

#[test]
fn pieces_on_a_leg_are_complete_when_there_can_be_no_more() {
    let text = "element Top (type halves) element M (type mirror) element A (type sink) element B (type sink) \
                Top -> M (M, a) -> A (M, b) -> B";
    at(text, |bench| {
        let (mut first, mut second) = (bench.write(0, 512), bench.write(4096, 1));
        bench.cx().add_dependency(&mut second, &mut first, Until::Completed).unwrap();
        let (mut second, mut first) = (bench.send(second), bench.send(first));
        for (sink, offset) in [("A", 0), ("A", 256), ("B", 0)] {
            done(sink, offset);
            assert!(first.reply().is_none() && second.reply().is_none());
        }
        fail("B", 256);
        assert!(first.is_ok() && second.reply().is_none());
        assert_eq!(issued()[4..], ["A write 4096"]);
    });
}

#[test]
fn legs_of_legs() {
    let text = "element Top (type mirror) element M (type mirror) element A (type sink) \
                element B (type sink) element C (type sink) \
                (Top, a) -> A (Top, m) -> M (M, b) -> B (M, c) -> C";
    at(text, |bench| {
        let (mut first, mut second) = (bench.write(0, 512), bench.write(4096, 512));
        bench.cx().add_dependency(&mut second, &mut first, Until::Completed).unwrap();
        let (mut second, mut first) = (bench.send(second), bench.send(first));
        assert_eq!(issued().len(), 3);
        done("C", 0);
        assert!(first.reply().is_none() && second.reply().is_none());
        assert_eq!(issued()[3..], ["C write 4096"]);
        fail("B", 0);
        assert!(first.reply().is_none() && second.reply().is_none());
        assert_eq!(issued().len(), 4);
        done("A", 0);
        assert!(first.is_ok() && second.reply().is_none());
        assert_eq!(issued()[4..], ["A write 4096"]);
        done("A", 4096);
        done("C", 4096);
        assert!(second.is_ok());
    });
}

#[test]
fn overlapping_requests_take_their_places_in_the_order_of_dependencies() {
    at(MIRROR, |bench| {
        // The later one overlaps both, and a third one comes in between.
        let (mut first, mut second) = (bench.write(0, 512), bench.write(256, 512));
        bench.cx().add_dependency(&mut second, &mut first, Until::Completed).unwrap();
        let mut second = bench.send(second);
        assert!(second.reply().is_none());
        let mut third = bench.send(bench.write(512, 512));
        let mut first = bench.send(first);
        assert!(first.reply().is_none() && second.reply().is_none() && third.reply().is_none());
        assert_eq!(issued(), ["A write 512", "B write 512", "A write 0", "B write 0"]);
        for (sink, offset) in [("A", 0), ("B", 0), ("A", 512), ("B", 512)] {
            done(sink, offset);
        }
        assert!(first.is_ok() && third.is_ok() && second.reply().is_none());
        assert_eq!(issued()[4..], ["A write 256", "B write 256"]);
    });
}

#[test]
fn a_leg_that_is_not_known_yet_is_waited_for() {
    at(MIRROR, |bench| {
        let cx = bench.lane.cx(bench.lane.graph.node("Top").unwrap());
        let client = bench.cx();
        let (mut first, mut second) = (bench.write(0, 512), bench.write(4096, 512));
        client.add_dependency(&mut second, &mut first, Until::Completed).unwrap();
        // The mirror's work, by hand.
        let mut seconds = [0, 1].map(|port| cx.forward(port, cx.leg(&second, port)));
        assert!(seconds.iter_mut().all(|leg| poll(leg).is_none()) && issued().is_empty());
        // The first one goes to A alone: B will never see it.
        let issuing = issue(&first);
        let mut leg = cx.forward(0, cx.leg(&first, 0));
        assert!(poll(&mut leg).is_none());
        done("A", 0);
        assert!(poll(&mut leg).unwrap().is_ok());
        assert!(seconds.iter_mut().all(|leg| poll(leg).is_none()));
        assert_eq!(issued(), ["A write 0", "A write 4096"]);
        let mut whole = issuing.over(Flow::done());
        assert!(poll(&mut whole).is_some());
        assert!(seconds.iter_mut().all(|leg| poll(leg).is_none()));
        assert_eq!(issued()[2..], ["B write 4096"], "it ended well without B");
    });
}

#[test]
fn durable_means_a_flush_of_what_was_reached_that_all_share() {
    at(MIRROR, |bench| {
        // A write to B alone.
        let cx = bench.lane.cx(bench.lane.graph.node("Top").unwrap());
        let (mut first, mut other) = (bench.write(0, 512), bench.write(512, 512));
        let mut dependents: Vec<_> = (1..4).map(|ix| bench.write(ix * 4096, 512)).collect();
        for dependent in &mut dependents {
            cx.add_dependency(dependent, &mut first, Until::Durable).unwrap();
        }
        let mut late = bench.write(1 << 16, 512);
        cx.add_dependency(&mut late, &mut other, Until::Durable).unwrap();
        let mut flows: Vec<_> = dependents.into_iter().map(|req| cx.forward(0, req)).collect();
        let mut first = cx.forward(1, first);
        assert!(poll(&mut first).is_none());
        assert!(flows.iter_mut().all(|flow| poll(flow).is_none()));
        done("B", 0);
        assert!(poll(&mut first).unwrap().is_ok());
        for _ in 0..3 {
            assert!(flows.iter_mut().all(|flow| poll(flow).is_none()));
        }
        assert_eq!(issued(), ["B write 0", "B flush 0"], "one flush, and not of A");

        // What completes while it goes on is not covered by it.
        let (mut late, mut other) = (cx.forward(0, late), cx.forward(1, other));
        assert!(poll(&mut late).is_none() && poll(&mut other).is_none());
        done("B", 512);
        assert!(poll(&mut other).unwrap().is_ok());
        assert!((0..3).all(|_| poll(&mut late).is_none()));
        assert_eq!(issued().len(), 3);
        answer("B", Op::Flush, 0, Ok(Answer::Done));
        for _ in 0..3 {
            assert!(flows.iter_mut().all(|flow| poll(flow).is_none()));
            assert!(poll(&mut late).is_none());
        }
        assert_eq!(issued()[3..6], ["A write 4096", "A write 8192", "A write 12288"]);
        assert_eq!(issued()[6..], ["B flush 0"], "a second one, for the one that came later");
        answer("B", Op::Flush, 0, Err(Error::new(Kind::Io, "of a test")));
        let error = poll(&mut late).unwrap().unwrap_err();
        assert!(error.to_string().contains("depends on write at 512") && error.kind() == Kind::Io, "{error}");
        assert_eq!(issued().len(), 7, "not issued");
    });
}

#[test]
fn on_a_leg_only_that_leg_is_flushed_and_what_transforms_is_flushed_itself() {
    at(MIRROR, |bench| {
        let (mut first, mut second) = (bench.write(0, 512), bench.write(4096, 512));
        bench.cx().add_dependency(&mut second, &mut first, Until::Durable).unwrap();
        let (mut second, mut first) = (bench.send(second), bench.send(first));
        done("A", 0);
        assert!(first.reply().is_none() && second.reply().is_none());
        assert_eq!(issued()[2..], ["A flush 0"]);
    });
    let text = "element Top (type cache) element M (type mirror) element A (type sink) element B (type sink) \
                Top -> M (M, a) -> A (M, b) -> B";
    at(text, |bench| {
        let (mut first, mut second) = (bench.write(0, 512), bench.write(4096, 512));
        bench.cx().add_dependency(&mut second, &mut first, Until::Durable).unwrap();
        let (mut second, mut first) = (bench.send(second), bench.send(first));
        done("A", 0);
        done("B", 0);
        assert!(first.is_ok() && second.reply().is_none());
        assert_eq!(issued()[2..], ["A flush 0", "B flush 0"], "by way of the cache");
    });
}
