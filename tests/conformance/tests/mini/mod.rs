//! A small NBD server that can be told to break one rule at a time, to show that the suite notices.
//!
//! It shares nothing with the suite's codec: the bytes are put together here a second time.

use std::io::{Read, Result, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

const SIZE: usize = 1 << 20;

/// The one thing the server does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Nothing,
    UnknownHandshakeFlag,
    AcceptsUnknownClientFlags,
    ForgetsZeroes,
    NoFlagBit,
    AcksUnknownOptions,
    WrongOptionEcho,
    LeavesOptionData,
    SilentAbort,
    PadsGo,
    GoDiffers,
    LateExportItem,
    BadBlockSizes,
    AcceptsBrokenMeta,
    SelectsUnknownLeaf,
    SimpleAfterNegotiation,
    WrongCookie,
    WrongData,
    GapInChunks,
    OverlappingChunks,
    ChunkOutside,
    SplitsDf,
    PayloadAfterError,
    LeavesWritePayload,
    StatusTooLong,
    StatusEmpty,
    DataToldAsZero,
    TwoContexts,
    EndlessChunks,
    HugeChunk,
    HugeOptionReply,
    EndlessOptionReplies,
    EndlessSilence,
    IgnoresDisc,
    SimpleAfterExtended,
    WrongExtendedOffset,
    CompactStatus,
    WrongDescriptorCount,
    HighStatusBits,
    LeavesExtendedPayload,
    ExtendedUnsupportedGo,
    StatusPayloadFlag,
}

struct Shared {
    fault: Fault,
    data: Mutex<Vec<u8>>,
}

/// Serves on `socket` until the test process ends.
pub(crate) fn serve(socket: &Path, fault: Fault) {
    let listener = UnixListener::bind(socket).expect("a socket");
    let shared = Arc::new(Shared { fault, data: Mutex::new(vec![0; SIZE]) });
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let shared = shared.clone();
            // An error is the end of this client only.
            std::thread::spawn(move || connection(stream, &shared));
        }
    });
}

struct Client<'a> {
    stream: UnixStream,
    shared: &'a Shared,
    structured: bool,
    extended: bool,
    context: bool,
    /// The offset of the request at hand, which extended replies repeat.
    offset: usize,
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |sum, &byte| sum << 8 | usize::from(byte))
}

fn connection(mut stream: UnixStream, shared: &Shared) -> Result<()> {
    let fault = shared.fault;
    let flags = if fault == Fault::UnknownHandshakeFlag { 0x83 } else { 3u16 };
    stream.write_all(b"NBDMAGICIHAVEOPT")?;
    stream.write_all(&flags.to_be_bytes())?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer)?;
    let answer = number(&answer);
    if answer & !3 != 0 && fault != Fault::AcceptsUnknownClientFlags {
        return Ok(());
    }
    let mut client = Client { stream, shared, structured: false, extended: false, context: false, offset: 0 };
    let zeroes = answer & 2 == 0 && fault != Fault::ForgetsZeroes;
    while let Some(more) = client.option(zeroes)? {
        if !more {
            return client.transmission();
        }
    }
    Ok(())
}

