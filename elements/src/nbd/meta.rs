//! Metadata contexts: their queries during the handshake, and block status on the wire.
//!
//! A server's contexts are a list of names, `base:allocation`, `x-mason:dirty`,
//! `qemu:dirty-bitmap:nightly`; a context's id on the wire is its place in that list.

use super::wire::{BadReply, ChunkType, ErrorCode, MAX_STRING, Reader, ReplyTo, string};

/// The context that every server should offer: where data, holes and zeroes are.
pub const ALLOCATION: &str = "base:allocation";
/// `base:allocation`: the range is not allocated.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: the range reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;
/// The context of the first map of changes of an export.
pub const DIRTY: &str = "x-mason:dirty";
/// What the contexts of all its maps begin with, before their names.
pub const BITMAP: &str = "qemu:dirty-bitmap:";
/// What the contexts begin with that say what has changed since a snapshot, before its name.
pub use crate::parallax::CHANGED_SINCE;
/// All of them: the range has changed.
pub const STATE_DIRTY: u64 = 1;

/// The most contexts that an export may offer or a client may have selected.
pub const MAX_CONTEXTS: usize = 64;
/// The most queries in one option.
pub const MAX_QUERIES: usize = 1024;
/// The longest payload of a block status query that is worth reading, in bytes.
pub const MAX_QUERY_PAYLOAD: usize = 8 + 4 * MAX_CONTEXTS;
/// The most extents that [`Status`] collects for one context; a client asks again for the rest.
pub const MAX_EXTENTS: usize = 1 << 16;

/// A context that client and server have agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selected {
    /// What block status chunks call it.
    pub id: u32,
    /// Its name.
    pub name: String,
}

/// Why the data of a context option is not acceptable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadQueries {
    /// It contradicts itself, or a query has no namespace.
    Malformed,
    /// It holds more than [`MAX_QUERIES`].
    TooMany,
}

/// The data of NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queries<'a> {
    /// The export whose contexts are meant.
    pub export: &'a str,
    /// How many queries there are.
    count: usize,
    /// Length and text of each, known to be whole.
    rest: &'a [u8],
}

impl<'a> Queries<'a> {
    /// Takes an option's data apart. A query must be a string with a namespace and a colon.
    pub fn parse(data: &'a [u8]) -> Result<Queries<'a>, BadQueries> {
        let mut reader = Reader(data);
        let export = take_string(&mut reader)?;
        let count = reader.u32().ok_or(BadQueries::Malformed)? as usize;
        let rest = reader.0;
        for _ in 0..count {
            match take_string(&mut reader)?.find(':') {
                None | Some(0) => return Err(BadQueries::Malformed),
                Some(_) => {}
            }
        }
        if !reader.0.is_empty() {
            return Err(BadQueries::Malformed);
        }
        // Only now: a count that the data does not bear out is malformed, however large.
        if count > MAX_QUERIES {
            return Err(BadQueries::TooMany);
        }
        Ok(Queries { export, count, rest })
    }

    /// The queries, in the client's order.
    fn iter(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let mut reader = Reader(self.rest);
        (0..self.count).map_while(move |_| take_string(&mut reader).ok())
    }

    /// The places in `offered` that a listing shows: all without a query, else each that is named, or
    /// that begins with a query that ends in a colon (`base:`, `qemu:`, `qemu:dirty-bitmap:`).
    pub fn listed(&self, offered: &[String]) -> Vec<usize> {
        self.matching(offered, |query, name| {
            query == name || (query.ends_with(':') && name.starts_with(query))
        })
    }

    /// The places in `offered` that are named exactly, each once; none without a query. Wildcards and
    /// unknown names select nothing.
    pub fn selected(&self, offered: &[String]) -> Vec<usize> {
        if self.count == 0 { Vec::new() } else { self.matching(offered, |query, name| query == name) }
    }

    fn matching(&self, offered: &[String], matches: impl Fn(&str, &str) -> bool) -> Vec<usize> {
        let wanted = |name: &str| self.count == 0 || self.iter().any(|query| matches(query, name));
        let offered = offered.iter().take(MAX_CONTEXTS).enumerate();
        offered.filter(|(_, name)| wanted(name)).map(|(place, _)| place).collect()
    }
}

fn take_string<'a>(reader: &mut Reader<'a>) -> Result<&'a str, BadQueries> {
    let len = reader.u32().ok_or(BadQueries::Malformed)? as usize;
    if len > MAX_STRING {
        return Err(BadQueries::Malformed);
    }
    reader.bytes(len).and_then(string).ok_or(BadQueries::Malformed)
}

