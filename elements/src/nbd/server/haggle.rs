//! Options and their answers.

use super::{Export, ExportInfo, Exports, Greeting, MAX_DRAIN, MAX_OPTIONS, Negotiated, Security};
use crate::nbd::handshake::{HandshakeError, MAX_OPTION, read_array, read_data};
use crate::nbd::meta::{BadQueries, Queries, Selected};
use crate::nbd::stream::Stream;
use crate::nbd::wire::{
    EXPORT_NAME_ZEROES, Info, OptionCode, OptionHeader, OptionReply, Reader, ReplyCode, ReplyStyle,
    TransmissionFlags, decode_option, encode_option_reply, fit, string,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// How haggling ends well.
pub(super) enum End<H> {
    /// The client aborted.
    Left,
    /// The client is told to begin TLS.
    StartTls,
    /// The transmission phase begins.
    Chosen(Chosen<H>),
}

/// [`Negotiated`] before it has its stream.
pub(super) struct Chosen<H> {
    export: Export<H>,
    flags: TransmissionFlags,
    style: ReplyStyle,
    contexts: Vec<Selected>,
}

impl<H> Chosen<H> {
    pub(super) fn with<S>(self, stream: Stream<S>) -> Negotiated<S, H> {
        let Chosen { export, flags, style, contexts } = self;
        Negotiated { stream, export, flags, style, contexts }
    }
}

/// One run of options, on a plain or on a TLS stream. All state that options change is in here.
pub(super) struct Haggle<'a, S, E: Exports> {
    stream: &'a mut S,
    exports: &'a E,
    greeting: Greeting,
    security: Security,
    style: ReplyStyle,
    /// The export named in the last NBD_OPT_SET_META_CONTEXT that succeeded, and what it selected.
    contexts: Option<(String, Vec<Selected>)>,
    /// What the option just before described, so that NBD_OPT_GO repeats NBD_OPT_INFO to the letter.
    described: Option<(String, Export<E::Handle>)>,
    /// The data of the option at hand.
    data: Vec<u8>,
    /// The replies to the option at hand, sent in one go.
    out: Vec<u8>,
}

/// What to do after an option: carry on, or end.
type Next<H> = Result<Option<End<H>>, HandshakeError>;

