//! A layer's tar, once its content is here: what nobody has read of it is
//! fetched, and the whole is handed to whoever wants to know what it is.

use std::io::{self, BufRead, BufReader, Read};
use std::iter::Peekable;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use std::vec::IntoIter;

use sluice_layer::{Between, unpack};
use sluice_oci::Hasher;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::incoming::{Arrived, Incoming};
use super::layer::LazyLayer;
use super::stream::{Arriving, Patience};
use super::{Blame, Priority, SourceError};
use crate::layer_dir::{
    ChunkId, LONGEST_PIECE, Owner, Piece, RestIndex, Span, TarDigest, TarHasher,
};

/// Bytes that are asked memory for at once, and read at once.
const PIECE: u64 = 256 << 10;
/// Pieces that have arrived and wait.
const QUEUED: usize = 2;
/// However busy readers are, a little is done after this time.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);
/// A tar shrinks by less than this: more is a bomb. The first bytes are free.
pub(super) const MOST_UNPACKED: u64 = 200;
pub(super) const FREE: u64 = 64 << 20;

/// Why a layer's tar is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum ProveError {
    /// The registry does not deliver it.
    #[error("{0}")]
    Source(#[from] SourceError),
    /// Something here fails.
    #[error("{0}")]
    Local(#[from] io::Error),
    /// What was delivered is no tar, cut as the TOC says.
    #[error("{0}")]
    Content(String),
    /// The layer is closed.
    #[error("the layer is closed")]
    Closed,
}

/// What a layer's tar has between files, kept anew: while this is held, nobody
/// adds to it but who holds it. Others have it from parts of the blob, which a
/// registry can answer otherwise than the whole.
pub struct OwnRest {
    layer: Arc<LazyLayer>,
    owner: Owner,
}

impl Drop for OwnRest {
    fn drop(&mut self) {
        self.layer.dir().rest().release(self.owner);
    }
}

impl LazyLayer {
    /// Begins to keep what its tar has between files anew.
    pub fn own_rest(self: &Arc<Self>) -> OwnRest {
        OwnRest {
            owner: self.dir().rest().take(),
            layer: Arc::clone(self),
        }
    }

    /// Digest of the tar, put together from what is on the disk and what is
    /// fetched for it. All content has to be there.
    pub async fn diff_id(self: &Arc<Self>) -> Result<TarDigest, ProveError> {
        self.fetch_rest().await?;
        let layer = Arc::clone(self);
        let done = spawn_blocking(move || {
            let whole = || match layer.dir().is_complete() {
                true => Ok(()),
                false => Err(io::Error::other("not all of its content is here")),
            };
            whole()?;
            let mut hasher = TarHasher::default();
            let mut pauses = Pauses::new(&layer);
            let mut rest = layer.dir().rest().index()?;
            layer.dir().put_together(&mut rest, true, |bytes, _| {
                hasher.update(bytes);
                pauses.after(bytes.len())
            })?;
            whole()?;
            Ok(hasher.finish())
        });
        done.await.map_err(io::Error::other)?
    }

    /// The same, unpacked from the whole blob as it arrives, after whose digest
    /// there is no doubt, content or not. What the tar has between files is
    /// kept as `own`.
    pub async fn diff_id_of_blob(self: &Arc<Self>, own: &OwnRest) -> Result<TarDigest, ProveError> {
        let size = self.dir().identity().blob_size;
        let owner = Some(own.owner);
        let layer = Arc::clone(self);
        let (done, blame) = self
            .receive(0, size, move |incoming| {
                let mut hashed = Hashed {
                    inner: incoming,
                    hasher: Hasher::new(),
                };
                let mut left = FREE + size.saturating_mul(MOST_UNPACKED);
                let mut tar = TarHasher::default();
                let spans: Vec<Span> = layer.dir().spans(size).collect();
                let unpacked = spans.iter().try_for_each(|span| {
                    let mut compared = Compared::new(&layer, *span);
                    layer.keep_rest(*span, owner, &mut hashed, &mut left, &mut |bytes| {
                        tar.update(bytes);
                        compared.push(bytes)
                    })
                });
                // To the end, whatever is in it, for the digest.
                io::copy(&mut hashed, &mut io::sink())?;
                Ok((unpacked, hashed.hasher.finish(), tar.finish()))
            })
            .await?;
        let (unpacked, digest, diff_id) = done?;
        if digest != self.digest() {
            blame();
            return Err(ProveError::Source(SourceError {
                message: format!("what was delivered as the blob has digest {digest}"),
                transient: true,
                retry_after: None,
            }));
        }
        unpacked.map(|()| diff_id)
    }

    /// Hands out the tar as it was put together last, with zeros for its
    /// content, and where that is in `data`. Blocks.
    pub fn outline(
        &self,
        each: impl FnMut(&[u8], Option<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest = self.dir().rest().index()?;
        self.dir().put_together(&mut rest, false, each)
    }

    /// Fetches what the tar has between files as far as it was not kept when
    /// the files came.
    async fn fetch_rest(self: &Arc<Self>) -> Result<(), ProveError> {
        let mut missing = self.missing_rest().await?;
        // Chunks that were copied from other layers came without it.
        if self.keep_described(&missing).await? {
            missing = self.missing_rest().await?;
        }
        self.fetch_spans(&missing).await
    }

    /// Fetches these, which are in order, and keeps what they have between
    /// files.
    pub(super) async fn fetch_spans(self: &Arc<Self>, missing: &[Span]) -> Result<(), ProveError> {
        let gap = self.link().worthwhile_gap();
        let close = |a: &Span, b: &Span| b.start - a.end <= gap;
        for run in missing.chunk_by(close) {
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                continue;
            };
            let (start, end) = (first.start, last.end);
            let (layer, run) = (Arc::clone(self), run.to_vec());
            let received = self.receive(start, end, move |mut incoming| {
                let mut at = start;
                let mut left = FREE + (end - start).saturating_mul(MOST_UNPACKED);
                for span in run {
                    let skip = span.start - at;
                    io::copy(&mut (&mut incoming).take(skip), &mut io::sink())?;
                    layer.keep_rest(span, None, &mut incoming, &mut left, &mut |_| Ok(()))?;
                    at = span.end;
                }
                Ok(())
            });
            received.await?.0?;
        }
        Ok(())
    }

    /// The spans of which it is not kept.
    async fn missing_rest(self: &Arc<Self>) -> Result<Vec<Span>, ProveError> {
        let layer = Arc::clone(self);
        let missing = spawn_blocking(move || {
            let rest = layer.dir().rest().index()?;
            let spans = layer.dir().spans(layer.dir().tar_end());
            let missing = spans.filter(|span| rest.size(span.start).is_none());
            let mut missing: Vec<Span> = missing.collect();
            missing.pop_if(|last| layer.unpack_stored(*last, rest));
            Ok::<_, io::Error>(missing)
        });
        Ok(missing.await.map_err(io::Error::other)??)
    }

    /// Whether a span was kept as the blob stores it. Its rest is kept, then.
    fn unpack_stored(&self, span: Span, rest: RestIndex) -> bool {
        let Some(stored) = rest.into_stored(span.start) else {
            return false;
        };
        let mut stored = BufReader::with_capacity(PIECE as usize, stored);
        let mut left = FREE + (span.end - span.start).saturating_mul(MOST_UNPACKED);
        let kept = self.keep_rest(span, None, &mut stored, &mut left, &mut |_| Ok(()));
        if let Err(error) = &kept {
            tracing::debug!(layer = %self.digest(), "its table of contents is fetched again: {error}");
        }
        kept.is_ok()
    }

    /// Unpacks a span, all of which goes to `each`, and keeps what it has
    /// between chunks.
    fn keep_rest(
        &self,
        span: Span,
        by: Option<Owner>,
        from: &mut impl BufRead,
        left: &mut u64,
        each: &mut dyn FnMut(&[u8]) -> Result<(), ProveError>,
    ) -> Result<(), ProveError> {
        let chunks = self.dir().chunks_in(span.start);
        let ranges: Vec<_> = chunks.into_iter().map(|(range, _)| range).collect();
        let mut between = Between::new(&ranges);
        let mut pending = Vec::new();
        let mut at = 0;
        let mut flush = |bytes: &[u8], last: bool| {
            let piece = Piece {
                span: span.start,
                at,
                last,
                bytes,
            };
            at += bytes.len() as u64;
            self.dir().rest().append(&[piece], by)
        };
        let mut pauses = Pauses::new(self);
        self.unpacked(span, from, left, |bytes| {
            pauses.after(bytes.len())?;
            each(bytes)?;
            between.push(bytes, |piece| pending.extend_from_slice(piece));
            while pending.len() > LONGEST_PIECE {
                flush(&pending[..LONGEST_PIECE], false)?;
                pending.drain(..LONGEST_PIECE);
            }
            Ok(())
        })?;
        flush(&pending, true)?;
        Ok(())
    }

    /// Unpacks a span, and reads it to its end.
    fn unpacked(
        &self,
        span: Span,
        from: &mut impl BufRead,
        left: &mut u64,
        mut each: impl FnMut(&[u8]) -> Result<(), ProveError>,
    ) -> Result<(), ProveError> {
        let format = self.dir().identity().format;
        let mut part = from.take(span.end - span.start);
        let mut buffer = vec![0; PIECE as usize];
        let mut reader = unpack(format, &mut part)?;
        loop {
            let count = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) => {
                    let what = format!("{}..{} of the blob: {error}", span.start, span.end);
                    return Err(ProveError::Content(what));
                }
            };
            *left = left.checked_sub(count as u64).ok_or_else(|| {
                ProveError::Content("it unpacks to more than a tar can".to_owned())
            })?;
            each(&buffer[..count])?;
        }
        drop(reader);
        io::copy(&mut part, &mut io::sink())?;
        Ok(())
    }

    /// Lets a thread that blocks read `start..end` of the blob as it arrives.
    /// Also returns what to call if that is wrong.
    pub(super) async fn receive<T: Send + 'static>(
        self: &Arc<Self>,
        start: u64,
        end: u64,
        work: impl FnOnce(Incoming) -> Result<T, ProveError> + Send + 'static,
    ) -> Result<(Result<T, ProveError>, Blame), ProveError> {
        let (sender, receiver) = mpsc::channel(QUEUED);
        let working = spawn_blocking(move || work(Incoming::new(receiver)));
        let sent = self.send(start, end, sender).await;
        let done = working.await.map_err(io::Error::other)?;
        Ok((done, sent?))
    }

    /// Sends `start..end` of the blob, in one request as long as that works.
    /// Ends early when nobody takes it any more.
    async fn send(
        &self,
        start: u64,
        end: u64,
        to: mpsc::Sender<Arrived>,
    ) -> Result<Blame, SourceError> {
        let mut patience = Patience::new(self);
        let mut at = start;
        let mut blame: Blame = Box::new(|| {});
        while at < end {
            let before = at;
            let error = match self.send_some(&mut at, end, &to, &mut blame).await {
                Ok(()) => break,
                Err(error) => error,
            };
            if at > before {
                patience.renew();
            }
            let wait = patience.after(&error).ok_or(error)?;
            tokio::time::sleep(wait).await;
        }
        Ok(blame)
    }

    async fn send_some(
        &self,
        at: &mut u64,
        end: u64,
        to: &mpsc::Sender<Arrived>,
        blame: &mut Blame,
    ) -> Result<(), SourceError> {
        self.engine().idle(LONGEST_PAUSE).await;
        let mut arriving = Arriving::of_layer(self, *at, end, Priority::Background).await?;
        while *at < end {
            if !self.engine().is_idle() {
                arriving.pause();
                self.engine().idle(LONGEST_PAUSE).await;
            }
            let len = PIECE.min(end - *at);
            let admission = self.engine().admission();
            let permit = admission.admit(Priority::Background, len).await;
            let bytes = arriving.take(*at, *at + len).await?;
            *at += len;
            self.count_decoded(Priority::Background, len);
            if to.send((bytes, permit)).await.is_err() {
                break;
            }
        }
        *blame = arriving.blame();
        Ok(())
    }
}

