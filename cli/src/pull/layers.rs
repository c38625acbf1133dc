//! Making an image's snapshots, lowest first.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context as _, anyhow, bail};
use sluice_layer::LayerAnnotations;
use sluice_oci::{Descriptor, Digest, Reference};
use sluice_registry::{Client, ErrorKind};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use super::image::{Image, source};
use super::labels;
use super::node::{Labels, Node, Prepared, unique};
use super::report::Report;

/// Layers downloaded at once.
const DOWNLOADS: usize = 3;
/// By this label a snapshotter tells why it does not serve a layer lazily.
const NOT_LAZY: &str = "containerd.io/snapshot/sluice.not-lazy";
/// By this one, whether a snapshot of a lazily mounted layer is what it is named
/// for.
const STANDING: &str = "containerd.io/snapshot/sluice.content";

/// What became of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The node had the snapshot before.
    Present,
    /// The snapshotter serves it without its having been downloaded.
    Lazy,
    /// Downloaded and unpacked, with the reason if the snapshotter told one.
    Unpacked(Option<String>),
}

/// The pull of one image's layers.
pub(crate) struct Layers {
    node: Arc<Node>,
    client: Client,
    image: Arc<Image>,
    snapshotter: String,
    report: Report,
    slots: Arc<Semaphore>,
    downloads: HashMap<Digest, AbortOnDropHandle<anyhow::Result<()>>>,
}

impl Layers {
    pub(crate) fn new(
        node: Arc<Node>,
        client: Client,
        image: Arc<Image>,
        snapshotter: String,
        report: Report,
    ) -> Self {
        Self {
            node,
            client,
            image,
            snapshotter,
            report,
            slots: Arc::new(Semaphore::new(DOWNLOADS)),
            downloads: HashMap::new(),
        }
    }

    /// Makes every snapshot of the image.
    pub(crate) async fn pull(mut self) -> anyhow::Result<Vec<Outcome>> {
        let image = Arc::clone(&self.image);
        let mut outcomes = Vec::with_capacity(image.chain_ids.len());
        for index in 0..image.chain_ids.len() {
            let layer = &image.manifest.layers[index];
            let outcome = self.layer(index).await.with_context(|| {
                format!("layer {} of {} was not made", layer.digest, image.reference)
            })?;
            self.report
                .layer(index, image.chain_ids.len(), layer, &outcome);
            outcomes.push(outcome);
        }
        Ok(outcomes)
    }

    async fn layer(&mut self, index: usize) -> anyhow::Result<Outcome> {
        let image = Arc::clone(&self.image);
        let name = image.chain_ids[index].to_string();
        let parent = match index {
            0 => String::new(),
            _ => image.chain_ids[index - 1].to_string(),
        };
        let labels = labels::for_snapshot(
            &image.reference,
            image.manifest_digest,
            &image.manifest,
            index,
            image.chain_ids[index],
        );
        if self.node.has_snapshot(&self.snapshotter, &name).await? {
            self.node.hold_snapshot(&self.snapshotter, &name).await?;
            let told = self.node.snapshot_labels(&self.snapshotter, &name).await;
            check_present(&name, &image.manifest.layers[index], &told)?;
            return Ok(Outcome::Present);
        }
        // The collector can take a snapshot between the answer that it exists
        // and the look at it.
        for _ in 0..3 {
            let key = unique(&format!("extract-{name}"));
            match self.prepare(&key, &parent, labels.clone()).await? {
                Some(mounts) => {
                    let done = self.unpack(index, &key, mounts, labels).await;
                    if done.is_err() {
                        self.node.remove(&self.snapshotter, &key).await;
                    }
                    return done;
                }
                None if self.node.has_snapshot(&self.snapshotter, &name).await? => {
                    return Ok(Outcome::Lazy);
                }
                None => {}
            }
        }
        bail!(
            "snapshotter '{}' says that snapshot {name} exists, but containerd does not find it",
            self.snapshotter
        )
    }

