//! Requests that must not reach persistent storage before others (Block Mason, section 2.4).
//!
//! A dependent travels the graph like any other request, and is held on the edge into a sink until what
//! it depends on has ended. It is held earlier on an edge on which the framework would lock its blocks,
//! and on one into an element that transforms, which may lock some itself: the request that it waits for
//! may need the same ones. Where overlapping requests are ordered, it takes
//! its place after those that it depends on. What is held is in flight, so a graph that is
//! drained waits for it; and as its predecessors were admitted before, they end.
//!
//! All of this hangs off [`Request::extra`](crate::Request::extra), so that other requests pay for the
//! test whether there is any.

mod watch;

#[cfg(test)]
mod tests;

use super::Cx;
use crate::describe::Family;
use crate::element::{Flow, LocalBoxFuture};
use crate::error::{Error, Result};
use crate::graph::{Instance, edge::Edge};
use crate::request::{Op, Origin, Reply, Request};
use futures::future::join_all;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
pub use watch::Until;
use watch::{After, Issue, Place, Token, Watch};

/// What ties a request to others. Its children have the same ties.
#[derive(Clone, Default)]
pub struct Ties {
    /// What others depend on: this request, or the one that it is a child of.
    own: Option<Arc<Token>>,
    after: Vec<After>,
    /// True once a flush of something above covers what this request does below.
    covered: bool,
}

impl fmt::Debug for Ties {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = self.own.as_ref().map(|token| token.0.id);
        let after: Vec<_> = self.after.iter().map(|after| (after.watch.id, after.until)).collect();
        f.debug_struct("Ties").field("own", &own).field("after", &after).finish()
    }
}

fn ties(req: &Request) -> Option<&Ties> {
    req.extra.as_ref().map(|extra| &extra.ties)
}

fn ties_mut(req: &mut Request) -> &mut Ties {
    &mut req.extra.get_or_insert_default().ties
}

impl<'a> Cx<'a> {
    /// Lets `dependent` not be issued to a sink before `independent` has come as far as `until`. To be
    /// called before either is forwarded; both get an id if they have none.
    ///
    /// The independent counts as completed when the flow ends that its caller gets for it from
    /// [`forward`](Self::forward), [`scatter`](Self::scatter), [`broadcast`](Self::broadcast), or by
    /// [`detach`](Self::detach); its children, made by hand, are not enough. If it fails, or that flow is
    /// dropped before it ended, or the independent itself before it was issued, the dependent fails
    /// and is not issued. For [`Until::Durable`], what the independent has reached is flushed then:
    /// sinks, and elements that transform data, since they may keep some back. Dependents that wait for
    /// the same one share a flush.
    ///
    /// A request may depend on several, and be depended on. Of one that has been duplicated
    /// ([`leg`](Self::leg)), the dependent waits on each leg for what went down that leg only.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) if each would wait for the other, directly or not, or if
    /// too many requests depend on each other to find out.
    pub fn add_dependency(
        self,
        dependent: &mut Request,
        independent: &mut Request,
        until: Until,
    ) -> Result<()> {
        self.number(dependent);
        let watch = self.watched(independent);
        let own = ties(dependent).and_then(|ties| ties.own.as_ref());
        let lineage: Vec<_> = own.into_iter().flat_map(|token| token.0.lineage()).collect();
        if dependent.id == independent.id || watch.waits_for(&lineage)? {
            let (a, b) = (dependent.id, independent.id);
            let message = format!("request {a} cannot depend on request {b}, which waits for it");
            return Err(Error::invalid(message).in_element(self.name()));
        }
        lineage.iter().for_each(|own| own.add_predecessor(&watch));
        watch.await_it();
        ties_mut(dependent).after.push(After { watch, until, path: Vec::new() });
        Ok(())
    }

    /// Lets others depend on `req` later, when it is on its way already: on a clone of it that is kept.
    /// To be called before it is forwarded; not needed for one that is an independent by then.
    pub fn watch(self, req: &mut Request) {
        self.watched(req);
    }

    /// True if nothing holds `req` back: all that it depends on has come as far as it must.
    pub fn is_independent(self, req: &Request) -> bool {
        ties(req).is_none_or(|ties| ties.after.iter().all(After::is_over))
    }

