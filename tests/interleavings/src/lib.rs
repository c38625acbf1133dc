//! The fetch engine with shuttle's locks, channels and tasks in the place of
//! parking_lot's and tokio's: one thread runs at a time, and shuttle decides at
//! every step which. What is tried are the snapshotter's own sources, file for
//! file; `Cargo.toml` alone gives the two names another meaning.
//!
//! Each function is one run of a situation, to be repeated under many
//! schedules. It panics when something is wrong, and shuttle does when nobody
//! can go on.

// The tests within the engine's sources are for tokio.
#![cfg(not(test))]
// What is private to the engine is tried beside it.
#![allow(clippy::duplicate_mod)]

/// Nothing dies here.
macro_rules! crash_point {
    ($name:literal) => {};
}

pub mod budget;
pub mod claims;
#[path = "../../../snapshotter/src/fetch/mod.rs"]
pub mod fetch;
pub mod layers;
#[path = "../../../snapshotter/src/sample/mod.rs"]
#[allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    reason = "not everything of it is wanted here"
)]
mod sample;

// What the engine uses of the rest of the crate is the real thing.
use sluice_snapshotter::{fuse, layer_dir};
