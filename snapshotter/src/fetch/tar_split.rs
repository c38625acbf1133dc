//! What a layer's tar has between files, from the layer's tar-split frame:
//! chunks that were copied from other layers come without it, and to fetch
//! their units for it would be to fetch what is here.

use std::io::{self, BufRead, Read as _};
use std::iter::Peekable;
use std::sync::Arc;
use std::vec::IntoIter;

use sluice_layer::{FOOTER_MAX, TarPart, TarSplit, locate_toc};

use super::layer::LazyLayer;
use super::prove::{FREE, MOST_UNPACKED, Pauses, ProveError};
use crate::layer_dir::{LONGEST_PIECE, LayerDir, Piece, Span};

/// Bytes that are kept at once.
const BATCH: usize = 512 << 10;

impl LazyLayer {
    /// Keeps what the frame says of these spans, if there is one and it is
    /// smaller than they are. Says whether anything was kept. Nothing of it is
    /// believed before the digest of the whole tar is what it should be.
    pub(super) async fn keep_tar_split(
        self: &Arc<Self>,
        missing: &[Span],
    ) -> Result<bool, ProveError> {
        let identity = self.dir().identity();
        let (size, toc_offset) = (identity.blob_size, identity.toc_offset);
        let worth: u64 = missing.iter().map(|span| span.end - span.start).sum();
        // It takes two requests; the first span is fetched in any case.
        let gap = self.link().worthwhile_gap();
        if missing.len() < 2 || worth <= gap.saturating_mul(2) {
            return Ok(false);
        }
        let start = size.saturating_sub(FOOTER_MAX as u64);
        let footer = self.receive(start, size, |mut incoming| {
            let mut footer = Vec::new();
            incoming.read_to_end(&mut footer)?;
            Ok(footer)
        });
        let footer = footer.await?.0?;
        let frame = match locate_toc(&footer, size) {
            Ok(toc) if toc.chunks_end() == toc_offset => toc.tar_split(size),
            _ => None,
        };
        let Some(frame) = frame.filter(|frame| frame.end - frame.start < worth) else {
            return Ok(false);
        };
        let (layer, missing) = (Arc::clone(self), missing.to_vec());
        let kept = self.receive(frame.start, frame.end, move |incoming| {
            let split = TarSplit::new(incoming, frame.end - frame.start);
            let kept = split.and_then(|split| Filling::new(&layer, missing).fill(split));
            if let Err(error) = &kept {
                tracing::debug!(layer = %layer.digest(), "its tar-split frame is of no use: {error}");
            }
            Ok(kept.is_ok())
        });
        kept.await?.0
    }
}

/// Deals out the parts of a tar to the spans of its blob.
struct Filling<'a> {
    layer: &'a LazyLayer,
    spans: IntoIter<Span>,
    wanted: Peekable<IntoIter<Span>>,
    /// The span whose rest comes next, how much of it came, and whether
    /// anybody wants it.
    span: Option<(Span, u64, bool)>,
    pieces: Vec<(Span, u64, bool, Vec<u8>)>,
    bytes: usize,
}

impl<'a> Filling<'a> {
    /// For the spans in `wanted`, which are in order.
    fn new(layer: &'a LazyLayer, wanted: Vec<Span>) -> Self {
        let dir = layer.dir();
        let spans: Vec<Span> = dir.spans(dir.tar_end()).collect();
        Self {
            layer,
            spans: spans.into_iter(),
            wanted: wanted.into_iter().peekable(),
            span: None,
            pieces: Vec::new(),
            bytes: 0,
        }
    }

    fn dir(&self) -> &'a LayerDir {
        self.layer.dir()
    }

    fn fill(mut self, mut split: TarSplit<impl BufRead>) -> io::Result<()> {
        let identity = self.dir().identity();
        let mut left = FREE + identity.blob_size.saturating_mul(MOST_UNPACKED);
        let mut pauses = Pauses::new(self.layer);
        // Before the first unit.
        if self.next()? != 0 {
            return Err(mismatch());
        }
        while let Some(part) = split.next_part()? {
            match part {
                TarPart::Bytes(bytes) => {
                    left = left.checked_sub(bytes.len() as u64).ok_or_else(mismatch)?;
                    pauses.after(bytes.len())?;
                    bytes
                        .chunks(LONGEST_PIECE)
                        .try_for_each(|bytes| self.push(bytes, false))?;
                }
                TarPart::Content(mut size) => {
                    while size > 0 {
                        let chunk = self.next()?;
                        size = size.checked_sub(chunk).ok_or_else(mismatch)?;
                        if chunk == 0 {
                            return Err(mismatch());
                        }
                    }
                }
            }
        }
        self.push(&[], true)?;
        self.flush()?;
        match self.spans.next() {
            None => Ok(()),
            Some(_) => Err(mismatch()),
        }
    }

    /// Goes on to the next span; the size of its chunk, which it begins with.
    fn next(&mut self) -> io::Result<u64> {
        if self.span.is_some() {
            self.push(&[], true)?;
        }
        let span = self.spans.next().ok_or_else(mismatch)?;
        let wanted = self.wanted.next_if_eq(&span).is_some();
        self.span = Some((span, 0, wanted));
        match &self.dir().chunks_in(span.start)[..] {
            [] => Ok(0),
            [(range, _)] if range.start == 0 => Ok(range.end),
            // Whatever shares a unit has no content of its own in the frame.
            _ => Err(mismatch()),
        }
    }

    fn push(&mut self, bytes: &[u8], last: bool) -> io::Result<()> {
        let Some((span, at, wanted)) = &mut self.span else {
            return Err(mismatch());
        };
        if *wanted {
            self.pieces.push((*span, *at, last, bytes.to_vec()));
            self.bytes += bytes.len();
        }
        *at += bytes.len() as u64;
        match self.bytes >= BATCH {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        let pieces = self.pieces.iter().map(|(span, at, last, bytes)| Piece {
            span: span.start,
            at: *at,
            last: *last,
            bytes,
        });
        let pieces: Vec<Piece<'_>> = pieces.collect();
        self.dir().rest().append(&pieces)?;
        self.pieces.clear();
        self.bytes = 0;
        Ok(())
    }
}

fn mismatch() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "it describes another tar than the table of contents does",
    )
}
