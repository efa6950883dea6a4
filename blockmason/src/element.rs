//! The one trait that every element implements. docs/elements.md is the author's guide.

use crate::error::{Error, Result};
use crate::events::{Event, EventKind};
use crate::geometry::{Geometry, NO_LIMIT};
use crate::luggage::Luggage;
use crate::request::{Reply, Request};
use crate::sched::Cx;
use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

pub use futures::future::{BoxFuture, LocalBoxFuture};

/// A reply that is here, or one that will come.
///
/// A flow stays on the shard it was made on. Dropping one never cancels I/O that was submitted.
#[must_use = "a flow that nobody polls does nothing"]
pub enum Flow<'a> {
    /// Answered at once.
    Now(Reply),
    /// Something has to be waited for.
    Later(LocalBoxFuture<'a, Reply>),
}

impl<'a> Flow<'a> {
    /// Answered: done.
    pub fn done() -> Flow<'a> {
        Flow::Now(Ok(crate::Answer::Done))
    }

    /// Answered with an error.
    pub fn fail(error: Error) -> Flow<'a> {
        Flow::Now(Err(error))
    }

    /// A flow from an async body. What wants to see completions or make several requests is written
    /// so: `Flow::later(async move { ... })`.
    pub fn later(body: impl Future<Output = Reply> + 'a) -> Flow<'a> {
        Flow::Later(Box::pin(body))
    }

    /// Sees the reply, and may change it: inline if it is here, else in one boxed future.
    pub fn then(self, f: impl FnOnce(Reply) -> Reply + 'a) -> Flow<'a> {
        match self {
            Flow::Now(reply) => Flow::Now(f(reply)),
            Flow::Later(flow) => Flow::Later(Box::pin(Then { flow, f: Some(f) })),
        }
    }
}

/// A flow whose reply somebody sees. By hand, since an async block would move the flow and the reply
/// through a state machine: 33 ns a hop instead of 38.
struct Then<'a, F> {
    flow: LocalBoxFuture<'a, Reply>,
    f: Option<F>,
}

impl<F> Unpin for Then<'_, F> {}

impl<F: FnOnce(Reply) -> Reply> Future for Then<'_, F> {
    type Output = Reply;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Reply> {
        let reply = std::task::ready!(self.flow.as_mut().poll(task));
        match self.f.take() {
            Some(f) => Poll::Ready(f(reply)),
            None => Poll::Ready(reply),
        }
    }
}

impl Future for Flow<'_> {
    type Output = Reply;

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Reply> {
        match &mut *self {
            Flow::Later(flow) => flow.as_mut().poll(task),
            Flow::Now(reply) => {
                let gone = Err(Error::internal("a flow was polled after its end"));
                Poll::Ready(std::mem::replace(reply, gone))
            }
        }
    }
}

/// A block element.
///
/// One instance may serve two graphs at once while a reload goes on. So an instance holds only what
/// follows from its own parameters and its stored state; what it derives from its neighbours is
/// computed for each graph by [`prepare`](Element::prepare) and reached through
/// [`Cx::prepared`].
pub trait Element: Any + Send + Sync {
    /// Takes a request. Called on a shard, which it must not block.
    ///
    /// An element that only routes returns `cx.forward(port, req)` as it is. Order: requests in
    /// flight at once may be done in any order; a flush covers what was answered before it came.
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a>;

