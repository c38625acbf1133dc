//! How fast a start could be at all.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, bail};
use sluice_layer::profile::Read;
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

/// The tables of contents of an image's layers.
pub struct Tables {
    layers: HashMap<Digest, Toc>,
    /// Their size as stored.
    bytes: u64,
}

impl Tables {
    /// Those of an image in the registry, all of whose layers have one.
    pub fn read(registry: &Registry, image: &str) -> Result<Self> {
        let manifest = registry.manifest(&registry.reference(image))?;
        let mut tables = Self {
            layers: HashMap::new(),
            bytes: 0,
        };
        for layer in manifest.layers {
            let (toc, size) = read_toc(registry, layer.digest)
                .with_context(|| format!("layer {} of {image}", layer.digest))?;
            tables.bytes += size;
            tables.layers.insert(layer.digest, toc);
        }
        Ok(tables)
    }

    /// Bytes that a start has to fetch: of all TOCs, and of the units of what
    /// the profile names.
    pub fn needed_bytes(&self, profile: &Profile) -> Result<u64> {
        let mut units = BTreeSet::new();
        for read in profile.reads() {
            let layer = layer_of(profile, read)?;
            let of_read = self.units(layer, read)?;
            units.extend(of_read.into_iter().map(|unit| (layer, unit)));
        }
        Ok(self.bytes + units.iter().map(|(_, unit)| unit.size).sum::<u64>())
    }

    /// The units that a read needs of its layer.
    pub fn units(&self, layer: Digest, read: &Read) -> Result<BTreeSet<Unit>> {
        let toc = self.layers.get(&layer);
        let node = toc.and_then(|toc| Some((toc, &toc.find(&read.path)?.kind)));
        let Some((toc, NodeKind::Regular(file))) = node else {
            bail!("layer {layer} has not all files of the profile");
        };
        let chunks = &toc.chunks()[file.chunks.start as usize..file.chunks.end as usize];
        let read_chunks = chunks.iter().filter(|chunk| {
            chunk.file_offset < read.offset + read.len
                && chunk.file_offset + chunk.size > read.offset
        });
        Ok(read_chunks
            .filter_map(|chunk| match chunk.source {
                ChunkSource::Blob { unit, .. } => Some(unit),
                ChunkSource::Zeros => None,
            })
            .collect())
    }
}

/// The layer that a profile's read is of.
pub fn layer_of(profile: &Profile, read: &Read) -> Result<Digest> {
    let layer = profile.layers().get(read.layer);
    Ok(*layer.context("a profile's read is of a layer that the profile does not name")?)
}

/// A layer's TOC, and its size as stored.
fn read_toc(registry: &Registry, layer: Digest) -> Result<(Toc, u64)> {
    let path = registry.blob_file(&layer.to_string());
    let open = || format!("cannot read {}", path.display());
    let blob = File::open(&path).with_context(open)?;
    let size = blob.metadata().with_context(open)?.len();
    let part = |start: u64, end: u64| -> Result<Vec<u8>> {
        let mut bytes = vec![0; (end - start) as usize];
        blob.read_exact_at(&mut bytes, start).with_context(open)?;
        Ok(bytes)
    };
    let tail = part(size.saturating_sub(FOOTER_MAX as u64), size)?;
    let location = locate_toc(&tail, size)?;
    let range = location.range();
    let compressed = part(range.start, range.end)?;
    let limits = Limits::default();
    let toc = UntrustedToc::read(&location, &compressed, &limits)?;
    Ok((toc.parse_without_trust(&limits)?, compressed.len() as u64))
}
