//! From a TOC's entries to the tree, as if they were unpacked one after the
//! other: where a name comes twice the last wins, directories merge.
//!
//! Whatever an ordinary unpacking might see otherwise (a path through a
//! symbolic link, a `..`) is refused, so that the layer gets unpacked instead.

use std::ops::Range;
use std::sync::mpsc;
use std::thread;

use serde_json::de::SliceRead;
use sluice_oci::Digest;

use super::error::{EntryError, TocError, printable};
use super::json::{Entry, for_each_entry};
use super::memory::Meter;
use super::names::{self, MAX_PATH, Place};
use super::tree::{Attributes, EntryAt, Tree};
use super::unpack::AT_ONCE_SHARE;
use super::xattrs::{self, Owner};
use super::{Chunk, ChunkSource, Directory, FileContent, Limits, Node, NodeId, NodeKind};
use super::{Mtime, Toc, Unit, time, units};
use crate::Format;

/// Largest device numbers that Linux has.
const MAX_MAJOR: u32 = (1 << 12) - 1;
const MAX_MINOR: u32 = (1 << 20) - 1;
/// What finding its unit takes for a chunk: its boundary, and its place among
/// those that share a unit.
const PER_CHUNK: usize = 8 + 16 + 32;

/// Entries that are read before the tree gets them, where both go on at once,
/// and bytes that they may take.
const BATCH: usize = 128;
const BATCH_BYTES: usize = 64 << 10;
/// Batches on their way.
const BATCHES: usize = 2;
/// What the batches take, of which each may end in the largest of entries.
const IN_BATCHES: u64 = (BATCHES as u64 + 2) << 20;
/// JSON of less than this is not worth a thread.
const WORTH_TWO: usize = 1 << 20;

/// Bytes of memory that a TOC whose JSON has `bytes` takes as a rule while it is
/// read, for [`Limits::max_memory`]: the JSON, decompressed at once, for a stream
/// takes three times as long, and the tree. Names of one letter take more.
pub fn likely_memory(bytes: u64) -> u64 {
    bytes
        .saturating_mul(AT_ONCE_SHARE)
        .saturating_add(IN_BATCHES)
}

/// Builds the tree that `json` describes, of a blob whose chunks end at
/// `chunks_end`. Of the memory that `limits` allow, `taken` bytes are in use.
pub(super) fn build<'a>(
    format: Format,
    chunks_end: u64,
    json: impl serde_json::de::Read<'a>,
    limits: &Limits,
    taken: u64,
) -> Result<Toc, TocError> {
    let mut builder = Builder::new(chunks_end, limits, taken);
    for_each_entry(json, &mut |entry: Entry<'_>| builder.take(&entry))?;
    builder.finish(format)
}

/// As [`build`], of JSON that is in memory as a whole: of much of it, one
/// thread reads the entries and another makes the tree.
pub(super) fn build_whole(
    format: Format,
    chunks_end: u64,
    json: &[u8],
    limits: &Limits,
) -> Result<Toc, TocError> {
    let taken = json.len() as u64;
    if json.len() < WORTH_TWO {
        return build(format, chunks_end, SliceRead::new(json), limits, taken);
    }
    let mut builder = Builder::new(chunks_end, limits, taken + IN_BATCHES);
    thread::scope(|scope| {
        let (send, batches) = mpsc::sync_channel::<Vec<Entry<'_>>>(BATCHES);
        let built = scope.spawn(move || {
            let mut entries = batches.iter().flatten();
            entries.try_for_each(|entry| builder.take(&entry))?;
            Ok(builder)
        });
        let mut batch = Vec::with_capacity(BATCH);
        let mut bytes = 0;
        let read = for_each_entry(SliceRead::new(json), &mut |entry: Entry<'_>| {
            bytes += entry.own_size();
            batch.push(entry);
            if batch.len() < BATCH && bytes < BATCH_BYTES {
                return Ok(());
            }
            bytes = 0;
            let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH));
            // Nobody takes it after an entry that is refused, which is told
            // instead.
            send.send(full).map_err(|_| TocError::Json(String::new()))
        });
        // An entry that is refused comes before what cannot be read.
        let _ = send.send(batch);
        drop(send);
        let built = built.join();
        let built = built.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let built: Builder<'_> = built?;
        read?;
        built.finish(format)
    })
}

