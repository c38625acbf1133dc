//! Cutting a tar stream into units.

use sluice_oci::{Digest, Hasher};

use super::cut::Cutter;
use super::entries::{ChunkPart, Entries, ReadAtStart};
use super::header::{BLOCK, Header, Kind, encode};
use super::scan::{Event, Scanner};
use super::tarsplit::{Recorder, TarSplit};
use super::{
    Chunking, NO_PREFETCH_LANDMARK, Options, PREFETCH_LANDMARK, TOC_NAME, WriteError, clean_name,
};
use crate::{Format, StartReads};

/// The most bytes of headers and padding in one unit. Only layers with very
/// many empty files and directories reach it.
const MAX_FILLING: usize = 1 << 20;

/// The one byte that a landmark holds.
const LANDMARK_CONTENT: [u8; 1] = [0x0f];

/// What is compressed as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawUnit {
    /// The content of a chunk and the tar bytes after it.
    pub(super) bytes: Vec<u8>,
    /// How many of the bytes are content.
    pub(super) content: usize,
}

impl RawUnit {
    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }
}

/// Where a [`Splitter`] hands its units.
pub type Units<'u> = dyn FnMut(RawUnit) + 'u;

/// Cuts a tar stream into units and collects the TOC's entries.
///
/// eStargz layers lose their end-of-archive blocks, which follow the TOC
/// instead, and get a landmark. zstd:chunked layers keep every byte, unless
/// they held a TOC or landmark of their own or a sparse file.
pub struct Splitter {
    options: Options,
    scanner: Option<Scanner>,
    sink: Sink,
}

struct Sink {
    options: Options,
    unit: RawUnit,
    entries: Entries,
    /// Where chunks end, unless that is at multiples of their size.
    cutter: Option<Cutter>,
    /// Where in the file the cutter has cut last.
    cut: u64,
    /// The entry whose content is passing.
    file: Current,
    /// Digest of what is read, where it is sure to differ from what is
    /// written.
    input: Option<Hasher>,
    output: Hasher,
    /// Whether what was written differs from what was read.
    altered: bool,
    size: u64,
    tar_split: Option<Recorder>,
    read_at_start: Option<ReadAtStart>,
}

enum Current {
    Dropped,
    /// A kind that holds no content, or only bytes that the TOC ignores.
    Opaque,
    File {
        position: u64,
        size: u64,
        whole: Hasher,
    },
}

/// Everything of a layer but its compressed units.
pub struct Split {
    pub(super) options: Options,
    pub(super) entries: Entries,
    pub(super) input: Option<Digest>,
    pub(super) output: Hasher,
    pub(super) size: u64,
    pub(super) tar_split: Option<TarSplit>,
    pub(super) read_at_start: Option<ReadAtStart>,
}

impl Splitter {
    /// Begins a layer. `prioritized` says whether prioritized files come
    /// first, after which the caller states [`Splitter::end_prioritized`].
    pub fn new(
        options: &Options,
        prioritized: bool,
        units: &mut Units<'_>,
    ) -> Result<Self, WriteError> {
        let zstd = options.format == Format::ZstdChunked;
        let mut splitter = Self {
            options: *options,
            scanner: Some(Scanner::new()),
            sink: Sink {
                options: *options,
                unit: RawUnit {
                    bytes: Vec::new(),
                    content: 0,
                },
                entries: Entries::default(),
                cutter: match options.chunking {
                    Chunking::Fixed => None,
                    Chunking::Content => Some(Cutter::new(options.chunk_size)),
                },
                cut: 0,
                file: Current::Opaque,
                input: (!zstd && !prioritized).then(Hasher::new),
                output: Hasher::new(),
                altered: prioritized,
                size: 0,
                tar_split: if zstd { Some(Recorder::new()?) } else { None },
                read_at_start: None,
            },
        };
        if !zstd && !prioritized {
            splitter.sink.landmark(NO_PREFETCH_LANDMARK, units)?;
        }
        Ok(splitter)
    }

    /// Ends the prioritized files, of which `reads` is read if that is known.
    /// The stream must stand between two entries.
    pub fn end_prioritized(
        &mut self,
        reads: Option<&StartReads>,
        units: &mut Units<'_>,
    ) -> Result<(), WriteError> {
        self.sink.read_at_start = reads.map(|reads| self.sink.entries.read_at_start(reads));
        self.sink.landmark(PREFETCH_LANDMARK, units)
    }