impl<'a, S, E> Haggle<'a, S, E>
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: Exports,
{
    pub(super) fn new(stream: &'a mut S, exports: &'a E, greeting: Greeting, security: Security) -> Self {
        Haggle {
            stream,
            exports,
            greeting,
            security,
            style: ReplyStyle::Simple,
            contexts: None,
            described: None,
            data: Vec::new(),
            out: Vec::new(),
        }
    }

    /// Answers options until one of them ends the haggling.
    pub(super) async fn run(mut self) -> Result<End<E::Handle>, HandshakeError> {
        for _ in 0..MAX_OPTIONS {
            let header = decode_option(&read_array(self.stream).await?)?;
            if !self.greeting.fixed && header.option != OptionCode::EXPORT_NAME {
                return Err(HandshakeError::protocol("an option from a client that knows none"));
            }
            self.out.clear();
            let described = self.described.take();
            if header.option == OptionCode::SET_META_CONTEXT {
                // What was selected before is gone, even if this attempt fails in whatever way.
                self.contexts = None;
            }
            let end =
                if self.take_data(&header).await? { self.answer(header.option, described)? } else { None };
            let sent = self.send().await;
            // A client that aborts need not wait for the answer.
            if !matches!(end, Some(End::Left)) {
                sent?;
            }
            if let Some(end) = end {
                return Ok(end);
            }
        }
        Err(HandshakeError::protocol("too many options"))
    }

    async fn send(&mut self) -> std::io::Result<()> {
        self.stream.write_all(&self.out).await?;
        self.stream.flush().await
    }

    /// Takes the option's data off the stream, into `data` if it is worth it. False if it was thrown
    /// away and the option answered.
    async fn take_data(&mut self, header: &OptionHeader) -> Result<bool, HandshakeError> {
        let &OptionHeader { option, len } = header;
        let refusal = match option {
            // What comes with an abort is of no interest, whatever it is.
            OptionCode::ABORT => None,
            _ if self.security == Security::Locked && option != OptionCode::STARTTLS => {
                Some((ReplyCode::ERR_TLS_REQD, "this server requires TLS"))
            }
            _ if self.exports.is_closing() => Some((ReplyCode::ERR_SHUTDOWN, "the server is shutting down")),
            _ if !is_known(option) => Some((ReplyCode::ERR_UNSUP, "unknown option")),
            _ if len > MAX_OPTION => Some((ReplyCode::ERR_TOO_BIG, "the option is too long")),
            _ => None,
        };
        match refusal {
            Some(_) if option == OptionCode::EXPORT_NAME => {
                return Err(HandshakeError::protocol("an export name that cannot be answered"));
            }
            None if option != OptionCode::ABORT => {
                read_data(self.stream, &mut self.data, len).await?;
                return Ok(true);
            }
            _ if len > MAX_DRAIN => return Err(HandshakeError::protocol("an absurdly long option")),
            _ => {}
        }
        let mut junk = (&mut *self.stream).take(u64::from(len));
        let drained = tokio::io::copy(&mut junk, &mut tokio::io::sink()).await?;
        if drained < u64::from(len) {
            return Err(HandshakeError::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        match refusal {
            Some((code, message)) => {
                self.refuse(option, code, message);
                Ok(false)
            }
            None => {
                self.data.clear();
                Ok(true)
            }
        }
    }

    fn answer(
        &mut self,
        option: OptionCode,
        described: Option<(String, Export<E::Handle>)>,
    ) -> Next<E::Handle> {
        match option {
            OptionCode::EXPORT_NAME => return self.export_name().map(|chosen| Some(End::Chosen(chosen))),
            OptionCode::ABORT => {
                self.ack(option);
                return Ok(Some(End::Left));
            }
            OptionCode::INFO | OptionCode::GO => return Ok(self.info(option, described).map(End::Chosen)),
            OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => self.meta_context(option),
            _ if !self.data.is_empty() => {
                self.refuse(option, ReplyCode::ERR_INVALID, "this option takes no data");
            }
            OptionCode::LIST => self.list(),
            OptionCode::STARTTLS => return Ok(self.start_tls()),
            OptionCode::STRUCTURED_REPLY if self.style == ReplyStyle::Extended => {
                let message = "extended headers are in use already";
                self.refuse(option, ReplyCode::ERR_EXT_HEADER_REQD, message);
            }
            OptionCode::STRUCTURED_REPLY => {
                self.style = ReplyStyle::Structured;
                self.ack(option);
            }
            OptionCode::EXTENDED_HEADERS => {
                self.style = ReplyStyle::Extended;
                self.ack(option);
            }
            _ => self.refuse(option, ReplyCode::ERR_UNSUP, "unknown option"),
        }
        Ok(None)
    }

    /// NBD_OPT_EXPORT_NAME: what cannot be granted ends the connection, for there is no error reply.
    fn export_name(&mut self) -> Result<Chosen<E::Handle>, HandshakeError> {
        if self.style == ReplyStyle::Extended {
            return Err(HandshakeError::protocol("NBD_OPT_EXPORT_NAME after extended headers"));
        }
        let name = string(&self.data).ok_or(HandshakeError::protocol("an export name that is no string"))?;
        let export = self.exports.find(name).ok_or_else(|| {
            HandshakeError::protocol(format!("the client asked for the unknown export {name:?}"))
        })?;
        let name = name.to_owned();
        let chosen = self.choose(&name, export);
        self.out.extend_from_slice(&chosen.export.info.size.to_be_bytes());
        self.out.extend_from_slice(&chosen.flags.0.to_be_bytes());
        if !self.greeting.no_zeroes {
            self.out.extend_from_slice(&[0; EXPORT_NAME_ZEROES]);
        }
        Ok(chosen)
    }

    /// NBD_OPT_INFO and NBD_OPT_GO. Some if the transmission phase begins.
    fn info(
        &mut self,
        option: OptionCode,
        described: Option<(String, Export<E::Handle>)>,
    ) -> Option<Chosen<E::Handle>> {
        let Some((name, requests)) = parse_info(&self.data) else {
            self.refuse(option, ReplyCode::ERR_INVALID, "the option contradicts itself");
            return None;
        };
        let name = name.to_owned();
        let wants = |info: Info| requests.chunks_exact(2).any(|pair| pair == info.0.to_be_bytes());
        let wanted = Wanted {
            name: wants(Info::NAME),
            description: wants(Info::DESCRIPTION),
            blocks: wants(Info::BLOCK_SIZE),
        };
        let found = match described {
            Some((before, export)) if option == OptionCode::GO && before == name => Some(export),
            _ => self.exports.find(&name),
        };
        let Some(export) = found else {
            self.refuse(option, ReplyCode::ERR_UNKNOWN, "there is no such export");
            return None;
        };
        let flags = self.flags_for(&name, &export.info);
        self.describe(option, &export.info, flags, wanted);
        self.ack(option);
        if option == OptionCode::GO {
            return Some(self.choose(&name, export));
        }
        self.described = Some((name, export));
        None
    }

    /// The NBD_REP_INFO replies about an export.
    fn describe(&mut self, option: OptionCode, info: &ExportInfo, flags: TransmissionFlags, wanted: Wanted) {
        let size = info.size.to_be_bytes();
        self.reply(option, ReplyCode::INFO, &[&Info::EXPORT.0.to_be_bytes(), &size, &flags.0.to_be_bytes()]);
        if wanted.name {
            self.reply(option, ReplyCode::INFO, &[&Info::NAME.0.to_be_bytes(), fit(&info.name).as_bytes()]);
        }
        if wanted.description && !info.description.is_empty() {
            let description = fit(&info.description).as_bytes();
            self.reply(option, ReplyCode::INFO, &[&Info::DESCRIPTION.0.to_be_bytes(), description]);
        }
        let blocks = &info.blocks;
        debug_assert!(blocks.is_legal(), "an export's block sizes keep the rules");
        // A minimum that clients do not expect is worth mentioning unasked.
        if wanted.blocks || blocks.minimum > 1 {
            let minimum = blocks.minimum.to_be_bytes();
            let (preferred, maximum) = (blocks.preferred.to_be_bytes(), blocks.maximum.to_be_bytes());
            let kind = Info::BLOCK_SIZE.0.to_be_bytes();
            self.reply(option, ReplyCode::INFO, &[&kind, &minimum, &preferred, &maximum]);
        }
    }

    /// NBD_OPT_LIST.
    fn list(&mut self) {
        for listed in self.exports.list() {
            let name = fit(&listed.name).as_bytes();
            let description = fit(&listed.description).as_bytes();
            let len = (name.len() as u32).to_be_bytes();
            self.reply(OptionCode::LIST, ReplyCode::SERVER, &[&len, name, description]);
        }
        self.ack(OptionCode::LIST);
    }

    /// NBD_OPT_STARTTLS.
    fn start_tls(&mut self) -> Option<End<E::Handle>> {
        let option = OptionCode::STARTTLS;
        match self.security {
            Security::Plain => self.refuse(option, ReplyCode::ERR_POLICY, "this server has no TLS"),
            Security::Secure => self.refuse(option, ReplyCode::ERR_INVALID, "TLS is in use already"),
            Security::Upgradable | Security::Locked => {
                self.ack(option);
                return Some(End::StartTls);
            }
        }
        None
    }

    /// NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
    fn meta_context(&mut self, option: OptionCode) {
        let set = option == OptionCode::SET_META_CONTEXT;
        if self.style == ReplyStyle::Simple {
            return self.refuse(option, ReplyCode::ERR_INVALID, "structured replies come first");
        }
        let (name, found) = match Queries::parse(&self.data) {
            Ok(queries) => {
                let offered = self.exports.find(queries.export).map(|export| export.info.contexts);
                let places = offered.as_deref().map(|offered| match set {
                    true => queries.selected(offered),
                    false => queries.listed(offered),
                });
                (queries.export.to_owned(), offered.zip(places))
            }
            Err(BadQueries::TooMany) => {
                return self.refuse(option, ReplyCode::ERR_TOO_BIG, "too many queries");
            }
            Err(BadQueries::Malformed) => {
                return self.refuse(option, ReplyCode::ERR_INVALID, "malformed queries");
            }
        };
        let Some((offered, places)) = found else {
            return self.refuse(option, ReplyCode::ERR_UNKNOWN, "there is no such export");
        };
        let mut selected = Vec::new();
        for place in places {
            let context = &offered[place];
            // A listing's ids mean nothing and are to be 0.
            let id = if set { place as u32 } else { 0 };
            self.reply(option, ReplyCode::META_CONTEXT, &[&id.to_be_bytes(), fit(context).as_bytes()]);
            selected.push(Selected { id, name: context.clone() });
        }
        self.ack(option);
        if set {
            self.contexts = Some((name, selected));
        }
    }

    /// The contexts that count if the export is chosen by `name`: those that were selected for it.
    fn contexts_for(&self, name: &str) -> &[Selected] {
        match &self.contexts {
            Some((selected_for, contexts)) if selected_for == name => contexts,
            _ => &[],
        }
    }

    /// The export's flags, less what this client has no use for.
    fn flags_for(&self, name: &str, info: &ExportInfo) -> TransmissionFlags {
        let mut flags = info.flags | TransmissionFlags::HAS_FLAGS;
        if self.style == ReplyStyle::Simple {
            flags = flags.without(TransmissionFlags::SEND_DF);
        }
        if self.style != ReplyStyle::Extended || self.contexts_for(name).is_empty() {
            flags = flags.without(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
        }
        if !flags.contains(TransmissionFlags::SEND_WRITE_ZEROES) {
            flags = flags.without(TransmissionFlags::SEND_FAST_ZERO);
        }
        flags
    }

    fn choose(&self, name: &str, export: Export<E::Handle>) -> Chosen<E::Handle> {
        Chosen {
            flags: self.flags_for(name, &export.info),
            style: self.style,
            contexts: self.contexts_for(name).to_vec(),
            export,
        }
    }

    fn ack(&mut self, option: OptionCode) {
        self.reply(option, ReplyCode::ACK, &[]);
    }

    fn refuse(&mut self, option: OptionCode, code: ReplyCode, message: &str) {
        self.reply(option, code, &[message.as_bytes()]);
    }

    /// Queues one reply whose data is these parts; together far less than 4 GiB.
    fn reply(&mut self, option: OptionCode, code: ReplyCode, parts: &[&[u8]]) {
        let len = parts.iter().map(|part| part.len() as u32).sum();
        self.out.extend_from_slice(&encode_option_reply(&OptionReply { option, code, len }));
        for part in parts {
            self.out.extend_from_slice(part);
        }
    }
}

/// Which information a client asked for.
#[derive(Clone, Copy)]
struct Wanted {
    name: bool,
    description: bool,
    blocks: bool,
}

/// True for the options that this server answers.
fn is_known(option: OptionCode) -> bool {
    matches!(
        option,
        OptionCode::EXPORT_NAME
            | OptionCode::ABORT
            | OptionCode::LIST
            | OptionCode::STARTTLS
            | OptionCode::INFO
            | OptionCode::GO
            | OptionCode::STRUCTURED_REPLY
            | OptionCode::LIST_META_CONTEXT
            | OptionCode::SET_META_CONTEXT
            | OptionCode::EXTENDED_HEADERS
    )
}

/// The name and the list of 16-bit requests in the data of NBD_OPT_INFO or NBD_OPT_GO.
fn parse_info(data: &[u8]) -> Option<(&str, &[u8])> {
    let mut reader = Reader(data);
    let len = reader.u32()? as usize;
    let name = string(reader.bytes(len)?)?;
    let count = usize::from(reader.u16()?);
    (reader.0.len() == 2 * count).then_some((name, reader.0))
}
