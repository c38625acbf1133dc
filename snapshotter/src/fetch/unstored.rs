//! Verified bytes that the disk does not take: they go to whoever waits for
//! them, and are kept for a moment for those who read on.

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use crate::layer_dir::{ChunkId, ChunkTable};

/// Chunks that are not in `data`.
#[derive(Debug, Clone, Default)]
pub struct Unstored(Vec<(ChunkId, Bytes)>);

impl Unstored {
    pub(super) fn add(&mut self, chunk: ChunkId, bytes: Bytes) {
        self.0.push((chunk, bytes));
    }

    pub(super) fn get(&self, chunk: ChunkId) -> Option<&Bytes> {
        let mut all = self.0.iter();
        all.find_map(|(id, bytes)| (*id == chunk).then_some(bytes))
    }

    /// Takes over what overlaps `offset..offset + len` of `data`.
    pub(super) fn extend(&mut self, more: Self, table: &ChunkTable, offset: u64, len: u64) {
        for (chunk, bytes) in more.0 {
            let record = table.get(chunk);
            let overlaps = record.data_offset < offset + len && record.data_end() > offset;
            if overlaps && self.get(chunk).is_none() {
                self.add(chunk, bytes);
            }
        }
    }
}

/// How the disk takes what is fetched, for all layers of a node.
#[derive(Debug)]
pub(super) struct Storage {
    failing: AtomicBool,
    /// What was told already.
    told: Mutex<HashSet<String>>,
    kept: Mutex<Kept>,
}

/// The last chunks that were not stored, by layer and position.
#[derive(Debug)]
struct Kept {
    chunks: LruCache<(u64, ChunkId), Bytes>,
    bytes: usize,
    limit: usize,
}

impl Storage {
    /// Keeps up to `limit` bytes of what is not stored.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            failing: AtomicBool::new(false),
            told: Mutex::default(),
            kept: Mutex::new(Kept {
                chunks: LruCache::unbounded(),
                bytes: 0,
                limit: usize::try_from(limit).unwrap_or(usize::MAX),
            }),
        }
    }

    /// Whether the last bytes were not taken.
    pub(super) fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// Lets those try again who hold back while it fails.
    pub(super) fn try_again(&self) {
        self.failing.store(false, Ordering::Relaxed);
    }

    /// Bytes were not taken.
    pub(super) fn failed(&self, path: &Path, error: &io::Error) {
        self.failing.store(true, Ordering::Relaxed);
        if self.told.lock().insert(error.to_string()) {
            let remedy = match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    "; free space on that file system"
                }
                _ => "",
            };
            tracing::warn!(
                "cannot store content in {}: {error}; until that works, it is fetched whenever it \
                 is read, and nothing is fetched ahead{remedy}",
                path.display()
            );
        }
    }

    /// Bytes were taken.
    pub(super) fn worked(&self) {
        // Asked for every chunk: one load when all is well.
        if !self.failing.swap(false, Ordering::Relaxed) && self.told.lock().is_empty() {
            return;
        }
        let mut kept = self.kept.lock();
        kept.chunks.clear();
        kept.bytes = 0;
        drop(kept);
        if !std::mem::take(&mut *self.told.lock()).is_empty() {
            tracing::info!("content is stored again");
        }
    }

    pub(super) fn keep(&self, layer: u64, chunk: ChunkId, bytes: Bytes) {
        let mut kept = self.kept.lock();
        kept.bytes += bytes.len();
        if let Some(former) = kept.chunks.put((layer, chunk), bytes) {
            kept.bytes -= former.len();
        }
        while kept.bytes > kept.limit
            && let Some((_, oldest)) = kept.chunks.pop_lru()
        {
            kept.bytes -= oldest.len();
        }
    }

    pub(super) fn kept(&self, layer: u64, chunk: ChunkId) -> Option<Bytes> {
        self.kept.lock().chunks.get(&(layer, chunk)).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_within_its_bound() {
        let storage = Storage::new(100);
        let at = |n| (7, ChunkId::at(n));
        let put = |n: u32, len| {
            let (layer, chunk) = at(n);
            storage.keep(layer, chunk, vec![0; len].into());
        };
        let has = |n| storage.kept(at(n).0, at(n).1).is_some();
        put(1, 40);
        put(2, 40);
        put(2, 50);
        assert!(has(1) && has(2));
        put(3, 30);
        assert_eq!([has(1), has(2), has(3)], [false, true, true]);
        put(4, 101);
        assert_eq!([has(2), has(3), has(4)], [false; 3]);
        storage.failed(Path::new("/x"), &io::Error::from_raw_os_error(28));
        assert!(storage.is_failing());
        storage.worked();
        assert!(!storage.is_failing());
    }
}
