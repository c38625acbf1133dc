//! Taking a chunk from another layer's directory.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl, opcode};
use sluice_layer::verify_chunk;
use sluice_oci::Digest;

use super::placement::BLOCK_SIZE;
use super::{CHUNKS, ChunkId, ChunkTable, DATA, Error, LayerDir, PRESENT, Present};

/// Sharing the extents of less costs more than it saves: every range becomes
/// an extent of its own.
const SHARED: u64 = 16 << 10;

/// Argument of `FICLONERANGE`, see `ioctl_ficlonerange(2)`.
#[repr(C)]
struct CloneRange {
    from: i64,
    from_offset: u64,
    len: u64,
    to_offset: u64,
}

const CLONE_RANGE: rustix::ioctl::Opcode = opcode::write::<CloneRange>(0x94, 13);

impl LayerDir {
    /// Opens the directory only to read what it holds: nothing is mended in
    /// it, whoever else has it open. Its chunk table is compared with its
    /// checksum all the same: one on a bad sector would kill the process that
    /// maps it.
    pub fn peek(path: &Path, digest: Digest) -> Result<Self, Error> {
        let (identity, chunks) = ChunkTable::open(&path.join(CHUNKS))?;
        if identity.digest != digest {
            let what = format!("it describes layer {}", identity.digest);
            return Err(Error::damaged(&path.join(CHUNKS), what));
        }
        // Before the bits: content that is evicted in between is gone for
        // both, or its bits stand for the file that had it.
        let data = path.join(DATA);
        let file = File::open(&data).map_err(|e| Error::io("open", &data, e))?;
        let present = match fs::exists(path.join(PRESENT)) {
            Ok(true) => Present::load(&path.join(PRESENT), &digest, chunks.len())?,
            _ => Present::empty(chunks.len()),
        };
        // Nobody proves it: that is for whoever opens it.
        Ok(Self::with(path, identity, chunks, file, present, None))
    }

    /// Whether the directory says that it has these bytes. What is only
    /// claimed counts as well, since whoever takes them verifies them.
    pub fn claims(&self, chunk: ChunkId, digest: Digest, size: u32) -> bool {
        self.describes(chunk, digest, size)
            && (self.present.contains(chunk) || self.claimed.contains(chunk))
    }

    /// Whether the table has such a chunk at this position.
    pub fn describes(&self, chunk: ChunkId, digest: Digest, size: u32) -> bool {
        chunk.index() < self.chunks.len() as usize && {
            let record = self.chunks.get(chunk);
            record.digest == digest && record.size == size
        }
    }

    /// Shares a chunk's bytes with another directory, where the file system
    /// can do that: they are there once then. Says whether the chunk is
    /// present; otherwise its bytes have to be written. Blocks.
    pub fn share(&self, chunk: ChunkId, from: &Self, theirs: ChunkId) -> io::Result<bool> {
        let (ours, theirs) = (self.chunks.get(chunk), from.chunks.get(theirs));
        let len = u64::from(ours.size) / BLOCK_SIZE * BLOCK_SIZE;
        let aligned = |offset: u64| offset.is_multiple_of(BLOCK_SIZE);
        if len < SHARED
            || !aligned(ours.data_offset)
            || !aligned(theirs.data_offset)
            || !self.shares.load(Ordering::Relaxed)
        {
            return Ok(false);
        }
        let mut bytes = vec![0; ours.size as usize];
        let (shared, rest) = bytes.split_at_mut(len as usize);
        from.data.read_exact_at(rest, theirs.data_offset + len)?;
        self.whole()?;
        // Nobody may store the chunk between the look and the end: the shared
        // bytes are in place before they are verified.
        let _alone = self.storing.write();
        if self.present.contains(chunk) {
            return Ok(true);
        }
        let range = CloneRange {
            from: i64::from(from.data.as_raw_fd()),
            from_offset: theirs.data_offset,
            len,
            to_offset: ours.data_offset,
        };
        if let Err(error) = clone_range(&self.data, range) {
            self.shares.store(false, Ordering::Relaxed);
            return match error {
                Errno::OPNOTSUPP | Errno::NOTTY | Errno::XDEV | Errno::INVAL | Errno::NOSYS => {
                    Ok(false)
                }
                error => Err(error.into()),
            };
        }
        // What is on the disk counts, not what the other file's cache holds.
        self.data.read_exact_at(shared, ours.data_offset)?;
        if verify_chunk(&bytes, ours.digest).is_none() {
            return Ok(false);
        }
        let rest = &bytes[len as usize..];
        self.data.write_all_at(rest, ours.data_offset + len)?;
        self.present.insert(chunk);
        self.claimed.remove(chunk);
        Ok(true)
    }
}

fn clone_range(to: &File, range: CloneRange) -> Result<(), Errno> {
    // SAFETY: the kernel reads a `file_clone_range`, whose layout this is, and
    // writes nothing back; the descriptor in it is open for as long as the
    // caller's reference to its directory.
    #[allow(unsafe_code)]
    unsafe {
        ioctl(to, Setter::<CLONE_RANGE, CloneRange>::new(range))
    }
}
