//! Starting and stopping the node.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use sluice_registry::Client;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::attached::Attachments;
use super::elsewhere::Elsewhere;
use super::left::{self, Left, Numbers, clear, tidy};
use super::marker::{Before, Marker};
use super::recording::Recordings;
use super::{Config, Inner, Mode, Node, StartError, memory};
use crate::dependencies;
use crate::descriptors::Seats;
use crate::fetch::{ChunkFinder, Engine};
use crate::fuse::blobs::{BlobTable, Blobs};
use crate::fuse::tree::Trees;
use crate::fuse::{Kept, Reader, Session, SessionError, TreeTable};
use crate::mount;
use crate::profiles::Profiles;
use crate::remote::{Remote, TocBudget};

/// The layers' directories.
pub(super) const LAYERS: &str = "layers";
/// Where contents are mounted.
pub(super) const BLOBS: &str = "blobs";
/// Where layers are mounted.
pub(super) const MOUNTS: &str = "m";
/// Where trees are mounted.
pub(super) const TREES: &str = "t";

/// What images read while they start.
const PROFILES: &str = "profiles";

/// How often what has become present is made durable.
const PERSIST: Duration = Duration::from_secs(30);

/// How often it is looked whether another program has touched what describes
/// the open layers.
const LOOK: Duration = Duration::from_secs(30);

/// A manifest or a TOC that takes longer is not waited for: containerd waits
/// for the answer, and unpacking the layer is one, too.
const UNPACK_INSTEAD: Duration = Duration::from_secs(60);