/// Compares the chunks of a span of the whole blob with their digests: a
/// registry can send one thing to who asks for parts and another to who asks
/// for the whole.
struct Compared<'a> {
    layer: &'a LazyLayer,
    chunks: Peekable<IntoIter<(Range<u64>, ChunkId)>>,
    position: u64,
    chunk: Hasher,
}

impl<'a> Compared<'a> {
    fn new(layer: &'a LazyLayer, span: Span) -> Self {
        Self {
            layer,
            chunks: layer.dir().chunks_in(span.start).into_iter().peekable(),
            position: 0,
            chunk: Hasher::new(),
        }
    }

    fn push(&mut self, mut bytes: &[u8]) -> Result<(), ProveError> {
        while !bytes.is_empty() {
            let Some((range, id)) = self.chunks.peek() else {
                return Ok(());
            };
            let inside = range.start <= self.position;
            let end = if inside { range.end } else { range.start };
            let len = usize::try_from(end - self.position).unwrap_or(usize::MAX);
            let (part, next) = bytes.split_at(bytes.len().min(len));
            self.position += part.len() as u64;
            bytes = next;
            if !inside {
                continue;
            }
            self.chunk.update(part);
            if self.position == range.end {
                let found = std::mem::take(&mut self.chunk).finish();
                if found != self.layer.dir().chunks().get(*id).digest {
                    let what = "the whole blob holds another content than parts of it that were \
                                fetched";
                    return Err(ProveError::Content(what.to_owned()));
                }
                self.chunks.next();
            }
        }
        Ok(())
    }
}

/// A reader that digests what passes.
struct Hashed {
    inner: Incoming,
    hasher: Hasher,
}

impl BufRead for Hashed {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        if let Ok(bytes) = self.inner.fill_buf() {
            self.hasher.update(&bytes[..count]);
        }
        self.inner.consume(count);
    }
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

/// Gives readers the processor and the disk now and then.
pub(super) struct Pauses<'a> {
    layer: &'a LazyLayer,
    bytes: u64,
}

impl<'a> Pauses<'a> {
    pub(super) fn new(layer: &'a LazyLayer) -> Self {
        Self { layer, bytes: 0 }
    }

    /// So many more bytes were worked on. An error when the layer is closed.
    pub(super) fn after(&mut self, bytes: usize) -> io::Result<()> {
        self.bytes += bytes as u64;
        if self.bytes < PIECE {
            return Ok(());
        }
        self.bytes = 0;
        let since = Instant::now();
        while !self.layer.engine().is_idle() && since.elapsed() < LONGEST_PAUSE {
            if self.layer.closed().is_cancelled() {
                break;
            }
            thread::sleep(PAUSE);
        }
        match self.layer.closed().is_cancelled() {
            true => Err(io::Error::other(ProveError::Closed)),
            false => Ok(()),
        }
    }
}
