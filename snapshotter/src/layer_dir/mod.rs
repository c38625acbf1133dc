//! A layer on a node: the directory with `meta.erofs`, `chunks`, `data` and
//! `present`. `docs/layer-directory.md` draws the files byte by byte.

mod chunks;
mod create;
mod error;
pub mod placement;
mod present;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use sluice_layer::{Format, TocTrust};
use sluice_oci::{Digest, Reference};

pub use chunks::{ChunkId, ChunkTable, Record};
pub use create::{NewLayer, create};
pub use error::{Error, Problem};
pub use present::Present;

/// The directory tree as an EROFS image.
pub const META: &str = "meta.erofs";
/// The chunk table.
pub const CHUNKS: &str = "chunks";
/// Every regular file's content, sparse.
pub const DATA: &str = "data";
/// Which chunks of `data` hold verified bytes.
pub const PRESENT: &str = "present";
/// The next `present`, while it is written.
pub const PRESENT_DRAFT: &str = "present.new";
/// Prefix of directories that are being made or deleted.
pub const TEMPORARY: &str = ".tmp-";

/// What a layer is and where it comes from, as it was when the directory was
/// made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob.
    pub blob_size: u64,
    /// The blob's format.
    pub format: Format,
    /// The digest that the TOC was checked against.
    pub trust: TocTrust,
    /// Digest of the TOC as the blob stores it.
    pub compressed_toc: Digest,
    /// The image through which the layer was first asked for: its repository
    /// holds the blob.
    pub reference: Reference,
    /// The layer's number on this node, which names its mount point and its
    /// inode in the node's FUSE mounts.
    pub number: u64,
    /// Where in the blob the chunks end and the TOC begins.
    pub toc_offset: u64,
    /// Where in the blob the prioritized files end.
    pub prefetch_end: Option<u64>,
    /// Size of `data`.
    pub data_size: u64,
}

/// An open layer directory.
#[derive(Debug)]
pub struct LayerDir {
    path: PathBuf,
    identity: Identity,
    chunks: ChunkTable,
    data: File,
    present: Present,
    persisted: Mutex<u32>,
}

impl LayerDir {
    /// Opens the directory of `digest` and checks that its files belong
    /// together: versions, sizes and checksums. A `present` that cannot be
    /// trusted counts as empty; anything else that is damaged is an error, and
    /// the directory has to be made again.
    pub fn open(path: &Path, digest: Digest) -> Result<Self, Error> {
        let (identity, chunks) = ChunkTable::open(&path.join(CHUNKS))?;
        let damaged = |file: &str, what: String| Error::damaged(&path.join(file), what);
        if identity.digest != digest {
            return Err(damaged(
                CHUNKS,
                format!("it describes layer {}", identity.digest),
            ));
        }
        let meta = path.join(META);
        let found = fs::metadata(&meta).map_err(|e| Error::io("read", &meta, e))?;
        if found.len() != chunks.meta_size() {
            return Err(damaged(
                META,
                format!(
                    "it has {} bytes instead of {}",
                    found.len(),
                    chunks.meta_size()
                ),
            ));
        }
        let data_path = path.join(DATA);
        let data = File::options()
            .read(true)
            .write(true)
            .open(&data_path)
            .map_err(|e| Error::io("open", &data_path, e))?;
        let size = data
            .metadata()
            .map_err(|e| Error::io("read", &data_path, e))?
            .len();
        if size != identity.data_size {
            return Err(damaged(
                DATA,
                format!("it has {size} bytes instead of {}", identity.data_size),
            ));
        }
        let present = match Present::load(&path.join(PRESENT), &digest, chunks.len()) {
            Ok(present) => present,
            Err(error) => {
                tracing::warn!(layer = %digest, "{error}; its content will be fetched again");
                Present::empty(chunks.len())
            }
        };
        let persisted = Mutex::new(present.count());
        Ok(Self {
            path: path.to_owned(),
            identity,
            chunks,
            data,
            present,
            persisted,
        })
    }

