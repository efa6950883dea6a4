//! An NBD export: serves what lies below it to NBD clients.

use super::socket::{Mode, rights};
use crate::migrate::map::DirtyMap;
use crate::nbd::attend;
use crate::nbd::listen::{Address, Entry, Listeners, Listening, StdioEnd, Terms};
use crate::nbd::meta::MAX_CONTEXTS;
use crate::nbd::server::TlsPolicy;
use crate::nbd::uri;
use crate::nbd::wire::MAX_STRING;
use crate::parallax::Snapshots;
use blockmason::describe::{Build, ElementType, Family, Ports};
use blockmason::element::BoxFuture;
use blockmason::lang::value::{FilePath, Ref, Uri};
use blockmason::{Cx, Element, Error, Flow, Geometry, Host, Luggage, Open, Request, Result};
use std::net::ToSocketAddrs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

blockmason::words! {
    /// Whether clients may or must use TLS.
    pub enum Tls {
        /// There is none.
        Off = "off",
        /// A client may ask for it.
        Offered = "offered",
        /// Nothing goes on without it.
        Required = "required",
    }
}

blockmason::words! {
    /// Whether clients show certificates.
    pub enum Clients {
        /// They are not asked.
        None = "none",
        /// One that is shown must be valid.
        Optional = "optional",
        /// Nobody gets in without a valid one.
        Required = "required",
    }
}

blockmason::params! {
    /// An NBD export.
    pub struct Params {
        /// Where to listen: `unix:PATH`, or `tcp:ADDRESS:PORT`, which means that address alone. Several
        /// exports may name one listener. Without it the export takes the socket that the service
        /// manager hands over (LISTEN_FDS), or standard input and output (`mason run --stdio`).
        listen: Option<Uri>,
        /// The name that clients ask for. The only export of a listener also answers to none.
        name: String = "",
        /// A line for people, shown in listings.
        description: String = "",
        /// Permission bits of a unix socket. Without them the umask decides.
        mode: Option<Mode>,
        /// Owner of a unix socket, by name or number.
        owner: Option<String>,
        /// Group of a unix socket, by name or number.
        group: Option<String>,
        /// Whether clients may or must use TLS.
        tls: Tls = "off",
        /// Folder with server-cert.pem and server-key.pem, and ca-cert.pem for clients' certificates.
        tls_certificates: Option<FilePath>,
        /// Whether clients show certificates.
        tls_clients: Clients = "none",
        /// Elements whose maps of changes clients may ask for, by `qemu:dirty-bitmap:` and the element's name; the
        /// first one also by `x-mason:dirty`. A map must be that of a disk of the same size.
        dirty_map: Vec<Ref<DirtyMap>>,
        /// The volume that this serves, if clients may ask what has changed since one of its snapshots, by
        /// `x-mason:changed-since:` and the snapshot's name.
        snapshots: Option<Ref<Snapshots>>,
        /// The graph listens and says how large the disk is, and does nothing else before `mason activate`: for a virtual
        /// machine that moves here from another host.
        standby: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "nbd",
    summary: "serves what lies below it to NBD clients",
    doc: "Speaks the NBD protocol, fixed newstyle, with structured replies, block status, extended \
          headers and TLS. Takes any offset and length inside the disk, and up to 64 MiB in one \
          request. Nothing listens on the network unless `listen` says so.\n\n\
          Requests are answered in any order, as the protocol has it. A flush on one connection covers \
          what was answered on all of them before, so clients may use several.\n\n\
          With `dirty_map`, block status tells which parts have changed, or differ from another disk: flag 1 of \
          a context of `log_dirty`. It is answered from the map, and offsets are those of the disk that the map is \
          of: what shifts addresses must not lie between, which the sizes tell only in part. A client that \
          has begun to ask goes on after a change of the graph; of a map that is gone then it hears that all has changed.\n\n\
          With `snapshots`, they may also ask what has changed since a snapshot: that is answered by the volume, so \
          whatever lies between may shift addresses. A client chooses among the snapshots that there are when it \
          connects; asking for one that has been deleted since is an error.\n\n\
          A socket in the file system appears only when it accepts; one that a dead process has left \
          behind is replaced, that of a living one is not.",
    family: Family::Export,
    params: Params::PARAMS,
    ports: Ports::SOURCE,
    passes_through: true,
    example: "element Guest (type nbd) (listen unix:nbd.sock) (name vm1)\n\
              element Memory (type mem) (size 64M)\n\
              Guest -> Memory\n",
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(Nbd::new(build)?)),
    ..ElementType::BASE
};