    /// Waits for all that `req` depends on. For elements that give requests places in an order of
    /// their own, or hold something while they work: a request that waits further down meanwhile could
    /// wait for one that comes after it.
    ///
    /// # Errors
    /// One of them has failed.
    pub async fn await_dependencies(self, req: &mut Request) -> Result<()> {
        if ties(req).is_some_and(|ties| !ties.after.is_empty()) {
            release(self, req).await?;
        }
        Ok(())
    }

    /// A child of `req` for an element that sends the same to several of its out ports, and may answer
    /// before all of them have. What depends on `req` waits on each port for that port's leg alone, and
    /// fails only with it. Made for every port before `req` is answered.
    pub fn leg(self, req: &Request, port: usize) -> Request {
        let mut child = self.child(req);
        let (id, op, offset) = (child.id, child.op, child.offset);
        let Some(extra) = child.extra.as_mut() else { return child };
        let ties = &mut extra.ties;
        let place = Place { element: self.instance().clone(), port };
        ties.after.iter_mut().for_each(|after| after.path.push(place.clone()));
        if let Some(above) = ties.own.take() {
            let named = Request { id, ..Request::new(op, offset, 0) };
            let watch = Watch::new(&named, self.name(), Arc::downgrade(&above.0), true);
            let watch = Arc::new(watch);
            ties.after.iter().for_each(|after| watch.add_predecessor(&after.watch));
            above.0.add_leg(place, above.0.id == req.id, watch.clone());
            ties.own = Some(Arc::new(Token(watch)));
        }
        child
    }

    fn instance(self) -> &'a Arc<Instance> {
        &self.lane.graph.nodes[self.node as usize].instance
    }

    fn number(self, req: &mut Request) {
        if req.id == 0 {
            req.id = self.lane.shard.next_id();
            req.root = if req.root == 0 { req.id } else { req.root };
        }
    }

    /// What others see of `req` when they depend on it.
    fn watched(self, req: &mut Request) -> Arc<Watch> {
        self.number(req);
        let (id, ties) = (req.id, ties_mut(req));
        if let Some(token) = ties.own.as_ref().filter(|token| token.0.id == id) {
            return token.0.clone();
        }
        let parent = ties.own.as_ref().map_or(Weak::new(), |token| Arc::downgrade(&token.0));
        // What is flushed for this one lies below here.
        let counts_above = !std::mem::take(&mut ties.covered);
        let after: Vec<_> = ties.after.iter().map(|after| after.watch.clone()).collect();
        let watch = Arc::new(Watch::new(req, self.name(), parent, counts_above));
        after.iter().for_each(|after| watch.add_predecessor(after));
        ties_mut(req).own = Some(Arc::new(Token(watch.clone())));
        watch
    }
}

/// True if `req` is tied to others.
pub(super) fn is_tied(req: &Request) -> bool {
    ties(req).is_some_and(|ties| ties.own.is_some() || !ties.after.is_empty())
}

/// Hands on a request that is tied to others, over the edge to `below`.
pub(super) fn forward<'a>(below: Cx<'a>, edge: &'a Edge, req: Request) -> Flow<'a> {
    let ordered = edge.order.as_ref().filter(|_| req.op.locks() && req.len > 0);
    hold(below, edge, req, move |req| {
        let after = ties(&req).map_or(&[][..], |ties| &ties.after);
        let Some(order) = ordered.filter(|order| !after.iter().all(|after| after.has_passed(order.leader())))
        else {
            return super::fit::in_order(below, edge, req);
        };
        Flow::later(async move {
            for after in ties(&req).map_or(&[][..], |ties| &ties.after) {
                let passed = after.passed(order.leader()).await;
                passed.map_err(|error| error.in_element(below.name()).at(req.op.name(), req.offset))?;
            }
            super::fit::in_order(below, edge, req).await
        })
    })
}

/// True for a sink, and for an element that may do something of its own with a request, or keep it.
fn is_end(cx: Cx<'_>) -> bool {
    cx.outs() == 0 || matches!(cx.instance().ty.family, Family::Transform | Family::Parallax)
}

/// Goes on with a request that is tied to others when it need not wait on the edge to `below`.
pub(super) fn hold<'a>(
    below: Cx<'a>,
    edge: &'a Edge,
    mut req: Request,
    go: impl FnOnce(Request) -> Flow<'a> + 'a,
) -> Flow<'a> {
    let issued = issue(&req);
    reach(below, &mut req);
    let locks = edge.locks && req.op.changes_data();
    if !(is_end(below) || locks) || below.is_independent(&req) {
        return issued.over(go(req));
    }
    let (op, offset) = (req.op, req.offset);
    issued.over(Flow::later(async move {
        let released = release(below, &mut req).await;
        released.map_err(|error| error.in_element(below.name()).at(op.name(), offset))?;
        go(req).await
    }))
}

