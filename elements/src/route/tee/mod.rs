//! Sends every request down several legs: a mirror, or a migration under way (Block Mason, section 3.1.1).

mod announced;
mod leg;
#[cfg(test)]
mod tests;

use crate::migrate::map::DirtyMap;
use announced::Announced;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Outs, Ports};
use blockmason::lang::value::{Ref, Size, Time};
use blockmason::lang::{ParamError, Params, did_you_mean};
use blockmason::sched::Permit;
use blockmason::{
    Children, Cx, Data, Element, Error, Flags, Flow, Geometry, Op, Ops, Prepared, Reply, Request, Result,
};
use futures::future::join_all;
use leg::{Carrier, Leg};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};

blockmason::words! {
    /// What happens when a leg is too far behind.
    enum Behind {
        /// Guests wait.
        Wait = "wait",
        /// The leg misses what comes.
        Skip = "skip",
    }
}

blockmason::params! {
    /// Sends every request down several legs.
    struct Setup {
        /// The port whose answers guests get; without it, that of the first edge.
        primary: Option<String>,
        /// Ports that a request waits for as well. Errors there are counted and do not reach the guest.
        wait: Vec<String>,
        /// Ports that a request waits for, and whose errors are the guest's.
        required: Vec<String>,
        /// How many bytes of unfinished requests a leg that nobody waits for may be behind. Each request
        /// counts as at least 64k.
        lag: Size = "64M",
        /// What happens when a leg is that far behind: requests `wait`, or `skip` it, and what they change is
        /// marked in the `log`.
        behind: Behind = "wait",
        /// How long a leg that nobody waits for may leave everything unanswered. Then, with a `log`, it is let go: what is
        /// on its way there and what comes is marked, and not sent before all that was sent has ended.
        silence: Time = "2s",
        /// The `log_dirty` that is told of every change before it is sent anywhere.
        log: Option<Ref<DirtyMap>>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "tee",
    summary: "sends every request down several legs, for mirrors and migration",
    doc: "Guests get the answers of the primary leg, once the legs that they wait for have ended, too. The other \
          legs get a request at the same time and may take longer: guests go on. On each of those legs later \
          requests stay behind earlier ones that they overlap, and a flush behind all changes that came before it, so \
          that in the end all legs hold the same. A leg that is `lag` behind slows guests down to its own \
          speed, or with `(behind skip)` misses what comes until it has caught up. One that does not answer at all \
          is let go after `silence`, if there is a `log`: guests go on without it, and it takes part again once all \
          that was sent there has ended. What it lacks is marked.\n\n\
          Reads go down every leg, too. Put a `filter` with `(drop read)` on those that need not see them, and an \
          `on_error` where errors should be tried again. Errors of legs that are not `required` do not reach the \
          guest; the first one is told as an event, all are counted.\n\n\
          Every leg has at least the size of the primary, which is that of the disk. A discard would leave \
          different things on different disks: it becomes a write of zeros that may unmap, if all legs are \
          fast at that, and else is answered without doing anything. A write of zeros that must be fast is \
          sent to the primary first. With a single leg everything passes as it is.\n\n\
          FUA and flushes are waited for on the primary and the legs of `wait` and `required` only. A change that \
          fails on the primary may have been done on other legs: with a `log`, its range is marked there; \
          without one, guests that write it again make the legs alike. A change of graph waits until all \
          legs have caught up.",
    family: Family::Route,
    params: Setup::PARAMS,
    ports: Ports { input: true, out: Outs::Variadic { min: 1 } },
    handlers: &[
        Handler {
            name: "lag",
            access: Access::Read,
            doc: "bytes that each leg is behind which nobody waits for, `new 1280k`",
        },
        Handler { name: "errors", access: Access::Read, doc: "requests that failed on each leg, `new 3`" },
        Handler { name: "skipped", access: Access::Read, doc: "changes that each leg has missed, `new 0`" },
    ],
    passes_through: true,
    mirrors: true,
    handover: Handover::Gate,
    example: "element Guest (type nbd) (listen unix:tee.sock)\n\
              element Both (type tee) (log Dirty)\n\
              element Old (type file) (path old.img) (size 64M)\n\
              element Changes (type filter) (drop read cache extents)\n\
              element Dirty (type log_dirty)\n\
              element New (type file) (path new.img) (size 64M)\n\
              Guest -> Both\n\
              (Both, old) -> Old\n\
              (Both, new) -> Changes -> Dirty -> New\n",
    check,
    build: |build: &Build<'_>| {
        let setup = build.read(Setup::from)?;
        let log = setup.log.as_ref().map(|log| build.refer(log)).transpose()?;
        if let Some(log) = &log {
            log.mirror();
        }
        Ok(Arc::new(Tee { setup, log, legs: Mutex::default() }))
    },
    ..ElementType::BASE
};

