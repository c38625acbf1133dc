//! What can go wrong, in one line each.

use std::path::{Path, PathBuf};

use sluice_layer::write::WriteError;
use sluice_oci::Digest;
use sluice_registry::ErrorKind;

/// Why an image could not be read, converted or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("{action} {path}: {cause}{remedy}", path = path.display(), remedy = disk_remedy(cause))]
    File {
        /// What was tried, as in "cannot write".
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A directory that is no OCI layout.
    #[error("{path} is no OCI layout: {why}; write one with 'skopeo copy SRC oci:DIR:TAG'", path = path.display())]
    NoLayout {
        /// The directory.
        path: PathBuf,
        /// What is missing or wrong.
        why: String,
    },
    /// No image of that name in a layout.
    #[error("{path} holds no image {wanted}; it has: {has}", path = path.display())]
    NoImage {
        /// The layout's directory.
        path: PathBuf,
        /// What was asked for.
        wanted: String,
        /// The names that exist.
        has: String,
    },
    /// A blob that a manifest names and that is not there.
    #[error("{place} lacks the {what} {digest}: the image is incomplete, copy it again")]
    MissingBlob {
        /// Where it was looked for.
        place: String,
        /// What it is, as in "layer".
        what: &'static str,
        /// Its digest.
        digest: Digest,
    },
    /// A document that cannot be read as what it claims to be.
    #[error("the {what} {digest} cannot be read: {why}")]
    Document {
        /// What it is, as in "manifest".
        what: &'static str,
        /// Its digest.
        digest: Digest,
        /// What is wrong with it.
        why: String,
    },
    /// Bytes that are not those that their digest or size promises.
    #[error("the {what} {digest} is damaged: {why}; copy the image again")]
    Damaged {
        /// What it is, as in "layer".
        what: &'static str,
        /// The digest it should have.
        digest: Digest,
        /// What was found instead.
        why: String,
    },
    /// A layer's tar that cannot be converted.
    #[error("layer {layer}: {cause}")]
    Layer {
        /// Digest of its blob.
        layer: Digest,
        /// Why not.
        cause: WriteError,
    },
    /// A layer that does not unpack to what the configuration says.
    #[error(
        "layer {layer} unpacks to {found}, but the image's configuration says {stated}: the image is inconsistent, build it again"
    )]
    DiffId {
        /// Digest of its blob.
        layer: Digest,
        /// The diff ID in the configuration.
        stated: String,
        /// The digest of its tar.
        found: String,
    },
    /// No image for a wanted platform.
    #[error("the image has nothing for {wanted}; it is for {has}")]
    NoPlatform {
        /// What was asked for.
        wanted: String,
        /// What there is.
        has: String,
    },
    /// A destination that names a digest.
    #[error("{reference} names a digest, which the result cannot have: name a tag to write to")]
    DigestDestination {
        /// The destination.
        reference: String,
    },
    /// A profile of another image.
    #[error(
        "{reference} has no layer {layer}, which the profile is about: it is a profile of another image"
    )]
    OtherProfile {
        /// The image.
        reference: String,
        /// The layer.
        layer: Digest,
    },
    /// A profile that cannot be used.
    #[error(transparent)]
    Profile(#[from] sluice_layer::profile::ProfileError),
    /// A registry refused or failed.
    #[error(transparent)]
    Registry(#[from] sluice_registry::Error),
    /// The conversion was given up.
    #[error("the conversion was interrupted")]
    Interrupted,
}

fn disk_remedy(cause: &std::io::Error) -> &'static str {
    match cause.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "; free some space and run the command again"
        }
        _ => "",
    }
}

impl Error {
    /// Whether other bytes might be the right ones.
    pub(crate) fn is_of_content(&self) -> bool {
        match self {
            Self::Damaged { .. } => true,
            Self::Layer { cause, .. } => !matches!(cause, WriteError::Unsupported(_)),
            Self::Registry(error) => error.kind() == ErrorKind::DigestMismatch,
            _ => false,
        }
    }

    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |cause| Self::File {
            action,
            path,
            cause,
        }
    }
}
