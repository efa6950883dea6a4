//! The handshake: greeting, client flags, options and their replies.
//!
//! The rules every option reply must keep (magic, echo of the option, bounded lengths, error text that is a
//! string) are checked here, so that each test of an option checks them too.

use crate::stop::{Check, Stop, ensure, fail};
use crate::transport::Stream;
use crate::wire::{self, In, Out, handshake, info, opt, rep};

/// The longest option reply read: a name, a description and room for what the future adds.
const REPLY_MAX: u32 = 1 << 16;
/// The most replies to one option, and the most bytes of them together.
const REPLIES_MAX: usize = 1 << 14;
const REPLIES_BYTES_MAX: usize = 1 << 22;

/// A connection in the handshake phase, after the client's flags were sent.
pub(crate) struct Haggle {
    pub(crate) stream: Stream,
    pub(crate) server_flags: u16,
}

/// All replies to one option: the intermediate ones and the type of the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) items: Vec<(u32, Vec<u8>)>,
    pub(crate) last: u32,
}

/// What the reply to `NBD_OPT_INFO` or `NBD_OPT_GO` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Info {
    /// Size in bytes and transmission flags.
    pub(crate) export: Option<(u64, u16)>,
    pub(crate) blocks: Option<Blocks>,
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) description: Option<Vec<u8>>,
    /// The types of the items in the order they came.
    pub(crate) kinds: Vec<u16>,
}

/// Size constraints in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) minimum: u32,
    pub(crate) preferred: u32,
    pub(crate) maximum: u32,
}

/// Reads the server's half of the greeting and returns its handshake flags.
pub(crate) fn greeting(stream: &mut Stream) -> Check<u16> {
    let mut bytes = [0; 18];
    stream.receive(&mut bytes, "the greeting")?;
    let mut input = In(&bytes);
    let (first, second, flags) = (input.u64(), input.u64(), input.u16());
    ensure(first == Some(wire::INIT_MAGIC), || format!("the greeting starts with {first:x?}, not NBDMAGIC"))?;
    ensure(second == Some(wire::OPTION_MAGIC), || {
        format!("the greeting goes on with {second:x?}, not IHAVEOPT: not a newstyle server")
    })?;
    Ok(flags.unwrap_or(0))
}

impl Haggle {
    /// Takes the greeting and answers with the flags the server offers, less `without`.
    pub(crate) fn begin(mut stream: Stream, without: u16) -> Check<Self> {
        let server_flags = greeting(&mut stream)?;
        let known = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
        let flags = u32::from(server_flags & known & !without);
        stream.send(&flags.to_be_bytes(), "the client flags")?;
        Ok(Self { stream, server_flags })
    }

    /// Sends an option.
    pub(crate) fn send(&mut self, option: u32, data: &[u8]) -> Check {
        self.stream.send(&wire::option_request(option, data), &format!("option {option}"))
    }

    /// Receives one reply to `option`: its type and data.
    pub(crate) fn reply(&mut self, option: u32) -> Check<(u32, Vec<u8>)> {
        let what = format!("option {option}");
        let mut head = [0; 20];
        self.stream.receive(&mut head, &what)?;
        let mut input = In(&head);
        let (magic, echo) = (input.u64(), input.u32());
        let (kind, len) = (input.u32().unwrap_or(0), input.u32().unwrap_or(0));
        ensure(magic == Some(wire::OPTION_REPLY_MAGIC), || {
            format!("the reply to {what} has magic {magic:x?}: wrong magic, or the stream is out of step")
        })?;
        ensure(echo == Some(option), || format!("the reply to {what} echoes option {echo:?}"))?;
        ensure(len <= REPLY_MAX, || format!("the reply to {what} claims {len} bytes"))?;
        let data = self.stream.receive_vec(len as usize, &what)?;
        if kind & rep::ERROR_BIT != 0
            && let Some(fault) = wire::string_fault(&data)
        {
            return fail(format!("the error text in {} to {what} {fault}", rep::name(kind)));
        }
        Ok((kind, data))
    }

    /// Sends an option and receives all its replies.
    pub(crate) fn ask(&mut self, option: u32, data: &[u8]) -> Check<Answer> {
        self.send(option, data)?;
        self.answer(option)
    }

    /// Receives all replies to an option that was sent.
    pub(crate) fn answer(&mut self, option: u32) -> Check<Answer> {
        let mut items = Vec::new();
        let mut bytes = 0;
        while items.len() < REPLIES_MAX && bytes < REPLIES_BYTES_MAX {
            let (kind, data) = self.reply(option)?;
            bytes += data.len();
            if kind == rep::ACK {
                ensure(data.is_empty(), || {
                    format!("the ACK of option {option} carries {} bytes", data.len())
                })?;
            }
            if kind == rep::ACK || kind & rep::ERROR_BIT != 0 {
                return Ok(Answer { items, last: kind });
            }
            items.push((kind, data));
        }
        fail(format!("option {option} gets {} replies of {bytes} bytes and no end of them", items.len()))
    }

    /// Asks for information about an export with `NBD_OPT_INFO` or `NBD_OPT_GO`.
    pub(crate) fn info(&mut self, option: u32, export: &str, requests: &[u16]) -> Check<(u32, Info)> {
        let answer = self.ask(option, &wire::info_data(export, requests))?;
        let parsed = Info::parse(&answer)?;
        Ok((answer.last, parsed))
    }