    async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: Labels,
    ) -> anyhow::Result<Option<Vec<containerd_client::types::Mount>>> {
        let prepared = self
            .node
            .prepare(&self.snapshotter, key, parent, labels)
            .await?;
        Ok(match prepared {
            Prepared::Exists => None,
            Prepared::Unpack(mounts) => Some(mounts),
        })
    }

    async fn unpack(
        &mut self,
        index: usize,
        key: &str,
        mounts: Vec<containerd_client::types::Mount>,
        labels: Labels,
    ) -> anyhow::Result<Outcome> {
        let image = Arc::clone(&self.image);
        let layer = &image.manifest.layers[index];
        let mut told = self.node.snapshot_labels(&self.snapshotter, key).await;
        let reason = told.remove(NOT_LAZY);
        self.download_ahead(index);
        let download = self.downloads.remove(&layer.digest);
        let download = download.ok_or_else(|| anyhow!("no download was started"))?;
        download.await??;
        let diff_id = self.node.apply(layer, mounts).await?;
        let expected = image.diff_ids[index];
        if diff_id != expected {
            bail!(
                "its content has diff ID {diff_id}, but the image's configuration says {expected}"
            );
        }
        let name = image.chain_ids[index].to_string();
        self.node
            .commit(&self.snapshotter, key, &name, labels)
            .await?;
        let verified =
            Labels::from([("containerd.io/uncompressed".to_owned(), diff_id.to_string())]);
        self.node.label(layer.digest, verified).await?;
        Ok(Outcome::Unpacked(reason))
    }

    /// Starts to download a layer that has to be unpacked, and those above
    /// that will have to be as well: layers that cannot be lazy, and all of
    /// them where even a layer with a TOC was not.
    fn download_ahead(&mut self, index: usize) {
        let image = Arc::clone(&self.image);
        let layers = &image.manifest.layers[index..];
        let nothing_is_lazy = can_be_lazy(&layers[0]);
        for (above, layer) in layers.iter().enumerate() {
            let wanted = above == 0 || nothing_is_lazy || !can_be_lazy(layer);
            if !wanted || self.downloads.contains_key(&layer.digest) {
                continue;
            }
            let task = download(
                Arc::clone(&self.node),
                self.client.clone(),
                image.reference.clone(),
                layer.clone(),
                self.report.clone(),
                Arc::clone(&self.slots),
            );
            let task = AbortOnDropHandle::new(tokio::spawn(task));
            self.downloads.insert(layer.digest, task);
        }
    }
}

/// Fails unless a snapshot that is there can be taken for `layer`. containerd
/// takes it by its name alone, which is what another image says of a layer that
/// nobody has downloaded yet.
fn check_present(name: &str, layer: &Descriptor, told: &Labels) -> anyhow::Result<()> {
    let of = told
        .get(labels::IMAGE_REF)
        .map_or("another", String::as_str);
    match told.get(STANDING).map(String::as_str) {
        Some("contradicted") => bail!(
            "snapshot {name}, which the node has from image {of}, is not what it is named for; \
             remove that image, and every other that shows this snapshot, then pull again"
        ),
        Some("unknown") => {}
        _ => return Ok(()),
    }
    match told.get(labels::LAYER_DIGEST) {
        Some(other) if *other != layer.digest.to_string() => bail!(
            "the node has layer {other} of image {of} under the name of this one, {name}, and it \
             is not known yet whether they are the same; wait until 'sluice status' shows that \
             image as verified, or remove it, then pull again"
        ),
        _ => Ok(()),
    }
}

fn can_be_lazy(layer: &Descriptor) -> bool {
    LayerAnnotations::parse(&layer.annotations).is_ok_and(|toc| toc.trust().is_some())
}

/// Brings a layer's blob into containerd's store.
async fn download(
    node: Arc<Node>,
    client: Client,
    reference: Reference,
    layer: Descriptor,
    report: Report,
    slots: Arc<Semaphore>,
) -> anyhow::Result<()> {
    let _slot = slots.acquire_owned().await?;
    let labels = source(&node, &reference, layer.digest).await?;
    for again in [false, true] {
        let Some(mut writer) = node.writer(&layer).await? else {
            break;
        };
        let bar = report.download(&layer);
        let mut senders = None;
        let received = async {
            let mut body = client.blob(&reference, layer.digest).whole().await?;
            senders = Some(body.senders());
            if body.len != layer.size {
                bail!(
                    "blob {} has {} bytes, but the manifest says {}",
                    layer.digest,
                    body.len,
                    layer.size
                );
            }
            while let Some(bytes) = body.next().await? {
                bar.inc(bytes.len() as u64);
                writer.write(bytes).await?;
            }
            Ok(())
        }
        .await;
        bar.finish_and_clear();
        let wrong = received.as_ref().is_err_and(is_wrong);
        match writer.end(received, labels.clone()).await {
            // Another host may have the right bytes.
            Err(_) if wrong && !again && senders.is_some_and(|senders| senders.distrust()) => {}
            done => return done,
        }
    }
    node.label(layer.digest, labels).await
}

/// Whether a blob did not have its digest.
fn is_wrong(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<sluice_registry::Error>()
        .is_some_and(|error| error.kind() == ErrorKind::DigestMismatch)
}
