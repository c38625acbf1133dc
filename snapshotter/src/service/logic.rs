//! The snapshots service itself: knows neither gRPC nor how a layer is
//! fetched.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::future::try_join_all;
use parking_lot::Mutex;
use sluice_oci::Digest;

use super::claims::Standing;
use super::directories::{Directories, Found};
use super::error::Error;
use super::expected::Expected;
use super::filter::Filter;
use super::labels;
use super::lazy_layers::{ImageUse, LayerRequest, LazyLayers, MountError, Owner, Usage};
use super::locks::LayerLocks;
use super::metadata::Metadata;
use super::mounts::{Mount, OverlayOptions, mounts};
use super::pins::{Pinned, Pins};
use super::snapshot::{Content, Info, Key, Kind, Labels, SnapshotId};
use super::store::{LabelChange, NewSnapshot, Serving, Store, UsageSource};

/// The snapshots of one root directory.
#[derive(Debug)]
pub struct Snapshots<L> {
    store: Arc<Store>,
    directories: Arc<Directories>,
    layers: Arc<L>,
    overlay: OverlayOptions,
    pub(super) locks: Arc<LayerLocks>,
    pins: Pins,
    /// Layers that were opened before they were asked for.
    pub(super) expected: Expected,
    /// Layers that nothing refers to and that could not be removed.
    leftovers: Mutex<HashSet<Digest>>,
    pub(super) metadata: Option<Arc<dyn Metadata>>,
}

impl<L: LazyLayers> Snapshots<L> {
    /// Reconciles directories and layers with the database: what has no record
    /// goes, what has one is there.
    pub async fn start(
        root: &Path,
        store: Store,
        layers: Arc<L>,
        overlay: OverlayOptions,
    ) -> Result<Self, Error> {
        let snapshots = Self {
            store: Arc::new(store),
            directories: Arc::new(Directories::open(root)?),
            layers,
            overlay,
            locks: Arc::default(),
            pins: Pins::default(),
            expected: Expected::default(),
            leftovers: Mutex::default(),
            metadata: None,
        };
        snapshots.restore_directories().await?;
        crash_point!("start.directories-restored");
        if snapshots.store.was_rebuilt() {
            // What has no record may only have lost it.
            snapshots.set_aside_orphans().await?;
            return Ok(snapshots);
        }
        let removed = snapshots.remove_orphans().await?;
        crash_point!("start.orphans-removed");
        if removed > 0 {
            tracing::info!(removed, "directories without a snapshot removed");
        }
        let known = snapshots.store.layers().await?;
        // Space that is not freed is no reason to serve nobody.
        if let Err(error) = snapshots.layers.retain(known).await {
            tracing::warn!(%error, "layers without a snapshot stay");
        }
        crash_point!("start.layers-retained");
        Ok(snapshots)
    }

    /// Makes a writable snapshot. When the labels ask for a snapshot by name
    /// and its layer can be lazy, commits that one instead and answers
    /// [`Error::AlreadyExists`].
    pub async fn prepare(
        &self,
        key: Key,
        parent: Option<Key>,
        mut labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        if let Some(target) = labels::target(&labels) {
            match self.serve_lazily(&target, &parent, &labels).await? {
                Lazily::Served => return Err(Error::AlreadyExists(target)),
                Lazily::Not(reason) => labels::tell_not_lazy(&mut labels, &reason),
            }
        }
        self.create(Kind::Active, key, parent, labels).await
    }

    /// Makes a read-only snapshot.
    pub async fn view(
        &self,
        key: Key,
        parent: Option<Key>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        self.create(Kind::View, key, parent, labels).await
    }

    /// The mounts of an active snapshot or view.
    pub async fn mounts(&self, key: Key) -> Result<Vec<Mount>, Error> {
        let chain = self.store.chain(key).await?;
        let lower = self.lower(&chain.parents).await?;
        Ok(self.overlay(chain.kind, chain.id, &lower))
    }

    /// Turns the active snapshot `key` into the committed snapshot `name`.
    pub async fn commit(&self, name: Key, key: Key, labels: Labels) -> Result<(), Error> {
        let id = self.store.would_commit(key.clone(), name.clone()).await?;
        let usage = self.measure(id).await?;
        crash_point!("commit.measured");
        self.store
            .commit(key, name, labels, usage, SystemTime::now())
            .await?;
        crash_point!("commit.recorded");
        Ok(())
    }

    /// Deletes a snapshot, and its layer if it was the last one of it.
    pub async fn remove(&self, key: Key) -> Result<(), Error> {
        let removed = self.store.remove(key).await?;
        crash_point!("remove.recorded");
        // The record is gone: what fails from here on is a leftover, which
        // `cleanup` tries again, and not a failed removal.
        let directories = Arc::clone(&self.directories);
        if let Err(error) = blocking(move || directories.remove(removed.id)).await {
            tracing::warn!(%error, "the directory of a removed snapshot stays until the next cleanup");
        }
        crash_point!("remove.directory-removed");
        if let Some(layer) = removed.unused_layer
            && let Err(error) = self.release(layer).await
        {
            tracing::warn!(%error, "the layer of a removed snapshot stays until the next cleanup");
        }
        Ok(())
    }

