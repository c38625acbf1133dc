//! Rewriting an image: its index, manifests, configurations and layers.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use serde_json::Value;
use sluice_layer::StartReads;
use sluice_layer::write::{Options, WriteError};
use sluice_oci::{Descriptor, Digest, Index, Manifest, Platform, media_type};

use crate::destination::{Destination, blocking};
use crate::media;
use crate::pipeline::Job;
use crate::platform::{Platforms, is_attestation};
use crate::progress::{Event, LayerOutcome, Progress};
use crate::source::Source;
use crate::toc::{self, is_seekable};
use crate::{Error, document};

/// The annotation by which an attestation names its image.
const ATTESTED: &str = "vnd.docker.reference.digest";
/// Indexes within indexes deeper than this are refused.
const MAX_DEPTH: u32 = 4;

/// How to convert an image.
#[derive(Debug, Clone)]
pub struct Conversion {
    /// Format, chunk size and level.
    pub options: Options,
    /// Which images of an index to keep and convert.
    pub platforms: Platforms,
    /// Files that a container reads while it starts, in that order.
    pub prioritized: Vec<String>,
    /// What is read of them, if that is known: nodes fetch only that ahead.
    pub start_reads: Option<Arc<StartReads>>,
    /// Convert layers that are seekable already, too.
    pub force: bool,
    /// Directory for temporary files.
    pub scratch: PathBuf,
    /// Threads that compress. The result does not depend on their number.
    pub workers: NonZero<usize>,
}

/// What a conversion did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Digest of the image as it was.
    pub source: Digest,
    /// Digest of the image as it is now.
    pub digest: Digest,
    /// Bytes of all layers before, each blob once.
    pub size_before: u64,
    /// Bytes of all layers now.
    pub size_after: u64,
    /// Layers that were converted.
    pub converted: usize,
    /// Layers that were seekable already.
    pub already_seekable: usize,
    /// Layers that stay as they were for another reason.
    pub kept: usize,
}

/// A layer's new place in the image.
#[derive(Debug, Clone)]
struct NewLayer {
    descriptor: Descriptor,
    size_before: u64,
    /// Its diff ID, and the one that the old configuration should have
    /// stated, where the layer was read.
    diff_ids: Option<(Digest, Option<Digest>)>,
    missing: Vec<String>,
    outcome: LayerOutcome,
}

pub(crate) struct Converter<'a> {
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    pub(crate) conversion: &'a Conversion,
    pub(crate) progress: Arc<dyn Progress>,
    prioritized: Arc<[String]>,
    layers: HashMap<Digest, NewLayer>,
    copied: HashSet<Digest>,
    images: usize,
}

