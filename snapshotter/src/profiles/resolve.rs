//! From chunks to the files that a profile names, and back.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use sluice_layer::Profile;
use sluice_layer::profile::Read;

use crate::erofs::{Error, Image};
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
                });
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(found.into_iter().flatten().collect())
}

/// The chunks of a layer that the profile names, each once, in the order of
/// first need. What the layer does not hold is passed over: a profile may be
/// of another version of the image, or made up.
pub fn chunks(dir: &LayerDir, profile: &Profile) -> Result<Vec<ChunkId>, Error> {
    let mut extents = HashMap::new();
    let mut seen = HashSet::new();
    let mut order = Vec::new();
    let image = Image::open(&dir.meta_path())?;
    for read in profile.reads_of(dir.identity().digest) {
        let extent = match extents.get(&read.path) {
            Some(extent) => *extent,
            None => {
                let extent = image.extent_of(&read.path)?;
                extents.insert(Arc::clone(&read.path), extent);
                extent
            }
        };
        let Some(extent) = extent.filter(|extent| read.offset < extent.size) else {
            continue;
        };
        let len = read.len.min(extent.size - read.offset);
        let overlapping = dir.chunks().overlapping(extent.offset + read.offset, len);
        order.extend(overlapping.filter(|chunk| seen.insert(*chunk)));
    }
    Ok(order)
}
