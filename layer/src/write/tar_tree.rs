//! The tree that a tar unpacks to, read from its bytes as they pass, to be
//! compared with the tree that a TOC describes.

use sluice_oci::{Digest, Hasher};

use super::WriteError;
use super::entries::{ChunkPart, Entries, PlacedChunk};
use super::header::{Header, Kind};
use super::scan::{Event, Scanner};
use super::split::{is_reserved, is_toc};
use crate::toc::read_toc_json;
use crate::{ChunkSource, EntryError, Format, Limits, Node, NodeKind, Toc, TocError};

/// What an entry takes in memory beside its names and attributes: here, in
/// JSON, and while that is read.
const PER_ENTRY: u64 = 800;
/// How often its texts are held meanwhile.
const COPIES: u64 = 4;

/// Reads a tar that was put together from a layer's content and the bytes
/// between.
pub struct TarTree {
    scanner: Scanner,
    found: Found,
}

struct Found {
    entries: Entries,
    placed: Vec<PlacedChunk>,
    /// By position in `placed`.
    origins: Vec<Option<Origin>>,
    file: Current,
    toc: Option<Digest>,
    /// Bytes of memory that may still be taken; none where no tree is wanted.
    memory: Option<u64>,
}

enum Current {
    /// Nothing whose content counts.
    Other,
    Toc(Hasher),
    File(File),
}

#[derive(Debug)]
struct File {
    size: u64,
    read: u64,
    /// Where its first byte is in the content, once that is known.
    base: Option<u64>,
    from_chunks: u64,
    /// Whether all of it came from one place, in order, or is zeros.
    whole: bool,
}

/// Why a tree could not be made of a tar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarTreeError {
    /// It would take more memory than it may.
    #[error("its tar has more entries than there is memory for")]
    Memory,
    /// It is no tar, or none that a TOC can describe.
    #[error("{0}")]
    Tar(String),
}

/// Where a file's bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Offset of the file's first byte in the layer's content; `None` when all
    /// of it came from between chunks.
    pub base: Option<u64>,
    /// How many of its bytes came from chunks. The others are zeros.
    pub from_chunks: u64,
}

/// What a tar unpacks to.
#[derive(Debug)]
pub struct Unpacked {
    tree: Toc,
    origins: Vec<Option<Origin>>,
}

impl Unpacked {
    /// The tree; its chunks say nothing.
    pub fn tree(&self) -> &Toc {
        &self.tree
    }

    /// Where the content of a file came from; `None` when it is empty, no
    /// file, or came from several places.
    pub fn origin(&self, node: &Node) -> Option<Origin> {
        let NodeKind::Regular(content) = &node.kind else {
            return None;
        };
        let chunk = self.tree.chunks().get(content.chunks.start as usize)?;
        match chunk.source {
            ChunkSource::Blob { unit, .. } if !content.chunks.is_empty() => {
                *self.origins.get(unit.offset as usize)?
            }
            _ => None,
        }
    }
}

impl TarTree {
    /// Keeps the whole tree, in up to `memory` bytes.
    pub fn new(memory: u64) -> Self {
        Self::with(Some(memory))
    }

    /// Looks for the TOC alone.
    pub fn of_toc() -> Self {
        Self::with(None)
    }

    fn with(memory: Option<u64>) -> Self {
        Self {
            scanner: Scanner::new(),
            found: Found {
                entries: Entries::default(),
                placed: Vec::new(),
                origins: Vec::new(),
                file: Current::Other,
                toc: None,
                memory,
            },
        }
    }

    /// Takes the next bytes of the tar. `origin` is where they are in the
    /// layer's content, if they are from there.
    pub fn push(&mut self, bytes: &[u8], origin: Option<u64>) -> Result<(), TarTreeError> {
        let found = &mut self.found;
        let range = bytes.as_ptr_range();
        let pushed = self.scanner.push(bytes, &mut |event| match event {
            Event::Entry { header, .. } => found.entry(*header),
            Event::Content(piece) => {
                // What does not lie in these bytes was made by the scanner.
                let inside = range.contains(&piece.as_ptr());
                let offset = piece.as_ptr().addr().wrapping_sub(range.start.addr()) as u64;
                found.content(piece, origin.filter(|_| inside).map(|from| from + offset));
                Ok(())
            }
            Event::Padding(_) | Event::End { .. } => Ok(()),
        });
        pushed.map_err(|error| match self.found.memory {
            Some(0) => TarTreeError::Memory,
            _ => TarTreeError::Tar(error.to_string()),
        })
    }

