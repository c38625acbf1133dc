//! What can go wrong with a `meta.erofs`.

use std::io;

/// Why an image could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The output refused bytes.
    #[error("cannot write the EROFS image: {0}")]
    Write(#[source] io::Error),
    /// The image file could not be opened or mapped.
    #[error("cannot map the EROFS image {path}: {source}")]
    Open {
        /// The file.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The tree has something that the format has no room for.
    #[error("{path}: {what} does not fit in an EROFS image; the layer cannot be mounted lazily")]
    Unrepresentable {
        /// The file, from the layer's root.
        path: String,
        /// What is too large.
        what: &'static str,
    },
    /// Somebody has cut the file short since it was mapped.
    #[error("the EROFS image was cut short by another program")]
    CutShort,
    /// The image is not one that this program wrote, or was damaged.
    #[error(
        "EROFS image: {what} (inode {nid}); remove the layer's directory so that it is made again"
    )]
    Corrupt {
        /// What was found.
        what: &'static str,
        /// Where: the inode's number, 0 for the superblock.
        nid: u64,
    },
}
