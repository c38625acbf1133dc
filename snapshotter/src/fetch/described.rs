//! What a layer's tar has between files, from what the layer says of it:
//! chunks that were copied from other layers come without it, and to fetch
//! their units for it would be to fetch what is here.
//!
//! A zstd:chunked layer has a tar-split frame. Of an eStargz layer it is made
//! up from the TOC, as far as the same way gives what is known of it already.
//! Nothing of it is believed before the digest of the whole tar is what it
//! should be.

use std::io::{self, BufRead, Read};
use std::iter::Peekable;
use std::sync::Arc;
use std::vec::IntoIter;

use sluice_layer::{
    FOOTER_MAX, Format, HeaderStyle, TarPart, TarSplit, TocTrust, likely_tar, locate_toc,
    toc_in_tar,
};
use sluice_oci::{Digest, Hasher};
use tokio::task::spawn_blocking;

use super::layer::LazyLayer;
use super::prove::{FREE, MOST_UNPACKED, Pauses, ProveError};
use crate::layer_dir::{LONGEST_PIECE, LayerDir, Piece, RestIndex, Span};

/// Bytes that are kept at once.
const BATCH: usize = 512 << 10;
/// What is looked at to find how headers are written: so many bytes after a
/// file, and so many files more, if none is here.
const MOST_SAMPLED: u64 = 64 << 10;
const SAMPLES: usize = 3;

impl LazyLayer {
    /// Keeps what the layer says of these spans, if that takes less than they
    /// do. Says whether anything was kept.
    pub(super) async fn keep_described(
        self: &Arc<Self>,
        missing: &[Span],
    ) -> Result<bool, ProveError> {
        let toc = self.dir().identity().toc_offset;
        let units: Vec<Span> = (missing.iter().copied())
            .filter(|span| span.start > 0 && span.start < toc)
            .collect();
        let worth: u64 = units.iter().map(|span| span.end - span.start).sum();
        if worth <= self.link().worthwhile_gap().saturating_mul(2) {
            return Ok(false);
        }
        match self.dir().identity().format {
            Format::ZstdChunked => self.keep_tar_split(missing, worth).await,
            Format::Estargz => self.keep_likely(missing).await,
        }
    }

    async fn keep_tar_split(
        self: &Arc<Self>,
        missing: &[Span],
        worth: u64,
    ) -> Result<bool, ProveError> {
        let identity = self.dir().identity();
        let (size, toc_offset) = (identity.blob_size, identity.toc_offset);
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
        let len = frame.end - frame.start;
        let kept = self.receive(frame.start, frame.end, move |incoming| {
            let kept = keep_split(&layer, incoming, len, missing);
            Ok(layer.is_described(kept))
        });
        kept.await?.0
    }

    async fn keep_likely(self: &Arc<Self>, missing: &[Span]) -> Result<bool, ProveError> {
        // What has no content, the TOC above all, comes in any case.
        let toc = self.dir().identity().toc_offset;
        let (needed, mut others): (Vec<Span>, Vec<Span>) =
            (missing.iter()).partition(|span| span.start == 0 || span.start >= toc);
        self.fetch_spans(&needed).await?;
        let mut style = self.style().await?;
        if style.is_none() {
            // One of those that cost least has a file's header, as a rule.
            others.sort_by_key(|span| span.end - span.start);
            others.truncate(SAMPLES);
            others.sort_by_key(|span| span.start);
            self.fetch_spans(&others).await?;
            style = self.style().await?;
        }
        let Some(style) = style else {
            return Ok(true);
        };
        let layer = Arc::clone(self);
        let kept = spawn_blocking(move || {
            let kept = keep_likely(&layer, &style);
            layer.is_described(kept);
        });
        kept.await.map_err(io::Error::other)?;
        Ok(true)
    }

    /// How the tar's writer fills headers, from one that is here.
    async fn style(self: &Arc<Self>) -> Result<Option<HeaderStyle>, ProveError> {
        let layer = Arc::clone(self);
        let style = spawn_blocking(move || style_of(&layer)).await;
        Ok(style.map_err(io::Error::other)??)
    }

    fn is_described(&self, kept: io::Result<()>) -> bool {
        if let Err(error) = &kept {
            tracing::debug!(layer = %self.digest(), "what it says of its tar is of no use: {error}");
        }
        kept.is_ok()
    }
}

fn keep_split(
    layer: &LazyLayer,
    from: impl BufRead,
    len: u64,
    missing: Vec<Span>,
) -> io::Result<()> {
    let mut split = TarSplit::new(from, len)?;
    let mut dealing = Dealing::new(layer, missing, true, true)?;
    while let Some(part) = split.next_part()? {
        dealing.part(part)?;
    }
    dealing.end()
}

fn keep_likely(layer: &LazyLayer, style: &HeaderStyle) -> io::Result<()> {
    let toc = layer.dir().identity().toc_offset;
    let digest = digest_of(toc_json(layer)?)?;
    if layer.dir().identity().trust != TocTrust::Uncompressed(digest) {
        return Err(mismatch());
    }
    // First without keeping anything.
    for keeps in [false, true] {
        let rest = layer.dir().rest().index()?;
        let spans = layer.dir().spans(toc);
        let missing = spans.filter(|span| rest.size(span.start).is_none());
        let mut dealing = Dealing::new(layer, missing.collect(), !keeps, keeps)?;
        likely_tar(toc_json(layer)?, style, |part| dealing.part(part))?;
        dealing.end()?;
    }
    Ok(())
}

