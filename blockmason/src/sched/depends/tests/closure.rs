//! Random requests that depend on each other, with random delays and failures, cut short at every moment.

use super::*;

/// A random graph of requests, and where each one's bytes end up on which sinks.
struct Dag {
    /// Each request's predecessors.
    after: Vec<Vec<(usize, Until)>>,
    len: u64,
}

/// Bytes of the disk between two requests of a random graph.
const APART: u64 = 16384;

async fn play_dag(host: &Arc<Host>, text: &str, seed: u64) -> (Dag, Vec<Event>, Vec<bool>) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let bench = Bench::new(host, text);
    let count = rng.usize(2..14);
    let len = [512, 700, 5000][rng.usize(0..3)];
    let mut requests: Vec<_> = (0..count as u64).map(|ix| bench.write(ix * APART, len)).collect();
    let mut after = vec![Vec::new(); count];
    for _ in 0..rng.usize(1..3 * count) {
        let (a, b) = (rng.usize(0..count), rng.usize(0..count));
        let until = if rng.bool() { Until::Completed } else { Until::Durable };
        let (low, high) = (a.min(b), a.max(b));
        if low == high {
            continue;
        }
        let (front, back) = requests.split_at_mut(high);
        let (dependent, independent) =
            if a < b { (&mut front[low], &mut back[0]) } else { (&mut back[0], &mut front[low]) };
        if bench.cx().add_dependency(dependent, independent, until).is_ok() {
            after[a].push((b, until));
        }
    }
    let cx = bench.cx();
    let flows = requests.into_iter().map(async |req| {
        cx.sleep(Duration::from_millis(cx.rng(|rng| rng.u64(0..30)))).await;
        cx.forward(0, req).await.is_ok()
    });
    let ok = join_all(flows).await;
    (Dag { after, len }, EVENTS.take(), ok)
}

/// What of a request a sink has at a moment of the record.
fn has(events: &[Event], sink: &str, request: usize, len: u64, durable: bool) -> bool {
    let start = request as u64 * APART;
    let mut on = vec![false; len as usize];
    let mut written: Vec<(u64, u64, usize)> = Vec::new();
    let mut flush_began = Vec::new();
    for (ix, event) in events.iter().enumerate() {
        match event {
            Event::Ended(name, Op::Write, offset, bytes, true) if name == sink => {
                written.push((*offset, *bytes, ix));
            }
            Event::Issued(name, Op::Flush, ..) if name == sink => flush_began.push(ix),
            Event::Ended(name, Op::Flush, .., true) if name == sink && durable => {
                // One flush of a sink at a time is what the framework sends.
                let began = flush_began.remove(0);
                for (offset, bytes, _) in written.iter().filter(|(_, _, at)| *at < began) {
                    (*offset..offset + bytes).filter(|at| (start..start + len).contains(at)).for_each(|at| {
                        on[(at - start) as usize] = true;
                    });
                }
            }
            _ => {}
        }
    }
    if !durable {
        for (offset, bytes, _) in written {
            (offset..offset + bytes).filter(|at| (start..start + len).contains(at)).for_each(|at| {
                on[(at - start) as usize] = true;
            });
        }
    }
    on.into_iter().all(|byte| byte)
}

#[test]
fn every_cut_leaves_a_set_that_is_closed_under_dependencies() {
    let graphs = [
        ("element Top (type hop) element A (type chance) Top -> A", &["A"][..]),
        ("element Top (type halves) element A (type chance) Top -> A", &["A"]),
        (
            "element Top (type mirror) element A (type chance) element H (type halves) \
             element B (type chance) (Top, a) -> A (Top, b) -> H H -> B",
            &["A", "B"],
        ),
        (
            "element Top (type halves) element M (type mirror) element A (type chance) \
             element B (type chance) Top -> M (M, a) -> A (M, b) -> B",
            &["A", "B"],
        ),
        (
            "element Top (type mirror) element M (type mirror) element A (type chance) \
             element B (type chance) element C (type chance) \
             (Top, a) -> A (Top, m) -> M (M, b) -> B (M, c) -> C",
            &["A", "B", "C"],
        ),
    ];
    let mut waited = 0;
    for seed in 0..300 {
        let (text, sinks) = graphs[seed as usize % graphs.len()];
        run(seed, async |host| {
            let (dag, events, _) = play_dag(&host, text, seed).await;
            for cut in 0..events.len() {
                let Event::Issued(sink, Op::Write, offset, _) = &events[cut] else { continue };
                let request = (offset / APART) as usize;
                for (independent, until) in &dag.after[request] {
                    waited += 1;
                    let there = has(&events[..cut], sink, *independent, dag.len, *until == Until::Durable);
                    let place = format!("seed {seed}, {request} after {independent} on {sink}, {until:?}");
                    assert!(there, "{place}: {events:#?}");
                }
            }
            assert!(sinks.iter().any(|sink| {
                events.iter().any(|event| matches!(event, Event::Issued(name, ..) if name == sink))
            }));
        });
    }
    assert!(waited > 500, "only {waited} dependencies were looked at");
}
