//! Sluice's own service: looking at the daemon, and its profiles.

mod grpc;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use sluice_layer::Profile;
use sluice_oci::{Digest, Manifest, Reference};

use crate::node::{Node, NodeStatus, ProfileSource, Recorded};
use crate::profiles::{ImageId, Stored};
use crate::service::{self, LayerRequest, Snapshots, Standing};

pub use grpc::{Adapter, MAX_MESSAGE, server};

/// The largest manifest; what the distribution specification has registries
/// accept.
const MAX_MANIFEST: usize = 4 << 20;

/// So many layers of an image are opened before they are asked for. Images have
/// fewer; a manifest has room for thousands.
const MOST_AHEAD: usize = 128;

/// Why a call fails.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// The caller's mistake.
    #[error("{0}")]
    Invalid(String),
    /// Something here does not work.
    #[error("{0}")]
    Failed(String),
}

/// An image that is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsedImage {
    /// Which.
    pub image: ImageId,
    /// Snapshots that stand on it.
    pub users: usize,
    /// Who said what to fetch of it before it is read.
    pub profile: Option<ProfileSource>,
    /// Whether what it reads is being recorded.
    pub recording: bool,
}

/// What a look at the daemon shows.
#[derive(Debug)]
pub struct Looked {
    /// The node.
    pub node: NodeStatus,
    /// The images that are in use.
    pub images: Vec<UsedImage>,
    /// Whether layers are what their snapshots are named for.
    pub standings: HashMap<Digest, Standing>,
}

/// Answers what the daemon is asked about itself.
#[derive(Clone)]
pub struct Control {
    snapshots: Arc<Snapshots<Node>>,
    node: Node,
}

impl Control {
    /// Of this node and the snapshots on it.
    pub fn new(snapshots: Arc<Snapshots<Node>>, node: Node) -> Self {
        Self { snapshots, node }
    }

    /// The node.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// What the node holds and does, the images that are in use, and what is
    /// known of their layers.
    pub async fn status(&self) -> Result<Looked, ControlError> {
        let failed = |error: service::Error| ControlError::Failed(error.to_string());
        let used = self.snapshots.images().await.map_err(failed)?;
        let standings = self.snapshots.standings().await.map_err(failed)?;
        let node = self.node.status();
        let images = used.into_iter().map(|(image, users)| {
            let profile = node
                .layers
                .iter()
                .filter(|layer| image.layers.contains(&layer.digest))
                .find_map(|layer| layer.profile);
            let same = |other: &ImageId| other.layers == image.layers;
            UsedImage {
                recording: node.recording.iter().any(same),
                image: ImageId {
                    reference: image.reference,
                    manifest: image.manifest_digest,
                    layers: image.layers,
                },
                users,
                profile,
            }
        });
        Ok(Looked {
            images: images.collect(),
            node,
            standings,
        })
    }

    /// All stored profiles, those least recently used first.
    pub fn profiles(&self) -> Vec<Stored> {
        self.node.profiles().list()
    }

    /// The profile that was last used of those of an image.
    pub fn profile(&self, image: &str) -> Result<(Stored, Arc<Profile>), ControlError> {
        let stored = self.stored(image)?;
        let loaded = self.node.profiles().load(&stored);
        let profile = loaded.map_err(|error| ControlError::Failed(error.to_string()))?;
        Ok((stored, profile))
    }

    /// Replaces the profile of an image.
    pub fn put_profile(
        &self,
        reference: Option<String>,
        manifest: Option<Digest>,
        document: &[u8],
    ) -> Result<(), ControlError> {
        let profile = Profile::parse(document);
        let profile = profile.map_err(|error| ControlError::Invalid(error.to_string()))?;
        let image = ImageId {
            reference,
            manifest,
            layers: profile.layers().to_vec(),
        };
        if manifest.is_none() && image.layers.is_empty() {
            let why = "neither a manifest nor the profile's layers name the image";
            return Err(ControlError::Invalid(why.to_owned()));
        }
        let put = self.node.profiles().put(&image, profile);
        put.map_err(|error| ControlError::Failed(error.to_string()))
    }

    /// Forgets the profile of an image.
    pub fn clear_profile(&self, image: &str) -> Result<(), ControlError> {
        let stored = self.stored(image)?;
        let removed = self.node.profiles().remove(&stored);
        removed.map_err(|error| ControlError::Failed(error.to_string()))
    }

    /// Ends a recording that was asked for by a name.
    pub async fn finish_recording(&self, name: &str) -> Result<Recorded, ControlError> {
        self.node.finish_recording(name).await.ok_or_else(|| {
            ControlError::NotFound(format!(
                "there is no recording '{name}': its snapshot is of no lazily mounted image, or \
                 the daemon was started anew"
            ))
        })
    }

    /// An image is about to be pulled of which nothing is known yet.
    pub fn expect_pull(&self, reference: &Reference) {
        self.node.connect_ahead(reference);
    }

    /// An image is about to be pulled whose manifest has this digest.
    pub fn expect_image(
        &self,
        reference: &Reference,
        digest: Digest,
        manifest: &[u8],
    ) -> Result<(), ControlError> {
        let wrong = |why: String| ControlError::Invalid(format!("manifest {digest}: {why}"));
        if manifest.len() > MAX_MANIFEST {
            return Err(wrong(format!("it has more than {MAX_MANIFEST} bytes")));
        }
        if Digest::of(manifest) != digest {
            return Err(wrong("the bytes have another digest".to_owned()));
        }
        let manifest: Manifest =
            serde_json::from_slice(manifest).map_err(|error| wrong(error.to_string()))?;
        let Some(lowest) = manifest.layers.first() else {
            return Ok(());
        };
        let request = LayerRequest {
            reference: reference.clone(),
            digest: lowest.digest,
            manifest_digest: Some(digest),
            // The node knows the manifest, which tells more.
            annotations: BTreeMap::new(),
            image_layers: manifest
                .layers
                .iter()
                .map(|layer| layer.digest)
                .take(MOST_AHEAD)
                .collect(),
        };
        self.node.know_image(reference, digest, manifest.layers);
        let (node, snapshots) = (self.node.clone(), Arc::clone(&self.snapshots));
        tokio::spawn(async move {
            node.connected(&request.reference).await;
            snapshots.expect(request).await;
        });
        Ok(())
    }

    fn stored(&self, image: &str) -> Result<Stored, ControlError> {
        let named = |stored: &&Stored| {
            let manifest = stored.image.manifest.map(|digest| digest.to_string());
            stored.image.reference.as_deref() == Some(image) || manifest.as_deref() == Some(image)
        };
        let stored = self.profiles();
        stored.iter().rev().find(named).cloned().ok_or_else(|| {
            ControlError::NotFound(format!(
                "there is no profile of '{image}' on this node; 'sluice profile show' lists those \
                 there are"
            ))
        })
    }
}
