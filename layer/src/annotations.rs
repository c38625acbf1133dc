//! What a manifest says about a layer's TOC, in each of the dialects.

use std::collections::BTreeMap;

use sluice_oci::Digest;

use crate::footer::{TocLocation, ZSTD_FRAME_HEADER};
use crate::{Format, StartChunks, StartRanges, TocTrust};

/// Digest of the uncompressed TOC; eStargz, and zstd:chunked by stargz-snapshotter.
pub const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Size of the layer's tar in bytes; eStargz.
pub const UNCOMPRESSED_SIZE: &str = "io.containers.estargz.uncompressed-size";
/// Prefixes of the zstd:chunked annotations: containers/storage today, and
/// before 1.44 (stargz-snapshotter still).
pub const ZSTD_CHUNKED_PREFIXES: [&str; 2] = [
    "io.github.containers.zstd-chunked.",
    "io.containers.zstd-chunked.",
];
/// After a prefix: digest of the compressed TOC.
pub const MANIFEST_CHECKSUM: &str = "manifest-checksum";
/// After a prefix: `offset:compressed size:size:type` of the TOC.
pub const MANIFEST_POSITION: &str = "manifest-position";
/// After a prefix: `offset:compressed size:size` of the tar-split frame.
pub const TARSPLIT_POSITION: &str = "tarsplit-position";
/// `format:offset:compressed size:size` of the TOC, in either format: Sluice's
/// own, under the prefix of which containerd makes labels for snapshotters.
pub const TOC_POSITION: &str = "containerd.io/snapshot/sluice.toc-position";
/// Which chunks before the prefetch landmark a start reads: a bit for each, in
/// the order of the blob and from the least significant on, in base64. Sluice's
/// own, like [`TOC_POSITION`].
pub const START_CHUNKS: &str = "containerd.io/snapshot/sluice.start-chunks";
/// Where in the blob the first of these chunks lie: `start-end`, the end not
/// included, one after the other with commas between. Sluice's own, like
/// [`TOC_POSITION`].
pub const START_RANGES: &str = "containerd.io/snapshot/sluice.start-ranges";

/// A layer's annotations that concern its TOC.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerAnnotations {
    toc_digest: Option<Digest>,
    compressed_toc_digest: Option<Digest>,
    toc_location: Option<TocLocation>,
    toc_hint: Option<TocLocation>,
    uncompressed_size: Option<u64>,
    tar_split: Option<FramePosition>,
    start_chunks: Option<StartChunks>,
    start_ranges: Option<StartRanges>,
}

/// Where a frame that is not the TOC lies in the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FramePosition {
    /// Offset of the frame's payload.
    pub offset: u64,
    /// Its size as stored.
    pub compressed_size: u64,
    /// Its size decompressed.
    pub uncompressed_size: u64,
}

/// An annotation that cannot be what it claims.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// A value that does not parse.
    #[error("the layer's annotation {key} is '{value}', which is no {expected}")]
    Value {
        /// Annotation key.
        key: String,
        /// Its value, cut.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
    /// The two spellings of one annotation differ.
    #[error("the layer's annotations {0} and {1} contradict each other")]
    Contradiction(String, String),
}

impl LayerAnnotations {
    /// Reads the annotations of a layer's descriptor. Annotations that mean
    /// nothing here are ignored; a layer may have none.
    pub fn parse(annotations: &BTreeMap<String, String>) -> Result<Self, AnnotationError> {
        let get = |key: &str| annotations.get(key).map(String::as_str);
        let toc_digest = get(TOC_DIGEST)
            .map(|value| digest(TOC_DIGEST, value))
            .transpose()?;
        let uncompressed_size = get(UNCOMPRESSED_SIZE)
            .map(|value| match numbers(value) {
                Some([size]) => Ok(size),
                None => Err(refuse(UNCOMPRESSED_SIZE, value, "number of bytes")),
            })
            .transpose()?;
        Ok(Self {
            toc_digest,
            compressed_toc_digest: either(annotations, MANIFEST_CHECKSUM, digest)?,
            toc_location: either(annotations, MANIFEST_POSITION, toc_location)?,
            toc_hint: get(TOC_POSITION).and_then(toc_hint),
            uncompressed_size,
            tar_split: either(annotations, TARSPLIT_POSITION, tar_split)?,
            start_chunks: get(START_CHUNKS).and_then(StartChunks::parse),
            start_ranges: get(START_RANGES).and_then(StartRanges::parse),
        })
    }

    /// Those of a layer of which only its root of trust is known.
    pub fn trusting(trust: TocTrust) -> Self {
        let mut annotations = Self::default();
        match trust {
            TocTrust::Uncompressed(digest) => annotations.toc_digest = Some(digest),
            TocTrust::Compressed(digest) => annotations.compressed_toc_digest = Some(digest),
        }
        annotations
    }

    /// What the TOC must match, if the annotations say. The digest of its
    /// compressed bytes is preferred, for it is checked before anything is
    /// decompressed.
    pub fn trust(&self) -> Option<TocTrust> {
        self.compressed_toc_digest
            .map(TocTrust::Compressed)
            .or(self.toc_digest.map(TocTrust::Uncompressed))
    }

