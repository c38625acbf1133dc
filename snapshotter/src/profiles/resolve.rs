//! From chunks to the files that a profile names, and back.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use sluice_layer::Profile;
use sluice_layer::profile::Read;

use crate::erofs::{Error, Extent, Image};
use crate::layer_dir::{ChunkId, LayerDir};

/// What a profile's layer number `layer` read: the chunks as ranges of files.
/// A chunk that no file of the tree holds is left out.
pub fn reads(
    dir: &LayerDir,
    layer: usize,
    chunks: &[(ChunkId, Duration)],
) -> Result<Vec<Read>, Error> {
    let records = chunks.iter().map(|&(chunk, _)| dir.chunks().get(chunk));
    let records: Vec<_> = records.collect();
    let mut by_offset: Vec<usize> = (0..records.len()).collect();
    by_offset.sort_unstable_by_key(|&index| records[index].data_offset);
    let mut found: Vec<Option<Read>> = vec![None; records.len()];
    Image::open(&dir.meta_path())?.files(|path, extent| {
        let end = extent.offset + extent.size;
        let first = by_offset.partition_point(|&i| records[i].data_offset < extent.offset);
        let mut shared: Option<Arc<[u8]>> = None;
        for &index in &by_offset[first..] {
            let record = &records[index];
            if record.data_offset >= end {
                break;
            }
            // Of a file with several names, one is as good as another.
            if found[index].is_none() {
                found[index] = Some(Read {
                    layer,
                    path: Arc::clone(shared.get_or_insert_with(|| Arc::from(path))),
                    offset: record.data_offset - extent.offset,
                    len: u64::from(record.size),
                    at: chunks[index].1,
                    starts: 1,
                    unit: Some(record.unit),
                });
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(found.into_iter().flatten().collect())
}

/// For each read of a layer, in their order, the one chunk that it is. None
/// where it is not exactly one.
pub fn exact_chunks(dir: &LayerDir, profile: &Profile) -> Result<Vec<Option<ChunkId>>, Error> {
    let mut extents = Extents::new(dir)?;
    let reads = profile.reads_of(dir.identity().digest);
    reads
        .map(|read| {
            let Some((offset, _)) = extents.range(read)? else {
                return Ok(None);
            };
            let chunk = dir.chunks().overlapping(offset, 1).next();
            Ok(chunk.filter(|&chunk| {
                let record = dir.chunks().get(chunk);
                record.data_offset == offset && u64::from(record.size) == read.len
            }))
        })
        .collect()
}

/// The chunks of a layer that the profile names, each once, with the time of
/// first need and in its order. What the layer does not hold is passed over: a profile may be
/// of another version of the image, or made up.
pub fn chunks(dir: &LayerDir, profile: &Profile) -> Result<Vec<(ChunkId, Duration)>, Error> {
    let mut extents = Extents::new(dir)?;
    let mut seen = HashSet::new();
    let mut order = Vec::new();
    for read in profile.reads_of(dir.identity().digest) {
        if let Some((offset, len)) = extents.range(read)? {
            let overlapping = dir.chunks().overlapping(offset, len);
            let new = overlapping.filter(|chunk| seen.insert(*chunk));
            order.extend(new.map(|chunk| (chunk, read.at)));
        }
    }
    Ok(order)
}

/// Where files of a layer lie in its data, each looked up once.
struct Extents {
    image: Image,
    known: HashMap<Arc<[u8]>, Option<Extent>>,
}

impl Extents {
    fn new(dir: &LayerDir) -> Result<Self, Error> {
        Ok(Self {
            image: Image::open(&dir.meta_path())?,
            known: HashMap::new(),
        })
    }

    /// Offset and length in the data of what was read, if the layer has it.
    fn range(&mut self, read: &Read) -> Result<Option<(u64, u64)>, Error> {
        let extent = match self.known.get(&read.path) {
            Some(extent) => *extent,
            None => {
                let extent = self.image.extent_of(&read.path)?;
                self.known.insert(Arc::clone(&read.path), extent);
                extent
            }
        };
        let within = extent.filter(|extent| read.offset < extent.size);
        Ok(within.map(|extent| {
            let len = read.len.min(extent.size - read.offset);
            (extent.offset + read.offset, len)
        }))
    }
}
