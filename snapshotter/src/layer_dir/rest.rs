//! `tar-rest`: the bytes of a layer's tar between the contents of its files,
//! kept as units are decoded until the tar's digest is known.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use parking_lot::Mutex;
use sluice_oci::Digest;

use super::chunks::{u32_at, u64_at};

const MAGIC: &[u8; 8] = b"SLTARRST";
const VERSION: u32 = 1;
const HEADER: u64 = 64;
/// Bytes before a record's payload, and before each piece in it.
const RECORD: usize = 16;
const PIECE: usize = 24;
/// Longest piece: longer ones are cut.
pub const LONGEST_PIECE: usize = 1 << 20;
/// Most that a record decompresses to.
const MOST: usize = LONGEST_PIECE + (64 << 10);
/// Headers of a tar shrink to a tenth at any level.
const LEVEL: i32 = 1;
/// Added to where a span begins: its pieces are of the span as the blob stores
/// it, to be unpacked when its rest is needed.
const STORED: u64 = 1 << 63;

/// A part of what a span of the blob holds between chunks.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// Where the span begins in the blob.
    pub span: u64,
    /// How much of its rest comes before.
    pub at: u64,
    /// Whether it is the last.
    pub last: bool,
    /// At most [`LONGEST_PIECE`].
    pub bytes: &'a [u8],
}

/// The file. What is damaged or missing in it is fetched again, so nothing in
/// it is made durable.
#[derive(Debug)]
pub struct TarRest {
    path: PathBuf,
    layer: Digest,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    place: Place,
    /// Who alone may add to it, if it is not everybody.
    owner: Option<Owner>,
    owners: u64,
}

#[derive(Debug)]
enum Place {
    /// Not looked at yet.
    Closed,
    /// Where the next record goes.
    Open { file: File, end: u64 },
    /// Nobody will ask for it.
    Done,
}

/// Somebody who had the file for himself; nobody is that twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner(u64);

impl TarRest {
    pub(super) fn new(path: PathBuf, layer: Digest, needed: bool) -> Self {
        Self {
            path,
            layer,
            state: Mutex::new(State {
                place: if needed { Place::Closed } else { Place::Done },
                owner: None,
                owners: 0,
            }),
        }
    }

    /// Whether it is still worth to add to it what passes by.
    pub fn is_needed(&self) -> bool {
        let state = self.state.lock();
        !matches!(state.place, Place::Done) && state.owner.is_none()
    }

