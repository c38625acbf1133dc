//! From a fetched TOC to a layer directory.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use sluice_layer::Toc;
use sluice_oci::{Digest, Reference};
use tokio::task::spawn_blocking;

use super::Node;
use super::memory::give_back;
use crate::erofs::{XattrNamespace, write_image};
use crate::layer_dir::{self, NewLayer, Problem};
use crate::remote::{self, FetchedToc, Remote, Taken};

/// Why a TOC did not become a directory.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{0}")]
    Toc(#[from] remote::Error),
    #[error("{0}")]
    Directory(#[from] layer_dir::Error),
    #[error("cannot note its number: {0}")]
    Number(#[source] io::Error),
    #[error("compiling its table of contents failed; see the log")]
    Panicked,
}

impl Error {
    /// Whether it would not have come with more memory.
    pub(super) fn needs_more_memory(&self) -> bool {
        matches!(self, Self::Toc(error) if error.needs_more_memory())
    }
}

impl Node {
    /// Verifies and parses the TOC and makes the layer's directory in `layers`,
    /// within the node's budget of memory.
    pub(super) async fn compile(
        &self,
        layers: PathBuf,
        fetched: FetchedToc,
        digest: Digest,
        reference: &Reference,
        number: u64,
    ) -> Result<(), Error> {
        let fetched = Arc::new(fetched);
        let budget = self.0.remote.budget();
        let mut wanted = fetched.likely_memory();
        loop {
            let memory = budget.read(wanted).await?;
            let whole = memory.is_whole();
            let (node, fetched) = (self.clone(), Arc::clone(&fetched));
            let (layers, reference) = (layers.clone(), reference.clone());
            let compiled = spawn_blocking(move || {
                let remote = &node.0.remote;
                let (toc, made) = compile(
                    &layers, remote, &fetched, &memory, digest, &reference, number,
                );
                // Nobody waits until so much in small pieces is free again.
                drop(spawn_blocking(move || {
                    drop(toc);
                    give_back();
                    // Held to the end, also when nobody waits for it any more.
                    drop(memory);
                }));
                made
            });
            match compiled.await.unwrap_or(Err(Error::Panicked)) {
                Err(error) if error.needs_more_memory() && !whole => wanted = u64::MAX,
                done => return done,
            }
        }
    }
}

/// Blocks, and takes up to `memory`, of which what it returns holds a part.
fn compile(
    layers: &Path,
    remote: &Remote,
    fetched: &FetchedToc,
    memory: &Taken,
    digest: Digest,
    reference: &Reference,
    number: u64,
) -> (Option<Toc>, Result<(), Error>) {
    let (compressed_toc, toc) = thread::scope(|scope| {
        let compressed_toc = scope.spawn(|| fetched.compressed_digest());
        let toc = fetched.read(remote, memory);
        (compressed_toc.join(), toc)
    });
    let compressed_toc = compressed_toc.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let toc = match toc {
        Ok(toc) => toc,
        Err(error) => return (None, Err(error.into())),
    };
    let new = NewLayer {
        toc: &toc,
        digest,
        blob_size: fetched.blob_size(),
        trust: fetched.trust(),
        compressed_toc,
        reference,
        number,
    };
    let made = layer_dir::create(layers, &new, |toc: &Toc, placement, out| {
        let mut out = io::BufWriter::with_capacity(1 << 18, out);
        let written = write_image(toc, placement, XattrNamespace::Trusted, &mut out)
            .map_err(|e| Problem::Erofs(Box::new(e)))?;
        if written.dropped_xattrs > 0 {
            tracing::info!(
                layer = %digest,
                "{} extended attributes are in no namespace that Linux stores; left out",
                written.dropped_xattrs
            );
        }
        io::Write::flush(&mut out).map_err(|source| Problem::Io {
            action: "write",
            source,
        })
    });
    (Some(toc), made.map_err(Error::from))
}
