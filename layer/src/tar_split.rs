//! The tar-split frame of a zstd:chunked layer: what its tar has between the
//! contents of files, byte by byte, and how long those contents are.
//!
//! Nothing vouches for it here: whoever puts a tar together with it compares
//! the digest of the whole.

use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::Deserialize;

use crate::Format;
use crate::footer::{FOOTER_MAX, SKIPPABLE, TocLocation, ZSTD_FRAME_HEADER};
use crate::toc::ZSTD_WINDOW_LOG;

/// The shorter of the two footers.
const FOOTER_MIN: u64 = ZSTD_FRAME_HEADER as u64 + 40;
/// Longest line: a mebibyte of padding and a header with its extensions.
const LONGEST_LINE: u64 = 4 << 20;
/// Bytes decompressed at once.
const AT_ONCE: usize = 64 << 10;
/// The two types of line.
const CONTENT: u8 = 1;
const BYTES: u8 = 2;

/// A part of a tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarPart {
    /// Headers and padding.
    Bytes(Vec<u8>),
    /// A file's content, of this size, never 0.
    Content(u64),
    /// Some of what is between contents, of which nothing is known.
    Unknown,
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "type")]
    kind: u8,
    #[serde(default)]
    size: u64,
    payload: Option<String>,
}

impl TocLocation {
    /// What lies between the TOC and the footer, which is where writers put
    /// the tar-split frame, if there is room for one.
    pub fn tar_split(&self, blob_size: u64) -> Option<Range<u64>> {
        let range = self.range().end..blob_size.checked_sub(FOOTER_MIN)?;
        let longer = FOOTER_MAX as u64 - FOOTER_MIN;
        let holds_one = range.end.saturating_sub(range.start) > longer + ZSTD_FRAME_HEADER as u64;
        (self.format == Format::ZstdChunked && holds_one).then_some(range)
    }
}

/// Reads the parts of a tar, one after the other, in bounded memory.
pub struct TarSplit<R: BufRead> {
    lines: BufReader<zstd::stream::read::Decoder<'static, io::Take<R>>>,
    line: Vec<u8>,
}

impl<R: BufRead> TarSplit<R> {
    /// From the `len` bytes at [`TocLocation::tar_split`].
    pub fn new(mut from: R, len: u64) -> io::Result<Self> {
        let mut header = [0; ZSTD_FRAME_HEADER];
        from.read_exact(&mut header)?;
        let [.., a, b, c, d] = header;
        let size = u64::from(u32::from_le_bytes([a, b, c, d]));
        let room = len.checked_sub(ZSTD_FRAME_HEADER as u64);
        // A footer of the longer kind begins in it.
        let longer = FOOTER_MAX as u64 - FOOTER_MIN;
        if header[..4] != SKIPPABLE
            || ![room, room.and_then(|n| n.checked_sub(longer))].contains(&Some(size))
        {
            return Err(invalid("no tar-split frame follows the table of contents"));
        }
        let mut decoder = zstd::stream::read::Decoder::with_buffer(from.take(size))?;
        decoder.window_log_max(ZSTD_WINDOW_LOG)?;
        Ok(Self {
            lines: BufReader::with_capacity(AT_ONCE, decoder),
            line: Vec::new(),
        })
    }

    /// The next part; `None` at the end.
    pub fn next_part(&mut self) -> io::Result<Option<TarPart>> {
        loop {
            self.line.clear();
            let mut line = (&mut self.lines).take(LONGEST_LINE);
            if line.read_until(b'\n', &mut self.line)? == 0 {
                return Ok(None);
            }
            if self.line.pop() != Some(b'\n') {
                return Err(invalid("a line of the tar-split frame has no end"));
            }
            let line: Line = serde_json::from_slice(&self.line)?;
            match (line.kind, line.size, line.payload) {
                (CONTENT, 0, _) => {}
                (CONTENT, size, _) => return Ok(Some(TarPart::Content(size))),
                (BYTES, _, Some(payload)) => {
                    let bytes = BASE64_STANDARD.decode(payload).map_err(invalid)?;
                    return Ok(Some(TarPart::Bytes(bytes)));
                }
                _ => return Err(invalid("a line of the tar-split frame is of no known type")),
            }
        }
    }
}

fn invalid(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
