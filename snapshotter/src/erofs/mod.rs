//! `meta.erofs`: a layer's directory tree as an EROFS image without data.
//!
//! [`write_image`] compiles it once from a verified TOC; the kernel mounts it
//! as it is, with the layer's `data` as extra device 1, and [`Image`] reads it
//! in place for the `fuse` mount mode. The bytes depend on nothing but the TOC
//! and the placement. `docs/meta-erofs.md` draws the layout.

mod dirents;
mod error;
mod format;
mod image;
mod plan;
mod write;
mod xattr;

pub use error::Error;
#[cfg(any(test, fuzzing))]
pub(crate) use format::crc32c;
pub use image::{Attributes, Entries, Entry, Extent, FileType, Image, Ino, XattrRef, Xattrs};
pub use write::{Summary, write_image};
pub use xattr::{XattrNamespace, image_xattrs};

#[cfg(test)]
mod tests;
