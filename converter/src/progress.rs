//! What a conversion tells of itself while it runs.

use sluice_oci::Digest;

/// Hears of a conversion's progress, from several threads.
pub trait Progress: Send + Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);
}

/// A step of a conversion.
#[derive(Debug)]
pub enum Event<'a> {
    /// An image of the index, or the only one, is next.
    Image {
        /// Its platform, if the index says.
        platform: Option<&'a str>,
        /// Number of its layers.
        layers: usize,
    },
    /// A layer is being read.
    LayerBegins {
        /// Digest of its blob.
        layer: Digest,
        /// Size of its blob in bytes.
        size: u64,
    },
    /// More of the layer was read.
    LayerRead {
        /// Digest of its blob.
        layer: Digest,
        /// How many bytes more.
        bytes: u64,
    },
    /// A layer is done, but for its upload.
    LayerEnds {
        /// Digest of its blob.
        layer: Digest,
        /// What became of it.
        outcome: &'a LayerOutcome,
    },
    /// A prioritized file is in no layer of the image.
    NotFound {
        /// Its name.
        name: &'a str,
    },
}

/// What became of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerOutcome {
    /// It was rewritten.
    Converted {
        /// Digest of the new blob.
        digest: Digest,
        /// Its size in bytes.
        size: u64,
    },
    /// It was seekable already.
    AlreadySeekable,
    /// It stays as it was: it cannot be made seekable.
    Kept {
        /// Why not.
        why: String,
    },
}
