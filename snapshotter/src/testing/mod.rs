//! Trees for tests: described once, turned into a TOC and its `data`, and
//! compared with what a mount or an image shows. And file systems that can be
//! full, or share extents.

mod model;
mod odd;
mod seen;
mod tmpfs;
mod xfs;

pub(crate) use model::{Inode, Kind, Tree};
pub(crate) use odd::CAPABILITY;
pub(crate) use seen::{assert_same, of_directory, of_image};
pub(crate) use tmpfs::Tmpfs;
pub(crate) use xfs::{Xfs, shared_extents};
