//! Where the bytes of an upload come from.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt as _, StreamExt as _};
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
        S: futures_util::Stream<Item = io::Result<Bytes>> + Send + 'static,
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