fn check(params: &Params) -> Result<(), Vec<ParamError>> {
    let setup = Setup::from(params)?;
    if setup.behind == Behind::Skip && setup.log.is_none() {
        return Err(vec![
            params.error("behind", "`skip` needs a `log` that remembers what a leg has missed"),
        ]);
    }
    Ok(())
}

struct Tee {
    setup: Setup,
    log: Option<Arc<DirtyMap>>,
    /// Those of all graphs that it serves. A leg lives as long as one of them.
    legs: Mutex<Vec<Weak<Leg>>>,
}

/// What lies below, in one graph.
struct Below {
    /// The port whose answers count.
    primary: usize,
    others: Vec<Other>,
}

/// A leg beside the primary one.
struct Other {
    port: usize,
    duty: Duty,
    leg: Arc<Leg>,
}

#[derive(Clone, Copy, PartialEq)]
enum Duty {
    /// Its errors are the guest's.
    Required,
    /// The guest waits for its end.
    Waited,
    /// It runs by itself.
    Detached,
}

/// A request for which there is room everywhere.
struct Admitted {
    op: Op,
    primary: Request,
    /// Of the other legs, in their order; none for those that miss it.
    others: Vec<Option<(Request, Permit)>>,
    announced: Option<Arc<Announced>>,
}

impl Below {
    /// What goes down another leg in place of `req`.
    fn leg(other: &Other, req: &Request, cx: Cx<'_>) -> Request {
        let mut leg = cx.leg(req, other.port);
        leg.flags = leg.flags.without(Flags::FAST_ONLY);
        if other.duty == Duty::Detached {
            // Nobody waits for it.
            leg.flags = leg.flags.without(Flags::FUA);
        }
        if leg.op == Op::Read {
            // The guest's memory is the primary's to fill.
            leg.data = Data::empty();
        }
        leg
    }

    /// What the guest sees of a disk below several legs.
    fn geometry(&self, children: Children<'_>, primary: Geometry) -> Geometry {
        if self.others.is_empty() {
            return primary.above();
        }
        let all = children.united(primary.size);
        let waited = self.others.iter().filter(|other| other.duty != Duty::Detached);
        let waited = waited.filter_map(|other| children.ports.get(other.port));
        let answers = waited.fold(primary, |met, (_, geometry)| met.meet(*geometry));
        let ops = Ops {
            discard: all.ops.fast_zero,
            cache: primary.ops.cache,
            extents: primary.ops.extents,
            ..all.ops
        };
        let (needs_flush, volatile, rotational) = (answers.needs_flush, answers.volatile, answers.rotational);
        Geometry { ops, needs_flush, volatile, rotational, read_only: primary.read_only, ..all }
    }
}

/// The port of that name.
fn port(children: Children<'_>, parameter: &str, name: &str) -> Result<usize> {
    let found = children.ports.iter().position(|(port, _)| port == name);
    found.ok_or_else(|| {
        let names: Vec<&str> = children.ports.iter().map(|(port, _)| port.as_str()).collect();
        let hint = did_you_mean(name, names.iter().copied());
        let hint = hint.unwrap_or_else(|| format!("its ports are `{}`", names.join("`, `")));
        Error::invalid(format!("`{parameter}` names `{name}`, which is no port here; {hint}"))
    })
}

