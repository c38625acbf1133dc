//! Dropping content that nothing uses, when the layers take more of the disk
//! than they may.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use sluice_oci::Digest;
use tokio::task::spawn_blocking;

use super::release::{list, unmount_unused};
use super::{Mode, Node};
use crate::layer_dir::{self, LayerDir};
use crate::service::InUse;

/// How much the layers may take on disk. The default is no bound at all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// Bytes of all files of all layers.
    pub limit: Option<u64>,
    /// Bytes that are to stay free on their file system.
    pub min_free: u64,
}

impl Quota {
    /// Whether there is any bound.
    pub fn is_set(&self) -> bool {
        self.limit.is_some() || self.min_free > 0
    }

    /// Bytes for which there is room, when content that cannot be evicted
    /// takes `used` and all that can would leave `free`.
    fn room(&self, used: u64, free: u64) -> u64 {
        let below = self
            .limit
            .map_or(u64::MAX, |limit| limit.saturating_sub(used));
        below.min(free.saturating_sub(self.min_free))
    }

    /// Bytes that are too many, when the layers take `used` and `free` are
    /// free.
    fn excess(&self, used: u64, free: u64) -> u64 {
        let over = self.limit.map_or(0, |limit| used.saturating_sub(limit));
        over.max(self.min_free.saturating_sub(free))
    }
}

/// A layer on disk.
#[derive(Debug, Clone, Copy)]
struct Stored {
    digest: Digest,
    /// Bytes of its content.
    content: u64,
    last_used: SystemTime,
}

impl Node {
    /// Evicts content, least recently used first, until the quota is kept or
    /// everything that is left is in use.
    pub(super) async fn evict_layers(&self, in_use: &InUse) {
        let quota = self.0.config.quota;
        if !quota.is_set() {
            return;
        }
        let Some(used) = ask(in_use).await else {
            return;
        };
        self.touch(&used).await;
        let layers = self.layers_dir();
        let surveyed = spawn_blocking(move || survey(&layers)).await;
        let (mut stored, taken, free) = match surveyed.map_err(io::Error::other).flatten() {
            Ok(survey) => survey,
            Err(error) => {
                tracing::warn!("nothing is evicted: cannot tell what the layers take: {error}");
                return;
            }
        };
        stored.retain(|layer| layer.content > 0 && !used.contains(&layer.digest));
        let idle: u64 = stored.iter().map(|layer| layer.content).sum();
        let room = quota.room(taken.saturating_sub(idle), free.saturating_add(idle));
        self.0.engine.set_room(room);
        let mut excess = quota.excess(taken, free);
        if excess == 0 {
            self.0.overfull.store(false, Ordering::Relaxed);
            return;
        }
        stored.sort_unstable_by_key(|layer| (layer.last_used, layer.digest));
        for layer in stored {
            if excess == 0 {
                break;
            }
            match self.evict_layer(layer.digest, in_use).await {
                Ok(true) => {
                    excess = excess.saturating_sub(layer.content);
                    tracing::info!(layer = %layer.digest, bytes = layer.content, "its content was evicted");
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(layer = %layer.digest, "not evicted: {error}"),
            }
        }
        if excess > 0 && !self.0.overfull.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "the layers take {excess} bytes more than the configuration's section [cache] \
                 allows, and everything that is left is in use; only what is read is fetched now; \
                 raise the limit, or stop containers"
            );
        }
    }

    /// Notes which layers are in use, for the order of eviction.
    async fn touch(&self, used: &HashSet<Digest>) {
        let layers = self.layers_dir();
        let used: Vec<Digest> = used.iter().copied().chain(self.recently_used()).collect();
        let touched = spawn_blocking(move || {
            for digest in used {
                // One that is gone, or cannot be written to, is told elsewhere.
                let _ = LayerDir::touch(&layers.join(digest.hex()));
            }
        });
        let _ = touched.await;
    }

    /// Drops the layer's content, unless it is in use, and says whether it did.
    async fn evict_layer(&self, digest: Digest, in_use: &InUse) -> Result<bool, String> {
        let slot = self.slot(digest);
        let mut place = slot.0.lock().await;
        // Nobody mounts it from here on; whoever did before is known by now.
        let unused = ask(in_use)
            .await
            .is_some_and(|used| !used.contains(&digest));
        if !unused {
            return Ok(false);
        }
        let Some(mut open) = place.take() else {
            let path = self.layer_path(digest);
            let emptied = spawn_blocking(move || {
                let dir = LayerDir::open(&path, digest)?;
                dir.evict()?;
                Ok::<_, layer_dir::Error>(dir.identity().number)
            });
            let emptied = emptied.await;
            drop(place);
            self.forget(digest, &slot);
            let emptied = emptied.map_err(|error| error.to_string())?;
            let number = emptied.map_err(|error| error.to_string())?;
            // Whoever took chunks from it holds what was there until now.
            self.0.elsewhere.forget(number);
            return Ok(true);
        };
        if self.0.mode == Mode::Erofs
            && let Some(target) = open.mounted.clone()
        {
            let unmounted = spawn_blocking(move || unmount_unused(&target)).await;
            match unmounted.map_err(io::Error::other).flatten() {
                Ok(true) => open.mounted = None,
                Ok(false) => {
                    *place = Some(open);
                    return Ok(false);
                }
                Err(error) => {
                    *place = Some(open);
                    return Err(error.to_string());
                }
            }
        }
        let layer = open.end();
        let emptied = spawn_blocking(move || layer.dir().evict()).await;
        // A FUSE mount may still have the layer's number somewhere: it goes on
        // with the emptied directory.
        *place = self.load(digest).await?;
        if let (Mode::Fuse, Some(open)) = (self.0.mode, place.as_mut()) {
            self.show_tree(&open.layer)
                .await
                .map_err(|error| error.to_string())?;
        }
        let emptied = emptied.map_err(|error| error.to_string())?;
        emptied.map(|()| true).map_err(|error| error.to_string())
    }
}

async fn ask(in_use: &InUse) -> Option<HashSet<Digest>> {
    let in_use = InUse::clone(in_use);
    spawn_blocking(move || in_use()).await.ok().flatten()
}

/// The layers in a directory, what all of them take, and what is free there.
fn survey(layers: &Path) -> io::Result<(Vec<Stored>, u64, u64)> {
    let mut stored = Vec::new();
    let mut taken = 0;
    for digest in list(layers)? {
        let path = layers.join(digest.hex());
        // One that goes meanwhile counts for nothing.
        let Ok(Some((bytes, _))) = LayerDir::usage(&path) else {
            continue;
        };
        taken += bytes;
        stored.push(Stored {
            digest,
            content: LayerDir::content_size(&path).unwrap_or(0),
            last_used: LayerDir::last_used(&path).unwrap_or(SystemTime::UNIX_EPOCH),
        });
    }
    let file_system = rustix::fs::statvfs(layers)?;
    Ok((stored, taken, file_system.f_bavail * file_system.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stricter_bound_decides() {
        let quota = Quota {
            limit: Some(100),
            min_free: 50,
        };
        assert_eq!(quota.excess(100, 50), 0);
        assert_eq!(quota.excess(130, 50), 30);
        assert_eq!(quota.excess(130, 10), 40);
        assert_eq!(Quota::default().excess(u64::MAX, 0), 0);
        assert_eq!(quota.room(70, 70), 20);
        assert_eq!(quota.room(90, 70), 10);
        assert_eq!(quota.room(130, 70), 0);
        assert_eq!(quota.room(0, 40), 0);
    }
}