    /// Adds pieces, in records of a mebibyte. While the file is another's than
    /// `by`, what is given is dropped.
    pub fn append(&self, pieces: &[Piece<'_>], by: Option<Owner>) -> io::Result<()> {
        let mut payload = Vec::new();
        for piece in pieces {
            if !payload.is_empty() && payload.len() + PIECE + piece.bytes.len() > MOST {
                self.write(&payload, by)?;
                payload.clear();
            }
            payload.extend_from_slice(&piece.span.to_le_bytes());
            payload.extend_from_slice(&piece.at.to_le_bytes());
            payload.extend_from_slice(&(piece.bytes.len() as u32).to_le_bytes());
            payload.extend_from_slice(&u32::from(piece.last).to_le_bytes());
            payload.extend_from_slice(piece.bytes);
        }
        match payload.is_empty() {
            true => Ok(()),
            false => self.write(&payload, by),
        }
    }

    /// Adds a span as the blob stores it, which takes less time than to unpack
    /// it.
    pub(super) fn append_stored(&self, span: u64, bytes: &[u8]) -> io::Result<()> {
        let parts = bytes.chunks(LONGEST_PIECE);
        let last = parts.len().saturating_sub(1);
        let pieces = parts.enumerate().map(|(number, bytes)| Piece {
            span: STORED | span,
            at: (number * LONGEST_PIECE) as u64,
            last: number == last,
            bytes,
        });
        let appended = self.append(&pieces.collect::<Vec<_>>(), None);
        // Most layers that are open are not read: each has a descriptor only.
        let mut state = self.state.lock();
        if let Place::Open { .. } = state.place {
            state.place = Place::Closed;
        }
        appended
    }

    fn write(&self, payload: &[u8], by: Option<Owner>) -> io::Result<()> {
        let compressed = zstd::bulk::compress(payload, LEVEL)?;
        let mut record = Vec::with_capacity(RECORD + compressed.len());
        record.extend_from_slice(&(compressed.len() as u32).to_le_bytes());
        record.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        record.extend_from_slice(&libdeflater::crc32(&compressed).to_le_bytes());
        record.extend_from_slice(&libdeflater::crc32(&record).to_le_bytes());
        record.extend_from_slice(&compressed);
        let mut state = self.state.lock();
        if state.owner != by {
            return Ok(());
        }
        if let Place::Closed = state.place {
            state.place = self.open()?;
            crash_point!("rest.opened");
        }
        if let Place::Open { file, end } = &mut state.place {
            file.write_all_at(&record, *end)?;
            // Only now: what a full disk has cut short is written over.
            *end += record.len() as u64;
            crash_point!("rest.written");
        }
        Ok(())
    }

    /// Opens the file, or makes it, and finds the end of its sound records.
    fn open(&self) -> io::Result<Place> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&self.path)?;
        let mut end = HEADER;
        if is_header(&file, self.layer) {
            while let Some((.., next)) = record(&file, end) {
                end = next;
            }
        } else {
            file.set_len(0)?;
            file.write_all_at(&header(self.layer), 0)?;
        }
        Ok(Place::Open { file, end })
    }

    /// What there is, for somebody who reads all of it.
    pub fn index(&self) -> io::Result<RestIndex> {
        let mut state = self.state.lock();
        if let Place::Closed = state.place {
            state.place = self.open()?;
        }
        let Place::Open { file, .. } = &state.place else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let file = file.try_clone()?;
        drop(state);
        let mut entries = Vec::new();
        let mut at = HEADER;
        while let Some((payload, next)) = payload(&file, at) {
            let mut from = 0;
            while let Some(head) = payload.get(from..from + PIECE) {
                let len = u32_at(head, 16) as usize;
                from += PIECE;
                if payload.len() - from < len {
                    break;
                }
                entries.push(Entry {
                    span: u64_at(head, 0),
                    at: u64_at(head, 8),
                    record: at,
                    from: from as u32,
                    len: len as u32,
                    last: u32_at(head, 20) != 0,
                });
                from += len;
            }
            at = next;
        }
        // Of two for the same place the later, which comes last, stays.
        entries.reverse();
        entries.sort_by_key(|entry: &Entry| (entry.span, entry.at));
        entries.dedup_by_key(|entry| (entry.span, entry.at));
        Ok(RestIndex {
            file,
            entries,
            payload: (0, Vec::new()),
        })
    }

    /// Begins anew, for somebody who needs all of it from one source: nobody
    /// else can add to it until [`Self::release`].
    pub fn take(&self) -> Owner {
        let mut state = self.state.lock();
        let _ = fs::remove_file(&self.path);
        state.place = Place::Closed;
        state.owners += 1;
        let owner = Owner(state.owners);
        state.owner = Some(owner);
        owner
    }

    /// Lets everybody add to it again, unless it is another's by now.
    pub fn release(&self, owner: Owner) {
        let mut state = self.state.lock();
        if state.owner == Some(owner) {
            state.owner = None;
        }
    }

    /// Drops the file: nobody needs it any more.
    pub fn finish(&self) {
        let mut state = self.state.lock();
        let _ = fs::remove_file(&self.path);
        state.place = Place::Done;
    }
}

/// What is in the file.
#[derive(Debug)]
pub struct RestIndex {
    file: File,
    entries: Vec<Entry>,
    /// The record that was read last, and where it is.
    payload: (u64, Vec<u8>),
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    span: u64,
    at: u64,
    record: u64,
    from: u32,
    len: u32,
    last: bool,
}

impl RestIndex {
    fn of(&self, span: u64) -> &[Entry] {
        let from = self.entries.partition_point(|entry| entry.span < span);
        let len = self.entries[from..].partition_point(|entry| entry.span == span);
        &self.entries[from..from + len]
    }

    /// The size of a span's rest, if all of it is there.
    pub fn size(&self, span: u64) -> Option<u64> {
        let mut size = 0;
        for entry in self.of(span) {
            if entry.at != size {
                return None;
            }
            size += u64::from(entry.len);
            if entry.last {
                return Some(size);
            }
        }
        None
    }

    /// A span's rest, if all of it is there.
    pub fn into_reader(self, span: u64) -> Option<RestReader> {
        Some(RestReader {
            end: self.size(span)?,
            span,
            at: 0,
            rest: self,
        })
    }

