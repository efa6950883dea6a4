//! Asking options, and believing little of the answers.

use super::{MAX_REPLIES, REQUESTED};
use crate::nbd::handshake::{BlockSizes, HandshakeError, MAX_OPTION, read_array, read_data};
use crate::nbd::meta::{MAX_CONTEXTS, Selected, encode_queries};
use crate::nbd::server::Listed;
use crate::nbd::wire::{
    Info, OptionCode, OptionHeader, Reader, ReplyCode, TransmissionFlags, be_u16, be_u64,
    decode_option_reply, encode_option, fit, string,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

/// What a server says of an export.
#[derive(Clone, Copy, Debug)]
pub(super) struct Described {
    pub(super) size: u64,
    pub(super) flags: TransmissionFlags,
    pub(super) blocks: Option<BlockSizes>,
}

impl Described {
    /// From the size and the flags as they are on the wire.
    pub(super) fn new(bytes: &[u8; 10], blocks: Option<BlockSizes>) -> Described {
        Described { size: be_u64(bytes, 0), flags: TransmissionFlags(be_u16(bytes, 8)), blocks }
    }
}

/// A client that asks one option at a time.
pub(super) struct Haggle<'a, S> {
    stream: &'a mut S,
    /// The data of the reply at hand.
    data: Vec<u8>,
    /// Bytes of replies that this option may still bring.
    budget: u64,
}

