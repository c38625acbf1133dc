//! What a former process left: mounts to go on with, mounts to take away, and
//! numbers that were given out.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use super::marker::Before;
use super::start::{BLOBS, LAYERS, MOUNTS, TREES, failed};
use super::{Mode, Node, StartError};
use crate::fuse::{Kept, Session, TreeTable};
use crate::keeper::{self, Keeper};
use crate::layer_dir::{
    DATA_DRAFT, DIFF_ID_DRAFT, Identity, LayerDir, PRESENT_DRAFT, Proof, TAR_REST, TEMPORARY,
};
use crate::mount::{self, users::Overlay};
use crate::service::MountError;

/// The next number, in a file beside the layers.
const NUMBERS: &str = "next-layer";
/// The extension of that file while it is written.
const DRAFT: &str = "tmp";

/// FUSE mounts that are kept and still there, and what stood on others.
#[derive(Debug)]
pub(super) struct Left {
    pub(super) blobs: Option<Kept>,
    pub(super) trees: Option<Kept>,
    /// Mounts that need nobody who serves them.
    alone: HashSet<PathBuf>,
    pub(super) lost: Lost,
}

/// What cannot be gone on with: nobody kept the FUSE device of a mount.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// Overlays whose reads fail now, unless what they read is cached.
    pub(super) overlays: Vec<Overlay>,
    /// Numbers of layers that were mounted.
    numbers: BTreeSet<u64>,
}

impl Left {
    /// Takes over what is kept, and takes everything else out of sight that is
    /// mounted below `root`: its server is gone.
    pub(super) fn take_over(root: &Path, keeper: &Keeper) -> Result<Self, StartError> {
        // Nothing may look at a mount point that nobody serves yet: it would
        // wait for this very process.
        let mounts = mount::mounts_below(root)?;
        let kept = |directory: &str, name: keeper::MountName| {
            let place = root.join(directory);
            let there = mounts
                .iter()
                .any(|mount| mount.target == place && mount.kind.starts_with("fuse"));
            let kept = keeper.take(name).filter(|_| there);
            if kept.is_none() {
                keeper.forget(name);
            }
            kept
        };
        let mut left = Self {
            blobs: kept(BLOBS, keeper::BLOBS),
            trees: kept(TREES, keeper::TREES),
            alone: (mounts.iter())
                .filter(|mount| mount::erofs::is_alone(mount))
                .map(|mount| mount.target.clone())
                .collect(),
            lost: Lost::default(),
        };
        let lost: Vec<_> = mounts
            .iter()
            .filter(|mount| !left.holds(root, &mount.target))
            .collect();
        let found = match lost.is_empty() {
            true => Lost::default(),
            false => left.find_lost(root, &lost),
        };
        for mount in lost {
            tracing::info!(
                "detaching {}, which a former process left mounted",
                mount.target.display()
            );
            mount::detach(&mount.target)?;
            crash_point!("start.lost-detached");
        }
        left.lost = found;
        Ok(left)
    }

    /// Who stands on mounts that nobody can serve any more.
    fn find_lost(&self, root: &Path, mounts: &[&mount::Mount]) -> Lost {
        let mut lost = Lost::default();
        let overlays = mount::users::overlays_on(root).unwrap_or_else(|error| {
            tracing::warn!("cannot tell who uses lost mounts: {error}");
            Vec::new()
        });
        lost.overlays = mount::users::once_each(overlays);
        lost.overlays
            .retain(|user| !user.lower.iter().all(|lower| self.holds(root, lower)));
        let lower = lost.overlays.iter().flat_map(|overlay| &overlay.lower);
        let layers = mounts.iter().map(|mount| &mount.target).chain(lower);
        lost.numbers = layers
            .filter(|path| !self.holds(root, path))
            .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
            .collect();
        lost
    }

    /// Whether what is mounted there can be served, or needs nobody.
    pub(super) fn holds(&self, root: &Path, target: &Path) -> bool {
        let below = |directory| target.starts_with(root.join(directory));
        match () {
            () if self.alone.contains(target) => true,
            () if below(MOUNTS) || below(BLOBS) => self.blobs.is_some(),
            () if below(TREES) => self.trees.is_some(),
            // Not the node's.
            () => !below(LAYERS),
        }
    }
}

