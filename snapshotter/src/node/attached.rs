//! Profiles that are attached to images: looked for once, and followed.

use std::collections::HashMap;
use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, join_all};
use lru::LruCache;
use parking_lot::Mutex;
use sluice_layer::profile::Part;
use sluice_oci::{Digest, Reference};
use tokio::sync::OnceCell;
use tokio::task::spawn_blocking;

use super::{Node, source};
use crate::fetch::{Content, Handle, LazyLayer, Piece};
use crate::profiles::{self, ImageId};
use crate::remote::AttachedProfile;

/// Images of which it is remembered whether a profile is attached.
const REMEMBERED: NonZero<usize> = NonZero::new(64).expect("not zero");
/// For how long: a profile may be attached, or another, at any time.
const VALID: Duration = Duration::from_secs(60);

type Found = Arc<OnceCell<Option<Arc<AttachedProfile>>>>;

/// See the module.
pub(super) struct Attachments {
    found: Mutex<LruCache<Digest, (Instant, Found)>>,
    /// The contents that are being received, by the image's manifest.
    arriving: Mutex<HashMap<Digest, Option<Handle>>>,
}

impl Attachments {
    pub(super) fn new() -> Self {
        Self {
            found: Mutex::new(LruCache::new(REMEMBERED)),
            arriving: Mutex::default(),
        }
    }

    fn found(&self, manifest: Digest) -> Found {
        let mut found = self.found.lock();
        if let Some((since, cell)) = found.get(&manifest)
            && since.elapsed() < VALID
        {
            return Arc::clone(cell);
        }
        let cell = Found::default();
        found.put(manifest, (Instant::now(), Arc::clone(&cell)));
        cell
    }

    /// Ends what is being received.
    pub(super) fn end(&self) {
        self.arriving.lock().clear();
    }
}

/// An image that can be asked about: it is known by its manifest, and where.
fn asked(image: &ImageId) -> Option<(Reference, Digest)> {
    let reference = image.reference.as_ref()?.parse().ok()?;
    Some((reference, image.manifest?))
}

impl Node {
    /// The profile that is attached to the image, if there is one. The
    /// registry is asked once, however many layers ask.
    pub(super) async fn attached(&self, image: &ImageId) -> Option<Arc<AttachedProfile>> {
        if !self.0.config.profiles.attached {
            return None;
        }
        let (reference, manifest) = asked(image)?;
        let found = self.0.attachments.found(manifest);
        let look = async || match self.0.remote.attached(&reference, manifest).await {
            Ok(found) => found.map(Arc::new),
            Err(error) => {
                tracing::info!(image = %reference, "no attached profile is followed: {error}");
                None
            }
        };
        found.get_or_init(look).await.clone()
    }

    /// Receives the content that an attached profile carries, once for all
    /// layers of the image. When it does not come, its profile is followed
    /// without.
    pub(super) fn receive(&self, image: &ImageId, attached: Arc<AttachedProfile>, content: Part) {
        let Some((reference, manifest)) = asked(image) else {
            return;
        };
        {
            let mut arriving = self.0.attachments.arriving.lock();
            if arriving.contains_key(&manifest) {
                return;
            }
            arriving.insert(manifest, None);
        }
        let (node, image) = (self.clone(), image.clone());
        let receiving: BoxFuture<'static, ()> = Box::pin(async move {
            let layers = node.layers_of(&reference, &image, &attached).await;
            let profile = Arc::clone(&attached);
            let pieces = spawn_blocking(move || pieces(&profile, &layers)).await;
            let ended = {
                let node = Arc::downgrade(&node.0);
                move |whole: bool| {
                    let Some(node) = node.upgrade().map(Node) else {
                        return;
                    };
                    node.0.attachments.arriving.lock().remove(&manifest);
                    if !whole {
                        tokio::spawn(async move { node.follow(&attached).await });
                    }
                }
            };
            let content = Content {
                source: Box::new(source(&node.0.remote, &reference, content.digest)),
                size: content.size,
                pieces: pieces.unwrap_or_default(),
            };
            let mut arriving = node.0.attachments.arriving.lock();
            match content.receive(ended) {
                // It may have ended already.
                Some(handle) => {
                    if let Some(place) = arriving.get_mut(&manifest) {
                        *place = Some(handle);
                    }
                }
                None => drop(arriving.remove(&manifest)),
            }
        });
        tokio::spawn(receiving);
    }

    /// The layers of which the profile speaks, open.
    async fn layers_of(
        &self,
        reference: &Reference,
        image: &ImageId,
        attached: &AttachedProfile,
    ) -> HashMap<Digest, Arc<LazyLayer>> {
        let layers = attached.profile.layers().iter();
        let opened = join_all(layers.map(|&digest| async move {
            // Others are open already, or containerd did not ask for them.
            if image.layers.contains(&digest) {
                let known = self.0.remote.layers(reference, image.manifest, digest);
                let known = known.await.ok()?;
                let layer = known.into_iter().find(|layer| layer.digest == digest)?;
                let open = self.open_layer(reference, image, digest, &layer.known);
                open.await.ok()?;
            }
            Some((digest, self.layer(digest).await?))
        }));
        opened.await.into_iter().flatten().collect()
    }

    /// An open layer.
    pub(super) async fn layer(&self, digest: Digest) -> Option<Arc<LazyLayer>> {
        let slot = self.0.slots.lock().get(&digest).cloned()?;
        let place = slot.0.lock().await;
        place.as_ref().map(|open| Arc::clone(&open.layer))
    }
}

/// What is in the content, in its order.
fn pieces(attached: &AttachedProfile, layers: &HashMap<Digest, Arc<LazyLayer>>) -> Vec<Piece> {
    let profile = &attached.profile;
    let mut chunks: Vec<_> = profile
        .layers()
        .iter()
        .map(|digest| {
            let layer = layers.get(digest)?;
            match profiles::exact_chunks(layer.dir(), profile) {
                Ok(chunks) => Some((layer, chunks.into_iter())),
                Err(error) => {
                    tracing::warn!(layer = %digest, "not fetched ahead: {error}");
                    None
                }
            }
        })
        .collect();
    let piece = |read: &sluice_layer::profile::Read| Piece {
        size: read.len,
        chunk: chunks[read.layer].as_mut().and_then(|(layer, chunks)| {
            let chunk = chunks.next().flatten()?;
            Some((Arc::clone(layer), chunk))
        }),
    };
    profile.reads().iter().map(piece).collect()
}