fn located(index: usize, name: &[u8], reason: EntryError) -> TocError {
    TocError::Entry {
        index,
        name: printable(name),
        reason,
    }
}

fn entry_at(index: usize, entry: &Entry<'_>) -> EntryAt {
    EntryAt {
        index,
        name: (*entry.name).into(),
    }
}

struct Builder<'l> {
    limits: &'l Limits,
    chunks_end: u64,
    /// Entries so far.
    entries: usize,
    tree: Tree,
    chunks: Vec<Chunk>,
    /// Where units begin or end.
    boundaries: Vec<u64>,
    /// The file whose chunks are being read.
    file: Option<OpenFile>,
    /// Offset of the prefetch landmark.
    landmark: Option<u64>,
    /// Least offset of any file's chunk.
    first_offset: u64,
    layer_bytes: u64,
}

/// The regular file that the next chunk entry belongs to.
struct OpenFile {
    entry: EntryAt,
    /// None for a landmark, which has chunks but is no part of the tree.
    node: Option<u32>,
    size: u64,
    chunks: Range<u32>,
    /// Where in the file the next chunk is due.
    next: u64,
}

impl<'l> Builder<'l> {
    fn new(chunks_end: u64, limits: &'l Limits, taken: u64) -> Self {
        Self {
            limits,
            chunks_end,
            entries: 0,
            tree: Tree::new(limits.max_entries, Meter::new(limits.max_memory, taken)),
            chunks: Vec::new(),
            boundaries: Vec::new(),
            file: None,
            landmark: None,
            first_offset: u64::MAX,
            layer_bytes: 0,
        }
    }

    /// Adds the next entry.
    fn take(&mut self, entry: &Entry<'_>) -> Result<(), TocError> {
        let index = self.entries;
        if index >= self.limits.max_entries {
            return Err(TocError::TooManyEntries {
                limit: self.limits.max_entries,
            });
        }
        self.add(index, entry)?;
        self.entries += 1;
        Ok(())
    }

    fn add(&mut self, index: usize, entry: &Entry<'_>) -> Result<(), TocError> {
        if &*entry.kind == b"chunk" {
            return self
                .add_chunk(entry)
                .map_err(|reason| located(index, &entry.name, reason));
        }
        self.close_file()?;
        self.add_named(index, entry)
            .map_err(|reason| located(index, &entry.name, reason))
    }

    fn add_named(&mut self, index: usize, entry: &Entry<'_>) -> Result<(), EntryError> {
        let name = names::clean(&entry.name)?;
        let place = names::place(&name)?;
        let is_file = &*entry.kind == b"reg";
        let node = match place {
            Place::Name { directory, base } => {
                let parent = self.tree.directory(directory)?;
                if &*entry.kind == b"hardlink" {
                    return self.add_link(index, entry, parent, base);
                }
                Some(self.tree.insert(parent, base, node(entry)?)?)
            }
            Place::Root => {
                // Unpacking leaves the root as it is; the time alone is kept,
                // for there is none better.
                if &*entry.kind != b"dir" {
                    return Err(EntryError::RootNotADirectory);
                }
                self.tree.root_mut().mtime = node(entry)?.mtime;
                None
            }
            Place::Whiteout { directory, base } => {
                let parent = self.tree.directory(directory)?;
                let whiteout = Node {
                    kind: NodeKind::CharDevice { major: 0, minor: 0 },
                    mode: 0,
                    uid: id("uid", entry.uid)?,
                    gid: id("gid", entry.gid)?,
                    mtime: mtime(entry)?,
                    links: 0,
                    xattrs: Box::default(),
                };
                self.tree.insert_whiteout(parent, base, whiteout)?;
                None
            }
            Place::Opaque { directory } => {
                let directory = self.tree.directory(directory)?;
                self.tree.set_opaque(directory);
                None
            }
            Place::PrefetchLandmark | Place::NoPrefetchLandmark => None,
        };
        if is_file {
            let at_landmark = self.boundaries.len();
            self.open_file(index, entry, node)?;
            if place == Place::PrefetchLandmark {
                self.landmark = self.boundaries.get(at_landmark).copied();
            }
        }
        Ok(())
    }

