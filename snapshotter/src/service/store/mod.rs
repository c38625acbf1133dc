//! The state that survives a restart: one redb database, `state.redb`.
//!
//! Every change of state is durable when its call returns: containerd records
//! the same change durably on its side, and a record that only one of them
//! remembers after a power cut is a container that cannot start. Durable means
//! one fsync, some milliseconds on a disk. To start many containers at once
//! does not cost one after the other: changes that arrive while an fsync runs
//! share the next one (see `writer`).

mod database;
mod journal;
mod tables;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use sluice_oci::Digest;

use super::claims::Claim;
use super::error::{Error, is_full, is_read_only};
use super::filter::Filter;
use super::lazy_layers::Usage;
use super::snapshot::{Chain, Content, Info, Key, Kind, Labels, SnapshotId};
use database::Database;
use tables::{Read, Record, other_names};
use writer::Writer;

/// The version of everything under the root directory. It grows when an older
/// daemon would misread what a newer one wrote.
pub const ROOT_VERSION: u64 = 1;

/// What failed with the database itself.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The root directory belongs to a newer daemon.
    #[error(
        "{}: written by a newer version (root version {found}, this program knows {ROOT_VERSION}); \
         run that version, or give another --root", path.display()
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// Another process has it open.
    #[error("{}: another process has it open; stop that daemon, or give another --root", path.display())]
    InUse {
        /// The database.
        path: PathBuf,
    },
    /// No space left.
    #[error("{}: {source}; free space on that file system", path.display())]
    Full {
        /// The database.
        path: PathBuf,
        /// What the kernel said.
        source: Arc<io::Error>,
    },
    /// Its file system can only be read.
    #[error(
        "{}: the file system has become read-only, as after an error of its disk; repair it",
        path.display()
    )]
    ReadOnly {
        /// The database.
        path: PathBuf,
    },
    /// A record that cannot be read.
    #[error("{}: snapshot '{key}' has an unreadable record: {source}", path.display())]
    Record {
        /// The database.
        path: PathBuf,
        /// The snapshot's key or name.
        key: String,
        /// Why it cannot be read.
        source: Arc<serde_json::Error>,
    },
    /// Anything else.
    #[error("{}: {source}", path.display())]
    Database {
        /// The database.
        path: PathBuf,
        /// What redb said.
        source: Arc<redb::Error>,
    },
    /// The thread that writes cannot be started.
    #[error("cannot start the thread that writes the database: {0}")]
    Thread(Arc<io::Error>),
    /// The daemon is stopping.
    #[error("the daemon is stopping")]
    Stopping,
}

impl StoreError {
    /// Whether redb itself failed, so that its transaction is lost.
    fn is_fatal(&self) -> bool {
        !matches!(self, Self::Record { .. })
    }

    /// Whether the file is not what was written, or the disk does not give it
    /// back.
    fn is_damage(&self) -> bool {
        let Self::Database { source, .. } = self else {
            return false;
        };
        match &**source {
            redb::Error::Corrupted(_)
            | redb::Error::TableDoesNotExist(_)
            | redb::Error::TableTypeMismatch { .. } => true,
            redb::Error::Io(error) => {
                error.raw_os_error() == Some(libc::EIO)
                    || matches!(
                        error.kind(),
                        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
                    )
            }
            _ => false,
        }
    }

    fn new(path: &Path, source: impl Into<redb::Error>) -> Self {
        let path = path.to_owned();
        match source.into() {
            redb::Error::DatabaseAlreadyOpen => Self::InUse { path },
            redb::Error::Io(source) if is_read_only(&source) => Self::ReadOnly { path },
            redb::Error::Io(source) if is_full(&source) => Self::Full {
                path,
                source: Arc::new(source),
            },
            source => Self::Database {
                path,
                source: Arc::new(source),
            },
        }
    }
}

/// A snapshot to be made.
#[derive(Debug, Clone)]
pub(crate) struct NewSnapshot {
    pub(crate) id: SnapshotId,
    pub(crate) key: Key,
    pub(crate) parent: Option<Key>,
    pub(crate) labels: Labels,
    pub(crate) now: SystemTime,
}