    /// Digest of the last file named `stargz.index.json` so far.
    pub fn toc_digest(&self) -> Option<Digest> {
        self.found.toc
    }

    /// Ends the tar: the tree that it unpacks to, read as a TOC within
    /// `limits`.
    pub fn finish(self, limits: &Limits) -> Result<Unpacked, TarTreeError> {
        let failed = |error: WriteError| TarTreeError::Tar(error.to_string());
        self.scanner.finish().map_err(failed)?;
        let Found {
            entries,
            placed,
            origins,
            ..
        } = self.found;
        let json = entries.json(&placed, None);
        let json = json.map_err(failed)?;
        let end = placed.len() as u64 + 1;
        let digest = Digest::of(&json);
        let limits = Limits {
            // Its files are not cut into chunks.
            max_unit_bytes: u64::MAX,
            ..*limits
        };
        let tree = read_toc_json(Format::ZstdChunked, end, &json, &digest, &limits);
        Ok(Unpacked {
            tree: tree.map_err(|error| match error {
                TocError::Entry {
                    reason: EntryError::TooMuchMemory { .. },
                    ..
                } => TarTreeError::Memory,
                error => TarTreeError::Tar(error.to_string()),
            })?,
            origins,
        })
    }
}

impl Found {
    fn entry(&mut self, header: Header) -> Result<(), WriteError> {
        self.file = Current::Other;
        if is_reserved(&header) {
            if is_toc(&header) {
                self.file = Current::Toc(Hasher::new());
            }
            return Ok(());
        }
        let (kind, size) = (header.kind, header.size);
        let Some(memory) = &mut self.memory else {
            return Ok(());
        };
        if kind == Kind::Global {
            return Ok(());
        }
        let texts = header.name.len() + header.link.len() + header.user.len() + header.group.len();
        let xattrs = header.xattrs.iter().map(|(k, v)| k.len() + v.len());
        let needed = PER_ENTRY + COPIES * (texts + xattrs.sum::<usize>()) as u64;
        *memory = memory.saturating_sub(needed);
        if *memory == 0 {
            return Err(WriteError::unsupported("there is no memory for it"));
        }
        self.entries.add(header)?;
        match (kind, size) {
            (Kind::Regular, 0) => self.entries.digest(Digest::of(b"")),
            (Kind::Regular, size) => {
                self.entries.chunk(ChunkPart {
                    file_offset: 0,
                    size,
                });
                self.placed.push(PlacedChunk {
                    offset: self.placed.len() as u64,
                    digest: Digest::of(b""),
                });
                self.origins.push(None);
                self.file = Current::File(File {
                    size,
                    read: 0,
                    base: None,
                    from_chunks: 0,
                    whole: true,
                });
            }
            _ => {}
        }
        Ok(())
    }

    fn content(&mut self, bytes: &[u8], origin: Option<u64>) {
        match &mut self.file {
            Current::Other => {}
            Current::Toc(hasher) => {
                hasher.update(bytes);
                self.toc = Some(hasher.clone().finish());
            }
            Current::File(file) => {
                file.take(bytes, origin);
                if file.read == file.size
                    && let Some(last) = self.origins.last_mut()
                {
                    *last = file.whole.then_some(Origin {
                        base: file.base,
                        from_chunks: file.from_chunks,
                    });
                }
            }
        }
    }
}

impl File {
    fn take(&mut self, bytes: &[u8], origin: Option<u64>) {
        match origin {
            Some(origin) => {
                let base = origin.checked_sub(self.read);
                self.whole &= base.is_some() && (self.base.is_none() || self.base == base);
                self.base = base;
                self.from_chunks += bytes.len() as u64;
            }
            None => self.whole &= bytes.iter().all(|byte| *byte == 0),
        }
        self.read += bytes.len() as u64;
    }
}
