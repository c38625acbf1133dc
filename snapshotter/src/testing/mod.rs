//! Trees for tests: described once, turned into a TOC and its `data`, and
//! compared with what a mount or an image shows. And a file system that can be
//! full.

mod model;
mod odd;
mod seen;
mod tmpfs;

pub(crate) use model::{Inode, Kind, Tree};
pub(crate) use odd::CAPABILITY;
pub(crate) use seen::{assert_same, of_directory, of_image};
pub(crate) use tmpfs::Tmpfs;
