//! What a client hears, held against what it should.

use super::{Content, Expected, MAX_LEN};
use blockmason_elements::nbd::meta::{STATE_ZERO, StatusChunk};
use blockmason_elements::nbd::wire::{
    Chunk, ChunkType, Command, CommandFlags, ErrorCode, Reply, ReplyStyle, decode_data, decode_error,
    decode_hole, decode_reply,
};
use std::collections::{HashMap, VecDeque};

/// Takes all replies apart. `polite` if every request has to be answered, and in full.
pub(super) fn check(heard: &[u8], style: ReplyStyle, expected: Vec<Expected>, polite: bool) {
    // Requests of one cookie are answered in their order, since the disk answers at once.
    let mut open: HashMap<u64, VecDeque<Open>> = HashMap::new();
    for expected in expected {
        open.entry(expected.header.cookie).or_default().push_back(Open::new(expected));
    }
    let mut rest = heard;
    while let Some((reply, used)) = decode_reply(style, rest).expect("a reply") {
        let cookie = match reply {
            Reply::Simple { cookie, .. } => cookie,
            Reply::Chunk(chunk) => chunk.cookie,
        };
        let waiting = open.get_mut(&cookie).expect("a reply to a request");
        let first = waiting.front_mut().expect("one reply to a request");
        let Some(payload) = rest[used..].get(..first.payload_len(&reply)) else { break };
        rest = &rest[used + payload.len()..];
        let done = match reply {
            Reply::Simple { error, .. } => first.hear_simple(style, error, payload),
            Reply::Chunk(chunk) => first.hear_chunk(style, &chunk, payload),
        };
        if done {
            waiting.pop_front();
        }
    }
    if polite {
        assert!(rest.is_empty(), "half a reply");
        assert!(open.values().all(VecDeque::is_empty), "a request without an answer");
    }
}

/// A request whose answer has not come in full.
struct Open {
    expected: Expected,
    /// Bytes of a read that have come.
    read: usize,
    /// Contexts that have been described.
    described: Vec<u32>,
    failed: bool,
}

impl Open {
    fn new(expected: Expected) -> Open {
        Open { expected, read: 0, described: Vec::new(), failed: false }
    }

    /// Bytes behind the header of a reply.
    fn payload_len(&self, reply: &Reply) -> usize {
        match (reply, &self.expected.answer) {
            (Reply::Chunk(chunk), _) => chunk.len as usize,
            (Reply::Simple { error: ErrorCode::OK, .. }, Some(Content::Data(data))) => data.len(),
            _ => 0,
        }
    }

    fn hear_simple(&mut self, style: ReplyStyle, error: ErrorCode, payload: &[u8]) -> bool {
        let header = &self.expected.header;
        let content = matches!(header.command, Command::READ | Command::BLOCK_STATUS);
        assert!(style == ReplyStyle::Simple || !content, "a simple reply to {}", header.command);
        match &self.expected.answer {
            None => assert_ne!(error, ErrorCode::OK, "{header:?} is not legal"),
            Some(content) => {
                assert_eq!(error, ErrorCode::OK, "{header:?} is legal");
                assert!(!matches!(content, Content::Data(data) if data != payload), "{header:?}");
            }
        }
        true
    }

    fn hear_chunk(&mut self, style: ReplyStyle, chunk: &Chunk, payload: &[u8]) -> bool {
        let header = self.expected.header;
        let extended = style == ReplyStyle::Extended;
        assert_eq!(chunk.check(extended, MAX_LEN), Ok(()), "{chunk:?}");
        assert!(!extended || chunk.offset == header.offset, "{chunk:?} answers {header:?}");
        match chunk.kind {
            ChunkType::NONE => {}
            ChunkType::OFFSET_DATA => {
                let (offset, data) = decode_data(payload).expect("data");
                self.hear_data(offset, data);
            }
            ChunkType::OFFSET_HOLE => {
                let (offset, len) = decode_hole(payload).expect("a hole");
                self.hear_data(offset, &vec![0; len as usize]);
            }
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT => {
                self.hear_status(&StatusChunk::parse(chunk.kind, payload).expect("a status"));
            }
            kind => {
                decode_error(kind, payload).expect("an error");
                self.failed = true;
            }
        }
        if chunk.is_done() {
            self.check_whole();
        }
        chunk.is_done()
    }

    /// Pieces come in order, which the protocol does not ask for.
    fn hear_data(&mut self, offset: u64, data: &[u8]) {
        let header = &self.expected.header;
        let Some(Content::Data(expected)) = &self.expected.answer else { panic!("data for {header:?}") };
        assert_eq!(offset, header.offset + self.read as u64, "{header:?}");
        assert!(expected[self.read..].starts_with(data), "{header:?} reads something else");
        assert!(!header.flags.contains(CommandFlags::DF) || data.len() == expected.len(), "a fragment");
        self.read += data.len();
    }

    fn hear_status(&mut self, status: &StatusChunk<'_>) {
        let header = &self.expected.header;
        let Some(Content::Status(bytes, contexts)) = &self.expected.answer else {
            panic!("a status for {header:?}")
        };
        assert!(contexts.contains(&status.context), "{header:?} did not ask for {}", status.context);
        let mut rest = bytes.as_slice();
        for extent in status.extents() {
            assert!(!rest.is_empty(), "an extent begins beyond the range");
            let (now, later) = rest.split_at((extent.len as usize).min(rest.len()));
            let zero = now.iter().all(|byte| *byte == 0);
            assert!(zero || extent.status & u64::from(STATE_ZERO) == 0, "called zero, but is not");
            rest = later;
        }
        if header.flags.contains(CommandFlags::REQ_ONE) {
            assert_eq!(status.extents().count(), 1, "{header:?} asked for one extent");
        }
        self.described.push(status.context);
    }

    /// A reply in chunks is over: nothing is missing.
    fn check_whole(&mut self) {
        let header = &self.expected.header;
        match &self.expected.answer {
            None => assert!(self.failed, "{header:?} is not legal"),
            Some(content) => {
                assert!(!self.failed, "{header:?} is legal");
                match content {
                    Content::Nothing => {}
                    Content::Data(data) => assert_eq!(self.read, data.len(), "{header:?}"),
                    Content::Status(_, contexts) => {
                        self.described.sort_unstable();
                        assert_eq!(&self.described, contexts, "{header:?}");
                    }
                }
            }
        }
    }
}
