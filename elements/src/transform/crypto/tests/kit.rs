//! Disks that several graphs in a row lead to, requests that are watched, held, torn and refused, and a decoder of
//! what is stored that shares no code with the element.

use super::super::format::{self, COPIES, DATA, ENTRY, HEADER, SESSIONS, TABLE};
use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm_siv::aead::{Aead as SivAead, KeyInit as SivKeyInit, Payload as SivPayload};
use blockmason::describe::{Catalogue, ElementType, Family};
use blockmason::testing::{self, SHARED, TestDisk};
use blockmason::{Children, Cx, Element, Error, Flow, Host, Kind, Op, Prepared, Request, Result};
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::oneshot;

pub(super) static CATALOGUE: Catalogue = &[
    &super::super::TYPE,
    &SHARED,
    &TAP,
    &COARSE,
    &crate::sink::file::TYPE,
    &crate::sink::mem::TYPE,
    &crate::sink::volatile::TYPE,
    &crate::transform::wal::TYPE,
];

thread_local! {
    static TAPPED: RefCell<Tapped> = RefCell::default();
}

/// The element of that name in every graph of type `shared` is a disk in memory of this size.
pub(super) fn share(host: &Host, name: &str, size: u64) {
    share_as(host, name, &format!("(type mem) (size {size})"));
}

/// [`testing::share`], of these types.
pub(super) fn share_as(host: &Host, name: &str, text: &str) -> Arc<dyn Element> {
    testing::share(host, CATALOGUE, name, text)
}

/// What the tap has seen, and what it is to do.
#[derive(Default)]
pub(super) struct Tapped {
    pub(super) log: Vec<(Op, u64, u64)>,
    /// So many changes pass; of the next one half of a longer write does, and nothing after it.
    pub(super) changes_left: Option<usize>,
    /// Writes to slots wait until they are let go.
    pub(super) hold: bool,
    held: Vec<oneshot::Sender<()>>,
}

pub(super) fn tapped<T>(look: impl FnOnce(&mut Tapped) -> T) -> T {
    TAPPED.with_borrow_mut(look)
}

/// Lets all go that is held.
pub(super) fn let_go() -> usize {
    let held = tapped(|tapped| {
        tapped.hold = false;
        std::mem::take(&mut tapped.held)
    });
    let count = held.len();
    for held in held {
        let _ = held.send(());
    }
    count
}

/// Watches what reaches the disk below.
struct Tap;

static TAP: ElementType = ElementType {
    name: "tap",
    family: Family::Fault,
    passes_through: true,
    build: |_| Ok(Arc::new(Tap)),
    ..ElementType::BASE
};

fn dead() -> Error {
    Error::new(Kind::Unavailable, "the process is dead")
}

impl Element for Tap {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let (passes, held) = tapped(|tapped| {
            tapped.log.push((req.op, req.offset, req.len));
            let changes = req.op.changes_data() || req.op == Op::Flush;
            let passes = match &mut tapped.changes_left {
                Some(0) => false,
                Some(left) if changes => {
                    *left -= 1;
                    true
                }
                _ => true,
            };
            let held = (tapped.hold && req.op == Op::Write && req.offset >= DATA).then(|| {
                let (release, released) = oneshot::channel();
                tapped.held.push(release);
                released
            });
            (passes, held)
        });
        match (passes, held) {
            (false, _) => cx.fail(&req, dead()),
            (true, None) => cx.forward(0, req),
            (true, Some(held)) => Flow::later(async move {
                let _ = held.await;
                cx.forward(0, req).await
            }),
        }
    }
}

/// A disk in blocks of 4 KiB: what reaches it is in whole blocks.
struct Coarse;

static COARSE: ElementType =
    ElementType { name: "coarse", build: |_| Ok(Arc::new(Coarse)), ..ElementType::BASE };

impl Element for Coarse {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(blockmason::Geometry { min_block: 4096, ..children.single()?.above() }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        assert_eq!((req.offset | if req.op == Op::Flush { 0 } else { req.len }) % 4096, 0, "{req:?}");
        cx.forward(0, req)
    }
}

/// A folder with a key file, and what it takes to open and close volumes on shared disks.
pub(super) struct Bench {
    pub(super) host: Arc<Host>,
    folder: tempfile::TempDir,
}

/// The key in the file `a.key`.
pub(super) const KEY_A: &[u8] = b"key A has more than thirty-two bytes, all of which count";
pub(super) const KEY_B: &[u8] = b"key B is another one of more than thirty-two bytes";
pub(super) const WORDS: &[u8] = b"correct horse battery staple\n";

