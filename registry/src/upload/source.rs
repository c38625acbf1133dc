//! Where the bytes of an upload come from.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use tokio_util::io::ReaderStream;

type Open =
    dyn Fn() -> BoxFuture<'static, io::Result<BoxStream<'static, io::Result<Bytes>>>> + Send + Sync;

/// Bytes that can be read from the start as often as an upload has to be
/// tried.
#[derive(Clone)]
pub struct BlobSource(Arc<Open>);

impl BlobSource {
    /// A source that `open` opens anew each time.
    pub fn new<F, R, S>(open: F) -> Self
    where
        F: Fn() -> R + Send + Sync + 'static,
        R: Future<Output = io::Result<S>> + Send + 'static,
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        Self(Arc::new(move || {
            let opening = open();
            async move { Ok(opening.await?.boxed()) }.boxed()
        }))
    }

    /// Bytes in memory.
    pub fn bytes(bytes: Bytes) -> Self {
        Self::new(move || {
            let bytes = bytes.clone();
            // In pieces, so that progress can be seen.
            let pieces = stream::unfold(bytes, |mut rest| async move {
                let piece = rest.split_to(rest.len().min(64 << 10));
                (!piece.is_empty()).then_some((Ok(piece), rest))
            });
            std::future::ready(Ok(pieces))
        })
    }

    /// The content of a file.
    pub fn file(path: PathBuf) -> Self {
        Self::new(move || {
            let path = path.clone();
            async move {
                let file = tokio::fs::File::open(&path).await.map_err(|error| {
                    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
                })?;
                Ok(ReaderStream::with_capacity(file, 256 << 10))
            }
        })
    }

    pub(crate) async fn open(&self) -> io::Result<BoxStream<'static, io::Result<Bytes>>> {
        (self.0)().await
    }
}

/// What became of a source while it was sent.
#[derive(Default)]
pub(crate) struct Progress {
    sent: AtomicU64,
    failure: OnceLock<String>,
}

impl Progress {
    /// Bytes taken so far.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Why the source failed, if it did.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }
}

/// Passes a source's bytes on, counts them, and insists on the number that
/// was announced.
pub(crate) struct Metered {
    pub(crate) stream: BoxStream<'static, io::Result<Bytes>>,
    pub(crate) size: u64,
    pub(crate) progress: Arc<Progress>,
}

impl Stream for Metered {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = ready!(self.stream.poll_next_unpin(cx));
        let before = self.progress.sent();
        let after = match &item {
            Some(Ok(bytes)) => before + bytes.len() as u64,
            _ => before,
        };
        let item = match item {
            None if after < self.size => Some(Err(self.wrong_size("only", after))),
            Some(Ok(_)) if after > self.size => Some(Err(self.wrong_size("at least", after))),
            item => item,
        };
        match &item {
            Some(Ok(_)) => self.progress.sent.store(after, Ordering::Relaxed),
            Some(Err(error)) => {
                let _ = self.progress.failure.set(error.to_string());
            }
            None => {}
        }
        Poll::Ready(item)
    }
}

impl Metered {
    fn wrong_size(&self, how: &str, found: u64) -> io::Error {
        let size = self.size;
        io::Error::other(format!(
            "the content has {how} {found} bytes instead of {size}"
        ))
    }
}