/// Whether a leg can hold all that the primary does.
fn fits(name: &str, leg: &Geometry, primary: &Geometry) -> Result<()> {
    if leg.size < primary.size {
        let (leg, primary) = (leg.size, primary.size);
        let message = format!(
            "port `{name}` leads to {leg} bytes, fewer than the {primary} of the primary: enlarge it"
        );
        return Err(Error::invalid(message));
    }
    if leg.read_only && !primary.read_only {
        let message = format!("port `{name}` leads to a read-only disk, which cannot follow the primary");
        return Err(Error::invalid(message));
    }
    Ok(())
}

impl Tee {
    fn with_legs<T>(&self, look: impl FnOnce(&mut Vec<Weak<Leg>>) -> T) -> T {
        // Every change of the list is complete before anything can panic.
        look(&mut self.legs.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The leg of that name, with what other graphs have on their way there.
    fn leg(&self, name: &str) -> Arc<Leg> {
        self.with_legs(|legs| {
            legs.retain(|leg| leg.strong_count() > 0);
            if let Some(leg) = legs.iter().filter_map(Weak::upgrade).find(|leg| leg.name == name) {
                return leg;
            }
            let silence = self.log.as_ref().map(|_| self.setup.silence.0);
            let leg = Arc::new(Leg::new(name, self.setup.lag.0, silence));
            legs.push(Arc::downgrade(&leg));
            leg
        })
    }

    fn duty(&self, name: &str) -> Duty {
        let named = |names: &[String]| names.iter().any(|other| other == name);
        match (named(&self.setup.required), named(&self.setup.wait)) {
            (true, _) => Duty::Required,
            (false, true) => Duty::Waited,
            (false, false) => Duty::Detached,
        }
    }

    /// The log, if `req` has to be announced.
    fn log_of(&self, req: &Request) -> Option<&Arc<DirtyMap>> {
        self.log.as_ref().filter(|_| req.op.changes_data() && req.len > 0)
    }

    /// Everything that a request needs before it is sent, if all of that is here.
    fn admit_now(&self, req: &Request, cx: Cx<'_>) -> Option<Admitted> {
        let below: &Below = cx.prepared();
        let mut rooms = Vec::with_capacity(below.others.len());
        for other in &below.others {
            let silent = other.duty == Duty::Detached && other.leg.is_silent(cx);
            let room = match other.duty {
                Duty::Detached if silent => None,
                Duty::Detached => other.leg.room_now(req),
                Duty::Required | Duty::Waited => Some(Permit::default()),
            };
            if room.is_none() && !silent && self.setup.behind == Behind::Wait {
                return None;
            }
            rooms.push(room);
        }
        let intent = match self.log_of(req) {
            Some(log) => Some((log, log.intend_now(req.offset..req.end())?)),
            None => None,
        };
        let primary = cx.leg(req, below.primary);
        let leg = |(other, room): (&Other, Option<Permit>)| Some((Below::leg(other, req, cx), room?));
        let others: Vec<_> = below.others.iter().zip(rooms).map(leg).collect();
        let legs = 1 + others.iter().flatten().count();
        let announced =
            intent.map(|(log, intent)| Announced::new(log.clone(), req.offset..req.end(), intent, legs));
        Some(Admitted { op: req.op, primary, others, announced })
    }

    /// The same, after all waits. What others depend on must not wait here behind what waits for it below:
    /// so dependencies come first.
    async fn admit(&self, req: &Request, cx: Cx<'_>) -> Result<Admitted> {
        let below: &Below = cx.prepared();
        let mut primary = cx.leg(req, below.primary);
        let mut legs: Vec<_> = below.others.iter().map(|other| Some(Below::leg(other, req, cx))).collect();
        cx.await_dependencies(&mut primary).await?;
        for (other, place) in below.others.iter().zip(&mut legs) {
            let Some(leg) = place else { continue };
            if let Err(error) = cx.await_dependencies(leg).await {
                if other.duty == Duty::Required {
                    return Err(error);
                }
                other.leg.ended(cx, req.op, &Err(error));
                *place = None;
            }
        }
        let mut others = Vec::with_capacity(legs.len());
        for (other, leg) in below.others.iter().zip(legs) {
            let room = match (other.duty, self.setup.behind) {
                _ if leg.is_none() => None,
                (Duty::Detached, _) if other.leg.is_silent(cx) => None,
                (Duty::Detached, Behind::Wait) => other.leg.room(req, cx).await,
                (Duty::Detached, Behind::Skip) => other.leg.room_now(req),
                (Duty::Required | Duty::Waited, _) => Some(Permit::default()),
            };
            others.push(leg.zip(room));
        }
        let announced = match self.log_of(req) {
            Some(log) => {
                let (range, legs) = (req.offset..req.end(), 1 + others.iter().flatten().count());
                let intent = log.intend(range.clone()).await?;
                Some(Announced::new(log.clone(), range, intent, legs))
            }
            None => None,
        };
        Ok(Admitted { op: req.op, primary, others, announced })
    }

    /// Sends a request everywhere.
    fn send<'a>(&'a self, admitted: Admitted, cx: Cx<'a>) -> Flow<'a> {
        let Admitted { op, primary, others, announced } = admitted;
        let waited = self.send_others(others, announced.as_ref(), cx);
        let flush = self.log.as_ref().filter(|_| op == Op::Flush).map(|log| (log, log.flush_begins()));
        let mut primary = cx.forward(cx.prepared::<Below>().primary, primary);
        if let Some((log, number)) = flush {
            // What a loss of power leaves of the old disk decides what the map may call clean.
            primary = primary.then(move |reply| {
                if reply.is_ok() {
                    log.flushed(number);
                }
                reply
            });
        }
        together(op, primary, waited, announced, cx)
    }

    /// Sends a write of zeros to the primary first: if that refuses, since it would not be fast, nothing may have
    /// changed elsewhere.
    async fn send_in_turn(&self, admitted: Admitted, cx: Cx<'_>) -> Reply {
        let Admitted { op, primary, others, announced } = admitted;
        let reply = cx.forward(cx.prepared::<Below>().primary, primary).await?;
        let waited = self.send_others(others, announced.as_ref(), cx);
        together(op, Flow::Now(Ok(reply)), waited, announced, cx).await
    }

    /// Sends a request down all legs but the primary. Returns those that the guest waits for.
    fn send_others<'a>(
        &'a self,
        others: Vec<Option<(Request, Permit)>>,
        announced: Option<&Arc<Announced>>,
        cx: Cx<'a>,
    ) -> Vec<(&'a Other, Flow<'a>)> {
        let mut waited = Vec::new();
        for (other, admitted) in cx.prepared::<Below>().others.iter().zip(others) {
            match (admitted, announced) {
                (Some((req, room)), _) if other.duty == Duty::Detached => {
                    let carrier = Carrier::new(&other.leg, other.port, req, room, announced.cloned());
                    // It is heard of through its leg.
                    drop(cx.detach_with(move |cx| carrier.run(cx)));
                }
                (Some((req, _)), _) => waited.push((other, cx.forward(other.port, req))),
                (None, Some(announced)) => other.leg.skip(announced),
                (None, None) => {}
            }
        }
        waited
    }
}

/// The guest's answer, when all have answered that it waits for.
fn together<'a>(
    op: Op,
    primary: Flow<'a>,
    waited: Vec<(&'a Other, Flow<'a>)>,
    announced: Option<Arc<Announced>>,
    cx: Cx<'a>,
) -> Flow<'a> {
    if waited.is_empty() {
        let Some(announced) = announced else { return primary };
        return primary.then(move |reply| {
            announced.answered(&reply);
            reply
        });
    }
    let (others, flows): (Vec<_>, Vec<_>) = waited.into_iter().unzip();
    let merge = move |mut reply: Reply, replies: Vec<Reply>| {
        announced.iter().for_each(|announced| announced.answered(&reply));
        for (other, found) in others.into_iter().zip(replies) {
            other.leg.ended(cx, op, &found);
            let required = other.duty == Duty::Required;
            match (&announced, required) {
                (Some(announced), true) => announced.answered(&found),
                (Some(announced), false) => announced.landed(),
                (None, _) => {}
            }
            if let (Err(error), true, true) = (found, required, reply.is_ok()) {
                reply = Err(error);
            }
        }
        reply
    };
    Flow::later(async move {
        let (reply, replies) = futures::future::join(primary, join_all(flows)).await;
        merge(reply, replies)
    })
}