    /// What this element looks like from above, given what lies below, and what it wants to keep for
    /// this graph. Called once for each graph, bottom up, before any request; changes nothing.
    /// The default suits an element with one out port that changes neither size nor addresses.
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        children.single().map(|geometry| Prepared::of(geometry.above()))
    }

    /// Work of its own: an export's listener, a copier. Started on a home shard after the graph is
    /// open; it ends by itself when `cx.closing()` resolves.
    fn run<'a>(&'a self, _cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        None
    }

    /// Called once when a graph that contains this instance has been built and handed over to,
    /// before [`run`](Element::run): sockets appear, metadata may be written. Returns what is to be
    /// announced (`nbd+unix:///...`), for an export.
    fn open(&self, _cx: &Open<'_>) -> Result<Option<String>> {
        Ok(None)
    }

    /// Of a source: whether its graph begins by [standing by](crate::live::Live::stand_by).
    fn stands_by(&self) -> bool {
        false
    }

    /// The other end of `open`: called when no graph has this instance any more. What is in flight has
    /// ended before; of a source, whose paths go first, not what its clients have asked for. A change
    /// that is undone may open it again.
    fn close(&self) {}

    /// Where the head of what it stores is; none where nothing outlives the process. See
    /// [`crate::heads`].
    fn head(&self) -> Option<crate::heads::HeadPlace> {
        None
    }

    /// It has another name from now on: for what it says of itself outside of requests.
    fn renamed(&self, _name: &str) {}

    /// The file that its requests go to, for whoever must know that its name leads to nothing else; none where
    /// there is no such file, or it is not open.
    fn opened(&self) -> Option<crate::io::Opened> {
        None
    }

    /// The value of a handler that its type declares as readable.
    fn get(&self, handler: &str) -> Result<String> {
        Err(Error::no_handler(handler))
    }

    /// Sets a handler that its type declares as writable.
    fn set(&self, handler: &str, _value: &str) -> Result<()> {
        Err(Error::no_handler(handler))
    }

    /// Calls a handler that its type declares as callable.
    fn call(&self, handler: &str, _argument: &str) -> Result<String> {
        Err(Error::no_handler(handler))
    }

    /// A service that its type declares in [`provides`](crate::describe::ElementType::provides), for an element
    /// whose parameter refers to this one: an `Arc` of the service, boxed. See
    /// [`Build::refer`](crate::describe::Build::refer).
    fn provide(&self, _service: &str) -> Option<Box<dyn Any>> {
        None
    }

    /// Takes over what `old`, an element of the same name and type but with other parameters, has
    /// learnt; leaves it usable, for the change may yet be undone. Nothing is in flight in either.
    /// `(old as &dyn Any).downcast_ref()` gives its own type.
    fn take_state(&self, _old: &dyn Element) -> Result<()> {
        Ok(())
    }

    /// Whether it may leave its graph now. Asked before a graph is replaced by one without this
    /// instance; never when a disk stops, or goes back to an earlier state.
    ///
    /// # Errors
    /// What only it has and would be lost: the change is refused with this reason.
    fn may_leave(&self) -> Result<()> {
        Ok(())
    }

    /// Whether the graph may end although others might open the same disks afterwards. Asked before a graph is unloaded; never
    /// when the process ends, which comes back.
    ///
    /// # Errors
    /// What only this machine has of the disk below: it is not unloaded, unless the operator says so.
    fn may_be_left(&self) -> Result<()> {
        Ok(())
    }

    /// Of a source: whether the clients that are connected can live with another disk `below`, or,
    /// if there is none, without this source. Asked before a graph is replaced.
    ///
    /// # Errors
    /// What was promised to them and could not be kept: the change is refused with this reason.
    fn keeps_clients(&self, _below: Option<&Geometry>) -> Result<()> {
        Ok(())
    }

    /// Of a source: sends away the clients that cannot live with another disk `below`, or all if
    /// there is none.
    fn dismiss_clients(&self, _below: Option<&Geometry>) {}

    /// Whether a successor in another process can go on where this one ends. Asked before anything is
    /// paused.
    ///
    /// # Errors
    /// What only this process has and would be lost: nothing is handed over, for this reason.
    fn may_hand_over(&self) -> Result<()> {
        Ok(())
    }

    /// What the successor in another process needs beyond the parameters and what is stored below: of a
    /// source, its clients. Nothing is in flight, everything has been flushed, work of its own has ended,
    /// and no request enters. Leaves the element usable: the handover may yet be undone, and then goes on
    /// as if nothing had been, which [`Sockets::released`](crate::sched::Sockets::released) tells. From here
    /// to there nothing may be read from clients or sent to them.
    fn hand_over<'a>(&'a self, _leaving: &'a Open<'a>) -> BoxFuture<'a, Result<Luggage>> {
        Box::pin(std::future::ready(Ok(Luggage::none())))
    }

    /// Takes what [`hand_over`](Element::hand_over) of the element in its place has given. Called once,
    /// after [`open`](Element::open), if there is anything. No request may be asked for before the gate
    /// opens, which [`serve`](crate::sched::serve) sees to; nothing may be changed that the other process
    /// would miss if it went on after all.
    ///
    /// # Errors
    /// It cannot go on from there: the other process does.
    fn take_over<'a>(&'a self, luggage: Luggage, _coming: &'a Open<'a>) -> BoxFuture<'a, Result<()>> {
        let taken = match luggage.is_none() {
            true => Ok(()),
            false => Err(Error::unsupported("it has luggage, and this program knows of none")),
        };
        Box::pin(std::future::ready(taken))
    }

    /// The successor has everything and is about to serve, and this process ends without closing
    /// anything. Clients that could not be passed on are told goodbye. Called on no shard; what it
    /// wakes on shards is still polled once.
    fn part(&self) {}
}