    /// What is known of a snapshot.
    pub async fn stat(&self, key: Key) -> Result<Info, Error> {
        self.store.stat(key).await
    }

    /// Sets labels: all of them, or those that `paths` names as `labels` or
    /// `labels.<label>`.
    pub async fn update(
        &self,
        key: Key,
        mut labels: Labels,
        paths: &[String],
    ) -> Result<Info, Error> {
        let mut named = Labels::new();
        let mut all = paths.is_empty();
        for path in paths {
            if path == "labels" {
                all = true;
            } else if let Some(label) = path.strip_prefix("labels.") {
                let value = labels.get(label).cloned().unwrap_or_default();
                named.insert(label.to_owned(), value);
            } else {
                return Err(Error::Immutable {
                    key,
                    field: path.clone(),
                });
            }
        }
        let change = if all {
            labels.extend(named);
            LabelChange::All(labels)
        } else {
            LabelChange::Some(named)
        };
        self.store.update(key, change, SystemTime::now()).await
    }

    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn layers(&self) -> &L {
        &self.layers
    }

    /// The key of the snapshot whose changes are in the directory `upper`.
    pub async fn key_of(&self, upper: &Path) -> Option<Key> {
        let id = self.directories.id_of(upper)?;
        self.store.key_of(id).await.ok().flatten()
    }

    /// Every snapshot that one of the filters matches; all, if there is none.
    pub async fn list(&self, filters: Vec<Filter>) -> Result<Vec<Info>, Error> {
        self.store.list(filters).await
    }

    /// Disk space of the snapshot itself, without its parents.
    pub async fn usage(&self, key: Key) -> Result<Usage, Error> {
        match self.store.usage(key).await? {
            UsageSource::Recorded(usage) => Ok(usage),
            UsageSource::Directory(id) => self.measure(id).await,
            UsageSource::Layer(layer) => Ok(self.layers.usage(layer).await?),
        }
    }

    /// Drops content that no snapshot is mounted from, as far as there is more
    /// on disk than there may be.
    pub async fn make_room(&self) {
        let (store, pins) = (Arc::clone(&self.store), self.pins.clone());
        let in_use = move || {
            // In this order: a pin goes when its record is there.
            let mut in_use = pins.held();
            match store.mounted_layers() {
                Ok(mounted) => in_use.extend(mounted),
                Err(error) => {
                    tracing::warn!(%error, "nothing is evicted while it is not known what is in use");
                    return None;
                }
            }
            Some(in_use)
        };
        self.layers.make_room(Arc::new(in_use)).await;
    }

    /// Removes what earlier removals have left behind.
    pub async fn cleanup(&self) -> Result<(), Error> {
        self.remove_orphans().await?;
        let leftovers: Vec<Digest> = self.leftovers.lock().iter().copied().collect();
        for layer in leftovers {
            self.release(layer).await?;
        }
        Ok(())
    }

    /// Writes what is pending. Every later call fails.
    pub async fn close(&self) {
        self.store.close().await;
    }

    /// Sees to it that the snapshot `target` exists without having been
    /// unpacked, if that can be.
    async fn serve_lazily(
        &self,
        target: &Key,
        parent: &Option<Key>,
        labels: &Labels,
    ) -> Result<Lazily, Error> {
        let serving = self.store.serving(target.clone(), parent.clone());
        let serving = serving.await?;
        self.refuse_contradicted(parent.as_ref()).await?;
        if let Some(serving) = &serving
            && let Some(served) = self.serves_all(serving, labels).await?
        {
            return Ok(served);
        }
        let request = match labels::layer_request(labels) {
            Ok(request) => request,
            Err(reason) => {
                tracing::info!(snapshot = %target, reason, "unpacked as usual");
                return Ok(Lazily::Not(reason));
            }
        };
        self.commit_lazily(target, parent, labels, request).await
    }

