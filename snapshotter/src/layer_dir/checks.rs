//! Whether what is on disk still is what was written there.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::Advice;
use sluice_oci::Digest;

use super::chunks::{self, ChunkTable};
use super::{CHUNKS, ChunkId, Error, LayerDir, META};

/// What a look at a chunk's bytes has found.
#[derive(Debug)]
pub enum Verdict {
    /// There are none to be found.
    Absent,
    /// They are what the TOC promises.
    Good,
    /// They are something else.
    Wrong,
    /// The disk does not give them.
    Unreadable(io::Error),
}

impl LayerDir {
    /// Compares all of `meta.erofs` with its checksum.
    pub fn check_meta(&self) -> Result<(), Error> {
        let path = self.meta_path();
        let failed = |e| Error::io("read", &path, e);
        let file = File::open(&path).map_err(|e| Error::io("open", &path, e))?;
        let size = file.metadata().map_err(failed)?.len();
        let meta = self.chunks.meta();
        if size != meta.size {
            let what = format!("it has {size} bytes instead of {}", meta.size);
            return Err(Error::damaged(&path, what));
        }
        let crc = chunks::checksum(&file).map_err(failed)?;
        if meta.crc.is_some_and(|expected| expected != crc) {
            return Err(Error::damaged(&path, "its checksum does not match"));
        }
        Ok(())
    }

    /// Compares `chunks`, as it is on disk now, with its checksums.
    pub fn check_chunks(&self) -> Result<(), Error> {
        let path = self.path.join(CHUNKS);
        let (identity, table) = ChunkTable::open(&path)?;
        if identity != self.identity || !table.is_same(&self.chunks) {
            return Err(Error::damaged(&path, "it is another than the one in use"));
        }
        Ok(())
    }

    /// Compares a chunk that is present, or claimed to be, with its digest.
    /// What is wrong or unreadable is no longer present. `drop_cache` makes
    /// the kernel read it from the disk, where it can.
    pub fn verify(&self, chunk: ChunkId, drop_cache: bool) -> Verdict {
        let claimed = self.claimed.contains(chunk);
        if !claimed && !self.present.contains(chunk) {
            return Verdict::Absent;
        }
        let record = self.chunks.get(chunk);
        let mut bytes = vec![0; record.size as usize];
        if drop_cache {
            let len = std::num::NonZeroU64::new(u64::from(record.size));
            let _ = rustix::fs::fadvise(&self.data, record.data_offset, len, Advice::DontNeed);
        }
        let verdict = match self.data.read_exact_at(&mut bytes, record.data_offset) {
            Ok(()) if Digest::of(&bytes) == record.digest => Verdict::Good,
            Ok(()) => Verdict::Wrong,
            Err(error) => Verdict::Unreadable(error),
        };
        if matches!(verdict, Verdict::Good) {
            // Before the claim goes, so that it is always one or the other.
            self.present.insert(chunk);
            self.claimed.remove(chunk);
        } else {
            self.take_back(chunk);
        }
        verdict
    }

    /// The chunk is not to be read from `data` any more until it is stored
    /// again.
    pub fn take_back(&self, chunk: ChunkId) {
        self.claimed.remove(chunk);
        self.present.remove(chunk);
    }
}

/// Puts the `meta.erofs` and `chunks` of the directory `whole` into the damaged
/// one at `path`, without new inodes: the kernel and this process may have them
/// mounted and mapped. Where `whole` would not describe the content that is
/// there, nothing is touched, and the answer is no.
pub fn mend(path: &Path, whole: &Path) -> Result<bool, Error> {
    let header = |directory: &Path| chunks::header(&directory.join(CHUNKS));
    if header(path)? != header(whole)? {
        return Ok(false);
    }
    for name in [META, CHUNKS] {
        let path = path.join(name);
        let mend = || {
            let bytes = fs::read(whole.join(name))?;
            let file = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            file.set_len(bytes.len() as u64)?;
            file.write_all_at(&bytes, 0)?;
            file.sync_all()
        };
        mend().map_err(|e| Error::io("mend", &path, e))?;
        crash_point!("mend.written");
    }
    Ok(true)
}