/// What lies below an element, by out port.
#[derive(Clone, Copy)]
pub struct Children<'a> {
    /// Each port's name and what is behind it, in the order of the edges.
    pub ports: &'a [(String, Geometry)],
}

impl<'a> Children<'a> {
    /// The geometries, in the order of the edges.
    pub fn iter(&self) -> impl Iterator<Item = Geometry> + 'a {
        self.ports.iter().map(|(_, geometry)| *geometry)
    }

    /// What is behind the only out port.
    pub fn single(&self) -> Result<Geometry> {
        match self.ports {
            [(_, geometry)] => Ok(*geometry),
            ports => Err(Error::internal(format!("one out port was expected, not {}", ports.len()))),
        }
    }
}

/// What `prepare` computes.
pub struct Prepared {
    /// The disk that the element shows upwards.
    pub geometry: Geometry,
    /// What the element keeps for this graph; see [`Cx::prepared`].
    pub state: Option<Box<dyn Any + Send + Sync>>,
    /// How its own requests are made to fit, beyond what lies below asks for.
    pub demand: Demand,
}

/// What is asked of the requests that leave an element, in the words of [`Geometry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// They start and end at multiples of this, a power of two. Whoever else reaches the same disk changes
    /// nothing of a block while the rest of it is read and written.
    pub min_block: u32,
    /// The longest of them, `min_block` at least.
    pub max_len: u32,
}

impl Demand {
    /// Nothing is asked for.
    pub const NONE: Demand = Demand { min_block: 1, max_len: NO_LIMIT };
}

impl Prepared {
    /// Only a geometry.
    pub fn of(geometry: Geometry) -> Prepared {
        Prepared { geometry, state: None, demand: Demand::NONE }
    }

    /// A geometry and something to keep.
    pub fn with(geometry: Geometry, state: impl Any + Send + Sync) -> Prepared {
        Prepared { geometry, state: Some(Box::new(state)), demand: Demand::NONE }
    }

    /// The same, with a demand on the requests that the element sends down.
    pub fn asking(self, demand: Demand) -> Prepared {
        Prepared { demand, ..self }
    }
}

/// What [`Element::open`] is given.
pub struct Open<'a> {
    /// The process that serves.
    pub host: &'a Arc<crate::sched::Host>,
    /// The graph that was handed over to, for sources to admit requests into.
    pub disk: &'a Arc<crate::sched::Disk>,
    /// The element's name.
    pub name: &'a str,
}

impl std::fmt::Debug for dyn Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an element")
    }
}

impl Open<'_> {
    /// Tells the operator something about this element, as an event.
    pub fn notice(&self, message: impl std::fmt::Display) {
        let graph = self.disk.graph();
        let event = Event::new(EventKind::Notice, graph.name(), message).of(self.name);
        self.host.events().publish(event);
    }
}
