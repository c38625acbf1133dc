//! From a layer's content and the bytes between back to its tar.

use std::io;
use std::ops::Range;

use sluice_layer::FOOTER_MAX;

use super::{ChunkId, Identity, LayerDir, RestIndex};

/// Bytes of content read at once.
const AT_ONCE: u64 = 256 << 10;

/// A part of the blob that begins with a unit, or before the first, or with
/// the TOC, and ends where the next begins. Holds all of the tar in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Offset of its first byte in the blob.
    pub start: u64,
    /// Where it ends.
    pub end: u64,
}

impl LayerDir {
    /// The spans of the blob up to `end`, in order. Those of a layer's tar end
    /// with [`Self::tar_end`].
    pub fn spans(&self, end: u64) -> impl Iterator<Item = Span> + '_ {
        let toc = self.identity.toc_offset;
        let units = self.chunks.units_from(0).map(|unit| unit.offset);
        let mut starts = units
            .filter(|&start| start > 0)
            .chain([toc, end])
            .peekable();
        let mut start = 0;
        std::iter::from_fn(move || {
            loop {
                let next = starts.next()?.min(end);
                let span = Span { start, end: next };
                start = start.max(next);
                if span.start < span.end {
                    return Some(span);
                }
            }
        })
    }

    /// Where in the blob the tar ends. That of an eStargz layer has the TOC.
    pub fn tar_end(&self) -> u64 {
        match self.identity.format {
            sluice_layer::Format::Estargz => self.identity.blob_size,
            sluice_layer::Format::ZstdChunked => self.identity.toc_offset,
        }
    }

    /// Keeps the TOC, as the blob stores it, if the tar has it: it was fetched
    /// to make the directory.
    pub fn keep_toc(&self, compressed: &[u8]) -> io::Result<()> {
        let Identity {
            toc_offset,
            blob_size,
            ..
        } = self.identity;
        let end = toc_offset.saturating_add(compressed.len() as u64);
        // Nothing may be left out but a footer, which unpacks to nothing.
        let is_span = end <= blob_size && blob_size - end <= FOOTER_MAX as u64;
        match self.tar_end() > toc_offset && is_span && self.rest.is_needed() {
            true => self.rest.append_stored(toc_offset, compressed),
            false => Ok(()),
        }
    }

    /// Whether the unit at `offset` is a span, so that who decodes it has all
    /// of the tar up to the next.
    pub fn is_span(&self, offset: u64, size: u64) -> bool {
        let next = self.chunks.units_from(offset + 1).next();
        let next = next.map_or(self.identity.toc_offset, |unit| unit.offset);
        offset + size == next
    }

    /// The chunks in a span: their ranges in its uncompressed bytes, in order,
    /// and where they are in `data`. None twice.
    pub fn chunks_in(&self, span: u64) -> Vec<(Range<u64>, ChunkId)> {
        let range = |chunk: &ChunkId| {
            let record = self.chunks.get(*chunk);
            let start = u64::from(record.inner_offset);
            start..start + u64::from(record.size)
        };
        let chunks = self.chunks.of_unit(span);
        let mut chunks: Vec<_> = chunks.map(|chunk| (range(&chunk), chunk)).collect();
        chunks.dedup_by(|b, a| a.0 == b.0);
        chunks
    }

    /// Hands out the layer's tar from its content and `rest`. What is from the
    /// content comes with its offset in `data`; without `content`, zeros stand
    /// for it.
    pub fn put_together(
        &self,
        rest: &mut RestIndex,
        content: bool,
        mut each: impl FnMut(&[u8], Option<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buffer = vec![0; AT_ONCE as usize];
        for span in self.spans(self.tar_end()) {
            let size = rest.size(span.start).ok_or(io::ErrorKind::NotFound)?;
            let (mut position, mut taken) = (0, 0);
            for (range, chunk) in self.chunks_in(span.start) {
                let gap = range.start.saturating_sub(position);
                rest.read(span.start, taken, taken + gap, |bytes| each(bytes, None))?;
                taken += gap;
                let mut at = self.chunks.get(chunk).data_offset;
                let mut left = range.end - range.start;
                while left > 0 {
                    let part = &mut buffer[..left.min(AT_ONCE) as usize];
                    if content {
                        self.read_at(part, at)?;
                    }
                    each(part, Some(at))?;
                    at += part.len() as u64;
                    left -= part.len() as u64;
                }
                position = range.end;
            }
            rest.read(span.start, taken, size, |bytes| each(bytes, None))?;
        }
        Ok(())
    }
}