/// Numbers of layers: no two layers have the same one while a mount lives,
/// whichever process gave it out, for the kernel remembers what it saw.
#[derive(Debug)]
pub(super) struct Numbers {
    file: PathBuf,
    next: Mutex<u64>,
}

impl Numbers {
    /// Goes on where the file and the layers on disk ended.
    pub(super) fn load(root: &Path, layers: &[Identity]) -> Result<Self, StartError> {
        let file = root.join(NUMBERS);
        remove_draft(&file.with_extension(DRAFT))?;
        let noted = match fs::read_to_string(&file) {
            Ok(text) => text.trim().parse().unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(failed(&file)(error)),
        };
        let used = layers.iter().map(|layer| layer.number + 1).max();
        Ok(Self {
            next: Mutex::new(used.unwrap_or_default().max(noted)),
            file,
        })
    }

    /// A number that no layer had.
    pub(super) fn take(&self) -> io::Result<u64> {
        let mut next = self.next.lock();
        let number = *next;
        // Mounts do not outlive the machine, so the page cache is enough.
        let temporary = self.file.with_extension(DRAFT);
        fs::write(&temporary, format!("{}\n", number + 1))?;
        crash_point!("number.noted");
        fs::rename(&temporary, &self.file)?;
        crash_point!("number.taken");
        *next = number + 1;
        Ok(number)
    }
}

/// Removes directories that were being made or deleted, and files that were
/// to replace others; returns what the directories hold. What a read-only file
/// system keeps does not keep the daemon down.
pub(super) fn tidy(layers: &Path) -> Result<Vec<Identity>, StartError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(layers).map_err(failed(layers))? {
        let path = entry.map_err(failed(layers))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(TEMPORARY) {
            unless_read_only(fs::remove_dir_all(&path)).map_err(failed(&path))?;
            crash_point!("start.tidied");
            continue;
        }
        for draft in [PRESENT_DRAFT, DATA_DRAFT, DIFF_ID_DRAFT] {
            remove_draft(&path.join(draft))?;
        }
        match LayerDir::identify(&path) {
            Ok(identity) => {
                if Proof::load(&path, &identity.digest).is_some() {
                    // Nobody asks for it any more.
                    remove_draft(&path.join(TAR_REST))?;
                }
                found.push(identity);
            }
            // One bad layer is no reason not to start.
            Err(error) => tracing::error!("the layer's readers get an error: {error}"),
        }
    }
    Ok(found)
}

fn remove_draft(path: &Path) -> Result<(), StartError> {
    use io::ErrorKind::{NotADirectory, NotFound};
    match unless_read_only(fs::remove_file(path)) {
        Err(error) if !matches!(error.kind(), NotFound | NotADirectory) => Err(failed(path)(error)),
        _ => Ok(()),
    }
}

/// What cannot be removed there has to stay.
fn unless_read_only(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(()),
        removed => removed,
    }
}

impl Node {
    /// Opens the layers that a former process had mounted, so that their
    /// readers find them when the mounts are served again. One that cannot be
    /// opened fails alone.
    pub(super) fn go_on(
        &self,
        layers: Vec<Identity>,
        left: &Left,
        before: Before,
    ) -> Result<(), StartError> {
        let root = &self.0.config.root;
        let trees = root.join(TREES);
        let shown = match left.trees {
            Some(_) => mount::users::directories_in_use(&trees)?,
            None => BTreeSet::new(),
        };
        let mut mounted: HashSet<PathBuf> = mount::mounts_below(&root.join(MOUNTS))?
            .into_iter()
            .map(|mount| mount.target)
            .collect();
        for identity in layers {
            let digest = identity.digest;
            if left.lost.numbers.contains(&identity.number) {
                self.0.lost.lock().push(digest);
            }
            let target = root.join(MOUNTS).join(identity.number.to_string());
            let erofs = mounted.remove(&target);
            if !erofs && left.trees.is_none() {
                continue;
            }
            // Other trees may be looked at, too, but are not in use: they are
            // mounted, and the rest of them fetched, when they are asked for.
            let shown_at = trees.join(TreeTable::directory_name(identity.number));
            let in_use = self.0.mode == Mode::Fuse && shown.contains(&shown_at);
            let mounted = erofs.then_some(target).or(in_use.then_some(shown_at));
            let tree = left.trees.is_some();
            let opened = LayerDir::open(&self.layer_path(digest), digest).and_then(|dir| {
                // What this process maps must not kill it as it may have
                // killed the last one.
                if tree && before != Before::InOrder {
                    dir.check_meta()?;
                }
                Ok(dir)
            });
            match opened {
                Ok(dir) => {
                    if let Err(error) = self.resume(dir, mounted, tree) {
                        tracing::error!(layer = %digest, "its readers get an error: {error}");
                    }
                }
                Err(error) if error.is_damage() => {
                    tracing::error!(layer = %digest, "its readers wait: {error}");
                    self.revive(identity, mounted, tree);
                }
                Err(error) => {
                    tracing::error!(layer = %digest, "its readers get an error: {error}");
                }
            }
            crash_point!("start.resumed");
        }
        // Layers that were removed while something used them.
        for target in mounted {
            mount::detach(&target)?;
        }
        Ok(())
    }

