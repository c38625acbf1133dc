//! The directories of snapshots: `snapshots/<id>/fs` holds what a snapshot
//! changed, `snapshots/<id>/work` is overlayfs's own.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::error::Error;
use super::lazy_layers::{Owner, Usage};
use super::snapshot::{Kind, SnapshotId};

/// Modes as containerd's overlayfs snapshotter gives them.
const FS_MODE: u32 = 0o755;
const WORK_MODE: u32 = 0o711;

/// The directory `snapshots` of a root.
#[derive(Debug)]
pub(crate) struct Directories {
    path: PathBuf,
    /// Directories that no record in the database refers to yet.
    pending: Mutex<HashSet<SnapshotId>>,
}

/// A new directory. It goes when this value is dropped before `keep`.
#[derive(Debug)]
pub(crate) struct NewDirectory {
    directories: Arc<Directories>,
    id: SnapshotId,
    kept: bool,
}

impl Directories {
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        let path = root.join("snapshots");
        make(&path, 0o700).or_else(|error| {
            if error.kind() == io::ErrorKind::AlreadyExists {
                Ok(())
            } else {
                Err(Error::directory("create", &path, error))
            }
        })?;
        Ok(Self {
            path,
            pending: Mutex::default(),
        })
    }

    pub(crate) fn upper(&self, id: SnapshotId) -> PathBuf {
        self.directory(id).join("fs")
    }

    pub(crate) fn work(&self, id: SnapshotId) -> PathBuf {
        self.directory(id).join("work")
    }

    /// Whose [`Self::upper`] this is.
    pub(crate) fn id_of(&self, upper: &Path) -> Option<SnapshotId> {
        let inside = upper.strip_prefix(&self.path).ok()?;
        let id = inside.iter().next()?.to_str()?.parse().ok()?;
        Some(SnapshotId(id))
    }

    fn directory(&self, id: SnapshotId) -> PathBuf {
        self.path.join(id.to_string())
    }

    /// Makes the directories of a snapshot, `fs` owned as what lies below it.
    pub(crate) fn create(
        self: &Arc<Self>,
        id: SnapshotId,
        kind: Kind,
        owner: Option<Owner>,
    ) -> Result<NewDirectory, Error> {
        self.pending.lock().insert(id);
        let new = NewDirectory {
            directories: Arc::clone(self),
            id,
            kept: false,
        };
        self.fill(id, kind, owner)?;
        Ok(new)
    }

    fn fill(&self, id: SnapshotId, kind: Kind, owner: Option<Owner>) -> Result<(), Error> {
        let create = |path: &Path, mode| {
            make(path, mode).map_err(|error| Error::directory("create", path, error))
        };
        create(&self.directory(id), 0o700)?;
        crash_point!("prepare.directory-made");
        let upper = self.upper(id);
        create(&upper, FS_MODE)?;
        crash_point!("prepare.upper-made");
        if let Some(Owner { uid, gid }) = owner {
            std::os::unix::fs::chown(&upper, Some(uid), Some(gid))
                .map_err(|error| Error::directory("set the owner of", &upper, error))?;
            crash_point!("prepare.upper-owned");
        }
        if kind == Kind::Active {
            create(&self.work(id), WORK_MODE)?;
        }
        crash_point!("prepare.directories-made");
        Ok(())
    }

    /// Who owns what a snapshot shows.
    pub(crate) fn owner(&self, id: SnapshotId) -> Result<Owner, Error> {
        let upper = self.upper(id);
        let metadata = fs::metadata(&upper)
            .map_err(|error| Error::directory("look at the parent's", &upper, error))?;
        Ok(Owner {
            uid: metadata.uid(),
            gid: metadata.gid(),
        })
    }

    /// Deletes the directories of a snapshot, if they are there.
    pub(crate) fn remove(&self, id: SnapshotId) -> Result<(), Error> {
        remove_all(&self.directory(id))
    }

    /// What a snapshot's own files take.
    pub(crate) fn usage(&self, id: SnapshotId) -> Result<Usage, Error> {
        let upper = self.upper(id);
        disk_usage(&upper).map_err(|error| Error::directory("measure", &upper, error))
    }

    /// Deletes every directory that has no record. `known` is asked after the
    /// directories were listed, so that a snapshot made meanwhile is not
    /// taken for a leftover. Returns how many went.
    pub(crate) fn remove_orphans(
        &self,
        known: impl FnOnce() -> Result<HashSet<SnapshotId>, Error>,
    ) -> Result<usize, Error> {
        let mut removed = 0;
        for path in self.orphans(known)? {
            // One that resists must not keep the others.
            match remove_all(&path) {
                Ok(()) => removed += 1,
                Err(error) => tracing::warn!(%error, "a leftover of a removed snapshot stays"),
            }
        }
        Ok(removed)
    }

    /// Moves every directory that has no record into the directory `lost`
    /// beside them, for records may be lost as well. What is mounted from them
    /// goes on.
    pub(crate) fn set_aside_orphans(
        &self,
        known: impl FnOnce() -> Result<HashSet<SnapshotId>, Error>,
    ) -> Result<Vec<PathBuf>, Error> {
        let lost = self.path.with_file_name("lost");
        let mut moved = Vec::new();
        for path in self.orphans(known)? {
            make(&lost, 0o700)
                .or_else(|error| match error.kind() {
                    io::ErrorKind::AlreadyExists => Ok(()),
                    _ => Err(error),
                })
                .map_err(|error| Error::directory("create", &lost, error))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let to = (0u32..)
                .map(|number| lost.join(format!("{name}-{number}")))
                .find(|to| !to.exists())
                .unwrap_or_else(|| lost.join(&*name));
            fs::rename(&path, &to).map_err(|error| Error::directory("move", &path, error))?;
            moved.push(to);
        }
        Ok(moved)
    }

    fn orphans(
        &self,
        known: impl FnOnce() -> Result<HashSet<SnapshotId>, Error>,
    ) -> Result<Vec<PathBuf>, Error> {
        let list = |error| Error::directory("list", &self.path, error);
        let names: Vec<OsString> = fs::read_dir(&self.path)
            .map_err(list)?
            .map(|entry| entry.map(|e| e.file_name()))
            .collect::<io::Result<_>>()
            .map_err(list)?;
        let pending = self.pending.lock().clone();
        let known = known()?;
        let orphans = names.into_iter().filter(|name| {
            let id = name.to_str().and_then(|n| n.parse().ok()).map(SnapshotId);
            !id.is_some_and(|id| known.contains(&id) || pending.contains(&id))
        });
        Ok(orphans.map(|name| self.path.join(name)).collect())
    }

    /// Whether everything that a record needs is on the disk. After a power
    /// cut the database can know a snapshot whose directory never got there:
    /// one to be written to is made anew, a committed one is lost.
    pub(crate) fn restore(&self, id: SnapshotId, kind: Kind) -> Result<Found, Error> {
        let wanted = [
            (self.directory(id), 0o700, true),
            (self.upper(id), FS_MODE, true),
            (self.work(id), WORK_MODE, kind == Kind::Active),
        ];
        let mut found = Found::Whole;
        for (path, mode, wanted) in wanted {
            if !wanted || path.is_dir() {
                continue;
            }
            if kind == Kind::Committed {
                return Ok(Found::Lost);
            }
            make(&path, mode).map_err(|error| Error::directory("create", &path, error))?;
            found = Found::MadeAnew;
        }
        Ok(found)
    }
}

