//! Letting layers go: closed, unmounted, deleted.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sluice_oci::Digest;
use tokio::task::spawn_blocking;

use super::Node;
use super::layer::{Open, Slot};
use super::start::MOUNTS;
use crate::layer_dir::{LayerDir, TEMPORARY};
use crate::mount;
use crate::service::MountError;

/// A layer that somebody holds for longer than this is being opened.
const BUSY: Duration = Duration::from_secs(2);

impl Node {
    /// Unmounts and deletes the layer.
    pub(super) async fn remove_layer(&self, digest: Digest) -> Result<(), MountError> {
        // Their files could not be named later.
        self.end_recordings(|recording| recording.of(digest)).await;
        let slot = self.slot(digest);
        let mut place = slot.0.lock().await;
        let failed = |error: io::Error| MountError::failed(digest, error);
        if let Some(open) = place.take() {
            open.close(self, false).await;
        }
        crash_point!("release.closed");
        let path = self.layer_path(digest);
        let elsewhere = Arc::clone(&self.0.elsewhere);
        let deleted = spawn_blocking(move || {
            let identity = LayerDir::identify(&path);
            delete(&path)?;
            // Whoever took chunks from it holds its files until now.
            if let Ok(identity) = identity {
                elsewhere.removed(identity.number);
            }
            Ok(())
        });
        deleted
            .await
            .map_err(io::Error::other)
            .flatten()
            .map_err(failed)?;
        drop(place);
        self.0.unpersisted.lock().remove(&digest);
        self.0.undescribed.lock().remove(&digest);
        self.forget(digest, &slot);
        Ok(())
    }

    /// Takes an empty slot out of the table, unless somebody else waits for it.
    pub(super) fn forget(&self, digest: Digest, slot: &Arc<Slot>) {
        let mut slots = self.0.slots.lock();
        // One for the table and one for the caller.
        if Arc::strong_count(slot) == 2 && slot.0.try_lock().is_ok_and(|place| place.is_none()) {
            slots.remove(&digest);
        }
    }

    /// Removes layers that are neither known nor being opened.
    pub(super) async fn retain_layers(&self, known: &HashSet<Digest>) -> Result<(), MountError> {
        let layers = self.layers_dir();
        let on_disk = spawn_blocking(move || list(&layers)).await;
        let on_disk = match on_disk.map_err(io::Error::other).flatten() {
            Ok(on_disk) => on_disk,
            Err(error) => {
                tracing::warn!("cannot list the layers on this node: {error}");
                return Ok(());
            }
        };
        let mut first_failure = Ok(());
        for digest in on_disk {
            if known.contains(&digest) {
                continue;
            }
            // What verifies a layer at the start holds it for a moment only.
            let slot = self.slot(digest);
            let busy = tokio::time::timeout(BUSY, slot.0.lock()).await.is_err();
            drop(slot);
            if busy {
                continue;
            }
            tracing::info!(layer = %digest, "removed: nothing refers to it");
            let removed = self.remove_layer(digest).await;
            if first_failure.is_ok() {
                first_failure = removed;
            }
        }
        first_failure
    }
}

impl Slot {
    /// Ends the layer's work, and keeps its directory.
    pub(super) async fn close(&self, node: &Node) {
        if let Some(open) = self.0.lock().await.take() {
            open.close(node, true).await;
        }
    }
}

impl Open {
    /// Ends the layer's work and unmounts it; what is present is made durable
    /// if it is to be kept.
    pub(super) async fn close(self, node: &Node, keep: bool) {
        self.layer.close();
        let number = self.layer.dir().identity().number;
        let mounts = node.0.config.root.join(MOUNTS);
        if let Some(target) = self.mounted.filter(|target| target.starts_with(mounts)) {
            let unmounted = spawn_blocking(move || unmount(&target)).await;
            if let Err(error) = unmounted.map_err(io::Error::other).flatten() {
                tracing::warn!(layer = %self.layer.digest(), "{error}");
            }
        }
        node.0.blobs.remove(number);
        node.0.trees.remove(number);
        drop((self.prefetch, self.download));
        if keep {
            node.persist_layer(self.layer).await;
        }
    }
}

/// How long a mount may be busy with users that are going: an overlay that
/// was unmounted lets go of its layers a moment later.
const LET_GO: Duration = Duration::from_secs(1);

/// Unmounts a layer's mount point and removes it. A mount that something
/// still uses is taken out of sight, and ends with its last user.
fn unmount(target: &Path) -> io::Result<()> {
    let since = Instant::now();
    let mut pause = Duration::from_millis(1);
    while let Err(error) = mount::unmount(target) {
        if !error.is_busy() || since.elapsed() >= LET_GO {
            mount::detach(target).map_err(io::Error::other)?;
            tracing::warn!("{error}; it ends with its last user");
            break;
        }
        std::thread::sleep(pause);
        pause *= 2;
    }
    crash_point!("release.unmounted");
    fs::remove_dir(target)?;
    crash_point!("release.target-removed");
    Ok(())
}

/// The same, unless something uses it: says whether it is unmounted.
pub(super) fn unmount_unused(target: &Path) -> io::Result<bool> {
    match mount::unmount(target) {
        Ok(()) => {
            crash_point!("evict.unmounted");
            fs::remove_dir(target)?;
            crash_point!("evict.target-removed");
            Ok(true)
        }
        Err(mount::Error::Unmount { source, .. })
            if source.kind() == io::ErrorKind::ResourceBusy =>
        {
            Ok(false)
        }
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Deletes a layer's directory, which has no name any more when that begins.
pub(super) fn delete(path: &Path) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let doomed = path.with_file_name(format!("{TEMPORARY}{name}.deleted"));
    let _ = fs::remove_dir_all(&doomed);
    match fs::rename(path, &doomed) {
        Ok(()) => {
            crash_point!("release.renamed");
            fs::remove_dir_all(&doomed)?;
            crash_point!("release.deleted");
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// The layers on disk.
pub(super) fn list(layers: &Path) -> io::Result<Vec<Digest>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(layers)? {
        let name = entry?.file_name();
        if let Ok(digest) = format!("sha256:{}", name.to_string_lossy()).parse() {
            found.push(digest);
        }
    }
    Ok(found)
}
