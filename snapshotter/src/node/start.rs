//! Starting and stopping the node.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use parking_lot::Mutex;
use sluice_registry::Client;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::{Config, Inner, Mode, Node, StartError, memory};
use crate::fetch::Engine;
use crate::fuse::blobs::{BlobTable, Blobs};
use crate::fuse::tree::Trees;
use crate::fuse::{Reader, Session, TreeTable};
use crate::layer_dir::{LayerDir, TEMPORARY};
use crate::mount;
use crate::remote::Remote;

/// The layers' directories.
pub(super) const LAYERS: &str = "layers";
/// Where contents are mounted.
pub(super) const BLOBS: &str = "blobs";
/// Where layers are mounted.
pub(super) const MOUNTS: &str = "m";
/// Where trees are mounted.
pub(super) const TREES: &str = "t";

/// How often what has become present is made durable.
const PERSIST: Duration = Duration::from_secs(30);

impl Node {
    /// Starts the node below `config.root`: removes what a former process left
    /// half made, detaches its dead mounts, and serves contents. Layers are
    /// mounted when they are asked for. Blocks for some milliseconds; to be
    /// called within the runtime that the node is to use.
    pub fn start(mut config: Config, client: Client) -> Result<Self, StartError> {
        memory::settle();
        make_directory(&config.root)?;
        // The kernel lists mounts by their real paths.
        config.root = fs::canonicalize(&config.root).map_err(failed(&config.root))?;
        let root = &config.root;
        for name in [LAYERS, MOUNTS, BLOBS, TREES] {
            // The mount point of a killed process cannot even be looked at.
            detach_below(&root.join(name))?;
            make_directory(&root.join(name))?;
        }
        let mode = match config.mode {
            Some(Mode::Fuse) => Mode::Fuse,
            wanted => match mount::erofs::probe(root) {
                Ok(()) => Mode::Erofs,
                Err(reason) if wanted == Some(Mode::Erofs) => {
                    return Err(StartError::NoErofs(reason));
                }
                Err(reason) => {
                    tracing::info!("layers are mounted by FUSE alone: {reason}");
                    Mode::Fuse
                }
            },
        };
        let next_number = tidy(&root.join(LAYERS))?;
        clear(&root.join(MOUNTS))?;
        let runtime = Handle::current();
        let blobs = BlobTable::new();
        let trees = TreeTable::new();
        let reader = Reader::new(runtime.clone());
        let session = match mode {
            Mode::Erofs => {
                let contents = Blobs::new(blobs.clone(), reader);
                Session::mount(contents, &root.join(BLOBS), "sluice-blobs")?
            }
            Mode::Fuse => {
                let layers = Trees::new(trees.clone(), reader);
                Session::mount(layers, &root.join(TREES), "sluice-trees")?
            }
        };
        let node = Self(Arc::new(Inner {
            engine: Engine::new(config.fetch.clone(), runtime.clone()),
            remote: Remote::new(client),
            slots: Mutex::new(HashMap::new()),
            session: Mutex::new(Some(session)),
            next_number: AtomicU64::new(next_number),
            opening: Semaphore::new(config.opening.max(1)),
            mode,
            blobs,
            trees,
            config,
        }));
        let inner = Arc::downgrade(&node.0);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(PERSIST).await;
                let Some(inner) = inner.upgrade() else { return };
                Self(inner).persist().await;
            }
        });
        Ok(node)
    }

    /// Ends all fetches, makes what is present durable, and unmounts. What
    /// something still uses is detached, and fails when its bytes are missing.
    pub async fn stop(&self) {
        let slots: Vec<_> = self.0.slots.lock().drain().collect();
        for (_, slot) in slots {
            slot.close(self).await;
        }
        let session = self.0.session.lock().take();
        let unmounted = tokio::task::spawn_blocking(move || session.map(Session::unmount)).await;
        if let Err(error) = unmounted {
            tracing::warn!("unmounting the contents: {error}");
        }
    }
}

impl Drop for Inner {
    /// Without [`Node::stop`], at least nothing stays mounted that nobody
    /// serves.
    fn drop(&mut self) {
        if self.session.get_mut().is_some()
            && let Err(error) = detach_below(&self.config.root.join(MOUNTS))
        {
            tracing::warn!("{error}");
        }
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> StartError {
    |source| StartError::Directory {
        path: path.to_owned(),
        source,
    }
}

fn make_directory(path: &Path) -> Result<(), StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed(path))
}

/// Takes away mounts whose server is gone, as after a process was killed: they
/// cannot be used for anything.
fn detach_below(directory: &Path) -> Result<(), StartError> {
    for mount in mount::mounts_below(directory)? {
        tracing::info!("detaching {}, which nobody serves", mount.target.display());
        mount::detach(&mount.target)?;
    }
    Ok(())
}

/// Removes directories that were being made or deleted, and returns the first
/// number that no layer has.
fn tidy(layers: &Path) -> Result<u64, StartError> {
    let mut next = 0;
    for entry in fs::read_dir(layers).map_err(failed(layers))? {
        let path = entry.map_err(failed(layers))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(TEMPORARY) {
            fs::remove_dir_all(&path).map_err(failed(&path))?;
            continue;
        }
        // One bad layer is found out when it is opened.
        if let Ok(identity) = LayerDir::identify(&path) {
            next = next.max(identity.number + 1);
        }
    }
    Ok(next)
}

/// Removes the empty mount points of a former process.
fn clear(directory: &Path) -> Result<(), StartError> {
    for entry in fs::read_dir(directory).map_err(failed(directory))? {
        let path = entry.map_err(failed(directory))?.path();
        fs::remove_dir(&path).map_err(failed(&path))?;
    }
    Ok(())
}
