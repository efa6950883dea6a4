//! Clients that die amid a request, amid its data or amid its answer, while another client works on.
//!
//! What a dead client had sent in full may have been done or not; what it had not must not be seen. The
//! buffers of its requests stay alive until the kernel is done with them, which a run under
//! AddressSanitizer looks at:
//!
//! ```sh
//! RUSTFLAGS=-Zsanitizer=address cargo +nightly test -p blockmason-tests --no-default-features \
//!     --test dying_client --target x86_64-unknown-linux-gnu
//! ```
#![allow(clippy::unwrap_used)]

use blockmason::Disk;
use blockmason_elements::nbd::wire::{
    Command, CommandFlags, ErrorCode, OptionCode, OptionHeader, Reply, ReplyCode, ReplyStyle, RequestHeader,
    decode_option_reply, decode_reply, encode_option, encode_request,
};
use blockmason_tests::Server;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MIB: usize = 1 << 20;

/// The disk; its first part belongs to the client that lives.
const SIZE: usize = 96 * MIB;
const LIVING: usize = 4 * MIB;

/// Bytes of the writes that clients die in: odd, one sector, and more than the server receives in one
/// piece.
const LENGTHS: [usize; 3] = [12_345, 512, 1_300_000];

/// Bytes of a request's header, and of a simple reply.
const HEADER: usize = 28;
const REPLY: usize = 16;

/// How a client goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// At once.
    Close,
    /// It says no more, hears everything, and closes.
    Listen,
    /// It asks for much more than fits the socket, hears a little of it, and closes.
    Stall,
}

/// A client without a library, in simple replies.
struct Client(UnixStream);

impl Client {
    fn connect(path: &Path) -> Client {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        let go = [0; 6];
        stream.write_all(&3_u32.to_be_bytes()).unwrap();
        stream
            .write_all(&encode_option(&OptionHeader { option: OptionCode::GO, len: go.len() as u32 }))
            .unwrap();
        stream.write_all(&go).unwrap();
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header).unwrap();
            let reply = decode_option_reply(&header).unwrap();
            stream.read_exact(&mut vec![0; reply.len as usize]).unwrap();
            if reply.code == ReplyCode::ACK {
                return Client(stream);
            }
            assert!(!reply.code.is_error(), "{}", reply.code);
        }
    }

    /// Sends a request and waits for its answer, which must be good; `into` takes the data of a read.
    fn ask(&mut self, request: &[u8], into: &mut [u8]) {
        self.0.write_all(request).unwrap();
        let mut reply = [0; REPLY];
        self.0.read_exact(&mut reply).unwrap();
        let (reply, _) = decode_reply(ReplyStyle::Simple, &reply).unwrap().unwrap();
        assert!(matches!(reply, Reply::Simple { error: ErrorCode::OK, .. }), "{reply:?}");
        self.0.read_exact(into).unwrap();
    }

    fn read(&mut self, offset: usize, into: &mut [u8]) {
        self.ask(&header(Command::READ, offset, into.len()), into);
    }
}

fn header(command: Command, offset: usize, len: usize) -> Vec<u8> {
    let (offset, len) = (offset as u64, len as u64);
    let header = RequestHeader { flags: CommandFlags::NONE, command, cookie: offset, offset, len };
    encode_request(&header).unwrap().to_vec()
}

fn write(offset: usize, data: &[u8]) -> Vec<u8> {
    let mut request = header(Command::WRITE, offset, data.len());
    request.extend_from_slice(data);
    request
}

/// Bytes that tell where they were meant to go and by whom, and that are never zero.
fn stamp(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| rng.u8(1..)).collect()
}

/// What may be found where a client wrote.
struct Written {
    what: String,
    offset: usize,
    data: Vec<u8>,
    /// All of it had been sent, so it may be there.
    sent: bool,
    /// It had been answered, so it must be there.
    answered: bool,
}

impl Written {
    fn check(&self, image: &[u8]) {
        let found = &image[self.offset..self.offset + self.data.len()];
        let wrong = found.iter().zip(&self.data).position(|(found, stamped)| {
            let done = self.sent && found == stamped;
            let undone = !self.answered && *found == 0;
            !done && !undone
        });
        let answered = if self.answered { "answered" } else { "not answered" };
        assert_eq!(wrong, None, "{}: sent in full {}, {answered}", self.what, self.sent);
    }
}

/// What may be found on the disk.
struct Found {
    /// By the client that lives, in its part.
    model: Vec<u8>,
    /// By those that have died.
    written: Vec<Written>,
}

impl Found {
    fn check(&self, image: &[u8]) {
        assert!(image[..LIVING] == self.model, "what the living client has written");
        let mut rest = image.to_vec();
        rest[..LIVING].fill(0);
        for written in &self.written {
            written.check(image);
            rest[written.offset..written.offset + written.data.len()].fill(0);
        }
        assert!(rest.iter().all(|byte| *byte == 0), "bytes that nobody wrote");
        let any = |of: fn(&Written) -> bool| self.written.iter().any(of);
        assert!(any(|written| written.answered) && any(|written| !written.sent));
    }
}

/// Writes and reads at random until it is told to stop, and misses nothing. Returns what its part of the
/// disk holds.
fn live(path: &Path, stop: &AtomicBool) -> Vec<u8> {
    let (mut client, mut model) = (Client::connect(path), vec![0; LIVING]);
    let mut rng = fastrand::Rng::with_seed(1);
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) || rounds < 10 {
        let len = rng.usize(1..100_000);
        let offset = rng.usize(0..LIVING - len);
        let data = stamp(rounds, len);
        client.ask(&write(offset, &data), &mut []);
        model[offset..offset + len].copy_from_slice(&data);
        let (offset, mut found) = (rng.usize(0..LIVING - len), vec![0; len]);
        client.read(offset, &mut found);
        assert!(found == model[offset..offset + len], "the living client is harmed in round {rounds}");
        rounds += 1;
    }
    model
}

