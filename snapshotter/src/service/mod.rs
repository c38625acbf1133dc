//! containerd's snapshots service: what a snapshot is, which mounts show it,
//! and the state that survives a restart.

mod lazy_layers;

pub use lazy_layers::{LayerRequest, LazyLayers, MountError, NotLazy, Usage};
