//! A layer on a node: the directory with `meta.erofs`, `chunks`, `data`,
//! `present`, and what shows that it is the layer that its image names.
//! `docs/layer-directory.md` draws the files byte by byte.

mod checks;
mod chunks;
mod copy;
mod create;
mod error;
pub mod placement;
mod present;
mod proof;
mod rest;
mod tar;
mod whole;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use parking_lot::{Mutex, RwLock};
use sluice_layer::{Format, TocTrust};
use sluice_oci::{Digest, Reference};

pub use checks::{Verdict, mend};
pub use chunks::{ChunkId, ChunkTable, Kin, Record};
pub use create::{NewLayer, create};
pub use error::{Error, Problem};
pub use present::Present;
pub use proof::{Proof, TarDigest, TarHasher};
pub use rest::{LONGEST_PIECE, Owner, Piece, RestIndex, TarRest};
pub use tar::Span;
pub use whole::{LastByte, end_for_want_of};

/// The directory tree as an EROFS image.
pub const META: &str = "meta.erofs";
/// The chunk table.
pub const CHUNKS: &str = "chunks";
/// Every regular file's content, sparse.
pub const DATA: &str = "data";
/// Which chunks of `data` hold verified bytes.
pub const PRESENT: &str = "present";
/// What the tar has between its files, until its digest is known.
pub const TAR_REST: &str = "tar-rest";
/// What the tar's digest is, once that is known.
pub const DIFF_ID: &str = "diff-id";
/// The next `diff-id`, while it is written.
pub const DIFF_ID_DRAFT: &str = "diff-id.new";
/// The next `data`, while it is made.
pub const DATA_DRAFT: &str = "data.new";
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
    /// What the file `present` names and nobody believes before it was
    /// verified.
    claimed: Present,
    persisted: Mutex<Persisted>,
    /// Held while a chunk is stored; exclusively, to distrust what was.
    storing: RwLock<()>,
    /// What was seen last of the files that describe the layer.
    described: Mutex<Option<Described>>,
    rest: TarRest,
    proof: Mutex<Option<Proof>>,
    /// Whether extents can be shared with other directories, as far as is
    /// known.
    shares: AtomicBool,
}

/// Size and time of `meta.erofs`, and the size of `chunks`.
type Described = (u64, (i64, i64), u64);

#[derive(Debug, Default)]
struct Persisted {
    /// [`Present::changes`] when the file was written last.
    changes: u64,
    /// The directory belongs to another by now.
    retired: bool,
}

