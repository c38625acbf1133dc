//! From what an image says of a layer to its open directory: made from the
//! registry, or found on the disk, mended where that is damaged.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sluice_oci::{Digest, Reference};
use sluice_registry::Senders;
use tokio::task::spawn_blocking;

use super::layer::Open;
use super::release::delete;
use super::{Node, compile};
use crate::fetch::LazyLayer;
use crate::layer_dir::{self, LayerDir};
use crate::remote::{FetchedToc, Known, StoredToc, asked_for_toc};

impl Node {
    /// Makes the layer's directory and opens it.
    pub(super) async fn make_and_load(
        &self,
        reference: &Reference,
        digest: Digest,
        known: &Known,
    ) -> Result<Open, String> {
        let toc = self.make(reference, digest, known).await?;
        let reason = match self.load(digest).await {
            Ok(Some(open)) => {
                // Nobody waits for it: who lacks it fetches it again.
                tokio::spawn(keep(open.layer(), toc));
                return Ok(open);
            }
            Ok(None) => "its directory is gone again".to_owned(),
            Err(error) => error,
        };
        // No snapshot refers to it, so that nothing else would remove it.
        let path = self.layer_path(digest);
        let deleted = spawn_blocking(move || delete(&path)).await;
        if let Err(error) = deleted.map_err(io::Error::other).flatten() {
            tracing::warn!(layer = %digest, "its directory stays until the next start: {error}");
        }
        Err(reason)
    }

    /// Makes the layer's directory. A table of contents that is not where the
    /// image's annotations say is looked for by the footer.
    async fn make(
        &self,
        reference: &Reference,
        digest: Digest,
        known: &Known,
    ) -> Result<StoredToc, String> {
        let made = match self.make_once(reference, digest, known).await {
            Err(compile::Error::Toc(error)) if error.is_misplaced() => {
                match known.without_position() {
                    Some(known) => {
                        tracing::debug!(layer = %digest, "looked for by the footer: {error}");
                        self.make_once(reference, digest, &known).await
                    }
                    None => Err(error.into()),
                }
            }
            made => made,
        };
        made.map_err(|error| match error.needs_more_memory() {
            true => format!("{error}; raise toc_memory_mib in section [fetch]"),
            false => error.to_string(),
        })
    }

    /// One that is not what the image promises is fetched once more if another
    /// host has the blob.
    async fn make_once(
        &self,
        reference: &Reference,
        digest: Digest,
        known: &Known,
    ) -> Result<StoredToc, compile::Error> {
        let link = self.0.engine.link(reference.host());
        let mut expected = link.expect_table(asked_for_toc(known));
        let remote = &self.0.remote;
        let fetched = remote
            .fetch_toc(reference, digest, known, &mut |bytes| {
                expected.arrived(bytes);
            })
            .await?;
        drop(expected);
        link.answered(fetched.waited());
        let senders = fetched.senders();
        match self.make_of(fetched, reference, digest).await {
            Err(compile::Error::Toc(error)) => {
                // The annotation may be what is wrong.
                let elsewhere = error.is_misplaced() && known.without_position().is_some();
                if elsewhere || !distrust(&senders) {
                    return Err(error.into());
                }
                let again = remote
                    .fetch_toc(reference, digest, known, &mut |_| {})
                    .await?;
                self.make_of(again, reference, digest).await
            }
            made => made,
        }
    }

    async fn make_of(
        &self,
        fetched: FetchedToc,
        reference: &Reference,
        digest: Digest,
    ) -> Result<StoredToc, compile::Error> {
        let number = self.0.numbers.take().map_err(compile::Error::Number)?;
        let layers = self.layers_dir();
        let stored = fetched.stored();
        let compiled = self.compile(layers, fetched, digest, reference, number);
        compiled.await.map(|()| stored)
    }

    /// Opens the layer's directory, if there is one, and checks all of it but
    /// the content. A damaged one is mended; one that cannot be is removed, to
    /// be made again.
    pub(super) async fn load(&self, digest: Digest) -> Result<Option<Open>, String> {
        // Also before a layer is made that could then not be opened.
        let seat = self.0.seats.take().map_err(|full| full.to_string())?;
        let error = match self.open_checked(digest).await? {
            Ok(dir) => return Ok(dir.map(|dir| self.adopt(dir, seat))),
            Err(error) if error.is_damage() => error,
            Err(error) => return Err(error.to_string()),
        };
        let mended = self.mend(digest).await;
        if !mended.map_err(|why| format!("{error}; it cannot be mended now: {why}"))? {
            tracing::warn!(layer = %digest, "{error}; it is removed, to be made again");
            let path = self.layer_path(digest);
            let deleted = spawn_blocking(move || delete(&path)).await;
            deleted
                .map_err(io::Error::other)
                .flatten()
                .map_err(|error| error.to_string())?;
            return Ok(None);
        }
        tracing::warn!(layer = %digest, "{error}; it has been mended");
        let dir = self.open_checked(digest).await?;
        let dir = dir.map_err(|error| error.to_string())?;
        let open = dir.map(|dir| self.adopt(dir, seat));
        Ok(open.inspect(|open| open.layer.was_mended(error.to_string())))
    }

    async fn open_checked(
        &self,
        digest: Digest,
    ) -> Result<Result<Option<LayerDir>, layer_dir::Error>, String> {
        let path = self.layer_path(digest);
        let doubted = self.0.doubted.load(Ordering::Relaxed);
        let opened = spawn_blocking(move || {
            let opened = LayerDir::open(&path, digest).and_then(|dir| {
                dir.check_meta()?;
                Ok(if doubted { dir.doubted() } else { dir })
            });
            match opened {
                Ok(dir) => Ok(Some(dir)),
                Err(_) if !path.exists() => Ok(None),
                Err(error) => Err(error),
            }
        });
        opened.await.map_err(|error| error.to_string())
    }
}

/// Keeps the TOC for when it is found out what the layer's tar is.
async fn keep(layer: Arc<LazyLayer>, toc: StoredToc) {
    let digest = layer.digest();
    let kept = spawn_blocking(move || layer.dir().keep_toc(toc.as_ref()));
    if let Err(error) = kept.await.map_err(io::Error::other).flatten() {
        tracing::debug!(layer = %digest, "its table of contents is fetched again: {error}");
    }
}

/// Tells that what these sent is wrong. Whether there is another host to ask.
fn distrust(senders: &[Senders]) -> bool {
    // All of them, not up to the first that says so.
    let told: Vec<bool> = senders.iter().map(Senders::distrust).collect();
    told.contains(&true)
}
