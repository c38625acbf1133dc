//! What an image consists of.

use serde::Serialize;
use serde_json::Value;
use sluice_layer::{Format, Limits, NodeKind, Toc};
use sluice_oci::{Descriptor, Digest, Index, Manifest, Platform, media_type};

use crate::platform::is_attestation;
use crate::source::Source;
use crate::toc::{self, NoToc};
use crate::{Error, document, media};

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

/// One platform's image, or a statement about one.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectedImage {
    /// Digest of its manifest.
    pub digest: Digest,
    /// Media type of its manifest.
    pub media_type: String,
    /// Its platform.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Whether it is no image to run, but a statement about one.
    pub attestation: bool,
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
    /// What can be loaded lazily about it.
    #[serde(flatten)]
    pub lazy: Lazy,
}

/// Whether a layer can be loaded lazily.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "lazy", rename_all = "lowercase")]
pub enum Lazy {
    /// It has a TOC that its annotation vouches for.
    Yes(InspectedToc),
    /// It has a TOC, but nothing to trust it by, or a broken one.
    Broken {
        /// What is wrong.
        why: String,
    },
    /// It is an ordinary layer.
    No,
}

/// A layer's TOC in figures.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct InspectedToc {
    /// `estargz` or `zstd-chunked`.
    pub format: &'static str,
    /// Digest of the TOC's JSON.
    pub toc_digest: Digest,
    /// Its compressed size in bytes.
    pub toc_size: u64,
    /// Names in the tree.
    pub entries: usize,
    /// Regular files.
    pub files: usize,
    /// Bytes of all files.
    pub file_bytes: u64,
    /// Chunks.
    pub chunks: usize,
    /// Files that are prioritized, in the order of the blob.
    pub prioritized: Vec<String>,
    /// Bytes of the blob that they take.
    pub prioritized_bytes: u64,
}

/// Describes an image.
pub(crate) async fn inspect(source: &Source) -> Result<Inspection, Error> {
    let (root, bytes) = source.root().await?;
    let mut images = Vec::new();
    if media_type::is_index(&root.media_type) {
        let index: Index = document::parse("index", root.digest, &bytes)?;
        for entry in &index.manifests {
            let bytes = source.manifest(entry).await?;
            if !media_type::is_index(&entry.media_type) {
                images.push(image(source, entry, &bytes).await?);
            }
        }
    } else {
        images.push(image(source, &root, &bytes).await?);
    }
    Ok(Inspection {
        digest: root.digest,
        media_type: root.media_type,
        images,
    })
}

async fn image(source: &Source, entry: &Descriptor, bytes: &[u8]) -> Result<InspectedImage, Error> {
    let manifest: Manifest = document::parse("manifest", entry.digest, bytes)?;
    let attestation = is_attestation(entry);
    let mut layers = Vec::new();
    for layer in manifest.layers {
        let lazy = if media::is_layer(&layer.media_type) && !attestation {
            lazy(source, &layer).await?
        } else {
            Lazy::No
        };
        layers.push(InspectedLayer {
            digest: layer.digest,
            size: layer.size,
            media_type: layer.media_type,
            lazy,
        });
    }
    let platform = match &entry.platform {
        Some(platform) => Some(platform.to_string()),
        None => {
            let config = source.blob("configuration", &manifest.config).await?;
            configured_platform(&config)
        }
    };
    Ok(InspectedImage {
        digest: entry.digest,
        media_type: entry.media_type.clone(),
        platform,
        attestation,
        config: manifest.config.digest,
        layers,
    })
}

fn configured_platform(config: &[u8]) -> Option<String> {
    let config: Value = serde_json::from_slice(config).ok()?;
    let text = |key: &str| Some(config.get(key)?.as_str()?.to_owned());
    let platform = Platform {
        os: text("os")?,
        architecture: text("architecture")?,
        variant: text("variant"),
        other: Default::default(),
    };
    Some(platform.to_string())
}

async fn lazy(source: &Source, layer: &Descriptor) -> Result<Lazy, Error> {
    let found = match toc::find(source, layer).await? {
        Ok(found) => found,
        Err(NoToc::Ordinary) => return Ok(Lazy::No),
        Err(NoToc::Broken(why)) => return Ok(Lazy::Broken { why }),
    };
    let broken = |why: &str| {
        Ok(Lazy::Broken {
            why: why.to_owned(),
        })
    };
    match &found.trust {
        None => return broken("no annotation vouches for its table of contents"),
        Some(trust) if !found.toc.matches(trust) => {
            return broken("its table of contents is not the one that the annotation names");
        }
        Some(_) => {}
    }
    let toc = match found.toc.parse_without_trust(&Limits::default()) {
        Ok(toc) => toc,
        Err(cause) => return broken(&cause.to_string()),
    };
    let mut files = 0;
    let mut file_bytes = 0;
    for node in toc.nodes() {
        if let NodeKind::Regular(content) = &node.kind {
            files += 1;
            file_bytes += content.size;
        }
    }
    let names = |node: &sluice_layer::Node| match &node.kind {
        NodeKind::Directory(directory) => directory.children.len(),
        _ => 0,
    };
    Ok(Lazy::Yes(InspectedToc {
        format: match toc.format() {
            Format::Estargz => "estargz",
            Format::ZstdChunked => "zstd-chunked",
        },
        toc_digest: found.toc.json_digest(),
        toc_size: found.location.compressed_size,
        entries: toc.nodes().iter().map(names).sum(),
        files,
        file_bytes,
        chunks: toc.chunks().len(),
        prioritized: prioritized(&toc),
        prioritized_bytes: toc.prefetch_end().unwrap_or_default(),
    }))
}

/// The files before the landmark.
fn prioritized(toc: &Toc) -> Vec<String> {
    let Some(end) = toc.prefetch_end() else {
        return Vec::new();
    };
    let mut files: Vec<(u64, String)> = Vec::new();
    let mut pending = vec![(sluice_layer::NodeId::ROOT, String::new())];
    while let Some((node, path)) = pending.pop() {
        match &toc.node(node).kind {
            NodeKind::Directory(directory) => {
                for child in &directory.children {
                    let name = child.name.escape_ascii();
                    pending.push((child.node, format!("{path}/{name}")));
                }
            }
            NodeKind::Regular(content) if !content.chunks.is_empty() => {
                let first = &toc.chunks()[content.chunks.start as usize];
                if let sluice_layer::ChunkSource::Blob { unit, .. } = first.source
                    && unit.offset < end
                {
                    files.push((unit.offset, path));
                }
            }
            _ => {}
        }
    }
    files.sort();
    files.into_iter().map(|(_, path)| path).collect()
}
