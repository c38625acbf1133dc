//! Directory blocks, and going over them.

use std::fmt;

use memmap2::Mmap;

use super::{
    BLOCK, DIRENT_SIZE, Error, FileType, Image, Ino, Inode, NAME_MAX, corrupt, le16, le64,
};

/// One name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The name; `.` and `..` are among them.
    pub name: &'a [u8],
    /// What it names.
    pub ino: Ino,
    /// What that is.
    pub kind: FileType,
    /// Where the listing goes on after this entry.
    pub next: u64,
}

/// A directory block.
#[derive(Clone, Copy)]
pub(super) struct DirBlock<'a> {
    dir: Ino,
    bytes: &'a [u8],
    pub(super) count: usize,
}

impl<'a> DirBlock<'a> {
    /// The offset of the first name tells how many entries there are.
    pub(super) fn new(dir: Ino, bytes: &'a [u8]) -> Result<Self, Error> {
        let first = bytes
            .get(8..10)
            .map(|offset| usize::from(le16(offset)))
            .filter(|first| {
                *first >= DIRENT_SIZE && first % DIRENT_SIZE == 0 && *first <= bytes.len()
            })
            .ok_or(corrupt(dir, "a malformed directory block"))?;
        Ok(Self {
            dir,
            bytes,
            count: first / DIRENT_SIZE,
        })
    }

    /// Of an index below the count, whose entries are within the bytes.
    fn dirent(&self, index: usize) -> &'a [u8] {
        &self.bytes[index * DIRENT_SIZE..][..DIRENT_SIZE]
    }

    pub(super) fn ino(&self, index: usize) -> Ino {
        Ino(le64(self.dirent(index)))
    }

    pub(super) fn name(&self, index: usize) -> Result<&'a [u8], Error> {
        let start = usize::from(le16(&self.dirent(index)[8..]));
        let end = if index + 1 < self.count {
            usize::from(le16(&self.dirent(index + 1)[8..]))
        } else {
            self.bytes.len()
        };
        let mut name = self
            .bytes
            .get(start..end)
            .ok_or(corrupt(self.dir, "a malformed directory block"))?;
        if index + 1 == self.count {
            // The last name ends where the padding begins.
            let longest = &name[..name.len().min(NAME_MAX + 1)];
            let end = longest.iter().position(|byte| *byte == 0);
            name = &name[..end.unwrap_or(longest.len())];
        }
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(corrupt(self.dir, "a name of impossible length"));
        }
        Ok(name)
    }

    fn kind(&self, index: usize) -> Result<FileType, Error> {
        Ok(match self.dirent(index)[10] {
            1 => FileType::Regular,
            2 => FileType::Directory,
            3 => FileType::CharDevice,
            4 => FileType::BlockDevice,
            5 => FileType::Fifo,
            7 => FileType::Symlink,
            _ => return Err(corrupt(self.dir, "an unknown file type in a directory")),
        })
    }
}

/// Iterator over a directory's [`Entry`]s. Ends after an error.
pub struct Entries<'a, B = Mmap> {
    image: &'a Image<B>,
    dir: Ino,
    inode: Inode,
    /// Block << 12 | index within the block.
    position: u64,
    failed: bool,
}

impl<B> fmt::Debug for Entries<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entries")
            .field("dir", &self.dir)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

impl<'a, B: AsRef<[u8]>> Entries<'a, B> {
    pub(super) fn new(image: &'a Image<B>, dir: Ino, inode: Inode, position: u64) -> Self {
        Self {
            image,
            dir,
            inode,
            position,
            failed: false,
        }
    }

    fn entry(&mut self) -> Result<Option<Entry<'a>>, Error> {
        let block_bits = BLOCK.ilog2();
        loop {
            let number = self.position >> block_bits;
            if number >= self.inode.blocks() {
                return Ok(None);
            }
            let index = (self.position & (BLOCK - 1)) as usize;
            let block = self.image.dir_block(self.dir, &self.inode, number)?;
            if index >= block.count {
                self.position = (number + 1) << block_bits;
                continue;
            }
            self.position += 1;
            return Ok(Some(Entry {
                name: block.name(index)?,
                ino: block.ino(index),
                kind: block.kind(index)?,
                next: self.position,
            }));
        }
    }
}

impl<'a, B: AsRef<[u8]>> Iterator for Entries<'a, B> {
    type Item = Result<Entry<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let entry = self.entry().transpose();
        self.failed = matches!(entry, Some(Err(_)));
        entry
    }
}
