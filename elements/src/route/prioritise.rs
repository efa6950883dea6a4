//! Guests first: work that may wait does so while somebody waits for other requests here.

use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports};
use blockmason::lang::value::Time;
use blockmason::lang::{ParamError, Params};
use blockmason::{Class, Cx, Element, Error, Flow, Origin, Request, Result};
use futures::future::{Either, select};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::Notify;

blockmason::params! {
    /// Guests before background work.
    struct Limits {
        /// How long a background request waits for guests; then it waits once more as long for the others, see
        /// `depth`.
        most: Time = "100ms",
        /// How many background requests may be on their way below at once while guests are active.
        depth: usize = "1",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "prioritise",
    summary: "lets guests go before background work",
    doc: "While requests of guests are on their way below, background requests, such as those of a copier or of a \
          cache that writes back, wait here. They go on when no guest's request is left, or when they have waited \
          for `most` and fewer than `depth` of them are below. After twice that time they go on in any case, so \
          nothing waits for good, whatever depends on it.\n\n\
          It is of use where both streams meet: above a disk that guests and a copier share. Guests' requests \
          pass at once. Data and errors pass as they are. A flush covers what was answered before it came, \
          so it may wait like everything else.",
    family: Family::Route,
    params: Limits::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[Handler { name: "waiting", access: Access::Read, doc: "background requests that wait now" }],
    passes_through: true,
    handover: Handover::Free,
    example: "element Guest (type nbd) (listen unix:prioritise.sock)\n\
              element First (type prioritise) (most 50ms)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> First -> Disk\n",
    check,
    build: |build: &Build<'_>| {
        let limits = build.read(Limits::from)?;
        Ok(Arc::new(Prioritise { most: limits.most.0, depth: limits.depth, ..Prioritise::default() }))
    },
    ..ElementType::BASE
};

fn check(params: &Params) -> Result<(), Vec<ParamError>> {
    match Limits::from(params)?.depth {
        0 => Err(vec![params.error("depth", "it is at least 1")]),
        _ => Ok(()),
    }
}

#[derive(Default)]
struct Prioritise {
    most: Duration,
    depth: usize,
    /// Requests of guests that are below.
    guests: AtomicUsize,
    /// Background requests that are below.
    background: AtomicUsize,
    waiting: AtomicUsize,
    /// Told when something below has ended, if somebody waits for it.
    ended: Notify,
}

/// Counts a request until it is dropped, and tells those who wait.
struct Counted<'a> {
    count: &'a AtomicUsize,
    of: &'a Prioritise,
}

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize, of: &'a Prioritise) -> Counted<'a> {
        count.fetch_add(1, Ordering::SeqCst);
        Counted { count, of }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
        // Whoever waits has said so before it looked at the counts.
        if self.of.waiting.load(Ordering::SeqCst) > 0 {
            self.of.ended.notify_waiters();
        }
    }
}

impl Prioritise {
    fn guests_rest(&self) -> bool {
        self.guests.load(Ordering::SeqCst) == 0
    }

    /// Hands a request on, and counts it meanwhile.
    fn pass<'a>(&'a self, count: &'a AtomicUsize, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let counted = Counted::new(count, self);
        cx.forward(0, req).then(move |reply| {
            drop(counted);
            reply
        })
    }

    /// Waits until a background request may go on.
    async fn turn(&self, cx: Cx<'_>) {
        let _waiting = Counted::new(&self.waiting, self);
        if self.wait(cx, || self.guests_rest()).await {
            return;
        }
        let few = || self.background.load(Ordering::SeqCst) < self.depth;
        // After that it goes on whatever has come of it: what is below might wait for it.
        self.wait(cx, || self.guests_rest() || few()).await;
    }

    /// Waits until `ready`, but no longer than `most`. True if it is.
    async fn wait(&self, cx: Cx<'_>, ready: impl Fn() -> bool) -> bool {
        let mut late = pin!(cx.sleep(self.most));
        loop {
            let mut ended = pin!(self.ended.notified());
            ended.as_mut().enable();
            if ready() {
                return true;
            }
            if let Either::Left(_) = select(late.as_mut(), ended).await {
                return false;
            }
        }
    }
}

