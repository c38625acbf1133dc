//! Which file an offset of `data` belongs to, for messages.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::erofs::{FileType, Image, Ino};

/// Directories deeper than this are not searched.
const DEPTH: usize = 256;

/// Searches the layer's tree. Slow, but asked only when something is wrong.
pub(super) fn path_of(meta: &Path, offset: u64) -> Option<PathBuf> {
    let image = Image::open(meta).ok()?;
    let mut open: Vec<(Ino, PathBuf, usize)> = vec![(image.root(), PathBuf::from("/"), 0)];
    while let Some((directory, path, depth)) = open.pop() {
        for entry in image.entries(directory, 0).ok()? {
            let entry = entry.ok()?;
            if matches!(entry.name, b"." | b"..") {
                continue;
            }
            match entry.kind {
                FileType::Directory if depth < DEPTH => {
                    open.push((
                        entry.ino,
                        path.join(OsStr::from_bytes(entry.name)),
                        depth + 1,
                    ));
                }
                FileType::Regular => {
                    let extent = image.data_extent(entry.ino).ok().flatten();
                    if extent.is_some_and(|e| (e.offset..e.offset + e.size).contains(&offset)) {
                        return Some(path.join(OsStr::from_bytes(entry.name)));
                    }
                }
                _ => {}
            }
        }
    }
    None
}