impl Client<'_> {
    fn is(&self, fault: Fault) -> bool {
        self.shared.fault == fault
    }

    fn take(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn say(&mut self, option: usize, kind: u32, data: &[u8]) -> Result<()> {
        let echo = if self.is(Fault::WrongOptionEcho) { option as u32 + 1 } else { option as u32 };
        let mut out = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
        out.extend(echo.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        self.stream.write_all(&out)
    }

    fn transmission_flags(&self) -> u16 {
        let base = if self.is(Fault::NoFlagBit) { 0 } else { 1 };
        let base = if self.is(Fault::StatusPayloadFlag) { base | 1 << 12 } else { base };
        if self.structured { base | 1 << 7 } else { base }
    }

    /// One option: none at the end of the session, false when transmission begins.
    fn option(&mut self, zeroes: bool) -> Result<Option<bool>> {
        let head = self.take(16)?;
        let (option, len) = (number(&head[8..12]), number(&head[12..16]));
        if &head[..8] != b"IHAVEOPT" || len > 1 << 20 {
            return Ok(None);
        }
        let known = [1, 2, 3, 6, 7, 8, 9, 10, 11].contains(&option);
        let keep = self.is(Fault::LeavesOptionData) && !known;
        let data = if keep { Vec::new() } else { self.take(len)? };
        match option {
            1 if !data.is_empty() => return Ok(None),
            1 => {
                let mut out = (SIZE as u64).to_be_bytes().to_vec();
                out.extend(self.transmission_flags().to_be_bytes());
                out.extend(vec![0; if zeroes { 124 } else { 0 }]);
                self.stream.write_all(&out)?;
                return Ok(Some(false));
            }
            2 if self.is(Fault::SilentAbort) => return Ok(None),
            2 => {
                self.say(2, 1, &[])?;
                return Ok(None);
            }
            3 => self.list(&data)?,
            6 | 7 if self.extended && self.is(Fault::ExtendedUnsupportedGo) => {
                self.say(option, ERR_UNSUP, &[])?
            }
            6 | 7 => return self.info(option, &data),
            8 if self.extended => self.say(8, ERR_EXT_HEADER_REQD, &[])?,
            11 if data.is_empty() => {
                (self.structured, self.extended) = (true, true);
                self.say(11, 1, &[])?;
            }
            11 => self.say(11, ERR_INVALID, &[])?,
            8 if data.is_empty() => {
                self.structured = true;
                self.say(8, 1, &[])?;
            }
            8 => self.say(8, ERR_INVALID, &[])?,
            9 | 10 => self.meta(option, &data)?,
            _ if self.is(Fault::AcksUnknownOptions) => self.say(option, 1, &[])?,
            _ => self.say(option, ERR_UNSUP, b"what?")?,
        }
        Ok(Some(true))
    }

    fn list(&mut self, data: &[u8]) -> Result<()> {
        if !data.is_empty() {
            return self.say(3, ERR_INVALID, &[]);
        }
        if self.is(Fault::HugeOptionReply) {
            let mut out = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
            out.extend([0, 0, 0, 3, 0, 0, 0, 2, 255, 255, 255, 255]);
            self.stream.write_all(&out)?;
        }
        while self.is(Fault::EndlessOptionReplies) {
            self.say(3, 2, &[0, 0, 0, 0])?;
        }
        self.say(3, 2, &[0, 0, 0, 0])?;
        self.say(3, 1, &[])
    }

    fn info(&mut self, option: usize, data: &[u8]) -> Result<Option<bool>> {
        let fits = |data: &[u8]| {
            let name = number(data.get(..4)?);
            let rest = data.get(4..)?.get(name..)?;
            let count = number(rest.get(..2)?);
            (rest.len() == 2 + 2 * count).then_some((name, count))
        };
        let Some((name, count)) = fits(data) else {
            self.say(option, ERR_INVALID, &[])?;
            return Ok(Some(true));
        };
        if name != 0 {
            self.say(option, ERR_UNKNOWN, &[])?;
            return Ok(Some(true));
        }
        let mut item = vec![0, 0];
        let change = usize::from(self.is(Fault::GoDiffers) && option == 7);
        item.extend((SIZE as u64 - 4096 * change as u64).to_be_bytes());
        item.extend(self.transmission_flags().to_be_bytes());
        let late = self.is(Fault::LateExportItem) && option == 6;
        if !late {
            self.say(option, 3, &item)?;
        }
        let wants_sizes = data[6..].chunks(2).take(count).any(|request| request == [0, 3]);
        if wants_sizes {
            let minimum = if self.is(Fault::BadBlockSizes) { 3u32 } else { 1 };
            let sizes = [minimum, 4096, 1 << 25].map(u32::to_be_bytes).concat();
            self.say(option, 3, &[&[0, 3], sizes.as_slice()].concat())?;
        }
        self.say(option, 1, &[])?;
        if option == 7 && self.is(Fault::PadsGo) {
            self.stream.write_all(&[0; 124])?;
        }
        Ok(Some(option == 6))
    }

    fn meta(&mut self, option: usize, data: &[u8]) -> Result<()> {
        self.context &= option == 9;
        let Some(queries) = queries(data).or(self.is(Fault::AcceptsBrokenMeta).then(Vec::new)) else {
            return self.say(option, ERR_INVALID, &[]);
        };
        if number(&data[..4.min(data.len())]) != 0 {
            return self.say(option, ERR_UNKNOWN, &[]);
        }
        if option == 10 && !self.structured {
            return self.say(option, ERR_INVALID, &[]);
        }
        let lax = self.is(Fault::SelectsUnknownLeaf);
        let matched = queries.iter().any(|query| {
            query == b"base:allocation"
                || option == 9 && query == b"base:"
                || lax && query.starts_with(b"base:")
        });
        if matched || option == 9 && queries.is_empty() {
            let id = if option == 10 { 7 } else { 0 };
            self.say(option, 4, &[&[0, 0, 0, id], b"base:allocation".as_slice()].concat())?;
            self.context |= option == 10;
        }
        self.say(option, 1, &[])
    }

    fn transmission(&mut self) -> Result<()> {
        loop {
            let head = self.take(if self.extended { 32 } else { 28 })?;
            let magic = if self.extended { [0x21, 0xe4, 0x1c, 0x71] } else { [0x25, 0x60, 0x95, 0x13] };
            if head[..4] != magic {
                return Ok(());
            }
            let (flags, command) = (number(&head[4..6]), number(&head[6..8]));
            let (offset, len) = (number(&head[16..24]), number(&head[24..]));
            self.offset = offset ^ usize::from(self.is(Fault::WrongExtendedOffset));
            let payload = self.extended && flags & 32 != 0;
            if payload && len > 1 << 25 {
                return Ok(());
            }
            let mut cookie: [u8; 8] = head[8..16].try_into().expect("eight bytes");
            if self.is(Fault::WrongCookie) {
                cookie[0] ^= 1;
            }
            let inside = offset.checked_add(len).is_some_and(|end| end <= SIZE);
            let df = if self.structured { 4 } else { 0 };
            match command {
                1 if self.extended && !payload => self.error(cookie, false)?,
                _ if payload && command != 1 => {
                    let skipped = if self.is(Fault::LeavesExtendedPayload) { 0 } else { len };
                    self.take(skipped)?;
                    self.error(cookie, false)?;
                }
                0 if inside && flags & !df == 0 => self.read(cookie, flags, offset, len)?,
                1 => self.write(cookie, flags & !32, offset, len, inside)?,
                2 if self.is(Fault::IgnoresDisc) => {}
                2 => return Ok(()),
                7 if inside && len > 0 && flags & !8 == 0 && self.context => {
                    self.status(cookie, offset, len)?
                }
                _ => self.error(cookie, command == 0)?,
            }
        }
    }

    /// A reply without chunks, or with extended headers the one that stands for it.
    fn simple(&mut self, cookie: [u8; 8], error: u8, data: &[u8]) -> Result<()> {
        if self.extended && !self.is(Fault::SimpleAfterExtended) && !self.is(Fault::SimpleAfterNegotiation) {
            return match error {
                0 => self.chunk(cookie, true, 0, &[]),
                error => self.chunk(cookie, true, 0x8001, &[0, 0, 0, error, 0, 0]),
            };
        }
        self.stream.write_all(&[&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, error], cookie.as_slice(), data].concat())
    }

    fn chunk(&mut self, cookie: [u8; 8], done: bool, kind: u16, data: &[u8]) -> Result<()> {
        let magic = if self.extended { [0x6e, 0x8a, 0x27, 0x8c] } else { [0x66, 0x8e, 0x33, 0xef] };
        let mut out = [magic.as_slice(), &[0, u8::from(done)], &kind.to_be_bytes(), &cookie].concat();
        if self.extended {
            out.extend((self.offset as u64).to_be_bytes());
            out.extend([0; 4]);
        }
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        self.stream.write_all(&out)
    }

    fn error(&mut self, cookie: [u8; 8], reading: bool) -> Result<()> {
        if self.structured && reading {
            return self.chunk(cookie, true, 0x8001, &[0, 0, 0, 22, 0, 2, b'n', b'o']);
        }
        self.simple(cookie, 22, if self.is(Fault::PayloadAfterError) { &[0; 512] } else { &[] })
    }

    fn content(&mut self, cookie: [u8; 8], offset: usize, len: usize) -> Result<()> {
        let mut data = (offset as u64).to_be_bytes().to_vec();
        data.extend(&self.shared.data.lock().expect("a lock")[offset..offset + len]);
        self.chunk(cookie, false, 1, &data)
    }

    fn read(&mut self, cookie: [u8; 8], flags: usize, offset: usize, len: usize) -> Result<()> {
        if self.is(Fault::EndlessSilence) {
            self.stream.read_exact(&mut [0; 1])?;
        }
        if !self.structured || self.is(Fault::SimpleAfterNegotiation) {
            let mut data = self.shared.data.lock().expect("a lock")[offset..offset + len].to_vec();
            if self.is(Fault::WrongData) {
                data.iter_mut().for_each(|byte| *byte ^= 0x40);
            }
            return self.simple(cookie, 0, &data);
        }
        while self.is(Fault::EndlessChunks) {
            self.chunk(cookie, false, 0x8001, &[0, 0, 0, 5, 0, 0])?;
        }
        if self.is(Fault::HugeChunk) {
            let head = [0x66, 0x8e, 0x33, 0xef, 0, 0, 0, 1];
            self.stream.write_all(&[&head, cookie.as_slice(), &[255; 4], &[0; 64]].concat())?;
        }
        let half = if len >= 2 && (flags & 4 == 0 || self.is(Fault::SplitsDf)) { len / 2 } else { 0 };
        if half > 0 {
            self.content(cookie, offset, half)?;
        }
        let start = match self.shared.fault {
            Fault::GapInChunks if half > 0 => half + 1,
            Fault::OverlappingChunks if half > 0 => half - 1,
            _ => half,
        };
        let beyond = usize::from(self.is(Fault::ChunkOutside) && offset + len < SIZE);
        if start < len {
            self.content(cookie, offset + start, len - start + beyond)?;
        }
        self.chunk(cookie, true, 0, &[])
    }

    fn write(
        &mut self,
        cookie: [u8; 8],
        flags: usize,
        offset: usize,
        len: usize,
        inside: bool,
    ) -> Result<()> {
        let good = inside && flags == 0;
        if !good && self.is(Fault::LeavesWritePayload) {
            return self.error(cookie, false);
        }
        let data = self.take(len)?;
        if !good {
            return self.error(cookie, false);
        }
        self.shared.data.lock().expect("a lock")[offset..offset + len].copy_from_slice(&data);
        self.simple(cookie, 0, &[])
    }

    fn status(&mut self, cookie: [u8; 8], offset: usize, len: usize) -> Result<()> {
        let told = match self.shared.fault {
            Fault::StatusTooLong => len + 1,
            Fault::StatusEmpty => 0,
            _ => len,
        };
        let zero =
            self.shared.data.lock().expect("a lock")[offset..offset + len].iter().all(|&byte| byte == 0);
        let zero = zero || self.is(Fault::DataToldAsZero);
        if self.extended && !self.is(Fault::CompactStatus) {
            let count = if self.is(Fault::WrongDescriptorCount) { 2 } else { 1 };
            let high = u8::from(self.is(Fault::HighStatusBits));
            let told = (told as u64).to_be_bytes();
            let data = [
                &[0, 0, 0, 7, 0, 0, 0, count],
                told.as_slice(),
                &[0, 0, 0, high, 0, 0, 0, 2 * u8::from(zero)],
            ];
            return self.chunk(cookie, true, 6, &data.concat());
        }
        let mut data = vec![0, 0, 0, 7];
        data.extend((told as u32).to_be_bytes());
        data.extend([0, 0, 0, if zero { 2 } else { 0 }]);
        if self.is(Fault::TwoContexts) {
            self.chunk(cookie, false, 5, &data)?;
        }
        self.chunk(cookie, true, 5, &data)
    }
}

const ERR_UNSUP: u32 = 0x8000_0001;
const ERR_INVALID: u32 = 0x8000_0003;
const ERR_UNKNOWN: u32 = 0x8000_0006;
const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;

/// The queries of a metadata option, if its lengths fit.
fn queries(data: &[u8]) -> Option<Vec<Vec<u8>>> {
    let name = number(data.get(..4)?);
    let mut rest = data.get(4..)?.get(name..)?;
    let count = number(rest.get(..4)?);
    rest = &rest[4..];
    let mut found = Vec::new();
    for _ in 0..count {
        let len = number(rest.get(..4)?);
        found.push(rest.get(4..)?.get(..len)?.to_vec());
        rest = &rest[4 + len..];
    }
    rest.is_empty().then_some(found)
}