/// The most maps: clients select among so many contexts, and two are others.
const MOST_MAPS: usize = MAX_CONTEXTS - 2;

struct Nbd {
    params: Params,
    address: Option<Address>,
    terms: Terms,
    /// In the order of the parameter.
    maps: Vec<Arc<DirtyMap>>,
    listening: Mutex<Option<Listening>>,
}

/// Set when exports are to serve standard input and output.
#[derive(Default)]
struct Stdio(AtomicBool);

/// Makes every NBD export of this process that is opened from now on serve one client on standard
/// input and output instead of listening. What it returns is told when the client has gone.
pub fn use_stdio(host: &Host) -> Arc<StdioEnd> {
    host.service(Stdio::default).0.store(true, Ordering::Relaxed);
    host.service(StdioEnd::default)
}

impl Nbd {
    fn new(build: &Build<'_>) -> Result<Nbd> {
        let params = build.read(Params::from)?;
        if params.name.len() > MAX_STRING || params.description.len() > MAX_STRING {
            return Err(Error::invalid(format!("name and description have at most {MAX_STRING} bytes")));
        }
        let address = params.listen.as_ref().map(address_of).transpose()?;
        let rights = rights(params.mode, params.owner.as_deref(), params.group.as_deref())?;
        let terms = Terms {
            rights,
            tls: tls_policy(&params)?,
            rights_written: format!("{rights:?}"),
            tls_written: format!("{:?}", (params.tls, &params.tls_certificates, params.tls_clients)),
        };
        if params.dirty_map.len() > MOST_MAPS {
            return Err(Error::invalid(format!("an export offers at most {MOST_MAPS} maps")));
        }
        let maps = params.dirty_map.iter().map(|map| build.refer(map)).collect::<Result<_>>()?;
        Ok(Nbd { params, address, terms, maps, listening: Mutex::new(None) })
    }
}

impl Nbd {
    /// Whether the maps are of a disk as large as this one.
    fn check_maps(&self, size: u64) -> Result<()> {
        for (map, name) in self.maps.iter().zip(&self.params.dirty_map) {
            if map.size() != size {
                let message = format!(
                    "{name} has the map of a disk of {} bytes, and this export is one of {size}: their offsets differ",
                    map.size()
                );
                return Err(Error::invalid(message));
            }
        }
        Ok(())
    }

    fn listening(&self) -> MutexGuard<'_, Option<Listening>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn address_of(uri: &Uri) -> Result<Address> {
    match uri.scheme() {
        "unix" => Ok(Address::Unix(uri.rest().into())),
        "tcp" => {
            let mut found = uri
                .rest()
                .to_socket_addrs()
                .map_err(|error| Error::io(error, format!("{} is no address and port", uri.rest())))?;
            let none = || Error::invalid(format!("{} is no address", uri.rest()));
            found.next().map(Address::Tcp).ok_or_else(none)
        }
        scheme => Err(Error::invalid(format!("cannot listen on {scheme}:, only on unix: and tcp:"))),
    }
}

#[cfg(feature = "tls")]
fn tls_policy(params: &Params) -> Result<TlsPolicy> {
    use crate::nbd::tls::{ClientCertificates, server_config};
    if params.tls == Tls::Off {
        return Ok(TlsPolicy::Off);
    }
    let Some(folder) = &params.tls_certificates else {
        return Err(Error::invalid("TLS needs (tls_certificates FOLDER)"));
    };
    let clients = match params.tls_clients {
        Clients::None => ClientCertificates::None,
        Clients::Optional => ClientCertificates::Optional,
        Clients::Required => ClientCertificates::Required,
    };
    let config = server_config(&folder.0, clients)?;
    Ok(match params.tls {
        Tls::Required => TlsPolicy::Required(config),
        _ => TlsPolicy::Offered(config),
    })
}

