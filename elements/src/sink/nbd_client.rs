//! A disk of an NBD server: any server that speaks fixed newstyle NBD (nbdkit, qemu-nbd, another
//! Block Mason). Whatever it can do is passed through; the framework does the rest by other means.

use crate::nbd::client::ClientTls;
use crate::nbd::handshake::BlockSizes;
use crate::nbd::link::{Client, Target};
use crate::nbd::uri;
use crate::nbd::wire::{MAX_PAYLOAD, TransmissionFlags};
use blockmason::describe::{Access, Build, Carries, ElementType, Family, Handler, Ports};
use blockmason::heads::HeadPlace;
use blockmason::lang::value::{FilePath, Time, Uri};
use blockmason::{
    Children, Cx, Data, Element, Error, Flags, Flow, Geometry, Kind, Op, Ops, Prepared, Request, Result,
};
use std::sync::Arc;

blockmason::params! {
    /// A disk of an NBD server.
    pub struct Params {
        /// The export: `nbd://host:port/name`, `nbd+unix:///name?socket=PATH`; with `nbds` instead of
        /// `nbd` over TLS.
        uri: Uri,
        /// The most connections, where the server lets several see one order of flushes (multi-conn).
        /// Without it one for each shard. Other servers get one.
        connections: Option<u16>,
        /// How long requests wait for a server that has gone to come back; `0s` fails them at once. An attempt to
        /// connect takes no longer, or a second, and ten seconds at the most.
        reconnect: Time = "30s",
        /// How long the server may take for one request before its connection counts as broken. Without
        /// it there is no limit.
        timeout: Option<Time>,
        /// Folder with ca-cert.pem, and client-cert.pem and client-key.pem if the server wants them.
        tls_certificates: Option<FilePath>,
        /// Refuses to write, whatever the server says.
        readonly: bool = "no",
        /// Keeps the head of the volume here, instead of in the folder for state.
        head: Option<FilePath>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "nbd_client",
    summary: "a disk of an NBD server",
    doc: "Connects when the graph is built, since the size is the server's to tell. Reads with holes, \
          FUA, trim, zeroes, cache hints, allocation and extended headers are used where the server \
          offers them. FUA becomes a write and a flush where it does not; where there is no flush \
          either, answered writes are durable.\n\n\
          Where the server offers multi-conn each shard has a connection of its own; else one shard \
          has the only one, and requests cross to it.\n\n\
          When the connection breaks, requests in flight are kept and sent again, in order, on the next \
          one. Until a change that was sent again is answered, later changes that overlap it wait; so \
          an old write never overwrites a newer one. Requests that have waited for `reconnect` fail, \
          and further ones fail at once until the server is back. Writes that were answered and not \
          flushed when the *server* died are the server's to keep or lose, as with any disk. After a connection \
          broke with such writes behind it, the next flush of an element of this graph fails once, though the \
          server has done it: a `copy` or `log_dirty` then copies again what may be lost. A guest's flush says what \
          the server says, since a guest could only give up its disk. A disk \
          that comes back with another size or other abilities is refused until `reconnect` is called; \
          if it has really changed, reload the graph.\n\n\
          Where a graph has a layout above it (`stripe`, `linear`, `slice`), the disk has a *head* that names it \
          and its layout, for each URI in the folder for state: on other hosts the disk has none, or \
          another one. Through another layout it is not served.\n\n\
          What the server sends is not trusted: whatever is no legal reply costs it the connection.",
    family: Family::Sink,
    params: Params::PARAMS,
    ports: Ports::SINK,
    handlers: &[
        Handler { name: "connections", access: Access::Read, doc: "how many connections there are" },
        Handler { name: "state", access: Access::Read, doc: "connected, connecting or changed" },
        Handler {
            name: "reconnects",
            access: Access::Read,
            doc: "how many connections were made after the first",
        },
        Handler { name: "reconnect", access: Access::Call, doc: "drops every connection and makes new ones" },
    ],
    example: "element Guest (type nbd) (listen unix:near.sock)\n\
              element Remote (type nbd_client) (uri nbd+unix:///vm1?socket=far.sock)\n\
              Guest -> Remote\n",
    carries: |params| match Params::from(params) {
        Ok(params) if params.readonly => Carries::NO_WRITES,
        _ => Carries::ALL,
    },
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(NbdClient::new(build)?)),
    ..ElementType::BASE
};

