//! How fast a start could be at all.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, bail};
use sluice_layer::{
    ChunkSource, FOOTER_MAX, Limits, NodeKind, Profile, Toc, Unit, UntrustedToc, locate_toc,
};
use sluice_oci::Digest;
use sluice_tests::Registry;

use super::link::Shape;

/// Round trips that no start does without: the connection, the manifest, the
/// TOCs and the first content.
const ROUND_TRIPS: f64 = 4.0;

/// What a start has to fetch and to do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Need {
    /// Bytes of the compressed chunks that are read, and of the TOCs.
    pub bytes: u64,
    /// Seconds when everything is on the node.
    pub local: f64,
}

impl Need {
    /// The larger of what the link and what the program takes, and four round
    /// trips.
    pub fn limit(&self, shape: Shape) -> f64 {
        let link = self.bytes as f64 / shape.bytes_per_second();
        let round_trips = ROUND_TRIPS * shape.round_trip_ms as f64 / 1e3;
        link.max(self.local) + round_trips
    }
}

/// Bytes that a start has to fetch: of the TOCs of all `layers`, and of the
/// units of what the profile names.
pub fn needed_bytes(registry: &Registry, layers: &[Digest], profile: &Profile) -> Result<u64> {
    let mut bytes = 0;
    for &digest in layers {
        let (toc, size) = read_toc(registry, digest)?;
        bytes += size;
        let mut units: BTreeSet<Unit> = BTreeSet::new();
        for read in profile.reads_of(digest) {
            let Some(NodeKind::Regular(file)) = toc.find(&read.path).map(|node| &node.kind) else {
                bail!("layer {digest} has not all files of the profile");
            };
            let chunks = &toc.chunks()[file.chunks.start as usize..file.chunks.end as usize];
            let read_chunks = chunks.iter().filter(|chunk| {
                chunk.file_offset < read.offset + read.len
                    && chunk.file_offset + chunk.size > read.offset
            });
            units.extend(read_chunks.filter_map(|chunk| match chunk.source {
                ChunkSource::Blob { unit, .. } => Some(unit),
                ChunkSource::Zeros => None,
            }));
        }
        bytes += units.iter().map(|unit| unit.size).sum::<u64>();
    }
    Ok(bytes)
}

/// A layer's TOC, and its size as stored.
fn read_toc(registry: &Registry, layer: Digest) -> Result<(Toc, u64)> {
    let file = registry.blob_file(&layer.to_string());
    let blob = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let tail = &blob[blob.len().saturating_sub(FOOTER_MAX)..];
    let location = locate_toc(tail, blob.len() as u64)?;
    let range = location.range();
    let compressed = &blob[range.start as usize..range.end as usize];
    let limits = Limits::default();
    let toc = UntrustedToc::read(&location, compressed, &limits)?;
    Ok((toc.parse_without_trust(&limits)?, compressed.len() as u64))
}
