//! A sorted file of digests, as `docs/layer-directory.md` draws it.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek as _, SeekFrom, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use sluice_oci::Digest;

use crate::layer_dir::{ChunkId, LayerDir};

const MAGIC: &[u8; 8] = b"SLDIGEST";
const VERSION: u32 = 1;
const HEADER: usize = 64;
/// Bytes of a layer in the table, and of an entry.
const LAYER: usize = 40;
const ENTRY: usize = 16;
/// Entries that are read at once: a page.
const BLOCK: u64 = 256;
/// Digests are spread evenly, so that a guess at where one is comes near it.
/// An image can make up others, and then halving does it.
const GUESSES: u32 = 4;
/// A table of more layers than this is none of ours.
const MAX_LAYERS: u32 = 1 << 20;

/// Where a chunk is said to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The layer.
    pub layer: LayerName,
    /// Which of its chunks.
    pub chunk: ChunkId,
}

/// Names a layer directory for ever: a layer that is made again has another
/// number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerName {
    /// Its number on the node.
    pub number: u64,
    /// The digest of its blob.
    pub digest: Digest,
}

impl LayerName {
    /// The name of a directory.
    pub fn of(dir: &LayerDir) -> Self {
        let identity = dir.identity();
        Self {
            number: identity.number,
            digest: identity.digest,
        }
    }
}

/// One line of the index. `layer` is a position in the run's table of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    pub(super) key: u64,
    pub(super) layer: u32,
    pub(super) chunk: u32,
}

impl Entry {
    fn encode(self) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        bytes[0..8].copy_from_slice(&self.key.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.layer.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.chunk.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Self {
        Self {
            key: u64_at(bytes, 0),
            layer: u32_at(bytes, 8),
            chunk: u32_at(bytes, 12),
        }
    }
}

/// The first eight bytes of a digest, in their order.
pub(super) fn key_of(digest: &Digest) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *digest.as_raw();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or([0; 4]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or([0; 8]))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// An open run. Nothing in it is believed: it says where to look.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) path: PathBuf,
    file: File,
    pub(super) layers: Vec<LayerName>,
    pub(super) len: u64,
    body: u64,
    crc: u32,
}

