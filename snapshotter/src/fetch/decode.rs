//! From a unit's compressed bytes to verified chunks in `data`.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use sluice_layer::{DecodeError, Wanted, decode_unit};

use super::inflight::Claim;
use super::layer::LazyLayer;
use super::{FetchError, Priority};
use crate::layer_dir::{ChunkId, LayerDir};

/// A unit that has arrived.
pub(super) struct Arrived {
    pub(super) claim: Claim,
    pub(super) bytes: Bytes,
    /// Whether it has been fetched before and was wrong.
    pub(super) again: bool,
}

/// Decodes units, tells who waits, and returns those that are to be fetched
/// once more because their bytes were wrong.
pub(super) fn decode_all(
    layer: &LazyLayer,
    priority: Priority,
    arrived: Vec<Arrived>,
) -> Vec<Claim> {
    let mut wrong = Vec::new();
    for Arrived {
        claim,
        bytes,
        again,
    } in arrived
    {
        let unit = claim.unit();
        let digest = layer.digest();
        match decode_one(layer.dir(), unit.offset, &bytes) {
            Ok(()) => {
                layer.count_decoded(priority, bytes.len() as u64);
                claim.finish(Ok(()));
            }
            Err(Failure::Content(error)) if !again => {
                tracing::warn!(
                    layer = %digest,
                    "bytes {}..{} of the blob have to be fetched once more: {error}",
                    unit.offset,
                    unit.offset + unit.size
                );
                wrong.push(claim);
            }
            Err(Failure::Content(error)) => claim.finish(Err(FetchError::Corrupt {
                layer: digest,
                start: unit.offset,
                end: unit.offset + unit.size,
                why: error.to_string(),
            })),
            Err(Failure::Disk(source)) => claim.finish(Err(FetchError::Disk {
                layer: digest,
                source: Arc::new(source),
            })),
        }
    }
    wrong
}

enum Failure {
    Content(DecodeError),
    Disk(io::Error),
}

fn decode_one(dir: &LayerDir, unit_offset: u64, bytes: &[u8]) -> Result<(), Failure> {
    let missing: Vec<ChunkId> = dir
        .chunks()
        .of_unit(unit_offset)
        .filter(|&chunk| !dir.present().contains(chunk))
        .collect();
    let mut wanted: Vec<(Wanted, ChunkId)> = missing
        .into_iter()
        .map(|chunk| {
            let record = dir.chunks().get(chunk);
            let wanted = Wanted {
                inner_offset: u64::from(record.inner_offset),
                size: u64::from(record.size),
                digest: record.digest,
            };
            (wanted, chunk)
        })
        .collect();
    wanted.sort_by_key(|(wanted, _)| (wanted.inner_offset, wanted.size, wanted.digest));
    let (wanted, chunks): (Vec<Wanted>, Vec<ChunkId>) = wanted.into_iter().unzip();
    let mut stored = Ok(());
    decode_unit(dir.identity().format, bytes, &wanted, |index, chunk| {
        if stored.is_ok() {
            stored = dir.store(chunks[index], &chunk);
        }
    })
    .map_err(Failure::Content)?;
    stored.map_err(Failure::Disk)
}
