//! A tar stream, entry by entry, with the raw bytes kept.

use super::WriteError;
use super::header::{BLOCK, Block, Extensions, Header, pax_records, text};
use super::sparse::{self, Segment};

/// As Go's reader: no honest extension header is larger.
const MAX_EXTENSION: u64 = 1 << 20;

/// A stretch of a tar stream.
#[derive(Debug)]
pub(super) enum Event<'a> {
    /// An entry begins. `raw` holds all of its header blocks, extensions
    /// included; the scanner `rewrote` them where the original could not stay.
    Entry {
        header: Box<Header>,
        raw: &'a [u8],
        rewrote: bool,
        /// Offset of the entry's first byte.
        start: u64,
    },
    /// Content of the entry.
    Content(&'a [u8]),
    /// What fills the entry's last block.
    Padding(&'a [u8]),
    /// The end-of-archive blocks and whatever follows them.
    End {
        bytes: &'a [u8],
        /// Offset of the first of them.
        start: u64,
    },
}

type Handler<'h> = dyn FnMut(Event<'_>) -> Result<(), WriteError> + 'h;

/// Accepts a tar stream in pieces of any size and reports [`Event`]s.
#[derive(Debug)]
pub(super) struct Scanner {
    state: State,
    /// Bytes of a block or extension that has not arrived as a whole.
    pending: Vec<u8>,
    /// Header blocks of the current entry so far.
    raw: Vec<u8>,
    extensions: Extensions,
    /// Bytes seen.
    position: u64,
    /// Where the current entry began.
    entry_start: u64,
    started: bool,
}

#[derive(Debug)]
enum State {
    Header,
    Extension {
        flag: u8,
        size: u64,
    },
    Content {
        left: u64,
        padding: u64,
    },
    Padding {
        left: u64,
    },
    /// More map blocks of an old GNU sparse file.
    SparseMap(Box<SparseFile>),
    /// The map at the start of a PAX 1.0 sparse file's content.
    SparseText(Box<SparseFile>),
    SparseContent(Box<SparseContent>),
    /// Padding of the stored bytes of a sparse file, which is dropped.
    Discard {
        left: u64,
    },
    /// One block of zeros was seen.
    MaybeEnd,
    End,
}

#[derive(Debug)]
struct SparseFile {
    header: Header,
    stored: u64,
    map: Vec<Segment>,
}

#[derive(Debug)]
struct SparseContent {
    plan: std::vec::IntoIter<sparse::Piece>,
    current: sparse::Piece,
    discard: u64,
    padding: u64,
}

impl Scanner {
    pub(super) fn new() -> Self {
        Self {
            state: State::Header,
            pending: Vec::new(),
            raw: Vec::new(),
            extensions: Extensions::default(),
            position: 0,
            entry_start: 0,
            started: false,
        }
    }

    /// Bytes consumed so far. Between entries, the offset where the next one
    /// begins.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Takes more of the stream.
    pub(super) fn push(
        &mut self,
        mut bytes: &[u8],
        handler: &mut Handler<'_>,
    ) -> Result<(), WriteError> {
        while !bytes.is_empty() {
            let used = self.step(bytes, handler)?;
            self.position += used as u64;
            bytes = &bytes[used..];
        }
        Ok(())
    }

    /// Checks that the stream ends where an archive may end.
    pub(super) fn finish(&self) -> Result<(), WriteError> {
        let between = matches!(self.state, State::Header) && self.pending.is_empty();
        match self.state {
            State::End | State::MaybeEnd | State::Padding { .. } | State::Discard { .. } => Ok(()),
            _ if between && self.raw.is_empty() => Ok(()),
            _ if !self.started => Err(WriteError::NotTar),
            _ => Err(WriteError::Truncated {
                position: self.position,
            }),
        }
    }

    /// Padding that is still to come. Some writers leave the last entry's
    /// out, and Go's reader does not miss it.
    pub(super) fn padding_left(&self) -> usize {
        match self.state {
            State::Padding { left } | State::Discard { left } => {
                usize::try_from(left).unwrap_or_default()
            }
            _ => 0,
        }
    }

