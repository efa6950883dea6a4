//! Servers that misbehave, one way each, and at random.

use super::*;
use crate::nbd::server::{Export, ExportInfo, Exports, Listed, TlsPolicy, negotiate};
use crate::nbd::wire::{
    ChunkType, ErrorCode, ReplyTo, decode_request, decode_request_extended, put_simple_reply,
};
use blockmason::Host;
use proptest::prelude::*;
use std::os::unix::net::UnixListener;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SIZE: u64 = 1 << 20;

struct Shelf(ExportInfo);

impl Exports for Shelf {
    type Handle = ();

    fn list(&self) -> Vec<Listed> {
        Vec::new()
    }

    fn find(&self, _: &str) -> Option<Export<()>> {
        Some(Export { handle: (), info: self.0.clone() })
    }
}

/// What a scripted server knows of a request.
struct Asked {
    /// Connections before this one.
    connection: usize,
    /// Requests on this connection before this one.
    number: usize,
    header: RequestHeader,
    payload: Vec<u8>,
    style: ReplyStyle,
}

impl Asked {
    fn to(&self) -> ReplyTo {
        ReplyTo::new(&self.header, self.style == ReplyStyle::Extended)
    }

    /// What an honest server of zeros answers.
    fn honest(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match (self.style, self.header.command) {
            (ReplyStyle::Simple, _) => {
                put_simple_reply(&mut out, ErrorCode::OK, self.header.cookie);
                if self.header.command == Command::READ {
                    out.resize(out.len() + self.header.len as usize, 0);
                }
            }
            (_, Command::READ) => {
                self.to().put_hole(&mut out, true, self.header.offset, self.header.len as u32);
            }
            (_, Command::BLOCK_STATUS) => {
                let mut status = crate::nbd::meta::Status::new(self.header.len, false, self.to().extended);
                status.push(self.header.len, 3);
                status.put(&mut out, &self.to(), true, 0);
            }
            _ => self.to().put_none(&mut out),
        }
        out
    }
}

/// A server that answers as `script` says; None hangs up. It ends when the test drops the folder.
struct Scripted {
    folder: tempfile::TempDir,
}

impl Scripted {
    fn new(script: impl FnMut(&Asked) -> Option<Vec<u8>> + Send + 'static) -> Scripted {
        Scripted::with(script, |_| SIZE, TlsPolicy::Off)
    }

    /// As `new`, with a size for each connection, and perhaps TLS.
    fn with(
        mut script: impl FnMut(&Asked) -> Option<Vec<u8>> + Send + 'static,
        size: impl Fn(usize) -> u64 + Send + 'static,
        tls: TlsPolicy,
    ) -> Scripted {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        listener.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).unwrap();
                for connection in 0.. {
                    let (stream, _) = listener.accept().await.unwrap();
                    let _ = serve(stream, connection, size(connection), &tls, &mut script).await;
                }
            });
        });
        Scripted { folder }
    }

    fn client(&self, reconnect: Duration, timeout: Option<Duration>) -> Arc<Client> {
        self.client_with(ClientTls::Off, reconnect, timeout)
    }

    fn client_with(&self, tls: ClientTls, reconnect: Duration, timeout: Option<Duration>) -> Arc<Client> {
        let socket = self.folder.path().join("s");
        let uri = format!("nbd+unix:///?socket={}", socket.display()).parse().unwrap();
        Client::new(Target { owner: ("vm".to_owned(), "R".to_owned()), uri, tls, reconnect, timeout })
            .unwrap()
    }
}

async fn serve(
    stream: tokio::net::UnixStream,
    connection: usize,
    size: u64,
    tls: &TlsPolicy,
    script: &mut impl FnMut(&Asked) -> Option<Vec<u8>>,
) -> Option<()> {
    let flags = TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH;
    let contexts = vec![ALLOCATION.to_owned()];
    let shelf = Shelf(ExportInfo { size, flags, contexts, ..ExportInfo::default() });
    let mut server = negotiate(stream, &shelf, tls).await.ok()??;
    for number in 0.. {
        let header = if server.is_extended() {
            let mut bytes = [0; 32];
            server.stream.read_exact(&mut bytes).await.ok()?;
            decode_request_extended(&bytes).unwrap()
        } else {
            let mut bytes = [0; 28];
            server.stream.read_exact(&mut bytes).await.ok()?;
            decode_request(&bytes).unwrap()
        };
        let mut payload = vec![0; header.payload_len(server.is_extended()) as usize];
        server.stream.read_exact(&mut payload).await.ok()?;
        let asked = Asked { connection, number, header, payload, style: server.style };
        server.stream.write_all(&script(&asked)?).await.ok()?;
        server.stream.flush().await.ok()?;
    }
    None
}

