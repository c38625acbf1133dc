//! The vocabulary of OCI images that every other crate speaks: digests,
//! descriptors, manifests, indexes, platforms and references. No I/O.
//!
//! Documents keep the fields that Sluice does not know, so that an image can
//! be rewritten without losing what another tool put there.

mod digest;
mod document;
pub mod media_type;
mod platform;
mod reference;

pub use digest::{Digest, DigestError, Hasher};
pub use document::{Descriptor, Index, Manifest};
pub use platform::{Platform, PlatformError};
pub use reference::{Reference, ReferenceError};