/// Room for that many slots.
pub(super) fn room(slots: u64, block: u64) -> u64 {
    DATA + slots * (block + 32)
}

impl Bench {
    /// With a disk `Disk` for so many blocks.
    pub(super) fn new(host: &Arc<Host>, slots: u64, block: u64) -> Bench {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in [("a.key", KEY_A), ("b.key", KEY_B), ("words", WORDS)] {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        share(host, "Disk", room(slots, block));
        TAPPED.take();
        Bench { host: host.clone(), folder }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Serves the volume on a disk, with these parameters; `@` stands for the folder.
    pub(super) async fn serve(&self, disk: &str, params: &str) -> Result<TestDisk> {
        let params = params.replace('@', self.folder.path().to_str().unwrap());
        let text = format!(
            "element X (type crypto) {params} element T (type tap) element {disk} (type shared) X -> T -> {disk}"
        );
        TestDisk::new(&self.host, CATALOGUE, &text, "X").await
    }

    /// The same, opened, by its first key file.
    pub(super) async fn open(&self, disk: &str, params: &str) -> TestDisk {
        self.serve(disk, &format!("(key_file @/a.key) (create yes) {params}")).await.unwrap()
    }

    /// The error of a volume that cannot be opened.
    pub(super) async fn refusal(&self, disk: &str, params: &str) -> String {
        match self.serve(disk, params).await {
            Err(error) => error.to_string(),
            Ok(served) => {
                let error = served.read(0, 512).await.unwrap_err();
                served.disk.stop().await.unwrap();
                error.to_string()
            }
        }
    }

    /// All bytes of a disk below.
    pub(super) async fn image(&self, disk: &str) -> Vec<u8> {
        let raw = self.raw(disk).await;
        let image = raw.read(0, raw.size()).await.unwrap();
        raw.disk.stop().await.unwrap();
        image
    }

    /// Sets a disk below to these bytes.
    pub(super) async fn set(&self, disk: &str, image: &[u8]) {
        share(&self.host, disk, image.len() as u64);
        let raw = self.raw(disk).await;
        for (ix, piece) in
            image.chunks(4096).enumerate().filter(|(_, piece)| piece.iter().any(|byte| *byte != 0))
        {
            raw.write(ix as u64 * 4096, piece).await.unwrap();
        }
        raw.disk.stop().await.unwrap();
    }

    /// The disk below itself.
    pub(super) async fn raw(&self, disk: &str) -> TestDisk {
        let text = format!("element {disk} (type shared)");
        TestDisk::new(&self.host, CATALOGUE, &text, disk).await.unwrap()
    }
}

pub(super) fn get(disk: &TestDisk, handler: &str) -> String {
    disk.disk.graph().get("X", handler).unwrap()
}

/// Calls a handler, and waits until it has been done. What has failed, or an empty text.
pub(super) async fn call(disk: &TestDisk, handler: &str, argument: &str) -> String {
    if let Err(error) = disk.disk.graph().call("X", handler, argument) {
        return error.to_string();
    }
    while get(disk, "pending") != "0" {
        blockmason::rt::sleep(std::time::Duration::from_millis(1)).await;
    }
    get(disk, "error")
}

/// What has been said so far.
pub(super) fn events(host: &Host) -> Vec<String> {
    let news = host.events().follow(1024).take(1024);
    news.events.iter().map(|event| format!("{event:?}")).collect()
}

/// Lets everything go on that can.
pub(super) async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, key);
    aws_lc_rs::hmac::sign(&key, &parts.concat()).as_ref().to_vec()
}

/// HKDF-SHA256 as RFC 5869 writes it, of 32 bytes.
fn hkdf(key: &[u8], salt: &[u8], info: &[&[u8]]) -> Vec<u8> {
    let extracted = hmac(salt, &[key]);
    hmac(&extracted, &[&info.concat(), &[1]])
}

fn gcm(key: &[u8], nonce: &[u8], aad: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let cipher = aes_gcm::Aes256Gcm::new_from_slice(key).unwrap();
    cipher.decrypt(nonce.try_into().unwrap(), Payload { msg: sealed, aad }).ok()
}

fn gcm_seal(key: &[u8], nonce: &[u8], aad: &[u8], plain: &[u8]) -> Vec<u8> {
    let cipher = aes_gcm::Aes256Gcm::new_from_slice(key).unwrap();
    cipher.encrypt(nonce.try_into().unwrap(), Payload { msg: plain, aad }).unwrap()
}

