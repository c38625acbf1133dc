//! Decoding a unit of a blob and verifying the chunks in it.

use std::cell::RefCell;
use std::io::{self, BufRead, Read};
use std::ops::{Deref, Range};

use sluice_oci::Digest;
use zstd::bulk::Decompressor;

use crate::Format;
use crate::toc::ZSTD_WINDOW_LOG;

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
/// [`decode_unit`] and [`verify_chunk`] make one.
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

/// The chunk that a TOC describes by `digest`, if these are its bytes, from
/// wherever they come.
pub fn verify_chunk(bytes: &[u8], digest: Digest) -> Option<VerifiedChunk<'_>> {
    (Digest::of(bytes) == digest).then_some(VerifiedChunk(bytes))
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
/// `wanted`, after its digest matched. No more memory is held than the bytes
/// up to the end of the last wanted chunk, and a megabyte, and the
/// decompressor's window.
///
/// `wanted` is in the order of `inner_offset` without overlap; exact
/// duplicates may follow each other.
pub fn decode_unit<'a>(
    format: Format,
    compressed: &'a [u8],
    wanted: &[Wanted],
    mut each: impl FnMut(usize, VerifiedChunk<'_>),
) -> Result<Decoded<'a>, DecodeError> {
    let mut unit =
        OpenUnit::new(format, compressed, wanted).map_err(|source| DecodeError::Corrupt {
            index: 0,
            format,
            source,
        })?;
    let mut position = 0u64;
    let mut previous: Option<&Wanted> = None;
    for (index, chunk) in wanted.iter().enumerate() {
        if previous != Some(chunk) {
            let skip = chunk
                .inner_offset
                .checked_sub(position)
                .ok_or(DecodeError::Order { index })?;
            let got = unit
                .advance(skip, chunk.size)
                .map_err(|source| DecodeError::Corrupt {
                    index,
                    format,
                    source,
                })?;
            if got < chunk.size {
                return Err(DecodeError::Truncated {
                    index,
                    size: chunk.size,
                    got,
                });
            }
            let actual = Digest::of(unit.chunk());
            if actual != chunk.digest {
                return Err(DecodeError::Mismatch {
                    index,
                    expected: chunk.digest,
                    actual,
                });
            }
            position = chunk.inner_offset.saturating_add(chunk.size);
            previous = Some(chunk);
        }
        each(index, VerifiedChunk(unit.chunk()));
    }
    Ok(Decoded {
        format,
        compressed,
        whole: match unit {
            OpenUnit::Whole { bytes, end, .. } => Some((bytes, end)),
            OpenUnit::Stream { .. } => None,
        },
    })
}

/// A unit whose wanted chunks were handed out.
#[derive(Debug)]
pub struct Decoded<'a> {
    format: Format,
    compressed: &'a [u8],
    /// What was decoded at once, and where in `compressed` that ends.
    whole: Option<(Vec<u8>, usize)>,
}

impl Decoded<'_> {
    /// The unit's uncompressed bytes that belong to none of `chunks`, ranges
    /// of them in order: what the tar has between files. `None` where they are
    /// more than `limit`, or the unit does not end where its data does.
    pub fn rest(self, chunks: &[Range<u64>], limit: usize) -> Option<Vec<u8>> {
        let mut rest = Vec::new();
        let mut between = Between::new(chunks);
        let mut push = |bytes: &[u8]| {
            between.push(bytes, |piece| rest.extend_from_slice(piece));
            rest.len() <= limit
        };
        let mut left = self.compressed;
        if let Some((bytes, end)) = &self.whole
            && (self.format == Format::ZstdChunked || is_one_member(left, bytes))
        {
            if !push(bytes) {
                return None;
            }
            left = &left[*end..];
        }
        if !left.is_empty() {
            let mut reader = unpack(self.format, left).ok()?;
            let mut buffer = vec![0; 64 << 10];
            loop {
                match reader.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) if push(&buffer[..count]) => {}
                    Ok(_) | Err(_) => return None,
                }
            }
        }
        Some(rest)
    }
}

/// Whether a gzip member that was decoded is all of `compressed`: the last
/// trailer is its own.
fn is_one_member(compressed: &[u8], bytes: &[u8]) -> bool {
    let trailer = compressed.last_chunk::<8>();
    trailer.is_some_and(|t| t[..4] == libdeflater::crc32(bytes).to_le_bytes())
}

/// Passes over the chunks of a unit, and on what lies between them.
#[derive(Debug)]
pub struct Between<'c> {
    chunks: &'c [Range<u64>],
    position: u64,
}

impl<'c> Between<'c> {
    /// For the uncompressed bytes of a unit with chunks at these ranges, which
    /// are in order.
    pub fn new(chunks: &'c [Range<u64>]) -> Self {
        Self {
            chunks,
            position: 0,
        }
    }

    /// Takes the next bytes of the unit, and hands out those between chunks.
    pub fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(&[u8])) {
        let split = |bytes: &[u8], len: u64| {
            let len = usize::try_from(len).map_or(bytes.len(), |len| len.min(bytes.len()));
            (len, len as u64)
        };
        while !bytes.is_empty() {
            let Some(chunk) = self.chunks.first() else {
                self.position += bytes.len() as u64;
                return each(bytes);
            };
            if chunk.end <= self.position {
                self.chunks = &self.chunks[1..];
                continue;
            }
            let before = chunk.start.saturating_sub(self.position);
            let (at, len) = match before {
                0 => split(bytes, chunk.end - self.position),
                before => split(bytes, before),
            };
            if before > 0 {
                each(&bytes[..at]);
            }
            self.position += len;
            bytes = &bytes[at..];
        }
    }
}

