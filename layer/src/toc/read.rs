//! From a blob's bytes to a TOC: trust first, then decompression with a
//! bound, then parsing.

use std::io::Read;

use sluice_oci::Digest;

use super::error::TocError;
use super::{Toc, build};
use crate::decode::gunzip_at_once;
use crate::{Format, TocLocation};

/// What a TOC must match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TocTrust {
    /// Digest of the JSON, as the annotation `toc.digest` gives it.
    Uncompressed(Digest),
    /// Digest of the compressed TOC, as `manifest-checksum` gives it.
    Compressed(Digest),
}

/// What is refused as too much.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Size of a TOC in bytes, compressed and uncompressed.
    pub max_toc_bytes: u64,
    /// Entries of a TOC, and inodes that it makes.
    pub max_entries: usize,
    /// Bytes that must be decoded to reach the end of any chunk.
    pub max_unit_bytes: u64,
    /// Bytes of all files of the layer together.
    pub max_layer_bytes: u64,
}

impl Default for Limits {
    /// A TOC takes some 300 bytes an entry: these let a layer of half a
    /// million files pass, and one of 8 TiB.
    fn default() -> Self {
        Self {
            max_toc_bytes: 256 << 20,
            max_entries: 1 << 20,
            max_unit_bytes: 64 << 20,
            max_layer_bytes: 1 << 43,
        }
    }
}

/// Reads the TOC from its compressed bytes, which are those of
/// [`TocLocation::range`]. Its digest is checked against `trust` before it
/// is parsed, before it is even decompressed where `trust` allows that.
pub fn read_toc(
    location: &TocLocation,
    compressed: &[u8],
    trust: &TocTrust,
    limits: &Limits,
) -> Result<Toc, TocError> {
    check_size(location, compressed, limits)?;
    if let TocTrust::Compressed(expected) = trust {
        check_digest(compressed, expected)?;
    }
    let decompressed = decompress(location, compressed, limits)?;
    let json = json_of(location.format, &decompressed)?;
    if let TocTrust::Uncompressed(expected) = trust {
        check_digest(json, expected)?;
    }
    build::build(location.format, location.chunks_end(), json, limits)
}

/// Reads a TOC from its uncompressed JSON, of a blob whose chunks end at
/// `chunks_end`.
pub fn read_toc_json(
    format: Format,
    chunks_end: u64,
    json: &[u8],
    expected: &Digest,
    limits: &Limits,
) -> Result<Toc, TocError> {
    if json.len() as u64 > limits.max_toc_bytes {
        return Err(TocError::TooLarge {
            limit: limits.max_toc_bytes,
        });
    }
    check_digest(json, expected)?;
    build::build(format, chunks_end, json, limits)
}

/// A TOC that nothing vouches for: for looking at images, and for finding
/// the digests that an annotation should have. Never mount what it describes.
#[derive(Debug, Clone, PartialEq)]
pub struct UntrustedToc {
    location: TocLocation,
    json: Vec<u8>,
    json_digest: Digest,
    compressed_digest: Digest,
}

impl UntrustedToc {
    /// Decompresses a TOC, within `limits`, and digests it.
    pub fn read(
        location: &TocLocation,
        compressed: &[u8],
        limits: &Limits,
    ) -> Result<Self, TocError> {
        check_size(location, compressed, limits)?;
        let decompressed = decompress(location, compressed, limits)?;
        let json = json_of(location.format, &decompressed)?;
        Ok(Self {
            location: location.clone(),
            json: json.to_vec(),
            json_digest: Digest::of(json),
            compressed_digest: Digest::of(compressed),
        })
    }

    /// The JSON as it is in the blob.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// Digest of the JSON: what `toc.digest` should say.
    pub fn json_digest(&self) -> Digest {
        self.json_digest
    }

    /// Digest of the compressed TOC: what `manifest-checksum` should say.
    pub fn compressed_digest(&self) -> Digest {
        self.compressed_digest
    }