    fn add_link(
        &mut self,
        index: usize,
        entry: &Entry<'_>,
        parent: u32,
        base: &[u8],
    ) -> Result<(), EntryError> {
        let target = names::clean(&entry.link_name)?;
        let attributes = Attributes {
            mode: mode(entry)?,
            uid: id("uid", entry.uid)?,
            gid: id("gid", entry.gid)?,
            mtime: mtime(entry)?,
            xattrs: xattrs::parse(&entry.xattrs.0, Owner::Regular)?,
        };
        self.tree
            .insert_link(parent, base, &target, attributes, entry_at(index, entry))
    }

    fn open_file(
        &mut self,
        index: usize,
        entry: &Entry<'_>,
        node: Option<u32>,
    ) -> Result<(), EntryError> {
        let size = unsigned("size", entry.size)?;
        self.layer_bytes = self.layer_bytes.saturating_add(size);
        if self.layer_bytes > self.limits.max_layer_bytes {
            return Err(EntryError::LayerTooLarge {
                limit: self.limits.max_layer_bytes,
            });
        }
        let start = self.chunks.len() as u32;
        self.file = Some(OpenFile {
            entry: entry_at(index, entry),
            node,
            size,
            chunks: start..start,
            next: 0,
        });
        if size > 0 {
            self.add_chunk(entry)?;
        }
        // Where containers/storage says that the file's last unit ends.
        if entry.end_offset != 0 {
            self.boundaries
                .push(unsigned("endOffset", entry.end_offset)?.min(self.chunks_end));
        }
        Ok(())
    }

    /// Adds a chunk to the open file. The first is described on the file's
    /// own entry.
    fn add_chunk(&mut self, entry: &Entry<'_>) -> Result<(), EntryError> {
        let file = self.file.as_mut().ok_or(EntryError::ChunkWithoutFile)?;
        let file_offset = unsigned("chunkOffset", entry.chunk_offset)?;
        if file_offset != file.next {
            return Err(EntryError::ChunkGap {
                expected: file.next,
                actual: file_offset,
            });
        }
        let rest = file.size - file.next;
        let size = match unsigned("chunkSize", entry.chunk_size)? {
            0 => rest,
            size => size,
        };
        if size == 0 || size > rest {
            return Err(EntryError::ChunkSize {
                offset: file_offset,
                size: file.size,
            });
        }
        let digest = if !entry.chunk_digest.is_empty() {
            digest(&entry.chunk_digest)?
        } else if size == file.size && !entry.digest.is_empty() {
            digest(&entry.digest)?
        } else {
            return Err(EntryError::DigestMissing);
        };
        let offset = unsigned("offset", entry.offset)?;
        let inner_offset = unsigned("innerOffset", entry.inner_offset)?;
        let source = match &*entry.chunk_type {
            b"" => {
                if offset >= self.chunks_end {
                    return Err(EntryError::OutsideBlob {
                        offset,
                        end: self.chunks_end,
                    });
                }
                let decoded = inner_offset.saturating_add(size);
                if decoded > self.limits.max_unit_bytes {
                    return Err(EntryError::UnitTooLarge {
                        offset: file_offset,
                        size: decoded,
                        limit: self.limits.max_unit_bytes,
                    });
                }
                if file.node.is_some() {
                    self.first_offset = self.first_offset.min(offset);
                }
                let unit = Unit { offset, size: 0 };
                ChunkSource::Blob { unit, inner_offset }
            }
            b"zeros" => ChunkSource::Zeros,
            other => return Err(EntryError::ChunkType(printable(other))),
        };
        self.tree.memory.take(size_of::<Chunk>() + PER_CHUNK)?;
        self.boundaries.push(offset.min(self.chunks_end));
        file.next += size;
        file.chunks.end += 1;
        self.chunks.push(Chunk {
            file_offset,
            size,
            digest,
            source,
        });
        Ok(())
    }

