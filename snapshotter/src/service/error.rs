//! What can go wrong with a snapshot.

use std::io;
use std::path::{Path, PathBuf};

use super::claims::Contradiction;
use super::disputes::Dispute;
use super::filter::FilterError;
use super::lazy_layers::MountError;
use super::snapshot::{EmptyKey, Key, Kind};
use super::store::StoreError;

/// Why a call on snapshots failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No snapshot of that key or name.
    #[error("snapshot '{0}' does not exist")]
    NotFound(Key),
    /// The parent that was named does not exist.
    #[error("parent snapshot '{0}' does not exist")]
    ParentNotFound(Key),
    /// The key or name is taken.
    #[error("snapshot '{0}' already exists")]
    AlreadyExists(Key),
    /// A parent that is still active, or a view.
    #[error("parent snapshot '{parent}' is not committed, it is {}", kind.as_str())]
    ParentNotCommitted {
        /// The parent.
        parent: Key,
        /// Its state.
        kind: Kind,
    },
    /// Only an active snapshot can be committed.
    #[error("snapshot '{key}' is not active, it is {}", kind.as_str())]
    NotActive {
        /// The snapshot.
        key: Key,
        /// Its state.
        kind: Kind,
    },
    /// What it would show is not what it is named for.
    #[error("{0}")]
    Contradicted(Box<Contradiction>),
    /// An image means another layer by its name, and it is not known yet which
    /// is right.
    #[error("{0}")]
    Disputed(Box<Dispute>),
    /// What images mean by its name cannot be asked.
    #[error(
        "it is not known yet whether what snapshot '{}' shows is what it is named for, and which \
         images mean it cannot be asked: {source}", snapshot.in_containerd().1
    )]
    Images {
        /// The snapshot.
        snapshot: Key,
        /// Why, and what to do.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A committed snapshot has no mounts.
    #[error("snapshot '{0}' is committed and has no mounts; prepare or view a child of it")]
    Committed(Key),
    /// Snapshots are removed from the top.
    #[error("snapshot '{0}' has children; remove them first")]
    HasChildren(Key),
    /// Only labels can be updated.
    #[error("field '{field}' of snapshot '{key}' cannot be updated, only labels can")]
    Immutable {
        /// The snapshot.
        key: Key,
        /// The field.
        field: String,
    },
    /// No key or name was given.
    #[error(transparent)]
    EmptyKey(#[from] EmptyKey),
    /// A request lacks a part that it must have.
    #[error("the request has no {0}")]
    Missing(&'static str),
    /// A filter expression does not parse.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A lazily mounted layer failed.
    #[error(transparent)]
    Layer(#[from] MountError),
    /// A directory of a snapshot failed.
    #[error("cannot {action} {}: {source}{}", path.display(), remedy(source))]
    Directory {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The call itself broke off; the daemon's log has a panic.
    #[error("the call broke off inside the snapshotter; see its log")]
    BrokeOff,
}

/// The kinds of error that containerd tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// It is not there.
    NotFound,
    /// It is there already.
    AlreadyExists,
    /// Its state does not allow it.
    FailedPrecondition,
    /// The request makes no sense.
    InvalidArgument,
    /// The disk is full.
    ResourceExhausted,
    /// It may work later.
    Unavailable,
    /// Anything else.
    Internal,
}

impl Error {
    /// The kind of this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound(_) | Self::ParentNotFound(_) => ErrorKind::NotFound,
            Self::AlreadyExists(_) => ErrorKind::AlreadyExists,
            Self::NotActive { .. }
            | Self::Contradicted(_)
            | Self::Committed(_)
            | Self::HasChildren(_)
            | Self::Layer(MountError::Unknown(_)) => ErrorKind::FailedPrecondition,
            Self::ParentNotCommitted { .. }
            | Self::Immutable { .. }
            | Self::EmptyKey(_)
            | Self::Missing(_)
            | Self::Filter(_) => ErrorKind::InvalidArgument,
            Self::Layer(MountError::Failed { .. })
            | Self::Disputed(_)
            | Self::Images { .. }
            | Self::Store(StoreError::ReadOnly { .. }) => ErrorKind::Unavailable,
            Self::Directory { source, .. } if is_read_only(source) => ErrorKind::Unavailable,
            Self::Directory { source, .. } if is_full(source) => ErrorKind::ResourceExhausted,
            Self::Store(StoreError::Full { .. }) => ErrorKind::ResourceExhausted,
            Self::Directory { .. } | Self::Store(_) | Self::BrokeOff => ErrorKind::Internal,
        }
    }

    pub(crate) fn directory(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Directory {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

pub(crate) fn is_read_only(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ReadOnlyFilesystem
}

fn remedy(error: &io::Error) -> &'static str {
    if is_full(error) {
        "; free space on that file system"
    } else if is_read_only(error) {
        "; the file system has become read-only, as after an error of its disk; repair it"
    } else {
        ""
    }
}