    /// Whether the TOC is the one that `trust` names.
    pub fn matches(&self, trust: &TocTrust) -> bool {
        match trust {
            TocTrust::Uncompressed(expected) => *expected == self.json_digest,
            TocTrust::Compressed(expected) => *expected == self.compressed_digest,
        }
    }

    /// The tree it describes, found consistent in itself but vouched for by
    /// nobody.
    pub fn parse_without_trust(&self, limits: &Limits) -> Result<Toc, TocError> {
        build::build(
            self.location.format,
            self.location.chunks_end(),
            &self.json,
            limits,
        )
    }
}

fn check_size(location: &TocLocation, compressed: &[u8], limits: &Limits) -> Result<(), TocError> {
    location.check(limits)?;
    if compressed.len() as u64 != location.compressed_size {
        return Err(TocError::Size {
            expected: location.compressed_size,
            actual: compressed.len() as u64,
        });
    }
    Ok(())
}

fn check_digest(bytes: &[u8], expected: &Digest) -> Result<(), TocError> {
    let actual = Digest::of(bytes);
    if actual != *expected {
        return Err(TocError::Digest {
            expected: *expected,
            actual,
        });
    }
    Ok(())
}

fn decompress(
    location: &TocLocation,
    compressed: &[u8],
    limits: &Limits,
) -> Result<Vec<u8>, TocError> {
    let format = location.format;
    let failed = |error: std::io::Error| TocError::Compression {
        format,
        reason: error.to_string(),
    };
    // The tar around an eStargz TOC takes a header, padding and two blocks.
    let limit = limits.max_toc_bytes.saturating_add(4 * TAR_BLOCK as u64);
    let mut output = Vec::new();
    match format {
        Format::Estargz => match gunzip_at_once(compressed, limit) {
            Some(whole) => output = whole,
            None => {
                flate2::bufread::GzDecoder::new(compressed)
                    .take(limit + 1)
                    .read_to_end(&mut output)
                    .map_err(failed)?;
            }
        },
        Format::ZstdChunked => {
            let size = location.uncompressed_size.unwrap_or(limits.max_toc_bytes);
            output =
                zstd::bulk::decompress(compressed, usize::try_from(size).unwrap_or(usize::MAX))
                    .map_err(failed)?;
            if location.uncompressed_size.is_some() && output.len() as u64 != size {
                return Err(TocError::Size {
                    expected: size,
                    actual: output.len() as u64,
                });
            }
        }
    }
    if output.len() as u64 > limit {
        return Err(TocError::TooLarge {
            limit: limits.max_toc_bytes,
        });
    }
    Ok(output)
}

const TAR_BLOCK: usize = 512;
const TOC_TAR_NAME: &[u8] = b"stargz.index.json";

/// The JSON within the decompressed TOC: eStargz wraps it in a tar.
fn json_of(format: Format, decompressed: &[u8]) -> Result<&[u8], TocError> {
    if format == Format::ZstdChunked {
        return Ok(decompressed);
    }
    let refuse = |reason: &str| TocError::Compression {
        format,
        reason: reason.to_owned(),
    };
    let (header, content) = decompressed
        .split_at_checked(TAR_BLOCK)
        .ok_or_else(|| refuse("it is no tar"))?;
    let name = header[..100].split(|byte| *byte == 0).next();
    if name != Some(TOC_TAR_NAME) || !matches!(header[156], b'0' | 0) {
        return Err(refuse("its tar does not begin with stargz.index.json"));
    }
    let size = header[124..136]
        .iter()
        .skip_while(|byte| **byte == b' ')
        .take_while(|byte| !matches!(byte, b' ' | 0))
        .try_fold(0usize, |size, digit| {
            matches!(digit, b'0'..=b'7').then(|| size << 3 | usize::from(digit - b'0'))
        })
        .ok_or_else(|| refuse("its tar header has no size"))?;
    content
        .get(..size)
        .ok_or_else(|| refuse("its tar ends before stargz.index.json does"))
}