    /// Checks that the open file's chunks are all there.
    fn close_file(&mut self) -> Result<(), TocError> {
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        if file.next != file.size {
            let reason = EntryError::ChunksShort {
                end: file.next,
                size: file.size,
            };
            return Err(located(file.entry.index, &file.entry.name, reason));
        }
        if let Some(node) = file.node {
            self.tree.node_mut(node).kind = NodeKind::Regular(FileContent {
                size: file.size,
                chunks: file.chunks,
            });
        }
        Ok(())
    }

    fn finish(mut self, format: Format) -> Result<Toc, TocError> {
        self.close_file()?;
        units::assign(&mut self.chunks, self.boundaries, self.chunks_end)?;
        let nodes = self
            .tree
            .finish(&mut self.chunks)
            .map_err(|(at, reason)| located(at.index, &at.name, reason))?;
        self.chunks.shrink_to_fit();
        Ok(Toc {
            format,
            nodes,
            chunks: self.chunks,
            prefetch_end: self.landmark.filter(|end| self.first_offset < *end),
            toc_offset: self.chunks_end,
        })
    }
}

/// The inode that an entry describes; a file's content comes later.
fn node(entry: &Entry<'_>) -> Result<Node, EntryError> {
    let (kind, owner) = match &*entry.kind {
        b"dir" => {
            let directory = Directory {
                parent: NodeId::ROOT,
                children: Vec::new(),
                opaque: false,
            };
            (NodeKind::Directory(directory), Owner::Directory)
        }
        b"reg" => {
            let content = FileContent {
                size: 0,
                chunks: 0..0,
            };
            (NodeKind::Regular(content), Owner::Regular)
        }
        b"symlink" => (NodeKind::Symlink(symlink_target(entry)?), Owner::Other),
        b"char" => {
            let (major, minor) = device(entry)?;
            (NodeKind::CharDevice { major, minor }, Owner::Other)
        }
        b"block" => {
            let (major, minor) = device(entry)?;
            (NodeKind::BlockDevice { major, minor }, Owner::Other)
        }
        b"fifo" => (NodeKind::Fifo, Owner::Other),
        other => return Err(EntryError::UnknownType(printable(other))),
    };
    let is_symlink = matches!(kind, NodeKind::Symlink(_));
    Ok(Node {
        kind,
        // Linux has no other for a symbolic link.
        mode: if is_symlink { 0o777 } else { mode(entry)? },
        uid: id("uid", entry.uid)?,
        gid: id("gid", entry.gid)?,
        mtime: mtime(entry)?,
        links: 0,
        xattrs: xattrs::parse(&entry.xattrs.0, owner)?,
    })
}

fn symlink_target(entry: &Entry<'_>) -> Result<Box<[u8]>, EntryError> {
    let target = &*entry.link_name;
    if target.is_empty() {
        return Err(EntryError::SymlinkEmpty);
    }
    if target.len() > MAX_PATH || target.contains(&0) {
        return Err(EntryError::SymlinkTarget);
    }
    Ok(target.into())
}

fn device(entry: &Entry<'_>) -> Result<(u32, u32), EntryError> {
    let number = |field, value, most| {
        u32::try_from(value)
            .ok()
            .filter(|number| *number <= most)
            .ok_or(EntryError::OutOfRange { field, value })
    };
    Ok((
        number("devMajor", entry.dev_major, MAX_MAJOR)?,
        number("devMinor", entry.dev_minor, MAX_MINOR)?,
    ))
}

/// Permission bits; tars carry the file's type in the same number.
fn mode(entry: &Entry<'_>) -> Result<u16, EntryError> {
    Ok((unsigned("mode", entry.mode)? & 0o7777) as u16)
}

/// A user or group; all ones means "nobody in particular" to Linux.
fn id(field: &'static str, value: i64) -> Result<u32, EntryError> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or(EntryError::OutOfRange { field, value })
}

