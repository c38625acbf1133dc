//! Decoding a unit of a blob and verifying the chunks in it.

use std::io::{self, Read};
use std::ops::Deref;

use sluice_oci::Digest;

use crate::Format;

/// A chunk that is wanted from a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// Offset of its first byte in the unit's uncompressed bytes.
    pub inner_offset: u64,
    /// Size in bytes.
    pub size: u64,
    /// Digest that its bytes must have.
    pub digest: Digest,
}

/// A chunk's bytes, which have the digest that the TOC gives. Only
/// [`decode_unit`] makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifiedChunk<'a>(&'a [u8]);

impl<'a> VerifiedChunk<'a> {
    /// The bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.0
    }
}

impl Deref for VerifiedChunk<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0
    }
}

/// Why a unit did not give the wanted chunks. Positions are those in the
/// caller's list.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The compressed bytes are no such format, or damaged.
    #[error("chunk {index}: the blob's bytes are not valid {format} data: {source}")]
    Corrupt {
        /// Which wanted chunk.
        index: usize,
        /// What they should be.
        format: Format,
        /// What the decompressor says.
        source: io::Error,
    },
    /// The compressed bytes end before the chunk does.
    #[error("chunk {index}: the blob's data ends after {got} of its {size} bytes")]
    Truncated {
        /// Which wanted chunk.
        index: usize,
        /// Its size.
        size: u64,
        /// Bytes of it that there were.
        got: u64,
    },
    /// Bytes that are not those the TOC promises.
    #[error(
        "chunk {index}: its content has digest {actual}, but the table of contents says {expected}"
    )]
    Mismatch {
        /// Which wanted chunk.
        index: usize,
        /// Digest in the TOC.
        expected: Digest,
        /// Digest of the bytes.
        actual: Digest,
    },
    /// The caller's list is out of order.
    #[error("chunk {index}: it begins before the end of the chunk before it")]
    Order {
        /// Which wanted chunk.
        index: usize,
    },
}

/// Decodes a unit and hands each wanted chunk to `each`, with its position in
/// `wanted`, after its digest matched. Nothing beyond the last wanted byte is
/// decoded, and no more memory is held than the largest wanted chunk and the
/// decompressor's window.
///
/// `wanted` is in the order of `inner_offset` without overlap; exact
/// duplicates may follow each other.
pub fn decode_unit(
    format: Format,
    compressed: &[u8],
    wanted: &[Wanted],
    each: impl FnMut(usize, VerifiedChunk<'_>),
) -> Result<(), DecodeError> {
    let corrupt = |source| DecodeError::Corrupt {
        index: 0,
        format,
        source,
    };
    match format {
        Format::Estargz => {
            let reader = flate2::bufread::MultiGzDecoder::new(compressed);
            extract(format, reader, wanted, each)
        }
        Format::ZstdChunked => {
            let reader = zstd::stream::read::Decoder::with_buffer(compressed).map_err(corrupt)?;
            extract(format, reader, wanted, each)
        }
    }
}

fn extract(
    format: Format,
    mut reader: impl Read,
    wanted: &[Wanted],
    mut each: impl FnMut(usize, VerifiedChunk<'_>),
) -> Result<(), DecodeError> {
    let mut buffer = Vec::new();
    let mut position = 0u64;
    let mut previous: Option<&Wanted> = None;
    for (index, chunk) in wanted.iter().enumerate() {
        if previous == Some(chunk) {
            each(index, VerifiedChunk(&buffer));
            continue;
        }
        let corrupt = |source| DecodeError::Corrupt {
            index,
            format,
            source,
        };
        let truncated = |got| DecodeError::Truncated {
            index,
            size: chunk.size,
            got,
        };
        let skip = chunk
            .inner_offset
            .checked_sub(position)
            .ok_or(DecodeError::Order { index })?;
        let skipped =
            io::copy(&mut reader.by_ref().take(skip), &mut io::sink()).map_err(corrupt)?;
        if skipped < skip {
            return Err(truncated(0));
        }
        buffer.clear();
        // A lying size costs address space up to this bound, no more memory
        // than the data that is really there.
        buffer.reserve(
            usize::try_from(chunk.size)
                .unwrap_or(usize::MAX)
                .min(RESERVE),
        );
        reader
            .by_ref()
            .take(chunk.size)
            .read_to_end(&mut buffer)
            .map_err(corrupt)?;
        if (buffer.len() as u64) < chunk.size {
            return Err(truncated(buffer.len() as u64));
        }
        let actual = Digest::of(&buffer);
        if actual != chunk.digest {
            return Err(DecodeError::Mismatch {
                index,
                expected: chunk.digest,
                actual,
            });
        }
        each(index, VerifiedChunk(&buffer));
        position = chunk.inner_offset.saturating_add(chunk.size);
        previous = Some(chunk);
    }
    Ok(())
}

/// Most that is set aside for a chunk before its bytes are there.
const RESERVE: usize = 8 << 20;

#[cfg(test)]
mod tests;