impl Run {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let mut header = [0; HEADER];
        file.read_exact(&mut header)?;
        if header[..8] != MAGIC[..] || u32_at(&header, 60) != libdeflater::crc32(&header[..60]) {
            return Err(invalid("its header is damaged"));
        }
        if u32_at(&header, 8) != VERSION {
            return Err(invalid("it is of another version"));
        }
        let (count, len) = (u32_at(&header, 12), u64_at(&header, 16));
        let body = HEADER as u64 + u64::from(count) * LAYER as u64;
        let size = len
            .checked_mul(ENTRY as u64)
            .and_then(|n| n.checked_add(body));
        if count > MAX_LAYERS || size != Some(file.metadata()?.len()) {
            return Err(invalid("it is cut short"));
        }
        let mut table = vec![0; count as usize * LAYER];
        file.read_exact(&mut table)?;
        if u32_at(&header, 28) != libdeflater::crc32(&table) {
            return Err(invalid("its table of layers is damaged"));
        }
        let name = |bytes: &[u8]| LayerName {
            number: u64_at(bytes, 0),
            digest: Digest::from_raw(bytes[8..LAYER].try_into().unwrap_or([0; 32])),
        };
        Ok(Self {
            path: path.to_owned(),
            layers: table.chunks_exact(LAYER).map(name).collect(),
            file,
            len,
            body,
            crc: u32_at(&header, 24),
        })
    }

    /// Calls `each` for every place under the digest's key, until it breaks.
    pub(super) fn find(
        &self,
        digest: &Digest,
        each: &mut impl FnMut(Place) -> ControlFlow<()>,
    ) -> io::Result<ControlFlow<()>> {
        let key = key_of(digest);
        let mut block = [0; BLOCK as usize * ENTRY];
        let (mut low, mut high) = (0, self.len);
        let (mut low_key, mut high_key) = (0, u64::MAX);
        let mut guesses = 0;
        // The first entry of the key is at `low` or after it, and not after
        // `high`.
        while high - low > BLOCK {
            let middle = match guesses < GUESSES {
                true => guess(key, (low, high), (low_key, high_key)),
                false => low + (high - low) / 2,
            };
            guesses += 1;
            let start = middle.saturating_sub(BLOCK / 2).clamp(low, high - BLOCK);
            let entries = self.read(start, start + BLOCK, &mut block)?;
            let (first, last) = (u64_at(entries, 0), u64_at(entries, entries.len() - ENTRY));
            if first >= key {
                (high, high_key) = (start, first);
            } else if last < key {
                (low, low_key) = (start + BLOCK, last);
            } else {
                (low, high) = (start, start + BLOCK);
            }
        }
        while low < self.len {
            let end = (low + BLOCK).min(self.len);
            let entries = self.read(low, end, &mut block)?;
            for entry in entries.chunks_exact(ENTRY).map(Entry::decode) {
                if entry.key < key {
                    continue;
                }
                if entry.key > key {
                    return Ok(ControlFlow::Continue(()));
                }
                let Some(&layer) = self.layers.get(entry.layer as usize) else {
                    return Err(invalid("it names a layer that is not in its table"));
                };
                let chunk = ChunkId::at(entry.chunk);
                if each(Place { layer, chunk }).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            low = end;
        }
        Ok(ControlFlow::Continue(()))
    }

    fn read<'b>(&self, start: u64, end: u64, block: &'b mut [u8]) -> io::Result<&'b [u8]> {
        let bytes = &mut block[..(end - start) as usize * ENTRY];
        let at = self.body + start * ENTRY as u64;
        self.file.read_exact_at(bytes, at)?;
        Ok(bytes)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Its entries, in their order. The last one is followed by an error if
    /// the checksum is wrong.
    pub(super) fn entries(&self) -> io::Result<Entries> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.body))?;
        Ok(Entries {
            file: BufReader::with_capacity(64 << 10, file),
            left: self.len,
            crc: libdeflater::Crc::new(),
            expected: self.crc,
        })
    }
}

/// Where a key is expected between two others.
fn guess(key: u64, (low, high): (u64, u64), (low_key, high_key): (u64, u64)) -> u64 {
    let span = u128::from(high_key.saturating_sub(low_key).max(1));
    let offset = u128::from(key.saturating_sub(low_key)) * u128::from(high - low) / span;
    low + u64::try_from(offset)
        .unwrap_or(u64::MAX)
        .min(high - low - 1)
}

/// See [`Run::entries`].
pub(super) struct Entries {
    file: BufReader<File>,
    left: u64,
    crc: libdeflater::Crc,
    expected: u32,
}

impl Entries {
    fn read(&mut self) -> io::Result<Option<Entry>> {
        if self.left == 0 {
            return match self.crc.sum() == self.expected {
                true => Ok(None),
                false => Err(invalid("its checksum does not match")),
            };
        }
        let mut bytes = [0; ENTRY];
        self.file.read_exact(&mut bytes)?;
        self.crc.update(&bytes);
        self.left -= 1;
        Ok(Some(Entry::decode(&bytes)))
    }
}

/// The entries of a layer's chunks, sorted, for the table position `layer`.
pub(super) fn entries_of(dir: &LayerDir, layer: u32) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::with_capacity(dir.chunks().len() as usize);
    dir.digests(|chunk, digest| {
        entries.push(Entry {
            key: key_of(&digest),
            layer,
            chunk: chunk.index() as u32,
        });
    })?;
    entries.sort_unstable();
    Ok(entries)
}

/// A run that is being written, under a draft's name.
pub(super) struct Draft {
    path: PathBuf,
    out: BufWriter<File>,
    layers: Vec<LayerName>,
    len: u64,
    crc: libdeflater::Crc,
}

impl Draft {
    pub(super) fn new(path: PathBuf, layers: Vec<LayerName>) -> io::Result<Self> {
        let mut out = BufWriter::with_capacity(64 << 10, File::create(&path)?);
        // The header comes last: without it the file is none.
        out.write_all(&[0; HEADER])?;
        out.write_all(&table(&layers))?;
        Ok(Self {
            path,
            out,
            layers,
            len: 0,
            crc: libdeflater::Crc::new(),
        })
    }