    /// What whoever asks by `labels` gets of the snapshot `serving` that has
    /// the wanted name. None when its layer is theirs, but they may name
    /// another TOC, and it is not known which is right.
    async fn serves_all(
        &self,
        serving: &Serving,
        labels: &Labels,
    ) -> Result<Option<Lazily>, Error> {
        let Some(layer) = serving.layer else {
            return Ok(Some(Lazily::Served));
        };
        let Ok(asked) = labels::layer_request(labels) else {
            return Ok(Some(Lazily::Served));
        };
        let standing = match self.standing(&serving.name).await {
            // It was removed meanwhile.
            Err(Error::NotFound(_)) => return Ok(None),
            standing => standing?,
        };
        Ok(match standing {
            Standing::Verified => Some(Lazily::Served),
            _ if asked.digest != layer => Some(Lazily::Not(format!(
                "this node has layer {layer} under the name of this one, and it is not known \
                 whether they are the same"
            ))),
            Standing::Contradicted(why) => return Err(Error::Contradicted(Box::new(why))),
            Standing::Unknown => {
                let known = labels::layer_request(&serving.labels);
                let same = known.is_ok_and(|known| labels::trust_the_same(&known, &asked));
                same.then_some(Lazily::Served)
            }
        })
    }

    async fn commit_lazily(
        &self,
        target: &Key,
        parent: &Option<Key>,
        labels: &Labels,
        request: LayerRequest,
    ) -> Result<Lazily, Error> {
        let layer = request.digest;
        // Held until the record is written, so that a removal of the last
        // snapshot of the same layer does not take the layer away in between.
        let _lock = self.locks.lock(layer).await;
        let image = request.reference.to_string();
        // They are opened as well.
        self.expected.put(&request.image_layers);
        if let Err(reason) = self.layers.open(request).await {
            tracing::warn!(image, reason = %reason, "unpacked as usual");
            return Ok(Lazily::Not(reason.reason().to_owned()));
        }
        crash_point!("open.opened");
        let new = NewSnapshot {
            id: self.store.new_id(),
            key: target.clone(),
            parent: parent.clone(),
            labels: labels.clone(),
            now: SystemTime::now(),
        };
        match self.store.create_remote(new, layer).await {
            Ok(()) => {
                crash_point!("open.recorded");
                tracing::info!(image, %layer, snapshot = %target, "served lazily");
                Ok(Lazily::Served)
            }
            Err(Error::AlreadyExists(_)) => {
                // Somebody was faster, perhaps with another layer.
                let serving = self.store.serving(target.clone(), parent.clone());
                let served = match serving.await? {
                    Some(serving) => self.serves_all(&serving, labels).await?,
                    None => None,
                };
                Ok(served.unwrap_or(Lazily::Served))
            }
            Err(error) => {
                if let Err(error) = self.remove_unused(layer).await {
                    tracing::warn!(%error, "a layer without a snapshot stays until the next cleanup");
                }
                Err(error)
            }
        }
    }

    async fn create(
        &self,
        kind: Kind,
        key: Key,
        parent: Option<Key>,
        labels: Labels,
    ) -> Result<Vec<Mount>, Error> {
        let below = self.store.would_create(key.clone(), parent.clone()).await?;
        self.refuse_contradicted(parent.as_ref()).await?;
        // Until it is recorded that something is mounted from them.
        let _pinned = self.pin(&below);
        let lower = self.lower(&below).await?;
        crash_point!("prepare.lower-mounted");
        // What containerd unpacks a layer into is nobody's start.
        let starts = kind == Kind::Active && labels::target(&labels).is_none();
        let starting = match &parent {
            Some(parent) if starts => self.image_use(parent, &labels, &below).await?,
            _ => None,
        };
        let id = self.store.new_id();
        let new = NewSnapshot {
            id,
            key,
            parent,
            labels,
            now: SystemTime::now(),
        };
        let owner = match below.first() {
            Some(nearest) => Some(self.owner(nearest).await?),
            None => None,
        };
        let directories = Arc::clone(&self.directories);
        let directory = blocking(move || directories.create(id, kind, owner)).await?;
        self.store.create(kind, new).await?;
        crash_point!("prepare.recorded");
        directory.keep();
        if let Some(image) = starting {
            self.layers.starts(image).await;
        }
        Ok(self.overlay(kind, id, &lower))
    }

    /// What the data plane is told of an image from which a container is about
    /// to run, if it holds any of it.
    async fn image_use(
        &self,
        parent: &Key,
        labels: &Labels,
        below: &[Content],
    ) -> Result<Option<ImageUse>, Error> {
        let layers = lazy(below);
        if layers.is_empty() {
            return Ok(None);
        }
        let top = self.store.stat(parent.clone()).await?;
        Ok(Some(labels::image_use(&top.labels, labels, layers)))
    }

    /// The images from which active snapshots and views are made, each with
    /// how many there are.
    pub async fn images(&self) -> Result<Vec<(ImageUse, usize)>, Error> {
        let in_use = self.store.in_use().await?;
        let images = in_use.into_iter().filter_map(|(labels, below, users)| {
            let layers = lazy(&below);
            let known = !layers.is_empty();
            known.then(|| (labels::image_use(&labels, &Labels::new(), layers), users))
        });
        Ok(images.collect())
    }

