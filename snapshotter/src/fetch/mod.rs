//! Fetching what is read: from an offset in a layer's `data` to verified bytes
//! in the file.
//!
//! A read that finds its chunks present is a `pread` on the caller's thread.
//! Any other joins the fetches that are in flight, starts those that are not,
//! and waits. Bytes are decoded and verified unit by unit as they arrive.

mod activity;
mod admission;
mod ahead;
mod begun;
mod content;
mod decode;
mod dependencies;
mod described;
mod disk;
mod elf;
mod engine;
mod foreseen;
mod guess;
mod incoming;
mod inflight;
mod layer;
mod link;
mod pace;
mod plan;
mod prefetch;
mod prove;
mod readahead;
mod reads;
mod relatives;
mod reuse;
mod room;
mod source;
mod stream;
mod trace;
mod unstored;

use std::io;

use sluice_oci::Digest;

pub use activity::{Activity, Request};
pub use admission::{Admission, Permit, Priority};
pub use ahead::Handle;
pub use begun::Begun;
pub use content::{Content, Piece};
pub use dependencies::{Dependencies, LazyFile};
pub use elf::{ELF_64_LITTLE, Segment, segments};
pub use engine::{Config, Engine};
pub use layer::{LazyLayer, PathOf};
pub use link::{ExpectedTable, Link, LinkFigures};
pub use prefetch::Plan;
pub use prove::ProveError;
pub use reuse::{ChunkFinder, Found};
pub use source::{Blame, RangeBody, RangeSource, RegistryBlob, SourceError};
pub use trace::Recording;
pub use unstored::Unstored;

/// Why missing bytes could not be made present.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// What came is not what the TOC promises, twice.
    #[error(
        "layer {layer}: the registry's bytes {start}..{end} of the blob are not what its table of \
         contents promises: {why}"
    )]
    Corrupt {
        /// The layer.
        layer: Digest,
        /// Where the unit begins in the blob.
        start: u64,
        /// Where it ends.
        end: u64,
        /// What the decoder found.
        why: String,
    },
    /// The registry did not deliver in time, or will not.
    #[error("layer {layer}: {why}")]
    Registry {
        /// The layer.
        layer: Digest,
        /// What the client said.
        why: String,
    },
    /// The disk gives back something else than what it took, again and again.
    #[error("layer {layer}: its directory cannot be read: {why}")]
    Disk {
        /// The layer.
        layer: Digest,
        /// What the operating system said.
        why: String,
    },
    /// The layer is being removed or the daemon stops.
    #[error("the layer is closed")]
    Closed,
}

impl From<FetchError> for io::Error {
    fn from(_: FetchError) -> Self {
        // A program that reads its files knows no better error.
        io::Error::from_raw_os_error(libc::EIO)
    }
}

#[cfg(test)]
pub(crate) mod tests;