    /// Shows that the stream is in step: an option no server knows gets a well-formed error reply.
    pub(crate) fn in_step(&mut self, after: &str) -> Check {
        let answer = self.ask(UNKNOWN_OPTION, &[]).map_err(|stop| match stop {
            Stop::Fail(text) => Stop::Fail(format!("after {after}: {text}")),
            Stop::Closed(_) => Stop::Closed(format!("the option after {after}")),
            Stop::Silent(_) => Stop::Silent(format!("the option after {after}")),
            skip => skip,
        })?;
        ensure(answer.last & rep::ERROR_BIT != 0, || {
            format!("after {after}: an unknown option got {}", rep::name(answer.last))
        })
    }

    /// Enters transmission with `NBD_OPT_EXPORT_NAME`: size and flags. `zeroes` tells whether the 124
    /// bytes of padding must follow.
    pub(crate) fn export_name(&mut self, export: &str, zeroes: bool) -> Check<(u64, u16)> {
        self.send(opt::EXPORT_NAME, export.as_bytes())?;
        let mut head = [0; 10];
        self.stream.receive(&mut head, "EXPORT_NAME")?;
        let mut input = In(&head);
        let found = (input.u64().unwrap_or(0), input.u16().unwrap_or(0));
        if zeroes {
            let mut padding = [1; 124];
            self.stream.receive(&mut padding, "the 124 zeroes after EXPORT_NAME")?;
            ensure(padding == [0; 124], || "the 124 bytes after EXPORT_NAME are not all zero".into())?;
        }
        Ok(found)
    }
}

/// An option number no version of the protocol has given a meaning.
pub(crate) const UNKNOWN_OPTION: u32 = 0x4d41_534f;

impl Answer {
    /// The data of the intermediate replies, which must all be of type `kind`.
    pub(crate) fn all(&self, kind: u32) -> Check<Vec<&[u8]>> {
        let take = |(found, data): &'_ (u32, Vec<u8>)| (*found, data.len());
        match self.items.iter().find(|item| item.0 != kind).map(take) {
            Some((other, _)) => {
                fail(format!("a reply of type {} among {}", rep::name(other), rep::name(kind)))
            }
            None => Ok(self.items.iter().map(|item| item.1.as_slice()).collect()),
        }
    }

    /// The metadata contexts of the answer: ids and names.
    pub(crate) fn contexts(&self) -> Check<Vec<(u32, String)>> {
        let mut found = Vec::new();
        for data in self.all(rep::META_CONTEXT)? {
            let mut input = In(data);
            let Some(id) = input.u32() else { return fail("a META_CONTEXT reply shorter than 4 bytes") };
            if let Some(fault) = wire::string_fault(input.rest()) {
                return fail(format!("a metadata context name {fault}"));
            }
            found.push((id, String::from_utf8_lossy(input.rest()).into_owned()));
        }
        Ok(found)
    }
}

impl Info {
    fn parse(answer: &Answer) -> Check<Self> {
        let mut info = Info::default();
        for data in answer.all(rep::INFO)? {
            let mut input = In(data);
            let Some(kind) = input.u16() else { return fail("an INFO reply shorter than 2 bytes") };
            info.kinds.push(kind);
            info.take(kind, input, data.len())?;
        }
        if answer.last == rep::ACK && info.export.is_none() {
            return fail("success without an INFO_EXPORT item");
        }
        Ok(info)
    }

    fn take(&mut self, kind: u16, mut input: In<'_>, len: usize) -> Check {
        match kind {
            info::EXPORT => {
                ensure(len == 12, || format!("INFO_EXPORT has {len} bytes, not 12"))?;
                self.export = input.u64().zip(input.u16());
            }
            info::BLOCK_SIZE => {
                ensure(len == 14, || format!("INFO_BLOCK_SIZE has {len} bytes, not 14"))?;
                let (minimum, preferred, maximum) = (input.u32(), input.u32(), input.u32());
                self.blocks = Some(Blocks {
                    minimum: minimum.unwrap_or(0),
                    preferred: preferred.unwrap_or(0),
                    maximum: maximum.unwrap_or(0),
                });
            }
            info::NAME => self.name = Some(string(input.rest(), "INFO_NAME")?),
            info::DESCRIPTION => self.description = Some(string(input.rest(), "INFO_DESCRIPTION")?),
            _ => {}
        }
        Ok(())
    }
}

fn string(bytes: &[u8], what: &str) -> Check<Vec<u8>> {
    match wire::string_fault(bytes) {
        Some(fault) => fail(format!("the string in {what} {fault}")),
        None => Ok(bytes.to_vec()),
    }
}

/// The names in a list of `NBD_REP_SERVER` replies.
pub(crate) fn server_names(answer: &Answer) -> Check<Vec<String>> {
    let mut names = Vec::new();
    for data in answer.all(rep::SERVER)? {
        let mut input = In(data);
        let len = input.u32().unwrap_or(u32::MAX);
        let Some(name) = input.bytes(len as usize) else {
            return fail(format!("a SERVER reply of {} bytes claims a name of {len}", data.len()));
        };
        for (bytes, what) in [(name, "an export name"), (input.rest(), "an export description")] {
            string(bytes, what)?;
        }
        names.push(String::from_utf8_lossy(name).into_owned());
    }
    Ok(names)
}

/// The header of an option whose data is `data` but which claims `claimed` bytes.
pub(crate) fn lying_option(option: u32, claimed: u32, data: &[u8]) -> Vec<u8> {
    Out::new().u64(wire::OPTION_MAGIC).u32(option).u32(claimed).bytes(data).done()
}
