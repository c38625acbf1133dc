//! What the snapshots service needs from the data plane, in its own words.

use std::collections::{BTreeMap, HashSet};
use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sluice_oci::{Digest, Reference};

/// A layer that containerd asks for, and the image through which it asks.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRequest {
    /// The image that is being pulled; its repository holds the layer.
    pub reference: Reference,
    /// The layer's digest: that of its compressed blob.
    pub digest: Digest,
    /// Digest of the image's manifest, when containerd told it.
    pub manifest_digest: Option<Digest>,
    /// The labels that begin with `containerd.io/snapshot/`. The annotations of
    /// the layer's descriptor are among them when they begin so; those of
    /// zstd:chunked as well where the client put the prefix before them, which
    /// is taken off again.
    pub annotations: BTreeMap<String, String>,
    /// This layer and those above it in the image, lowest first. containerd
    /// caps a label at 4096 bytes, so a long list arrives cut: it is a hint
    /// for fetching ahead, not the image's list of layers.
    pub image_layers: Vec<Digest>,
}

/// What a container runs, as its runtime specification says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    /// The words of the command, as far as they are short and few.
    pub words: Vec<String>,
    /// Where commands are looked up, separated by colons.
    pub path: String,
    /// Where it runs.
    pub directory: String,
}

/// An image from which a container is about to run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageUse {
    /// The image through which its topmost layer was first asked for.
    pub reference: Option<String>,
    /// Digest of that image's manifest, when containerd told it.
    pub manifest_digest: Option<Digest>,
    /// Its lazily mounted layers, lowest first.
    pub layers: Vec<Digest>,
    /// By what name somebody asks for a recording of what is read.
    pub recording: Option<String>,
}

/// What a layer takes on this node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on disk.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// User and group of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The user's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
}

/// What is known of a layer since all of its tar was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// Digest of the tar; none where the blob holds no tar that is cut as its
    /// table of contents says.
    pub diff_id: Option<Digest>,
    /// The same of the tar filled up with zeros to whole records, which says as
    /// much: some compressors drop zeros at the end.
    pub padded: Option<Digest>,
    /// Whether the layer shows what the tar unpacks to.
    pub tree_fits: bool,
    /// Whether this is so for certain. Otherwise only what is as it should be
    /// is: some bytes that it is made of may not be the blob's.
    pub certain: bool,
}

/// Asks which layers some snapshot is mounted from now, or is about to be.
/// Blocks. None when that cannot be told.
pub type InUse = Arc<dyn Fn() -> Option<HashSet<Digest>> + Send + Sync>;

/// Why a layer cannot be mounted lazily. The image still works: containerd is
/// told to unpack the layer as usual.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("layer {layer} cannot be lazy: {reason}")]
pub struct NotLazy {
    layer: Digest,
    reason: String,
}

impl NotLazy {
    /// Names the layer and the reason, in words for the person who reads the
    /// log: "it has no table of contents; convert the image with `sluice
    /// convert`".
    pub fn new(layer: Digest, reason: impl Into<String>) -> Self {
        Self {
            layer,
            reason: reason.into(),
        }
    }

    /// The reason alone.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

/// Why a layer that was opened cannot be mounted, measured or removed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is no such layer on this node: it was never opened, or removed.
    #[error("layer {0} is not on this node; pull the image again")]
    Unknown(Digest),
    /// It is there, and something failed.
    #[error("layer {layer}: {source}")]
    Failed {
        /// The layer.
        layer: Digest,
        /// What failed, with its path.
        source: Box<dyn StdError + Send + Sync>,
    },
}

impl MountError {
    /// A failure on `layer`.
    pub fn failed(layer: Digest, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Failed {
            layer,
            source: source.into(),
        }
    }
}

/// Layers that are mounted before they are downloaded.
///
/// Every method may be called from many tasks at once. The service calls
/// `open` and `remove` of one layer one after the other, never together, and
/// `mount` of a layer only while a snapshot refers to it.
pub trait LazyLayers: Send + Sync + 'static {
    /// Makes the layer ready to be mounted: its table of contents is fetched
    /// and verified unless it is on disk already. Idempotent, and cheap when
    /// the layer is open. What it has written when it returns `Ok` survives a
    /// crash of the machine.
    fn open(&self, request: LayerRequest) -> impl Future<Output = Result<(), NotLazy>> + Send;

    /// The directory that overlayfs is given as a `lowerdir`; mounts it if it
    /// is not mounted. Needs no registry, also after a restart.
    ///
    /// The path stays valid until `remove` of that layer, must hold neither
    /// `:` nor `,` nor `\`, and should be short and inside the daemon's root
    /// (`m/<number>`, not 64 hexadecimal digits): an image's directories share
    /// one page of mount options.
    fn mount(&self, layer: Digest) -> impl Future<Output = Result<PathBuf, MountError>> + Send;

    /// Who owns the layer's root directory. Told without a look at where it is
    /// mounted: a daemon that waits for its own answer cannot be killed.
    fn owner(&self, layer: Digest) -> impl Future<Output = Result<Owner, MountError>> + Send;

    /// A writable snapshot of an image was made, whose layers are mounted: a
    /// container is about to read them. A hint, which cannot fail.
    fn starts(&self, image: ImageUse) -> impl Future<Output = ()> + Send;

    /// A container whose image has these layers mounted lazily, lowest first, is
    /// about to run what `program` finds out, which is awaited only if it helps.
    /// A hint, which cannot fail.
    fn runs(
        &self,
        layers: Vec<Digest>,
        program: impl Future<Output = Option<Program>> + Send,
    ) -> impl Future<Output = ()> + Send;

    /// Unmounts and deletes a layer that no snapshot refers to any more. A
    /// layer that is not there is no error.
    fn remove(&self, layer: Digest) -> impl Future<Output = Result<(), MountError>> + Send;

    /// What the layer takes on disk now.
    fn usage(&self, layer: Digest) -> impl Future<Output = Result<Usage, MountError>> + Send;

    /// Removes what is on disk of layers that are not in `known`, except those
    /// being opened now.
    fn retain(&self, known: HashSet<Digest>)
    -> impl Future<Output = Result<(), MountError>> + Send;

    /// Drops content of layers that are not in use, the one that was used
    /// longest ago first, while there is more than there may be. The layers
    /// stay: what is dropped is fetched again when it is read. `in_use` is
    /// asked again right before each, while nobody can mount it.
    fn make_room(&self, in_use: InUse) -> impl Future<Output = ()> + Send;

    /// What is known of a layer's tar, if it was seen.
    fn proof(&self, layer: Digest) -> impl Future<Output = Option<Proof>> + Send;

    /// Finds out what the layer's tar is, and for certain if something is known
    /// already: fetches all of it for that if it must. Begins with the call, not
    /// when the answer is awaited, and goes on when that is dropped. The answer
    /// comes when [`Self::proof`] has it; or why it cannot be found out now, at
    /// the latest when `wait` is over since that began, by whomever.
    fn settle(
        &self,
        layer: Digest,
        wait: Duration,
    ) -> impl Future<Output = Result<(), Arc<str>>> + Send;

    /// The next layer of which more is known than before.
    fn next_proof(&self) -> impl Future<Output = Digest> + Send;
}
