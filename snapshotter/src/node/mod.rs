//! The node's lazily mounted layers: what the snapshots service asks for, made
//! of registry, directories, fetches and mounts.
//!
//! Below the root:
//!
//! | path | what |
//! |---|---|
//! | `chunk-index/` | which chunks have which digest, in all layers |
//! | `layers/<64 hexadecimal digits>/` | a layer's directory |
//! | `blobs/` | in mode `erofs`, mount point of the node's one FUSE file system of contents |
//! | `m/<number>/` | in mode `erofs`, a mounted layer |
//! | `next-layer` | the number that the next layer gets |
//! | `profiles/` | what images read while they start |
//! | `t/<number>/` | in mode `fuse`, a layer in the node's one FUSE file system of trees |

mod allowed;
mod attached;
mod compile;
mod elsewhere;
mod evict;
mod images;
mod layer;
mod left;
mod make;
mod marker;
mod memory;
mod mend;
mod paths;
mod plans;
mod prove;
mod recording;
mod release;
mod revive;
mod same_tree;
mod scrub;
mod start;
mod status;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use parking_lot::Mutex;
use sluice_oci::{Digest, Reference};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use crate::dependencies;
use crate::descriptors::Seats;
use crate::fetch::{self, Engine};
use crate::fuse::blobs::BlobTable;
use crate::fuse::{self, SessionError, TreeTable};
use crate::keeper::Keeper;
use crate::mount::{self, users::Overlay};
use crate::profiles::{ImageId, Profiles};
use crate::remote::Remote;
use crate::service::{
    ImageUse, InUse, LayerRequest, LazyLayers, MountError, NotLazy, Owner, Program, Proof, Usage,
};

pub use allowed::LazyFrom;
use attached::Attachments;
use elsewhere::Elsewhere;
pub use elsewhere::Sharing;
pub use evict::Quota;
use layer::Slot;
use left::Numbers;
use marker::Marker;
pub use plans::ProfileSource;
use prove::Settling;
pub use recording::Recorded;
use recording::Recordings;
pub use status::{LayerStatus, NodeStatus};

/// How layers are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// By the kernel's EROFS, with FUSE for missing bytes only.
    Erofs,
    /// By FUSE alone.
    Fuse,
}

/// Settings of the node.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory for everything below.
    pub root: PathBuf,
    /// How to mount; none asks the kernel what it can do.
    pub mode: Option<Mode>,
    /// How to fetch.
    pub fetch: fetch::Config,
    /// Whether what a profile or the image names is fetched before it is read.
    pub prefetch: bool,
    /// How starts are recorded.
    pub profiles: ProfileConfig,
    /// How long after its mount the rest of a layer is downloaded, if at all.
    pub background: Option<Duration>,
    /// How much the layers may take on disk.
    pub quota: Quota,
    /// How far layers share chunks.
    pub sharing: Sharing,
    /// Bytes a second that are read to verify what is kept.
    pub scrub_rate: u64,
    /// Layers of one image whose TOCs are fetched and compiled at once.
    pub opening: usize,
    /// Which images may be mounted lazily.
    pub lazy_from: LazyFrom,
    /// Bytes of memory for all TOCs that are fetched and compiled at once.
    pub toc_memory: u64,
    /// Who keeps the node's FUSE mounts for the next process.
    pub keeper: Arc<Keeper>,
}

impl Config {
    /// The defaults, below `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            mode: None,
            fetch: fetch::Config::default(),
            prefetch: true,
            profiles: ProfileConfig::default(),
            background: Some(Duration::from_secs(10)),
            quota: Quota::default(),
            sharing: Sharing::default(),
            scrub_rate: 50 << 20,
            opening: 8,
            lazy_from: LazyFrom::default(),
            toc_memory: 160 << 20,
            keeper: Arc::default(),
        }
    }
}

/// How starts are recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfileConfig {
    /// Whether they are, beyond those that are asked for.
    pub record: bool,
    /// Whether registries are asked for profiles attached to images.
    pub attached: bool,
    /// How long a recording lasts at most.
    pub longest: Duration,
    /// A recording ends when nothing new was read for so long.
    pub idle: Duration,
    /// Images whose profiles are kept.
    pub images: usize,
}

impl Default for ProfileConfig {
    fn default() -> Self {
        Self {
            record: true,
            attached: true,
            longest: Duration::from_secs(120),
            idle: Duration::from_secs(10),
            images: 256,
        }
    }
}

/// Why the node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A directory cannot be made or read.
    #[error("cannot use {}: {source}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// No FUSE.
    #[error("{0}")]
    Session(#[from] SessionError),
    /// Mounts that a former process left behind cannot be listed or removed.
    #[error("{0}")]
    Mount(#[from] mount::Error),
    /// The configured mode does not work here.
    #[error(
        "mount mode erofs was asked for, but {0}; choose mode fuse, or leave the choice to the probe"
    )]
    NoErofs(#[source] mount::erofs::Unsupported),
}

/// The lazily mounted layers of the node. Clones are the same node.
#[derive(Clone)]
pub struct Node(Arc<Inner>);

