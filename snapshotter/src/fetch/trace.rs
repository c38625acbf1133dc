//! What is read of one layer, in the order of first need.
//!
//! Reads are noted when they are asked for, present or not, so that neither a
//! prefetch nor the download counts and the order is that of need.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::LazyLayer;
use crate::layer_dir::ChunkId;

/// Chunks noted of one layer at most: 1 GiB in pieces of 64 KiB. With the bits,
/// a layer of 100,000 chunks takes 210 KB while it is recorded.
const MOST: usize = 16 << 10;

/// Notes which chunks of one layer are read.
#[derive(Debug)]
pub(super) struct Trace {
    /// How many record: asked on every read.
    recorders: AtomicU32,
    /// Chunks that are noted already.
    seen: Box<[AtomicU64]>,
    log: Mutex<Log>,
}

#[derive(Debug)]
struct Log {
    entries: Vec<(ChunkId, u32)>,
    /// What the entries' milliseconds count from.
    began: Instant,
}

impl Trace {
    pub(super) fn new(chunks: u32) -> Self {
        Self {
            recorders: AtomicU32::new(0),
            seen: (0..chunks.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect(),
            log: Mutex::new(Log {
                entries: Vec::new(),
                began: Instant::now(),
            }),
        }
    }

    /// Whether anybody records: asked on every read.
    pub(super) fn is_active(&self) -> bool {
        self.recorders.load(Ordering::Relaxed) > 0
    }

    /// Notes that chunks are read now.
    pub(super) fn note(&self, chunks: impl Iterator<Item = ChunkId>) {
        for chunk in chunks {
            let bit = 1 << (chunk.index() % 64);
            let word = &self.seen[chunk.index() / 64];
            if word.load(Ordering::Relaxed) & bit != 0
                || word.fetch_or(bit, Ordering::Relaxed) & bit != 0
            {
                continue;
            }
            let mut log = self.log.lock();
            if log.entries.len() < MOST {
                let at = u32::try_from(log.began.elapsed().as_millis()).unwrap_or(u32::MAX);
                log.entries.push((chunk, at));
            }
        }
    }

    /// Notes everything that is read from now on, also what was before.
    fn begin(&self) -> (usize, Instant) {
        let mut log = self.log.lock();
        let now = Instant::now();
        if self.recorders.fetch_add(1, Ordering::Relaxed) == 0 {
            log.began = now;
        }
        for word in &self.seen {
            word.store(0, Ordering::Relaxed);
        }
        (log.entries.len(), now)
    }

    fn end(&self) {
        let mut log = self.log.lock();
        if self.recorders.fetch_sub(1, Ordering::Relaxed) == 1 {
            log.entries = Vec::new();
        }
    }
}

/// Records what is read of a layer until it is dropped. Several recordings of
/// one layer do not disturb each other.
#[derive(Debug)]
pub struct Recording {
    layer: Arc<LazyLayer>,
    /// The log's entries before these are of others.
    from: usize,
    began: Instant,
}

impl Recording {
    pub(super) fn begin(layer: Arc<LazyLayer>) -> Self {
        let (from, began) = layer.trace().begin();
        Self { layer, from, began }
    }

    /// The layer.
    pub fn layer(&self) -> &Arc<LazyLayer> {
        &self.layer
    }

    /// How many chunks were noted, those of others included: it grows while
    /// anything new is read.
    pub fn noted(&self) -> usize {
        self.layer.trace().log.lock().entries.len()
    }

    /// The chunks that were read since it began, each once and when it was
    /// first needed, in that order.
    pub fn reads(&self) -> Vec<(ChunkId, Duration)> {
        let log = self.layer.trace().log.lock();
        let late = self.began.duration_since(log.began);
        let mut seen = std::collections::HashSet::new();
        log.entries[self.from.min(log.entries.len())..]
            .iter()
            .filter(|(chunk, _)| seen.insert(*chunk))
            .map(|&(chunk, at)| {
                let at = Duration::from_millis(at.into());
                (chunk, at.saturating_sub(late))
            })
            .collect()
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.layer.trace().end();
    }
}