/// Runs a test on a shard whose clock is the real one.
fn on_shard<T>(body: impl AsyncFnOnce(Rc<Shard>) -> T) -> T {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default()).unwrap();
    runtime.block_on(async {
        let _host = Host::on_this_thread(1, &std::env::temp_dir());
        body(Shard::current().unwrap()).await
    })
}

const SOON: Duration = Duration::from_secs(20);

async fn ask(client: &Arc<Client>, shard: &Rc<Shard>, req: Request) -> Reply {
    rt::timeout(SOON, client.submit(shard, &req)).await.expect("an answer, good or bad")
}

type Script = fn(&Asked) -> Option<Vec<u8>>;

/// Everything that no server may send in answer to a read of 4096 bytes at 4096.
const LIES: &[(&str, Script)] = &[
    ("nothing at all", |_| None),
    ("garbage", |_| Some(b"this is no reply to anything, whatever it is".to_vec())),
    ("a reply to nobody", |asked| {
        let mut to = asked.to();
        to.cookie ^= 1 << 40;
        let mut out = Vec::new();
        to.put_hole(&mut out, true, 4096, 4096);
        Some(out)
    }),
    ("a slot that never was", |asked| {
        let mut to = asked.to();
        to.cookie = 0xffff_ffff;
        let mut out = Vec::new();
        to.put_none(&mut out);
        Some(out)
    }),
    ("a hole beyond the request", |asked| {
        let mut out = Vec::new();
        asked.to().put_hole(&mut out, true, 4096, 4097);
        Some(out)
    }),
    ("a hole before the request", |asked| {
        let mut out = Vec::new();
        asked.to().put_hole(&mut out, true, 0, 4096);
        Some(out)
    }),
    ("a hole around the world", |asked| {
        let mut out = Vec::new();
        asked.to().put_hole(&mut out, true, u64::MAX, 4096);
        Some(out)
    }),
    ("more data than was asked for", |asked| {
        let mut out = Vec::new();
        asked.to().put_data(&mut out, true, 4096, 4097);
        Some(out)
    }),
    ("overlapping chunks", |asked| {
        let mut out = Vec::new();
        asked.to().put_hole(&mut out, false, 4096, 4096);
        asked.to().put_hole(&mut out, true, 4096, 1);
        Some(out)
    }),
    ("a gap", |asked| {
        let mut out = Vec::new();
        asked.to().put_hole(&mut out, false, 4096, 4000);
        asked.to().put_hole(&mut out, true, 8190, 2);
        Some(out)
    }),
    ("no data at all", |asked| {
        let mut out = Vec::new();
        asked.to().put_none(&mut out);
        Some(out)
    }),
    ("crumbs without end", |asked| {
        let mut out = Vec::new();
        for crumb in 0..100 {
            asked.to().put_hole(&mut out, false, 4096 + 2 * crumb, 1);
        }
        Some(out)
    }),
    ("block status", |asked| {
        let mut out = Vec::new();
        let mut status = crate::nbd::meta::Status::new(4096, false, asked.to().extended);
        status.push(4096, 0);
        status.put(&mut out, &asked.to(), true, 0);
        Some(out)
    }),
    ("a simple reply", |asked| {
        let mut out = Vec::new();
        put_simple_reply(&mut out, ErrorCode::OK, asked.header.cookie);
        Some(out)
    }),
    ("an error that is none", |asked| {
        let mut out = Vec::new();
        asked.to().put_chunk(&mut out, ChunkType::ERROR, true, 6);
        out.extend([0; 6]);
        Some(out)
    }),
    ("an order to leave", |asked| {
        let mut out = Vec::new();
        asked.to().put_error(&mut out, true, ErrorCode::SHUTDOWN, "closing time", None);
        Some(out)
    }),
];

