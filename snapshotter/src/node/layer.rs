//! One layer of the node while it is open: mounted, fetched, looked at.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use sluice_layer::StartChunks;
use sluice_oci::{Digest, Reference};
use tokio::task::spawn_blocking;

use super::paths::path_of;
use super::plans::ProfileSource;
use super::start::{BLOBS, MOUNTS, TREES};
use super::status::LayerStatus;
use super::{Mode, Node, source};
use crate::descriptors::Seat;
use crate::erofs::Image;
use crate::fetch::{Handle, LazyLayer, Plan};
use crate::fuse::blobs::BlobTable;
use crate::fuse::{Content, Tree, TreeTable};
use crate::layer_dir::{LayerDir, META};
use crate::mount;
use crate::profiles::ImageId;
use crate::remote::Known;
use crate::service::{MountError, NotLazy, Owner, Usage};

/// The place of a layer, whether it is there or not. The lock is held while
/// the layer is being opened, mounted or removed.
#[derive(Default)]
pub(super) struct Slot(pub(super) tokio::sync::Mutex<Option<Open>>);

/// A layer that is open.
pub(super) struct Open {
    pub(super) layer: Arc<LazyLayer>,
    pub(super) mounted: Option<PathBuf>,
    /// Who says what is fetched ahead, once that was looked for, and its
    /// fetching.
    pub(super) prefetch: Option<(Option<ProfileSource>, Option<Handle>)>,
    pub(super) download: Option<Handle>,
    /// Whether a snapshot was mounted from it, and nobody noted that yet.
    pub(super) used: bool,
    /// A former process mounted it: what was read before is not known.
    resumed: bool,
    /// Whether the kernel reads its content without asking.
    pub(super) direct: bool,
    _seat: Seat,
}

impl Node {
    /// Opens the layer: from its directory, or from the registry. `known` has
    /// to vouch for it in either case, for a directory may have been made for
    /// another image, which claimed other content for the same layer.
    pub(super) async fn open_layer(
        &self,
        reference: &Reference,
        image: &ImageId,
        digest: Digest,
        known: &Known,
    ) -> Result<(), NotLazy> {
        let not_lazy = |reason: String| NotLazy::new(digest, reason);
        let slot = self.slot(digest);
        let mut place = slot.0.lock().await;
        if place.is_none() {
            *place = self.load(digest).await.map_err(not_lazy)?;
        }
        let open = match place.take() {
            Some(open) => place.insert(open),
            None => {
                let made = self.make_and_load(reference, digest, known);
                let begun = self.begin_fetch(reference, image, digest, known);
                let (made, begun) = tokio::join!(made, begun);
                let made = made.map_err(not_lazy)?;
                if let Some(begun) = begun {
                    made.layer.take_begun(begun);
                }
                place.insert(made)
            }
        };
        let identity = open.layer.dir().identity();
        if !known.vouches_for(identity.trust, identity.compressed_toc) {
            return Err(not_lazy(
                "the image names another table of contents than the one that is on this node"
                    .to_owned(),
            ));
        }
        self.prefetch(open, image, known.start_chunks());
        Ok(())
    }

    pub(super) fn adopt(&self, dir: LayerDir, seat: Seat) -> Open {
        let identity = dir.identity().clone();
        let source = source(&self.0.remote, &identity.reference, identity.digest);
        let meta = dir.meta_path();
        let layer = LazyLayer::new(
            dir,
            Box::new(source),
            &self.0.engine,
            Box::new(move |offset| path_of(&meta, offset)),
        );
        let content = Arc::clone(&layer);
        self.0.elsewhere.opened(&layer);
        self.0.blobs.insert(identity.number, content);
        Open {
            layer,
            mounted: None,
            prefetch: None,
            download: None,
            used: false,
            resumed: false,
            direct: false,
            _seat: seat,
        }
    }

