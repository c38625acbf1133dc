//! Finding out whether a layer is the one that its images name: once all of it
//! is here, its tar is put together and digested, and its tree is compared with
//! what the tar unpacks to.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use sluice_layer::write::{TarTree, TarTreeError};
use sluice_layer::{Limits, TocTrust};
use sluice_oci::Digest;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout_at};

use super::memory::give_back;
use super::same_tree::difference;
use super::{Node, layer::Open};
use crate::erofs::Image;
use crate::fetch::{LazyLayer, ProveError};
use crate::layer_dir::{LayerDir, Proof};
use crate::remote::Taken;
use crate::service;

/// How long it is left alone when it cannot be found out; it doubles.
const PAUSE: Duration = Duration::from_secs(60);
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);
/// How many layers are proven from their whole blobs at once: who waits for one
/// does not wait for a registry that holds up another.
pub(super) const PROVERS: usize = 8;
/// What comparing a tree takes as a rule, for each inode and beside.
const PER_INODE: u64 = 3000;
const LEAST: u64 = 4 << 20;

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// That it is being found out what a layer is.
#[derive(Clone)]
pub(super) struct Settling {
    since: Instant,
    /// For all who wait: its end, or why it is not possible.
    done: Shared<BoxFuture<'static, Result<(), Arc<str>>>>,
}

