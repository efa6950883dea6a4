//! Waits before it hands a request on: a slow disk, or a far one.

use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports};
use blockmason::lang::value::Time;
use blockmason::{Cx, Element, Error, Flow, Op, Request, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

blockmason::params! {
    /// Waits before it hands a request on.
    struct Params {
        /// How long a request waits whose operation has no time of its own.
        all: Time = "0s",
        /// How long a read waits.
        read: Option<Time>,
        /// How long a write, a write of zeros or a discard waits.
        write: Option<Time>,
        /// How long a flush waits.
        flush: Option<Time>,
        /// A request that waits at all waits up to this much longer, anew each time.
        jitter: Time = "0s",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "delay",
    summary: "waits before it hands a request on",
    doc: "Makes a fast disk slow: for testing what guests, caches and timeouts make of it. Each request \
          waits by itself, so any number wait at once and the bandwidth is not limited. Times are kept to \
          the millisecond, rounded up.\n\n\
          Requests may overtake each other while they wait. A flush is handed on later than it came, so it \
          covers what it has to, and perhaps more. Errors from below pass.",
    family: Family::Fault,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "all", access: Access::ReadWrite, doc: "how long other operations wait" },
        Handler { name: "read", access: Access::ReadWrite, doc: "how long a read waits" },
        Handler { name: "write", access: Access::ReadWrite, doc: "how long a change waits" },
        Handler { name: "flush", access: Access::ReadWrite, doc: "how long a flush waits" },
        Handler { name: "jitter", access: Access::ReadWrite, doc: "how much longer a wait may be" },
    ],
    passes_through: true,
    handover: Handover::Free,
    example: "element Guest (type nbd) (listen unix:delay.sock)\n\
              element Slow (type delay) (read 2ms) (write 5ms) (jitter 1ms)\n\
              element Memory (type mem) (size 64M)\n\
              Guest -> Slow -> Memory\n",
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(Delay { times: Mutex::new(build.read(Params::from)?) })),
    ..ElementType::BASE
};

struct Delay {
    times: Mutex<Params>,
}

impl Delay {
    fn times(&self) -> MutexGuard<'_, Params> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, op: Op, cx: Cx<'_>) -> Duration {
        let times = self.times();
        let own = match op {
            Op::Read => times.read,
            Op::Write | Op::WriteZeroes | Op::Discard => times.write,
            Op::Flush => times.flush,
            Op::Cache | Op::Extents | Op::Control => None,
        };
        let wait = own.unwrap_or(times.all).0;
        if wait.is_zero() { wait } else { wait + times.jitter.0.mul_f64(cx.rng(|rng| rng.f64())) }
    }
}

impl Element for Delay {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let wait = self.wait(req.op, cx);
        if wait.is_zero() {
            return cx.forward(0, req);
        }
        Flow::later(async move {
            cx.sleep(wait).await;
            cx.forward(0, req).await
        })
    }

    fn get(&self, handler: &str) -> Result<String> {
        let times = self.times();
        let time = match handler {
            "all" => times.all,
            "read" => times.read.unwrap_or(times.all),
            "write" => times.write.unwrap_or(times.all),
            "flush" => times.flush.unwrap_or(times.all),
            "jitter" => times.jitter,
            _ => return Err(Error::no_handler(handler)),
        };
        Ok(time.to_string())
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        let time = value.parse().map_err(Error::invalid)?;
        let mut times = self.times();
        match handler {
            "all" => times.all = time,
            "read" => times.read = Some(time),
            "write" => times.write = Some(time),
            "flush" => times.flush = Some(time),
            "jitter" => times.jitter = time,
            _ => return Err(Error::no_handler(handler)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use blockmason::testing::{TestDisk, graph, play_against_model, run};
    use blockmason::{Op, Request};
    use std::time::Duration;
    use tokio::time::Instant;

    const GRAPH: &str = "element D (type delay) (read 10ms) (write 5ms) (all 1ms)\n\
                         element M (type mem) (size 64k)\nD -> M";

    async fn took(disk: &TestDisk, req: Request) -> Duration {
        let since = Instant::now();
        disk.submit(req).await.unwrap();
        since.elapsed()
    }

    #[test]
    fn each_operation_waits_its_own_time() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, GRAPH, "D").await.unwrap();
            let ms = Duration::from_millis;
            assert_eq!(took(&disk, Request::read(0, 512)).await, ms(10));
            for op in [Op::WriteZeroes, Op::Discard] {
                assert_eq!(took(&disk, Request::new(op, 0, 512)).await, ms(5), "{op}");
            }
            for op in [Op::Flush, Op::Cache, Op::Extents] {
                assert_eq!(took(&disk, Request::new(op, 0, 512)).await, ms(1), "{op}");
            }
        });
    }

    #[test]
    fn requests_wait_at_the_same_time() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, GRAPH, "D").await.unwrap();
            let since = Instant::now();
            let sent: Vec<_> = (0..100).map(|_| disk.send(Request::read(0, 512))).collect();
            for reply in sent {
                reply.await.unwrap().unwrap();
            }
            assert_eq!(since.elapsed(), Duration::from_millis(10));
        });
    }

    #[test]
    fn times_change_while_it_runs_and_jitter_adds_to_them() {
        run(1, async |host| {
            let graph = graph(&host, crate::ALL, GRAPH, "D").unwrap();
            let delay = graph.instances().find(|instance| instance.name == "D").unwrap().element.clone();
            let disk = TestDisk::serve(&host, graph).await;
            assert_eq!(delay.get("flush").unwrap(), "1ms", "as all the others");
            delay.set("read", "0s").unwrap();
            delay.set("jitter", "50ms").unwrap();
            assert_eq!(delay.get("jitter").unwrap(), "50ms");
            assert_eq!(took(&disk, Request::read(0, 512)).await, Duration::ZERO, "no wait, no jitter");
            let mut longest = Duration::ZERO;
            for _ in 0..50 {
                let took = took(&disk, Request::flush()).await;
                assert!(took >= Duration::from_millis(1) && took <= Duration::from_millis(52), "{took:?}");
                longest = longest.max(took);
            }
            assert!(longest > Duration::from_millis(20), "{longest:?}");
            assert!(delay.set("read", "soon").is_err() && delay.set("colour", "1s").is_err());
        });
    }

    #[test]
    fn is_the_disk_below_it() {
        run(3, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, GRAPH, "D").await.unwrap();
            play_against_model(&disk, 3, 300).await;
        });
    }
}
