//! End-to-end and conformance tests with one shared harness.
//!
//! The harness runs the real parts, each under its own directory and on its
//! own address: containerd, a registry, the snapshotter, runc, the link
//! between them. Only faults are faked, by a proxy in front of the registry.
//! Everything belongs to a [`Scratch`], which takes it all down again, also
//! when a test panics or the process is interrupted.

pub mod agreement;
pub mod command;
pub mod containerd;
pub mod content;
pub mod cri;
pub mod daemon;
pub mod disk;
pub mod faulty;
pub mod figures;
pub mod image;
pub mod kernel;
pub mod killer;
pub mod link;
pub mod node;
pub mod programs;
pub mod proxy;
pub mod registry;
pub mod relay;
pub mod runc;
pub mod scratch;
pub mod snapshots;
pub mod soak;
pub mod systemd;
pub mod tls;
pub mod tools;
pub mod tree;

pub use containerd::Containerd;
pub use daemon::Daemon;
pub use link::Link;
pub use node::Node;
pub use registry::Registry;
pub use runc::Runc;
pub use scratch::{Process, Scratch};
pub use snapshots::Snapshots;
