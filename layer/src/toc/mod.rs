//! A layer's verified table of contents: its directory tree and where each
//! file's chunks lie in the blob.
//!
//! The tree is already in the form that overlayfs wants: whiteouts are
//! character devices 0:0 under the hidden name, an opaque directory is marked
//! as such, landmarks are gone, and parents that the TOC left out exist with
//! mode 0755 and owner root.

mod build;
mod error;
mod json;
mod memory;
pub(crate) mod names;
mod read;
mod time;
mod tree;
mod units;
mod unpack;
mod xattrs;

use std::ops::Range;

use sluice_oci::Digest;

use crate::Format;

pub use build::likely_memory;
pub use error::{EntryError, TocError};
pub(crate) use json::for_each_entry;
pub use read::{Limits, TocTrust, UntrustedToc, read_toc, read_toc_json};
pub(crate) use time::parse as parse_time;
pub(crate) use unpack::{ZSTD_WINDOW_LOG, size_in_tar};

/// Index of a [`Node`] within its [`Toc`]. The root is [`NodeId::ROOT`]; a
/// directory precedes its subdirectories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub(crate) u32);

impl NodeId {
    /// The layer's root directory.
    pub const ROOT: Self = Self(0);

    /// The position in [`Toc::nodes`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A layer's tree and chunks. Only [`crate`]'s readers make one, after the
/// TOC's digest was checked and every name, link and range in it was found
/// consistent.
#[derive(Debug, Clone, PartialEq)]
pub struct Toc {
    pub(crate) format: Format,
    pub(crate) nodes: Vec<Node>,
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) prefetch_end: Option<u64>,
    pub(crate) toc_offset: u64,
}

impl Toc {
    /// The blob's format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// All inodes; [`NodeId::ROOT`] first, each named at least once. A hard
    /// link is not a node but a second [`Child`] that names the same one.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// One inode.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// The inode that a path names, relative to the root and without `.`, `..`
    /// and empty components. Symbolic links are not followed.
    pub fn find(&self, path: &[u8]) -> Option<&Node> {
        let mut node = self.nodes.first()?;
        for name in path.split(|byte| *byte == b'/') {
            let NodeKind::Directory(directory) = &node.kind else {
                return None;
            };
            let children = &directory.children;
            let at = children.binary_search_by(|child| (*child.name).cmp(name));
            node = self.node(children[at.ok()?].node);
        }
        Some(node)
    }

    /// All chunks, grouped by file in the order of [`Toc::nodes`], each
    /// file's in the order of their offsets, without gap or overlap.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Where in the blob the prioritized files end, if the layer carries a
    /// `.prefetch.landmark` that follows at least one file. Bytes.
    pub fn prefetch_end(&self) -> Option<u64> {
        self.prefetch_end
    }

    /// Where in the blob the TOC begins, and so all chunks end. Bytes.
    pub fn toc_offset(&self) -> u64 {
        self.toc_offset
    }
}

/// One inode of the layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// What it is, with what only that kind has.
    pub kind: NodeKind,
    /// Permission, set-user-ID, set-group-ID and sticky bits (low 12 bits).
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification, between 1970 and 2262.
    pub mtime: Mtime,
    /// Link count as `stat` reports it: names of a file, or 2 and the number
    /// of subdirectories.
    pub links: u32,
    /// Extended attributes, sorted by name, each name once, at most 128 KiB
    /// together. No `trusted.*` and no `*.overlay.*` attribute is among them:
    /// opaque directories say so in [`Directory`].
    pub xattrs: Box<[Xattr]>,
}

/// A point in time since 1970-01-01 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mtime {
    /// Whole seconds, negative before 1970.
    pub secs: i64,
    /// Nanoseconds after that, below 1,000,000,000.
    pub nanos: u32,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Full name, for example `security.capability`. At most 255 bytes,
    /// without NUL.
    pub name: Box<[u8]>,
    /// Value. At most 65,535 bytes.
    pub value: Box<[u8]>,
}

/// The kinds of inode. A whiteout is a `CharDevice` 0:0.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "device numbers explain themselves")]
pub enum NodeKind {
    /// A directory.
    Directory(Directory),
    /// A regular file.
    Regular(FileContent),
    /// A symbolic link and its target, at most 4,095 bytes, never empty.
    Symlink(Box<[u8]>),
    /// A character device.
    CharDevice { major: u32, minor: u32 },
    /// A block device.
    BlockDevice { major: u32, minor: u32 },
    /// A named pipe.
    Fifo,
}

/// A directory's content.
#[derive(Debug, Clone, PartialEq)]
pub struct Directory {
    /// The directory that holds this one; the root names itself.
    pub parent: NodeId,
    /// Entries sorted by name as bytes, without `.` and `..`, each name once.
    pub children: Vec<Child>,
    /// Whether it hides the lower layers' directory of the same name.
    pub opaque: bool,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child {
    /// 1 to 255 bytes, no `/`, no NUL, not `.` or `..`.
    pub name: Box<[u8]>,
    /// The inode it names.
    pub node: NodeId,
}

/// A regular file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileContent {
    /// Size in bytes.
    pub size: u64,
    /// Its chunks, as positions in [`Toc::chunks`]; empty for an empty file.
    pub chunks: Range<u32>,
}

/// An independently verifiable slice of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Offset of its first byte in the file.
    pub file_offset: u64,
    /// Size in bytes, uncompressed, never 0.
    pub size: u64,
    /// Digest of its uncompressed bytes.
    pub digest: Digest,
    /// Where its bytes come from.
    pub source: ChunkSource,
}

/// Where a chunk's bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkSource {
    /// From the blob: decode `unit`, skip `inner_offset` bytes.
    Blob {
        /// What is fetched and decoded.
        unit: Unit,
        /// Offset of the chunk in the unit's uncompressed bytes.
        inner_offset: u64,
    },
    /// The chunk is all zeros and stored nowhere.
    Zeros,
}

/// A byte range of the blob that can be decoded on its own. Several chunks
/// may share one unit. Units never overlap in part: two are equal or
/// disjoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unit {
    /// Offset of its first byte in the blob.
    pub offset: u64,
    /// Upper bound of its compressed size: the next unit or the TOC begins
    /// here, or its chunks cannot take more.
    pub size: u64,
}

#[cfg(test)]
mod tests;
