//! Stands in front of something that may fail: tries again, moves to another port, or goes on without it.

use super::gauge::Gauge;
use crate::migrate::map::DirtyMap;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Outs, Ports};
use blockmason::lang::value::{Ref, Time};
use blockmason::{
    Answer, Children, Cx, Element, Error, Extent, ExtentState, Flow, Kind, Op, Prepared, Reply, Request,
    Result,
};
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

blockmason::words! {
    /// What becomes of a request that has failed for good.
    enum Then {
        /// Its error goes up.
        Fail = "fail",
        /// It counts as done.
        Ignore = "ignore",
    }
}

blockmason::params! {
    /// Deals with errors.
    struct Params {
        /// How often a request that fails is tried again on a port.
        retry: u8 = "3",
        /// How long it waits before it is tried again for the first time; twice as long each time after that.
        backoff: Time = "100ms",
        /// The longest of these waits.
        longest: Time = "5s",
        /// What becomes of a request that has failed on the last port: its error goes up (`fail`), or it counts
        /// as done (`ignore`), but for a read, which fails.
        then: Then = "fail",
        /// The `log_dirty` in which is marked what an ignored request should have changed.
        mark: Option<Ref<DirtyMap>>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "on_error",
    summary: "tries requests that fail again, on other ports too, or goes on without them",
    doc: "A request that fails below is tried again after `backoff`, then after twice that, and so on. Errors that are \
          the request's own fault (it is invalid, not supported, not allowed) go up at once. When the retries \
          are used up on a port, the element moves to the next one, in the order of the edges, with that \
          request and all that come later, and says so in an event. So all ports must hold the same data: two \
          ways to one server, or the legs of a mirror. What was written and not flushed before is \
          flushed on the new port only. On the last port it has given up: the request fails, or with \
          `(then ignore)` counts as done, and later ones are tried once, without waits, until one \
          succeeds.\n\n\
          On the leg of a mirror `(then ignore)` keeps a broken disk from being noticed above; `mark` names the \
          `log_dirty` that remembers what is missing there. Reads fail all the same, and so do flushes and writes with \
          FUA: nobody is told that something is durable which is not there. It is for legs that nobody waits for; \
          alone above a disk, it loses writes.\n\n\
          A request waits at most `retry` times `longest` on each port, beside what it takes below. A change of the \
          graph waits for it. The port in use is kept when the element's parameters change, but not when the \
          process ends: put the port that works first before that. `reset` goes back to the first port.",
    family: Family::Route,
    params: Params::PARAMS,
    ports: Ports { input: true, out: Outs::Variadic { min: 1 } },
    handlers: &[
        Handler { name: "state", access: Access::Read, doc: "`ok`, `retrying` or `given_up`" },
        Handler { name: "port", access: Access::Read, doc: "the port in use" },
        Handler { name: "error", access: Access::Read, doc: "the last error from below" },
        Handler { name: "retried", access: Access::Read, doc: "how often a request was tried again" },
        Handler { name: "given_up", access: Access::Read, doc: "requests that have failed for good" },
        Handler {
            name: "reset",
            access: Access::Call,
            doc: "back to the first port, as if nothing had failed",
        },
    ],
    passes_through: true,
    handover: Handover::Gate,
    example: "element Guest (type nbd) (listen unix:on_error.sock)\n\
              element Patient (type on_error) (retry 5) (backoff 50ms)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Patient\n\
              (Patient, disk) -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        let mark = params.mark.as_ref().map(|mark| build.refer(mark)).transpose()?;
        let (state, names) = Default::default();
        Ok(Arc::new(OnError { params, mark, state, names }))
    },
    ..ElementType::BASE
};

struct OnError {
    params: Params,
    mark: Option<Arc<DirtyMap>>,
    state: State,
    /// Of the ports, for the operator.
    names: Mutex<Vec<String>>,
}