#[test]
fn a_lie_costs_the_connection_and_nothing_else() {
    on_shard(async |shard| {
        for (name, lie) in LIES {
            let server = Scripted::new(|asked| match asked.connection {
                0 => lie(asked),
                _ => Some(asked.honest()),
            });
            let client = server.client(Duration::from_secs(30), None);
            let data = ask(&client, &shard, Request::read(4096, 4096)).await;
            let data = data.unwrap_or_else(|error| panic!("{name}: {error}")).into_data().unwrap();
            assert!(data.len() == 4096 && data.is_zero(), "{name}");
            assert_eq!(client.reconnects(), 1, "{name}");
            client.close();
        }
    });
}

#[test]
fn a_server_that_only_lies_keeps_nobody_waiting() {
    on_shard(async |shard| {
        for (name, lie) in LIES {
            let server = Scripted::new(lie);
            let client = server.client(Duration::from_millis(100), None);
            let error = ask(&client, &shard, Request::read(4096, 4096)).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Unavailable, "{name}: {error}");
            client.close();
        }
    });
}

#[test]
fn answering_twice_is_a_lie() {
    on_shard(async |shard| {
        let server = Scripted::new(|asked| {
            let twice = asked.connection == 0;
            Some(if twice { [asked.honest(), asked.honest()].concat() } else { asked.honest() })
        });
        let client = server.client(Duration::from_secs(30), None);
        for _ in 0..3 {
            ask(&client, &shard, Request::flush()).await.unwrap();
        }
        assert_eq!(client.reconnects(), 1);
        client.close();
    });
}

#[test]
fn the_next_flush_of_an_element_says_that_the_server_may_have_forgotten_something() {
    on_shard(async |shard| {
        // Each read ends the connection, but for the one that is sent again on the next.
        let server = Scripted::new(|asked| {
            let hangs_up = asked.header.command == Command::READ && asked.number > 0;
            (!hangs_up).then(|| asked.honest())
        });
        let client = server.client(Duration::from_secs(30), None);
        let own = || Request { origin: blockmason::Origin::Copy, ..Request::flush() };
        let write = || Request::write(0, Data::copy_of(&[1; 512]));
        let read = || Request::read(0, 512);
        ask(&client, &shard, write()).await.unwrap();
        ask(&client, &shard, own()).await.unwrap();
        ask(&client, &shard, read()).await.unwrap();
        ask(&client, &shard, own()).await.expect("nothing was lost that was not flushed");
        ask(&client, &shard, write()).await.unwrap();
        ask(&client, &shard, read()).await.unwrap();
        assert_eq!(client.reconnects(), 2);
        ask(&client, &shard, Request::flush()).await.expect("a guest is not told");
        let error = ask(&client, &shard, own()).await.unwrap_err();
        assert!(error.to_string().contains("may have forgotten"), "{error}");
        ask(&client, &shard, own()).await.unwrap();
        client.close();
    });
}

#[test]
fn chunks_in_any_order_make_a_read() {
    on_shard(async |shard| {
        let server = Scripted::new(|asked| {
            let (to, mut out) = (asked.to(), Vec::new());
            to.put_data(&mut out, false, 4096 + 3000, 1096);
            out.extend([7; 1096]);
            to.put_hole(&mut out, false, 4096 + 1000, 2000);
            to.put_data(&mut out, false, 4096, 1000);
            out.extend([5; 1000]);
            to.put_none(&mut out);
            Some(out)
        });
        let client = server.client(Duration::ZERO, None);
        let data = ask(&client, &shard, Request::read(4096, 4096)).await.unwrap().into_data().unwrap();
        let wanted = [vec![5; 1000], vec![0; 2000], vec![7; 1096]].concat();
        assert_eq!(data.to_vec(), wanted);
        let mut zeros = 0;
        data.for_each(|segment| {
            zeros += if matches!(segment, blockmason::Segment::Zeros(_)) { segment.len() } else { 0 }
        });
        assert_eq!(zeros, 2000, "a hole stays a hole");
        client.close();
    });
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    on_shard(async |shard| {
        let server =
            Scripted::new(|asked| Some(if asked.connection == 0 { Vec::new() } else { asked.honest() }));
        let client = server.client(Duration::from_secs(30), Some(Duration::from_millis(50)));
        ask(&client, &shard, Request::flush()).await.unwrap();
        assert_eq!(client.reconnects(), 1);
        client.close();
    });
}

