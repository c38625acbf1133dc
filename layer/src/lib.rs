//! Seekable layer formats: eStargz and zstd:chunked, read and written.
//!
//! Nothing here does I/O, reads a clock or spawns a task. Every byte that
//! comes in is hostile until a digest says otherwise; the types say which is
//! which: a [`Toc`] exists only after its digest was checked, and a
//! [`VerifiedChunk`] only after its own.

mod format;
mod toc;

pub use format::Format;
pub use toc::{
    Child, Chunk, ChunkSource, Directory, FileContent, Mtime, Node, NodeId, NodeKind, Toc, Unit,
    Xattr,
};