    /// A span as the blob stores it, if it was kept so.
    pub fn into_stored(self, span: u64) -> Option<RestReader> {
        self.into_reader(STORED | span)
    }

    /// Hands out `from..to` of a span's rest.
    pub fn read(
        &mut self,
        span: u64,
        from: u64,
        to: u64,
        mut each: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let pieces = self.of(span);
        let first = pieces.partition_point(|piece| piece.at + u64::from(piece.len) <= from);
        let pieces = pieces[first..].to_vec();
        let mut at = from;
        for piece in pieces {
            if at >= to {
                break;
            }
            if self.payload.0 != piece.record {
                let (payload, _) = payload(&self.file, piece.record).ok_or_else(cut_short)?;
                self.payload = (piece.record, payload);
            }
            let end = to.min(piece.at + u64::from(piece.len));
            let place = |at: u64| piece.from as usize + (at - piece.at) as usize;
            let bytes = self.payload.1.get(place(at)..place(end));
            each(bytes.ok_or_else(cut_short)?)?;
            at = end;
        }
        match at >= to {
            true => Ok(()),
            false => Err(cut_short()),
        }
    }
}

/// What is kept of a span, from beginning to end.
#[derive(Debug)]
pub struct RestReader {
    rest: RestIndex,
    span: u64,
    at: u64,
    end: u64,
}

impl Read for RestReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let end = self.end.min(self.at.saturating_add(buffer.len() as u64));
        let mut count = 0;
        self.rest.read(self.span, self.at, end, |bytes| {
            buffer[count..count + bytes.len()].copy_from_slice(bytes);
            count += bytes.len();
            Ok(())
        })?;
        self.at = end;
        Ok(count)
    }
}

fn cut_short() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "tar-rest was changed meanwhile",
    )
}

fn header(layer: Digest) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER as usize);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&[0; 4]);
    header.extend_from_slice(layer.as_raw());
    header.extend_from_slice(&[0; 12]);
    header.extend_from_slice(&libdeflater::crc32(&header).to_le_bytes());
    header
}

fn is_header(file: &File, layer: Digest) -> bool {
    let mut found = [0; HEADER as usize];
    file.read_exact_at(&mut found, 0).is_ok() && found[..] == header(layer)[..]
}

/// The compressed payload of the record at `at`, what it decompresses to at
/// most, and where the next one is.
fn record(file: &File, at: u64) -> Option<(Vec<u8>, usize, u64)> {
    let mut head = [0; RECORD];
    file.read_exact_at(&mut head, at).ok()?;
    let (len, size) = (u32_at(&head, 0) as usize, u32_at(&head, 4) as usize);
    let sound = u32_at(&head, 12) == libdeflater::crc32(&head[..12]);
    if !sound || size > MOST || len > zstd::zstd_safe::compress_bound(MOST) {
        return None;
    }
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, at + RECORD as u64).ok()?;
    let sound = u32_at(&head, 8) == libdeflater::crc32(&bytes);
    sound.then_some((bytes, size, at + (RECORD + len) as u64))
}

/// The payload of the record at `at`, and where the next one is.
fn payload(file: &File, at: u64) -> Option<(Vec<u8>, u64)> {
    let (bytes, size, next) = record(file, at)?;
    Some((zstd::bulk::decompress(&bytes, size).ok()?, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_has_for_himself_nobody_else_adds_to() {
        let root = tempfile::tempdir().unwrap();
        let rest = TarRest::new(root.path().join("tar-rest"), Digest::of(b"x"), true);
        let add = |span: u64, by: Option<Owner>| {
            let piece = Piece {
                span,
                at: 0,
                last: true,
                bytes: b"rest",
            };
            rest.append(&[piece], by).unwrap();
        };
        let spans = || {
            let index = rest.index().unwrap();
            let found = (0..9).filter(|&span| index.size(span).is_some());
            found.collect::<Vec<_>>()
        };
        add(1, None);
        assert_eq!(spans(), [1]);
        let owner = rest.take();
        assert!(!rest.is_needed());
        add(2, None);
        add(3, Some(owner));
        assert_eq!(spans(), [3]);
        let next = rest.take();
        add(4, Some(owner));
        rest.release(owner);
        add(5, None);
        add(6, Some(next));
        assert_eq!(spans(), [6]);
        rest.release(next);
        assert!(rest.is_needed());
        add(7, None);
        add(8, Some(next));
        assert_eq!(spans(), [6, 7]);
    }
}