/// What was found of a recorded snapshot's directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    Whole,
    MadeAnew,
    Lost,
}

impl NewDirectory {
    /// A record refers to the directory now.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for NewDirectory {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = self.directories.remove(self.id)
        {
            tracing::warn!(%error, "a directory of a snapshot that was not made stays");
        }
        self.directories.pending.lock().remove(&self.id);
    }
}

/// Makes one directory of exactly this mode, whatever the umask.
fn make(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().mode(mode).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn remove_all(path: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::directory("remove", path, error))
        }
        _ => Ok(()),
    }
}

/// Blocks and inodes below `root` and of itself, hard links counted once.
fn disk_usage(root: &Path) -> io::Result<Usage> {
    let mut seen = HashSet::new();
    let mut usage = Usage::default();
    let mut queue = vec![root.to_owned()];
    while let Some(path) = queue.pop() {
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            // A container that runs removes files while they are counted.
            Err(error) if error.kind() == io::ErrorKind::NotFound && path != root => continue,
            Err(error) => return Err(error),
        };
        if metadata.is_dir() {
            match fs::read_dir(&path) {
                Ok(entries) => {
                    for entry in entries {
                        queue.push(entry?.path());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && path != root => continue,
                Err(error) => return Err(error),
            }
        } else if metadata.nlink() > 1 && !seen.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        usage.inodes += 1;
        usage.bytes += metadata.blocks() * 512;
    }
    Ok(usage)
}