#[test]
fn another_disk_is_refused_until_somebody_has_looked() {
    on_shard(async |shard| {
        let hangs_up = |asked: &Asked| if asked.connection == 0 { None } else { Some(asked.honest()) };
        let size = |connection| if connection == 1 { 2 * SIZE } else { SIZE };
        let server = Scripted::with(hangs_up, size, TlsPolicy::Off);
        let client = server.client(Duration::from_secs(30), None);
        for _ in 0..2 {
            let error = ask(&client, &shard, Request::flush()).await.unwrap_err();
            assert!(error.to_string().contains("had 1048576 bytes and has 2097152 now"), "{error}");
        }
        assert_eq!(client.state(), "changed");
        client.reconnect();
        ask(&client, &shard, Request::flush()).await.unwrap();
        assert_eq!(client.state(), "connected");
        client.close();
    });
}

/// What a server saw: connection, offset and first byte of each write.
type Seen = Arc<Mutex<Vec<(usize, u64, u8)>>>;

#[test]
fn later_changes_wait_for_replayed_ones() {
    on_shard(async |shard| {
        let seen = Seen::default();
        let log = seen.clone();
        // The first connection takes three writes and breaks with none answered. The second answers
        // nothing until the fourth request is there, which must not be the one that overlaps.
        let mut kept = Vec::new();
        let server = Scripted::new(move |asked| {
            log.lock().unwrap().push((asked.connection, asked.header.offset, asked.payload[0]));
            match (asked.connection, asked.number) {
                (0, 2) => None,
                (0, _) => Some(Vec::new()),
                (_, 0..3) => {
                    kept.extend(asked.honest());
                    Some(if asked.number == 2 { std::mem::take(&mut kept) } else { Vec::new() })
                }
                _ => Some(asked.honest()),
            }
        });
        let client = server.client(Duration::from_secs(30), None);
        let write = |offset, byte| Request::write(offset, Data::copy_of(&[byte; 512]));
        // Two that overlap: the second is held back until the first is answered, hence not among the
        // first three of the second connection.
        let first = client.submit(&shard, &write(0, 1));
        let second = client.submit(&shard, &write(256, 2));
        let third = client.submit(&shard, &write(4096, 3));
        let all = async {
            let first = async {
                first.await.unwrap();
            };
            let later = async {
                // Submitted once the break has been noticed.
                while client.connections() > 0 {
                    tokio::task::yield_now().await;
                }
                let far = client.submit(&shard, &write(8192, 4));
                let near = client.submit(&shard, &write(4100, 5));
                far.await.unwrap();
                near.await.unwrap();
            };
            let (_, second, third, ()) = tokio::join!(first, second, third, later);
            second.unwrap();
            third.unwrap();
        };
        rt::timeout(SOON, all).await.expect("everything is answered");
        let seen = seen.lock().unwrap();
        let on_second: Vec<_> = seen.iter().filter(|seen| seen.0 == 1).map(|seen| seen.2).collect();
        assert_eq!(on_second[..3], [1, 3, 4], "what does not overlap goes on: {on_second:?}");
        let mut rest = on_second[3..].to_vec();
        rest.sort_unstable();
        assert_eq!(rest, [2, 5]);
        client.close();
    });
}

#[cfg(feature = "tls")]
#[test]
fn a_connection_under_tls_moves_to_its_shard_and_comes_back() {
    use crate::nbd::tls::{ClientCertificates, client_identity, server_config};
    on_shard(async |shard| {
        let folder = crate::nbd::tls_tests::certificates();
        let policy = TlsPolicy::Required(server_config(folder.path(), ClientCertificates::None).unwrap());
        let breaks = |asked: &Asked| {
            if asked.connection == 0 && asked.number == 1 { None } else { Some(asked.honest()) }
        };
        let server = Scripted::with(breaks, |_| SIZE, policy);
        let tls = ClientTls::Required(client_identity(folder.path(), "localhost").unwrap());
        let client = server.client_with(tls, Duration::from_secs(30), None);
        for reconnects in [0, 1] {
            let data = ask(&client, &shard, Request::read(0, 100_000)).await.unwrap().into_data().unwrap();
            assert!(data.len() == 100_000 && data.is_zero());
            assert_eq!(client.reconnects(), reconnects);
        }
        client.close();
    });
}