/// Remembers that `req` has taken its place among overlapping requests, if there is one on this edge.
pub(super) fn has_passed(edge: &Edge, req: &Request) {
    let own = ties(req).and_then(|ties| ties.own.as_ref());
    if let (Some(order), Some(token)) = (&edge.order, own.filter(|token| token.0.id == req.id)) {
        token.0.pass(order.leader());
    }
}

/// Waits for all that `req` depends on; then it is free of it.
async fn release(cx: Cx<'_>, req: &mut Request) -> Result<()> {
    let all = std::mem::take(&mut ties_mut(req).after);
    for after in &all {
        after.ended().await?;
    }
    // All have ended: what is flushed from now on covers them.
    let mut points: Vec<(Arc<Instance>, &After)> = Vec::new();
    for after in &all {
        let mut reached = Vec::new();
        after.unflushed(&mut reached);
        reached.retain(|point| !points.iter().any(|(known, _)| Arc::ptr_eq(known, point)));
        points.extend(reached.into_iter().map(|point| (point, after)));
    }
    let root = req.root;
    let flushes = points
        .iter()
        .map(async |(point, after)| flush(cx, point, root).await.map_err(|error| after.not_durable(&error)));
    join_all(flushes).await.into_iter().collect::<Result<()>>()?;
    all.iter().for_each(After::flushed);
    Ok(())
}

/// Flushes one element, together with whoever else wants that now.
async fn flush(cx: Cx<'_>, point: &Arc<Instance>, root: u64) -> Result<()> {
    let nodes = &cx.lane.graph.nodes;
    let Some(node) = nodes.iter().position(|node| Arc::ptr_eq(&node.instance, point)) else {
        let message = format!("{} is not there any more to be flushed", point.name);
        return Err(Error::new(crate::Kind::Unavailable, message));
    };
    let there = Cx { lane: cx.lane, node: node as u32 };
    let once = async || {
        let (id, origin) = (cx.lane.shard.next_id(), Origin::Internal);
        there.submit(Request { id, root, origin, ..Request::flush() }).await.map(drop)
    };
    point.flushes.run(once).await
}

/// Remembers that `req` enters the element at `below`, if that is where it will have to be flushed.
fn reach(below: Cx<'_>, req: &mut Request) {
    let (instance, end) = (below.instance(), is_end(below));
    let Some(ties) = req.extra.as_mut().map(|extra| &mut extra.ties).filter(|ties| end && !ties.covered)
    else {
        return;
    };
    if let (Some(token), true) = (&ties.own, req.op.changes_data() || req.op == Op::Control) {
        token.0.reach(instance);
        ties.covered = true;
    }
}

/// To be called where a request is issued: if others depend on it, and this is the first place, what
/// becomes of its flow is what becomes of it.
pub(super) fn issue(req: &Request) -> Issuing {
    let token = ties(req).and_then(|ties| ties.own.as_ref());
    let own = token.filter(|token| token.0.id == req.id && token.0.issue());
    Issuing(own.map(|token| Issue(token.0.clone())))
}

/// A request that is being issued.
pub(super) struct Issuing(Option<Issue>);

impl Issuing {
    /// Sees its flow to the end.
    pub(super) fn over<'a>(self, flow: Flow<'a>) -> Flow<'a> {
        let Some(issue) = self.0 else { return flow };
        match flow {
            Flow::Now(reply) => {
                issue.end(&reply);
                Flow::Now(reply)
            }
            Flow::Later(flow) => Flow::Later(Box::pin(Issued { flow, issue: Some(issue) })),
        }
    }
}

struct Issued<'a> {
    // Dropped first: what it holds has gone before others hear that it has been cancelled.
    flow: LocalBoxFuture<'a, Reply>,
    issue: Option<Issue>,
}

impl Future for Issued<'_> {
    type Output = Reply;

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Reply> {
        let reply = ready!(self.flow.as_mut().poll(task));
        if let Some(issue) = self.issue.take() {
            issue.end(&reply);
        }
        Poll::Ready(reply)
    }
}