    /// Mounts the layer, unless it is mounted.
    pub(super) async fn mount_layer(&self, digest: Digest) -> Result<PathBuf, MountError> {
        let slot = self.slot(digest);
        let mut place = slot.0.lock().await;
        if place.is_none() {
            *place = self
                .load(digest)
                .await
                .map_err(|error| MountError::failed(digest, error))?;
        }
        let Some(open) = place.as_mut() else {
            drop(place);
            self.forget(digest, &slot);
            return Err(MountError::Unknown(digest));
        };
        open.used = true;
        if let Some(path) = &open.mounted {
            return Ok(path.clone());
        }
        let direct = self.0.mode == Mode::Erofs && open.layer.dir().is_complete();
        let path = match self.0.mode {
            Mode::Erofs => self.mount_erofs(&open.layer, direct).await,
            Mode::Fuse => self.show_tree(&open.layer).await,
        }
        .map_err(|error| MountError::failed(digest, error))?;
        open.mounted = Some(path.clone());
        open.direct = direct;
        self.index_layer(&open.layer);
        self.download(open);
        Ok(path)
    }

    /// Starts to fetch what `image` will need of the layer, if anything says
    /// what that is and it was not started before.
    fn prefetch(&self, open: &mut Open, image: &ImageId, built_in: Option<&StartChunks>) {
        if !self.0.config.prefetch || open.prefetch.is_some() || open.layer.dir().is_complete() {
            return;
        }
        open.prefetch = Some((None, None));
        let (node, image, built_in) = (self.clone(), image.clone(), built_in.cloned());
        let layer = Arc::clone(&open.layer);
        // It may have to ask the registry, and nobody waits for that.
        let ahead: BoxFuture<'static, ()> =
            Box::pin(async move { node.fetch_ahead(layer, &image, built_in).await });
        tokio::spawn(ahead);
    }

    /// Notes who says what is fetched ahead of the layer, and the fetching,
    /// which ends with the layer.
    pub(super) async fn follows(
        &self,
        digest: Digest,
        source: ProfileSource,
        fetching: Option<Handle>,
    ) {
        let slot = self.0.slots.lock().get(&digest).cloned();
        let Some(slot) = slot else { return };
        if let Some(open) = slot.0.lock().await.as_mut() {
            open.prefetch = Some((Some(source), fetching));
        }
    }

    /// A container of `image` is about to start. Returns its layers, and
    /// whether nothing was read of them before that was not seen.
    pub(super) async fn starting(&self, image: &ImageId) -> (Vec<Arc<LazyLayer>>, bool) {
        let mut layers = Vec::new();
        let mut whole = true;
        for &digest in &image.layers {
            let slot = self.0.slots.lock().get(&digest).cloned();
            let Some(slot) = slot else {
                whole = false;
                continue;
            };
            let mut place = slot.0.lock().await;
            let Some(open) = place.as_mut() else {
                whole = false;
                continue;
            };
            // Of a layer whose content is all here, the kernel reads it alone.
            let dir = open.layer.dir();
            let activity = open.layer.activity();
            let unread = activity.reads == 0 && activity.waited == 0;
            whole &= dir.chunks().is_empty() || (unread && !open.resumed && !dir.is_complete());
            self.prefetch(open, image, None);
            layers.push(Arc::clone(&open.layer));
        }
        self.know_dependencies(&layers, image);
        (layers, whole)
    }

    /// Starts to download what a mounted layer lacks, and to find out whether
    /// it is what its image says.
    fn download(&self, open: &mut Open) {
        let dir = open.layer.dir();
        if let (Some(delay), None) = (self.0.config.background, &open.download)
            && (!dir.is_complete() || dir.proof().is_none())
        {
            let prove = self.clone().prove(Arc::clone(&open.layer));
            open.download = Some(open.layer.download(delay, prove));
        }
    }