impl Node {
    /// Starts the node below `config.root`: goes on with the mounts that were
    /// kept, detaches those that were not, removes what a former process left
    /// half made, and serves contents. Layers are mounted when they are asked
    /// for. Blocks for some milliseconds; to be called within the runtime that
    /// the node is to use.
    pub fn start(mut config: Config, client: Client) -> Result<Self, StartError> {
        memory::settle();
        make_directory(&config.root)?;
        // The kernel lists mounts by their real paths.
        config.root = fs::canonicalize(&config.root).map_err(failed(&config.root))?;
        let root = &config.root;
        let mut left = Left::take_over(root, &config.keeper)?;
        crash_point!("start.taken-over");
        for name in [LAYERS, MOUNTS, BLOBS, TREES] {
            let path = root.join(name);
            // Looking at a mount that nobody serves yet would wait for ever.
            if name == LAYERS || !left.holds(root, &path) {
                make_directory(&path)?;
            }
        }
        // Also where no attempt follows.
        mount::erofs::clear_probe(root).map_err(failed(&root.join(mount::erofs::PROBE)))?;
        let mode = match config.mode {
            Some(Mode::Fuse) => Mode::Fuse,
            // That mounts are there shows that it works. Readers wait for this
            // process: it must not depend on whether a full disk takes a probe.
            _ if left.blobs.is_some() => Mode::Erofs,
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
        crash_point!("start.probed");
        let (marker, before) = Marker::set(root)?;
        let layers = tidy(&root.join(LAYERS))?;
        clear(root)?;
        let profiles = Profiles::open(root.join(PROFILES), config.profiles.images);
        let runtime = Handle::current();
        let proven = tokio::sync::mpsc::unbounded_channel();
        // It is synced only when a process ends in order.
        let anew = before == Before::PowerLoss;
        let elsewhere = Elsewhere::new(root, root.join(LAYERS), config.sharing, anew);
        let elsewhere = Arc::new(elsewhere);
        let finder = Arc::clone(&elsewhere) as Arc<dyn ChunkFinder>;
        let node = Self(Arc::new(Inner {
            engine: Engine::with_finder(config.fetch.clone(), runtime.clone(), finder),
            elsewhere,
            remote: Remote::new(
                client,
                TocBudget::new(config.toc_memory),
                config.fetch.deadline.min(UNPACK_INSTEAD),
            ),
            connecting: Mutex::default(),
            slots: Mutex::new(HashMap::new()),
            sessions: Mutex::default(),
            numbers: Numbers::load(root, &layers)?,
            seats: Seats::new(config.fetch.connections),
            lost: Mutex::default(),
            affected: std::mem::take(&mut left.lost.overlays),
            opening: Semaphore::new(config.opening.max(1)),
            profiles: Arc::new(profiles),
            dependencies: dependencies::Memory::default(),
            starting: super::plans::Starting::default(),
            attachments: Attachments::new(),
            recordings: Recordings::default(),
            mode,
            blobs: BlobTable::new(),
            trees: TreeTable::new(),
            overfull: AtomicBool::new(false),
            marker,
            doubted: AtomicBool::new(before == Before::PowerLoss),
            unpersisted: Mutex::default(),
            undescribed: Mutex::default(),
            scrubbing: tokio::sync::Mutex::default(),
            proven: (proven.0, tokio::sync::Mutex::new(proven.1)),
            settling: Mutex::default(),
            provers: Semaphore::new(super::prove::PROVERS),
            config,
        }));
        if node.0.config.quota.is_set() {
            // Until it is known what there is.
            node.0.engine.set_room(0);
        }
        node.go_on(layers, &left, before)?;
        node.serve(left)?;
        crash_point!("start.served");
        node.tidy_index();
        if before != Before::InOrder {
            tracing::warn!(
                "the last process did not end in order{}: what it left is verified",
                match before {
                    Before::PowerLoss => ", nor did the machine",
                    _ => "",
                }
            );
            let inner = Arc::downgrade(&node.0);
            runtime.spawn(async move {
                if let Some(inner) = inner.upgrade() {
                    Self(inner).verify_all().await;
                }
            });
        }
        let inner = Arc::downgrade(&node.0);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(PERSIST).await;
                let Some(inner) = inner.upgrade() else { return };
                Self(inner).persist().await;
            }
        });
        let inner = Arc::downgrade(&node.0);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                let Some(inner) = inner.upgrade() else { return };
                Self(inner).look_at_descriptions().await;
            }
        });
        Ok(node)
    }

    /// Serves the mount of the node's mode, and whatever was left to go on
    /// with.
    fn serve(&self, left: Left) -> Result<(), StartError> {
        let inner = &*self.0;
        let root = &inner.config.root;
        let reader = Reader::new(Handle::current());
        let mut sessions = inner.sessions.lock();
        for (mode, kept) in [(Mode::Erofs, left.blobs), (Mode::Fuse, left.trees)] {
            if kept.is_none() && mode != inner.mode {
                continue;
            }
            let fresh = kept.is_none();
            let mut session = match mode {
                Mode::Erofs => {
                    let contents = Blobs::new(inner.blobs.clone(), reader.clone());
                    open_session(contents, &root.join(BLOBS), "sluice-blobs", kept)?
                }
                Mode::Fuse => {
                    let layers = Trees::new(inner.trees.clone(), reader.clone());
                    open_session(layers, &root.join(TREES), "sluice-trees", kept)?
                }
            };
            if fresh {
                left::keep(&inner.config.keeper, mode, &mut session);
            }
            sessions.push((mode, session));
        }
        Ok(())
    }

    /// Ends all fetches, makes what is present durable, and unmounts. What
    /// something still uses is detached, and fails when its bytes are missing.
    pub async fn stop(&self) {
        self.0.attachments.end();
        self.end_recordings(|_| true).await;
        let slots: Vec<_> = self.0.slots.lock().drain().collect();
        // All at once, for each may wait a moment for its users to go.
        join_all(slots.iter().map(|(_, slot)| slot.close(self))).await;
        crash_point!("end.layers-closed");
        let sessions = std::mem::take(&mut *self.0.sessions.lock());
        for (mode, session) in sessions {
            self.0.config.keeper.forget(left::name_of(mode));
            crash_point!("end.forgotten");
            let unmounted = tokio::task::spawn_blocking(move || session.unmount()).await;
            if let Err(error) = unmounted {
                tracing::warn!("unmounting: {error}");
            }
            crash_point!("end.unmounted");
        }
        self.end_in_order();
    }

    /// The next process need not verify what was made durable.
    fn end_in_order(&self) {
        let durable = self.0.unpersisted.lock().is_empty() && self.0.elsewhere.sync().is_ok();
        if durable && !self.0.doubted.load(Ordering::Relaxed) {
            self.0.marker.clear();
        }
    }

    /// Ends for the sake of the next process: what is present is made durable,
    /// mounts stay, and what is not answered is left to it. Without anybody
    /// who keeps the mounts it is [`Node::stop`].
    pub async fn leave(&self) {
        if !self.0.config.keeper.keeps() {
            return self.stop().await;
        }
        self.end_recordings(|_| true).await;
        self.persist().await;
        crash_point!("leave.persisted");
        for (_, session) in std::mem::take(&mut *self.0.sessions.lock()) {
            session.leave();
        }
        crash_point!("leave.left");
        self.end_in_order();
    }
}

impl Drop for Inner {
    /// Without [`Node::stop`], at least nothing stays mounted that nobody
    /// serves or will serve.
    fn drop(&mut self) {
        let over = |(mode, session): &(Mode, Session)| *mode == Mode::Erofs && !session.outlives();
        if self.sessions.get_mut().iter().any(over)
            && let Err(error) = detach_below(&self.config.root.join(MOUNTS))
        {
            tracing::warn!("{error}");
        }
    }
}

fn open_session<F: fuser::Filesystem>(
    filesystem: F,
    mount_point: &Path,
    name: &str,
    kept: Option<Kept>,
) -> Result<Session, SessionError> {
    match kept {
        Some(kept) => {
            let session = Session::adopt(filesystem, mount_point, kept)?;
            tracing::info!("going on with the mount at {}", mount_point.display());
            Ok(session)
        }
        None => Session::mount(filesystem, mount_point, name),
    }
}

pub(super) fn failed(path: &Path) -> impl FnOnce(io::Error) -> StartError {
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

/// Takes away mounts whose server is gone: they cannot be used for anything.
fn detach_below(directory: &Path) -> Result<(), StartError> {
    for mount in mount::mounts_below(directory)? {
        tracing::info!("detaching {}, which nobody serves", mount.target.display());
        mount::detach(&mount.target)?;
    }
    Ok(())
}
