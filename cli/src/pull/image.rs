//! What an image consists of: its documents, from the registry into
//! containerd's store.

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use serde::Deserialize;
use sluice_oci::{Descriptor, Digest, Hasher, Index, Manifest, Platform, Reference};
use sluice_registry::{Client, Document};

use super::ahead::Ahead;
use super::labels;
use super::node::{Labels, Node};

const MAX_MANIFEST: usize = 4 << 20;
const MAX_CONFIG: usize = 4 << 20;

/// An image whose documents are in containerd's store.
pub(crate) struct Image {
    pub(crate) reference: Reference,
    /// What the reference names: the manifest, or an index above it.
    pub(crate) target: Descriptor,
    pub(crate) manifest_digest: Digest,
    pub(crate) manifest: Manifest,
    /// The names of the snapshots, lowest first, one a layer.
    pub(crate) chain_ids: Vec<Digest>,
    pub(crate) diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct ImageConfig {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

/// The manifest of the platform, which is not in containerd's store yet.
struct Chosen {
    descriptor: Descriptor,
    bytes: Bytes,
    manifest: Manifest,
}

/// Brings an image's manifest and configuration to the node: one request
/// for the configuration, and one for the manifest if an index is what the
/// reference names.
pub(crate) async fn fetch(
    node: &Node,
    client: &Client,
    reference: &Reference,
    named: Document,
    platform: &Platform,
    ahead: Ahead,
) -> anyhow::Result<Image> {
    let target = named.descriptor();
    let chosen = if named.is_index() {
        from_index(node, client, reference, &named, platform).await?
    } else {
        Chosen {
            descriptor: target.clone(),
            manifest: named.manifest()?,
            bytes: named.bytes,
        }
    };
    let _telling = ahead.has_manifest(chosen.descriptor.digest, chosen.bytes.clone());
    let ((), config) = tokio::try_join!(
        keep_manifest(node, reference, &chosen),
        config(node, client, reference, &chosen.manifest)
    )?;
    let (manifest, manifest_digest) = (chosen.manifest, chosen.descriptor.digest);
    let found = format!("{}/{}", config.os, config.architecture);
    if (&config.os, &config.architecture) != (&platform.os, &platform.architecture) {
        bail!(
            "{reference} is an image for {found}, not for {}; pass --platform {found} to pull it \
             all the same",
            platform
        );
    }
    let diff_ids = config.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        bail!(
            "{reference} ({manifest_digest}) has {} layers, but its configuration lists {}",
            manifest.layers.len(),
            diff_ids.len()
        );
    }
    if diff_ids.is_empty() {
        bail!("{reference} ({manifest_digest}) has no layers");
    }
    Ok(Image {
        reference: reference.clone(),
        target,
        manifest_digest,
        manifest,
        chain_ids: chain_ids(&diff_ids),
        diff_ids,
    })
}

async fn from_index(
    node: &Node,
    client: &Client,
    reference: &Reference,
    document: &Document,
    platform: &Platform,
) -> anyhow::Result<Chosen> {
    let index = document.index()?;
    let descriptor = choose(reference, &index, platform)?;
    let keep_index = async {
        let mut labels = labels::of_index(&index.manifests);
        labels.extend(source(node, reference, document.digest).await?);
        let bytes = document.bytes.clone();
        node.store(&document.descriptor(), bytes, labels).await
    };
    let digest = descriptor.digest;
    let fetch = async {
        Ok(match node.read(digest, MAX_MANIFEST).await? {
            Some(bytes) => Bytes::from(bytes),
            None => client.manifest(&reference.with_digest(digest)).await?.bytes,
        })
    };
    let ((), bytes) = tokio::try_join!(keep_index, fetch)?;
    let manifest: Manifest = serde_json::from_slice(&bytes)
        .with_context(|| format!("{digest} of {reference} is not a manifest"))?;
    Ok(Chosen {
        descriptor: Descriptor::new(descriptor.media_type.clone(), digest, bytes.len() as u64),
        bytes,
        manifest,
    })
}

async fn keep_manifest(node: &Node, reference: &Reference, chosen: &Chosen) -> anyhow::Result<()> {
    let Chosen {
        descriptor,
        bytes,
        manifest,
    } = chosen;
    let mut labels = labels::of_manifest(manifest);
    labels.extend(source(node, reference, descriptor.digest).await?);
    node.store(descriptor, bytes.clone(), labels).await
}

async fn config(
    node: &Node,
    client: &Client,
    reference: &Reference,
    manifest: &Manifest,
) -> anyhow::Result<ImageConfig> {
    let descriptor = &manifest.config;
    let bytes = match node.read(descriptor.digest, MAX_CONFIG).await? {
        Some(bytes) => Bytes::from(bytes),
        None => {
            let blob = client.blob(reference, descriptor.digest);
            blob.whole().await?.collect(MAX_CONFIG).await?
        }
    };
    let config = serde_json::from_slice(&bytes).with_context(|| {
        format!(
            "{reference} cannot be run: {} ({}) is no image configuration",
            descriptor.digest, descriptor.media_type
        )
    })?;
    let actual = Descriptor {
        size: bytes.len() as u64,
        ..descriptor.clone()
    };
    let labels = source(node, reference, descriptor.digest).await?;
    node.store(&actual, bytes, labels).await?;
    Ok(config)
}

/// The label for where content came from.
pub(crate) async fn source(
    node: &Node,
    reference: &Reference,
    digest: Digest,
) -> anyhow::Result<Labels> {
    let present = node.content_labels(digest).await?;
    Ok(labels::source(reference, present.as_ref()))
}

/// Names the snapshots: each by its own layer and all below it.
fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain_ids: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let chain_id = match chain_ids.last() {
            None => *diff_id,
            Some(parent) => {
                let mut hasher = Hasher::new();
                hasher.update(format!("{parent} {diff_id}").as_bytes());
                hasher.finish()
            }
        };
        chain_ids.push(chain_id);
    }
    chain_ids
}

