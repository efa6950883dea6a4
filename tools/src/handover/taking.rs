//! The daemon that comes: what it must not do before the old one has let go, it cannot do by accident: gates
//! are closed, sockets are held, and whatever fails ends the process where it is, with no path removed.

use super::messages::{GraphOffer, ImageOffer, MAGIC, Message, Offer, VERSIONS};
use super::wire::Channel;
use crate::control::daemon::{Daemon, Served};
use crate::failure::{Failure, sentence};
use crate::graphs::{CATALOGUE, Reader};
use crate::left::parse_printed;
use crate::socket::Published;
use blockmason::io::{Access, Carried, Claims, Registry};
use blockmason::lang::Spec;
use blockmason::live::{Arriving, Live, Setup};
use blockmason::luggage::Descriptors;
use blockmason::{Host, Luggage, rt};
use futures::FutureExt;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;

/// Between the end of the old process's socket and that of the process itself.
const END: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A daemon that serves what another process has served, and the path of its control socket.
pub(crate) struct Taken {
    pub(crate) daemon: Arc<Daemon>,
    pub(crate) published: Option<Published>,
    channel: Channel,
}

impl Taken {
    /// Tells the old process that it is not needed any more.
    pub(crate) async fn serving(&self) {
        // It may have ended before.
        let _ = self.channel.send(&Message::Serving, &[]).await;
    }
}

/// Takes over from the process at standard input. Returns when that has let go and requests are admitted;
/// if it does not come to that, ends this process.
pub(crate) async fn take_over(host: Arc<Host>, reader: Reader) -> Taken {
    // Nothing may be dropped: what is open here is the old process's, too, its paths as well.
    match AssertUnwindSafe(take(host, reader)).catch_unwind().await {
        Ok(Ok(taken)) => taken,
        Ok(Err(failure)) => {
            tracing::info!("nothing was taken over: {failure}");
            std::process::exit(1);
        }
        Err(_) => std::process::exit(1),
    }
}

async fn take(host: Arc<Host>, reader: Reader) -> Result<Taken, Failure> {
    let old = Old::at_stdin()?;
    let taken = arrive(&old, host, reader).await;
    let (arrived, daemon) = match taken {
        Ok(taken) => taken,
        Err(failure) => {
            // It waits for this, or has given up.
            let _ = old.channel.send(&Message::Refused { sentence: failure.to_string() }, &[]).await;
            return Err(failure);
        }
    };
    old.let_go().await?;
    for (served, arriving) in arrived {
        arriving.begin().await.map_err(|error| Failure::from_error(&error))?;
        if let Err(refusal) = daemon.adopt(served) {
            tracing::error!("{}", refusal.message);
        }
    }
    daemon.host.sockets().release();
    let published = daemon.control().map(|(path, identity)| Published::of(path, identity));
    Ok(Taken { daemon, published, channel: old.channel })
}

type Arrived = Vec<(Arc<Served>, Arriving)>;