    /// Consumes a part of `bytes`; returns how much. Never 0.
    fn step(&mut self, bytes: &[u8], handler: &mut Handler<'_>) -> Result<usize, WriteError> {
        let take = |left: u64| usize::try_from(left).map_or(bytes.len(), |n| n.min(bytes.len()));
        match &mut self.state {
            State::Header | State::MaybeEnd => {
                if self.pending.is_empty() && self.raw.is_empty() {
                    self.entry_start = self.position;
                }
                let used = self.fill(bytes, BLOCK);
                if self.pending.len() == BLOCK {
                    self.header_block(handler)?;
                }
                Ok(used)
            }
            State::Extension { flag, size } => {
                let (flag, size) = (*flag, *size);
                let whole = usize::try_from(size).map_or(usize::MAX, |n| n.next_multiple_of(BLOCK));
                let used = self.fill(bytes, whole);
                if self.pending.len() == whole {
                    self.extension(flag, size)?;
                }
                Ok(used)
            }
            State::Content { left, padding } => {
                let used = take(*left);
                *left -= used as u64;
                handler(Event::Content(&bytes[..used]))?;
                if *left == 0 {
                    self.state = State::padding(*padding);
                }
                Ok(used)
            }
            State::Padding { left } => {
                let used = take(*left);
                *left -= used as u64;
                handler(Event::Padding(&bytes[..used]))?;
                if *left == 0 {
                    self.state = State::Header;
                }
                Ok(used)
            }
            State::Discard { left } => {
                let used = take(*left);
                *left -= used as u64;
                if *left == 0 {
                    self.state = State::Header;
                }
                Ok(used)
            }
            State::SparseMap(_) => {
                let used = self.fill(bytes, BLOCK);
                if self.pending.len() == BLOCK {
                    self.sparse_map_block(handler)?;
                }
                Ok(used)
            }
            State::SparseText(_) => {
                let used = self.fill(
                    bytes,
                    BLOCK.max(self.pending.len() + 1).next_multiple_of(BLOCK),
                );
                if self.pending.len().is_multiple_of(BLOCK) {
                    self.sparse_text(handler)?;
                }
                Ok(used)
            }
            State::SparseContent(content) => {
                let used = take(content.current.stored);
                handler(Event::Content(&bytes[..used]))?;
                content.current.stored -= used as u64;
                self.advance_sparse(handler)?;
                Ok(used)
            }
            State::End => {
                handler(Event::End {
                    bytes,
                    start: self.position,
                })?;
                Ok(bytes.len())
            }
        }
    }

    /// Moves bytes to `pending` until it holds `whole`.
    fn fill(&mut self, bytes: &[u8], whole: usize) -> usize {
        let used = whole.saturating_sub(self.pending.len()).min(bytes.len());
        self.pending.extend_from_slice(&bytes[..used]);
        used
    }

    fn header_block(&mut self, handler: &mut Handler<'_>) -> Result<(), WriteError> {
        let pending = std::mem::take(&mut self.pending);
        let Ok(raw) = <&[u8; BLOCK]>::try_from(pending.as_slice()) else {
            return Ok(());
        };
        let zeros = raw.iter().all(|b| *b == 0);
        if matches!(self.state, State::MaybeEnd) {
            if !zeros {
                return Err(WriteError::damaged(format!(
                    "a lone block of zeros stands before byte {}",
                    self.position
                )));
            }
            self.state = State::End;
            return handler(Event::End {
                bytes: raw,
                start: self.entry_start,
            });
        }
        if zeros {
            if !self.raw.is_empty() {
                return Err(WriteError::damaged(
                    "an extended header is followed by no entry",
                ));
            }
            self.started = true;
            self.state = State::MaybeEnd;
            return handler(Event::End {
                bytes: raw,
                start: self.entry_start,
            });
        }
        let Some(block) = Block::parse(raw) else {
            if !self.started {
                return Err(WriteError::NotTar);
            }
            return Err(WriteError::damaged(format!(
                "the header that ends at byte {} has a wrong checksum",
                self.position + BLOCK as u64
            )));
        };
        self.started = true;
        let flag = block.type_flag();
        if matches!(flag, b'x' | b'L' | b'K' | b'X') {
            let size = block.size()?;
            if size > MAX_EXTENSION {
                return Err(WriteError::damaged(format!(
                    "an extended header states {size} bytes; the most is {MAX_EXTENSION}"
                )));
            }
            self.raw.extend_from_slice(raw);
            if size > 0 {
                self.state = State::Extension { flag, size };
            }
            return Ok(());
        }
        let header = block.header(&self.extensions)?;
        self.raw.extend_from_slice(raw);
        if self.raw.len() as u64 > 4 * MAX_EXTENSION {
            return Err(WriteError::damaged(
                "an entry's headers are larger than 4 MiB",
            ));
        }
        if flag == b'S' {
            let (map, more, real) = block
                .gnu_sparse()
                .ok_or_else(|| WriteError::damaged("a sparse entry has no GNU header"))?;
            let mut file = Box::new(SparseFile {
                stored: header.size,
                header,
                map: Vec::new(),
            });
            file.header.size = real
                .and_then(|size| u64::try_from(size).ok())
                .ok_or_else(|| WriteError::damaged("a sparse entry states no real size"))?;
            sparse::map_entries(map, &mut file.map)?;
            if more {
                self.state = State::SparseMap(file);
                return Ok(());
            }
            return self.begin_sparse(file, handler);
        }
        if let Some(pax) = sparse::pax(&self.extensions)? {
            let stored = header.size;
            let mut header = header;
            header.size = pax.real_size;
            if let Some(name) = pax.name {
                header.name = name;
            }
            let file = Box::new(SparseFile {
                header,
                stored,
                map: pax.map.unwrap_or_default(),
            });
            if pax.map_in_content {
                self.state = State::SparseText(file);
                return Ok(());
            }
            return self.begin_sparse(file, handler);
        }
        let stored = match header.kind {
            super::header::Kind::Regular | super::header::Kind::Global => header.size,
            _ => 0,
        };
        handler(Event::Entry {
            header: Box::new(header),
            raw: &self.raw,
            rewrote: false,
            start: self.entry_start,
        })?;
        self.raw.clear();
        self.extensions = Extensions::default();
        self.state = State::content(stored);
        Ok(())
    }

