//! What an image consists of.

use serde::Serialize;
use sluice_oci::{Descriptor, Digest, Index, Manifest, Platform, media_type};

use crate::source::Source;
use crate::{Error, document};

/// An image as `inspect` reports it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Inspection {
    /// Digest of the manifest or index.
    pub digest: Digest,
    /// Its media type.
    pub media_type: String,
    /// One image a platform; a single image has one.
    pub images: Vec<InspectedImage>,
}

/// One platform's image.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectedImage {
    /// Digest of its manifest.
    pub digest: Digest,
    /// Its platform, where the index states it.
    pub platform: Option<Platform>,
    /// Digest of its configuration.
    pub config: Digest,
    /// Its layers, lowest first.
    pub layers: Vec<InspectedLayer>,
}

/// One layer.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectedLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
}

/// Describes an image.
pub(crate) async fn inspect(source: &Source) -> Result<Inspection, Error> {
    let (root, bytes) = source.root().await?;
    let images = if media_type::is_index(&root.media_type) {
        let index: Index = document::parse("index", root.digest, &bytes)?;
        let mut images = Vec::new();
        for entry in &index.manifests {
            let bytes = source.document("manifest", entry).await?;
            images.push(image(entry, &bytes)?);
        }
        images
    } else {
        vec![image(&root, &bytes)?]
    };
    Ok(Inspection {
        digest: root.digest,
        media_type: root.media_type,
        images,
    })
}

fn image(entry: &Descriptor, bytes: &[u8]) -> Result<InspectedImage, Error> {
    let manifest: Manifest = document::parse("manifest", entry.digest, bytes)?;
    let layers = manifest.layers.into_iter().map(|layer| InspectedLayer {
        digest: layer.digest,
        size: layer.size,
        media_type: layer.media_type,
    });
    Ok(InspectedImage {
        digest: entry.digest,
        platform: entry.platform.clone(),
        config: manifest.config.digest,
        layers: layers.collect(),
    })
}