/// The longest request to a server that does not say what it takes: what the specification has every
/// server take.
const MAX_UNKNOWN: u32 = 32 << 20;

/// The largest preferred block that is believed; a power of two.
const MAX_PREFERRED: u32 = 32 << 20;

struct NbdClient {
    client: Arc<Client>,
    geometry: Geometry,
    head: HeadPlace,
    /// The most connections; None for as many as there are shards.
    connections: Option<usize>,
}

impl NbdClient {
    fn new(build: &Build<'_>) -> Result<NbdClient> {
        let params = build.read(Params::from)?;
        let head = HeadPlace::keyed("nbd", params.uri.as_str(), build.state_dir);
        let head = head.kept_at(params.head.as_ref().map(|path| path.0.as_path()));
        let uri: uri::Uri = params.uri.as_str().parse()?;
        let target = Target {
            owner: (build.graph.to_owned(), build.name.to_owned()),
            tls: tls(&uri, &params)?,
            uri,
            reconnect: params.reconnect.0,
            timeout: params.timeout.map(|time| time.0),
        };
        let client = Client::new(target)?;
        let several = client.offer().flags.contains(TransmissionFlags::CAN_MULTI_CONN);
        let connections =
            if several { params.connections.map(|most| usize::from(most.max(1))) } else { Some(1) };
        let geometry = geometry(&client, params.readonly)?;
        let head = head.read_only(geometry.read_only);
        Ok(NbdClient { client, geometry, head, connections })
    }

    /// The shard whose connection serves the requests of a shard.
    fn home(&self, shard: usize, shards: usize) -> usize {
        match self.connections {
            // Clients that have one connection each do not all have it on the same shard.
            Some(most) if most < shards => (self.client.id() as usize + shard % most) % shards,
            _ => shard,
        }
    }
}

/// What the server's disk looks like.
fn geometry(client: &Client, readonly: bool) -> Result<Geometry> {
    let offer = client.offer();
    let has = |flag| offer.flags.contains(flag);
    let unknown = BlockSizes { maximum: MAX_UNKNOWN, ..BlockSizes::default() };
    let blocks = offer.blocks.unwrap_or(unknown);
    let min = blocks.minimum;
    let max_len = blocks.maximum.min(MAX_PAYLOAD) / min * min;
    if offer.size > i64::MAX as u64 {
        return Err(Error::invalid(format!("the server says that its disk has {} bytes", offer.size)));
    }
    Ok(Geometry {
        // What is left of the last block cannot be reached.
        size: offer.size / u64::from(min) * u64::from(min),
        min_block: min,
        preferred_block: blocks.preferred.min(MAX_PREFERRED),
        max_len,
        ops: Ops {
            discard: has(TransmissionFlags::SEND_TRIM),
            write_zeroes: has(TransmissionFlags::SEND_WRITE_ZEROES),
            fast_zero: has(TransmissionFlags::SEND_FAST_ZERO),
            cache: has(TransmissionFlags::SEND_CACHE),
            extents: offer.allocation,
        },
        needs_flush: has(TransmissionFlags::SEND_FLUSH),
        rotational: has(TransmissionFlags::ROTATIONAL),
        read_only: readonly || has(TransmissionFlags::READ_ONLY),
        volatile: false,
        forgetful: has(TransmissionFlags::SEND_FLUSH),
        atomic: 0,
    })
}