    fn extension(&mut self, flag: u8, size: u64) -> Result<(), WriteError> {
        let pending = std::mem::take(&mut self.pending);
        let payload = &pending[..usize::try_from(size).unwrap_or(pending.len())];
        match flag {
            b'L' => self.extensions.long_name = Some(text(payload)),
            b'K' => self.extensions.long_link = Some(text(payload)),
            _ => self.extensions.records.extend(pax_records(payload)?),
        }
        self.raw.extend_from_slice(&pending);
        self.state = State::Header;
        Ok(())
    }

    fn sparse_map_block(&mut self, handler: &mut Handler<'_>) -> Result<(), WriteError> {
        let pending = std::mem::take(&mut self.pending);
        let State::SparseMap(mut file) = std::mem::replace(&mut self.state, State::Header) else {
            return Ok(());
        };
        sparse::map_entries(&pending[..504], &mut file.map)?;
        if pending[504] != 0 {
            self.state = State::SparseMap(file);
            return Ok(());
        }
        self.begin_sparse(file, handler)
    }

    fn sparse_text(&mut self, handler: &mut Handler<'_>) -> Result<(), WriteError> {
        let Some(map) = sparse::text_map(&self.pending)? else {
            if self.pending.len() as u64 > MAX_EXTENSION {
                return Err(WriteError::damaged(
                    "a sparse file's map is larger than 1 MiB",
                ));
            }
            return Ok(());
        };
        let used = self.pending.len() as u64;
        self.pending.clear();
        let State::SparseText(mut file) = std::mem::replace(&mut self.state, State::Header) else {
            return Ok(());
        };
        file.map = map;
        file.stored = file
            .stored
            .checked_sub(used)
            .ok_or_else(|| WriteError::damaged("a sparse file's map is larger than the file"))?;
        self.begin_sparse(file, handler)
    }

    /// Reports a sparse file as the plain file that it stands for.
    fn begin_sparse(
        &mut self,
        file: Box<SparseFile>,
        handler: &mut Handler<'_>,
    ) -> Result<(), WriteError> {
        let SparseFile {
            header,
            stored,
            map,
        } = *file;
        let size = header.size;
        let plan = sparse::plan(&map, size, stored)?;
        let raw = super::header::encode(&header);
        handler(Event::Entry {
            header: Box::new(header),
            raw: &raw,
            rewrote: true,
            start: self.entry_start,
        })?;
        self.raw.clear();
        self.extensions = Extensions::default();
        let fill = |size: u64| size.next_multiple_of(BLOCK as u64) - size;
        self.state = State::SparseContent(Box::new(SparseContent {
            plan: plan.into_iter(),
            current: sparse::Piece::default(),
            discard: fill(stored),
            padding: fill(size),
        }));
        self.advance_sparse(handler)
    }

    /// Emits holes until stored bytes are needed or the file is complete.
    fn advance_sparse(&mut self, handler: &mut Handler<'_>) -> Result<(), WriteError> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let State::SparseContent(content) = &mut self.state else {
            return Ok(());
        };
        while content.current.stored == 0 {
            let Some(mut piece) = content.plan.next() else {
                if content.padding > 0 {
                    let padding = usize::try_from(content.padding).unwrap_or_default();
                    handler(Event::Padding(&ZEROS[..padding]))?;
                }
                self.state = match content.discard {
                    0 => State::Header,
                    left => State::Discard { left },
                };
                return Ok(());
            };
            while piece.hole > 0 {
                let now = piece.hole.min(ZEROS.len() as u64);
                handler(Event::Content(
                    &ZEROS[..usize::try_from(now).unwrap_or_default()],
                ))?;
                piece.hole -= now;
            }
            content.current = piece;
        }
        Ok(())
    }
}

impl State {
    fn content(size: u64) -> Self {
        let padding = size.next_multiple_of(BLOCK as u64) - size;
        match size {
            0 => Self::Header,
            left => Self::Content { left, padding },
        }
    }

    fn padding(left: u64) -> Self {
        match left {
            0 => Self::Header,
            left => Self::Padding { left },
        }
    }
}

#[cfg(test)]
mod tests;
