//! A directory's entries as EROFS wants them: `.` and `..` sorted among the
//! names, packed into blocks that can each be searched on their own.

use sluice_layer::{Directory, NodeId};

use super::format::{BLOCK, DIRENT_SIZE};

/// The entries of one directory in the order of their names.
pub(super) struct Dirents<'t> {
    directory: &'t Directory,
    own: NodeId,
    dot: usize,
    dot_dot: usize,
}

impl<'t> Dirents<'t> {
    pub(super) fn new(own: NodeId, directory: &'t Directory) -> Self {
        let before = |name: &[u8]| directory.children.partition_point(|c| *c.name < *name);
        Self {
            directory,
            own,
            dot: before(b"."),
            dot_dot: before(b"..") + 1,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.directory.children.len() + 2
    }

    pub(super) fn get(&self, index: usize) -> (&'t [u8], NodeId) {
        if index == self.dot {
            return (b".", self.own);
        }
        if index == self.dot_dot {
            return (b"..", self.directory.parent);
        }
        let skipped = usize::from(index > self.dot) + usize::from(index > self.dot_dot);
        let child = &self.directory.children[index - skipped];
        (&child.name, child.node)
    }

    /// How many entries from `start` on share one block, and the bytes that
    /// they take in it.
    pub(super) fn block(&self, start: usize) -> (usize, u64) {
        let mut used = 0;
        let mut end = start;
        while end < self.len() {
            let more = (DIRENT_SIZE + self.get(end).0.len()) as u64;
            if used + more > BLOCK {
                break;
            }
            used += more;
            end += 1;
        }
        (end - start, used)
    }

    /// Full blocks, and the bytes in the last one, which is never empty.
    pub(super) fn size(&self) -> (u64, u64) {
        let mut blocks = 0;
        let mut start = 0;
        loop {
            let (count, used) = self.block(start);
            start += count;
            if start >= self.len() {
                return (blocks, used);
            }
            blocks += 1;
        }
    }
}