/// The data of a context option, as a client sends it.
pub fn encode_queries(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    put_string(&mut out, export);
    out.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for query in queries {
        put_string(&mut out, query);
    }
    out
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// The payload of an NBD_CMD_BLOCK_STATUS that has one: which range, and which contexts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusQuery {
    /// Length of the range, in bytes. Its offset is in the request's header.
    pub len: u64,
    /// A bit for each place in the list of selected contexts.
    wanted: u64,
}

impl StatusQuery {
    /// Takes the payload apart. An id that was not selected, a repeated one or none at all is
    /// [`ErrorCode::INVAL`]. `selected` has at most [`MAX_CONTEXTS`] entries.
    pub fn parse(payload: &[u8], selected: &[Selected]) -> Result<StatusQuery, ErrorCode> {
        let mut reader = Reader(payload);
        let len = reader.u64().ok_or(ErrorCode::INVAL)?;
        let mut wanted = 0_u64;
        while !reader.0.is_empty() {
            let id = reader.u32().ok_or(ErrorCode::INVAL)?;
            let place = selected.iter().take(MAX_CONTEXTS).position(|context| context.id == id);
            let bit = 1 << place.ok_or(ErrorCode::INVAL)?;
            if wanted & bit != 0 {
                return Err(ErrorCode::INVAL);
            }
            wanted |= bit;
        }
        if wanted == 0 || len == 0 { Err(ErrorCode::INVAL) } else { Ok(StatusQuery { len, wanted }) }
    }

    /// True if the context at this place of the selected ones is to be answered for.
    pub fn wants(&self, place: usize) -> bool {
        place < MAX_CONTEXTS && self.wanted & (1 << place) != 0
    }
}

/// Appends the payload of a block status request for `len` bytes and these contexts.
pub fn put_status_query(out: &mut Vec<u8>, len: u64, ids: &[u32]) {
    out.extend_from_slice(&len.to_be_bytes());
    for id in ids {
        out.extend_from_slice(&id.to_be_bytes());
    }
}

/// One run of bytes with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, never 0.
    pub len: u64,
    /// Its status, as the context defines it.
    pub status: u64,
}

/// Collects the extents of one context for one request, in order from the request's offset, and keeps
/// the rules: neighbours of one status are one extent, no extent begins beyond the range asked for, one
/// extent within the range if the client wants one, and lengths fit the wire.
#[derive(Clone, Debug)]
pub struct Status {
    extents: Vec<Extent>,
    /// Bytes of the requested range that no extent covers yet.
    left: u64,
    one: bool,
    /// The longest extent that the wire can hold.
    longest: u64,
    full: bool,
}

/// The longest extent in 32 bits that is a multiple of any legal minimum block size (up to 64 KiB).
const LONGEST_COMPACT: u64 = 0xffff_0000;

impl Status {
    /// For a request of `len` bytes; `one` if it carries NBD_CMD_FLAG_REQ_ONE.
    pub fn new(len: u64, one: bool, extended: bool) -> Status {
        let longest = if extended { u64::MAX } else { LONGEST_COMPACT };
        Status { extents: Vec::new(), left: len, one, longest, full: len == 0 }
    }

    /// Adds the next `len` bytes. False once there is no use in more.
    pub fn push(&mut self, len: u64, status: u64) -> bool {
        if self.full || len == 0 {
            return !self.full;
        }
        let merged = self.extents.last().filter(|last| last.status == status).map(|last| last.len);
        let room = self.longest - merged.unwrap_or(0);
        let taken = len.min(room).min(if self.one { self.left } else { u64::MAX });
        let most = if self.one { 1 } else { MAX_EXTENTS };
        let count = self.extents.len();
        match self.extents.last_mut() {
            Some(last) if merged.is_some() => last.len += taken,
            Some(_) if count == most => {
                self.full = true;
                return false;
            }
            _ => self.extents.push(Extent { len: taken, status }),
        }
        self.left = self.left.saturating_sub(taken);
        // What was cut off must not be followed by what comes after it.
        self.full = self.left == 0 || taken < len;
        !self.full
    }

