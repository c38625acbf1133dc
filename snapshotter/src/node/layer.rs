//! One layer of the node: opened, mounted, removed.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use sluice_oci::{Digest, Reference};
use sluice_registry::Senders;
use tokio::task::spawn_blocking;

use super::compile;
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
use crate::layer_dir::{self, LayerDir, META, TEMPORARY};
use crate::mount;
use crate::profiles::ImageId;
use crate::remote::{FetchedToc, Known};
use crate::service::{MountError, NotLazy, Owner, Usage};

/// The place of a layer, whether it is there or not. The lock is held while
/// the layer is being opened, mounted or removed.
#[derive(Default)]
pub(super) struct Slot(pub(super) tokio::sync::Mutex<Option<Open>>);

/// A layer that somebody holds for longer than this is being opened.
const BUSY: std::time::Duration = std::time::Duration::from_secs(2);

/// A layer that is open.
pub(super) struct Open {
    pub(super) layer: Arc<LazyLayer>,
    pub(super) mounted: Option<PathBuf>,
    /// Who says what is fetched ahead, once that was looked for, and its
    /// fetching.
    pub(super) prefetch: Option<(Option<ProfileSource>, Option<Handle>)>,
    download: Option<Handle>,
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
                let made = self.make_and_load(reference, digest, known).await;
                place.insert(made.map_err(not_lazy)?)
            }
        };
        let identity = open.layer.dir().identity();
        if !known.vouches_for(identity.trust, identity.compressed_toc) {
            return Err(not_lazy(
                "the image names another table of contents than the one that is on this node"
                    .to_owned(),
            ));
        }
        self.prefetch(open, image);
        Ok(())
    }

    async fn make_and_load(
        &self,
        reference: &Reference,
        digest: Digest,
        known: &Known,
    ) -> Result<Open, String> {
        self.make(reference, digest, known).await?;
        let reason = match self.load(digest).await {
            Ok(Some(open)) => return Ok(open),
            Ok(None) => "its directory is gone again".to_owned(),
            Err(error) => error,
        };
        // No snapshot refers to it, so that nothing else would remove it.
        let path = self.layer_path(digest);
        let deleted = spawn_blocking(move || delete(&path)).await;
        if let Err(error) = deleted.map_err(io::Error::other).flatten() {
            tracing::warn!(layer = %digest, "its directory stays until the next start: {error}");
        }
        Err(reason)
    }

    /// Makes the layer's directory. A table of contents that is not where the
    /// image's annotations say is looked for by the footer.
    async fn make(
        &self,
        reference: &Reference,
        digest: Digest,
        known: &Known,
    ) -> Result<(), String> {
        let made = match self.make_once(reference, digest, known).await {
            Err(compile::Error::Toc(error)) if error.is_misplaced() => {
                match known.without_position() {
                    Some(known) => {
                        tracing::debug!(layer = %digest, "looked for by the footer: {error}");
                        self.make_once(reference, digest, &known).await
                    }
                    None => Err(error.into()),
                }
            }
            made => made,
        };
        made.map_err(|error| match error.needs_more_memory() {
            true => format!("{error}; raise toc_memory_mib in section [fetch]"),
            false => error.to_string(),
        })
    }

    /// One that is not what the image promises is fetched once more if another
    /// host has the blob.
    async fn make_once(
        &self,
        reference: &Reference,
        digest: Digest,
        known: &Known,
    ) -> Result<(), compile::Error> {
        let fetch = || self.0.remote.fetch_toc(reference, digest, known);
        let fetched = fetch().await?;
        let senders = fetched.senders();
        match self.make_of(fetched, reference, digest).await {
            Err(compile::Error::Toc(error)) => {
                // The annotation may be what is wrong.
                let elsewhere = error.is_misplaced() && known.without_position().is_some();
                if elsewhere || !distrust(&senders) {
                    return Err(error.into());
                }
                self.make_of(fetch().await?, reference, digest).await
            }
            made => made,
        }
    }

    async fn make_of(
        &self,
        fetched: FetchedToc,
        reference: &Reference,
        digest: Digest,
    ) -> Result<(), compile::Error> {
        let number = self.0.numbers.take().map_err(compile::Error::Number)?;
        let layers = self.layers_dir();
        self.compile(layers, fetched, digest, reference, number)
            .await
    }

    /// Opens the layer's directory, if there is one, and checks all of it but
    /// the content. A damaged one is mended; one that cannot be is removed, to
    /// be made again.
    pub(super) async fn load(&self, digest: Digest) -> Result<Option<Open>, String> {
        // Also before a layer is made that could then not be opened.
        let seat = self.0.seats.take().map_err(|full| full.to_string())?;
        let error = match self.open_checked(digest).await? {
            Ok(dir) => return Ok(dir.map(|dir| self.adopt(dir, seat))),
            Err(error) if error.is_damage() => error,
            Err(error) => return Err(error.to_string()),
        };
        let mended = self.mend(digest).await;
        if !mended.map_err(|why| format!("{error}; it cannot be mended now: {why}"))? {
            tracing::warn!(layer = %digest, "{error}; it is removed, to be made again");
            let path = self.layer_path(digest);
            let deleted = spawn_blocking(move || delete(&path)).await;
            deleted
                .map_err(io::Error::other)
                .flatten()
                .map_err(|error| error.to_string())?;
            return Ok(None);
        }
        tracing::warn!(layer = %digest, "{error}; it has been mended");
        let dir = self.open_checked(digest).await?;
        let dir = dir.map_err(|error| error.to_string())?;
        let open = dir.map(|dir| self.adopt(dir, seat));
        Ok(open.inspect(|open| open.layer.was_mended(error.to_string())))
    }

    async fn open_checked(
        &self,
        digest: Digest,
    ) -> Result<Result<Option<LayerDir>, layer_dir::Error>, String> {
        let path = self.layer_path(digest);
        let doubted = self.0.doubted.load(Ordering::Relaxed);
        let opened = spawn_blocking(move || {
            let opened = LayerDir::open(&path, digest).and_then(|dir| {
                dir.check_meta()?;
                Ok(if doubted { dir.doubted() } else { dir })
            });
            match opened {
                Ok(dir) => Ok(Some(dir)),
                Err(_) if !path.exists() => Ok(None),
                Err(error) => Err(error),
            }
        });
        opened.await.map_err(|error| error.to_string())
    }

    fn adopt(&self, dir: LayerDir, seat: Seat) -> Open {
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
        self.download(open);
        Ok(path)
    }

    /// Starts to fetch what `image` will need of the layer, if anything says
    /// what that is and it was not started before.
    fn prefetch(&self, open: &mut Open, image: &ImageId) {
        if !self.0.config.prefetch || open.prefetch.is_some() || open.layer.dir().is_complete() {
            return;
        }
        open.prefetch = Some((None, None));
        let (node, image) = (self.clone(), image.clone());
        let layer = Arc::clone(&open.layer);
        // It may have to ask the registry, and nobody waits for that.
        let ahead: BoxFuture<'static, ()> =
            Box::pin(async move { node.fetch_ahead(layer, &image).await });
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
            self.prefetch(open, image);
            layers.push(Arc::clone(&open.layer));
        }
        (layers, whole)
    }

    /// Starts to download what a mounted layer lacks.
    fn download(&self, open: &mut Open) {
        if let (Some(delay), None) = (self.0.config.background, &open.download)
            && !open.layer.dir().is_complete()
        {
            open.download = Some(open.layer.download(delay));
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
        let deleted = spawn_blocking(move || delete(&path)).await;
        deleted
            .map_err(io::Error::other)
            .flatten()
            .map_err(failed)?;
        drop(place);
        self.0.unpersisted.lock().remove(&digest);
        self.forget(digest, &slot);
        Ok(())
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

    /// Takes an empty slot out of the table, unless somebody else waits for it.
    pub(super) fn forget(&self, digest: Digest, slot: &Arc<Slot>) {
        let mut slots = self.0.slots.lock();
        // One for the table and one for the caller.
        if Arc::strong_count(slot) == 2 && slot.0.try_lock().is_ok_and(|place| place.is_none()) {
            slots.remove(&digest);
        }
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
        let slots: Vec<Arc<Slot>> = self.0.slots.lock().values().cloned().collect();
        for slot in slots {
            let layer = match slot.0.try_lock() {
                Ok(place) => place.as_ref().map(|open| Arc::clone(&open.layer)),
                Err(_) => None,
            };
            if let Some(layer) = layer {
                self.persist_layer(layer).await;
            }
        }
    }

    async fn persist_layer(&self, layer: Arc<LazyLayer>) {
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

/// Tells that what these sent is wrong. Whether there is another host to ask.
fn distrust(senders: &[Senders]) -> bool {
    // All of them, not up to the first that says so.
    let told: Vec<bool> = senders.iter().map(Senders::distrust).collect();
    told.contains(&true)
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
    /// Ends all fetches, and leaves the layer to the caller.
    pub(super) fn end(self) -> Arc<LazyLayer> {
        self.layer.close();
        self.layer
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

fn is_mounted(target: &Path) -> Result<bool, mount::Error> {
    let mounts = mount::mounts_below(target)?;
    Ok(mounts.iter().any(|mount| mount.target == target))
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
fn delete(path: &Path) -> io::Result<()> {
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
