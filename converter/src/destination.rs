//! Writing an image, wherever it goes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use sluice_oci::{Descriptor, Digest, Reference};
use sluice_registry::{BlobSource, Client};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::layout::{LayoutWriter, Spool};
use crate::pipeline::spooled;
use crate::source::Source;
use crate::{Error, Location};

/// Uploads under way beside the conversion.
const UPLOADS: usize = 3;

/// Where an image goes.
pub(crate) enum Destination {
    Layout {
        writer: Arc<LayoutWriter>,
        tag: Option<String>,
    },
    Registry {
        client: Client,
        reference: Reference,
        uploads: JoinSet<Result<(), Error>>,
        places: Arc<Semaphore>,
        scratch: PathBuf,
    },
}

impl Destination {
    pub(crate) fn open(
        client: &Client,
        location: &Location,
        scratch: &Path,
    ) -> Result<Self, Error> {
        match location {
            Location::Layout { directory, tag } => Ok(Self::Layout {
                writer: Arc::new(LayoutWriter::open(directory)?),
                tag: tag.clone(),
            }),
            Location::Registry(reference) if reference.digest().is_some() => {
                Err(Error::DigestDestination {
                    reference: reference.to_string(),
                })
            }
            Location::Registry(reference) => Ok(Self::Registry {
                client: client.clone(),
                reference: reference.clone(),
                uploads: JoinSet::new(),
                places: Arc::new(Semaphore::new(UPLOADS)),
                scratch: scratch.to_owned(),
            }),
        }
    }

    /// Where converted layers are spooled.
    pub(crate) fn spool_directory(&self) -> PathBuf {
        match self {
            Self::Layout { writer, .. } => writer.spool_directory(),
            Self::Registry { scratch, .. } => scratch.clone(),
        }
    }

    /// Takes a converted layer. An upload goes on in the background.
    pub(crate) async fn adopt(
        &mut self,
        spool: Spool,
        digest: Digest,
        size: u64,
    ) -> Result<(), Error> {
        match self {
            Self::Layout { writer, .. } => {
                let writer = Arc::clone(writer);
                blocking(move || writer.adopt(&spool, digest)).await
            }
            Self::Registry { .. } => {
                let source = BlobSource::file(spool.path());
                self.upload(digest, size, source, None, Some(spool)).await
            }
        }
    }

    /// Copies a blob of the source as it is.
    pub(crate) async fn copy(
        &mut self,
        source: &Source,
        what: &'static str,
        descriptor: &Descriptor,
    ) -> Result<(), Error> {
        let (digest, size) = (descriptor.digest, descriptor.size);
        match self {
            Self::Layout { writer, .. } => {
                if writer.has(digest, size) {
                    return Ok(());
                }
                let copy = |blob| {
                    let writer = Arc::clone(writer);
                    blocking(move || {
                        let (spool, end) = spooled(blob, digest, &writer.spool_directory())?;
                        end.check(what, digest, size)?;
                        writer.adopt(&spool, digest)
                    })
                };
                source.read(digest, copy).await
            }
            Self::Registry { .. } => {
                let bytes = source.upload(digest);
                let from = source.reference().cloned();
                self.upload(digest, size, bytes, from, None).await
            }
        }
    }

    /// Stores a small blob.
    pub(crate) async fn put(&mut self, bytes: Bytes) -> Result<(), Error> {
        let digest = Digest::of(&bytes);
        match self {
            Self::Layout { writer, .. } => writer.put(digest, &bytes),
            Self::Registry {
                client, reference, ..
            } => {
                let size = bytes.len() as u64;
                let source = BlobSource::bytes(bytes);
                client.push_blob(reference, digest, size, source).await?;
                Ok(())
            }
        }
    }

    /// Stores a manifest or index that is not the root, once all blobs are
    /// there.
    pub(crate) async fn put_document(
        &mut self,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<(), Error> {
        self.settle().await?;
        match self {
            Self::Layout { writer, .. } => writer.put(Digest::of(&bytes), &bytes),
            Self::Registry {
                client, reference, ..
            } => {
                let reference = reference.with_digest(Digest::of(&bytes));
                client.push_manifest(&reference, media_type, bytes).await?;
                Ok(())
            }
        }
    }

    /// Stores the root and gives it its name: only now does the image exist.
    pub(crate) async fn commit(mut self, root: Descriptor, bytes: Bytes) -> Result<(), Error> {
        self.settle().await?;
        match self {
            Self::Layout { writer, tag } => {
                writer.put(root.digest, &bytes)?;
                match Arc::into_inner(writer) {
                    Some(writer) => writer.commit(root, tag.as_deref()),
                    None => Err(Error::Interrupted),
                }
            }
            Self::Registry {
                client, reference, ..
            } => {
                client
                    .push_manifest(&reference, &root.media_type, bytes)
                    .await?;
                Ok(())
            }
        }
    }

    /// Waits for all uploads.
    async fn settle(&mut self) -> Result<(), Error> {
        if let Self::Registry { uploads, .. } = self {
            while let Some(done) = uploads.join_next().await {
                done.map_err(|_| Error::Interrupted)??;
            }
        }
        Ok(())
    }

    async fn upload(
        &mut self,
        digest: Digest,
        size: u64,
        source: BlobSource,
        from: Option<Reference>,
        keep: Option<Spool>,
    ) -> Result<(), Error> {
        let Self::Registry {
            client,
            reference,
            uploads,
            places,
            ..
        } = self
        else {
            return Ok(());
        };
        while let Some(done) = uploads.try_join_next() {
            done.map_err(|_| Error::Interrupted)??;
        }
        let (client, reference) = (client.clone(), reference.clone());
        let place = Arc::clone(places).acquire_owned().await;
        uploads.spawn(async move {
            let _place = place;
            let _keep = keep;
            if let Some(from) = from
                && from.host() == reference.host()
            {
                let here = from.repository() == reference.repository();
                if here || client.mount_blob(&reference, digest, &from).await? {
                    return Ok(());
                }
            }
            client.push_blob(&reference, digest, size, source).await?;
            Ok(())
        });
        Ok(())
    }
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(Error::Interrupted))
}