    /// What was collected.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Appends the chunk for `context`. At least one extent must have been pushed: there is no chunk
    /// that describes nothing.
    pub fn put(&self, out: &mut Vec<u8>, to: &ReplyTo, done: bool, context: u32) {
        debug_assert!(!self.extents.is_empty(), "a status chunk describes at least one extent");
        let count = self.extents.len() as u64;
        if to.extended {
            to.put_chunk(out, ChunkType::BLOCK_STATUS_EXT, done, 8 + 16 * count);
            out.extend_from_slice(&context.to_be_bytes());
            out.extend_from_slice(&(count as u32).to_be_bytes());
            for extent in &self.extents {
                out.extend_from_slice(&extent.len.to_be_bytes());
                out.extend_from_slice(&extent.status.to_be_bytes());
            }
        } else {
            to.put_chunk(out, ChunkType::BLOCK_STATUS, done, 4 + 8 * count);
            out.extend_from_slice(&context.to_be_bytes());
            for extent in &self.extents {
                // `longest` keeps lengths in 32 bits; contexts of wider status need extended headers.
                out.extend_from_slice(&(extent.len as u32).to_be_bytes());
                out.extend_from_slice(&(extent.status as u32).to_be_bytes());
            }
        }
    }
}

/// The payload of a block status chunk, checked: at least one extent, none of them empty, and a total
/// that fits 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusChunk<'a> {
    /// The context it is about.
    pub context: u32,
    descriptors: &'a [u8],
    wide: bool,
}

