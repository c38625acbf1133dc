//! Finding the TOC from the last bytes of a blob.
//!
//! | format | bytes | content |
//! |---|---|---|
//! | eStargz | 51 | gzip member; extra field: subfield `SG`, length 22, 16 hex digits, `STARGZ` |
//! | eStargz, legacy | 47 | gzip member; extra field: 16 hex digits, `STARGZ` |
//! | eStargz, external TOC | 46 | gzip member; extra field: subfield `SG`, length 17, `STARGZEXTERNALTOC` |
//! | zstd:chunked | 8 + 40 | skippable frame; offset, compressed size, size, type, magic |
//! | zstd:chunked, with tar-split | 8 + 64 | the same with three numbers of the tar-split frame before the magic |

use std::ops::Range;

use crate::Format;
use crate::toc::{Limits, TocError};

/// The longest footer, and so the least tail that [`locate_toc`] needs.
pub const FOOTER_MAX: usize = ZSTD_FRAME_HEADER + 64;

const GZIP_FOOTER: usize = 51;
const GZIP_FOOTER_LEGACY: usize = 47;
const GZIP_FOOTER_EXTERNAL: usize = 46;
/// Magic and extra-field flag that begin every gzip footer.
const GZIP_HEAD: [u8; 4] = [0x1f, 0x8b, 8, 4];
const STARGZ: &[u8] = b"STARGZ";
const EXTERNAL: &[u8] = b"STARGZEXTERNALTOC";

/// Size of a skippable frame's magic and length.
pub(crate) const ZSTD_FRAME_HEADER: usize = 8;
pub(crate) const SKIPPABLE: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
/// stargz-snapshotter and containers/storage up to 1.43, and since.
const ZSTD_MAGICS: [&[u8; 8]; 2] = [b"GnUlInUx", b"GNUlInUx"];
/// The only TOC type that was ever defined.
const TOC_TYPE: u64 = 1;

/// Where a blob's TOC is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocLocation {
    /// The blob's format.
    pub format: Format,
    /// Offset of the compressed TOC's first byte in the blob. In zstd:chunked
    /// that is the payload of its skippable frame.
    pub offset: u64,
    /// Size of the compressed TOC in bytes.
    pub compressed_size: u64,
    /// Size of the TOC in bytes, where footer or annotation give it.
    pub uncompressed_size: Option<u64>,
}

impl TocLocation {
    /// Where in the blob the chunks end.
    pub fn chunks_end(&self) -> u64 {
        match self.format {
            Format::Estargz => self.offset,
            Format::ZstdChunked => self.offset.saturating_sub(ZSTD_FRAME_HEADER as u64),
        }
    }

    /// The byte range of the compressed TOC in the blob.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.compressed_size)
    }

    /// The compressed TOC, if `tail` (the last bytes of the blob) holds all
    /// of it.
    pub fn slice_of<'a>(&self, tail: &'a [u8], blob_size: u64) -> Option<&'a [u8]> {
        let tail_start = blob_size.checked_sub(tail.len() as u64)?;
        let start = usize::try_from(self.offset.checked_sub(tail_start)?).ok()?;
        let end = start.checked_add(usize::try_from(self.compressed_size).ok()?)?;
        tail.get(start..end)
    }

    /// Refuses a TOC that is too large to be read, before it is fetched.
    pub fn check(&self, limits: &Limits) -> Result<(), TocError> {
        let size = self
            .compressed_size
            .max(self.uncompressed_size.unwrap_or_default());
        if size > limits.max_toc_bytes {
            return Err(TocError::TooLarge {
                limit: limits.max_toc_bytes,
            });
        }
        Ok(())
    }
}

/// Why the end of a blob does not lead to a TOC.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FooterError {
    /// More of the blob's end is needed.
    #[error("the last {needed} bytes of the blob are needed to find its table of contents")]
    TailTooShort {
        /// How many of the last bytes.
        needed: u64,
    },
    /// An ordinary layer.
    #[error(
        "the blob ends in no known footer: it is neither eStargz nor zstd:chunked; convert the image with 'sluice convert'"
    )]
    NotSeekable,
    /// The TOC is in another image.
    #[error(
        "the blob is eStargz with its table of contents in a separate image, which is not supported; convert the image with 'sluice convert'"
    )]
    ExternalToc,
    /// A footer whose numbers cannot be right.
    #[error(
        "the {format} footer places the table of contents at {offset} with {size} bytes, outside of the blob of {blob_size} bytes"
    )]
    OutsideBlob {
        /// The blob's format.
        format: Format,
        /// Offset as the footer has it.
        offset: u64,
        /// Compressed size as the footer has it.
        size: u64,
        /// Size of the blob.
        blob_size: u64,
    },
    /// A table of contents of an unknown kind.
    #[error("the zstd:chunked footer names table-of-contents type {0}; only type 1 is known")]
    UnknownType(u64),
}

