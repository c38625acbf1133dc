//! What is fetched of a layer before it is read.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use sluice_layer::{Profile, StartChunks, StartRanges, Unit};
use sluice_oci::{Digest, Reference};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::{Node, source};
use crate::dependencies::ImageDependencies;
use crate::fetch::{Begun, Dependencies, Handle, LazyLayer, Plan};
use crate::layer_dir::{ChunkId, ChunkTable};
use crate::profiles::{self, ImageId, Profiles};
use crate::remote::{AttachedProfile, Known};
use crate::service::Program;

/// Who says what a start will need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProfileSource {
    /// The image itself, by a landmark in the layer.
    Image,
    /// A profile that is attached to the image in its registry.
    Attached,
    /// A former start on this node.
    Node,
}

/// Images that start, by their topmost layers that are lazily mounted, and what
/// their files load, while that is known.
#[derive(Debug, Default)]
pub(super) struct Starting(Mutex<HashMap<Digest, (ImageId, Weak<ImageDependencies>)>>);

impl Starting {
    fn insert(&self, image: &ImageId, dependencies: &Arc<ImageDependencies>) {
        let Some(&top) = image.layers.last() else {
            return;
        };
        let mut all = self.0.lock();
        all.retain(|_, (_, known)| known.strong_count() > 0);
        all.insert(top, (image.clone(), Arc::downgrade(dependencies)));
    }

    fn get(&self, top: &Digest) -> Option<(ImageId, Arc<ImageDependencies>)> {
        let all = self.0.lock();
        let (image, dependencies) = all.get(top)?;
        Some((image.clone(), dependencies.upgrade()?))
    }
}

/// Whoever may have a profile that is attached to an image is waited for so long
/// before something is fetched that is not from it. A mirror asks its registry,
/// which may not even be reachable.
const TELLS_SOON: Duration = Duration::from_millis(500);
/// How long after an image's last start it is looked at what its files load.
const START: Duration = Duration::from_secs(120);

impl Node {
    /// What is read of these layers of one image, the lowest first, is followed
    /// to what it loads, while the image starts.
    pub(super) fn know_dependencies(&self, layers: &[Arc<LazyLayer>], image: &ImageId) {
        let known = |layer: &Arc<LazyLayer>| layer.dir().is_complete() || layer.has_dependencies();
        if !self.0.config.prefetch || layers.iter().all(known) {
            return;
        }
        let layers = layers.to_vec();
        let dependencies = Arc::new(ImageDependencies::new(&layers, &self.0.dependencies));
        if layers
            .iter()
            .all(|layer| layer.dir().identity().prefetch_end.is_none())
        {
            self.0.starting.insert(image, &dependencies);
        }
        let dependencies: Arc<dyn Dependencies> = dependencies;
        for layer in &layers {
            layer.set_dependencies(Arc::clone(&dependencies));
        }
        // Neither they nor the layers' trees are kept when the layers go.
        let layers: Vec<_> = layers.iter().map(Arc::downgrade).collect();
        let dependencies = Arc::downgrade(&dependencies);
        tokio::spawn(async move {
            tokio::time::sleep(START).await;
            let Some(dependencies) = dependencies.upgrade() else {
                return;
            };
            for layer in layers.iter().filter_map(Weak::upgrade) {
                layer.clear_dependencies(&dependencies);
            }
        });
    }

    /// Whether something says what a start of the image reads; not, where the
    /// registry does not tell soon.
    async fn has_profile(&self, image: &ImageId) -> bool {
        if self.0.profiles.find(image).is_some() {
            return true;
        }
        let (node, image) = (self.clone(), image.clone());
        // Others wait for the same answer, so it is not given up.
        let attached = tokio::spawn(async move { node.attached(&image).await.is_some() });
        matches!(timeout(TELLS_SOON, attached).await, Ok(Ok(true)))
    }

    /// A container is about to run what `program` finds out: what that names is
    /// fetched, and what it loads, unless something says what is read in fact,
    /// and does not say it of another program.
    pub(super) async fn foresee_program(
        &self,
        layers: &[Digest],
        program: impl Future<Output = Option<Program>>,
    ) {
        let starting = layers.last().and_then(|top| self.0.starting.get(top));
        let Some((image, dependencies)) = starting else {
            return;
        };
        let (known, program) = tokio::join!(self.has_profile(&image), program);
        let Some(program) = program else { return };
        if known {
            let Some(first) = dependencies.first_of_program(&program).await else {
                return;
            };
            let fits = !first.is_beside_plan();
            for &digest in &image.layers {
                if let Some(layer) = self.layer(digest).await {
                    layer.judge_plan(fits);
                }
            }
            if fits {
                return;
            }
            LazyLayer::foresee_start(&dependencies.of_any_program().await);
        }
        LazyLayer::foresee_start(&dependencies.of_program(program).await);
    }