impl<'a> StatusChunk<'a> {
    /// Takes a payload of either block status type apart.
    pub fn parse(kind: ChunkType, payload: &'a [u8]) -> Result<StatusChunk<'a>, BadReply> {
        let short = BadReply("block status chunk is too short");
        let mut reader = Reader(payload);
        let context = reader.u32().ok_or(short)?;
        let wide = kind == ChunkType::BLOCK_STATUS_EXT;
        let announced = if wide { Some(reader.u32().ok_or(short)? as usize) } else { None };
        let size = if wide { 16 } else { 8 };
        let count = reader.0.len() / size;
        if count == 0 || !reader.0.len().is_multiple_of(size) || announced.is_some_and(|n| n != count) {
            return Err(BadReply("block status chunk whose length and count differ"));
        }
        let chunk = StatusChunk { context, descriptors: reader.0, wide };
        let mut total = 0_u64;
        for extent in chunk.extents() {
            total = match total.checked_add(extent.len) {
                Some(sum) if extent.len != 0 => sum,
                _ => return Err(BadReply("block status extent that is empty or too long")),
            };
        }
        Ok(chunk)
    }

    /// The extents, in order from the request's offset. The last may reach beyond the range asked for,
    /// and beyond the end of the export if the server is broken: clip before use.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + use<'a> {
        let mut reader = Reader(self.descriptors);
        let wide = self.wide;
        std::iter::from_fn(move || {
            let (len, status) = match wide {
                true => (reader.u64()?, reader.u64()?),
                false => (u64::from(reader.u32()?), u64::from(reader.u32()?)),
            };
            Some(Extent { len, status })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn offered() -> Vec<String> {
        ["base:allocation", "x-mason:dirty", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"]
            .map(String::from)
            .to_vec()
    }

    fn listed(queries: &[&str]) -> Vec<usize> {
        Queries::parse(&encode_queries("disk", queries)).unwrap().listed(&offered())
    }

    fn selected(queries: &[&str]) -> Vec<usize> {
        Queries::parse(&encode_queries("disk", queries)).unwrap().selected(&offered())
    }

    #[test]
    fn listing_knows_wildcards() {
        assert_eq!(listed(&[]), [0, 1, 2, 3]);
        assert_eq!(listed(&["base:"]), [0]);
        assert_eq!(listed(&["qemu:"]), [2, 3]);
        assert_eq!(listed(&["qemu:dirty-bitmap:"]), [2, 3]);
        assert_eq!(listed(&["qemu:dirty-bitmap:b", "base:allocation"]), [0, 3]);
        assert_eq!(listed(&["base:nothing", "other:", "base:alloc"]), [0_usize; 0]);
    }

    #[test]
    fn selecting_takes_exact_names_once() {
        assert_eq!(selected(&[]), [0_usize; 0]);
        assert_eq!(selected(&["base:", "qemu:dirty-bitmap:", "base:x", "else:where"]), [0_usize; 0]);
        assert_eq!(selected(&["x-mason:dirty", "base:allocation", "x-mason:dirty"]), [0, 1]);
    }

    #[test]
    fn malformed_queries_are_refused() {
        let good = encode_queries("disk", &["base:allocation"]);
        for cut in 0..good.len() {
            assert_eq!(Queries::parse(&good[..cut]), Err(BadQueries::Malformed), "{cut}");
        }
        let mut long = good;
        long.push(0);
        assert_eq!(Queries::parse(&long), Err(BadQueries::Malformed));
        for query in ["", "base", ":leaf", "a\0:b", &"a:".repeat(MAX_STRING)] {
            assert_eq!(Queries::parse(&encode_queries("d", &[query])), Err(BadQueries::Malformed));
        }
        let many = vec!["a:b"; MAX_QUERIES + 1];
        assert_eq!(Queries::parse(&encode_queries("d", &many)), Err(BadQueries::TooMany));
    }

    #[test]
    fn a_status_query_names_known_contexts_once() {
        let contexts = [3, 9].map(|id| Selected { id, name: String::new() });
        let parse = |len: u64, ids: &[u32]| {
            let mut payload = Vec::new();
            put_status_query(&mut payload, len, ids);
            StatusQuery::parse(&payload, &contexts)
        };
        let query = parse(1 << 40, &[9]).unwrap();
        assert_eq!(
            (query.len, query.wants(0), query.wants(1), query.wants(99)),
            (1 << 40, false, true, false)
        );
        assert_eq!(parse(512, &[9, 3]).map(|query| query.wants(0) && query.wants(1)), Ok(true));
        for ids in [&[][..], &[9, 9], &[4]] {
            assert_eq!(parse(512, ids), Err(ErrorCode::INVAL));
        }
        assert_eq!(parse(0, &[9]), Err(ErrorCode::INVAL));
        assert_eq!(StatusQuery::parse(&[0; 11], &contexts), Err(ErrorCode::INVAL));
    }

    fn round_trip(status: &Status, extended: bool) -> Vec<Extent> {
        let to = ReplyTo { cookie: 1, offset: 0, extended };
        let mut out = Vec::new();
        status.put(&mut out, &to, true, 5);
        let (kind, header) = match extended {
            true => (ChunkType::BLOCK_STATUS_EXT, 32),
            false => (ChunkType::BLOCK_STATUS, 20),
        };
        let chunk = StatusChunk::parse(kind, &out[header..]).unwrap();
        assert_eq!(chunk.context, 5);
        chunk.extents().collect()
    }

    proptest! {
        /// The model is the list of statuses of single blocks: what a client reads back must be a true
        /// description of a prefix of it.
        #[test]
        fn extents_tell_the_truth_and_keep_the_rules(
            runs in proptest::collection::vec((1_u64..4_000_000_000, 0_u64..3), 1..20),
            len in 1_u64..20_000_000_000, one: bool, extended: bool,
        ) {
            let mut status = Status::new(len, one, extended);
            for &(run, value) in &runs {
                if !status.push(run, value) {
                    break;
                }
            }
            let extents = round_trip(&status, extended);
            prop_assert_eq!(&extents, status.extents());
            prop_assert!(!one || (extents.len() == 1 && extents[0].len <= len));
            let covered: u64 = extents.iter().map(|extent| extent.len).sum();
            let last = extents.last().unwrap().len;
            prop_assert!(covered - last < len, "an extent begins beyond the range");
            let mut at = 0;
            for extent in &extents {
                for probe in [at, at + extent.len - 1] {
                    let mut end = 0;
                    let truth = runs.iter().find(|(run, _)| { end += run; probe < end }).unwrap().1;
                    prop_assert_eq!(truth, extent.status);
                }
                at += extent.len;
            }
        }

        #[test]
        fn no_payload_panics(payload in proptest::collection::vec(any::<u8>(), 0..80), wide: bool) {
            let kind = if wide { ChunkType::BLOCK_STATUS_EXT } else { ChunkType::BLOCK_STATUS };
            if let Ok(chunk) = StatusChunk::parse(kind, &payload) {
                prop_assert!(chunk.extents().all(|extent| extent.len > 0));
            }
            if let Ok(queries) = Queries::parse(&payload) {
                let _ = (queries.listed(&offered()), queries.selected(&offered()));
            }
            let _ = StatusQuery::parse(&payload, &[]);
        }
    }

    #[test]
    fn an_extent_of_a_terabyte_fits_either_form() {
        let mut compact = Status::new(1 << 30, false, false);
        assert!(!compact.push(1 << 40, 3));
        assert_eq!(round_trip(&compact, false), [Extent { len: LONGEST_COMPACT, status: 3 }]);
        let mut extended = Status::new(1 << 30, false, true);
        assert!(!extended.push(1 << 40, 3));
        assert_eq!(round_trip(&extended, true), [Extent { len: 1 << 40, status: 3 }]);
    }

    #[test]
    fn neighbours_merge_and_extents_are_bounded() {
        let mut status = Status::new(u64::MAX, false, true);
        assert!(status.push(512, 1) && status.push(512, 1));
        assert_eq!(status.extents(), [Extent { len: 1024, status: 1 }]);
        let mut pushed = 0;
        while status.push(512, pushed % 2) {
            pushed += 1;
        }
        assert_eq!(status.extents().len(), MAX_EXTENTS);
    }
}
