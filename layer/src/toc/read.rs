//! From a blob's bytes to a TOC: trust first, then decompression with a
//! bound, then parsing.

use std::io::BufReader;

use serde_json::de::IoRead;
use sluice_oci::{Digest, Hasher};

use super::error::TocError;
use super::memory::BoundedJson;
use super::unpack::{self, Stream};
use super::{Toc, build};
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
    /// Bytes of memory that reading the TOC may take, beyond its compressed
    /// bytes and a mebibyte or two.
    pub max_memory: u64,
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
            max_memory: 1 << 30,
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
    let chunks_end = location.chunks_end();
    if let Some(json) = unpack::at_once(location, compressed, limits)? {
        if let TocTrust::Uncompressed(expected) = trust {
            check_digest(json.bytes(), expected)?;
        }
        return build::build_whole(location.format, chunks_end, json.bytes(), limits);
    }
    // Decompressed twice rather than kept: nothing is parsed before it is
    // known to be what the manifest promises.
    let mut hasher = Hasher::new();
    Stream::open(location, compressed, limits)?.for_each(|piece| hasher.update(piece))?;
    if let TocTrust::Uncompressed(expected) = trust {
        compare(hasher.finish(), expected)?;
    }
    let json = Stream::open(location, compressed, limits)?.reader();
    let json = IoRead::new(BufReader::new(BoundedJson::new(json)));
    let taken = unpack::stream_memory(location.format, compressed);
    build::build(location.format, chunks_end, json, limits, taken)
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
    build::build_whole(format, chunks_end, json, limits)
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
        let mut json = Vec::new();
        match unpack::at_once(location, compressed, limits)? {
            Some(whole) => json.extend_from_slice(whole.bytes()),
            None => {
                let stream = Stream::open(location, compressed, limits)?;
                stream.for_each(|piece| json.extend_from_slice(piece))?;
            }
        }
        Ok(Self {
            location: location.clone(),
            json_digest: Digest::of(&json),
            json,
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
        let (format, chunks_end) = (self.location.format, self.location.chunks_end());
        build::build_whole(format, chunks_end, &self.json, limits)
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
    compare(Digest::of(bytes), expected)
}

fn compare(actual: Digest, expected: &Digest) -> Result<(), TocError> {
    if actual != *expected {
        return Err(TocError::Digest {
            expected: *expected,
            actual,
        });
    }
    Ok(())
}