impl LayerDir {
    /// Opens the directory of `digest` and checks that its files belong
    /// together: versions, sizes and checksums, apart from that of
    /// `meta.erofs`. A `present` that cannot be trusted counts as empty, and
    /// so does a `data` of another size; anything else that is damaged is an
    /// error, and [`mend`] or making the directory again is the remedy.
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
        if found.len() != chunks.meta().size {
            return Err(damaged(
                META,
                format!(
                    "it has {} bytes instead of {}",
                    found.len(),
                    chunks.meta().size
                ),
            ));
        }
        let data = open_data(path, identity.data_size)?;
        let present = match Present::load(&path.join(PRESENT), &digest, chunks.len()) {
            Ok(present) => present,
            // Its content was evicted.
            Err(error) if error.is_missing() => Present::empty(chunks.len()),
            Err(error) => {
                tracing::warn!(layer = %digest, "{error}; its content will be fetched again");
                Present::empty(chunks.len())
            }
        };
        let proof = Proof::load(path, &digest);
        let dir = Self::with(path, identity, chunks, data, present, proof);
        dir.see();
        Ok(dir)
    }

    fn with(
        path: &Path,
        identity: Identity,
        chunks: ChunkTable,
        data: File,
        present: Present,
        proof: Option<Proof>,
    ) -> Self {
        Self {
            rest: TarRest::new(path.join(TAR_REST), identity.digest, proof.is_none()),
            proof: Mutex::new(proof),
            path: path.to_owned(),
            identity,
            claimed: Present::empty(chunks.len()),
            chunks,
            data,
            present,
            persisted: Mutex::default(),
            storing: RwLock::default(),
            described: Mutex::default(),
            shares: AtomicBool::new(true),
        }
    }

    /// Believes nothing of what `present` names before it was verified: the
    /// machine went down, and its disk may have lost what it said it had.
    pub fn doubted(mut self) -> Self {
        let nothing = Present::empty(self.chunks.len());
        self.claimed = std::mem::replace(&mut self.present, nothing);
        self
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

    /// Calls `each` for every chunk and its digest, without keeping the table
    /// in memory.
    pub fn digests(&self, each: impl FnMut(ChunkId, Digest)) -> io::Result<()> {
        chunks::digests(&self.path.join(CHUNKS), each)
    }

    /// Which of its chunks are present.
    pub fn present(&self) -> &Present {
        &self.present
    }

    /// Which of its chunks would be present if they were believed.
    pub fn claimed(&self) -> &Present {
        &self.claimed
    }

    /// Whether every chunk is present.
    pub fn is_complete(&self) -> bool {
        self.present.is_complete()
    }

    /// Whether all chunks that overlap `offset..offset + len` of `data` are
    /// present.
    pub fn has(&self, offset: u64, len: u64) -> bool {
        let present = |chunk| self.present.contains(chunk);
        self.is_complete()
            || (self.chunks.overlapping(offset, len).all(present) && self.looked_up_right())
    }

    /// To be asked after what was found in the chunk table has decided that
    /// there is nothing to fetch. The process does not survive a no.
    pub fn looked_up_right(&self) -> bool {
        if !self.chunks.is_whole() {
            end_for_want_of(&self.path.join(CHUNKS).display());
        }
        true
    }

    /// Whether somebody has touched `chunks` or `meta.erofs` since they were
    /// seen last: their sizes and, of the latter, its time.
    pub fn is_touched(&self) -> bool {
        *self.described.lock() != self.described_by()
    }

    /// Takes them for what they should be.
    pub fn see(&self) {
        *self.described.lock() = self.described_by();
    }

    fn described_by(&self) -> Option<Described> {
        let meta = fs::metadata(self.path.join(META)).ok()?;
        let chunks = fs::metadata(self.path.join(CHUNKS)).ok()?;
        let time = (meta.mtime(), meta.mtime_nsec());
        Some((meta.len(), time, chunks.len()))
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
        if left >= size || persisted.retired {
            return Ok(());
        }
        let mut lost = 0u32;
        for chunk in self.chunks.overlapping(left, size - left) {
            lost += u32::from(self.claimed.remove(chunk) | self.present.remove(chunk));
        }
        tracing::warn!(
            layer = %self.identity.digest,
            "{} was cut short to {left} of {size} bytes by another program; {lost} chunks are \
             fetched again",
            self.data_path().display()
        );
        let changes = self.present.changes();
        let snapshot = self.present.union(&self.claimed);
        self.data.sync_data()?;
        snapshot
            .save(&self.path, &self.identity.digest)
            .map_err(io::Error::other)?;
        persisted.changes = changes;
        self.data.set_len(size)
    }

    /// Writing would make holes of what a shortened file has lost.
    fn whole(&self) -> io::Result<()> {
        if self.data.metadata()?.len() < self.identity.data_size {
            self.restore()?;
        }
        Ok(())
    }

    /// Writes a chunk's bytes and then marks it present. `bytes` can only have
    /// come from the decoder, which checked them against `digest`.
    pub fn store(&self, chunk: ChunkId, bytes: &sluice_layer::VerifiedChunk<'_>) -> io::Result<()> {
        let record = self.chunks.get(chunk);
        crash_point!("fill.verified");
        self.whole()?;
        let _storing = self.storing.read();
        self.data.write_all_at(bytes, record.data_offset)?;
        crash_point!("fill.written");
        self.present.insert(chunk);
        crash_point!("fill.present");
        self.claimed.remove(chunk);
        Ok(())
    }

    /// Makes what is present survive a crash of the machine: first the bytes,
    /// then the bits. Returns whether there was anything to do. When the bytes
    /// do not get to the disk, they are not present any more: the kernel tells
    /// of a failed write once, and counts it as done from then on.
    pub fn persist(&self) -> Result<bool, Error> {
        let mut persisted = self.persisted.lock();
        // The bits are taken before the bytes are made durable, so that no bit
        // gets to disk ahead of its bytes.
        let changes = self.present.changes();
        if persisted.retired || changes == persisted.changes {
            return Ok(false);
        }
        let snapshot = self.present.union(&self.claimed);
        crash_point!("persist.taken");
        let path = self.data_path();
        if let Err(error) = self.data.sync_data() {
            self.distrust();
            return Err(Error::io("write", &path, error));
        }
        crash_point!("persist.data-synced");
        snapshot.save(&self.path, &self.identity.digest)?;
        persisted.changes = changes;
        Ok(true)
    }

    /// What its tar has between the contents of its files.
    pub fn rest(&self) -> &TarRest {
        &self.rest
    }

    /// What its tar has turned out to be, if that is known.
    pub fn proof(&self) -> Option<Proof> {
        *self.proof.lock()
    }

    /// Notes durably what its tar has turned out to be, unless more is known.
    pub fn prove(&self, proof: Proof) -> Result<(), Error> {
        let persisted = self.persisted.lock();
        if self.proof().is_some_and(|known| known.whole_blob) && !proof.whole_blob {
            return Ok(());
        }
        if !persisted.retired {
            proof.save(&self.path, &self.identity.digest)?;
            self.rest.finish();
            crash_point!("prove.rest-removed");
        }
        *self.proof.lock() = Some(proof);
        Ok(())
    }

    /// Takes back everything that is not known to be on the disk.
    fn distrust(&self) {
        // No chunk may be between its bytes and its bit meanwhile.
        let _none_is_stored = self.storing.write();
        let path = self.path.join(PRESENT);
        let durable = Present::load(&path, &self.identity.digest, self.chunks.len());
        let durable = durable.unwrap_or_else(|_| Present::empty(self.chunks.len()));
        for chunk in self.present.iter().filter(|&c| !durable.contains(c)) {
            self.present.remove(chunk);
        }
    }

    /// Drops the content, and keeps all that is needed to fetch it again. This
    /// goes on with the old file, and is never written to the directory again;
    /// whoever opens it next finds it empty. Needs no space.
    pub fn evict(&self) -> Result<(), Error> {
        let mut persisted = self.persisted.lock();
        persisted.retired = true;
        // It would come again with the content.
        self.rest.finish();
        empty(&self.path, self.identity.data_size)
    }

    /// Notes that the layer in the directory at `path` is in use now, for the
    /// next eviction.
    pub fn touch(path: &Path) -> io::Result<()> {
        // Nothing else changes that file, so its time is free for this.
        File::open(path.join(CHUNKS))?.set_modified(SystemTime::now())
    }

    /// Bytes on disk of the content in the directory at `path`.
    pub fn content_size(path: &Path) -> io::Result<u64> {
        Ok(fs::metadata(path.join(DATA))?.blocks() * 512)
    }

    /// When the layer in the directory at `path` was last in use.
    pub fn last_used(path: &Path) -> io::Result<SystemTime> {
        fs::metadata(path.join(CHUNKS))?.modified()
    }

    /// Bytes and inodes that the directory at `path` takes, if it is there.
    pub fn usage(path: &Path) -> Result<Option<(u64, u64)>, Error> {
        let mut bytes = 0;
        let mut inodes = 0;
        for name in ["", META, CHUNKS, DATA, PRESENT, TAR_REST, DIFF_ID] {
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

/// Opens `data`. One that is not there or has another size holds nothing that
/// can be relied on, and counts as empty.
fn open_data(directory: &Path, size: u64) -> Result<File, Error> {
    let path = directory.join(DATA);
    let open = || {
        let data = File::options().read(true).write(true).open(&path);
        let data = data.or_else(|error| match error.kind() {
            // What is there can be read, at least.
            io::ErrorKind::ReadOnlyFilesystem => File::open(&path),
            _ => Err(error),
        })?;
        let found = data.metadata()?.len();
        Ok::<_, io::Error>((data, found))
    };
    let found = match open() {
        Ok((data, found)) if found == size => return Ok(data),
        Ok((_, found)) => format!("it has {found} bytes instead of {size}"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => "it is not there".to_owned(),
        Err(e) => return Err(Error::io("open", &path, e)),
    };
    tracing::warn!(
        "{}: {found}; its content will be fetched again",
        path.display()
    );
    empty(directory, size)?;
    let opened = open().map_err(|e| Error::io("open", &path, e))?;
    Ok(opened.0)
}

/// Replaces the content of the directory by nothing. Needs no space.
fn empty(directory: &Path, size: u64) -> Result<(), Error> {
    let sync = || File::open(directory)?.sync_all();
    // The bits first: they must never stand for bytes that are gone.
    let present = directory.join(PRESENT);
    fs::remove_file(&present)
        .or_else(|e| match e.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(e),
        })
        .and_then(|()| sync())
        .map_err(|e| Error::io("remove", &present, e))?;
    crash_point!("evict.present-removed");
    // A new file, so that a mount that still has the old one never reads holes
    // for content.
    let data = directory.join(DATA);
    let new = directory.join(DATA_DRAFT);
    let replace = || {
        File::create(&new)?.set_len(size)?;
        crash_point!("evict.data-made");
        fs::rename(&new, &data)?;
        crash_point!("evict.data-named");
        sync()?;
        crash_point!("evict.synced");
        Ok(())
    };
    replace().map_err(|e| Error::io("empty", &data, e))
}

#[cfg(test)]
pub(crate) mod tests;
