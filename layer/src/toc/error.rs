//! Why a TOC is refused.

use sluice_oci::Digest;

use crate::Format;

/// Why a TOC cannot be used. None of these is a reason not to unpack the
/// layer as a whole.
#[derive(Debug, thiserror::Error)]
pub enum TocError {
    /// The bytes are not those that the manifest promises.
    #[error(
        "the table of contents has digest {actual}, but the manifest's annotation says {expected}"
    )]
    Digest {
        /// From the annotation.
        expected: Digest,
        /// Of the bytes.
        actual: Digest,
    },
    /// More than is read.
    #[error("the table of contents is larger than {limit} bytes")]
    TooLarge {
        /// [`super::Limits::max_toc_bytes`].
        limit: u64,
    },
    /// Not the bytes that footer or annotation describe.
    #[error("the table of contents has {actual} bytes, but should have {expected}")]
    Size {
        /// From footer or annotation.
        expected: u64,
        /// Of the bytes.
        actual: u64,
    },
    /// The compressed bytes are damaged or something else.
    #[error("the table of contents is not valid {format} data: {reason}")]
    Compression {
        /// What they should be.
        format: Format,
        /// What is wrong.
        reason: String,
    },
    /// Not JSON of the right form.
    #[error("the table of contents is not the JSON it should be: {0}")]
    Json(String),
    /// A later version of the format.
    #[error("the table of contents has version {0}; only version 1 is known")]
    Version(i64),
    /// More than is read.
    #[error("the table of contents has more than {limit} entries")]
    TooManyEntries {
        /// [`super::Limits::max_entries`].
        limit: usize,
    },
    /// An entry that cannot be served.
    #[error("entry {index} of the table of contents, '{name}': {reason}")]
    Entry {
        /// Position, from 0.
        index: usize,
        /// Its name, made printable and cut.
        name: String,
        /// What is wrong with it.
        reason: EntryError,
    },
    /// Two chunks that cannot both be right.
    #[error("chunks overlap in the unit at offset {offset} of the blob")]
    OverlappingChunks {
        /// Offset of the unit.
        offset: u64,
    },
}

impl TocError {
    /// Whether the TOC could be read with a larger [`super::Limits::max_memory`].
    pub fn needs_more_memory(&self) -> bool {
        matches!(
            self,
            Self::Entry {
                reason: EntryError::TooMuchMemory { .. },
                ..
            }
        )
    }
}

/// What is wrong with an entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum EntryError {
    #[error("unknown type '{0}'")]
    UnknownType(String),
    #[error("the name has a component '..'")]
    ParentTraversal,
    #[error("the name has a NUL byte")]
    NameNul,
    #[error("a component of the name is longer than 255 bytes")]
    NameTooLong,
    #[error("the name is longer than 4,095 bytes")]
    PathTooLong,
    #[error("'{0}' in its path is not a directory")]
    NotADirectory(String),
    #[error("the layer's root is not a directory")]
    RootNotADirectory,
    #[error("not a valid whiteout name")]
    WhiteoutName,
    #[error("{field} is {value}, out of range")]
    OutOfRange { field: &'static str, value: i64 },
    #[error("'{0}' is not a time as in RFC 3339")]
    Time(String),
    #[error("the symbolic link has no target")]
    SymlinkEmpty,
    #[error("the symbolic link's target is longer than 4,095 bytes or has a NUL byte")]
    SymlinkTarget,
    #[error("the hard link's target '{0}' is not in the layer")]
    HardLinkMissing(String),
    #[error("the hard link's target '{0}' is a directory")]
    HardLinkToDirectory(String),
    #[error("the hard links around '{0}' lead in a circle")]
    HardLinkCycle(String),
    #[error("the extended attribute '{0}' has a name that no file system takes")]
    XattrName(String),
    #[error("the extended attribute '{0}' is not base64")]
    XattrValue(String),
    #[error("the extended attribute '{0}' is too large, or makes them too large together")]
    XattrSize(String),
    #[error("too many entries add extended attributes to the same inodes")]
    XattrMerges,
    #[error("'{0}' is not a SHA-256 digest")]
    Digest(String),
    #[error("neither file nor chunk has a digest")]
    DigestMissing,
    #[error("a chunk without a regular file before it")]
    ChunkWithoutFile,
    #[error("its chunk begins at {actual} where {expected} was due")]
    ChunkGap { expected: u64, actual: u64 },
    #[error("its chunk at {offset} is empty or reaches beyond the file's {size} bytes")]
    ChunkSize { offset: u64, size: u64 },
    #[error("its chunks end at {end}, but the file has {size} bytes")]
    ChunksShort { end: u64, size: u64 },
    #[error("its chunk at {offset} needs {size} bytes decoded at once, more than {limit}")]
    UnitTooLarge { offset: u64, size: u64, limit: u64 },
    #[error("unknown chunk type '{0}'")]
    ChunkType(String),
    #[error("its data at {offset} is not before the table of contents at {end}")]
    OutsideBlob { offset: u64, end: u64 },
    #[error("the layer has more than {limit} inodes")]
    TooManyInodes { limit: usize },
    #[error("the layer's files have more than {limit} bytes together")]
    LayerTooLarge { limit: u64 },
    #[error("the tree up to here takes more than {limit} bytes of memory")]
    TooMuchMemory { limit: u64 },
}

/// `name` for a message: printable, on one line, at most about 200 bytes.
pub(super) fn printable(name: &[u8]) -> String {
    let cut = &name[..name.len().min(200)];
    let mut text: String = String::from_utf8_lossy(cut).escape_debug().collect();
    if cut.len() < name.len() {
        text.push('…');
    }
    text
}