    /// Opens a layer that a former process had mounted at `mounted`, or of
    /// which it may have shown the tree.
    pub(super) fn resume(
        &self,
        dir: LayerDir,
        mounted: Option<PathBuf>,
        tree: bool,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let seat = self.0.seats.take()?;
        let digest = dir.identity().digest;
        let meta = dir.meta_path();
        let mut open = self.adopt(dir, seat);
        if tree {
            self.insert_tree(&open.layer, Image::open(&meta)?);
        }
        self.resume_mount(&mut open, mounted);
        // Nobody else knows the slot yet.
        if let Ok(mut place) = self.slot(digest).0.try_lock() {
            *place = Some(open);
        }
        Ok(())
    }

    /// Goes on with the mount of a former process.
    pub(super) fn resume_mount(&self, open: &mut Open, mounted: Option<PathBuf>) {
        open.resumed = true;
        if mounted.is_some() {
            open.mounted = mounted;
            // Perhaps; it had to be complete for that.
            open.direct = self.0.mode == Mode::Erofs && open.layer.dir().is_complete();
            if self.0.config.prefetch {
                let landmark = open.layer.prefetch(Plan::Landmark);
                open.prefetch =
                    landmark.map(|fetching| (Some(ProfileSource::Image), Some(fetching)));
            }
            self.download(open);
        }
    }

