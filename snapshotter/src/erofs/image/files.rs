//! All regular files of an image.

use std::ops::ControlFlow;

use super::{Extent, FileType, Image, Ino};
use crate::erofs::Error;

/// Directories deeper than this are not searched.
const DEPTH: usize = 256;

impl<B: AsRef<[u8]>> Image<B> {
    /// Calls `visit` with each name of each regular file that has content: its
    /// path from the root, without a leading slash, and where it lies. Ends
    /// when `visit` breaks.
    pub fn files(
        &self,
        mut visit: impl FnMut(&[u8], Extent) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let mut open: Vec<(Ino, Vec<u8>, usize)> = vec![(self.root(), Vec::new(), 0)];
        while let Some((directory, path, depth)) = open.pop() {
            for entry in self.entries(directory, 0)? {
                let entry = entry?;
                if matches!(entry.name, b"." | b"..") {
                    continue;
                }
                let below = match path.is_empty() {
                    true => entry.name.to_vec(),
                    false => [&path[..], b"/", entry.name].concat(),
                };
                match entry.kind {
                    FileType::Directory if depth < DEPTH => {
                        open.push((entry.ino, below, depth + 1));
                    }
                    FileType::Regular => {
                        if let Some(extent) = self.data_extent(entry.ino)?
                            && visit(&below, extent).is_break()
                        {
                            return Ok(());
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Where the content of the regular file at `path` lies, if there is such
    /// a file and it has any. Nothing is followed: neither links nor `..`.
    pub fn extent_of(&self, path: &[u8]) -> Result<Option<Extent>, Error> {
        use std::os::unix::ffi::OsStrExt as _;
        let mut at = self.root();
        for name in path.split(|byte| *byte == b'/') {
            if self.attributes(at)?.kind != FileType::Directory {
                return Ok(None);
            }
            match self.lookup(at, std::ffi::OsStr::from_bytes(name))? {
                Some(next) => at = next,
                None => return Ok(None),
            }
        }
        match self.attributes(at)?.kind {
            FileType::Regular => self.data_extent(at),
            _ => Ok(None),
        }
    }
}