/// A committed snapshot that has the name that somebody wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Serving {
    pub(crate) name: Key,
    pub(crate) labels: Labels,
    /// Its layer, if that is mounted lazily.
    pub(crate) layer: Option<Digest>,
}

/// What a removal leaves to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Removed {
    pub(crate) id: SnapshotId,
    /// The layer that no snapshot refers to any more.
    pub(crate) unused_layer: Option<Digest>,
}

/// Which labels an update sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LabelChange {
    /// All: what is not named goes.
    All(Labels),
    /// These; an empty value takes the label away.
    Some(Labels),
}

/// Where a snapshot's own usage is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UsageSource {
    /// To be measured in its directory.
    Directory(SnapshotId),
    /// To be asked from the data plane.
    Layer(Digest),
    /// Measured when it was committed, or a view's nothing.
    Recorded(Usage),
}

/// The database, and the thread that writes to it.
#[derive(Debug)]
pub struct Store {
    database: Arc<Database>,
    writer: Writer,
    next_id: std::sync::atomic::AtomicU64,
}

impl Store {
    /// Opens `root/state.redb`, or makes it.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let database = Arc::new(Database::open(root.join("state.redb"))?);
        let next_id = database.read(|tables| tables.next_id())?;
        Ok(Self {
            writer: Writer::start(Arc::clone(&database))?,
            database,
            next_id: next_id.into(),
        })
    }

    /// Whether the database was damaged and made anew from its copy.
    pub(crate) fn was_rebuilt(&self) -> bool {
        self.database.was_rebuilt()
    }

    /// A number for a new snapshot. It is burnt when the snapshot is not made.
    pub(crate) fn new_id(&self) -> SnapshotId {
        SnapshotId(
            self.next_id
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed),
        )
    }

    /// Finishes what is being written.
    pub(crate) async fn close(&self) {
        self.writer.close().await;
        self.database.close();
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Read<'_>) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let database = Arc::clone(&self.database);
        tokio::task::spawn_blocking(move || database.read(read))
            .await
            .unwrap_or(Err(Error::BrokeOff))
    }

    /// Records an active snapshot or a view.
    pub(crate) async fn create(&self, kind: Kind, new: NewSnapshot) -> Result<(), Error> {
        self.writer
            .write(move |tables| {
                tables.parent_id(new.parent.as_ref())?;
                if tables.get(&new.key)?.is_some() {
                    return Err(Error::AlreadyExists(new.key));
                }
                tables.insert(&new.key, &Record::new(kind, &new))
            })
            .await
    }

    /// Records a committed snapshot of a lazily mounted layer that serves as
    /// `new.key`. Two namespaces of containerd can ask for one target over
    /// different parents; the second gets a name of its own and is found by
    /// its label.
    pub(crate) async fn create_remote(
        &self,
        mut new: NewSnapshot,
        layer: Digest,
    ) -> Result<(), Error> {
        self.writer
            .write(move |tables| {
                if tables.serving(&new.key, new.parent.as_ref())?.is_some() {
                    return Err(Error::AlreadyExists(new.key));
                }
                if tables.get(&new.key)?.is_some() {
                    new.key = Key::try_from(format!("{}{}", other_names(&new.key), new.id))?;
                    if tables.get(&new.key)?.is_some() {
                        return Err(Error::AlreadyExists(new.key));
                    }
                }
                let mut record = Record::new(Kind::Committed, &new);
                record.layer = Some(layer);
                tables.insert(&new.key, &record)
            })
            .await
    }

    /// Turns the active snapshot `key` into the committed snapshot `name`.
    /// Labels are replaced, not inherited. A commit that was made, and whose
    /// answer was lost, succeeds again.
    pub(crate) async fn commit(
        &self,
        key: Key,
        name: Key,
        labels: Labels,
        usage: Usage,
        now: SystemTime,
    ) -> Result<(), Error> {
        self.writer
            .write(move |tables| {
                let (before, mut record) = match tables.committed_before(&key, &name)? {
                    Some(before) => (before.clone(), tables.need(&before)?),
                    None => (key.clone(), tables.committable(&key, &name)?),
                };
                record.committed(key, labels, usage, now);
                tables.remove(&before, &record)?;
                tables.insert(&name, &record)
            })
            .await
    }

    /// Deletes a snapshot's record.
    pub(crate) async fn remove(&self, key: Key) -> Result<Removed, Error> {
        self.writer
            .write(move |tables| {
                let record = tables.need(&key)?;
                if tables.has_children(record.id)? {
                    return Err(Error::HasChildren(key));
                }
                tables.remove(&key, &record)?;
                let unused_layer = match record.layer {
                    Some(layer) if !tables.layer_in_use(layer)? => Some(layer),
                    _ => None,
                };
                Ok(Removed {
                    id: record.id,
                    unused_layer,
                })
            })
            .await
    }

    /// Changes labels.
    pub(crate) async fn update(
        &self,
        key: Key,
        change: LabelChange,
        now: SystemTime,
    ) -> Result<Info, Error> {
        self.writer
            .write(move |tables| {
                let mut record = tables.need(&key)?;
                record.change_labels(change, now);
                tables.replace(&key, &record)?;
                Ok(record.info(key))
            })
            .await
    }

    /// The key or name of the snapshot with this number.
    pub(crate) async fn key_of(&self, id: SnapshotId) -> Result<Option<Key>, Error> {
        self.read(move |tables| {
            let mut found = None;
            tables.each(|key, record| {
                if record.id == id {
                    found = Some(key);
                }
            })?;
            Ok(found)
        })
        .await
    }

    /// What is known of one snapshot.
    pub(crate) async fn stat(&self, key: Key) -> Result<Info, Error> {
        self.read(move |tables| Ok(tables.need(&key)?.info(key)))
            .await
    }

    /// What an active snapshot or view is mounted from.
    pub(crate) async fn chain(&self, key: Key) -> Result<Chain, Error> {
        self.read(move |tables| {
            let record = tables.need(&key)?;
            if record.kind == Kind::Committed {
                return Err(Error::Committed(key));
            }
            Ok(Chain {
                id: record.id,
                kind: record.kind,
                parents: tables.contents(record.parent)?,
            })
        })
        .await
    }

    /// The committed snapshots over which there are active ones or views: their
    /// labels, what they are mounted from, and how many stand on them.
    pub(crate) async fn in_use(&self) -> Result<Vec<(Labels, Vec<Content>, usize)>, Error> {
        self.read(|tables| {
            let mut users: BTreeMap<Key, usize> = BTreeMap::new();
            tables.each(|_, record| {
                if let (Kind::Active | Kind::View, Some(parent)) = (record.kind, record.parent) {
                    *users.entry(parent).or_default() += 1;
                }
            })?;
            let found = users.into_iter().map(|(key, users)| {
                let labels = tables.need(&key)?.info(key.clone()).labels;
                Ok((labels, tables.contents(Some(key))?, users))
            });
            found.collect()
        })
        .await
    }

    /// What a snapshot `key` over `parent` would be mounted from. Fails as
    /// `create` would.
    pub(crate) async fn would_create(
        &self,
        key: Key,
        parent: Option<Key>,
    ) -> Result<Vec<Content>, Error> {
        self.read(move |tables| {
            tables.parent_id(parent.as_ref())?;
            if tables.get(&key)?.is_some() {
                return Err(Error::AlreadyExists(key));
            }
            tables.contents(parent)
        })
        .await
    }

    /// The committed snapshot that serves as `target` over `parent`. Fails when
    /// the parent cannot be one.
    pub(crate) async fn serving(
        &self,
        target: Key,
        parent: Option<Key>,
    ) -> Result<Option<Serving>, Error> {
        self.read(move |tables| {
            tables.parent_id(parent.as_ref())?;
            tables.serving(&target, parent.as_ref())
        })
        .await
    }

    /// What a committed snapshot and those below it are said to be, nearest
    /// first.
    pub(crate) async fn claims(&self, name: Key) -> Result<Vec<Claim>, Error> {
        self.read(move |tables| tables.claims(name)).await
    }

    /// The same of every committed snapshot of a lazily mounted layer.
    pub(crate) async fn all_claims(&self) -> Result<Vec<Vec<Claim>>, Error> {
        self.read(|tables| {
            let mut lazy = Vec::new();
            tables.each(|key, record| lazy.extend(record.layer.map(|_| key)))?;
            lazy.into_iter().map(|key| tables.claims(key)).collect()
        })
        .await
    }

    /// The number of the active snapshot `key`. Fails as `commit` would.
    pub(crate) async fn would_commit(&self, key: Key, name: Key) -> Result<SnapshotId, Error> {
        self.read(move |tables| {
            Ok(match tables.committed_before(&key, &name)? {
                Some(before) => tables.need(&before)?.id,
                None => tables.committable(&key, &name)?.id,
            })
        })
        .await
    }

    /// Where the usage of a snapshot is known.
    pub(crate) async fn usage(&self, key: Key) -> Result<UsageSource, Error> {
        self.read(move |tables| {
            let record = tables.need(&key)?;
            Ok(match (record.kind, record.layer) {
                (_, Some(layer)) => UsageSource::Layer(layer),
                (Kind::Active, None) => UsageSource::Directory(record.id),
                (Kind::View | Kind::Committed, None) => UsageSource::Recorded(record.usage()),
            })
        })
        .await
    }

    /// Every snapshot that one of the filters matches, by name; all when there
    /// is no filter.
    pub(crate) async fn list(&self, filters: Vec<Filter>) -> Result<Vec<Info>, Error> {
        self.read(move |tables| {
            let mut all = Vec::new();
            tables.each(|key, record| {
                let info = record.info(key);
                if filters.is_empty() || filters.iter().any(|filter| filter.matches(&info)) {
                    all.push(info);
                }
            })?;
            Ok(all)
        })
        .await
    }

    /// The directories that must be there.
    pub(crate) async fn directories(&self) -> Result<Vec<(Key, SnapshotId, Kind)>, Error> {
        self.read(|tables| {
            let mut all = Vec::new();
            tables.each(|key, record| {
                if record.layer.is_none() {
                    all.push((key, record.id, record.kind));
                }
            })?;
            Ok(all)
        })
        .await
    }

    /// Their numbers, to be asked from a thread that may block.
    pub(crate) fn known_ids(&self) -> Result<HashSet<SnapshotId>, Error> {
        self.database.read(|tables| {
            let mut all = HashSet::new();
            tables.each(|_, record| {
                if record.layer.is_none() {
                    all.insert(record.id);
                }
            })?;
            Ok(all)
        })
    }

    /// Every layer that a snapshot refers to.
    pub(crate) async fn layers(&self) -> Result<HashSet<Digest>, Error> {
        self.read(|tables| tables.layers()).await
    }

    /// Every layer below an active snapshot or a view, to be asked from a
    /// thread that may block.
    pub(crate) fn mounted_layers(&self) -> Result<HashSet<Digest>, Error> {
        self.database.read(|tables| {
            let mut all = HashMap::new();
            tables.each(|key, record| {
                all.insert(key, (record.kind, record.parent, record.layer));
            })?;
            let mut mounted = HashSet::new();
            let mut seen = HashSet::new();
            for (key, (kind, ..)) in &all {
                let mut next = (*kind != Kind::Committed).then_some(key);
                while let Some(key) = next.filter(|&key| seen.insert(key)) {
                    let Some((_, parent, layer)) = all.get(key) else {
                        break;
                    };
                    mounted.extend(layer);
                    next = parent.as_ref();
                }
            }
            Ok(mounted)
        })
    }

    /// The labels of every snapshot of a layer.
    pub(crate) async fn labels_of_layer(&self, layer: Digest) -> Result<Vec<Labels>, Error> {
        self.read(move |tables| {
            let mut all = Vec::new();
            tables.each(|key, record| {
                if record.layer == Some(layer) {
                    all.push(record.info(key).labels);
                }
            })?;
            Ok(all)
        })
        .await
    }

    /// Whether a snapshot refers to the layer.
    pub(crate) async fn layer_in_use(&self, layer: Digest) -> Result<bool, Error> {
        self.read(move |tables| tables.layer_in_use(layer)).await
    }
}
