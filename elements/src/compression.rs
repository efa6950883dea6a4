//! The libraries that compress, behind one door. A build without them has none of what they do.

blockmason::words! {
    /// How bytes are compressed.
    pub enum Algorithm {
        /// The fastest.
        Lz4 = "lz4",
        /// Smaller, and slower.
        Zstd = "zstd",
    }
}

pub(crate) use libraries::{pack, unpack};

#[cfg(feature = "compress")]
mod libraries {
    use super::Algorithm;
    use blockmason::{Error, Result};
    use std::cell::RefCell;
    use zstd::bulk::{Compressor, Decompressor};

    thread_local! {
        /// The library asks for room for the worst case. And a context takes longer to make than to use.
        static LZ4: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        static PACKER: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
        static UNPACKER: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
    }

    fn failed<E>(_: E) -> Error {
        Error::internal("the library that compresses has failed")
    }

    /// Compresses into `packed`. The length of what was compressed; None if it is longer than that. LZ4 has no levels.
    ///
    /// # Errors
    /// The library has failed.
    pub(crate) fn pack(
        algorithm: Algorithm,
        level: i32,
        plain: &[u8],
        packed: &mut [u8],
    ) -> Result<Option<usize>> {
        match algorithm {
            Algorithm::Lz4 => LZ4.with_borrow_mut(|room| {
                room.resize(lz4_flex::block::get_maximum_output_size(plain.len()), 0);
                let len = lz4_flex::block::compress_into(plain, room).map_err(failed)?;
                Ok(packed.get_mut(..len).map(|packed| {
                    packed.copy_from_slice(&room[..len]);
                    len
                }))
            }),
            Algorithm::Zstd => PACKER.with_borrow_mut(|kept| {
                let (_, packer) = match kept {
                    Some(packer) if packer.0 == level => packer,
                    other => other.insert((level, Compressor::new(level).map_err(failed)?)),
                };
                Ok(packer.compress_to_buffer(plain, packed).ok())
            }),
        }
    }

    /// Undoes that. The length of what was compressed; None if it is longer than `plain`, or damaged.
    pub(crate) fn unpack(algorithm: Algorithm, packed: &[u8], plain: &mut [u8]) -> Option<usize> {
        match algorithm {
            Algorithm::Lz4 => lz4_flex::block::decompress_into(packed, plain).ok(),
            Algorithm::Zstd => UNPACKER.with_borrow_mut(|kept| {
                let unpacker = match kept {
                    Some(unpacker) => unpacker,
                    None => kept.insert(Decompressor::new().ok()?),
                };
                unpacker.decompress_to_buffer(packed, plain).ok()
            }),
        }
    }
}

#[cfg(not(feature = "compress"))]
mod libraries {
    use super::Algorithm;
    use blockmason::{Error, Result};

    pub(crate) fn pack(_: Algorithm, _: i32, _: &[u8], _: &mut [u8]) -> Result<Option<usize>> {
        Err(Error::unsupported("this program was built without what compresses"))
    }

    pub(crate) fn unpack(_: Algorithm, _: &[u8], _: &mut [u8]) -> Option<usize> {
        None
    }
}
