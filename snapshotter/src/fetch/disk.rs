//! A layer's dealings with its disk, when the disk does not do as it is told.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use sluice_layer::VerifiedChunk;

use super::layer::LazyLayer;
use super::{FetchError, Unstored};
use crate::layer_dir::{ChunkId, Verdict};

/// How often a read is tried anew when what was fetched for it is gone again.
const READS: usize = 5;

/// A chunk that could not be read so often is not stored any more.
const BAD: u32 = 2;

impl LazyLayer {
    /// Stores a chunk, if the disk takes it.
    pub(super) fn store(&self, chunk: ChunkId, bytes: &VerifiedChunk<'_>) -> bool {
        let bad = self
            .unreadable
            .lock()
            .get(&chunk)
            .is_some_and(|&n| n >= BAD);
        if bad {
            return false;
        }
        match self.dir.store(chunk, bytes) {
            Ok(()) => {
                self.engine.storage().worked();
                true
            }
            Err(error) => {
                self.engine.storage().failed(&self.dir.data_path(), &error);
                false
            }
        }
    }

    /// The bytes of a chunk that was not stored, which are kept for a moment.
    pub(super) fn keep_unstored(&self, chunk: ChunkId, bytes: &VerifiedChunk<'_>) -> Bytes {
        let bytes = Bytes::copy_from_slice(bytes);
        let number = self.dir.identity().number;
        self.engine.storage().keep(number, chunk, bytes.clone());
        bytes
    }

    /// What is kept of a part of `data`.
    pub(super) fn kept_unstored(&self, offset: u64, len: u64) -> Unstored {
        let number = self.dir.identity().number;
        let mut unstored = Unstored::default();
        for chunk in self.dir.chunks().overlapping(offset, len) {
            if !self.dir.present().contains(chunk)
                && let Some(bytes) = self.engine.storage().kept(number, chunk)
            {
                unstored.add(chunk, bytes);
            }
        }
        unstored
    }

    /// The disk has not given back a part of `data`: it is fetched again.
    pub(super) fn unreadable(&self, offset: u64, len: u64, error: &io::Error) {
        // Of a file that was cut short, more than this is gone.
        if error.kind() == io::ErrorKind::UnexpectedEof && self.dir.restore().is_ok() {
            return;
        }
        let mut first = false;
        for chunk in self.dir.chunks().overlapping(offset, len) {
            self.dir.take_back(chunk);
            let mut unreadable = self.unreadable.lock();
            let count = unreadable.entry(chunk).or_default();
            *count += 1;
            first |= *count == 1;
        }
        if first {
            tracing::warn!(
                layer = %self.digest(),
                "cannot read {offset}..{} of {}: {error}; it is fetched again",
                offset + len,
                self.dir.data_path().display(),
            );
        }
    }

    /// Verifies what is only claimed to be present in a part of `data`.
    pub(super) async fn settle(self: &Arc<Self>, offset: u64, len: u64) {
        let claimed = self.dir.claimed();
        if claimed.count() == 0 {
            return;
        }
        let chunks: Vec<ChunkId> = self
            .dir
            .chunks()
            .overlapping(offset, len)
            .filter(|&chunk| claimed.contains(chunk))
            .collect();
        if chunks.is_empty() {
            return;
        }
        let layer = Arc::clone(self);
        let verified = tokio::task::spawn_blocking(move || {
            for chunk in chunks {
                layer.verify(chunk, false);
            }
        });
        let _ = verified.await;
    }

    /// Verifies a chunk, and says what is wrong with it. Blocks.
    pub fn verify(&self, chunk: ChunkId, drop_cache: bool) -> Verdict {
        let verdict = self.dir.verify(chunk, drop_cache);
        let what = match &verdict {
            Verdict::Absent | Verdict::Good => return verdict,
            Verdict::Wrong => "is not what was stored".to_owned(),
            Verdict::Unreadable(error) => format!("cannot be read: {error}"),
        };
        let record = self.dir.chunks().get(chunk);
        let path = self.path_at(record.data_offset);
        tracing::warn!(
            layer = %self.digest(),
            path = %path.display(),
            "{}..{} of {} {what}; it is fetched again",
            record.data_offset,
            record.data_end(),
            self.dir.data_path().display(),
        );
        verdict
    }

    /// The bytes of a part of `data`, from wherever they can be had.
    pub(super) async fn fetch_and_read(
        self: &Arc<Self>,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, FetchError> {
        let mut why = "what was fetched is gone again and again".to_owned();
        for _ in 0..READS {
            let unstored = self.fetch(offset, len as u64).await?;
            // The buffer exists only now: a reader that waits costs no memory.
            let mut buffer = vec![0; len];
            match self.put_together(offset, &mut buffer, &unstored) {
                Ok(true) => {
                    self.note_read(offset, len as u64);
                    return Ok(buffer);
                }
                Ok(false) => {}
                Err(error) => {
                    self.unreadable(offset, len as u64, &error);
                    why = error.to_string();
                }
            }
        }
        Err(FetchError::Disk {
            layer: self.digest(),
            why,
        })
    }

    /// Fills a buffer of zeros from `data` and from what is not there. The
    /// answer is no when a chunk is in neither.
    fn put_together(
        &self,
        offset: u64,
        buffer: &mut [u8],
        unstored: &Unstored,
    ) -> io::Result<bool> {
        let end = offset + buffer.len() as u64;
        let table = self.dir.chunks();
        // What lies between chunks is zeros.
        for chunk in table.overlapping(offset, buffer.len() as u64) {
            let record = table.get(chunk);
            let (from, to) = (record.data_offset.max(offset), record.data_end().min(end));
            let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            if let Some(bytes) = unstored.get(chunk) {
                let start = (from - record.data_offset) as usize;
                part.copy_from_slice(&bytes[start..start + part.len()]);
            } else if self.dir.present().contains(chunk) {
                self.dir.read_at(part, from)?;
            } else {
                return Ok(false);
            }
        }
        Ok(self.dir.looked_up_right())
    }
}
