//! Serving a front-end from its first message to its last, also where that was on another process.

use super::device::Device;
use super::export::{Lease, Place, Served as FrontEndServed};
use super::queue::News;
use super::session::{Session, carry};
use super::socket::{Received, Socket};
use super::wire::{self, Message};
use crate::export::clients::{Admitted, Promise};
use blockmason::luggage::Descriptors;
use blockmason::sched::{Served, Sockets};
use blockmason::{Error, Host, Kind, Luggage, Result};
use futures::future::join_all;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

/// A front-end that does not read its answers for so long is cut off.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a message may take that is being worked on when everything is handed over.
const MESSAGE: Duration = Duration::from_secs(1);

/// The same of a front-end whose queues do not run: one that says or reads nothing must not hold up all others.
const GRACE: Duration = Duration::from_millis(50);

/// The form of what is handed over to another process.
const VERSION: u32 = 1;

/// Asks whoever serves a front-end for what another process needs, and to do nothing from then on until
/// [`Sockets::released`](blockmason::sched::Sockets::released).
pub(super) type Ask = oneshot::Sender<Result<Option<Packed>>>;

/// A front-end without its process.
pub(super) struct Packed {
    written: Written,
    fds: Vec<OwnedFd>,
}

/// A front-end as it is written down. Descriptors by their place among its own.
#[derive(Serialize, Deserialize)]
struct Written {
    /// How many of the luggage's descriptors are its own, after those of the front-ends before.
    descriptors: usize,
    socket: usize,
    /// What has come of a message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    received: Vec<u8>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    received_descriptors: Vec<usize>,
    size: u64,
    writable: bool,
    /// The size that it was told of last.
    told: u64,
    #[serde(flatten)]
    session: carry::Written,
}

#[derive(Serialize, Deserialize)]
struct AllWritten {
    front_ends: Vec<Written>,
}

/// A front-end that is connected.
struct FrontEnd {
    socket: Socket,
    session: Session,
    news: mpsc::UnboundedReceiver<(usize, News)>,
    promise: Promise,
    /// The size that it was told of last.
    told: u64,
}

/// What is waited for.
enum Next {
    Message(std::io::Result<Option<Received>>),
    News(Option<(usize, News)>),
    Asked(Ask),
    Closing,
    Dismissed,
    Changed,
}

/// Serves one that has just connected.
pub(super) async fn serve_front_end(stream: UnixStream, device: &Arc<Device>, place: Place) {
    let Ok(disk) = device.geometry() else { return };
    device.look_at_record();
    let (reporter, news) = mpsc::unbounded_channel();
    let front_end = FrontEnd {
        socket: Socket::new(stream),
        session: Session::new(device, reporter),
        news,
        promise: Promise { size: disk.size, writable: !disk.read_only },
        told: disk.size,
    };
    attend(front_end, device, place, |_| {}).await;
}

/// Serves a front-end. `admitted` hears whether it may come in.
async fn attend(mut front_end: FrontEnd, device: &Device, place: Place, admitted: impl FnOnce(bool)) {
    let export = device.source.as_str();
    let Some(mut admission) = device.clients.admit(front_end.promise, &device.disk, export) else {
        admitted(false);
        return tracing::info!(export, "the disk changed while a front-end came");
    };
    admitted(true);
    tracing::info!(export, "a front-end has come");
    match front_end.work(device, place, &mut admission).await {
        Ok(why) => tracing::info!(export, "a front-end has gone: {why}"),
        Err(why) => device.complain(&format!("a front-end is cut off: {why}")),
    }
}