/// The TOC as it stands in the layer's tar.
fn toc_json(layer: &LazyLayer) -> io::Result<impl Read> {
    let rest = layer.dir().rest().index()?;
    let toc = rest.into_reader(layer.dir().identity().toc_offset);
    toc_in_tar(toc.ok_or_else(mismatch)?)
}

fn digest_of(mut from: impl Read) -> io::Result<Digest> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; BATCH];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            count => hasher.update(&buffer[..count]),
        }
    }
}

fn style_of(layer: &LazyLayer) -> io::Result<Option<HeaderStyle>> {
    let toc = layer.dir().identity().toc_offset;
    let mut rest = layer.dir().rest().index()?;
    for span in layer.dir().spans(toc) {
        let Some(size) = rest.size(span.start).filter(|size| *size < MOST_SAMPLED) else {
            continue;
        };
        let mut bytes = Vec::new();
        rest.read(span.start, 0, size, |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        if let Some(style) = HeaderStyle::of(&bytes) {
            return Ok(Some(style));
        }
    }
    Ok(None)
}

/// Deals out the parts of a tar to the spans of its blob.
struct Dealing<'a> {
    layer: &'a LazyLayer,
    spans: IntoIter<Span>,
    wanted: Peekable<IntoIter<Span>>,
    /// To compare with what is there already.
    known: Option<RestIndex>,
    keeps: bool,
    span: Option<Filled>,
    pieces: Vec<(u64, Vec<u8>)>,
    bytes: usize,
    left: u64,
    pauses: Pauses<'a>,
}

/// The span whose rest comes next.
struct Filled {
    span: u64,
    wanted: bool,
    /// None once a part of it is not known.
    bytes: Option<Vec<u8>>,
}

impl<'a> Dealing<'a> {
    /// Keeps, or only `compares`, what is dealt to the spans in `wanted`, which
    /// are in order, or to others.
    fn new(
        layer: &'a LazyLayer,
        wanted: Vec<Span>,
        compares: bool,
        keeps: bool,
    ) -> io::Result<Self> {
        let dir = layer.dir();
        let spans: Vec<Span> = dir.spans(dir.identity().toc_offset).collect();
        let mut dealing = Self {
            layer,
            spans: spans.into_iter(),
            wanted: wanted.into_iter().peekable(),
            known: compares.then(|| dir.rest().index()).transpose()?,
            keeps,
            span: None,
            pieces: Vec::new(),
            bytes: 0,
            left: FREE + dir.identity().blob_size.saturating_mul(MOST_UNPACKED),
            pauses: Pauses::new(layer),
        };
        // Before the first unit.
        match dealing.next()? {
            0 => Ok(dealing),
            _ => Err(mismatch()),
        }
    }

    fn dir(&self) -> &'a LayerDir {
        self.layer.dir()
    }

    fn part(&mut self, part: TarPart) -> io::Result<()> {
        let span = self.span.as_mut().ok_or_else(mismatch)?;
        match part {
            TarPart::Unknown => span.bytes = None,
            TarPart::Bytes(bytes) => {
                let len = bytes.len() as u64;
                self.left = self.left.checked_sub(len).ok_or_else(mismatch)?;
                // What is longer is fetched.
                let fits = |known: &Vec<u8>| known.len() + bytes.len() <= LONGEST_PIECE;
                span.bytes = span.bytes.take().filter(fits);
                if let Some(known) = &mut span.bytes {
                    known.extend_from_slice(&bytes);
                }
                self.pauses.after(bytes.len())?;
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
        Ok(())
    }

    fn end(mut self) -> io::Result<()> {
        self.finish_span()?;
        self.flush()?;
        match self.spans.next() {
            None => Ok(()),
            Some(_) => Err(mismatch()),
        }
    }

    /// Goes on to the next span; the size of its chunk, which it begins with.
    fn next(&mut self) -> io::Result<u64> {
        self.finish_span()?;
        let span = self.spans.next().ok_or_else(mismatch)?;
        self.span = Some(Filled {
            span: span.start,
            wanted: self.wanted.next_if_eq(&span).is_some(),
            bytes: Some(Vec::new()),
        });
        match &self.dir().chunks_in(span.start)[..] {
            [] => Ok(0),
            [(range, _)] if range.start == 0 => Ok(range.end),
            // Of units that files share it is not known what is where.
            _ => Err(mismatch()),
        }
    }

    fn finish_span(&mut self) -> io::Result<()> {
        let Some(Filled {
            span,
            wanted,
            bytes: Some(bytes),
        }) = self.span.take()
        else {
            return Ok(());
        };
        match &mut self.known {
            Some(known) if !wanted => compare(known, span, &bytes)?,
            _ if wanted && self.keeps => {
                self.bytes += bytes.len();
                self.pieces.push((span, bytes));
            }
            _ => {}
        }
        match self.bytes >= BATCH {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        let pieces = self.pieces.iter().map(|(span, bytes)| Piece {
            span: *span,
            at: 0,
            last: true,
            bytes,
        });
        let pieces: Vec<Piece<'_>> = pieces.collect();
        self.dir().rest().append(&pieces, None)?;
        self.pieces.clear();
        self.bytes = 0;
        Ok(())
    }
}

fn compare(known: &mut RestIndex, span: u64, bytes: &[u8]) -> io::Result<()> {
    let mut at = 0;
    let mut same = known.size(span) == Some(bytes.len() as u64);
    if same {
        known.read(span, 0, bytes.len() as u64, |piece| {
            same &= bytes[at..at + piece.len()] == *piece;
            at += piece.len();
            Ok(())
        })?;
    }
    match same {
        true => Ok(()),
        false => Err(mismatch()),
    }
}

fn mismatch() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "it describes another tar than is here",
    )
}