    /// Takes more of the tar.
    pub fn push(&mut self, bytes: &[u8], units: &mut Units<'_>) -> Result<(), WriteError> {
        let Some(scanner) = &mut self.scanner else {
            return Ok(());
        };
        let sink = &mut self.sink;
        if let Some(input) = &mut sink.input {
            input.update(bytes);
        }
        scanner.push(bytes, &mut |event| sink.event(event, units))
    }

    /// Ends the tar.
    pub fn finish(mut self, units: &mut Units<'_>) -> Result<Split, WriteError> {
        let mut sink = self.sink;
        if let Some(scanner) = self.scanner.take() {
            scanner.finish()?;
            // The TOC's header follows.
            if self.options.format == Format::Estargz {
                sink.raw(&[0; BLOCK][..scanner.padding_left()], units);
            }
        }
        sink.flush(units);
        let tar_split = sink.tar_split.take().and_then(Recorder::finish);
        let unaltered = || (!sink.altered).then(|| sink.output.clone());
        Ok(Split {
            options: self.options,
            input: sink.input.or_else(unaltered).map(Hasher::finish),
            entries: sink.entries,
            output: sink.output,
            size: sink.size,
            tar_split,
            read_at_start: sink.read_at_start,
        })
    }
}

impl Sink {
    fn event(&mut self, event: Event<'_>, units: &mut Units<'_>) -> Result<(), WriteError> {
        match event {
            Event::Entry {
                header,
                raw,
                rewrote,
                ..
            } => self.entry(*header, raw, rewrote, units),
            Event::Content(bytes) => {
                self.content(bytes, units);
                Ok(())
            }
            Event::Padding(bytes) => {
                if !matches!(self.file, Current::Dropped) {
                    self.filling(bytes, units);
                }
                Ok(())
            }
            Event::End { bytes, .. } => {
                if self.options.format == Format::ZstdChunked {
                    self.filling(bytes, units);
                }
                Ok(())
            }
        }
    }

    fn entry(
        &mut self,
        header: Header,
        raw: &[u8],
        rewrote: bool,
        units: &mut Units<'_>,
    ) -> Result<(), WriteError> {
        if is_reserved(&header) {
            self.altered = true;
            self.file = Current::Dropped;
            return Ok(());
        }
        self.altered |= rewrote;
        self.add(header, raw, units)
    }

    fn add(&mut self, header: Header, raw: &[u8], units: &mut Units<'_>) -> Result<(), WriteError> {
        if let Some(recorder) = &mut self.tar_split
            && !recorder.entry(&header, raw)
        {
            self.tar_split = None;
        }
        self.raw(raw, units);
        self.file = match header.kind {
            Kind::Global => Current::Opaque,
            kind => {
                let size = header.size;
                self.entries.add(header)?;
                match (kind, size) {
                    (Kind::Regular, 0) => {
                        self.entries.digest(Digest::of(b""));
                        Current::Opaque
                    }
                    (Kind::Regular, size) => Current::File {
                        position: 0,
                        size,
                        whole: Hasher::new(),
                    },
                    _ => Current::Opaque,
                }
            }
        };
        Ok(())
    }