#[cfg(feature = "tls")]
fn tls(uri: &uri::Uri, params: &Params) -> Result<ClientTls> {
    if !uri.tls {
        return Ok(ClientTls::Off);
    }
    let folder = params.tls_certificates.as_ref().map(|path| &path.0).or(uri.certificates.as_ref());
    let folder = folder.ok_or_else(|| Error::invalid("TLS needs (tls_certificates FOLDER)"))?;
    let name = uri.server_name();
    let name = name.ok_or_else(|| Error::invalid("TLS over a unix socket needs tls-hostname= in the URI"))?;
    Ok(ClientTls::Required(crate::nbd::tls::client_identity(folder, name)?))
}

#[cfg(not(feature = "tls"))]
fn tls(uri: &uri::Uri, _params: &Params) -> Result<ClientTls> {
    if uri.tls {
        return Err(Error::unsupported("this program was built without TLS"));
    }
    Ok(ClientTls::Off)
}

impl Element for NbdClient {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(self.geometry))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            op if op.changes_data() && self.geometry.read_only => {
                return cx.fail(&req, Error::new(Kind::Denied, "the disk is read-only"));
            }
            Op::Extents if req.extra.as_ref().is_some_and(|extra| extra.map.is_some()) => {
                return cx.fail(&req, Error::unsupported("the server is not asked for such a map"));
            }
            Op::WriteZeroes if req.flags.has(Flags::FAST_ONLY) && !self.geometry.ops.fast_zero => {
                return cx.fail(&req, Error::unsupported("writing zeros is not fast here"));
            }
            Op::Read if req.len == 0 => return Flow::Now(Ok(blockmason::Answer::Data(Data::empty()))),
            op if op.changes_data() && req.len == 0 => return Flow::done(),
            Op::Read
            | Op::Write
            | Op::Flush
            | Op::Discard
            | Op::WriteZeroes
            | Op::Cache
            | Op::Extents
            | Op::Control => {}
        }
        let shard = cx.shard();
        let home = self.home(shard.id(), shard.shards());
        if home == shard.id() {
            return cx.later(&req, self.client.submit(shard, &req));
        }
        let mut sent = req.clone();
        sent.stabilise();
        if sent.op == Op::Read {
            // The destination stays here: it is the caller's to fill.
            sent.data = Data::empty();
        }
        let client = self.client.clone();
        cx.later(&req, cx.at(home, move |shard| Flow::later(client.submit(shard, &sent))))
    }

    fn close(&self) {
        self.client.close();
    }

    fn head(&self) -> Option<HeadPlace> {
        Some(self.head.clone())
    }

    fn renamed(&self, name: &str) {
        self.client.renamed(name);
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "connections" => Ok(self.client.connections().to_string()),
            "state" => Ok(self.client.state().to_owned()),
            "reconnects" => Ok(self.client.reconnects().to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn call(&self, handler: &str, _argument: &str) -> Result<String> {
        match handler {
            "reconnect" => {
                self.client.reconnect();
                Ok("new connections are being made".to_owned())
            }
            _ => Err(Error::no_handler(handler)),
        }
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        // Links hold the client: it would never go by itself.
        self.client.close();
    }
}

#[cfg(test)]
mod tests {
    use blockmason::Kind;
    use blockmason::testing::{TestDisk, run};

    /// With a real server below, the model is played in the workspace's own tests of real servers.
    #[test]
    fn what_cannot_be_reached_is_one_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("none.sock");
        let unix = format!("nbd+unix:///?socket={}", socket.display());
        for (uri, kind, says) in [
            (unix.as_str(), Kind::Unavailable, "none.sock"),
            ("http://localhost/", Kind::Invalid, "scheme"),
            ("nbds://localhost/", Kind::Invalid, "tls_certificates"),
        ] {
            run(1, async |host| {
                let graph = format!("element R (type nbd_client) (uri {uri})");
                let error = TestDisk::new(&host, crate::ALL, &graph, "R").await.err().unwrap();
                assert_eq!(error.kind(), kind, "{error}");
                let text = error.to_string();
                assert!(text.starts_with("R (test.mason:1:9): ") && text.contains(says), "{text}");
            });
        }
    }
}