impl Node {
    /// Finds out what the layer's tar is, which has to be here, and tries again
    /// while that is not possible.
    pub(super) async fn prove(self, layer: Arc<LazyLayer>) {
        let mut pause = PAUSE;
        while let Err(error) = self.prove_once(&layer, false).await {
            tracing::warn!(
                layer = %layer.digest(),
                "it cannot be compared now with what its image says of it: {error}"
            );
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Finds out what the layer's tar is as soon as possible, and for certain
    /// if anything is known. Begins at once, and goes on when nobody waits for
    /// it any more.
    pub(super) fn settle_layer(
        &self,
        digest: Digest,
        wait: Duration,
    ) -> impl Future<Output = Result<(), Arc<str>>> + Send + use<> {
        let Settling { since, done } = self.settling(digest);
        async move {
            let settled = timeout_at(since + wait, done).await;
            settled.unwrap_or_else(|_| Err(format!("it takes longer than {wait:?}").into()))
        }
    }

    fn settling(&self, digest: Digest) -> Settling {
        let mut settling = self.0.settling.lock();
        if let Some(underway) = settling.get(&digest)
            // One that broke off is still here.
            && underway.done.peek().is_none()
        {
            return underway.clone();
        }
        let node = self.clone();
        let work = tokio::spawn(async move {
            let done = node.settle_once(digest).await.map_err(|error| {
                tracing::warn!(
                    layer = %digest,
                    "whether it is what its image says of it cannot be found out now: {error}"
                );
                Arc::from(error.to_string())
            });
            node.0.settling.lock().remove(&digest);
            done
        });
        let joined = work.map(|done| done.unwrap_or_else(|e| Err(e.to_string().into())));
        let begun = Settling {
            since: Instant::now(),
            done: joined.boxed().shared(),
        };
        settling.insert(digest, begun.clone());
        begun
    }

    async fn settle_once(&self, digest: Digest) -> Result<(), Failed> {
        let slot = self.slot(digest);
        let mut place = slot.0.lock().await;
        if place.is_none() {
            *place = self.load(digest).await?;
        }
        let layer = place.as_ref().map(Open::layer);
        drop(place);
        let Some(layer) = layer else {
            self.forget(digest, &slot);
            return Ok(());
        };
        let closed = layer.closed().clone();
        // What is here need not be fetched again, unless it was in vain.
        let whole_blob = layer.dir().proof().is_some() || !layer.dir().is_complete();
        let proving = closed.run_until_cancelled(self.prove_once(&layer, whole_blob));
        proving.await.unwrap_or(Ok(()))
    }

    async fn prove_once(&self, layer: &Arc<LazyLayer>, whole_blob: bool) -> Result<(), Failed> {
        let turn = match whole_blob {
            true => self.0.provers.acquire().await.ok(),
            false => self.0.engine.prover().await,
        };
        if turn.is_none() {
            return Ok(());
        }
        let known = layer.dir().proof();
        if known.is_some_and(|proof| proof.whole_blob || !whole_blob) {
            return Ok(());
        }
        let own_rest = whole_blob.then(|| layer.own_rest());
        let diff_id = match &own_rest {
            Some(own_rest) => layer.diff_id_of_blob(own_rest).await,
            None => layer.diff_id().await,
        };
        let (diff_id, tree_fits) = match diff_id {
            Ok(diff_id) => match self.tree_difference(layer).await? {
                None => (Some(diff_id), true),
                Some(what) => {
                    tracing::warn!(layer = %layer.digest(), "it is not what its tar says: {what}");
                    (Some(diff_id), false)
                }
            },
            Err(ProveError::Content(_)) if !whole_blob => {
                // What the parts do not give, the whole may.
                drop(turn);
                return Box::pin(self.prove_once(layer, true)).await;
            }
            Err(ProveError::Content(what)) => {
                tracing::debug!(layer = %layer.digest(), "{what}");
                (None, false)
            }
            Err(error) => return Err(error.into()),
        };
        crash_point!("prove.known");
        let proof = Proof {
            diff_id,
            tree_fits,
            whole_blob,
        };
        let proven = Arc::clone(layer);
        spawn_blocking(move || proven.dir().prove(proof)).await??;
        let _ = self.0.proven.0.send(layer.digest());
        Ok(())
    }

    /// What in the tree is not as the tar says. A tree whose TOC is in the tar
    /// is what the tar says.
    async fn tree_difference(&self, layer: &Arc<LazyLayer>) -> Result<Option<String>, Failed> {
        if let TocTrust::Uncompressed(digest) = layer.dir().identity().trust {
            let layer = Arc::clone(layer);
            let in_tar = spawn_blocking(move || {
                let mut tar = TarTree::of_toc();
                let sound = outline(&layer, &mut tar)?.is_ok();
                Ok::<_, Failed>(sound && tar.toc_digest() == Some(digest))
            });
            if in_tar.await?? {
                return Ok(None);
            }
        }
        let image = Image::open(&layer.dir().meta_path())?;
        let wanted = LEAST + image.inodes().saturating_mul(PER_INODE);
        drop(image);
        let budget = self.0.remote.budget();
        let mut memory = budget.read(wanted).await?;
        loop {
            let whole = memory.is_whole();
            let layer = Arc::clone(layer);
            let compared = spawn_blocking(move || compare(&layer, &memory));
            match compared.await?? {
                Err(TarTreeError::Memory) if whole => {
                    return Err("its tree takes more memory than toc_memory_mib in section \
                                [fetch] allows; raise it"
                        .into());
                }
                Err(TarTreeError::Memory) => memory = budget.read(u64::MAX).await?,
                Err(TarTreeError::Tar(what)) => return Ok(Some(what)),
                Ok(difference) => return Ok(difference),
            }
        }
    }

    /// The layer of which something new is known, when there is one.
    pub(super) async fn next_proven(&self) -> Digest {
        match self.0.proven.1.lock().await.recv().await {
            Some(digest) => digest,
            None => std::future::pending().await,
        }
    }

    /// What is known of a layer's tar.
    pub(super) async fn layer_proof(&self, digest: Digest) -> Option<service::Proof> {
        let path = self.layer_path(digest);
        let proof = spawn_blocking(move || Proof::load(&path, &digest)).await;
        proof.ok().flatten().map(|proof| service::Proof {
            diff_id: proof.diff_id.map(|digest| digest.exact),
            padded: proof.diff_id.map(|digest| digest.padded),
            tree_fits: proof.tree_fits,
            certain: proof.whole_blob,
        })
    }
}

/// Shows the layer's tar to `tar`.
fn outline(layer: &LazyLayer, tar: &mut TarTree) -> Result<Result<(), TarTreeError>, Failed> {
    let mut wrong = Ok(());
    layer.outline(|bytes, origin| {
        if wrong.is_ok() {
            wrong = tar.push(bytes, origin);
        }
        Ok(())
    })?;
    Ok(wrong)
}

/// Blocks, and takes up to `memory`.
fn compare(
    layer: &LazyLayer,
    memory: &Taken,
) -> Result<Result<Option<String>, TarTreeError>, Failed> {
    // A half for what is read, and a half for what is made of it.
    let half = memory.for_tree() / 2;
    let mut tar = TarTree::new(half);
    let compared = match outline(layer, &mut tar)? {
        Err(error) => Err(error),
        Ok(()) => {
            let limits = Limits {
                max_memory: half,
                ..Limits::default()
            };
            match tar.finish(&limits) {
                Err(error) => Err(error),
                Ok(unpacked) => {
                    let dir: &LayerDir = layer.dir();
                    let image = Image::open(&dir.meta_path())?;
                    Ok(difference(&unpacked, &image, dir)?)
                }
            }
        }
    };
    give_back();
    Ok(compared)
}
