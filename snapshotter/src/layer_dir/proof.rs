//! `diff-id`: what a layer's tar has turned out to be.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use sluice_oci::{Digest, Hasher};

use super::chunks::u32_at;
use super::error::Error;
use super::{DIFF_ID, DIFF_ID_DRAFT};

const MAGIC: &[u8; 8] = b"SLDIFFID";
const VERSION: u32 = 1;
const SIZE: usize = 128;

const FLAG_TREE: u32 = 1;
const FLAG_WHOLE_BLOB: u32 = 2;
const FLAG_DIFF_ID: u32 = 4;

/// Bytes of a record, of which tar writes whole ones.
const RECORD: u64 = 10_240;

/// Digest of a tar, and of the same filled up with zeros to a whole record:
/// some compressors, skopeo 1.9 for one, drop the zeros that follow the end of
/// the archive, though the image names the digest of the tar with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TarDigest {
    /// As it is.
    pub exact: Digest,
    /// With all of the last record.
    pub padded: Digest,
}

/// Digests a tar.
pub struct TarHasher {
    hasher: Hasher,
    size: u64,
}

impl Default for TarHasher {
    fn default() -> Self {
        Self {
            hasher: Hasher::new(),
            size: 0,
        }
    }
}

impl TarHasher {
    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
    }

    /// The digests.
    pub fn finish(self) -> TarDigest {
        let missing = self.size.next_multiple_of(RECORD) - self.size;
        let mut padded = self.hasher.clone();
        padded.update(&vec![0; missing as usize]);
        TarDigest {
            exact: self.hasher.finish(),
            padded: padded.finish(),
        }
    }
}

/// What is known of a layer since all of its tar was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// Digest of the tar; `None` where the blob holds none that is cut as the
    /// TOC says.
    pub diff_id: Option<TarDigest>,
    /// Whether the layer's tree and content are what the tar unpacks to.
    pub tree_fits: bool,
    /// Whether the tar was unpacked from the whole blob after its digest had
    /// been compared, and not put together from parts, whose bytes between
    /// files nothing vouches for.
    pub whole_blob: bool,
}

impl Proof {
    /// Reads what the directory at `path` says of `layer`, if it says
    /// anything. What is damaged counts as nothing: it is found out again.
    pub fn load(path: &Path, layer: &Digest) -> Option<Self> {
        let bytes = fs::read(path.join(DIFF_ID)).ok()?;
        let sound = bytes.len() == SIZE
            && bytes[..8] == MAGIC[..]
            && u32_at(&bytes, 8) == VERSION
            && bytes[16..48] == layer.as_raw()[..]
            && u32_at(&bytes, SIZE - 4) == libdeflater::crc32(&bytes[..SIZE - 4]);
        if !sound {
            return None;
        }
        let flags = u32_at(&bytes, 12);
        let diff_id = TarDigest {
            exact: Digest::from_raw(bytes[48..80].try_into().ok()?),
            padded: Digest::from_raw(bytes[80..112].try_into().ok()?),
        };
        Some(Self {
            diff_id: (flags & FLAG_DIFF_ID != 0).then_some(diff_id),
            tree_fits: flags & FLAG_TREE != 0,
            whole_blob: flags & FLAG_WHOLE_BLOB != 0,
        })
    }

    /// Replaces the file in `directory` at one stroke, durably.
    pub(super) fn save(&self, directory: &Path, layer: &Digest) -> Result<(), Error> {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(self.tree_fits, FLAG_TREE)
            | flag(self.whole_blob, FLAG_WHOLE_BLOB)
            | flag(self.diff_id.is_some(), FLAG_DIFF_ID);
        let mut bytes = Vec::with_capacity(SIZE);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(layer.as_raw());
        for digest in self.diff_id.iter().flat_map(|d| [&d.exact, &d.padded]) {
            bytes.extend_from_slice(digest.as_raw());
        }
        bytes.resize(SIZE - 4, 0);
        bytes.extend_from_slice(&libdeflater::crc32(&bytes).to_le_bytes());
        let path = directory.join(DIFF_ID);
        let draft = directory.join(DIFF_ID_DRAFT);
        let write = || {
            let mut file = File::create(&draft)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            crash_point!("prove.written");
            fs::rename(&draft, &path)?;
            crash_point!("prove.named");
            File::open(directory)?.sync_all()
        };
        write().map_err(|e| Error::io("write", &path, e))
    }
}
