//! What the node holds and does, for whoever looks.

use sluice_oci::Digest;

use super::{Mode, Node, ProfileSource};
use crate::fetch::{Activity, LinkFigures, Request};
use crate::profiles::{ImageId, Profiles};

/// An open layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStatus {
    /// Its digest.
    pub digest: Digest,
    /// The image through which it was first asked for.
    pub image: String,
    /// Whether it is mounted.
    pub mounted: bool,
    /// Compressed bytes of its blob.
    pub blob_size: u64,
    /// How many chunks it has.
    pub chunks: u32,
    /// How many of them are on this node.
    pub present: u32,
    /// What happened to it since it was opened.
    pub activity: Activity,
    /// Who said what to fetch before it is read, if anybody did.
    pub profile: Option<ProfileSource>,
}

/// The node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeStatus {
    /// How layers are mounted.
    pub mode: Mode,
    /// The open layers.
    pub layers: Vec<LayerStatus>,
    /// Requests that are under way, the oldest first.
    pub requests: Vec<Request>,
    /// Readers that wait now.
    pub waiting: u64,
    /// Bytes in flight, and how many there may be.
    pub memory: (u64, u64),
    /// Requests under way, and how many there may be.
    pub connections: (u64, u64),
    /// What is known of the links, by host.
    pub links: Vec<(String, LinkFigures)>,
    /// Images whose start is being recorded.
    pub recording: Vec<ImageId>,
}

impl Node {
    /// What it holds and does now.
    pub fn status(&self) -> NodeStatus {
        let engine = &self.0.engine;
        let (memory, connections) = engine.admission().in_use();
        NodeStatus {
            mode: self.0.mode,
            layers: self.layer_statuses(),
            requests: engine.requests(),
            waiting: engine.waiting(),
            memory: (memory, engine.config().memory),
            connections: (connections, engine.config().connections),
            links: engine.links(),
            recording: self.recorded_images(),
        }
    }

    /// The profiles of former starts.
    pub fn profiles(&self) -> &Profiles {
        &self.0.profiles
    }
}
