//! The tables and the records in them.
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `version`, `next_id` | number |
//! | `snapshots` | key or name | [`Record`] as JSON |
//! | `children` | (number of the parent, number of the child) | |
//! | `layers` | (digest, number of the snapshot) | |
//!
//! An operation checks first and writes then: one that refuses has written
//! nothing, so that it can share a transaction with others.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use sluice_oci::Digest;

use super::journal::Entry;
use super::{Error, LabelChange, NewSnapshot, Serving, StoreError};
use crate::service::claims::Claim;
use crate::service::labels;
use crate::service::lazy_layers::Usage;
use crate::service::snapshot::{Content, Info, Key, Kind, Labels, SnapshotId};

pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
pub(super) const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
pub(super) const CHILDREN: TableDefinition<'_, (u64, u64), ()> = TableDefinition::new("children");
pub(super) const LAYERS: TableDefinition<'_, (&[u8; 32], u64), ()> = TableDefinition::new("layers");

/// Key in `meta`: the version of the root directory.
pub(super) const VERSION: &str = "version";
/// Key in `meta`: the number of the next snapshot.
const NEXT_ID: &str = "next_id";

/// A snapshot as the database holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: SnapshotId,
    pub(super) kind: Kind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) parent: Option<Key>,
    /// Nanoseconds since 1970.
    created: u64,
    updated: u64,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    labels: Labels,
    /// The layer that holds the content, if it is mounted lazily.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) layer: Option<Digest>,
    /// Bytes and inodes, measured at the commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    usage: Option<(u64, u64)>,
    /// The key that it had before the commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    was: Option<Key>,
}

impl Record {
    pub(super) fn new(kind: Kind, new: &NewSnapshot) -> Self {
        let now = nanoseconds(new.now);
        Self {
            id: new.id,
            kind,
            parent: new.parent.clone(),
            created: now,
            updated: now,
            labels: without_empty(new.labels.clone()),
            layer: None,
            usage: None,
            was: None,
        }
    }

    /// Of the active snapshot `key`.
    pub(super) fn committed(&mut self, key: Key, labels: Labels, usage: Usage, now: SystemTime) {
        self.kind = Kind::Committed;
        self.was = Some(key);
        self.created = nanoseconds(now);
        self.updated = self.created;
        self.labels = without_empty(labels);
        self.usage = Some((usage.bytes, usage.inodes));
    }

    pub(super) fn change_labels(&mut self, change: LabelChange, now: SystemTime) {
        self.labels = match change {
            LabelChange::All(labels) => without_empty(labels),
            LabelChange::Some(labels) => {
                let mut all = std::mem::take(&mut self.labels);
                all.extend(labels);
                without_empty(all)
            }
        };
        self.updated = nanoseconds(now);
    }

    pub(super) fn usage(&self) -> Usage {
        let (bytes, inodes) = self.usage.unwrap_or_default();
        Usage { bytes, inodes }
    }

    pub(super) fn info(self, name: Key) -> Info {
        Info {
            name,
            parent: self.parent,
            kind: self.kind,
            created: SystemTime::UNIX_EPOCH + Duration::from_nanos(self.created),
            updated: SystemTime::UNIX_EPOCH + Duration::from_nanos(self.updated),
            labels: self.labels,
        }
    }

    fn content(&self) -> Content {
        self.layer
            .map_or(Content::Directory(self.id), Content::Lazy)
    }
}

fn without_empty(mut labels: Labels) -> Labels {
    labels.retain(|_, value| !value.is_empty());
    labels
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The tables in one transaction; [`Read`] when it only reads.
pub(super) struct Tables<'p, M, S, C, L> {
    pub(super) path: &'p Path,
    pub(super) meta: M,
    pub(super) snapshots: S,
    pub(super) children: C,
    pub(super) layers: L,
    /// What was written, for the journal.
    pub(super) changes: Vec<Entry>,
}

pub(super) type Read<'p> = Tables<
    'p,
    redb::ReadOnlyTable<&'static str, u64>,
    redb::ReadOnlyTable<&'static str, &'static [u8]>,
    redb::ReadOnlyTable<(u64, u64), ()>,
    redb::ReadOnlyTable<(&'static [u8; 32], u64), ()>,
>;

pub(super) type Write<'t> = Tables<
    't,
    redb::Table<'t, &'static str, u64>,
    redb::Table<'t, &'static str, &'static [u8]>,
    redb::Table<'t, (u64, u64), ()>,
    redb::Table<'t, (&'static [u8; 32], u64), ()>,
>;

