//! From the offsets in a TOC to the units of its blob.

use super::error::TocError;
use super::{Chunk, ChunkSource};

/// Gives every chunk's unit its size: to the next boundary (an offset that
/// any entry names, or the end of the chunks), or to what its chunks can take
/// at most. Refuses chunks that overlap in part.
pub(super) fn assign(
    chunks: &mut [Chunk],
    mut boundaries: Vec<u64>,
    chunks_end: u64,
) -> Result<(), TocError> {
    boundaries.push(chunks_end);
    boundaries.sort_unstable();
    boundaries.dedup();
    let mut last = 0;
    let mut position = |offset: u64| {
        // Most chunks lie in the order of the blob.
        if boundaries.get(last) != Some(&offset) {
            last = match boundaries.get(last + 1) {
                Some(next) if *next == offset => last + 1,
                _ => boundaries.partition_point(|boundary| *boundary < offset),
            };
        }
        last
    };

    // Bytes decoded and chunks, of the unit at each boundary.
    let mut units = vec![(0u64, 0u32); boundaries.len()];
    for chunk in &*chunks {
        if let ChunkSource::Blob { unit, inner_offset } = chunk.source {
            let (decoded, sharing) = &mut units[position(unit.offset)];
            *decoded = (*decoded).max(inner_offset + chunk.size);
            *sharing += 1;
        }
    }
    let mut shared = Vec::new();
    for (index, chunk) in chunks.iter_mut().enumerate() {
        if let ChunkSource::Blob { unit, inner_offset } = &mut chunk.source {
            let at = position(unit.offset);
            let end = boundaries.get(at + 1).copied().unwrap_or(chunks_end);
            let (decoded, sharing) = units[at];
            unit.size = (end - unit.offset).min(most_compressed(decoded));
            if sharing > 1 {
                shared.push((unit.offset, *inner_offset, chunk.size, index));
            }
        }
    }
    shared.sort_unstable();
    for pair in shared.windows(2) {
        let [
            (unit, inner, size, first),
            (next_unit, next_inner, next_size, second),
        ] = *pair
        else {
            continue;
        };
        let same =
            (inner, size, chunks[first].digest) == (next_inner, next_size, chunks[second].digest);
        if unit == next_unit && next_inner < inner + size && !same {
            return Err(TocError::OverlappingChunks { offset: unit });
        }
    }
    Ok(())
}

/// A generous bound on the compressed size of `decoded` bytes. Encoders store
/// what they cannot compress, with some bytes a block; what a unit holds
/// beyond this is of no use to its chunks.
fn most_compressed(decoded: u64) -> u64 {
    decoded + decoded / 4 + (128 << 10)
}