fn broken(what: &'static str) -> HandshakeError {
    HandshakeError::protocol(what)
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Haggle<'a, S> {
    pub(super) fn new(stream: &'a mut S) -> Self {
        Haggle { stream, data: Vec::new(), budget: 0 }
    }

    /// Sends an option. `data` is ours, and far shorter than 4 GiB.
    pub(super) async fn send(&mut self, option: OptionCode, data: &[u8]) -> Result<(), HandshakeError> {
        self.budget = MAX_REPLIES;
        let mut message = encode_option(&OptionHeader { option, len: data.len() as u32 }).to_vec();
        message.extend_from_slice(data);
        self.stream.write_all(&message).await?;
        Ok(self.stream.flush().await?)
    }

    /// The next reply to `option`, its data in `self.data`. Errors of the server become errors here.
    async fn reply(&mut self, option: OptionCode) -> Result<ReplyCode, HandshakeError> {
        let reply = decode_option_reply(&read_array(self.stream).await?)?;
        if reply.option != option {
            return Err(broken("the NBD server answered an option that was not asked"));
        }
        let cost = 20 + u64::from(reply.len);
        if reply.len > MAX_OPTION || cost > self.budget {
            return Err(broken("the NBD server's answer is absurdly long"));
        }
        self.budget -= cost;
        read_data(self.stream, &mut self.data, reply.len).await?;
        if reply.code.is_error() {
            let text = String::from_utf8_lossy(&self.data);
            let message = fit(&text).chars().filter(|letter| !letter.is_control()).collect();
            return Err(HandshakeError::Refused { option, code: reply.code, message });
        }
        if reply.code == ReplyCode::ACK && reply.len != 0 {
            return Err(broken("the NBD server sent data with an acknowledgement"));
        }
        Ok(reply.code)
    }

    /// Asks an option that has no data and no answer but yes or no.
    pub(super) async fn simple(&mut self, option: OptionCode) -> Result<(), HandshakeError> {
        self.send(option, &[]).await?;
        match self.reply(option).await? {
            ReplyCode::ACK => Ok(()),
            _ => Err(broken("the NBD server answered an option with something else")),
        }
    }

    /// As [`Haggle::simple`], where no is an answer too; a server that says it is shutting down, or
    /// that TLS comes first, has not said no.
    pub(super) async fn granted(&mut self, option: OptionCode) -> Result<bool, HandshakeError> {
        match self.simple(option).await {
            Ok(()) => Ok(true),
            Err(HandshakeError::Refused {
                code:
                    ReplyCode::ERR_UNSUP
                    | ReplyCode::ERR_POLICY
                    | ReplyCode::ERR_INVALID
                    | ReplyCode::ERR_PLATFORM,
                ..
            }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// NBD_OPT_LIST.
    pub(super) async fn list(&mut self) -> Result<Vec<Listed>, HandshakeError> {
        self.send(OptionCode::LIST, &[]).await?;
        let mut listed = Vec::new();
        loop {
            match self.reply(OptionCode::LIST).await? {
                ReplyCode::ACK => return Ok(listed),
                ReplyCode::SERVER => listed.push(
                    parse_listed(&self.data)
                        .ok_or(broken("the NBD server's list of exports is malformed"))?,
                ),
                _ => return Err(broken("the NBD server's list of exports holds something else")),
            }
        }
    }

    /// NBD_OPT_SET_META_CONTEXT. A server that cannot do it selects nothing.
    pub(super) async fn select(
        &mut self,
        export: &str,
        names: &[&str],
    ) -> Result<Vec<Selected>, HandshakeError> {
        let option = OptionCode::SET_META_CONTEXT;
        self.send(option, &encode_queries(export, names)).await?;
        let mut contexts: Vec<Selected> = Vec::new();
        loop {
            match self.reply(option).await {
                Ok(ReplyCode::ACK) => return Ok(contexts),
                Ok(ReplyCode::META_CONTEXT) => {
                    let context = parse_context(&self.data)
                        .ok_or(broken("the NBD server's metadata context is malformed"))?;
                    let repeated = contexts.iter().any(|other| other.id == context.id);
                    if repeated || contexts.len() == MAX_CONTEXTS {
                        return Err(broken("the NBD server's metadata contexts repeat or never end"));
                    }
                    contexts.push(context);
                }
                Ok(_) => return Err(broken("the NBD server's metadata contexts hold something else")),
                Err(HandshakeError::Refused {
                    code: ReplyCode::ERR_UNSUP | ReplyCode::ERR_POLICY | ReplyCode::ERR_INVALID,
                    ..
                }) => return Ok(Vec::new()),
                Err(error) => return Err(error),
            }
        }
    }

    /// NBD_OPT_GO. On success the transmission phase has begun.
    pub(super) async fn go(&mut self, export: &str) -> Result<Described, HandshakeError> {
        let option = OptionCode::GO;
        let mut data = (export.len() as u32).to_be_bytes().to_vec();
        data.extend_from_slice(export.as_bytes());
        data.extend_from_slice(&1_u16.to_be_bytes());
        data.extend_from_slice(&REQUESTED.0.to_be_bytes());
        self.send(option, &data).await?;
        let (mut described, mut blocks) = (None, None);
        loop {
            match self.reply(option).await? {
                ReplyCode::ACK => break,
                ReplyCode::INFO => match self.data.split_first_chunk::<2>() {
                    Some((kind, rest)) => match Info(u16::from_be_bytes(*kind)) {
                        Info::EXPORT => described = Some(parse_export(rest)?),
                        Info::BLOCK_SIZE => blocks = Some(parse_blocks(rest)?),
                        _ => {}
                    },
                    None => return Err(broken("the NBD server's information is malformed")),
                },
                _ => return Err(broken("the NBD server's information holds something else")),
            }
        }
        let described: Described =
            described.ok_or(broken("the NBD server kept the export's size to itself"))?;
        Ok(Described { blocks, ..described })
    }
}

fn parse_listed(data: &[u8]) -> Option<Listed> {
    let mut reader = Reader(data);
    let len = reader.u32()? as usize;
    let name = string(reader.bytes(len)?)?.to_owned();
    // What follows is for people; what they could not read is left out.
    Some(Listed { name, description: string(reader.0).unwrap_or_default().to_owned() })
}

fn parse_context(data: &[u8]) -> Option<Selected> {
    let mut reader = Reader(data);
    Some(Selected { id: reader.u32()?, name: string(reader.0)?.to_owned() })
}

fn parse_export(data: &[u8]) -> Result<Described, HandshakeError> {
    let bytes = data.try_into().map_err(|_| broken("the NBD server's export information is malformed"))?;
    Ok(Described::new(bytes, None))
}

fn parse_blocks(data: &[u8]) -> Result<BlockSizes, HandshakeError> {
    let mut reader = Reader(data);
    match (reader.u32(), reader.u32(), reader.u32(), reader.0) {
        (Some(minimum), Some(preferred), Some(maximum), []) => {
            let blocks = BlockSizes { minimum, preferred, maximum };
            if blocks.is_legal() {
                return Ok(blocks);
            }
            Err(HandshakeError::protocol(format!("the NBD server's block sizes make no sense: {blocks:?}")))
        }
        _ => Err(broken("the NBD server's block sizes are malformed")),
    }
}