    /// Mounts again, in the place where they were, layers whose mounts were
    /// lost. Whoever still has the lost ones open is not disturbed.
    pub async fn mount_lost(&self) {
        let lost = std::mem::take(&mut *self.0.lost.lock());
        for digest in lost {
            match self.mount_layer(digest).await {
                Ok(path) => tracing::info!(layer = %digest, "mounted again at {}", path.display()),
                // Nothing referred to it.
                Err(MountError::Unknown(_)) => {}
                Err(error) => tracing::error!("not mounted again: {error}"),
            }
        }
    }
}

/// Removes the empty mount points of a former process.
pub(super) fn clear(root: &Path) -> Result<(), StartError> {
    let directory = root.join(MOUNTS);
    let mounts = mount::mounts_below(&directory)?;
    for entry in fs::read_dir(&directory).map_err(failed(&directory))? {
        let path = entry.map_err(failed(&directory))?.path();
        if !mounts.iter().any(|mount| mount.target == path) {
            unless_read_only(fs::remove_dir(&path)).map_err(failed(&path))?;
            crash_point!("start.cleared");
        }
    }
    Ok(())
}

/// Has a fresh mount kept for the next process.
pub(super) fn keep(keeper: &Keeper, mode: Mode, session: &mut Session) {
    let name = name_of(mode);
    match keeper.keep(name, session.kept()) {
        Ok(true) => session.outlive(),
        Ok(false) => {}
        Err(error) => tracing::warn!(
            "{} ends with this process, and breaks containers then: {error}",
            session.mount_point().display()
        ),
    }
}

pub(super) fn name_of(mode: Mode) -> keeper::MountName {
    match mode {
        Mode::Erofs => keeper::BLOBS,
        Mode::Fuse => keeper::TREES,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regression_a_number_is_never_given_out_again() {
        let root = tempfile::tempdir().unwrap();
        let numbers = Numbers::load(root.path(), &[]).unwrap();
        assert_eq!([numbers.take().unwrap(), numbers.take().unwrap()], [0, 1]);
        // The layers are gone, the mount that showed them is not.
        let next = Numbers::load(root.path(), &[]).unwrap();
        assert_eq!(next.take().unwrap(), 2);
        // A number that could not be noted is not given out.
        fs::remove_dir_all(root.path()).unwrap();
        assert!(next.take().is_err());
        fs::create_dir(root.path()).unwrap();
        assert_eq!(next.take().unwrap(), 3);
    }
    #[test]
    fn regression_drafts_of_a_killed_process_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let layers = root.path().join(LAYERS);
        let layer = layers.join("0".repeat(64));
        fs::create_dir_all(&layer).unwrap();
        fs::create_dir(layers.join(format!("{TEMPORARY}x"))).unwrap();
        fs::write(layers.join("file"), "").unwrap();
        fs::write(layer.join(PRESENT_DRAFT), "half").unwrap();
        fs::write(layer.join(DATA_DRAFT), "").unwrap();
        fs::write(root.path().join("next-layer.tmp"), "1").unwrap();
        assert!(tidy(&layers).unwrap().is_empty());
        Numbers::load(root.path(), &[]).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        assert_eq!(fs::read_dir(&layers).unwrap().count(), 2);
        assert_eq!(fs::read_dir(&layer).unwrap().count(), 0);
    }
}