impl FrontEnd {
    /// Does what it says. Returns why that has ended.
    ///
    /// # Errors
    /// What it has done wrong.
    async fn work(
        &mut self,
        device: &Device,
        mut place: Place,
        admission: &mut Admitted<'_>,
    ) -> Result<&'static str, String> {
        let sockets = device.disk.host().sockets();
        let mut closing = device.closing();
        let mut changes = device.disk.changes();
        // Another process may be in charge, still or already.
        tokio::select! {
            biased;
            () = sockets.released() => {}
            Some(ask) = place.asked.recv() => self.be_carried(ask, sockets).await,
        }
        loop {
            place.set_runs(self.session.runs());
            let next = tokio::select! {
                biased;
                news = self.news.recv() => Next::News(news),
                Some(ask) = place.asked.recv() => Next::Asked(ask),
                _ = admission.dismissed.wait_for(|dismissed| *dismissed) => Next::Dismissed,
                _ = closing.wait_for(|closing| *closing), if !self.session.runs() => Next::Closing,
                _ = changes.changed() => Next::Changed,
                message = self.socket.receive() => Next::Message(message),
            };
            match next {
                Next::Message(Ok(None)) => return Ok("it has disconnected"),
                Next::Message(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Ok("it has disconnected");
                }
                Next::Message(Err(error)) => return Err(error.to_string()),
                Next::Message(Ok(Some(received))) => self.answer(received, device).await?,
                Next::News(Some((index, News::Ended(served)))) => {
                    self.session.ended(index);
                    if matches!(served, Served::Closing | Served::Gone) && !self.session.runs() {
                        return Ok("the disk has closed");
                    }
                }
                Next::News(_) => return Ok("it cannot be served any more"),
                Next::Closing => return Ok("the disk closes"),
                Next::Dismissed => {
                    // What is in flight is completed; the guest learns of it if it comes again.
                    let _ = self.session.stop_all().await;
                    return Ok("it was sent away");
                }
                Next::Changed => {
                    if let Some(disk) = device.geometry().ok().filter(|disk| disk.size != self.told) {
                        self.told = disk.size;
                        self.promise.size = self.promise.size.max(disk.size);
                        admission.promise_size(disk.size);
                        self.session.config_changed();
                    }
                }
                Next::Asked(ask) => self.be_carried(ask, sockets).await,
            }
        }
    }

    /// Tells what another process needs, and does nothing until it is known that there is none.
    async fn be_carried(&self, ask: Ask, sockets: &Sockets) {
        // Whoever asked may have given up.
        let _ = ask.send(self.carry().await);
        sockets.released().await;
    }

    /// Does what a message asks for, and answers it.
    ///
    /// # Errors
    /// Why the session cannot go on.
    async fn answer(&mut self, received: Received, device: &Device) -> Result<(), String> {
        let Received { header, payload, fds } = received;
        let message = Message::parse(header.code, &payload)
            .map_err(|why| format!("{why}, number {} with {} bytes", header.code, payload.len()))?;
        let (least, most) = message.fds();
        if fds.len() < least || fds.len() > most {
            return Err(format!("a message with {} descriptors, number {}", fds.len(), header.code));
        }
        let answers = message.has_answer();
        let acknowledge = header.need_reply && self.session.acknowledges() && !answers;
        let outcome = self.session.handle(message, fds).await;
        let (payload, fd) = match outcome {
            Ok(Some(answer)) => (answer.payload, answer.fd),
            Ok(None) if acknowledge => (0u64.to_ne_bytes().to_vec(), None),
            Ok(None) => return Ok(()),
            Err(error) if acknowledge => {
                device
                    .complain(&format!("a front-end's message, number {}, is refused: {error}", header.code));
                (1u64.to_ne_bytes().to_vec(), None)
            }
            Err(error) => return Err(format!("{error} (message number {})", header.code)),
        };
        let bytes = wire::reply(header.code, &payload);
        let send = self.socket.send(&bytes, fd.as_ref().map(AsFd::as_fd));
        match blockmason::rt::timeout(PATIENCE, send).await {
            Some(sent) => sent.map_err(|error| error.to_string()),
            None => Err("it does not read its answers".to_owned()),
        }
    }

    /// What another process needs to go on; None if there is no going on.
    async fn carry(&self) -> Result<Option<Packed>> {
        let mut fds = Descriptors::default();
        let Some(session) = self.session.carry(&mut fds).await? else { return Ok(None) };
        let (bytes, pending) = self.socket.received();
        let written = Written {
            socket: fds.put(self.socket.stream())?,
            received: bytes.to_vec(),
            received_descriptors: pending.iter().map(|fd| fds.put(fd)).collect::<Result<_>>()?,
            size: self.promise.size,
            writable: self.promise.writable,
            told: self.told,
            session,
            descriptors: 0,
        };
        let fds = fds.into_fds();
        Ok(Some(Packed { written: Written { descriptors: fds.len(), ..written }, fds }))
    }

    /// One that another process has served so far.
    async fn resume(packed: Packed, device: &Arc<Device>) -> Result<FrontEnd> {
        let Packed { written, fds } = packed;
        let mut fds = Descriptors::from(fds);
        let stream = StdStream::from(fds.take(written.socket)?);
        let stream = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
        let stream = stream.map_err(|error| Error::io(error, "a front-end's descriptor is of no use"))?;
        let pending = written.received_descriptors.into_iter().map(|place| fds.take(place));
        let pending = pending.collect::<Result<_>>()?;
        let (reporter, news) = mpsc::unbounded_channel();
        Ok(FrontEnd {
            socket: Socket::resume(stream, written.received, pending),
            session: Session::resume(device, reporter, written.session, &mut fds).await?,
            news,
            promise: Promise { size: written.size, writable: written.writable },
            told: written.told,
        })
    }
}