struct Inner {
    config: Config,
    mode: Mode,
    engine: Engine,
    remote: Remote,
    elsewhere: Arc<Elsewhere>,
    connecting: images::Connecting,
    slots: Mutex<HashMap<Digest, Arc<Slot>>>,
    blobs: BlobTable,
    trees: TreeTable,
    /// The node's own, and one that a process in the other mode left.
    sessions: Mutex<Vec<(Mode, fuse::Session)>>,
    numbers: Numbers,
    seats: Seats,
    /// Layers whose mounts were lost.
    lost: Mutex<Vec<Digest>>,
    /// Who stood on them.
    affected: Vec<Overlay>,
    opening: Semaphore,
    /// Whether it was told that there is more in use than there may be.
    overfull: AtomicBool,
    profiles: Arc<Profiles>,
    /// For what is known of images that start.
    dependencies: dependencies::Memory,
    /// Of images that start, by their topmost layers that are lazily mounted.
    starting: plans::Starting,
    recordings: Recordings,
    attachments: Attachments,
    marker: Marker,
    /// Whether the machine went down and not everything was verified since.
    doubted: AtomicBool,
    /// Layers whose state could not be made durable, and why.
    unpersisted: Mutex<HashMap<Digest, String>>,
    /// Layers whose tree or chunk table is damaged and cannot be mended, and
    /// why.
    undescribed: Mutex<HashMap<Digest, String>>,
    /// Held while all layers are verified.
    scrubbing: tokio::sync::Mutex<()>,
    /// Layers of which something new is known, for whoever compares it.
    proven: (
        UnboundedSender<Digest>,
        tokio::sync::Mutex<UnboundedReceiver<Digest>>,
    ),
    /// Layers of which somebody wants to know what they are.
    settling: Mutex<HashMap<Digest, Settling>>,
    /// How many layers are proven from their whole blobs at once.
    provers: Semaphore,
}

impl Node {
    /// Its mount mode.
    pub fn mode(&self) -> Mode {
        self.0.mode
    }

    /// The overlays that stand on layers which a former process served and
    /// whose FUSE device was not kept.
    pub fn affected(&self) -> &[Overlay] {
        &self.0.affected
    }

    /// Bytes and requests under way.
    pub fn in_use(&self) -> (u64, u64) {
        self.0.engine.admission().in_use()
    }

    fn layers_dir(&self) -> PathBuf {
        self.0.config.root.join(start::LAYERS)
    }

    fn layer_path(&self, digest: Digest) -> PathBuf {
        self.layers_dir().join(digest.hex())
    }

    fn slot(&self, digest: Digest) -> Arc<Slot> {
        let mut slots = self.0.slots.lock();
        Arc::clone(slots.entry(digest).or_default())
    }
}

impl LazyLayers for Node {
    async fn open(&self, request: LayerRequest) -> Result<(), NotLazy> {
        if !self.0.config.lazy_from.allows(&request.reference) {
            let reason = "its image is from none of the places that lazy_from in section [mount] \
                          names";
            return Err(NotLazy::new(request.digest, reason));
        }
        let image = ImageId::from(&request);
        if self.0.config.prefetch {
            let (ahead, image) = (self.clone(), image.clone());
            tokio::spawn(async move { ahead.attached(&image).await });
        }
        if request.image_layers.len() > 1 {
            let (ahead, request) = (self.clone(), request.clone());
            tokio::spawn(async move { ahead.open_image(&request).await });
        }
        let known = self
            .known(&request)
            .await
            .map_err(|error| NotLazy::new(request.digest, error.to_string()))?;
        let reference = &request.reference;
        self.open_layer(reference, &image, request.digest, &known)
            .await
    }

    async fn mount(&self, layer: Digest) -> Result<PathBuf, MountError> {
        self.mount_layer(layer).await
    }

    async fn owner(&self, layer: Digest) -> Result<Owner, MountError> {
        self.layer_owner(layer).await
    }

    async fn starts(&self, image: ImageUse) {
        self.begin(image).await;
    }

    async fn runs(
        &self,
        layers: Vec<Digest>,
        program: impl Future<Output = Option<Program>> + Send,
    ) {
        self.foresee_program(&layers, program).await;
    }

    async fn remove(&self, layer: Digest) -> Result<(), MountError> {
        self.remove_layer(layer).await
    }

    async fn usage(&self, layer: Digest) -> Result<Usage, MountError> {
        self.layer_usage(layer).await
    }

    async fn retain(&self, known: HashSet<Digest>) -> Result<(), MountError> {
        self.retain_layers(&known).await
    }

    async fn make_room(&self, in_use: InUse) {
        self.evict_layers(&in_use).await;
    }

    async fn proof(&self, layer: Digest) -> Option<Proof> {
        self.layer_proof(layer).await
    }

    fn settle(
        &self,
        layer: Digest,
        wait: Duration,
    ) -> impl Future<Output = Result<(), Arc<str>>> + Send {
        self.settle_layer(layer, wait)
    }

    async fn next_proof(&self) -> Digest {
        self.next_proven().await
    }
}

/// Where a layer's blob is, for a fetch that begins later.
fn source(remote: &Remote, reference: &Reference, digest: Digest) -> fetch::RegistryBlob {
    fetch::RegistryBlob::new(remote.client().blob(reference, digest), reference.host())
}

#[cfg(test)]
mod tests;