    async fn mount_erofs(
        &self,
        layer: &LazyLayer,
        complete: bool,
    ) -> Result<PathBuf, Box<dyn std::error::Error + Send + Sync>> {
        let number = layer.dir().identity().number;
        let root = &self.0.config.root;
        let target = root.join(MOUNTS).join(number.to_string());
        let options = mount::erofs::Options {
            // What comes through FUSE is cached once, by EROFS; and a reader
            // that waits for missing bytes can be killed, which it could not
            // while FUSE reads through the page cache. Complete data is often
            // in the page cache, where direct I/O would not look.
            direct_io: !complete,
            alone: complete,
        };
        let data = if complete {
            // Bytes that are all here need nobody to serve them.
            layer.dir().data_path()
        } else {
            root.join(BLOBS).join(BlobTable::file_name(number))
        };
        let meta = layer.dir().meta_path();
        spawn_blocking(move || {
            match fs::create_dir(&target) {
                Ok(()) => {}
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error.into());
                }
                // A former process mounted a layer that could not be opened
                // when this one started: its mount works again.
                Err(_) if is_mounted(&target)? => return Ok(target),
                Err(_) => {}
            }
            crash_point!("mount.target-made");
            mount::erofs::mount(&meta, &data, &target, options)?;
            crash_point!("mount.mounted");
            Ok(target)
        })
        .await?
    }

    pub(super) async fn show_tree(
        &self,
        layer: &Arc<LazyLayer>,
    ) -> Result<PathBuf, Box<dyn std::error::Error + Send + Sync>> {
        let number = layer.dir().identity().number;
        let meta = layer.dir().meta_path();
        let image = spawn_blocking(move || Image::open(&meta)).await??;
        self.insert_tree(layer, image);
        crash_point!("mount.shown");
        let name = TreeTable::directory_name(number);
        Ok(self.0.config.root.join(TREES).join(name))
    }

    fn insert_tree(&self, layer: &Arc<LazyLayer>, image: Image) {
        let content: Arc<dyn Content> = Arc::clone(layer) as _;
        let number = layer.dir().identity().number;
        self.0.trees.insert(number, Tree::new(image, content));
    }

    /// The layers that snapshots were mounted from since this was last asked.
    pub(super) fn recently_used(&self) -> Vec<Digest> {
        let slots: Vec<_> = self.0.slots.lock().clone().into_iter().collect();
        let used = slots.into_iter().filter_map(|(digest, slot)| {
            let mut place = slot.0.try_lock().ok()?;
            let open = place.as_mut()?;
            std::mem::take(&mut open.used).then_some(digest)
        });
        used.collect()
    }

    /// Who owns the layer's root directory.
    pub(super) async fn layer_owner(&self, digest: Digest) -> Result<Owner, MountError> {
        let meta = self.layer_path(digest).join(META);
        let read = spawn_blocking(move || {
            let image = Image::open(&meta)?;
            image.attributes(image.root())
        });
        let failed =
            |error: Box<dyn std::error::Error + Send + Sync>| MountError::failed(digest, error);
        let root = read.await.map_err(|e| failed(e.into()))?;
        let root = root.map_err(|e| failed(e.into()))?;
        Ok(Owner {
            uid: root.uid,
            gid: root.gid,
        })
    }

    /// What the layer takes on disk.
    pub(super) async fn layer_usage(&self, digest: Digest) -> Result<Usage, MountError> {
        let path = self.layer_path(digest);
        let found = spawn_blocking(move || LayerDir::usage(&path)).await;
        match found.map_err(|error| MountError::failed(digest, error))? {
            Ok(Some((bytes, inodes))) => Ok(Usage { bytes, inodes }),
            Ok(None) => Err(MountError::Unknown(digest)),
            Err(error) => Err(MountError::failed(digest, error)),
        }
    }

    /// What each open layer is and does, by digest.
    pub(super) fn layer_statuses(&self) -> Vec<LayerStatus> {
        let slots: Vec<Arc<Slot>> = self.0.slots.lock().values().cloned().collect();
        let mut statuses: Vec<LayerStatus> = slots
            .iter()
            // One that is being opened or removed is not there.
            .filter_map(|slot| Some(slot.0.try_lock().ok()?.as_ref()?.status()))
            .collect();
        statuses.sort_by_key(|status| status.digest);
        statuses
    }

    /// Makes what has become present durable.
    pub(super) async fn persist(&self) {
        for layer in self.open_layers() {
            self.persist_layer(layer).await;
        }
    }

    /// The layers that are open, but for those that are just being opened or
    /// removed.
    pub(super) fn open_layers(&self) -> Vec<Arc<LazyLayer>> {
        let slots: Vec<Arc<Slot>> = self.0.slots.lock().values().cloned().collect();
        let layers = slots.iter().filter_map(|slot| {
            let place = slot.0.try_lock().ok()?;
            place.as_ref().map(|open| Arc::clone(&open.layer))
        });
        layers.collect()
    }

    pub(super) async fn persist_layer(&self, layer: Arc<LazyLayer>) {
        let digest = layer.digest();
        let persisted = spawn_blocking(move || layer.dir().persist()).await;
        let failure = match persisted {
            Ok(Ok(_)) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(error.to_string()),
        };
        let mut failures = self.0.unpersisted.lock();
        match failure {
            None => {
                failures.remove(&digest);
            }
            // Told once for each cause: it is tried again and again.
            Some(error) => {
                if failures.insert(digest, error.clone()).as_ref() != Some(&error) {
                    tracing::warn!(
                        layer = %digest,
                        "{error}; what is not durable is fetched again after a restart"
                    );
                }
            }
        }
    }
}

impl Open {
    /// Ends all fetches, and leaves the layer to the caller.
    pub(super) fn end(self) -> Arc<LazyLayer> {
        self.layer.close();
        self.layer
    }

    /// The layer.
    pub(super) fn layer(&self) -> Arc<LazyLayer> {
        Arc::clone(&self.layer)
    }

    fn status(&self) -> LayerStatus {
        let dir = self.layer.dir();
        LayerStatus {
            digest: self.layer.digest(),
            image: dir.identity().reference.to_string(),
            mounted: self.mounted.is_some(),
            blob_size: dir.identity().blob_size,
            chunks: dir.chunks().len(),
            present: dir.present().count(),
            activity: self.layer.activity(),
            profile: self.prefetch.as_ref().and_then(|(source, _)| *source),
        }
    }
}

fn is_mounted(target: &Path) -> Result<bool, mount::Error> {
    let mounts = mount::mounts_below(target)?;
    Ok(mounts.iter().any(|mount| mount.target == target))
}