/// Places to cut a client's bytes off at: a write of `len` bytes, a read, and a second write of 512.
fn cuts(len: usize) -> [usize; 11] {
    let (first, read) = (HEADER + len, HEADER + len + HEADER);
    [
        1,
        HEADER - 1,
        HEADER,
        HEADER + 1,
        HEADER + len / 2,
        first - 1,
        first,
        first + 5,
        read,
        read + HEADER + 100,
        read + HEADER + 512,
    ]
}

/// Lets one client die; `offset` is where its two writes go, one after the other.
fn die(path: &Path, offset: usize, len: usize, cut: usize, end: End) -> [Written; 2] {
    let seed = offset as u64;
    let data = [stamp(seed, len), stamp(seed + 1, 512)];
    let (first, read) = (HEADER + len, HEADER + len + HEADER);
    let mut script = write(offset, &data[0]);
    script.extend(header(Command::READ, offset, 256 << 10));
    script.extend(write(offset + len, &data[1]));
    let mut client = Client::connect(path);
    client.0.write_all(&script[..cut]).unwrap();
    let mut heard = Vec::new();
    match end {
        End::Close => {}
        End::Listen => {
            client.0.shutdown(Shutdown::Write).unwrap();
            // A connection that is broken off may end with an error.
            let _ = client.0.read_to_end(&mut heard);
        }
        End::Stall => {
            for at in 0..32 {
                client.0.write_all(&header(Command::READ, at * MIB, MIB)).unwrap();
            }
            client.0.read_exact(&mut vec![0; 100_000]).unwrap();
        }
    }
    // Cut off within a header is as good as between requests: all that came before is answered. Cut off
    // within data it is not, and answers may be lost.
    let polite = cut < HEADER || (first..read + HEADER).contains(&cut) || cut == script.len();
    if end == End::Listen && polite {
        let reads = if cut >= read { REPLY + (256 << 10) } else { 0 };
        let writes = REPLY * [first, script.len()].into_iter().filter(|sent| cut >= *sent).count();
        assert_eq!(heard.len(), reads + writes, "answers to a client that listened, cut at {cut}");
    }
    let [one, two] = data;
    let what = format!("{len} bytes at {offset}, cut at {cut}, then {end:?}");
    let written = |offset, data, sent| {
        let answered = sent && end == End::Listen && polite;
        Written { what: what.clone(), offset, data, sent, answered }
    };
    [written(offset, one, cut >= first), written(offset + len, two, cut == script.len())]
}

/// Waits, by asking for something else, until no request is in flight.
fn wait_for_the_dead(client: &mut Client, disk: &Arc<Disk>) {
    let mut byte = [0];
    for _ in 0..100_000 {
        client.read(0, &mut byte);
        if disk.budget().used() == 0 {
            return;
        }
    }
    panic!("{} bytes of dead clients are never given back", disk.budget().used());
}

/// The test, over the sink that `element` describes. The disk goes on: what the last of the dead had
/// sent may still be on its way.
fn survive(server: &Server, element: &str) -> (Arc<Disk>, Found) {
    let text = format!("element G (type nbd) (listen unix:dying.sock)\nelement D {element}\nG -> D");
    let (disk, _) = server.serve(&text).unwrap();
    let path = server.path("dying.sock");
    let stop = AtomicBool::new(false);
    let (mut offset, mut written) = (LIVING, Vec::new());
    let model = std::thread::scope(|scope| {
        let living = scope.spawn(|| live(&path, &stop));
        for end in [End::Close, End::Listen, End::Stall] {
            for len in LENGTHS {
                let whole = *cuts(len).last().unwrap();
                for cut in cuts(len).into_iter().filter(|cut| end != End::Stall || *cut == whole) {
                    written.extend(die(&path, offset, len, cut, end));
                    // A gap, so that writing too far shows.
                    offset += len + 512 + 77;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        living.join().unwrap()
    });
    assert!(offset <= SIZE);
    let mut client = Client::connect(&path);
    wait_for_the_dead(&mut client, &disk);
    let mut image = vec![0; SIZE];
    for (at, piece) in image.chunks_mut(MIB).enumerate() {
        client.read(at * MIB, piece);
    }
    let found = Found { model, written };
    found.check(&image);
    (disk, found)
}

fn stop(server: &Server, disk: &Arc<Disk>) {
    let stopped = server.wait(blockmason::rt::timeout(Duration::from_secs(60), disk.stop()));
    stopped.expect("the disk stops").unwrap();
}

/// Over a file outside of /tmp, which may be memory and know no O_DIRECT.
fn survive_over_file(direct: &str) {
    let server = Server::new(2);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("disk.img");
    let element = format!("(type file) (path \"{}\") (size {SIZE}) (direct {direct})", path.display());
    let (disk, found) = survive(&server, &element);
    stop(&server, &disk);
    found.check(&std::fs::read(&path).unwrap());
}

#[test]
fn over_memory() {
    let server = Server::new(2);
    let (disk, _) = survive(&server, &format!("(type mem) (size {SIZE})"));
    stop(&server, &disk);
}

#[test]
fn over_a_file() {
    survive_over_file("no");
}

#[test]
fn over_a_file_without_the_page_cache() {
    survive_over_file("yes");
}