/// Finds the TOC of a blob of `blob_size` bytes from its last bytes. `tail`
/// needs [`FOOTER_MAX`] bytes, or the whole blob if that is shorter.
pub fn locate_toc(tail: &[u8], blob_size: u64) -> Result<TocLocation, FooterError> {
    let needed = (FOOTER_MAX as u64).min(blob_size);
    if (tail.len() as u64) < needed {
        return Err(FooterError::TailTooShort { needed });
    }
    for (size, prefix) in [
        (GZIP_FOOTER, &[26, 0, b'S', b'G', 22, 0][..]),
        (GZIP_FOOTER_LEGACY, &[22, 0][..]),
    ] {
        let footer = last(tail, size);
        if let Some(offset) = footer.and_then(|footer| gzip_offset(footer, prefix)) {
            return gzip_location(offset, size as u64, blob_size);
        }
    }
    if let Some(footer) = last(tail, GZIP_FOOTER_EXTERNAL)
        && gzip_extra(footer, &[21, 0, b'S', b'G', 17, 0])
            .is_some_and(|rest| rest.starts_with(EXTERNAL))
    {
        return Err(FooterError::ExternalToc);
    }
    for payload_size in [64, 40] {
        let Some(frame) = last(tail, ZSTD_FRAME_HEADER + payload_size) else {
            continue;
        };
        let (header, payload) = frame.split_at(ZSTD_FRAME_HEADER);
        let magic = &payload[payload_size - 8..];
        if header[..4] == SKIPPABLE
            && header[4..] == (payload_size as u32).to_le_bytes()
            && ZSTD_MAGICS.iter().any(|known| magic == *known)
        {
            return zstd_location(payload, blob_size - frame.len() as u64, blob_size);
        }
    }
    Err(FooterError::NotSeekable)
}

fn last(tail: &[u8], size: usize) -> Option<&[u8]> {
    tail.len()
        .checked_sub(size)
        .and_then(|start| tail.get(start..))
}

/// What follows `prefix` in the extra field of a gzip footer.
fn gzip_extra<'a>(footer: &'a [u8], prefix: &[u8]) -> Option<&'a [u8]> {
    if !footer.starts_with(&GZIP_HEAD) {
        return None;
    }
    // Time, extra flags and operating system say nothing here.
    footer.get(10..)?.strip_prefix(prefix)
}

fn gzip_offset(footer: &[u8], prefix: &[u8]) -> Option<u64> {
    let (digits, rest) = gzip_extra(footer, prefix)?.split_at_checked(16)?;
    if !rest.starts_with(STARGZ) {
        return None;
    }
    digits.iter().try_fold(0u64, |value, digit| {
        let digit = char::from(*digit).to_digit(16)?;
        Some(value << 4 | u64::from(digit))
    })
}

fn gzip_location(offset: u64, footer: u64, blob_size: u64) -> Result<TocLocation, FooterError> {
    let format = Format::Estargz;
    match blob_size
        .checked_sub(footer)
        .and_then(|end| end.checked_sub(offset))
    {
        Some(compressed_size) if compressed_size > 0 => Ok(TocLocation {
            format,
            offset,
            compressed_size,
            uncompressed_size: None,
        }),
        _ => Err(FooterError::OutsideBlob {
            format,
            offset,
            size: 0,
            blob_size,
        }),
    }
}

fn zstd_location(payload: &[u8], end: u64, blob_size: u64) -> Result<TocLocation, FooterError> {
    let number = |index: usize| {
        let mut raw = [0; 8];
        raw.copy_from_slice(&payload[8 * index..8 * index + 8]);
        u64::from_le_bytes(raw)
    };
    let (offset, compressed_size, uncompressed_size, kind) =
        (number(0), number(1), number(2), number(3));
    if kind != TOC_TYPE {
        return Err(FooterError::UnknownType(kind));
    }
    let inside = offset
        .checked_add(compressed_size)
        .is_some_and(|toc_end| toc_end <= end);
    if !inside || offset < ZSTD_FRAME_HEADER as u64 || compressed_size == 0 {
        return Err(FooterError::OutsideBlob {
            format: Format::ZstdChunked,
            offset,
            size: compressed_size,
            blob_size,
        });
    }
    Ok(TocLocation {
        format: Format::ZstdChunked,
        offset,
        compressed_size,
        uncompressed_size: Some(uncompressed_size),
    })
}

#[cfg(test)]
mod tests;