    /// Where the TOC is, if the annotations say: then no footer is needed.
    pub fn toc_location(&self) -> Option<TocLocation> {
        self.toc_location.clone()
    }

    /// Where the TOC probably is, if [`TOC_POSITION`] says: to be looked for
    /// there first, and then by the footer.
    pub fn toc_hint(&self) -> Option<TocLocation> {
        self.toc_hint.clone()
    }

    /// The same without anything that says where the TOC is.
    pub fn without_position(&self) -> Self {
        Self {
            toc_location: None,
            toc_hint: None,
            ..self.clone()
        }
    }

    /// Digest of the uncompressed TOC, if stated.
    pub fn toc_digest(&self) -> Option<Digest> {
        self.toc_digest
    }

    /// Digest of the compressed TOC, if stated.
    pub fn compressed_toc_digest(&self) -> Option<Digest> {
        self.compressed_toc_digest
    }

    /// Size of the layer's tar, if stated.
    pub fn uncompressed_size(&self) -> Option<u64> {
        self.uncompressed_size
    }

    /// Which of the prioritized files' chunks a start reads, if
    /// [`START_CHUNKS`] says.
    pub fn start_chunks(&self) -> Option<&StartChunks> {
        self.start_chunks.as_ref()
    }

    /// Where in the blob the first that a start reads lies, if
    /// [`START_RANGES`] says.
    pub fn start_ranges(&self) -> Option<&StartRanges> {
        self.start_ranges.as_ref()
    }

    /// Where the tar-split frame is, if stated.
    pub fn tar_split(&self) -> Option<FramePosition> {
        self.tar_split
    }
}

/// The value of `name` under either prefix; under both, they must agree.
fn either<T: PartialEq>(
    annotations: &BTreeMap<String, String>,
    name: &str,
    parse: impl Fn(&str, &str) -> Result<T, AnnotationError>,
) -> Result<Option<T>, AnnotationError> {
    let [new, old] = ZSTD_CHUNKED_PREFIXES.map(|prefix| format!("{prefix}{name}"));
    let read = |key: &String| {
        annotations
            .get(key)
            .map(|value| parse(key, value))
            .transpose()
    };
    match (read(&new)?, read(&old)?) {
        (Some(a), Some(b)) if a != b => Err(AnnotationError::Contradiction(new, old)),
        (a, b) => Ok(a.or(b)),
    }
}

fn digest(key: &str, value: &str) -> Result<Digest, AnnotationError> {
    value
        .parse()
        .map_err(|_| refuse(key, value, "SHA-256 digest"))
}

fn toc_location(key: &str, value: &str) -> Result<TocLocation, AnnotationError> {
    match numbers(value) {
        Some([offset, compressed_size, uncompressed_size, 1])
            if offset >= ZSTD_FRAME_HEADER as u64
                && compressed_size > 0
                && offset.checked_add(compressed_size).is_some() =>
        {
            Ok(TocLocation {
                format: Format::ZstdChunked,
                offset,
                compressed_size,
                uncompressed_size: Some(uncompressed_size),
            })
        }
        _ => Err(refuse(
            key,
            value,
            "position of the form offset:compressed size:size:1",
        )),
    }
}

/// How a value of [`TOC_POSITION`] begins.
const HINTED: [(Format, &str); 2] = [
    (Format::Estargz, "estargz:"),
    (Format::ZstdChunked, "zstd-chunked:"),
];

/// The value of [`TOC_POSITION`] for a TOC of `size` bytes uncompressed.
pub(crate) fn toc_position(format: Format, offset: u64, compressed: usize, size: usize) -> String {
    let prefix = HINTED.iter().find(|(hinted, _)| *hinted == format);
    let prefix = prefix.map_or("", |(_, prefix)| prefix);
    format!("{prefix}{offset}:{compressed}:{size}")
}

/// A hint that cannot be read is none: the footer is always there.
fn toc_hint(value: &str) -> Option<TocLocation> {
    HINTED.iter().find_map(|(format, prefix)| {
        let [offset, compressed_size, size] = numbers(value.strip_prefix(prefix)?)?;
        offset
            .checked_add(compressed_size)
            .filter(|_| compressed_size > 0)?;
        Some(TocLocation {
            format: *format,
            offset,
            compressed_size,
            uncompressed_size: Some(size),
        })
    })
}

fn tar_split(key: &str, value: &str) -> Result<FramePosition, AnnotationError> {
    match numbers(value) {
        Some([offset, compressed_size, uncompressed_size]) => Ok(FramePosition {
            offset,
            compressed_size,
            uncompressed_size,
        }),
        None => Err(refuse(
            key,
            value,
            "position of the form offset:compressed size:size",
        )),
    }
}

/// Exactly `N` decimal numbers separated by colons.
fn numbers<const N: usize>(value: &str) -> Option<[u64; N]> {
    let mut parsed = [0; N];
    let mut parts = value.split(':');
    for number in &mut parsed {
        let part = parts.next()?;
        if !part.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(parsed)
}

fn refuse(key: &str, value: &str, expected: &'static str) -> AnnotationError {
    AnnotationError::Value {
        key: key.to_owned(),
        value: value.chars().take(100).collect(),
        expected,
    }
}

#[cfg(test)]
mod tests;
