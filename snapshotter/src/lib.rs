//! The node's daemon as a library: lazily mounted layers, and containerd's
//! snapshots service in front of them.

#[macro_use]
pub mod crash_points;

pub mod chunk_index;
pub mod cleanup;
pub mod config;
pub mod containerd;
pub mod control;
pub mod daemon;
pub mod dependencies;
pub mod descriptors;
pub mod erofs;
pub mod fetch;
pub mod fuse;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod keeper;
pub mod layer_dir;
pub mod mount;
pub mod node;
pub mod profiles;
pub mod remote;
#[cfg(test)]
mod sample;
pub mod scrub;
pub mod service;
pub mod socket;
pub mod standalone;
#[cfg(test)]
mod testing;
