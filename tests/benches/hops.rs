//! What a hop costs: a request through chains of 0, 1, 4 and 8 elements over a sink that answers at
//! once, or parks each request first. Accounting is on, as it always is.
//!
//! The figure to look at is the slope: (chain of 8 - chain of 0) / 8. Times are the thread's processor time,
//! so that what else the machine does counts as little as possible.
#![allow(clippy::unwrap_used, missing_docs)]

use blockmason::describe::{Build, ElementType, Family, Handover, Ports, Survives};
use blockmason::sched::{Admit, Served, Stream, serve};
use blockmason::testing::{graph, run};
use blockmason::{
    Answer, Children, Cx, Data, Disk, Element, Flow, Geometry, Host, Ops, Prepared, Reply, Request,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::cell::Cell;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

const BASE: ElementType = ElementType {
    family: Family::Sink,
    passes_through: true,
    handover: Handover::Free,
    survives: Survives::Nothing,
    ..ElementType::BASE
};

static TYPES: &[&ElementType] = &[
    &ElementType { name: "route", build: |_: &Build<'_>| Ok(Arc::new(Route)), ..BASE },
    &ElementType { name: "watch", build: |_| Ok(Arc::new(Watch)), ..BASE },
    &ElementType { name: "ready", ports: Ports::SINK, build: |_| Ok(Arc::new(Ready)), ..BASE },
    &ElementType { name: "parked", ports: Ports::SINK, build: |_| Ok(Arc::new(Parked)), ..BASE },
];

/// Hands on, as a filter does.
struct Route;

impl Element for Route {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.forward(0, req)
    }
}

/// Sees the completion.
struct Watch;

impl Element for Watch {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.forward(0, req).then(|reply| reply)
    }
}

struct Ready;

fn sink() -> blockmason::Result<Prepared> {
    Ok(Prepared::of(Geometry { ops: Ops::ALL, ..Geometry::new(1 << 40) }))
}

impl Element for Ready {
    fn prepare(&self, _children: Children<'_>) -> blockmason::Result<Prepared> {
        sink()
    }

    fn submit<'a>(&'a self, req: Request, _cx: Cx<'a>) -> Flow<'a> {
        Flow::Now(Ok(Answer::Data(Data::zeros(req.len as usize))))
    }
}

/// Waits once, and is woken at once.
struct Parked;

impl Element for Parked {
    fn prepare(&self, _children: Children<'_>) -> blockmason::Result<Prepared> {
        sink()
    }

    fn submit<'a>(&'a self, req: Request, _cx: Cx<'a>) -> Flow<'a> {
        let mut waited = false;
        Flow::later(std::future::poll_fn(move |task| {
            if std::mem::replace(&mut waited, true) {
                return Poll::Ready(Ok(Answer::Data(Data::zeros(req.len as usize))));
            }
            task.waker().wake_by_ref();
            Poll::Pending
        }))
    }
}

/// So many reads, 32 in flight at the most.
struct Flood {
    left: Cell<u64>,
    in_flight: Cell<u32>,
}

impl Stream for Flood {
    type Tag = ();

    fn poll_next(&self, _task: &mut Context<'_>) -> Poll<Admit<()>> {
        if self.left.get() == 0 && self.in_flight.get() == 0 {
            return Poll::Ready(Admit::End);
        }
        if self.left.get() == 0 || self.in_flight.get() == 32 {
            return Poll::Pending;
        }
        self.left.set(self.left.get() - 1);
        self.in_flight.set(self.in_flight.get() + 1);
        Poll::Ready(Admit::Request((), Request::read(4096, 4096)))
    }

    fn reply(&self, _tag: (), reply: Reply) {
        assert!(reply.is_ok());
        self.in_flight.set(self.in_flight.get() - 1);
    }

    fn poll_flush(&self, _task: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

/// Processor time of this thread.
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

async fn flood(host: &Arc<Host>, hop: &str, sink: &str, hops: usize, requests: u64) -> Duration {
    let mut text = format!("element E{hops} (type {sink})");
    for ix in (0..hops).rev() {
        text += &format!(" element E{ix} (type {hop}) E{ix} -> E{}", ix + 1);
    }
    let disk = Disk::serve(host, graph(host, TYPES, &text, "E0").unwrap()).await.unwrap();
    let stream = Flood { left: Cell::new(requests), in_flight: Cell::new(0) };
    let since = cpu();
    assert_eq!(serve(&disk, "Client", &stream).await.unwrap(), Served::Ended);
    cpu() - since
}

fn hops(criterion: &mut Criterion) {
    for (hop, sink) in [("route", "ready"), ("watch", "ready"), ("route", "parked"), ("watch", "parked")] {
        let mut group = criterion.benchmark_group(format!("{hop}, {sink}"));
        group.throughput(Throughput::Elements(1)).sample_size(20);
        for length in [0, 1, 4, 8] {
            group.bench_function(BenchmarkId::from_parameter(length), |bench| {
                bench.iter_custom(|requests| {
                    run(1, async |host| flood(&host, hop, sink, length, requests).await)
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, hops);
criterion_main!(benches);