impl Element for Prioritise {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.class == Class::Interactive || req.origin == Origin::Guest {
            return self.pass(&self.guests, req, cx);
        }
        if self.guests_rest() {
            return self.pass(&self.background, req, cx);
        }
        Flow::later(async move {
            self.turn(cx).await;
            self.pass(&self.background, req, cx).await
        })
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "waiting" => Ok(self.waiting.load(Ordering::Relaxed).to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmason::testing::{TestDisk, graph, play_against_model, run};
    use blockmason::{Host, Op, rt};
    use futures::stream::{FuturesUnordered, StreamExt};

    async fn serve(host: &Arc<Host>, parameters: &str, below: &str) -> (TestDisk, Arc<dyn Element>) {
        let text = format!(
            "element P (type prioritise) {parameters} element D (type delay) {below}\n\
             element M (type mem) (size 64k) P -> D -> M"
        );
        let graph = graph(host, crate::ALL, &text, "P").unwrap();
        let element = graph.instances().find(|instance| instance.name == "P").unwrap().element.clone();
        (TestDisk::serve(host, graph).await, element)
    }

    fn background(offset: u64) -> Request {
        Request { class: Class::Background, origin: Origin::Copy, ..Request::read(offset, 512) }
    }

    /// Sends all at once. Returns when which was answered, in milliseconds.
    async fn answers(disk: &TestDisk, requests: Vec<Request>) -> Vec<(usize, u128)> {
        let since = rt::now();
        let answered = async |ix: usize, reply: tokio::sync::oneshot::Receiver<blockmason::Reply>| {
            reply.await.unwrap().unwrap();
            (ix, (rt::now() - since).as_millis())
        };
        let sent: Vec<_> = requests.into_iter().map(|req| disk.send(req)).collect();
        let all: FuturesUnordered<_> =
            sent.into_iter().enumerate().map(|(ix, reply)| answered(ix, reply)).collect();
        let mut found: Vec<_> = all.collect().await;
        found.sort_unstable();
        found
    }

    #[test]
    fn background_waits_until_no_guest_is_below() {
        run(1, async |host| {
            let (disk, element) = serve(&host, "", "(all 30ms)").await;
            let sent = [background(0), Request::read(0, 512), background(512), background(1024)];
            let looked = async {
                rt::sleep(Duration::from_millis(10)).await;
                element.get("waiting").unwrap()
            };
            let (found, waiting) = tokio::join!(answers(&disk, sent.into()), looked);
            // The first one came while nobody else was here.
            assert_eq!(found, [(0, 30), (1, 30), (2, 60), (3, 60)]);
            assert_eq!((waiting, element.get("waiting").unwrap()), ("2".into(), "0".into()));
        });
    }

    #[test]
    fn what_has_waited_long_enough_goes_on_one_by_one_and_then_in_any_case() {
        run(1, async |host| {
            let (disk, _) = serve(&host, "(most 100ms) (depth 2)", "(all 70ms) (write 1h)").await;
            // A guest's write that takes an hour.
            let write = disk.send(Request::write(0, blockmason::Data::copy_of(b"x")));
            let reads = (0..6).map(|ix| background(ix * 512)).collect();
            let mut times: Vec<_> = answers(&disk, reads).await.into_iter().map(|(_, ms)| ms).collect();
            times.sort_unstable();
            assert_eq!(times, [170, 170, 240, 240, 270, 270]);
            write.await.unwrap().unwrap();
        });
    }

    #[test]
    fn a_guest_never_waits_and_a_class_without_an_origin_of_its_own_is_a_guest() {
        run(1, async |host| {
            let (disk, _) = serve(&host, "", "(all 10ms)").await;
            let modest = Request { class: Class::Background, ..Request::read(0, 1) };
            let urgent = Request { origin: Origin::Prefetch, ..Request::read(0, 1) };
            let sent = vec![background(0), Request::read(0, 1), modest, urgent];
            assert!(answers(&disk, sent).await.iter().all(|(_, ms)| *ms == 10));
        });
    }

    #[test]
    fn is_the_disk_below_it() {
        run(2, async |host| {
            let (disk, _) = serve(&host, "", "(jitter 2ms)").await;
            play_against_model(&disk, 2, 200).await;
            assert!(disk.op(Op::Control, 0, 0).await.is_err());
        });
    }

    #[test]
    fn a_depth_of_nothing_is_refused() {
        let params = Params::parse("test", "(depth 0)", "/".as_ref()).unwrap();
        assert!((TYPE.check)(&params).unwrap_err()[0].message.contains("at least 1"));
    }
}