/// Decompresses a part of a blob that begins and ends between units: all that
/// is in it, one member or frame after the other.
pub fn unpack<'a>(format: Format, compressed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match format {
        Format::Estargz => Box::new(flate2::bufread::MultiGzDecoder::new(compressed)),
        Format::ZstdChunked => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(compressed)?;
            // Memory that a frame asks for, whatever it holds.
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
    })
}

/// Most that is set aside for a chunk before its bytes are there.
const RESERVE: usize = 8 << 20;
/// How much that nobody wants may be decoded with what is wanted: headers of
/// the tar and small files that are there already.
const SURPLUS: u64 = 1 << 20;

/// Most that is decoded at once, whatever the frame or its user says.
const AT_ONCE: u64 = 128 << 20;

/// A unit and the chunk of it that was read last.
enum OpenUnit<'a> {
    /// Decoded at once, which takes half the time of streaming.
    Whole {
        bytes: Vec<u8>,
        chunk: Range<usize>,
        /// Where what was decoded ends in the compressed bytes.
        end: usize,
    },
    /// Decoded as far as read.
    Stream {
        reader: Box<dyn Read + 'a>,
        chunk: Vec<u8>,
    },
}

impl<'a> OpenUnit<'a> {
    fn new(format: Format, compressed: &'a [u8], wanted: &[Wanted]) -> io::Result<Self> {
        let needed = wanted.iter().fold(0, |end: u64, chunk| {
            end.max(chunk.inner_offset.saturating_add(chunk.size))
        });
        let limit = needed.saturating_add(SURPLUS).min(AT_ONCE);
        let whole = match format {
            Format::Estargz => {
                gunzip_at_once(compressed, limit).map(|bytes| (bytes, compressed.len()))
            }
            Format::ZstdChunked => unzstd_at_once(compressed, limit),
        };
        if let Some((bytes, end)) = whole.filter(|(bytes, _)| bytes.len() as u64 >= needed) {
            return Ok(Self::Whole {
                bytes,
                chunk: 0..0,
                end,
            });
        }
        Ok(Self::Stream {
            reader: unpack(format, compressed)?,
            chunk: Vec::new(),
        })
    }

    /// Passes over `skip` bytes and reads up to `size`; how many there were.
    fn advance(&mut self, skip: u64, size: u64) -> io::Result<u64> {
        match self {
            Self::Whole { bytes, chunk, .. } => {
                let place = |from: usize, more: u64| {
                    let to = from.saturating_add(usize::try_from(more).unwrap_or(usize::MAX));
                    to.min(bytes.len())
                };
                let start = place(chunk.end, skip);
                *chunk = start..place(start, size);
                Ok(chunk.len() as u64)
            }
            Self::Stream { reader, chunk } => {
                chunk.clear();
                if io::copy(&mut reader.take(skip), &mut io::sink())? < skip {
                    return Ok(0);
                }
                // A lying size costs no more memory than there is data.
                chunk.reserve(usize::try_from(size).unwrap_or(usize::MAX).min(RESERVE));
                reader.take(size).read_to_end(chunk)?;
                Ok(chunk.len() as u64)
            }
        }
    }

    fn chunk(&self) -> &[u8] {
        match self {
            Self::Whole { bytes, chunk, .. } => &bytes[chunk.clone()],
            Self::Stream { chunk, .. } => chunk,
        }
    }
}

/// Decompresses a single gzip member into as much memory as its trailer says:
/// no more than `limit`, nor than deflate can make of its size. `None` if
/// that is not how it is.
pub(crate) fn gunzip_at_once(compressed: &[u8], limit: u64) -> Option<Vec<u8>> {
    const MOST_DEFLATED: u64 = 1032;
    let size = u64::from(u32::from_le_bytes(*compressed.last_chunk::<4>()?));
    if size > limit.min(compressed.len() as u64 * MOST_DEFLATED) {
        return None;
    }
    let mut output = vec![0; size as usize];
    let written = libdeflater::Decompressor::new()
        .gzip_decompress(compressed, &mut output)
        .ok()?;
    (written == output.len()).then_some(output)
}

/// Decompresses the first Zstandard frame, if its header says its size and
/// that is within `limit`, and says where it ends. What comes after is left
/// alone.
fn unzstd_at_once(compressed: &[u8], limit: u64) -> Option<(Vec<u8>, usize)> {
    let size = zstd::zstd_safe::get_frame_content_size(compressed)
        .ok()
        .flatten()
        .filter(|size| *size <= limit)?;
    let end = zstd::zstd_safe::find_frame_compressed_size(compressed).ok()?;
    let size = usize::try_from(size).ok()?;
    let frame = compressed.get(..end)?;
    // Making one takes a fifth of the time of what it does for a unit.
    thread_local!(static CONTEXT: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) });
    let bytes = CONTEXT.with_borrow_mut(|context| {
        if context.is_none() {
            *context = Decompressor::new().ok();
        }
        context.as_mut()?.decompress(frame, size).ok()
    })?;
    Some((bytes, end))
}

#[cfg(test)]
mod tests;