/// Stops the threads of a conversion that nobody waits for any more.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl<'a> Converter<'a> {
    pub(crate) fn new(
        source: Source,
        destination: Destination,
        conversion: &'a Conversion,
        progress: Arc<dyn Progress>,
    ) -> Self {
        Self {
            source,
            destination,
            conversion,
            progress,
            prioritized: conversion.prioritized.clone().into(),
            layers: HashMap::new(),
            copied: HashSet::new(),
            images: 0,
        }
    }

    /// Converts everything and names the result.
    pub(crate) async fn run(mut self) -> Result<Report, Error> {
        let (root, bytes) = self.source.root().await?;
        let source = root.digest;
        let (mut new, bytes) = if media_type::is_index(&root.media_type) {
            let converted = self.index(&root, bytes, MAX_DEPTH).await?;
            if self.images == 0 {
                return Err(Error::NoPlatform {
                    wanted: self.wanted(),
                    has: converted.1,
                });
            }
            converted.0
        } else {
            self.image(&root, bytes, true).await?
        };
        new.annotations = root.annotations;
        new.platform = root.platform;
        let report = self.report(source, new.digest);
        for name in self.missing() {
            self.progress.event(Event::NotFound { name: &name });
        }
        self.destination.commit(new, bytes).await?;
        Ok(report)
    }

    fn wanted(&self) -> String {
        match &self.conversion.platforms {
            Platforms::All => "image".to_owned(),
            Platforms::Only(wanted) => {
                let wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
                wanted.join(" or ")
            }
        }
    }

    /// Converts the images of an index. The second part of the result lists
    /// its platforms.
    async fn index(
        &mut self,
        root: &Descriptor,
        bytes: Bytes,
        depth: u32,
    ) -> Result<((Descriptor, Bytes), String), Error> {
        let mut index: Index = document::parse("index", root.digest, &bytes)?;
        let has: Vec<String> = index
            .manifests
            .iter()
            .filter(|entry| !is_attestation(entry))
            .filter_map(|entry| entry.platform.as_ref())
            .map(ToString::to_string)
            .collect();
        let before = index.clone();
        let (statements, images): (Vec<_>, Vec<_>) = index
            .manifests
            .into_iter()
            .enumerate()
            .partition(|(_, e)| is_attestation(e));
        let mut kept: BTreeMap<usize, Descriptor> = BTreeMap::new();
        let mut renamed: HashMap<String, Digest> = HashMap::new();
        for (position, entry) in images {
            let is_index = media_type::is_index(&entry.media_type);
            let wanted = match &entry.platform {
                Some(platform) => self.conversion.platforms.want(platform),
                None => is_index || self.conversion.platforms == Platforms::All,
            };
            if !wanted {
                continue;
            }
            let bytes = self.source.manifest(&entry).await?;
            let (mut new, new_bytes) = if is_index {
                if depth == 0 {
                    return Err(Error::Document {
                        what: "index",
                        digest: root.digest,
                        why: "it nests indexes too deeply".to_owned(),
                    });
                }
                Box::pin(self.index(&entry, bytes, depth - 1)).await?.0
            } else {
                self.image(&entry, bytes, false).await?
            };
            renamed.insert(entry.digest.to_string(), new.digest);
            let media_type = new.media_type.clone();
            self.destination
                .put_document(&media_type, new_bytes)
                .await?;
            new.annotations = entry.annotations;
            new.platform = entry.platform;
            new.other = entry.other;
            kept.insert(position, new);
        }
        for (position, mut entry) in statements {
            if let Some(about) = entry.annotations.get_mut(ATTESTED) {
                match renamed.get(about.as_str()) {
                    Some(new) => *about = new.to_string(),
                    None => continue,
                }
            } else if self.conversion.platforms != Platforms::All {
                continue;
            }
            let bytes = self.source.manifest(&entry).await?;
            self.copy_artifact(&entry, &bytes).await?;
            let media_type = entry.media_type.clone();
            self.destination.put_document(&media_type, bytes).await?;
            kept.insert(position, entry);
        }
        index.manifests = kept.into_values().collect();
        if index.manifests == before.manifests {
            return Ok(((root.clone(), bytes), has.join(", ")));
        }
        if index.media_type.is_some() || root.media_type == media_type::DOCKER_INDEX {
            index.media_type = Some(media_type::OCI_INDEX.to_owned());
        }
        let bytes = document::to_bytes("index", root.digest, &index)?;
        let new = Descriptor::new(
            media_type::OCI_INDEX,
            Digest::of(&bytes),
            bytes.len() as u64,
        );
        Ok(((new, bytes), has.join(", ")))
    }

    /// Converts one image. Returns its new manifest, which the caller stores.
    async fn image(
        &mut self,
        entry: &Descriptor,
        bytes: Bytes,
        alone: bool,
    ) -> Result<(Descriptor, Bytes), Error> {
        let manifest: Manifest = document::parse("manifest", entry.digest, &bytes)?;
        let known = [media_type::OCI_CONFIG, media_type::DOCKER_CONFIG];
        if !known.contains(&manifest.config.media_type.as_str()) {
            // No container image, but something else that lives in
            // registries.
            if alone {
                return Err(Error::Document {
                    what: "manifest",
                    digest: entry.digest,
                    why: format!(
                        "it is no container image: its configuration is of type {}",
                        manifest.config.media_type
                    ),
                });
            }
            self.copy_artifact(entry, &bytes).await?;
            return Ok((entry.clone(), bytes));
        }
        let config_bytes = self.source.blob("configuration", &manifest.config).await?;
        let mut config: Value =
            document::parse("configuration", manifest.config.digest, &config_bytes)?;
        if alone {
            self.check_platform(&config)?;
        }
        self.images += 1;
        self.progress.event(Event::Image {
            platform: entry.platform.as_ref().map(ToString::to_string).as_deref(),
            layers: manifest.layers.len(),
        });
        let diff_ids = diff_ids(&mut config, &manifest)?;
        let mut new = manifest.clone();
        let mut rewritten = false;
        for (layer, diff_id) in new.layers.iter_mut().zip(diff_ids) {
            let converted = self.layer(layer).await?;
            if let Some((new, stated)) = converted.diff_ids {
                let old = diff_id.as_str().unwrap_or_default().to_owned();
                if stated.is_some_and(|stated| stated.to_string() != old) {
                    return Err(Error::DiffId {
                        layer: layer.digest,
                        stated: old,
                        found: stated.map(|d| d.to_string()).unwrap_or_default(),
                    });
                }
                if new.to_string() != old {
                    *diff_id = Value::String(new.to_string());
                    rewritten = true;
                }
            }
            *layer = converted.descriptor;
        }
        if rewritten {
            let bytes = document::to_bytes("configuration", manifest.config.digest, &config)?;
            new.config.digest = Digest::of(&bytes);
            new.config.size = bytes.len() as u64;
            self.destination.put(bytes).await?;
        } else {
            self.destination.put(config_bytes).await?;
        }
        if new == manifest {
            return Ok((entry.clone(), bytes));
        }
        new.config.media_type = media_type::OCI_CONFIG.to_owned();
        for layer in &mut new.layers {
            layer.media_type = media::to_oci(&layer.media_type).to_owned();
        }
        new.media_type = Some(media_type::OCI_MANIFEST.to_owned());
        let bytes = document::to_bytes("manifest", entry.digest, &new)?;
        let descriptor = Descriptor::new(
            media_type::OCI_MANIFEST,
            Digest::of(&bytes),
            bytes.len() as u64,
        );
        Ok((descriptor, bytes))
    }

    /// A single image must be for a wanted platform.
    fn check_platform(&self, config: &Value) -> Result<(), Error> {
        let text = |key: &str| config.get(key).and_then(Value::as_str).map(str::to_owned);
        let platform = Platform {
            architecture: text("architecture").unwrap_or_default(),
            os: text("os").unwrap_or_default(),
            variant: text("variant"),
            other: Default::default(),
        };
        if self.conversion.platforms.want(&platform) {
            return Ok(());
        }
        Err(Error::NoPlatform {
            wanted: self.wanted(),
            has: platform.to_string(),
        })
    }

    /// Converts or copies a layer, once however many images have it.
    async fn layer(&mut self, layer: &Descriptor) -> Result<NewLayer, Error> {
        if let Some(known) = self.layers.get(&layer.digest) {
            let mut known = known.clone();
            if known.outcome == LayerOutcome::AlreadySeekable {
                known.descriptor = layer.clone();
            }
            return Ok(known);
        }
        self.progress.event(Event::LayerBegins {
            layer: layer.digest,
            size: layer.size,
        });
        let new = self.new_layer(layer).await?;
        self.progress.event(Event::LayerEnds {
            layer: layer.digest,
            outcome: &new.outcome,
        });
        self.layers.insert(layer.digest, new.clone());
        Ok(new)
    }

    async fn new_layer(&mut self, layer: &Descriptor) -> Result<NewLayer, Error> {
        let keep = |outcome| NewLayer {
            descriptor: layer.clone(),
            size_before: layer.size,
            diff_ids: None,
            missing: Vec::new(),
            outcome,
        };
        if media::is_foreign(layer) {
            return Ok(keep(LayerOutcome::Kept {
                why: "it may not be distributed".to_owned(),
            }));
        }
        if !media::is_layer(&layer.media_type) {
            self.copy("layer", layer).await?;
            return Ok(keep(LayerOutcome::Kept {
                why: format!("its type {} is unknown", layer.media_type),
            }));
        }
        let format = self.conversion.options.format;
        let again = self.conversion.force || !self.prioritized.is_empty();
        if !again && is_seekable(&self.source, layer, format).await? {
            self.copy("layer", layer).await?;
            return Ok(keep(LayerOutcome::AlreadySeekable));
        }
        let stop = Arc::new(AtomicBool::new(false));
        let _stop = StopOnDrop(Arc::clone(&stop));
        let convert = |blob| {
            let job = Job {
                layer: layer.digest,
                size: layer.size,
                options: self.conversion.options,
                prioritized: Arc::clone(&self.prioritized),
                start_reads: self.conversion.start_reads.clone(),
                workers: self.conversion.workers,
                spool: self.destination.spool_directory(),
                scratch: self.conversion.scratch.clone(),
                stop: Arc::clone(&stop),
            };
            let progress = Arc::clone(&self.progress);
            let digest = layer.digest;
            let read = move |bytes| {
                progress.event(Event::LayerRead {
                    layer: digest,
                    bytes,
                });
            };
            blocking(move || job.run(blob, read))
        };
        let converted = match self.source.read(layer.digest, convert).await {
            Err(Error::Layer {
                cause: WriteError::Unsupported(why),
                ..
            }) => {
                self.copy("layer", layer).await?;
                return Ok(keep(LayerOutcome::Kept { why }));
            }
            converted => converted?,
        };
        let mut descriptor = layer.clone();
        descriptor.media_type = media::of_format(format).to_owned();
        descriptor.digest = converted.digest;
        descriptor.size = converted.size;
        descriptor
            .annotations
            .retain(|key, _| !toc::is_toc_annotation(key));
        let tail = converted.tail;
        descriptor.annotations.extend(tail.annotations);
        self.destination
            .adopt(converted.spool, converted.digest, converted.size)
            .await?;
        Ok(NewLayer {
            outcome: LayerOutcome::Converted {
                digest: converted.digest,
                size: converted.size,
            },
            descriptor,
            size_before: layer.size,
            diff_ids: Some((tail.diff_id, converted.input_diff_id)),
            missing: converted.missing,
        })
    }

    /// Copies a manifest's blobs as they are.
    async fn copy_artifact(&mut self, entry: &Descriptor, bytes: &[u8]) -> Result<(), Error> {
        let manifest: Manifest = document::parse("manifest", entry.digest, bytes)?;
        self.copy("configuration", &manifest.config).await?;
        for layer in &manifest.layers {
            if !media::is_foreign(layer) {
                self.copy("layer", layer).await?;
            }
        }
        Ok(())
    }

    async fn copy(&mut self, what: &'static str, blob: &Descriptor) -> Result<(), Error> {
        if self.copied.insert(blob.digest) {
            self.destination.copy(&self.source, what, blob).await?;
        }
        Ok(())
    }

    /// Prioritized names that no layer holds.
    fn missing(&self) -> Vec<String> {
        let converted = || {
            let layers = self.layers.values();
            layers.filter(|layer| matches!(layer.outcome, LayerOutcome::Converted { .. }))
        };
        let Some(first) = converted().next() else {
            return Vec::new();
        };
        let nowhere = |name: &&String| converted().all(|layer| layer.missing.contains(name));
        first.missing.iter().filter(nowhere).cloned().collect()
    }

    fn report(&self, source: Digest, digest: Digest) -> Report {
        let count = |wanted: fn(&LayerOutcome) -> bool| {
            let outcomes = self.layers.values().map(|layer| &layer.outcome);
            outcomes.filter(|outcome| wanted(outcome)).count()
        };
        Report {
            source,
            digest,
            size_before: self.layers.values().map(|layer| layer.size_before).sum(),
            size_after: self
                .layers
                .values()
                .map(|layer| layer.descriptor.size)
                .sum(),
            converted: count(|outcome| matches!(outcome, LayerOutcome::Converted { .. })),
            already_seekable: count(|outcome| *outcome == LayerOutcome::AlreadySeekable),
            kept: count(|outcome| matches!(outcome, LayerOutcome::Kept { .. })),
        }
    }
}

/// The configuration's `rootfs.diff_ids`, one for each layer.
fn diff_ids<'c>(
    config: &'c mut Value,
    manifest: &Manifest,
) -> Result<std::slice::IterMut<'c, Value>, Error> {
    let refuse = |why: String| Error::Document {
        what: "configuration",
        digest: manifest.config.digest,
        why,
    };
    let list = config
        .pointer_mut("/rootfs/diff_ids")
        .and_then(Value::as_array_mut)
        .ok_or_else(|| refuse("it has no list rootfs.diff_ids".to_owned()))?;
    if list.len() != manifest.layers.len() {
        return Err(refuse(format!(
            "it lists {} diff IDs for {} layers",
            list.len(),
            manifest.layers.len()
        )));
    }
    Ok(list.iter_mut())
}