/// The front-ends of an export, for another process. Its disk's gate is closed, and nothing is in flight. One that has
/// no queue that runs, and does not come to the end of a message, is left behind: it loses nothing but its connection.
///
/// # Errors
/// [`Kind::Busy`] if one whose queues run is in the middle of something.
pub(super) async fn hand_over(lease: &Lease) -> Result<Luggage> {
    // All at once: the gate is closed.
    let carried = join_all(lease.present().into_iter().map(ask)).await;
    let (mut front_ends, mut fds) = (Vec::new(), Vec::new());
    for packed in carried.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten() {
        front_ends.push(packed.written);
        fds.extend(packed.fds);
    }
    Ok(Luggage { fds, ..Luggage::of(VERSION, &AllWritten { front_ends })? })
}

async fn ask(of: FrontEndServed) -> Result<Option<Packed>> {
    let (answer, answered) = oneshot::channel();
    let runs = of.runs.load(Ordering::Relaxed);
    // One that has gone meanwhile says nothing.
    let _ = of.ask.send(answer);
    match blockmason::rt::timeout(if runs { MESSAGE } else { GRACE }, answered).await {
        Some(Ok(carried)) => carried,
        Some(Err(_)) => Ok(None),
        None if runs => {
            Err(Error::new(Kind::Busy, "a virtual machine is being set up or stopped: try again"))
        }
        None => Ok(None),
    }
}

/// Goes on with the front-ends of another process. Their requests wait at the gate.
///
/// # Errors
/// One of them cannot be served here.
pub(super) async fn take_over(host: &Arc<Host>, lease: &Arc<Lease>, luggage: Luggage) -> Result<()> {
    let all: AllWritten = luggage.read(VERSION)?;
    let mut fds = luggage.fds.into_iter();
    for written in all.front_ends {
        let own = fds.by_ref().take(written.descriptors).collect();
        let packed = Packed { written, fds: own };
        let place = lease.enter().ok_or_else(|| Error::invalid("too many front-ends were handed over"))?;
        let (device, (answer, answered)) = (lease.device.clone(), oneshot::channel());
        host.background(move || async move {
            match FrontEnd::resume(packed, &device).await {
                Err(error) => drop(answer.send(Err(error))),
                Ok(front_end) => attend(front_end, &device, place, |in_time| tell(answer, in_time)).await,
            }
        })?;
        answered.await.map_err(|_| Error::internal("a front-end was lost on its way"))??;
    }
    Ok(())
}

fn tell(answer: oneshot::Sender<Result<()>>, admitted: bool) {
    let message = "a virtual machine was told what the disk here does not keep";
    let outcome = if admitted { Ok(()) } else { Err(Error::new(Kind::Busy, message)) };
    // Whoever asks waits for this; if not, nobody has to be told.
    let _ = answer.send(outcome);
}