impl Element for Tee {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let primary = match &self.setup.primary {
            Some(name) => port(children, "primary", name)?,
            None => 0,
        };
        for (parameter, names) in [("wait", &self.setup.wait), ("required", &self.setup.required)] {
            names.iter().try_for_each(|name| port(children, parameter, name).map(drop))?;
        }
        let Some((_, geometry)) = children.ports.get(primary) else {
            return Err(Error::internal("a tee without a leg"));
        };
        let mut others = Vec::new();
        for (port, (name, leg)) in children.ports.iter().enumerate().filter(|(port, _)| *port != primary) {
            fits(name, leg, geometry)?;
            others.push(Other { port, duty: self.duty(name), leg: self.leg(name) });
        }
        let below = Below { primary, others };
        Ok(Prepared::with(below.geometry(children, *geometry), below))
    }

    fn submit<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        let alone = cx.prepared::<Below>().others.is_empty();
        if alone && self.log.is_none() {
            return cx.forward(0, req);
        }
        let fast = cx.geometry().ops.fast_zero;
        let in_turn = match req.op {
            Op::WriteZeroes if req.flags.has(Flags::FAST_ONLY) => {
                if !fast {
                    return cx.fail(&req, Error::unsupported("writing zeros is not fast on all legs"));
                }
                !alone
            }
            Op::Discard if !alone => {
                if !fast {
                    return Flow::done();
                }
                req.op = Op::WriteZeroes;
                req.flags = req.flags.with(Flags::MAY_UNMAP);
                false
            }
            Op::Read | Op::Write | Op::WriteZeroes | Op::Discard => false,
            Op::Flush | Op::Cache | Op::Extents | Op::Control => false,
        };
        req.stabilise();
        if in_turn {
            return cx.later(&req.clone(), async move {
                let admitted = self.admit(&req, cx).await?;
                self.send_in_turn(admitted, cx).await
            });
        }
        let now = if cx.is_independent(&req) { self.admit_now(&req, cx) } else { None };
        match now {
            Some(admitted) => self.send(admitted, cx),
            None => cx.later(&req.clone(), async move {
                let admitted = self.admit(&req, cx).await?;
                self.send(admitted, cx).await
            }),
        }
    }

    fn get(&self, handler: &str) -> Result<String> {
        let legs: Vec<_> = self.with_legs(|legs| legs.iter().filter_map(Weak::upgrade).collect());
        let list = |legs: Vec<&Arc<Leg>>, value: &dyn Fn(&Leg) -> String| {
            let lines: Vec<_> = legs.iter().map(|leg| format!("{} {}", leg.name, value(leg))).collect();
            lines.join(", ")
        };
        let detached = || legs.iter().filter(|leg| self.duty(&leg.name) == Duty::Detached).collect();
        Ok(match handler {
            "lag" => list(detached(), &|leg| Size(leg.behind()).to_string()),
            "errors" => list(legs.iter().collect(), &|leg| leg.errors.load(Ordering::Relaxed).to_string()),
            "skipped" => list(detached(), &|leg| leg.skipped.load(Ordering::Relaxed).to_string()),
            _ => return Err(Error::no_handler(handler)),
        })
    }
}
