//! From a unit's compressed bytes to verified chunks in `data`.

use bytes::Bytes;
use sluice_layer::{DecodeError, Decoded, Format, Unit, Wanted, decode_unit};

use super::inflight::Claim;
use super::layer::LazyLayer;
use super::{FetchError, Priority, Unstored};
use crate::layer_dir::{ChunkId, LONGEST_PIECE, LayerDir, Piece};

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
    let mut rests = Vec::new();
    for Arrived {
        claim,
        bytes,
        again,
    } in arrived
    {
        let unit = claim.unit();
        let digest = layer.digest();
        crash_point!("fill.arrived");
        match decode_one(layer, unit.offset, &bytes, claim.is_awaited()) {
            Ok((unstored, decoded)) => {
                layer.count_decoded(priority, bytes.len() as u64);
                claim.finish(Ok(unstored));
                crash_point!("fill.told");
                rests.extend(rest_of(layer.dir(), unit, decoded).map(|rest| (unit.offset, rest)));
            }
            Err(error) if !again => {
                tracing::warn!(
                    layer = %digest,
                    "bytes {}..{} of the blob have to be fetched once more: {error}",
                    unit.offset,
                    unit.offset + unit.size
                );
                wrong.push(claim);
            }
            Err(error) => claim.finish(Err(FetchError::Corrupt {
                layer: digest,
                start: unit.offset,
                end: unit.offset + unit.size,
                why: error.to_string(),
            })),
        }
    }
    keep(layer, &rests);
    wrong
}

/// What the tar has between the chunks of a unit, if that is still wanted. More
/// than that is fetched by itself.
fn rest_of(dir: &LayerDir, unit: Unit, decoded: Decoded<'_>) -> Option<Vec<u8>> {
    if !dir.rest().is_needed() || !dir.is_span(unit.offset, unit.size) {
        return None;
    }
    let chunks = dir.chunks_in(unit.offset);
    let ranges: Vec<_> = chunks.into_iter().map(|(range, _)| range).collect();
    decoded.rest(&ranges, LONGEST_PIECE)
}

fn keep(layer: &LazyLayer, rests: &[(u64, Vec<u8>)]) {
    let pieces = rests.iter().map(|(span, bytes)| Piece {
        span: *span,
        at: 0,
        last: true,
        bytes,
    });
    let pieces: Vec<Piece<'_>> = pieces.collect();
    if let Err(error) = layer.dir().rest().append(&pieces, None) {
        // It is fetched again when all else is there.
        tracing::debug!(layer = %layer.digest(), "what lies between files is not kept: {error}");
    }
}

/// Bytes of memory that decoding a unit takes at most: a small one may hold
/// much.
pub(super) fn decoded_size(dir: &LayerDir, unit: Unit) -> u64 {
    const SURPLUS: u64 = 1 << 20;
    const PER_CHUNK: u64 = 128;
    let mut needed = SURPLUS;
    let mut chunks = 0;
    for chunk in dir.chunks().of_unit(unit.offset) {
        let record = dir.chunks().get(chunk);
        needed = needed.max(SURPLUS + u64::from(record.inner_offset) + u64::from(record.size));
        chunks += PER_CHUNK;
    }
    // A decompressor that does not know the size holds a window as well.
    let window = match dir.identity().format {
        Format::Estargz => 0,
        Format::ZstdChunked => needed,
    };
    needed + window + chunks
}

/// Stores the unit's chunks that are missing, and returns those that could not
/// be, if somebody waits for them, and the unit.
fn decode_one<'a>(
    layer: &LazyLayer,
    unit_offset: u64,
    bytes: &'a [u8],
    awaited: bool,
) -> Result<(Unstored, Decoded<'a>), DecodeError> {
    let dir = layer.dir();
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
    let mut unstored = Unstored::default();
    let decoded = decode_unit(dir.identity().format, bytes, &wanted, |index, chunk| {
        layer.look_into(chunks[index], &chunk, awaited);
        if !layer.store(chunks[index], &chunk) && awaited {
            unstored.add(chunks[index], layer.keep_unstored(chunks[index], &chunk));
        }
    })?;
    Ok((unstored, decoded))
}
