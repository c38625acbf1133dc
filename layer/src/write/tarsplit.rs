//! The tar-split frame: JSON lines from which containers/storage rebuilds
//! the tar, byte for byte, out of unpacked files.
//!
//! Type 2 lines carry header blocks and padding, base64; type 1 lines stand
//! for a file's content and carry its size and CRC-64. Each header has one
//! type 2 line of its own, which begins with the padding of the file before.

use std::collections::HashSet;
use std::io::Write as _;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::Serialize;
use sluice_oci::Digest;

use super::crc64::Crc64;
use super::header::{Header, Kind};
use super::{WriteError, clean_name};

const LEVEL: i32 = 3;
/// The most bytes of end-of-archive filling on one line.
const MAX_TRAILER: usize = 1 << 20;

#[derive(Serialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    kind: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "is_zero")]
    size: u64,
    payload: Option<String>,
    position: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "what serde calls")]
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// A finished tar-split.
#[derive(Debug)]
pub(super) struct TarSplit {
    pub(super) compressed: Vec<u8>,
    pub(super) uncompressed_size: u64,
    pub(super) digest: Digest,
}

/// Records a tar as it passes. Gives up, for good, at the first thing that
/// tar-split's readers refuse.
pub(super) struct Recorder {
    out: zstd::stream::Encoder<'static, Vec<u8>>,
    size: u64,
    position: u64,
    segment: Vec<u8>,
    file: Option<(String, u64, Crc64)>,
    names: HashSet<Box<str>>,
}

impl Recorder {
    pub(super) fn new() -> Result<Self, WriteError> {
        let failed = |cause: std::io::Error| WriteError::Compression(cause.to_string());
        Ok(Self {
            out: zstd::stream::Encoder::new(Vec::new(), LEVEL).map_err(failed)?,
            size: 0,
            position: 0,
            segment: Vec::new(),
            file: None,
            names: HashSet::new(),
        })
    }

    /// An entry's header blocks. `false` if the tar cannot be recorded.
    pub(super) fn entry(&mut self, header: &Header, raw: &[u8]) -> bool {
        let holds_no_content = header.kind != Kind::Regular && header.size > 0;
        let Ok(name) = std::str::from_utf8(&header.name) else {
            return false;
        };
        let new = self.names.insert(clean_name(name).into());
        if header.kind == Kind::Global || holds_no_content || !new {
            return false;
        }
        self.segment.extend_from_slice(raw);
        self.end_file() && self.end_segment() && {
            self.file = Some((name.to_owned(), header.size, Crc64::new()));
            true
        }
    }

    pub(super) fn content(&mut self, bytes: &[u8]) {
        if let Some((_, _, crc)) = &mut self.file {
            crc.update(bytes);
        }
    }

    /// Padding, or the end of the archive.
    pub(super) fn filling(&mut self, mut bytes: &[u8]) -> bool {
        if bytes.iter().any(|b| *b != 0) {
            return false;
        }
        while !bytes.is_empty() {
            let now = bytes.len().min(MAX_TRAILER - self.segment.len());
            self.segment.extend_from_slice(&bytes[..now]);
            if self.segment.len() == MAX_TRAILER && !(self.end_file() && self.end_segment()) {
                return false;
            }
            bytes = &bytes[now..];
        }
        true
    }

    pub(super) fn finish(mut self) -> Option<TarSplit> {
        if !self.end_file() || !self.end_segment() {
            return None;
        }
        let compressed = self.out.finish().ok()?;
        Some(TarSplit {
            digest: Digest::of(&compressed),
            uncompressed_size: self.size,
            compressed,
        })
    }

    fn end_file(&mut self) -> bool {
        let Some((name, size, crc)) = self.file.take() else {
            return true;
        };
        let crc = (size > 0).then(|| BASE64_STANDARD.encode(crc.finish().to_be_bytes()));
        self.line(1, Some(&name), size, crc)
    }

    fn end_segment(&mut self) -> bool {
        if self.segment.is_empty() {
            return true;
        }
        let payload = BASE64_STANDARD.encode(&self.segment);
        self.segment.clear();
        self.line(2, None, 0, Some(payload))
    }

    fn line(&mut self, kind: u8, name: Option<&str>, size: u64, payload: Option<String>) -> bool {
        let line = Line {
            kind,
            name: name.filter(|name| !name.is_empty()),
            size,
            payload,
            position: self.position,
        };
        let Ok(mut line) = serde_json::to_vec(&line) else {
            return false;
        };
        line.push(b'\n');
        self.position += 1;
        self.size += line.len() as u64;
        self.out.write_all(&line).is_ok()
    }
}
