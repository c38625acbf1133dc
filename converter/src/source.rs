//! Reading an image, wherever it is.

use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use bytes::{Buf as _, Bytes};
use futures_util::stream;
use sluice_oci::{Descriptor, Digest, Reference};
use sluice_registry::{BlobSource, ByteRange, Client, Senders};
use tokio::sync::mpsc;

use crate::layout::{Layout, MAX_DOCUMENT};
use crate::{Error, Location, document};

/// An image that exists.
pub(crate) enum Source {
    /// In a layout directory.
    Layout { layout: Layout, tag: Option<String> },
    /// In a registry.
    Registry {
        client: Client,
        reference: Reference,
    },
}

impl Source {
    pub(crate) fn open(client: &Client, location: &Location) -> Result<Self, Error> {
        Ok(match location {
            Location::Layout { directory, tag } => Self::Layout {
                layout: Layout::open(directory)?,
                tag: tag.clone(),
            },
            Location::Registry(reference) => Self::Registry {
                client: client.clone(),
                reference: reference.clone(),
            },
        })
    }

    /// The document that the location names.
    pub(crate) async fn root(&self) -> Result<(Descriptor, Bytes), Error> {
        match self {
            Self::Layout { layout, tag } => {
                let mut root = layout.find(tag.as_deref())?;
                let bytes = layout.document("manifest", root.digest)?;
                root.size = bytes.len() as u64;
                Ok((root, bytes.into()))
            }
            Self::Registry { client, reference } => {
                let document = client.manifest(reference).await?;
                Ok((document.descriptor(), document.bytes))
            }
        }
    }

    /// A manifest or an index that an index names.
    pub(crate) async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes, Error> {
        match self {
            Self::Layout { layout, .. } => {
                Ok(layout.document("manifest", descriptor.digest)?.into())
            }
            Self::Registry { client, reference } => {
                let reference = reference.with_digest(descriptor.digest);
                Ok(client.manifest(&reference).await?.bytes)
            }
        }
    }

    /// A small blob, such as a configuration.
    pub(crate) async fn blob(
        &self,
        what: &'static str,
        descriptor: &Descriptor,
    ) -> Result<Bytes, Error> {
        match self {
            Self::Layout { layout, .. } => Ok(layout.document(what, descriptor.digest)?.into()),
            Self::Registry { client, reference } => {
                let body = client.blob(reference, descriptor.digest).whole().await?;
                let limit = usize::try_from(MAX_DOCUMENT).unwrap_or(usize::MAX);
                let bytes = body.collect(limit).await?;
                document::check(what, descriptor.digest, &bytes)?;
                Ok(bytes)
            }
        }
    }

    /// A layer's blob, to be read on another thread.
    pub(crate) async fn reader(&self, layer: Digest) -> Result<BlobReader, Error> {
        match self {
            Self::Layout { layout, .. } => Ok(BlobReader::File {
                file: layout.open_blob("layer", layer)?,
                path: layout.blob_path(layer),
            }),
            Self::Registry { client, reference } => {
                let mut body = client.blob(reference, layer).whole().await?;
                let senders = body.senders();
                let (sender, receiver) = mpsc::channel(16);
                tokio::spawn(async move {
                    loop {
                        let piece = body.next().await.map_err(Error::from).transpose();
                        let Some(piece) = piece else { return };
                        if sender.send(piece).await.is_err() {
                            return;
                        }
                    }
                });
                Ok(BlobReader::Received {
                    receiver,
                    piece: Bytes::new(),
                    senders,
                })
            }
        }
    }

    /// Does `work` with a blob's bytes, and once more with those of another
    /// host if they were wrong.
    pub(crate) async fn read<T, F>(
        &self,
        blob: Digest,
        mut work: impl FnMut(BlobReader) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let reader = self.reader(blob).await?;
        let senders = reader.senders();
        match work(reader).await {
            Err(error)
                if error.is_of_content() && senders.is_some_and(|senders| senders.distrust()) =>
            {
                work(self.reader(blob).await?).await
            }
            done => done,
        }
    }

    /// A part of a layer's blob.
    pub(crate) async fn range(&self, layer: Digest, offset: u64, len: u64) -> Result<Bytes, Error> {
        match self {
            Self::Layout { layout, .. } => {
                let path = layout.blob_path(layer);
                let mut file = layout.open_blob("layer", layer)?;
                let mut bytes = Vec::new();
                file.seek(SeekFrom::Start(offset))
                    .and_then(|_| file.take(len).read_to_end(&mut bytes))
                    .map_err(Error::file("cannot read", &path))?;
                Ok(bytes.into())
            }
            Self::Registry { client, reference } => {
                let range = ByteRange::From { offset, len };
                let body = client.blob(reference, layer).range(range).await?;
                Ok(body
                    .collect(usize::try_from(len).unwrap_or(usize::MAX))
                    .await?)
            }
        }
    }

    /// A blob as the source of an upload.
    pub(crate) fn upload(&self, digest: Digest) -> BlobSource {
        match self {
            Self::Layout { layout, .. } => BlobSource::file(layout.blob_path(digest)),
            Self::Registry { client, reference } => {
                let blob = client.blob(reference, digest);
                BlobSource::new(move || {
                    let blob = blob.clone();
                    async move {
                        let body = blob.whole().await.map_err(io::Error::other)?;
                        Ok(stream::try_unfold(body, |mut body| async move {
                            let piece = body.next().await.map_err(io::Error::other)?;
                            Ok(piece.map(|piece| (piece, body)))
                        }))
                    }
                })
            }
        }
    }

    /// The repository, if this is a registry.
    pub(crate) fn reference(&self) -> Option<&Reference> {
        match self {
            Self::Layout { .. } => None,
            Self::Registry { reference, .. } => Some(reference),
        }
    }
}

/// A blob's bytes for a thread that blocks. Its errors carry an [`Error`].
pub(crate) enum BlobReader {
    File {
        file: File,
        path: PathBuf,
    },
    Received {
        receiver: mpsc::Receiver<Result<Bytes, Error>>,
        piece: Bytes,
        senders: Senders,
    },
}

impl BlobReader {
    /// The hosts that send it.
    fn senders(&self) -> Option<Senders> {
        match self {
            Self::File { .. } => None,
            Self::Received { senders, .. } => Some(senders.clone()),
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File { file, path } => file.read(buffer).map_err(|cause| named(cause, path)),
            Self::Received {
                receiver, piece, ..
            } => {
                while piece.is_empty() {
                    match receiver.blocking_recv() {
                        Some(next) => *piece = next.map_err(io::Error::other)?,
                        None => return Ok(0),
                    }
                }
                let n = piece.len().min(buffer.len());
                piece.copy_to_slice(&mut buffer[..n]);
                Ok(n)
            }
        }
    }
}

fn named(cause: io::Error, path: &Path) -> io::Error {
    match cause.kind() {
        io::ErrorKind::Interrupted => cause,
        _ => io::Error::other(Error::file("cannot read", path)(cause)),
    }
}