    fn content(&mut self, mut bytes: &[u8], units: &mut Units<'_>) {
        if matches!(self.file, Current::Dropped) {
            return;
        }
        if let Some(recorder) = &mut self.tar_split {
            recorder.content(bytes);
        }
        if matches!(self.file, Current::Opaque) {
            return self.raw(bytes, units);
        }
        while let Current::File {
            position,
            size,
            whole,
        } = &mut self.file
        {
            if bytes.is_empty() {
                break;
            }
            let chunk_size = self.options.chunk_size_of(*size);
            let several = *size > chunk_size;
            let mut now =
                usize::try_from(*size - *position).map_or(bytes.len(), |n| n.min(bytes.len()));
            if let (Some(cutter), true) = (&mut self.cutter, several) {
                let last = *position + now as u64 == *size;
                let mut offset = self.cut;
                let (entries, unit) = (&mut self.entries, &mut self.unit);
                cutter.push(&bytes[..now], last, |chunk| {
                    let part = ChunkPart {
                        file_offset: offset,
                        size: chunk.len() as u64,
                    };
                    begin(entries, unit, part, units);
                    unit.bytes.extend_from_slice(chunk);
                    unit.content += chunk.len();
                    offset += chunk.len() as u64;
                });
                self.cut = if last { 0 } else { offset };
            } else {
                let in_chunk = *position % chunk_size;
                if in_chunk == 0 {
                    let part = ChunkPart {
                        file_offset: *position,
                        size: chunk_size.min(*size - *position),
                    };
                    begin(&mut self.entries, &mut self.unit, part, units);
                }
                now = usize::try_from(chunk_size - in_chunk).map_or(now, |left| left.min(now));
                self.unit.bytes.extend_from_slice(&bytes[..now]);
                self.unit.content += now;
            }
            let (now, rest) = bytes.split_at(now);
            *position += now.len() as u64;
            self.output.update(now);
            self.size += now.len() as u64;
            if several {
                whole.update(now);
                if *position == *size {
                    self.entries.digest(whole.clone().finish());
                }
            }
            bytes = rest;
        }
    }

    /// Padding or end of archive.
    fn filling(&mut self, bytes: &[u8], units: &mut Units<'_>) {
        if let Some(recorder) = &mut self.tar_split
            && !recorder.filling(bytes)
        {
            self.tar_split = None;
        }
        self.raw(bytes, units);
    }

    /// Tar bytes that belong to no chunk.
    fn raw(&mut self, mut bytes: &[u8], units: &mut Units<'_>) {
        self.size += bytes.len() as u64;
        self.output.update(bytes);
        // Cuts at the same places however the stream was handed in.
        while !bytes.is_empty() {
            let filled = self.unit.bytes.len() - self.unit.content;
            let now = (MAX_FILLING - filled).min(bytes.len());
            self.unit.bytes.extend_from_slice(&bytes[..now]);
            if filled + now == MAX_FILLING {
                self.flush(units);
            }
            bytes = &bytes[now..];
        }
    }

    fn flush(&mut self, units: &mut Units<'_>) {
        let next = RawUnit {
            bytes: Vec::new(),
            content: 0,
        };
        emit(std::mem::replace(&mut self.unit, next), units);
    }

    fn landmark(&mut self, name: &str, units: &mut Units<'_>) -> Result<(), WriteError> {
        self.altered = true;
        let header = Header {
            kind: Kind::Regular,
            name: name.into(),
            link: Vec::new(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            user: Vec::new(),
            group: Vec::new(),
            size: LANDMARK_CONTENT.len() as u64,
            mtime: Default::default(),
            atime: None,
            ctime: None,
            dev_major: 0,
            dev_minor: 0,
            xattrs: Default::default(),
        };
        let raw = encode(&header);
        self.add(header, &raw, units)?;
        self.content(&LANDMARK_CONTENT, units);
        self.filling(&[0; BLOCK - LANDMARK_CONTENT.len()], units);
        Ok(())
    }
}

/// Begins a chunk, and with it a unit.
fn begin(entries: &mut Entries, unit: &mut RawUnit, part: ChunkPart, units: &mut Units<'_>) {
    entries.chunk(part);
    let room = usize::try_from(part.size).unwrap_or_default() + BLOCK;
    let next = RawUnit {
        bytes: Vec::with_capacity(room),
        content: 0,
    };
    emit(std::mem::replace(unit, next), units);
}

fn emit(unit: RawUnit, units: &mut Units<'_>) {
    if !unit.bytes.is_empty() {
        units(unit);
    }
}

/// Names that the formats keep for themselves; an input that was seekable
/// has them.
pub(super) fn is_reserved(header: &Header) -> bool {
    let Ok(name) = std::str::from_utf8(&header.name) else {
        return false;
    };
    header.kind == Kind::Regular
        && [TOC_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK].contains(&clean_name(name).as_str())
}

/// Whether an entry is the TOC of an eStargz layer.
pub(super) fn is_toc(header: &Header) -> bool {
    let name = std::str::from_utf8(&header.name);
    header.kind == Kind::Regular && name.is_ok_and(|name| clean_name(name) == TOC_NAME)
}
