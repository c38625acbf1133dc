//! One unit becomes one gzip member or Zstandard frame.

use libdeflater::{CompressionLvl, Compressor};
use sluice_oci::Digest;

use super::{Options, RawUnit, WriteError};
use crate::Format;

/// A compressor with its working memory. One for each thread.
pub struct UnitCompressor(Kind);

enum Kind {
    /// With room for the largest unit so far: fresh room for each would be
    /// zeroed, and scattered over the heap.
    Gzip(Compressor, Vec<u8>),
    Zstd(zstd::bulk::Compressor<'static>),
}

/// A unit as it stands in the blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompressedUnit {
    /// The member or frame.
    pub bytes: Vec<u8>,
    /// Digest of the chunk that the unit begins with, if it does.
    pub(super) chunk: Option<Digest>,
}

impl UnitCompressor {
    /// A compressor for `options`; a level beyond the format's is brought to
    /// the nearest.
    pub fn new(options: &Options) -> Result<Self, WriteError> {
        let levels = Options::levels(options.format);
        let level = options.level.clamp(*levels.start(), *levels.end());
        Ok(Self(match options.format {
            Format::Estargz => {
                let level = CompressionLvl::new(level)
                    .map_err(|cause| WriteError::Compression(format!("{cause:?}")))?;
                Kind::Gzip(Compressor::new(level), Vec::new())
            }
            Format::ZstdChunked => Kind::Zstd(zstd::bulk::Compressor::new(level).map_err(failed)?),
        }))
    }

    /// Compresses a unit and digests its chunk.
    pub fn compress(&mut self, unit: &RawUnit) -> Result<CompressedUnit, WriteError> {
        let content = &unit.bytes[..unit.content];
        Ok(CompressedUnit {
            bytes: self.bytes(&unit.bytes)?,
            chunk: (!content.is_empty()).then(|| Digest::of(content)),
        })
    }

    /// Compresses bytes on their own.
    pub(super) fn bytes(&mut self, raw: &[u8]) -> Result<Vec<u8>, WriteError> {
        match &mut self.0 {
            Kind::Gzip(compressor, room) => {
                let bound = compressor.gzip_compress_bound(raw.len());
                if room.len() < bound {
                    room.resize(bound, 0);
                }
                let size = compressor
                    .gzip_compress(raw, &mut room[..bound])
                    .map_err(|cause| WriteError::Compression(cause.to_string()))?;
                Ok(room[..size].to_vec())
            }
            Kind::Zstd(compressor) => compressor.compress(raw).map_err(failed),
        }
    }
}

fn failed(cause: std::io::Error) -> WriteError {
    WriteError::Compression(cause.to_string())
}