    /// The directories of what lies below a snapshot. Layers are mounted all
    /// at once.
    async fn lower(&self, below: &[Content]) -> Result<Vec<PathBuf>, Error> {
        try_join_all(below.iter().map(|content| async move {
            match *content {
                Content::Directory(id) => Ok(self.directories.upper(id)),
                Content::Lazy(layer) => self.mount_layer(layer).await,
            }
        }))
        .await
    }

    /// Who owns the root directory of what lies below a snapshot.
    async fn owner(&self, below: &Content) -> Result<Owner, Error> {
        match *below {
            Content::Directory(id) => {
                let directories = Arc::clone(&self.directories);
                blocking(move || directories.owner(id)).await
            }
            Content::Lazy(layer) => Ok(self.layers.owner(layer).await?),
        }
    }

    /// Mounts a layer. One that the disk has lost is made again as the labels
    /// of its snapshots say.
    async fn mount_layer(&self, layer: Digest) -> Result<PathBuf, Error> {
        match self.layers.mount(layer).await {
            Err(MountError::Unknown(_)) => {}
            mounted => return Ok(mounted?),
        }
        let _lock = self.locks.lock(layer).await;
        let mut why = None;
        for labels in self.store.labels_of_layer(layer).await? {
            let Ok(request) = labels::layer_request(&labels) else {
                continue;
            };
            match self.layers.open(request).await {
                Ok(()) => {
                    tracing::warn!(%layer, "it was not on this node any more, and is made again");
                    return Ok(self.layers.mount(layer).await?);
                }
                Err(error) => why = Some(error),
            }
        }
        Err(match why {
            Some(error) => MountError::failed(layer, error),
            None => MountError::Unknown(layer),
        }
        .into())
    }

    fn pin(&self, below: &[Content]) -> Pinned {
        self.pins
            .hold(below.iter().filter_map(|content| match content {
                Content::Lazy(layer) => Some(*layer),
                Content::Directory(_) => None,
            }))
    }

    fn overlay(&self, kind: Kind, id: SnapshotId, lower: &[PathBuf]) -> Vec<Mount> {
        let upper = self.directories.upper(id);
        let work = self.directories.work(id);
        mounts(kind, &upper, &work, lower, self.overlay)
    }

    async fn measure(&self, id: SnapshotId) -> Result<Usage, Error> {
        let directories = Arc::clone(&self.directories);
        blocking(move || directories.usage(id)).await
    }

    /// Removes a layer unless a snapshot refers to it again by now.
    pub(super) async fn release(&self, layer: Digest) -> Result<(), Error> {
        let _lock = self.locks.lock(layer).await;
        self.remove_unused(layer).await
    }

    /// The same, under the layer's lock.
    async fn remove_unused(&self, layer: Digest) -> Result<(), Error> {
        if !self.store.layer_in_use(layer).await? {
            self.leftovers.lock().insert(layer);
            self.layers.remove(layer).await?;
        }
        self.leftovers.lock().remove(&layer);
        Ok(())
    }

    async fn remove_orphans(&self) -> Result<usize, Error> {
        let (store, directories) = (Arc::clone(&self.store), Arc::clone(&self.directories));
        blocking(move || directories.remove_orphans(|| store.known_ids())).await
    }

    async fn set_aside_orphans(&self) -> Result<(), Error> {
        let (store, directories) = (Arc::clone(&self.store), Arc::clone(&self.directories));
        let moved = blocking(move || directories.set_aside_orphans(|| store.known_ids())).await?;
        for path in moved {
            tracing::error!(
                "a snapshot's directory has no record any more; it is kept as {}, remove it when \
                 nothing needs it",
                path.display()
            );
        }
        Ok(())
    }

    async fn restore_directories(&self) -> Result<(), Error> {
        let recorded = self.store.directories().await?;
        let directories = Arc::clone(&self.directories);
        blocking(move || {
            for (key, id, kind) in recorded {
                match directories.restore(id, kind)? {
                    Found::Whole => {}
                    Found::MadeAnew => {
                        tracing::warn!(snapshot = %key, %id, "its directory was missing; made anew, empty");
                    }
                    Found::Lost => {
                        tracing::error!(snapshot = %key, %id, "its content is lost; remove the image and pull it again");
                    }
                }
            }
            Ok(())
        })
        .await
    }
}

/// The lazily mounted layers of a chain that is given nearest first, lowest
/// first, each once.
pub(super) fn lazy(below: &[Content]) -> Vec<Digest> {
    let mut layers = Vec::new();
    for content in below.iter().rev() {
        if let Content::Lazy(layer) = content
            && !layers.contains(layer)
        {
            layers.push(*layer);
        }
    }
    layers
}

/// Whether a snapshot that was asked for by name is there.
enum Lazily {
    Served,
    /// And why not.
    Not(String),
}

/// Runs what may wait for a disk off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(Error::BrokeOff))
}
