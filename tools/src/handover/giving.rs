//! The daemon that goes: it is in charge until it has said `go`.

use super::messages::{ControlOffer, GraphOffer, ImageOffer, Message, Offer, SocketOffer};
use super::successor::{Successor, own_program};
use crate::control::daemon::{Daemon, Served};
use crate::control::refusal::Refusal;
use crate::graphs::CATALOGUE;
use crate::run::notify;
use crate::view::{HandedOver, HandoverRequest};
use blockmason::events::{Event, EventKind};
use blockmason::io::Registry;
use blockmason::lang::print;
use blockmason::live::Departing;
use blockmason::sched::Leaving;
use blockmason::{Luggage, rt};
use futures::FutureExt;
use futures::future::join_all;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long requests may wait, and how long the new program may take before, if nobody says.
const DEADLINE: Duration = Duration::from_secs(5);

/// For the new process to hear that it may begin, and to begin: neither takes any time.
const LAST_STEP: Duration = Duration::from_secs(5);

/// Hands everything over. When this returns the new process serves, and this one has to end without touching
/// anything; or nothing has changed but for a pause.
pub(crate) async fn hand_over(
    daemon: &Arc<Daemon>,
    request: &HandoverRequest,
) -> Result<HandedOver, Refusal> {
    let begun = rt::now();
    let deadline = request.deadline_seconds.map_or(Some(DEADLINE), |s| Duration::try_from_secs_f64(s).ok());
    let deadline = deadline.ok_or_else(|| Refusal::invalid("the deadline is no time"))?;
    let program = request.binary.clone().map_or_else(own_program, Ok)?;
    let alone = daemon.begin_handover()?;
    let served = daemon.served();
    let mut held = Vec::new();
    for served in &served {
        let busy = |_| {
            Refusal::busy(format!("{} is being changed: try again when that is done", served.live.name()))
        };
        let saving = served.saving.try_lock().map_err(busy)?;
        served.not_backing_up()?;
        let departing = served.live.depart();
        let departing = departing.map_err(|error| Refusal::in_graph(&error, &served.live.spec()))?;
        held.push((served, departing, saving));
    }
    let graphs: Vec<_> = held.iter().map(|(served, departing, _saving)| (*served, departing)).collect();
    let handed = async {
        let mut successor = prepare(daemon, &program, &graphs, deadline).await?;
        let since = pass(daemon, &mut successor, &graphs, deadline).await?;
        finish(&successor).await?;
        let now = rt::now();
        Ok(HandedOver {
            from: std::process::id(),
            to: successor.pid(),
            took_seconds: (now - begun).as_secs_f64(),
            pause_seconds: (now - since).as_secs_f64(),
        })
    };
    let handed: Result<_, Refusal> = handed.await;
    match &handed {
        Ok(_) => {
            // Nobody changes anything here any more, however long this process may live.
            std::mem::forget((held, alone));
        }
        Err(refusal) => {
            for (served, _) in &graphs {
                let event = Event::new(EventKind::HandoverFailed, served.live.name(), &refusal.message);
                daemon.host.events().publish(event);
            }
        }
    }
    handed
}

type Graphs<'a> = [(&'a Arc<Served>, &'a Departing)];

/// Everything that needs no pause.
async fn prepare(
    daemon: &Daemon,
    program: &Path,
    graphs: &Graphs<'_>,
    deadline: Duration,
) -> Result<Successor, Refusal> {
    let successor = Successor::start(program)?;
    let talk = async {
        let version = successor.greet().await?;
        let (offer, descriptors) = offer(daemon, graphs, version)?;
        successor.send(&Message::Offer(Box::new(offer)), &descriptors).await?;
        drop(descriptors);
        successor.expect(&Message::Prepared).await
    };
    match rt::timeout(deadline, talk).await {
        Some(talked) => talked?,
        None => return Err(late(&successor, "prepared", deadline)),
    }
    for (served, departing) in graphs {
        departing.flush(deadline).await.map_err(|error| Refusal::in_graph(&error, &served.live.spec()))?;
    }
    Ok(successor)
}

fn late(successor: &Successor, what: &str, deadline: Duration) -> Refusal {
    successor.refusal("busy", format!("the new process was not {what} in {deadline:?}"))
}

/// What the new process will serve, with what must be open before it can.
fn offer(daemon: &Daemon, graphs: &Graphs<'_>, version: u32) -> Result<(Offer, Vec<OwnedFd>), Refusal> {
    let mut descriptors = Vec::new();
    let mut put = |descriptor: OwnedFd| {
        descriptors.push(descriptor);
        descriptors.len() - 1
    };
    let graph = |(served, departing): &(&Arc<Served>, &Departing)| GraphOffer {
        name: served.live.name().to_owned(),
        file: served.file.clone(),
        path: served.path.clone(),
        text: print(&departing.spec(), CATALOGUE, Path::new("/")),
        known: served.known(),
    };
    let images = Registry::of_process().carry().map_err(|error| Refusal::of(&error))?;
    let images = images.into_iter().map(|image| ImageOffer {
        path: image.path,
        write: image.access.write,
        direct: image.access.direct,
        graph: image.holder,
        sync_failed: image.sync_failed,
        exclusive: image.exclusive,
        file: put(image.file),
        lock: put(image.lock),
    });
    let images = images.collect();
    let sockets = daemon.host.sockets().carry().map_err(|error| Refusal::of(&error))?;
    let socket = |(address, socket)| SocketOffer { address, descriptor: put(socket) };
    let offer = Offer {
        version,
        graphs: graphs.iter().map(graph).collect(),
        images,
        sockets: sockets.into_iter().map(socket).collect(),
        control: daemon.control().map(|(path, (device, inode))| ControlOffer { path, device, inode }),
    };
    Ok((offer, descriptors))
}