    /// Fetches what the layer will need as the first of these says, in this
    /// order: who built the image, or attached a profile to it, meant it; what
    /// was seen on this node may be one use of the image among several. That is
    /// followed while the registry is asked for the other. Where nothing says
    /// it, what loads any program.
    pub(super) async fn fetch_ahead(
        &self,
        layer: Arc<LazyLayer>,
        image: &ImageId,
        built_in: Option<StartChunks>,
    ) {
        let digest = layer.digest();
        let dependencies =
            ImageDependencies::new(std::slice::from_ref(&layer), &self.0.dependencies);
        // Whoever starts the container reads them, which may not be who started
        // the one that was recorded.
        LazyLayer::foresee_start(&dependencies.of_any_user().await);
        if let Some(end) = layer.dir().identity().prefetch_end {
            let plan = layer.prefetch(match built_in {
                Some(chunks) => Plan::Order(read_before(layer.dir().chunks(), end, &chunks)),
                None => Plan::Landmark,
            });
            return self.follows(digest, ProfileSource::Image, plan).await;
        }
        let foresee = async {
            if !self.has_profile(image).await {
                LazyLayer::foresee_start(&dependencies.of_any_program().await);
            }
        };
        let own = self.follow_own(&layer, image);
        let (attached, (), ()) = tokio::join!(self.attached(image), own, foresee);
        let attached = attached.filter(|a| a.profile.layers().contains(&digest));
        if let Some(attached) = attached {
            let mut plan = None;
            match attached.content {
                Some(content) => self.receive(image, attached, content),
                None => {
                    plan = self
                        .plan(&layer, move || Ok(attached.profile.clone()))
                        .await;
                }
            }
            self.follows(digest, ProfileSource::Attached, plan).await;
        }
    }

    /// Asks for the first of what the image needs of the layer, before there is a
    /// table of contents that says where it is. None where neither the image nor
    /// a former start on this node says where, or other layers may have it.
    pub(super) async fn begin_fetch(
        &self,
        reference: &Reference,
        image: &ImageId,
        digest: Digest,
        known: &Known,
    ) -> Option<Begun> {
        if !self.0.config.prefetch {
            return None;
        }
        let wanted = match known.start_ranges() {
            Some(ranges) => in_order(ranges),
            None if known.start_chunks().is_some() => return None,
            None => self.seen_first(image, digest).await?,
        };
        if self.shares(reference, image) {
            return None;
        }
        let source = source(&self.0.remote, reference, digest);
        Some(self.0.engine.begin(digest, Arc::new(source), wanted))
    }

    /// Where the blob has what was seen on this node that the image needs of the
    /// layer, and after how long.
    async fn seen_first(&self, image: &ImageId, digest: Digest) -> Option<Vec<(Unit, Duration)>> {
        let found = self.0.profiles.find(image)?;
        if !found.image.layers.contains(&digest) {
            return None;
        }
        let store: Arc<Profiles> = Arc::clone(&self.0.profiles);
        let wanted = spawn_blocking(move || {
            // Why it cannot be read is told when it is followed.
            let profile = store.load(&found).ok()?;
            let reads = profile.reads_of(digest);
            let wanted = reads.filter_map(|read| Some((read.unit?, read.at)));
            Some(wanted.collect())
        });
        wanted.await.ok()?
    }

    /// Whether layers of other images may have what the image needs.
    fn shares(&self, reference: &Reference, image: &ImageId) -> bool {
        self.open_layers().iter().any(|layer| {
            let identity = layer.dir().identity();
            self.0.elsewhere.allows(reference, &identity.reference)
                && !image.layers.contains(&identity.digest)
                && layer.dir().present().count() > 0
        })
    }

    /// Fetches what was seen on this node that the image needs of the layer.
    async fn follow_own(&self, layer: &Arc<LazyLayer>, image: &ImageId) {
        let digest = layer.digest();
        let found = self.0.profiles.find(image);
        let Some(found) = found.filter(|found| found.image.layers.contains(&digest)) else {
            return;
        };
        let store: Arc<Profiles> = Arc::clone(&self.0.profiles);
        let load = move || store.load(&found).map_err(|error| error.to_string());
        let plan = self.plan(layer, load).await;
        self.follows(digest, ProfileSource::Node, plan).await;
    }

    /// Fetches what an attached profile names, of all layers that are open.
    pub(super) async fn follow(&self, attached: &Arc<AttachedProfile>) {
        for &digest in attached.profile.layers() {
            let Some(layer) = self.layer(digest).await else {
                continue;
            };
            let profile = Arc::clone(attached);
            let plan = self.plan(&layer, move || Ok(profile.profile.clone())).await;
            self.follows(digest, ProfileSource::Attached, plan).await;
        }
    }

    async fn plan<P: Borrow<Profile>>(
        &self,
        layer: &Arc<LazyLayer>,
        profile: impl FnOnce() -> Result<P, String> + Send + 'static,
    ) -> Option<Handle> {
        let digest = layer.digest();
        let of = Arc::clone(layer);
        let order = spawn_blocking(move || {
            profiles::chunks(of.dir(), profile()?.borrow()).map_err(|error| error.to_string())
        });
        match order.await {
            Ok(Ok(order)) => layer.prefetch(Plan::Timed(order.into())),
            Ok(Err(error)) => {
                tracing::warn!(layer = %digest, "not fetched ahead: {error}");
                None
            }
            Err(_) => None,
        }
    }
}

/// The ranges as what is needed one after the other.
fn in_order(ranges: &StartRanges) -> Vec<(Unit, Duration)> {
    let units = ranges.iter().map(|range| Unit {
        offset: range.start,
        size: range.end - range.start,
    });
    units.zip((0..).map(Duration::from_millis)).collect()
}

/// Of the chunks before a landmark, those that a start reads, in the order of
/// the blob, which is that of need.
fn read_before(table: &ChunkTable, landmark: u64, read: &StartChunks) -> Arc<[ChunkId]> {
    let units = table.units_from(0);
    let units = units.take_while(|unit| unit.offset < landmark);
    let chunks = units.flat_map(|unit| table.of_unit(unit.offset));
    let read = chunks.enumerate().filter(|(at, _)| read.contains(*at));
    read.map(|(_, chunk)| chunk).collect()
}
