//! Which file an offset of `data` belongs to, for messages.

use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::erofs::Image;

/// Searches the layer's tree. Slow, but asked only when something is wrong.
pub(super) fn path_of(meta: &Path, offset: u64) -> Option<PathBuf> {
    let mut found = None;
    let searched = Image::open(meta).ok()?.files(|path, extent| {
        if !(extent.offset..extent.offset + extent.size).contains(&offset) {
            return ControlFlow::Continue(());
        }
        found = Some(Path::new("/").join(OsStr::from_bytes(path)));
        ControlFlow::Break(())
    });
    searched.ok().and(found)
}
