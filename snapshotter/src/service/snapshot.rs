//! What a snapshot is.

use std::collections::BTreeMap;
use std::fmt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sluice_oci::Digest;

/// Labels as containerd gives them. A label with an empty value is no label.
pub type Labels = BTreeMap<String, String>;

/// The key of an active snapshot or view, or the name of a committed snapshot:
/// one namespace for both, chosen by containerd, never empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key(String);

/// An empty text where a key or name is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a snapshot's key or name is empty")]
pub struct EmptyKey;

impl Key {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Namespace and key as containerd's clients know them: containerd puts
    /// namespace and a number of its own before, `<namespace>/<number>/<key>`.
    /// Of any other key, the key alone.
    pub fn in_containerd(&self) -> (Option<&str>, &str) {
        let mut parts = self.0.splitn(3, '/');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(namespace), Some(number), Some(key)) if number.parse::<u64>().is_ok() => {
                (Some(namespace), key)
            }
            _ => (None, &self.0),
        }
    }
}

impl TryFrom<String> for Key {
    type Error = EmptyKey;

    fn try_from(text: String) -> Result<Self, EmptyKey> {
        if text.is_empty() {
            return Err(EmptyKey);
        }
        Ok(Self(text))
    }
}

impl TryFrom<&str> for Key {
    type Error = EmptyKey;

    fn try_from(text: &str) -> Result<Self, EmptyKey> {
        text.to_owned().try_into()
    }
}

impl From<Key> for String {
    fn from(key: Key) -> Self {
        key.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The number of a snapshot, which names its directory. Numbers grow and are
/// not used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotId(pub u64);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The three states of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, of a committed parent.
    View,
    /// Writable.
    Active,
    /// Immutable; what others are made of.
    Committed,
}

impl Kind {
    /// As filters and messages name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// A snapshot as containerd sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Info {
    /// Its key or name.
    pub name: Key,
    /// The committed snapshot below it.
    pub parent: Option<Key>,
    /// Its state.
    pub kind: Kind,
    /// When it was made, or committed.
    pub created: SystemTime,
    /// When its labels last changed.
    pub updated: SystemTime,
    /// Its labels.
    pub labels: Labels,
}

/// Where the files of one snapshot of a chain are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// In its own directory.
    Directory(SnapshotId),
    /// In a layer that is mounted lazily.
    Lazy(Digest),
}

/// An active snapshot or view with what lies below it: all that its mounts
/// need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The snapshot.
    pub id: SnapshotId,
    /// Active or view.
    pub kind: Kind,
    /// Its ancestors, nearest first.
    pub parents: Vec<Content>,
}