/// Closes the gates, and gives away what is behind them. Returns when the first was closed; the new process
/// has then been told to go. Else everything is as it was before.
async fn pass(
    daemon: &Daemon,
    successor: &mut Successor,
    graphs: &Graphs<'_>,
    deadline: Duration,
) -> Result<Instant, Refusal> {
    let since = rt::now();
    daemon.host.sockets().hold();
    let gates = join_all(graphs.iter().map(|(_, departing)| departing.close_gate())).await;
    let mut leaving = Vec::new();
    let mut refused = None;
    for (gate, (served, _)) in gates.into_iter().zip(graphs) {
        match gate {
            Ok(gate) => leaving.push((*served, gate)),
            Err(error) => refused = Some(Refusal::of(&error)),
        }
    }
    let passed = match refused {
        Some(refusal) => Err(refusal),
        None => {
            let all = AssertUnwindSafe(behind_the_gates(successor, &leaving, deadline, since)).catch_unwind();
            // The deadline of each step is kept by that; this is for what may hang all the same.
            let passed = rt::timeout(deadline.saturating_mul(2).saturating_add(LAST_STEP), all).await;
            let mistake = |_| Err(Refusal::new("internal", "the daemon made a mistake; its log says more"));
            passed.map_or_else(|| Err(late(successor, "ready", deadline)), |p| p.unwrap_or_else(mistake))
        }
    };
    let passed = match passed {
        Ok(()) => let_go(successor, &leaving).await,
        Err(refusal) => Err(refusal),
    };
    if passed.is_err() {
        // Two of them would be one too many.
        successor.end();
        daemon.host.sockets().release();
        for (served, gate) in leaving {
            if let Err(error) = gate.stay().await {
                tracing::error!(graph = served.live.name(), "the gate cannot be opened again: {error}");
            }
        }
    } else {
        // They stay closed until this process ends.
        std::mem::forget(leaving);
    }
    passed.map(|()| since)
}

async fn behind_the_gates(
    successor: &Successor,
    leaving: &[(&Arc<Served>, Leaving)],
    deadline: Duration,
    since: Instant,
) -> Result<(), Refusal> {
    let in_graph = |served: &Served, error| Refusal::in_graph(&error, &served.live.spec());
    let drained = join_all(
        leaving
            .iter()
            .map(async |(served, gate)| gate.drain(deadline).await.map_err(|error| in_graph(served, error))),
    );
    drained.await.into_iter().collect::<Result<(), Refusal>>()?;
    let given = async {
        for (served, gate) in leaving {
            for (element, luggage) in gate.luggage().await.map_err(|error| in_graph(served, error))? {
                let graph = served.live.name().to_owned();
                let Luggage { version, value, fds } = luggage;
                successor.send(&Message::Luggage { graph, element, version, value }, &fds).await?;
            }
        }
        successor.send(&Message::Drained, &[]).await?;
        successor.expect(&Message::Ready).await
    };
    let left = deadline.saturating_sub(rt::now() - since);
    rt::timeout(left, given).await.unwrap_or_else(|| Err(late(successor, "ready", deadline)))
}

/// The point of no return is the new process's word that it has heard: before it has given it, it does nothing.
async fn let_go(successor: &mut Successor, leaving: &[(&Arc<Served>, Leaving)]) -> Result<(), Refusal> {
    notify(sd_notify::NotifyState::MainPid(successor.pid()));
    if let Err(refusal) = heard(successor).await {
        notify(sd_notify::NotifyState::MainPid(std::process::id()));
        return Err(refusal);
    }
    successor.release();
    for (_, gate) in leaving {
        gate.part().await;
    }
    Ok(())
}

async fn heard(successor: &mut Successor) -> Result<(), Refusal> {
    successor.send(&Message::Go, &[]).await?;
    if let Some(heard) = rt::timeout(LAST_STEP, successor.expect(&Message::Going)).await {
        return heard;
    }
    // Once it is dead, what it has said is all that it has said.
    successor.end();
    successor.expect(&Message::Going).await
}

/// Waits until the new process serves. There is no way back: this process does not know what it has done.
async fn finish(successor: &Successor) -> Result<(), Refusal> {
    let served = rt::timeout(LAST_STEP, successor.expect(&Message::Serving)).await;
    if !matches!(served, Some(Ok(()))) {
        tracing::error!("the new process, {}, has failed after everything was handed over", successor.pid());
        std::process::exit(1);
    }
    Ok(())
}
