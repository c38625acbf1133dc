//! Seekable layer formats: eStargz and zstd:chunked, read and written.
//!
//! Nothing here does I/O, reads a clock or spawns a task. Every byte that
//! comes in is hostile until a digest says otherwise; the types say which is
//! which: a [`Toc`] exists only after its digest was checked, and a
//! [`VerifiedChunk`] only after its own.

pub mod annotations;
mod decode;
mod footer;
mod format;
mod likely;
pub mod profile;
mod start_reads;
mod tar_split;
mod toc;
pub mod write;

pub use annotations::LayerAnnotations;
pub use decode::{
    Between, DecodeError, Decoded, VerifiedChunk, Wanted, decode_unit, unpack, verify_chunk,
};
pub use footer::{FOOTER_MAX, FooterError, TocLocation, locate_toc};
pub use format::Format;
pub use likely::{HeaderStyle, likely_tar, toc_in_tar};
pub use profile::{Profile, ProfileError};
pub use start_reads::{StartChunks, StartRanges, StartReads};
pub use tar_split::{TarPart, TarSplit};
pub use toc::{
    Child, Chunk, ChunkSource, Directory, EntryError, FileContent, Limits, Mtime, Node, NodeId,
    NodeKind, Toc, TocError, TocTrust, Unit, UntrustedToc, Xattr, likely_memory, read_toc,
    read_toc_json,
};