/// What it has learnt.
#[derive(Default)]
struct State {
    /// The port in use.
    port: AtomicUsize,
    /// A request has failed for good, and none has succeeded since.
    gave_up: AtomicBool,
    /// Requests that have failed and are to be tried again.
    retrying: Gauge,
    retried: AtomicU64,
    given_up: AtomicU64,
    error: Mutex<String>,
}

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // Values are replaced as a whole.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// True for an error that the next try would meet again.
fn is_own_fault(error: &Error) -> bool {
    match error.kind() {
        Kind::Invalid | Kind::Unsupported | Kind::Denied => true,
        Kind::NoSpace | Kind::Busy | Kind::Unavailable | Kind::Io | Kind::Internal => false,
    }
}

impl OnError {
    /// The port in use; another graph may have fewer.
    fn port(&self, cx: Cx<'_>) -> usize {
        self.state.port.load(Ordering::Acquire).min(cx.outs() - 1)
    }

    fn name(&self, port: usize) -> String {
        let names = locked(&self.names);
        names.get(port).or(names.last()).cloned().unwrap_or_default()
    }

    /// The wait before a retry, counted from 0.
    fn wait(&self, retry: u32) -> Duration {
        let factor = 1u32.checked_shl(retry).unwrap_or(u32::MAX);
        self.params.backoff.0.saturating_mul(factor).min(self.params.longest.0)
    }

    /// Something has succeeded on a port.
    fn well(&self, port: usize, cx: Cx<'_>) {
        if self.state.gave_up.load(Ordering::Relaxed) && self.state.gave_up.swap(false, Ordering::Relaxed) {
            cx.notice(format!("port `{}` answers again", self.name(port)));
        }
    }

    /// Moves on from a port that does not work. False if it is the last one.
    fn move_on(&self, port: usize, error: &Error, cx: Cx<'_>) -> bool {
        if port + 1 >= cx.outs() {
            return false;
        }
        let moved = self.state.port.compare_exchange(port, port + 1, Ordering::AcqRel, Ordering::Acquire);
        if moved.is_ok() {
            let (old, new) = (self.name(port), self.name(port + 1));
            cx.notice(format!("port `{old}` fails, requests go to `{new}` from now on: {error}"));
        }
        true
    }

    /// A request has failed for good.
    fn give_up(&self, port: usize, error: &Error, cx: Cx<'_>) {
        self.state.given_up.fetch_add(1, Ordering::Relaxed);
        if !self.state.gave_up.swap(true, Ordering::Relaxed) {
            let (name, so) =
                (self.name(port), if self.params.then == Then::Ignore { "ignored" } else { "failed" });
            cx.notice(format!("port `{name}` fails, requests are {so} until it answers again: {error}"));
        }
    }

    /// What the guest is told of a request that has failed for good.
    fn outcome(&self, req: &Request, error: Error) -> Reply {
        if self.params.then == Then::Fail {
            return Err(error);
        }
        match req.op {
            Op::Read | Op::Control => Err(error),
            // Whoever asks for it goes by it: nothing was made durable.
            Op::Flush => Err(error),
            Op::Write | Op::Discard | Op::WriteZeroes if req.is_fua() => Err(error),
            Op::Extents => Ok(Answer::Extents(vec![Extent { len: req.len, state: ExtentState::DATA }])),
            Op::Cache => Ok(Answer::Done),
            Op::Write | Op::Discard | Op::WriteZeroes => {
                if let Some(mark) = &self.mark {
                    mark.set(req.offset..req.end());
                }
                Ok(Answer::Done)
            }
        }
    }