fn mtime(entry: &Entry<'_>) -> Result<Mtime, EntryError> {
    let text = &*entry.mod_time;
    if text.is_empty() {
        return Ok(Mtime::default());
    }
    time::parse(text).ok_or_else(|| EntryError::Time(printable(text)))
}

fn unsigned(field: &'static str, value: i64) -> Result<u64, EntryError> {
    u64::try_from(value).map_err(|_| EntryError::OutOfRange { field, value })
}

fn digest(text: &[u8]) -> Result<Digest, EntryError> {
    std::str::from_utf8(text)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| EntryError::Digest(printable(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: u64 = 1 << 40;

    /// JSON that is worth two threads.
    fn json(entry_of: impl Fn(usize) -> String) -> String {
        let entries: Vec<String> = (0..8_000).map(entry_of).collect();
        let json = format!(r#"{{"version":1,"entries":[{}]}}"#, entries.join(","));
        assert!(json.len() >= WORTH_TWO, "{} bytes", json.len());
        json
    }

    fn file(index: usize) -> String {
        // An escape makes a name that is not borrowed.
        format!(
            r#"{{"name":"d{}/\u0066-{index}","type":"reg","size":7,"mode":420,"offset":{},"modtime":"2024-01-01T00:00:00Z","digest":"sha256:{index:064x}"}}"#,
            index / 100,
            index * 100,
        )
    }

    fn whole(json: &str, limits: &Limits) -> Result<Toc, TocError> {
        build_whole(Format::Estargz, END, json.as_bytes(), limits)
    }

    fn by_one(json: &str) -> Result<Toc, TocError> {
        let reader = SliceRead::new(json.as_bytes());
        build(Format::Estargz, END, reader, &Limits::default(), 0)
    }

    #[test]
    fn two_threads_make_the_tree_that_one_makes() {
        let json = json(file);
        let toc = whole(&json, &Limits::default()).unwrap();
        assert_eq!(toc.nodes().len(), 1 + 80 + 8_000);
        assert_eq!(toc, by_one(&json).unwrap());
    }

    #[test]
    fn two_threads_tell_the_first_fault_as_one_does() {
        let outside = |index| match index {
            5_000 | 7_000 => file(index).replace(r"\u0066-", "../"),
            _ => file(index),
        };
        let cut_short = |json: String| json[..json.len() - 3].to_owned();
        let unreadable = |index| match index {
            6_001 => "{]".to_owned(),
            6_000 => file(index).replace("\"reg\"", "\"rag\""),
            _ => file(index),
        };
        for (json, expected) in [
            (json(outside), "entry 5000"),
            (cut_short(json(outside)), "entry 5000"),
            (cut_short(json(file)), "EOF"),
            (json(unreadable), "entry 6000"),
        ] {
            let error = whole(&json, &Limits::default()).err().unwrap();
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(error.to_string(), by_one(&json).err().unwrap().to_string());
        }
    }

    #[test]
    fn regression_what_a_toc_takes_is_told_before() {
        for entries in [3_000, 8_000, 30_000] {
            let entries: Vec<String> = (0..entries).map(file).collect();
            let json = format!(r#"{{"version":1,"entries":[{}]}}"#, entries.join(","));
            let enough = Limits {
                max_memory: likely_memory(json.len() as u64),
                ..Limits::default()
            };
            let made = whole(&json, &enough);
            assert!(made.is_ok(), "{} bytes of JSON", json.len());
        }
    }

    #[test]
    fn limits_hold_with_two_threads() {
        let json = json(file);
        let entries = Limits {
            max_entries: 8_000,
            ..Limits::default()
        };
        let error = whole(&json, &entries).err().unwrap();
        assert!(error.to_string().contains("8000"), "{error}");
        let memory = Limits {
            max_memory: json.len() as u64 + IN_BATCHES,
            ..Limits::default()
        };
        let error = whole(&json, &memory).err().unwrap();
        assert!(error.to_string().contains("memory"), "{error}");
    }
}