fn siv_seal(key: &[u8], nonce: &[u8], aad: &[u8], plain: &[u8]) -> Vec<u8> {
    let cipher = <aes_gcm_siv::Aes256GcmSiv as SivKeyInit>::new_from_slice(key).unwrap();
    let nonce = aes_gcm_siv::Nonce::from_slice(nonce);
    SivAead::encrypt(&cipher, nonce, SivPayload { msg: plain, aad }).unwrap()
}

/// A volume as docs/formats/crypto.md says, decoded by other means than the element's.
pub(super) struct Oracle<'a> {
    image: &'a [u8],
    pub(super) block: usize,
    id: &'a [u8],
    cipher: u32,
    /// By id.
    keys: HashMap<u32, Vec<u8>>,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

impl<'a> Oracle<'a> {
    /// Opens key slot 0 with a key.
    pub(super) fn new(image: &'a [u8], key: &[u8]) -> Oracle<'a> {
        let header = &image[COPIES[0] as usize..][..HEADER];
        assert_eq!(&header[..8], b"MASONCRY");
        let id = &header[16..32];
        let slot = &header[128..256];
        assert_eq!(slot[..4], [2, 0, 0, 0]);
        let wrapping = hkdf(key, &slot[16..48], &[b"mason crypto key slot", id]);
        let context = [id, &[0, 0, 0, 0, 2, 0, 0, 0]].concat();
        let master = gcm(&wrapping, &slot[48..60], &context, &slot[64..112]).unwrap();
        let mac = hmac(&hkdf(&master, id, &[b"mason crypto header"]), &[&header[..4060]]);
        assert_eq!(mac, header[4060..4092]);
        let wrapping = hkdf(&master, id, &[b"mason crypto data keys"]);
        let mut keys = HashMap::new();
        for key in header[1152..1312].chunks(80).filter(|key| number(&key[..4]) != 0) {
            let context = [id, &key[..4]].concat();
            let opened = gcm(&wrapping, &key[8..20], &context, &key[32..80]).unwrap();
            keys.insert(number(&key[..4]) as u32, opened);
        }
        let block = number(&header[44..48]) as usize;
        Oracle { image, block, id, cipher: number(&header[40..44]) as u32, keys }
    }

    pub(super) fn slot(&self, block: u64) -> &'a [u8] {
        let len = self.block + 32;
        &self.image[DATA as usize + block as usize * len..][..len]
    }

    pub(super) fn blocks(&self) -> u64 {
        ((self.image.len() - DATA as usize) / (self.block + 32)) as u64
    }

    /// Session, id of its key and salt; None of a slot of zeros.
    pub(super) fn session(&self, block: u64) -> Option<(u32, u32, &'a [u8])> {
        let session = number(&self.slot(block)[self.block..][..4]);
        if session == 0 {
            return None;
        }
        assert!(session <= u64::from(SESSIONS));
        let entry = &self.image[TABLE as usize + (session as usize - 1) * ENTRY..][..ENTRY];
        assert_eq!(number(&entry[..4]), session);
        Some((session as u32, number(&entry[4..8]) as u32, &entry[8..40]))
    }

    /// The counter of a slot.
    pub(super) fn counter(&self, block: u64) -> u64 {
        number(&self.slot(block)[self.block + 8..][..8])
    }

    /// The slot that a block must have in its session, with the nonce that it was given.
    pub(super) fn expected(&self, block: u64, plain: &[u8]) -> Vec<u8> {
        let Some((session, key, salt)) = self.session(block) else { return vec![0; self.block + 32] };
        let info: [&[u8]; 3] = [b"mason crypto session", &self.cipher.to_le_bytes(), self.id];
        let session_key = hkdf(&self.keys[&key], salt, &info);
        let counter = self.counter(block).to_le_bytes();
        let nonce = [&[0; 4], counter.as_slice()].concat();
        let (session, key, number) = (session.to_le_bytes(), key.to_le_bytes(), block.to_le_bytes());
        let aad = [b"MASONCRY", self.id, salt, &session, &key, &number].concat();
        let seal = if self.cipher == 1 { gcm_seal } else { siv_seal };
        let sealed = seal(&session_key, &nonce, &aad, plain);
        let (data, tag) = sealed.split_at(plain.len());
        [data, &session, &[0; 4], &counter, tag].concat()
    }
}

/// Where the slot of a block is.
pub(super) fn place(block: u64, len: u64) -> u64 {
    DATA + block * (len + format::TRAILER as u64)
}
