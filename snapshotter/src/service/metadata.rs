//! What containerd has on record beside snapshots.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use rustix::process::Pid;
use sluice_oci::Digest;

use super::error::Error;
use super::lazy_layers::{LazyLayers, Program};
use super::logic::{Snapshots, lazy};
use super::snapshot::{Key, Kind};

/// What an image means by chain IDs, on every platform of it that is here.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct NamedLayers {
    /// Chain ID of each layer, and the digest of its blob. That is none when it
    /// is no SHA-256, which those of lazily mounted layers are.
    pub layers: Vec<(Digest, Option<Digest>)>,
    /// Whether there is more than can be read.
    pub cut: bool,
}

/// An image that containerd has.
#[derive(Debug, Clone)]
pub struct NamedImage {
    /// Its name in containerd.
    pub name: String,
    /// What it says of its layers.
    pub named: Arc<NamedLayers>,
}

/// All images of a namespace; none when there is nobody to ask, of which the
/// operator was told. Or why they cannot be had, and what to do.
pub type ImagesAnswer = Result<Option<Vec<NamedImage>>, Box<dyn StdError + Send + Sync>>;

/// containerd's images and containers. `caller` is the process of the containerd
/// that calls, if that is known.
pub trait Metadata: fmt::Debug + Send + Sync + 'static {
    /// The images of a namespace.
    fn images<'a>(&'a self, caller: Option<Pid>, namespace: &'a str)
    -> BoxFuture<'a, ImagesAnswer>;

    /// What a container runs; none if there is no such container, or nobody who
    /// says it.
    fn program<'a>(
        &'a self,
        caller: Option<Pid>,
        namespace: &'a str,
        container: &'a str,
    ) -> BoxFuture<'a, Option<Program>>;
}

impl<L: LazyLayers> Snapshots<L> {
    /// Asks `metadata` what images mean by snapshots and what containers run.
    pub fn with_metadata(mut self, metadata: Arc<dyn Metadata>) -> Self {
        self.metadata = Some(metadata);
        self
    }

    /// Tells the data plane what runs in the snapshot, if it is a container's:
    /// those have its name. To be called when `caller` asks for its mounts: the
    /// container is there then, and about to be started.
    pub async fn tell_program(&self, caller: Option<Pid>, key: &Key) -> Result<(), Error> {
        let (Some(namespace), name) = key.in_containerd() else {
            return Ok(());
        };
        let Some(metadata) = &self.metadata else {
            return Ok(());
        };
        let chain = self.store().chain(key.clone()).await?;
        let layers = lazy(&chain.parents);
        if chain.kind == Kind::Active && !layers.is_empty() {
            let program = metadata.program(caller, namespace, name);
            self.layers().runs(layers, program).await;
        }
        Ok(())
    }
}