    /// Sees a request to its end whose first try on a port has been answered.
    async fn see_to(&self, req: Request, mut port: usize, mut reply: Reply, cx: Cx<'_>) -> Reply {
        let mut retrying = None;
        let mut retry = 0;
        loop {
            let error = match reply {
                Ok(answer) => {
                    self.well(port, cx);
                    return Ok(answer);
                }
                Err(error) if is_own_fault(&error) => return Err(error),
                Err(error) => error,
            };
            *locked(&self.state.error) = error.to_string();
            if self.port(cx) != port || self.used_up(retry) && self.move_on(port, &error, cx) {
                // Another request has moved on, or this one.
                (port, retry) = (self.port(cx), 0);
            } else if self.used_up(retry) {
                self.give_up(port, &error, cx);
                return self.outcome(&req, error);
            } else {
                retrying.get_or_insert_with(|| self.state.retrying.enter());
                cx.sleep(self.wait(retry)).await;
                retry += 1;
            }
            self.state.retried.fetch_add(1, Ordering::Relaxed);
            reply = cx.forward(port, cx.child(&req)).await;
        }
    }

    /// True if a request that has been tried again so often is not tried once more.
    fn used_up(&self, retry: u32) -> bool {
        retry >= u32::from(self.params.retry) || self.state.gave_up.load(Ordering::Relaxed)
    }
}