#[test]
fn a_server_that_takes_connections_and_says_nothing_is_given_up_as_soon_as_one_that_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    let uri = format!("nbd+unix:///?socket={}", socket.display()).parse().unwrap();
    let owner = ("vm".to_owned(), "R".to_owned());
    let reconnect = Duration::from_millis(10);
    let since = rt::now();
    let said =
        Client::new(Target { owner, uri, tls: ClientTls::Off, reconnect, timeout: None }).err().unwrap();
    assert!(said.to_string().contains("does not answer"), "{said}");
    assert!(since.elapsed() < HANDSHAKE / 2);
}

#[test]
fn a_closed_client_says_goodbye_and_leaves_nothing_behind() {
    on_shard(async |shard| {
        for used in [true, false] {
            let (said, heard) = std::sync::mpsc::channel();
            let server = Scripted::new(move |asked| {
                said.send(asked.header.command).unwrap();
                (asked.header.command != Command::DISC).then(|| asked.honest())
            });
            let client = server.client(Duration::from_secs(30), None);
            let mut unanswered = None;
            if used {
                ask(&client, &shard, Request::flush()).await.unwrap();
                assert_eq!(heard.recv().unwrap(), Command::FLUSH);
                unanswered = Some(client.submit(&shard, &Request::flush()));
            }
            let weak = Arc::downgrade(&client);
            client.close();
            drop(client);
            if let Some(unanswered) = unanswered {
                unanswered.await.expect("what is in flight is answered first");
                assert_eq!(heard.recv().unwrap(), Command::FLUSH);
            }
            let gone = async {
                while weak.upgrade().is_some() {
                    tokio::task::yield_now().await;
                }
            };
            rt::timeout(SOON, gone).await.expect("the task ends and the shard forgets");
            assert_eq!(heard.recv().unwrap(), Command::DISC);
        }
    });
}

#[derive(Clone, Debug)]
enum Junk {
    Bytes(Vec<u8>),
    Chunk { kind: u16, done: bool, cookie: bool, offset: bool, len: u64, payload: Vec<u8> },
    Honest,
}

fn junk() -> impl Strategy<Value = Vec<Junk>> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..80);
    let kind = prop_oneof![0_u16..8, 32769_u16..32772, any::<u16>()];
    let len = prop_oneof![0_u64..64, Just(4104_u64), Just(1 << 25), any::<u64>()];
    let chunk = (kind, any::<bool>(), prop::bool::weighted(0.9), prop::bool::weighted(0.9), len, bytes());
    let one = prop_oneof![
        bytes().prop_map(Junk::Bytes),
        chunk.prop_map(|(kind, done, cookie, offset, len, payload)| Junk::Chunk {
            kind,
            done,
            cookie,
            offset,
            len,
            payload
        }),
        Just(Junk::Honest),
    ];
    proptest::collection::vec(one, 0..6)
}

fn spoken(junk: &[Junk], asked: &Asked) -> Vec<u8> {
    let mut out = Vec::new();
    for junk in junk {
        match junk {
            Junk::Bytes(bytes) => out.extend(bytes),
            Junk::Honest => out.extend(asked.honest()),
            Junk::Chunk { kind, done, cookie, offset, len, payload } => {
                let mut to = asked.to();
                to.cookie ^= u64::from(!cookie);
                to.offset ^= u64::from(!offset);
                to.put_chunk(&mut out, ChunkType(*kind), *done, *len);
                out.extend(asked.header.offset.to_be_bytes());
                out.extend(payload);
            }
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn no_reply_panics_or_hangs(junk in junk(), read: bool) {
        on_shard(async |shard| {
            let mut said = false;
            let server = Scripted::new(move |asked| {
                if std::mem::replace(&mut said, true) {
                    return None;
                }
                Some(spoken(&junk, asked))
            });
            let client = server.client(Duration::ZERO, Some(Duration::from_millis(20)));
            let op = if read { Op::Read } else { Op::Extents };
            // Good or bad, there is an answer.
            drop(ask(&client, &shard, Request::new(op, 4096, 4096)).await);
            client.close();
        });
    }
}