/// The image of an index for a platform; an error that lists what there is.
pub(crate) fn choose<'a>(
    reference: &Reference,
    index: &'a Index,
    platform: &Platform,
) -> anyhow::Result<&'a Descriptor> {
    first_for(&index.manifests, platform).ok_or_else(|| {
        let mut have: Vec<String> = index
            .manifests
            .iter()
            .filter_map(|manifest| manifest.platform.as_ref().map(ToString::to_string))
            .filter(|platform| !platform.starts_with("unknown"))
            .collect();
        have.dedup();
        anyhow!(
            "{reference} has no image for {}; it has {}: pass one by --platform",
            platform,
            have.join(", ")
        )
    })
}

/// The first image of an index that is for `wanted`.
fn first_for<'a>(manifests: &'a [Descriptor], wanted: &Platform) -> Option<&'a Descriptor> {
    manifests.iter().find(|manifest| {
        let platform = manifest.platform.as_ref();
        platform.is_some_and(|platform| wanted.is_met_by(platform))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_oci::media_type;

    #[test]
    fn chain_ids_are_those_of_the_specification() {
        let [a, b, c] = ["a", "b", "c"].map(|text| Digest::of(text.as_bytes()));
        let ab = Digest::of(format!("{a} {b}").as_bytes());
        let abc = Digest::of(format!("{ab} {c}").as_bytes());
        assert_eq!(chain_ids(&[a, b, c]), [a, ab, abc]);
    }

    #[test]
    fn platforms() {
        let descriptor = |text: &str| Descriptor {
            platform: Some(text.parse().unwrap()),
            ..Descriptor::new(media_type::OCI_MANIFEST, Digest::of(text.as_bytes()), 1)
        };
        let index = [
            descriptor("unknown/unknown"),
            descriptor("linux/arm/v6"),
            descriptor("linux/arm/v7"),
            descriptor("linux/arm64"),
            descriptor("linux/amd64"),
        ];
        let chosen = |text: &str| {
            let platform: Platform = text.parse().unwrap();
            first_for(&index, &platform).map(|found| found.platform.as_ref().unwrap().to_string())
        };
        for (wanted, found) in [
            ("linux/amd64", Some("linux/amd64")),
            ("linux/arm64/v8", Some("linux/arm64")),
            ("linux/arm/v7", Some("linux/arm/v7")),
            ("linux/arm", Some("linux/arm/v6")),
            ("linux/arm/v5", None),
            ("windows/amd64", None),
        ] {
            assert_eq!(chosen(wanted).as_deref(), found, "{wanted}");
        }
    }
}
