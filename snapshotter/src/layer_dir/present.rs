//! Which chunks hold verified bytes: a bitmap in memory, and its last durable
//! state in the file `present`.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use sluice_oci::Digest;

use super::error::{Error, Problem};
use super::{ChunkId, PRESENT, PRESENT_DRAFT};

const MAGIC: &[u8; 8] = b"SLPRESNT";
const VERSION: u32 = 1;
const HEADER: usize = 64;

/// A set of chunks.
#[derive(Debug)]
pub struct Present {
    words: Box<[AtomicU64]>,
    chunks: u32,
    count: AtomicU32,
    changes: AtomicU64,
}

impl Present {
    /// No chunk out of `chunks`.
    pub fn empty(chunks: u32) -> Self {
        Self::from_words((0..chunks.div_ceil(64)).map(|_| 0), chunks)
    }

    fn from_words(words: impl Iterator<Item = u64>, chunks: u32) -> Self {
        let mut count = 0;
        let words = words
            .inspect(|word| count += word.count_ones())
            .map(AtomicU64::new)
            .collect();
        Self {
            words,
            chunks,
            count: AtomicU32::new(count),
            changes: AtomicU64::new(0),
        }
    }

    /// Whether the chunk is present. What was written before it was inserted
    /// is visible to the caller.
    pub fn contains(&self, chunk: ChunkId) -> bool {
        let word = self.words[chunk.index() / 64].load(Ordering::Acquire);
        word >> (chunk.index() % 64) & 1 == 1
    }

    /// Adds a chunk whose bytes are written, and says whether it is new.
    pub fn insert(&self, chunk: ChunkId) -> bool {
        let bit = 1 << (chunk.index() % 64);
        let before = self.words[chunk.index() / 64].fetch_or(bit, Ordering::AcqRel);
        let new = before & bit == 0;
        if new {
            self.count.fetch_add(1, Ordering::AcqRel);
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
        new
    }

    /// Takes a chunk back, and says whether it was there.
    pub(crate) fn remove(&self, chunk: ChunkId) -> bool {
        let bit = 1 << (chunk.index() % 64);
        let before = self.words[chunk.index() / 64].fetch_and(!bit, Ordering::AcqRel);
        let was_there = before & bit != 0;
        if was_there {
            self.count.fetch_sub(1, Ordering::AcqRel);
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
        was_there
    }

    /// Grows with every change.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// The chunks that are there now, in order.
    pub fn iter(&self) -> impl Iterator<Item = ChunkId> + '_ {
        (0..self.chunks)
            .map(ChunkId)
            .filter(|&chunk| self.contains(chunk))
    }

    /// How many chunks are present.
    pub fn count(&self) -> u32 {
        self.count.load(Ordering::Acquire)
    }

    /// Whether all are.
    pub fn is_complete(&self) -> bool {
        self.count() == self.chunks
    }

    /// This set and another of the same layer together, as they are now.
    pub(super) fn union(&self, other: &Self) -> Self {
        let words = self.words.iter().zip(&other.words);
        let words = words.map(|(a, b)| a.load(Ordering::Acquire) | b.load(Ordering::Acquire));
        Self::from_words(words, self.chunks)
    }

    /// Reads the file and checks that it belongs to `layer` and to a table of
    /// `chunks` chunks.
    pub(crate) fn load(path: &Path, layer: &Digest, chunks: u32) -> Result<Self, Error> {
        let bytes = fs::read(path).map_err(|e| Error::io("read", path, e))?;
        let damaged = |what: &str| Error::damaged(path, what);
        let Some((header, body)) = bytes.split_at_checked(HEADER) else {
            return Err(damaged("it is cut short"));
        };
        if header[..8] != MAGIC[..] {
            return Err(damaged("it does not begin as a presence map does"));
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap_or([0; 4]));
        if word(8) != VERSION {
            return Err(Error::new(path, Problem::Newer(word(8))));
        }
        if word(60) != libdeflater::crc32(&header[..60]) || word(48) != libdeflater::crc32(body) {
            return Err(damaged("its checksum does not match"));
        }
        let words = chunks.div_ceil(64) as usize;
        if header[16..48] != layer.as_raw()[..] || word(12) != chunks || body.len() != words * 8 {
            return Err(damaged("it belongs to another layer"));
        }
        let words = body
            .chunks_exact(8)
            .map(|w| u64::from_le_bytes(w.try_into().unwrap_or([0; 8])));
        let present = Self::from_words(words, chunks);
        // One too many would make up for one that is missing.
        let last = present
            .words
            .last()
            .map_or(0, |w| w.load(Ordering::Relaxed));
        if !chunks.is_multiple_of(64) && last >> (chunks % 64) != 0 {
            return Err(damaged("it names chunks that do not exist"));
        }
        Ok(present)
    }

    fn encode(&self, layer: &Digest) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.words.len() * 8);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.chunks.to_le_bytes());
        bytes.extend_from_slice(layer.as_raw());
        bytes.resize(HEADER, 0);
        for word in &self.words {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        let body = libdeflater::crc32(&bytes[HEADER..]);
        bytes[48..52].copy_from_slice(&body.to_le_bytes());
        let header = libdeflater::crc32(&bytes[..60]);
        bytes[60..64].copy_from_slice(&header.to_le_bytes());
        bytes
    }

    /// Replaces the file in `directory` at one stroke.
    pub(crate) fn save(&self, directory: &Path, layer: &Digest) -> Result<(), Error> {
        let new = directory.join(PRESENT_DRAFT);
        let path = directory.join(PRESENT);
        let write = || {
            let mut file = File::create(&new)?;
            crash_point!("persist.new-made");
            file.write_all(&self.encode(layer))?;
            crash_point!("persist.new-written");
            file.sync_all()?;
            crash_point!("persist.new-synced");
            fs::rename(&new, &path)?;
            crash_point!("persist.named");
            File::open(directory)?.sync_all()?;
            crash_point!("persist.synced");
            Ok(())
        };
        write().map_err(|e| Error::io("write", &path, e))
    }
}
