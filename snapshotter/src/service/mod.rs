//! containerd's snapshots service: what a snapshot is, which mounts show it,
//! and the state that survives a restart.

mod claims;
mod directories;
mod disputes;
mod error;
mod expected;
mod filter;
mod grpc;
mod labels;
mod lazy_layers;
mod locks;
mod logic;
mod metadata;
mod mounts;
mod pins;
mod snapshot;
mod store;
#[cfg(test)]
mod tests;

pub use claims::{Contradiction, Standing};
pub use disputes::Dispute;
pub use error::{Error, ErrorKind};
pub use filter::{Filter, FilterError};
pub use grpc::{Adapter, server};
#[cfg(any(test, fuzzing))]
pub(crate) use labels::{layer_request, target};
pub use lazy_layers::{
    ImageUse, InUse, LayerRequest, LazyLayers, MountError, NotLazy, Owner, Program, Proof, Usage,
};
pub use logic::Snapshots;
pub use metadata::{ImagesAnswer, Metadata, NamedImage, NamedLayers};
pub use mounts::{Mount, OverlayOptions};
pub use snapshot::{Chain, Content, EmptyKey, Info, Key, Kind, Labels, SnapshotId};
pub use store::{ROOT_VERSION, Store, StoreError};
