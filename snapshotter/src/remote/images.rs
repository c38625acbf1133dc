//! Manifests, each fetched once.

use std::num::NonZero;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;
use sluice_oci::{Descriptor, Digest, Index, Manifest, Platform, Reference};
use sluice_registry::{Client, Document};
use tokio::sync::OnceCell;

use super::{Error, Known};

/// Images whose manifests are remembered.
const REMEMBERED: NonZero<usize> = NonZero::new(64).expect("not zero");
/// Manifests of one index that are looked through for a layer.
const PLATFORMS: usize = 64;

/// A layer as its image's manifest describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageLayer {
    /// The layer's digest.
    pub digest: Digest,
    /// What the descriptor says.
    pub known: Known,
}

type Layers = Arc<OnceCell<Arc<Vec<Descriptor>>>>;

/// The manifests of the images that were asked for last.
#[derive(Debug)]
pub struct Images(Mutex<LruCache<String, Layers>>);

impl Images {
    pub(super) fn new() -> Self {
        Self(Mutex::new(LruCache::new(REMEMBERED)))
    }

    /// The layers of the image that holds `layer`.
    pub(super) async fn layers(
        &self,
        client: &Client,
        reference: &Reference,
        manifest: Option<Digest>,
        layer: Digest,
    ) -> Result<Vec<ImageLayer>, Error> {
        let reference = match manifest {
            Some(digest) => reference.with_digest(digest),
            None => reference.clone(),
        };
        let found = {
            let mut images = self.0.lock();
            let key = reference.to_string();
            // Under a tag that has moved, the layer may be in another manifest
            // than the remembered one; and an index has several.
            let stale = images
                .peek(&key)
                .and_then(|layers| layers.get())
                .is_some_and(|all| !holds(all, layer));
            if stale {
                images.pop(&key);
            }
            Arc::clone(images.get_or_insert(key, Layers::default))
        };
        let descriptors = found
            .get_or_try_init(|| async { fetch(client, &reference, layer).await.map(Arc::new) })
            .await?;
        if !holds(descriptors, layer) {
            return Err(Error::NotInImage(reference));
        }
        descriptors
            .iter()
            .map(|descriptor| {
                let known = Known::new(&descriptor.annotations, Some(descriptor.size))?;
                Ok(ImageLayer {
                    digest: descriptor.digest,
                    known,
                })
            })
            .collect()
    }

    /// Remembers the layers of a manifest that need not be fetched.
    pub(super) fn know(&self, reference: &Reference, manifest: Digest, layers: Vec<Descriptor>) {
        let key = reference.with_digest(manifest).to_string();
        let mut images = self.0.lock();
        let found = images.get_or_insert(key, Layers::default);
        // It may be known already.
        let _ = found.set(Arc::new(layers));
    }
}

fn holds(layers: &[Descriptor], layer: Digest) -> bool {
    layers.iter().any(|descriptor| descriptor.digest == layer)
}

/// The layers of the manifest that lists `layer`. Of an index, the manifests
/// are looked through, those of this machine's architecture first.
async fn fetch(
    client: &Client,
    reference: &Reference,
    layer: Digest,
) -> Result<Vec<Descriptor>, Error> {
    let document = client.manifest(reference).await?;
    if !document.is_index() {
        let layers = document.manifest()?.layers;
        return match holds(&layers, layer) {
            true => Ok(layers),
            false => Err(Error::NotInImage(reference.clone())),
        };
    }
    let index: Index = document.index()?;
    let mut manifests = index.manifests;
    let machine = Platform::of_this_machine();
    let here = |descriptor: &Descriptor| match &descriptor.platform {
        Some(platform) => machine.is_met_by(platform),
        None => false,
    };
    manifests.sort_by_key(|descriptor| !here(descriptor));
    for descriptor in manifests.iter().take(PLATFORMS) {
        let document: Document = client
            .manifest(&reference.with_digest(descriptor.digest))
            .await?;
        // An attestation or a nested index is not what is looked for.
        let Ok(Manifest { layers, .. }) = document.manifest() else {
            continue;
        };
        if holds(&layers, layer) {
            return Ok(layers);
        }
    }
    Err(Error::NotInImage(reference.clone()))
}