    pub(super) fn push(&mut self, entry: Entry) -> io::Result<()> {
        let bytes = entry.encode();
        self.crc.update(&bytes);
        self.len += 1;
        self.out.write_all(&bytes)
    }

    /// Gives it its name. It is not synced: nobody waits for what can be made
    /// again.
    pub(super) fn finish(self, path: &Path) -> io::Result<Run> {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(self.layers.len() as u32).to_le_bytes());
        header[16..24].copy_from_slice(&self.len.to_le_bytes());
        header[24..28].copy_from_slice(&self.crc.sum().to_le_bytes());
        let layers = libdeflater::crc32(&table(&self.layers));
        header[28..32].copy_from_slice(&layers.to_le_bytes());
        let crc = libdeflater::crc32(&header[..60]);
        header[60..64].copy_from_slice(&crc.to_le_bytes());
        let file = self
            .out
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.write_all_at(&header, 0)?;
        crash_point!("index.drafted");
        fs::rename(&self.path, path)?;
        crash_point!("index.named");
        Run::open(path)
    }
}

fn table(layers: &[LayerName]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(layers.len() * LAYER);
    for layer in layers {
        bytes.extend_from_slice(&layer.number.to_le_bytes());
        bytes.extend_from_slice(layer.digest.as_raw());
    }
    bytes
}

/// Makes one run of several, without the layers that `lives` does not know.
/// The error names the run that cannot be read.
pub(super) fn merge(
    runs: &[std::sync::Arc<Run>],
    draft: PathBuf,
    path: &Path,
    lives: impl Fn(LayerName) -> bool,
) -> Result<Run, MergeError> {
    let mut layers: Vec<LayerName> = runs.iter().flat_map(|run| run.layers.clone()).collect();
    layers.sort_unstable();
    layers.dedup();
    layers.retain(|&layer| lives(layer));
    let position = |layer: &LayerName| layers.binary_search(layer).ok().map(|at| at as u32);
    let mut sources = Vec::new();
    for (at, run) in runs.iter().enumerate() {
        let positions: Vec<Option<u32>> = run.layers.iter().map(position).collect();
        let mut source = Source {
            entries: run.entries().map_err(|e| MergeError::Run(at, e))?,
            positions,
            next: None,
        };
        source.advance().map_err(|e| MergeError::Run(at, e))?;
        sources.push(source);
    }
    let mut draft = Draft::new(draft, layers.clone()).map_err(MergeError::Draft)?;
    let mut last = None;
    // There are a handful of runs, so that looking at each is quick.
    while let Some((at, entry)) = (sources.iter().enumerate())
        .filter_map(|(at, source)| Some((at, source.next?)))
        .min_by_key(|(_, entry)| *entry)
    {
        // A layer may be in two runs where a process died in between.
        if last.replace(entry) != Some(entry) {
            draft.push(entry).map_err(MergeError::Draft)?;
        }
        let advanced = sources[at].advance();
        advanced.map_err(|e| MergeError::Run(at, e))?;
    }
    draft.finish(path).map_err(MergeError::Draft)
}

/// Why runs could not be merged.
#[derive(Debug)]
pub(super) enum MergeError {
    /// One of them, by its position, cannot be read.
    Run(usize, io::Error),
    /// The result cannot be written.
    Draft(io::Error),
}

struct Source {
    entries: Entries,
    /// From positions in the run's table to those in the result's.
    positions: Vec<Option<u32>>,
    next: Option<Entry>,
}

impl Source {
    fn advance(&mut self) -> io::Result<()> {
        loop {
            self.next = match self.entries.read()? {
                None => None,
                Some(entry) => match self.positions.get(entry.layer as usize) {
                    None => return Err(invalid("it names a layer that is not in its table")),
                    Some(None) => continue,
                    Some(&Some(layer)) => Some(Entry { layer, ..entry }),
                },
            };
            return Ok(());
        }
    }
}
