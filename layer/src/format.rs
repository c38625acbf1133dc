//! The two families of seekable layers.

use std::fmt;

/// How a layer's blob is compressed and where its TOC is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Independent gzip members, TOC in the last tar entry.
    Estargz,
    /// Zstandard frames, TOC in a skippable frame. All three dialects.
    ZstdChunked,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Estargz => "eStargz",
            Self::ZstdChunked => "zstd:chunked",
        })
    }
}
