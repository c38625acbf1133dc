//! Where each file's content lies in a layer's `data` file.

use sluice_layer::{ChunkSource, NodeId, NodeKind, Toc};

/// Alignment of every file in `data`, and the block size of `meta.erofs`.
pub const BLOCK_SIZE: u64 = 4096;

/// The extent of every regular file in `data`.
///
/// Files lie in the order of their first bytes in the blob, so that fetching
/// the blob in sequence writes `data` in sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    starts: Vec<u64>,
    data_size: u64,
}

impl Placement {
    /// Places the files of `toc`. Deterministic: the same TOC gives the same
    /// placement.
    pub fn new(toc: &Toc) -> Self {
        let mut files: Vec<(u64, u32, u64)> = Vec::new();
        for (index, node) in (0u32..).zip(toc.nodes()) {
            let NodeKind::Regular(content) = &node.kind else {
                continue;
            };
            if content.size == 0 {
                continue;
            }
            let first = toc.chunks()[content.chunks.start as usize].source;
            let position = match first {
                ChunkSource::Blob { unit, .. } => unit.offset,
                ChunkSource::Zeros => u64::MAX,
            };
            files.push((position, index, content.size));
        }
        files.sort_unstable();
        let mut starts = vec![0; toc.nodes().len()];
        let mut end = 0;
        for (_, index, size) in files {
            starts[index as usize] = end;
            end += size.next_multiple_of(BLOCK_SIZE);
        }
        Self {
            starts,
            data_size: end,
        }
    }

    /// Offset in `data` of a regular file's first byte, a multiple of
    /// [`BLOCK_SIZE`]. 0 for anything without content.
    pub fn start(&self, file: NodeId) -> u64 {
        self.start_at(file.index())
    }

    /// The same for the file at a position in [`Toc::nodes`].
    pub(super) fn start_at(&self, index: usize) -> u64 {
        self.starts[index]
    }

    /// Size of `data` in bytes, a multiple of [`BLOCK_SIZE`].
    pub fn data_size(&self) -> u64 {
        self.data_size
    }
}