impl Element for OnError {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let Some((first, geometry)) = children.ports.first() else {
            return Err(Error::internal("nothing to hand requests to"));
        };
        if let Some((name, other)) = children.ports.iter().find(|(_, other)| other.size != geometry.size) {
            let (size, other) = (geometry.size, other.size);
            let message = format!(
                "port `{first}` leads to {size} bytes and port `{name}` to {other}: they cannot hold the same"
            );
            return Err(Error::invalid(message));
        }
        *locked(&self.names) = children.ports.iter().map(|(name, _)| name.clone()).collect();
        Ok(Prepared::of(children.united(geometry.size)))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let port = self.port(cx);
        match cx.forward(port, req.clone()) {
            Flow::Now(Ok(answer)) => {
                self.well(port, cx);
                Flow::Now(Ok(answer))
            }
            Flow::Now(reply) => Flow::later(self.see_to(req, port, reply, cx)),
            Flow::Later(flow) => Flow::later(async move { self.see_to(req, port, flow.await, cx).await }),
        }
    }

    fn get(&self, handler: &str) -> Result<String> {
        let state = &self.state;
        Ok(match handler {
            "state" if state.gave_up.load(Ordering::Relaxed) => "given_up".to_owned(),
            "state" if state.retrying.now() > 0 => "retrying".to_owned(),
            "state" => "ok".to_owned(),
            "port" => self.name(state.port.load(Ordering::Acquire)),
            "error" => locked(&state.error).clone(),
            "retried" => state.retried.load(Ordering::Relaxed).to_string(),
            "given_up" => state.given_up.load(Ordering::Relaxed).to_string(),
            _ => return Err(Error::no_handler(handler)),
        })
    }

    fn call(&self, handler: &str, _argument: &str) -> Result<String> {
        if handler != "reset" {
            return Err(Error::no_handler(handler));
        }
        self.state.port.store(0, Ordering::Release);
        self.state.gave_up.store(false, Ordering::Relaxed);
        locked(&self.state.error).clear();
        Ok(format!("requests go to `{}`", self.name(0)))
    }

    fn take_state(&self, old: &dyn Element) -> Result<()> {
        let Some(old) = (old as &dyn Any).downcast_ref::<OnError>() else { return Ok(()) };
        // By name: the ports may be others.
        let used = old.name(old.state.port.load(Ordering::Acquire));
        let port = locked(&self.names).iter().position(|name| *name == used).unwrap_or(0);
        self.state.port.store(port, Ordering::Release);
        Ok(())
    }

    fn may_hand_over(&self) -> Result<()> {
        match self.state.port.load(Ordering::Acquire) {
            0 => Ok(()),
            port => {
                let name = self.name(port);
                let message = format!(
                    "requests go to port `{name}`, which the next process would not know: put it first"
                );
                Err(Error::new(Kind::Busy, message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmason::testing::{TestDisk, graph, play_against_model, run};
    use blockmason::{Data, Host, rt};

    struct Setup {
        disk: TestDisk,
        graph: Arc<blockmason::Graph>,
    }

    impl Setup {
        /// Two disks of memory behind elements that fail when they are told to.
        async fn new(host: &Arc<Host>, parameters: &str) -> Setup {
            let text = format!(
                "element O (type on_error) {parameters}\n\
                 element E1 (type error) (probability 0%) element A (type log_dirty) (initially clean)\n\
                 element E2 (type error) (probability 0%)\n\
                 element M1 (type mem) (size 64k) element M2 (type mem) (size 64k)\n\
                 (O, first) -> E1 -> A -> M1 (O, second) -> E2 -> M2"
            );
            let graph = Arc::new(Arc::into_inner(graph(host, crate::ALL, &text, "O").unwrap()).unwrap());
            let disk = TestDisk::serve(host, graph.clone()).await;
            Setup { disk, graph }
        }

        fn element(&self, name: &str) -> Arc<dyn Element> {
            self.graph.instances().find(|instance| instance.name == name).unwrap().element.clone()
        }

        fn fail(&self, name: &str, count: &str) {
            let element = self.element(name);
            element.set("count", count).unwrap();
            element.set("probability", "100%").unwrap();
        }

        fn get(&self, handler: &str) -> String {
            self.element("O").get(handler).unwrap()
        }
    }

    async fn timed<T>(body: impl Future<Output = T>) -> (T, u128) {
        let since = rt::now();
        let found = body.await;
        (found, (rt::now() - since).as_millis())
    }

    #[test]
    fn a_request_is_tried_again_with_longer_and_longer_waits() {
        run(1, async |host| {
            let setup = Setup::new(&host, "(retry 4) (longest 300ms)").await;
            setup.fail("E1", "4");
            let (written, ms) = timed(setup.disk.write(0, b"x")).await;
            written.unwrap();
            assert_eq!(ms, 100 + 200 + 300 + 300);
            assert_eq!((setup.get("retried"), setup.get("port")), ("4".into(), "first".into()));
            assert_eq!((setup.get("state"), setup.get("given_up")), ("ok".into(), "0".into()));
            assert!(setup.get("error").contains("failed on purpose"));
        });
    }

    #[test]
    fn it_moves_on_to_the_next_port_and_stays_there_until_it_is_reset() {
        run(1, async |host| {
            let setup = Setup::new(&host, "(retry 1)").await;
            setup.fail("E1", "unlimited");
            let (written, ms) = timed(setup.disk.write(0, b"x")).await;
            written.unwrap();
            assert_eq!((ms, setup.get("port")), (100, "second".into()));
            assert_eq!(timed(setup.disk.read(0, 1)).await.1, 0);
            assert!(setup.element("O").may_hand_over().is_err());
            setup.element("E1").set("probability", "0%").unwrap();
            setup.element("O").call("reset", "").unwrap();
            assert_eq!(setup.disk.read(0, 1).await.unwrap(), [0], "the first port has not had it");
        });
    }

    #[test]
    fn once_it_has_given_up_requests_are_tried_once_until_one_succeeds() {
        run(1, async |host| {
            let setup = Setup::new(&host, "(retry 2)").await;
            setup.fail("E1", "unlimited");
            setup.fail("E2", "4");
            let (read, ms) = timed(setup.disk.read(0, 1)).await;
            assert!(read.is_err());
            assert_eq!((ms, setup.get("state")), (600, "given_up".into()));
            let (read, ms) = timed(setup.disk.read(0, 1)).await;
            assert!(read.is_err() && ms == 0);
            assert!(setup.disk.read(0, 1).await.is_ok());
            assert_eq!((setup.get("state"), setup.get("given_up")), ("ok".into(), "2".into()));
        });
    }

    #[test]
    fn while_it_waits_it_says_so_and_all_that_wait_move_on_together() {
        run(1, async |host| {
            let setup = Setup::new(&host, "(retry 1) (backoff 1s)").await;
            setup.fail("E1", "unlimited");
            let first = setup.disk.send(Request::read(0, 1));
            rt::sleep(Duration::from_millis(500)).await;
            assert_eq!(setup.get("state"), "retrying");
            let (second, ms) = timed(setup.disk.send(Request::read(1, 1))).await;
            second.unwrap().unwrap();
            assert_eq!(ms, 1000, "its own wait, then the port that the first one has found");
            first.await.unwrap().unwrap();
            assert_eq!((setup.get("state"), setup.get("port")), ("ok".into(), "second".into()));
        });
    }

    #[test]
    fn what_is_ignored_is_marked_and_a_read_is_never_made_up() {
        run(1, async |host| {
            let setup = Setup::new(&host, "(retry 0) (then ignore) (mark A)").await;
            setup.fail("E1", "unlimited");
            setup.fail("E2", "unlimited");
            setup.disk.op(Op::Cache, 0, 100).await.unwrap();
            assert!(setup.disk.op(Op::Flush, 0, 0).await.is_err(), "nothing was made durable");
            let durable = Request::write(100, Data::copy_of(b"x")).with(blockmason::Flags::FUA);
            assert!(setup.disk.submit(durable).await.is_err(), "nor was this");
            assert_eq!(setup.element("A").get("remaining").unwrap(), "0");
            setup.disk.write(100, b"x").await.unwrap();
            assert_eq!(setup.element("A").get("remaining").unwrap(), "65536");
            assert!(setup.disk.read(100, 1).await.is_err());
            assert!(setup.disk.op(Op::Control, 0, 0).await.is_err());
            assert_eq!(setup.disk.extents(0, 10).await.unwrap()[0].state, ExtentState::DATA);
        });
    }

    #[test]
    fn a_request_that_is_at_fault_itself_is_not_tried_again() {
        for errno in ["EINVAL", "EOPNOTSUPP", "EPERM"] {
            run(1, async |host| {
                let text = format!(
                    "element O (type on_error) (then ignore) element E (type error) (errno {errno})\n\
                     element M (type mem) (size 64k) (O, a) -> E -> M"
                );
                let disk = TestDisk::new(&host, crate::ALL, &text, "O").await.unwrap();
                let (written, ms) = timed(disk.write(0, b"x")).await;
                assert!(written.is_err() && ms == 0);
            });
        }
    }

    #[test]
    fn the_port_in_use_is_kept_when_parameters_change() {
        run(1, async |host| {
            let setup = Setup::new(&host, "").await;
            setup.element("O").call("reset", "").unwrap();
            setup.fail("E1", "unlimited");
            setup.disk.write(0, b"x").await.unwrap();
            let other = Setup::new(&host, "(retry 9)").await;
            other.element("O").take_state(&*setup.element("O")).unwrap();
            assert_eq!(other.get("port"), "second");
        });
    }

    #[test]
    fn ports_of_different_sizes_are_refused() {
        run(1, async |host| {
            let text = "element O (type on_error) element A (type mem) (size 1k) element B (type mem) (size 2k)\n\
                (O, a) -> A (O, b) -> B";
            let said = TestDisk::new(&host, crate::ALL, text, "O").await.err().unwrap().to_string();
            assert!(said.contains("`a` leads to 1024 bytes and port `b` to 2048"), "{said}");
        });
    }

    #[test]
    fn is_the_disk_below_it_whatever_fails_now_and_then() {
        for seed in 0..5 {
            run(seed, async |host| {
                let text = "element O (type on_error) (retry 20) (backoff 1ms)\n\
                    element E (type error) (probability 20%) element L (type error) (probability 10%) (late yes)\n\
                    element M (type mem) (size 33001) (O, a) -> E -> L -> M";
                let disk = TestDisk::new(&host, crate::ALL, text, "O").await.unwrap();
                play_against_model(&disk, seed, 300).await;
                assert!(disk.submit(Request::write(0, Data::empty())).await.is_ok());
            });
        }
    }
}