#[cfg(not(feature = "tls"))]
fn tls_policy(params: &Params) -> Result<TlsPolicy> {
    match params.tls {
        Tls::Off => Ok(TlsPolicy::Off),
        _ => Err(Error::unsupported("this program was built without TLS")),
    }
}

impl Element for Nbd {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.forward(0, req)
    }

    fn stands_by(&self) -> bool {
        self.params.standby
    }

    fn open(&self, open: &Open<'_>) -> Result<Option<String>> {
        let graph = open.disk.next_graph().unwrap_or_else(|| open.disk.graph());
        let node = graph.node(open.name).ok_or_else(|| Error::internal("an export is opened in no graph"))?;
        self.check_maps(graph.below(node)?.size)?;
        let stdio = open.host.service(Stdio::default).0.load(Ordering::Relaxed);
        let address = match &self.address {
            _ if stdio => Address::Stdio,
            Some(address) => address.clone(),
            None => Address::Inherited,
        };
        let entry = Entry {
            name: self.params.name.clone(),
            description: self.params.description.clone(),
            disk: open.disk.clone(),
            source: open.name.to_owned(),
            snapshots: self.params.snapshots.as_ref().map(|volume| volume.name().to_owned()),
            dirty_maps: self.params.dirty_map.iter().map(|map| map.name().to_owned()).collect(),
            clients: Arc::default(),
        };
        let listeners = open.host.service(Listeners::default);
        let listening = listeners.add(open.host, address, self.terms.clone(), entry)?;
        let uri = uri(&listening.address, &self.params.name, self.params.tls != Tls::Off);
        *self.listening() = Some(listening);
        Ok(Some(uri))
    }

    fn close(&self) {
        self.listening().take();
    }

    fn keeps_clients(&self, below: Option<&Geometry>) -> Result<()> {
        self.listening().as_ref().map_or(Ok(()), |listening| listening.clients().can_live_with(below))
    }

    fn may_hand_over(&self) -> Result<()> {
        match self.listening().as_ref().map(|listening| &listening.address) {
            Some(Address::Stdio) => {
                Err(Error::unsupported("it serves standard input and output, which end with this process"))
            }
            _ => Ok(()),
        }
    }

    fn hand_over<'a>(&'a self, leaving: &'a Open<'a>) -> BoxFuture<'a, Result<Luggage>> {
        let listening = self.listening();
        let clients = listening.as_ref().map(|listening| (listening.clients().clone(), listening.shaken()));
        drop(listening);
        Box::pin(async move {
            match clients {
                Some((clients, shaken)) => attend::hand_over(leaving.host, &clients, shaken).await,
                None => Ok(Luggage::none()),
            }
        })
    }

    fn take_over<'a>(&'a self, luggage: Luggage, coming: &'a Open<'a>) -> BoxFuture<'a, Result<()>> {
        let entry = self.listening().as_ref().map(|listening| listening.entry().clone());
        Box::pin(async move {
            let entry = entry.ok_or_else(|| Error::internal("clients have come before it listens"))?;
            attend::take_over(coming.host, &entry, luggage).await
        })
    }

    fn part(&self) {
        if let Some(listening) = self.listening().as_ref() {
            listening.clients().part();
        }
    }

    fn dismiss_clients(&self, below: Option<&Geometry>) {
        if let Some(listening) = self.listening().as_ref() {
            listening.clients().dismiss(below);
        }
    }
}

/// What a client is given to connect.
fn uri(address: &Address, name: &str, tls: bool) -> String {
    let address = match address {
        Address::Unix(path) => uri::Address::Unix(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
        Address::Tcp(address) => uri::Address::Tcp { host: address.ip().to_string(), port: address.port() },
        Address::Inherited => return "inherited".to_owned(),
        Address::Stdio => return "stdio".to_owned(),
    };
    uri::Uri { tls, address, export: name.to_owned(), certificates: None, hostname: None }.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_are_given() {
        let unix = |name| uri(&Address::Unix("/run/a b.sock".into()), name, false);
        assert_eq!(unix("vm 1"), "nbd+unix:///vm%201?socket=/run/a%20b.sock");
        let tcp = Address::Tcp("127.0.0.1:10809".parse().unwrap());
        assert_eq!(uri(&tcp, "", true), "nbds://127.0.0.1/");
    }
}
