//! Writing seekable layers.
//!
//! A [`Splitter`] takes a tar stream in pieces and cuts it into [`RawUnit`]s.
//! Each becomes one gzip member or Zstandard frame by
//! [`UnitCompressor::compress`], which may happen on any thread and in any
//! order. An [`Assembler`] takes the results in the order of the units and
//! gives each its place in the blob; [`finish`] makes what follows them: the
//! TOC and the footer. Nothing depends on time, threads or the size of the
//! pieces, so the same tar and [`Options`] always give the same blob.
//!
//! A unit is the content of one chunk and the tar bytes up to the next
//! chunk: padding and headers. A file that spans several chunks has one unit
//! for each. Readers of every version find each chunk at the start of its
//! unit; `innerOffset`, which would let small files share one, is unknown to
//! stargz-snapshotter before 0.13.

mod compress;
mod crc64;
mod cut;
mod entries;
mod header;
mod order;
mod scan;
mod sparse;
mod split;
mod tail;
mod tar_tree;
mod tarsplit;
mod time;

use crate::Format;

pub use compress::{CompressedUnit, UnitCompressor};
pub use order::{Order, TarIndex};
pub use split::{RawUnit, Split, Splitter, Units};
pub use tail::{Assembler, Tail, finish};
pub use tar_tree::{Origin, TarTree, TarTreeError, Unpacked};

/// Name of the TOC's entry in the tar of an eStargz layer.
pub(crate) const TOC_NAME: &str = "stargz.index.json";
/// Name of the landmark that ends the prioritized files.
pub(crate) const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
/// Name of the landmark of a layer without prioritized files.
pub(crate) const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";

/// Where large files are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Chunking {
    /// At multiples of the chunk size.
    #[default]
    Fixed,
    /// Where the content says so, with the chunk size on average: what is
    /// inserted into a file changes only the chunks around it. The places are
    /// those of FastCDC (2020), with chunks of a quarter to four times the
    /// average; a file up to the average is one chunk.
    Content,
}

impl Chunking {
    /// The largest chunk size with which [`Self::Content`] works.
    pub const LARGEST_AVERAGE: u64 = 4 << 20;
}

/// What a layer is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The format.
    pub format: Format,
    /// The most content bytes in a chunk, but for [`Self::MOST_CHUNKS`]; with
    /// [`Chunking::Content`], the average.
    pub chunk_size: u64,
    /// Where files that are larger are cut.
    pub chunking: Chunking,
    /// Compression level: 1 to 12 for eStargz (libdeflate), 1 to 22 for
    /// zstd:chunked.
    pub level: i32,
}

impl Options {
    /// Chunks of 64 KiB. What a start reads comes in pieces of that order: with
    /// less, the table of contents grows by more than is saved; with more, most
    /// of what is fetched is not read.
    pub const DEFAULT_CHUNK_SIZE: u64 = 64 << 10;
    /// A file has at most so many chunks, while they are not larger than
    /// [`Self::LARGEST_CHUNK`]: the pieces of very large files are larger.
    pub const MOST_CHUNKS: u64 = 16 << 10;
    /// See [`Self::MOST_CHUNKS`]. Readers decode a chunk in memory.
    pub const LARGEST_CHUNK: u64 = 4 << 20;

    /// The default level and chunk size of a format. The levels are the
    /// fastest that, in spite of small chunks, give hardly larger layers than
    /// stargz-snapshotter's defaults.
    pub fn new(format: Format) -> Self {
        Self {
            format,
            chunk_size: Self::DEFAULT_CHUNK_SIZE,
            chunking: Chunking::Fixed,
            level: match format {
                Format::Estargz => 5,
                Format::ZstdChunked => 6,
            },
        }
    }

    /// The chunk size in a file of `size` bytes, at least 1.
    pub(crate) fn chunk_size_of(&self, size: u64) -> u64 {
        let even = match self.chunking {
            Chunking::Fixed => size.div_ceil(Self::MOST_CHUNKS).next_power_of_two(),
            Chunking::Content => 1,
        };
        self.chunk_size.max(even.min(Self::LARGEST_CHUNK))
    }

    /// The levels that a format has.
    pub fn levels(format: Format) -> std::ops::RangeInclusive<i32> {
        match format {
            Format::Estargz => 1..=12,
            Format::ZstdChunked => 1..=22,
        }
    }
}

/// Why a tar stream cannot become a seekable layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// It is no tar at all.
    #[error("it is no tar archive")]
    NotTar,
    /// It ends too soon.
    #[error("the tar archive ends in the middle of an entry, after {position} bytes")]
    Truncated {
        /// Where it ends.
        position: u64,
    },
    /// It contradicts itself.
    #[error("the tar archive is damaged: {0}")]
    Damaged(String),
    /// It is sound, but holds what a TOC cannot express. The layer can stay
    /// as it is.
    #[error("{0}")]
    Unsupported(String),
    /// The compressor failed.
    #[error("compression failed: {0}")]
    Compression(String),
}

impl WriteError {
    fn damaged(why: impl Into<String>) -> Self {
        Self::Damaged(why.into())
    }

    fn unsupported(why: impl Into<String>) -> Self {
        Self::Unsupported(why.into())
    }
}

/// Writes a layer that fits in memory, on this thread: the blob and its tail.
/// `prioritized` files come first, in their order, as far as the tar has them.
pub fn write_layer(
    tar: &[u8],
    options: &Options,
    prioritized: &[String],
) -> Result<(Vec<u8>, Tail), WriteError> {
    let mut raw = Vec::new();
    let mut push_unit = |unit| raw.push(unit);
    let units: &mut Units<'_> = &mut push_unit;
    let mut splitter;
    if prioritized.is_empty() {
        splitter = Splitter::new(options, false, units)?;
        splitter.push(tar, units)?;
    } else {
        let mut index = TarIndex::new();
        index.push(tar)?;
        let mut tar = tar.to_vec();
        let end = tar.len();
        tar.resize(end + index.padding_left(), 0);
        index.push(&tar[end..])?;
        let slice = |range: &std::ops::Range<u64>| {
            let place = |at: u64| usize::try_from(at).unwrap_or(tar.len());
            &tar[place(range.start)..place(range.end)]
        };
        let order = index.order(prioritized)?;
        let some = !order.prioritized.is_empty();
        splitter = Splitter::new(options, some, units)?;
        for range in &order.prioritized {
            splitter.push(slice(range), units)?;
        }
        if some {
            splitter.end_prioritized(None, units)?;
        }
        for range in &order.rest {
            splitter.push(slice(range), units)?;
        }
    }
    let split = splitter.finish(units)?;
    let mut compressor = UnitCompressor::new(options)?;
    let mut assembler = Assembler::new();
    let mut blob = Vec::new();
    for unit in &raw {
        let unit = compressor.compress(unit)?;
        assembler.place(&unit);
        blob.extend(unit.bytes);
    }
    let tail = finish(split, assembler)?;
    blob.extend(&tail.bytes);
    Ok((blob, tail))
}

/// A tar name relative to the root, without `.`, empty and trailing parts;
/// `..` goes up, never beyond the root. The root itself is empty.
fn clean_name(name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests;