/// Everything before the old process lets go.
async fn arrive(old: &Old, host: Arc<Host>, reader: Reader) -> Result<(Arrived, Arc<Daemon>), Failure> {
    let hello = Message::Hello {
        magic: MAGIC.to_owned(),
        versions: VERSIONS.to_vec(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    old.channel.send(&hello, &[]).await.map_err(Failure::new)?;
    let (Message::Offer(offer), descriptors) = old.receive().await? else {
        return Err(Failure::new("the old process offers nothing"));
    };
    let mut descriptors = Descriptors::from(descriptors);
    let Offer { graphs, images, sockets, control, .. } = *offer;
    let sockets =
        sockets.into_iter().map(|socket| Ok((socket.address, taken(&mut descriptors, socket.descriptor)?)));
    host.sockets().hold();
    host.sockets().expect(sockets.collect::<Result<Vec<_>, Failure>>()?);
    let claims = expect(images, &mut descriptors)?;
    let graphs = graphs.into_iter().map(parsed).collect::<Result<Vec<_>, Failure>>()?;
    let daemon = Arc::new(Daemon::new(host, reader));
    if let Some(control) = control {
        daemon.set_control(control.path, (control.device, control.inode));
    }
    old.channel.send(&Message::Prepared, &[]).await.map_err(Failure::new)?;
    let mut luggage = old.luggage().await?;
    let mut arrived = Vec::new();
    for (offer, spec) in graphs {
        let own = luggage.extract_if(.., |piece| piece.graph == offer.name).collect();
        arrived.push(build(&daemon, offer, spec, &claims, own).await?);
    }
    if let Some(piece) = luggage.first() {
        return Err(Failure::new(format!(
            "there is luggage of a graph {}, which was not offered",
            piece.graph
        )));
    }
    old.channel.send(&Message::Ready, &[]).await.map_err(Failure::new)?;
    Ok((arrived, daemon))
}

/// What an element has given.
struct Piece {
    graph: String,
    element: String,
    luggage: Luggage,
}

/// Builds and opens a graph, and takes over what its elements are given.
async fn build(
    daemon: &Daemon,
    offer: GraphOffer,
    spec: Spec,
    claims: &Claims,
    luggage: Vec<Piece>,
) -> Result<(Arc<Served>, Arriving), Failure> {
    let named = |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", offer.name));
    let state_dir = daemon.host.state_dir().to_owned();
    let setup = Setup { catalogue: CATALOGUE, name: offer.name.clone(), state_dir };
    let arriving = Live::arrive(&daemon.host, setup, spec, || claims.settle(&offer.name)).await;
    let arriving = arriving.map_err(|error| named(&sentence(&error)))?;
    for Piece { element, luggage, .. } in luggage {
        arriving.take_over(&element, luggage).await.map_err(|error| named(&sentence(&error)))?;
    }
    let served = daemon.arrived(arriving.live().clone(), &offer.file, &offer.path, offer.known);
    Ok((served.map_err(|refusal| named(&refusal.message))?, arriving))
}

/// The graph of an offer. Its text was printed by a checked graph; by another version of this program, maybe.
fn parsed(offer: GraphOffer) -> Result<(GraphOffer, Spec), Failure> {
    let name = PathBuf::from(format!("{} (as it ran)", offer.file));
    let parsed = parse_printed(&name, &offer.path, offer.text.clone());
    let spec = parsed.map_err(|diagnostics| {
        Failure::new(format!("the graph is not good for the new program: {}", diagnostics.first_line()))
    })?;
    Ok((offer, spec))
}

/// Puts the images where graphs will look for them.
fn expect(images: Vec<ImageOffer>, descriptors: &mut Descriptors) -> Result<Claims, Failure> {
    let carried = images.into_iter().map(|image| {
        Ok(Carried {
            path: image.path,
            access: Access { write: image.write, direct: image.direct },
            holder: image.graph,
            sync_failed: image.sync_failed,
            exclusive: image.exclusive,
            file: taken(descriptors, image.file)?,
            lock: taken(descriptors, image.lock)?,
        })
    });
    let carried = carried.collect::<Result<Vec<_>, Failure>>()?;
    Registry::of_process().expect(carried).map_err(|error| Failure::from_error(&error))
}

fn taken(descriptors: &mut Descriptors, place: usize) -> Result<OwnedFd, Failure> {
    descriptors.take(place).map_err(|error| Failure::from_error(&error))
}

/// The old process.
struct Old {
    channel: Channel,
    /// Readable once it has ended.
    process: OwnedFd,
}

impl Old {
    /// The one that has started this process.
    fn at_stdin() -> Result<Old, Failure> {
        let none = || Failure::Usage("--inherit is how `mason handover` starts a program".to_owned());
        let socket = std::io::stdin().as_fd().try_clone_to_owned().map_err(Failure::new)?;
        let peer = rustix::net::sockopt::socket_peercred(&socket).map_err(|_| none())?;
        let process = pidfd_open(peer.pid, PidfdFlags::NONBLOCK).map_err(|_| none())?;
        if Some(peer.pid) != rustix::process::getppid() {
            return Err(none());
        }
        // The other end must see this process end, whatever it starts.
        let nothing = std::fs::File::open("/dev/null").map_err(Failure::new)?;
        rustix::stdio::dup2_stdin(&nothing).map_err(Failure::new)?;
        Ok(Old { channel: Channel::new(socket).map_err(Failure::new)?, process })
    }

    async fn receive(&self) -> Result<(Message, Vec<OwnedFd>), Failure> {
        let broken = |error| Failure::new(format!("the old process says nothing more: {error}"));
        self.channel.receive().await.map_err(broken)
    }

    /// Everything that its elements give.
    async fn luggage(&self) -> Result<Vec<Piece>, Failure> {
        let mut all = Vec::new();
        loop {
            match self.receive().await? {
                (Message::Luggage { graph, element, version, value }, fds) => {
                    all.push(Piece { graph, element, luggage: Luggage { version, value, fds } });
                }
                (Message::Drained, _) => return Ok(all),
                (other, _) => {
                    return Err(Failure::new(format!(
                        "the old process says `{}` amid its luggage",
                        other.name()
                    )));
                }
            }
        }
    }

    /// Waits until it does nothing any more: it says so, or has ended. An end of its socket alone is none: it
    /// may be about to kill this process.
    async fn let_go(&self) -> Result<(), Failure> {
        match self.channel.receive::<Message>().await {
            Ok((Message::Go, _)) => {
                // If it cannot hear this any more, it has ended.
                let _ = self.channel.send(&Message::Going, &[]).await;
                return Ok(());
            }
            Ok((other, _)) => {
                return Err(Failure::new(format!("the old process says `{}`, not `go`", other.name())));
            }
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {}
            Err(error) => return Err(Failure::new(format!("the old process is not understood: {error}"))),
        }
        match self.has_ended().await {
            true => {
                tracing::warn!("the old process has ended before it said that it would; this one goes on");
                Ok(())
            }
            false => Err(Failure::new("the old process goes on")),
        }
    }

    /// Whether its process ends soon.
    async fn has_ended(&self) -> bool {
        let Ok(process) = self.process.try_clone() else { return false };
        let wait = move || {
            let mut watched = [PollFd::new(&process, PollFlags::IN)];
            poll(&mut watched, Some(&END)).is_ok_and(|ended| ended > 0)
        };
        rt::blocking(wait).await.unwrap_or(false)
    }
}