impl<M, S, C, L> Tables<'_, M, S, C, L>
where
    M: ReadableTable<&'static str, u64>,
    S: ReadableTable<&'static str, &'static [u8]>,
    C: ReadableTable<(u64, u64), ()>,
    L: ReadableTable<(&'static [u8; 32], u64), ()>,
{
    fn fail(&self, error: redb::StorageError) -> Error {
        StoreError::new(self.path, error).into()
    }

    fn parse(&self, key: &str, value: &[u8]) -> Result<Record, Error> {
        serde_json::from_slice(value).map_err(|source| {
            StoreError::Record {
                path: self.path.to_owned(),
                key: key.to_owned(),
                source: Arc::new(source),
            }
            .into()
        })
    }

    pub(super) fn next_id(&self) -> Result<u64, Error> {
        let next = self.meta.get(NEXT_ID).map_err(|e| self.fail(e))?;
        Ok(next.map_or(1, |value| value.value()))
    }

    pub(super) fn get(&self, key: &Key) -> Result<Option<Record>, Error> {
        let value = self.snapshots.get(key.as_str()).map_err(|e| self.fail(e))?;
        value
            .map(|value| self.parse(key.as_str(), value.value()))
            .transpose()
    }

    pub(super) fn need(&self, key: &Key) -> Result<Record, Error> {
        self.get(key)?.ok_or_else(|| Error::NotFound(key.clone()))
    }

    /// The record of `key`, which must be active, with `name` still free.
    pub(super) fn committable(&self, key: &Key, name: &Key) -> Result<Record, Error> {
        let record = self.need(key)?;
        if self.get(name)?.is_some() {
            return Err(Error::AlreadyExists(name.clone()));
        }
        if record.kind != Kind::Active {
            return Err(Error::NotActive {
                key: key.clone(),
                kind: record.kind,
            });
        }
        Ok(record)
    }

    /// The snapshot that a commit of `key` as `name` has made before, when the
    /// client never heard of it: its name, which may have another number of
    /// containerd's than this time.
    pub(super) fn committed_before(&self, key: &Key, name: &Key) -> Result<Option<Key>, Error> {
        if self.get(key)?.is_some() {
            return Ok(None);
        }
        let is_it = |found: &Key, record: &Record| {
            record.kind == Kind::Committed
                && record.was.as_ref() == Some(key)
                && found.in_containerd() == name.in_containerd()
        };
        if let Some(record) = self.get(name)? {
            return Ok(is_it(name, &record).then(|| name.clone()));
        }
        // Rare: containerd has given out numbers since.
        let mut before = None;
        self.each(|found, record| {
            if is_it(&found, &record) {
                before = Some((found, record.id));
            }
        })?;
        match before {
            Some((before, id)) if !self.has_children(id)? => Ok(Some(before)),
            _ => Ok(None),
        }
    }

    /// The parent's number. It must be committed.
    pub(super) fn parent_id(&self, parent: Option<&Key>) -> Result<Option<SnapshotId>, Error> {
        let Some(parent) = parent else {
            return Ok(None);
        };
        let record = self
            .get(parent)?
            .ok_or_else(|| Error::ParentNotFound(parent.clone()))?;
        if record.kind != Kind::Committed {
            return Err(Error::ParentNotCommitted {
                parent: parent.clone(),
                kind: record.kind,
            });
        }
        Ok(Some(record.id))
    }

    /// The contents of `key` and of everything below it, nearest first.
    pub(super) fn contents(&self, key: Option<Key>) -> Result<Vec<Content>, Error> {
        let mut contents = Vec::new();
        let mut next = key;
        while let Some(key) = next {
            let record = self
                .get(&key)?
                .ok_or_else(|| Error::ParentNotFound(key.clone()))?;
            contents.push(record.content());
            next = record.parent;
        }
        Ok(contents)
    }

    fn children(&self, id: SnapshotId) -> Result<Vec<u64>, Error> {
        self.children
            .range((id.0, 0)..=(id.0, u64::MAX))
            .and_then(|range| range.map(|entry| Ok(entry?.0.value().1)).collect())
            .map_err(|e| self.fail(e))
    }

    pub(super) fn has_children(&self, id: SnapshotId) -> Result<bool, Error> {
        Ok(!self.children(id)?.is_empty())
    }

    /// The committed snapshot that serves as `target` over `parent`: one of
    /// that name, or one that is labelled so.
    pub(super) fn serving(
        &self,
        target: &Key,
        parent: Option<&Key>,
    ) -> Result<Option<Serving>, Error> {
        let over =
            |record: &Record| record.kind == Kind::Committed && record.parent.as_ref() == parent;
        if let Some(record) = self.get(target)?.filter(over) {
            return Ok(Some(Serving {
                name: target.clone(),
                labels: record.labels,
                layer: record.layer,
            }));
        }
        // Rare: the name was taken by a snapshot over another parent.
        let others = other_names(target);
        let range = self.snapshots.range(others.as_str()..);
        for entry in range.map_err(|e| self.fail(e))? {
            let (key, value) = entry.map_err(|e| self.fail(e))?;
            if !key.value().starts_with(&others) {
                break;
            }
            let record = self.parse(key.value(), value.value())?;
            if over(&record) && labels::serves(&record.labels, target) {
                return Ok(Some(Serving {
                    name: Key::try_from(key.value())?,
                    labels: record.labels,
                    layer: record.layer,
                }));
            }
        }
        Ok(None)
    }

    /// What a committed snapshot and those below it are said to be, nearest
    /// first.
    pub(super) fn claims(&self, name: Key) -> Result<Vec<Claim>, Error> {
        let mut claims = Vec::new();
        let mut next = Some(name);
        while let Some(name) = next {
            let record = self.need(&name)?;
            next = record.parent;
            claims.push(Claim::new(name, &record.labels, record.layer));
        }
        Ok(claims)
    }

    pub(super) fn layer_in_use(&self, layer: Digest) -> Result<bool, Error> {
        let raw = layer.as_raw();
        let mut range = self
            .layers
            .range((raw, 0)..=(raw, u64::MAX))
            .map_err(|e| self.fail(e))?;
        range
            .next()
            .transpose()
            .map(|entry| entry.is_some())
            .map_err(|e| self.fail(e))
    }

    pub(super) fn layers(&self) -> Result<HashSet<Digest>, Error> {
        self.layers
            .iter()
            .and_then(|all| {
                all.map(|entry| Ok(Digest::from_raw(*entry?.0.value().0)))
                    .collect()
            })
            .map_err(|e| self.fail(e))
    }

    /// Every snapshot, by name.
    pub(super) fn each(&self, mut each: impl FnMut(Key, Record)) -> Result<(), Error> {
        for entry in self.snapshots.iter().map_err(|e| self.fail(e))? {
            let (key, value) = entry.map_err(|e| self.fail(e))?;
            let record = self.parse(key.value(), value.value())?;
            each(Key::try_from(key.value())?, record);
        }
        Ok(())
    }
}

/// How the names begin of snapshots that serve as `target` when that name was
/// taken.
pub(super) fn other_names(target: &Key) -> String {
    format!("{target}@")
}

impl Write<'_> {
    /// Adds a record with its links. The parent is checked, and its number
    /// looked up, before anything is written.
    pub(super) fn insert(&mut self, key: &Key, record: &Record) -> Result<(), Error> {
        let parent = self.parent_id(record.parent.as_ref())?;
        self.replace(key, record)?;
        let path = self.path;
        let fail = |error| StoreError::new(path, error);
        let SnapshotId(id) = record.id;
        if let Some(SnapshotId(parent)) = parent {
            self.children.insert((parent, id), ()).map_err(fail)?;
        }
        if let Some(layer) = record.layer {
            self.layers.insert((layer.as_raw(), id), ()).map_err(fail)?;
        }
        if self.next_id()? <= id {
            self.meta.insert(NEXT_ID, id + 1).map_err(fail)?;
        }
        Ok(())
    }

    /// Writes records that were lost. One whose parent is not among them stays,
    /// and says so when it is used.
    pub(super) fn restore(
        &mut self,
        records: &BTreeMap<Key, Record>,
        next_id: u64,
    ) -> Result<(), Error> {
        let path = self.path;
        let fail = |error| StoreError::new(path, error);
        for (key, record) in records {
            self.replace(key, record)?;
            let SnapshotId(id) = record.id;
            let parent = record
                .parent
                .as_ref()
                .and_then(|parent| records.get(parent));
            if let Some(parent) = parent {
                self.children.insert((parent.id.0, id), ()).map_err(fail)?;
            }
            if let Some(layer) = record.layer {
                self.layers.insert((layer.as_raw(), id), ()).map_err(fail)?;
            }
        }
        self.meta.insert(NEXT_ID, next_id).map_err(fail)?;
        Ok(())
    }

    /// Deletes a record with its links.
    pub(super) fn remove(&mut self, key: &Key, record: &Record) -> Result<(), Error> {
        let parent = self.parent_id(record.parent.as_ref())?;
        let path = self.path;
        let fail = |error| StoreError::new(path, error);
        self.snapshots.remove(key.as_str()).map_err(fail)?;
        let SnapshotId(id) = record.id;
        if let Some(SnapshotId(parent)) = parent {
            self.children.remove((parent, id)).map_err(fail)?;
        }
        if let Some(layer) = record.layer {
            self.layers.remove((layer.as_raw(), id)).map_err(fail)?;
        }
        self.changes.push(Entry {
            key: key.clone(),
            record: None,
        });
        Ok(())
    }

    /// Writes a record whose links stay as they are.
    pub(super) fn replace(&mut self, key: &Key, record: &Record) -> Result<(), Error> {
        let value = serde_json::to_vec(record).map_err(|source| StoreError::Record {
            path: self.path.to_owned(),
            key: key.to_string(),
            source: Arc::new(source),
        })?;
        self.snapshots
            .insert(key.as_str(), value.as_slice())
            .map_err(|e| StoreError::new(self.path, e))?;
        self.changes.push(Entry {
            key: key.clone(),
            record: Some(record.clone()),
        });
        Ok(())
    }
}