    /// Reads only what names the layer, without checking the whole directory.
    pub fn identify(path: &Path) -> Result<Identity, Error> {
        chunks::identify(&path.join(CHUNKS))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The EROFS image.
    pub fn meta_path(&self) -> PathBuf {
        self.path.join(META)
    }

    /// The content file.
    pub fn data_path(&self) -> PathBuf {
        self.path.join(DATA)
    }

    /// What the layer is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its chunk table.
    pub fn chunks(&self) -> &ChunkTable {
        &self.chunks
    }

    /// Which of its chunks are present.
    pub fn present(&self) -> &Present {
        &self.present
    }

    /// Whether every chunk is present.
    pub fn is_complete(&self) -> bool {
        self.present.is_complete()
    }

    /// Whether all chunks that overlap `offset..offset + len` of `data` are
    /// present.
    pub fn has(&self, offset: u64, len: u64) -> bool {
        self.is_complete()
            || self
                .chunks
                .overlapping(offset, len)
                .all(|chunk| self.present.contains(chunk))
    }

    /// Reads `data`. The caller has made sure that the bytes are present. An
    /// error of the kind `UnexpectedEof` says that they are not any more:
    /// somebody has cut the file short, and [`Self::restore`] is due.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.data.read_exact_at(buffer, offset)
    }

    /// Gives `data` its size again if somebody has cut it short, after taking
    /// back the bits of the chunks that went with its end: what is a hole then
    /// must not pass for content, not even after a crash.
    pub fn restore(&self) -> io::Result<()> {
        let mut persisted = self.persisted.lock();
        let size = self.identity.data_size;
        let left = self.data.metadata()?.len();
        if left >= size {
            return Ok(());
        }
        let mut lost = 0u32;
        for chunk in self.chunks.overlapping(left, size - left) {
            if self.present.contains(chunk) {
                self.present.remove(chunk);
                lost += 1;
            }
        }
        tracing::warn!(
            layer = %self.identity.digest,
            "{} was cut short to {left} of {size} bytes by another program; {lost} chunks are \
             fetched again",
            self.data_path().display()
        );
        let snapshot = self.present.snapshot();
        self.data.sync_data()?;
        snapshot
            .save(&self.path, &self.identity.digest)
            .map_err(io::Error::other)?;
        *persisted = snapshot.count();
        self.data.set_len(size)
    }

    /// Writes a chunk's bytes and then marks it present. `bytes` can only have
    /// come from the decoder, which checked them against `digest`.
    pub fn store(&self, chunk: ChunkId, bytes: &sluice_layer::VerifiedChunk<'_>) -> io::Result<()> {
        let record = self.chunks.get(chunk);
        crash_point!("fill.verified");
        // Writing would make holes of what a shortened file has lost.
        if self.data.metadata()?.len() < self.identity.data_size {
            self.restore()?;
        }
        self.data.write_all_at(bytes, record.data_offset)?;
        crash_point!("fill.written");
        self.present.insert(chunk);
        crash_point!("fill.present");
        Ok(())
    }

    /// Makes what is present survive a crash of the machine: first the bytes,
    /// then the bits. Returns whether there was anything to do.
    pub fn persist(&self) -> Result<bool, Error> {
        let mut persisted = self.persisted.lock();
        // The bits are taken before the bytes are made durable, so that no bit
        // gets to disk ahead of its bytes.
        let snapshot = self.present.snapshot();
        if snapshot.count() == *persisted {
            return Ok(false);
        }
        crash_point!("persist.taken");
        let path = self.data_path();
        self.data
            .sync_data()
            .map_err(|e| Error::io("write", &path, e))?;
        crash_point!("persist.data-synced");
        snapshot.save(&self.path, &self.identity.digest)?;
        *persisted = snapshot.count();
        Ok(true)
    }

    /// Bytes and inodes that the directory at `path` takes, if it is there.
    pub fn usage(path: &Path) -> Result<Option<(u64, u64)>, Error> {
        let mut bytes = 0;
        let mut inodes = 0;
        for name in ["", META, CHUNKS, DATA, PRESENT] {
            let path = path.join(name);
            match fs::metadata(&path) {
                Ok(found) => {
                    bytes += found.blocks() * 512;
                    inodes += 1;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(Error::io("read", &path, e)),
            }
        }
        Ok((inodes > 0).then_some((bytes, inodes)))
    }
}

#[cfg(test)]
pub(crate) mod tests;
