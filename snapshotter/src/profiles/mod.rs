//! Profiles on the node: between what a layer's chunks are and what a profile
//! says of files, and kept on disk. `docs/profiles.md` tells the whole.

mod resolve;
mod store;

pub use resolve::{chunks, exact_chunks, reads};
pub use store::{ImageId, ProfileError, Profiles, Stored};
