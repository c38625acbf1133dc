//! Fetching ahead of readers that read on and on.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::layer_dir::{ChunkId, ChunkTable};

/// Sequential readers of one layer that are followed at once.
const STREAMS: usize = 8;
/// The first window, in bytes. It doubles each time a reader catches up.
const FIRST_WINDOW: u64 = 512 << 10;

/// Follows the readers of one layer.
#[derive(Debug)]
pub(super) struct ReadAhead {
    /// Chunks that, when read, call for the next window.
    marks: Box<[AtomicU64]>,
    marked: AtomicU64,
    streams: Mutex<Vec<Stream>>,
    longest: u64,
}

/// One reader that reads on.
#[derive(Debug, Clone, Copy)]
struct Stream {
    /// The last chunk that was fetched for it.
    last: ChunkId,
    window: u64,
}

impl ReadAhead {
    pub(super) fn new(chunks: u32, longest: u64) -> Self {
        Self {
            marks: (0..chunks.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            marked: AtomicU64::new(0),
            streams: Mutex::default(),
            longest,
        }
    }

    /// Whether any chunk is marked: asked on every read.
    pub(super) fn is_active(&self) -> bool {
        self.marked.load(Ordering::Relaxed) > 0
    }

    /// Whether the chunk was marked; it is no longer.
    pub(super) fn take_mark(&self, chunk: ChunkId) -> bool {
        let bit = 1 << (chunk.index() % 64);
        let word = &self.marks[chunk.index() / 64];
        if word.load(Ordering::Relaxed) & bit == 0 {
            return false;
        }
        let taken = word.fetch_and(!bit, Ordering::Relaxed) & bit != 0;
        if taken {
            self.marked.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    fn mark(&self, chunk: ChunkId) {
        let bit = 1 << (chunk.index() % 64);
        let word = &self.marks[chunk.index() / 64];
        if word.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            self.marked.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A reader has missed chunks up to `last`, beginning with `first`, or has
    /// come to a marked chunk. Returns the chunks of the same file to fetch
    /// beyond, which are none unless it reads on from where it was before.
    pub(super) fn advance(
        &self,
        table: &ChunkTable,
        first: ChunkId,
        last: ChunkId,
        marked: bool,
    ) -> Vec<ChunkId> {
        let mut streams = self.streams.lock();
        let at = streams.iter().position(|stream| {
            let follows = table.next_in_file(stream.last) == Some(first);
            let within = marked && (first..=stream.last).contains(&last) && {
                let span = table.get(stream.last).data_end() - table.get(first).data_offset;
                span <= stream.window.saturating_mul(2).max(FIRST_WINDOW)
            };
            follows || within
        });
        let (start, window) = match at {
            Some(at) => {
                let stream = streams.remove(at);
                (stream.last.max(last), (stream.window * 2).max(FIRST_WINDOW))
            }
            None => (last, 0),
        };
        let window = window.min(self.longest);
        let mut chunks = Vec::new();
        let mut bytes = 0;
        let mut next = start;
        while bytes < window {
            let Some(following) = table.next_in_file(next) else {
                break;
            };
            bytes += u64::from(table.get(following).size);
            chunks.push(following);
            next = following;
        }
        if let Some(&middle) = chunks.get(chunks.len() / 2) {
            self.mark(middle);
        }
        if streams.len() == STREAMS {
            streams.remove(0);
        }
        if table.next_in_file(next).is_some() {
            streams.push(Stream { last: next, window });
        }
        chunks
    }
}
