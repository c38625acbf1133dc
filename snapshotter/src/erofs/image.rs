//! Reading a `meta.erofs` in place.

mod files;
mod listing;
mod xattrs;

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::path::Path;

use memmap2::Mmap;
use sluice_layer::Mtime;

use super::Error;
pub use listing::{Entries, Entry};
pub use xattrs::{XattrRef, Xattrs};

use super::format::{
    BLOCK, CHUNK_BITS_MASK, CHUNK_INDEX_SIZE, CHUNK_INDEXES, COMPACT_SIZE, DATA_BLOCKS_MAX,
    DATA_DEVICE, DEVICE_BLOCKS, DEVICE_SLOT_OFFSET, DEVICE_SLOT_SIZE, DIRENT_SIZE, EXTENDED_SIZE,
    FORMAT_EXTENDED, INCOMPAT_CHUNKED_FILE, INCOMPAT_DEVICE_TABLE, LAYOUT_CHUNKS, LAYOUT_INLINE,
    LAYOUT_PLAIN, MAGIC, NAME_MAX, NID_UNIT, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT,
    S_IFREG, SUPER_OFFSET, SUPER_SIZE, VOLUME_NAME, XATTR_ENTRY_SIZE, XATTR_HEADER_SIZE, crc32c,
    decode_device, sb,
};
use super::xattr::PREFIXES;
use crate::layer_dir::LastByte;
use listing::DirBlock;

/// Number of an inode within one image, stable for the life of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ino(pub u64);

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum FileType {
    Regular,
    Directory,
    CharDevice,
    BlockDevice,
    Fifo,
    Symlink,
}

/// What `stat` tells of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of stat")]
pub struct Attributes {
    pub kind: FileType,
    /// Permission, set-user-ID, set-group-ID and sticky bits.
    pub mode: u16,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes: of content, of a symlink's target, of a directory's entries.
    pub size: u64,
    pub mtime: Mtime,
    /// (major, minor); (0, 0) for anything but a device, and for a whiteout.
    pub device: (u32, u32),
}

/// Where a regular file's content lies in `data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset of its first byte, a multiple of the block size.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
}

/// A `meta.erofs` in memory. Nothing in it is believed: whatever the bytes
/// are, every call returns, and reads only within them.
pub struct Image<B = Mmap> {
    bytes: B,
    last: LastByte,
    root: Ino,
    inodes: u64,
    epoch: Mtime,
    xattr_start: u64,
    data_size: u64,
}

impl<B> fmt::Debug for Image<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("inodes", &self.inodes)
            .field("data_size", &self.data_size)
            .finish_non_exhaustive()
    }
}

impl Image<Mmap> {
    /// Maps the image at `path`, which nobody may change or cut afterwards.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let at = |source| Error::Open {
            path: path.display().to_string(),
            source,
        };
        let file = File::open(path).map_err(at)?;
        // SAFETY: layer directories belong to this program alone, which
        // renames a complete image into place and never writes to it again.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(at)?;
        Self::new(map)
    }
}

impl<B: AsRef<[u8]>> Image<B> {
    /// Reads the superblock and checks its checksum.
    pub fn new(bytes: B) -> Result<Self, Error> {
        let corrupt = |what| Error::Corrupt { what, nid: 0 };
        let all = bytes.as_ref();
        let block = all
            .get(..BLOCK as usize)
            .ok_or(corrupt("shorter than a block"))?;
        let field = |at: usize| &block[SUPER_OFFSET + at..];
        if le32(field(sb::MAGIC)) != MAGIC {
            return Err(corrupt("no superblock"));
        }
        let mut summed = block[SUPER_OFFSET..].to_vec();
        summed[sb::CHECKSUM..][..4].fill(0);
        if crc32c(&summed) != le32(field(sb::CHECKSUM)) {
            return Err(corrupt("wrong superblock checksum"));
        }
        if field(sb::VOLUME_NAME)[..16] != VOLUME_NAME {
            return Err(corrupt("written by another version"));
        }
        if u64::from(field(sb::BLOCK_BITS)[0]) != u64::from(BLOCK.ilog2())
            || le32(field(sb::INCOMPAT)) != INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE
            || le16(field(sb::EXTRA_DEVICES)) != 1
            || usize::from(le16(field(sb::DEVICE_SLOT))) * DEVICE_SLOT_SIZE
                != SUPER_OFFSET + SUPER_SIZE
            || le32(field(sb::META_BLOCK)) != 0
        {
            return Err(corrupt("unknown features"));
        }
        if u64::from(le32(field(sb::BLOCKS))) * BLOCK > all.len() as u64 {
            return Err(corrupt("truncated"));
        }
        let data_blocks = le32(&block[DEVICE_SLOT_OFFSET + DEVICE_BLOCKS..]);
        let image = Self {
            root: Ino(le16(field(sb::ROOT_NID)).into()),
            inodes: le64(field(sb::INODES)),
            epoch: Mtime {
                secs: le64(field(sb::EPOCH)).cast_signed(),
                nanos: le32(field(sb::EPOCH_NANOS)),
            },
            xattr_start: u64::from(le32(field(sb::XATTR_BLOCK))) * BLOCK,
            data_size: u64::from(data_blocks) * BLOCK,
            last: LastByte::of(all),
            bytes,
        };
        if image.attributes(image.root)?.kind != FileType::Directory {
            return Err(corrupt("the root is no directory"));
        }
        Ok(image)
    }

    /// The root directory.
    pub fn root(&self) -> Ino {
        self.root
    }

    /// How many inodes there are.
    pub fn inodes(&self) -> u64 {
        self.inodes
    }

    /// Size that `data` needs to have. Bytes.
    pub fn data_size(&self) -> u64 {
        self.data_size
    }

    /// What `stat` tells of `ino`.
    pub fn attributes(&self, ino: Ino) -> Result<Attributes, Error> {
        Ok(self.inode(ino)?.attributes)
    }

    /// The inode that `name` names in the directory `dir`, if any.
    pub fn lookup(&self, dir: Ino, name: &OsStr) -> Result<Option<Ino>, Error> {
        use std::os::unix::ffi::OsStrExt as _;
        let name = name.as_bytes();
        let inode = self.directory(dir)?;
        // The block whose first name is the last one not above `name`.
        let (mut low, mut high) = (0, inode.blocks());
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.dir_block(dir, &inode, middle)?;
            if block.name(0)? <= name {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some(block) = low.checked_sub(1) else {
            return Ok(None);
        };
        let block = self.dir_block(dir, &inode, block)?;
        let (mut low, mut high) = (0, block.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match block.name(middle)?.cmp(name) {
                std::cmp::Ordering::Equal => return Ok(Some(block.ino(middle))),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The entries of directory `dir` in order, from the beginning (`from`
    /// 0) or from where an [`Entry::next`] said.
    pub fn entries(&self, dir: Ino, from: u64) -> Result<Entries<'_, B>, Error> {
        Ok(Entries::new(self, dir, self.directory(dir)?, from))
    }

    /// The target of the symbolic link `ino`.
    pub fn symlink_target(&self, ino: Ino) -> Result<&[u8], Error> {
        let inode = self.inode(ino)?;
        if inode.attributes.kind != FileType::Symlink {
            return Err(corrupt(ino, "not a symbolic link"));
        }
        if inode.attributes.size > BLOCK {
            return Err(corrupt(ino, "a symbolic link longer than a block"));
        }
        self.content_block(ino, &inode, 0)
    }

    /// Where the content of the regular file `ino` lies; `None` when it is
    /// empty.
    pub fn data_extent(&self, ino: Ino) -> Result<Option<Extent>, Error> {
        let inode = self.inode(ino)?;
        if inode.attributes.kind != FileType::Regular {
            return Err(corrupt(ino, "not a regular file"));
        }
        let size = inode.attributes.size;
        if size == 0 {
            return Ok(None);
        }
        let format = inode.union as u16;
        if inode.layout != LAYOUT_CHUNKS
            || format & !CHUNK_BITS_MASK != CHUNK_INDEXES
            || BLOCK << (format & CHUNK_BITS_MASK) < size
        {
            return Err(corrupt(ino, "a file that is not one extent"));
        }
        let index = self.slice(
            ino,
            inode.body.next_multiple_of(CHUNK_INDEX_SIZE),
            CHUNK_INDEX_SIZE,
        )?;
        if le16(index) != 0 || le16(&index[2..]) != DATA_DEVICE {
            return Err(corrupt(ino, "a file elsewhere than in the data"));
        }
        let offset = u64::from(le32(&index[4..])) * BLOCK;
        if offset + size > self.data_size {
            return Err(corrupt(ino, "a file beyond the data"));
        }
        Ok(Some(Extent { offset, size }))
    }

    /// The extended attributes of `ino`.
    pub fn xattrs(&self, ino: Ino) -> Result<Xattrs<'_, B>, Error> {
        let inode = self.inode(ino)?;
        if inode.xattr_size == 0 {
            return Ok(Xattrs::new(self, ino, &[], 0..0));
        }
        let start = inode.body - inode.xattr_size;
        let header = self.slice(ino, start, XATTR_HEADER_SIZE)?;
        let ids = u64::from(header[4]) * XATTR_ENTRY_SIZE;
        if XATTR_HEADER_SIZE + ids > inode.xattr_size {
            return Err(corrupt(ino, "too many shared attributes"));
        }
        let start = start + XATTR_HEADER_SIZE;
        let shared = self.slice(ino, start, ids)?;
        Ok(Xattrs::new(self, ino, shared, start + ids..inode.body))
    }

    /// The value of the extended attribute `name` of `ino`, if it has one.
    pub fn xattr(&self, ino: Ino, name: &OsStr) -> Result<Option<&[u8]>, Error> {
        use std::os::unix::ffi::OsStrExt as _;
        for xattr in self.xattrs(ino)? {
            let xattr = xattr?;
            if name.as_bytes().strip_prefix(xattr.prefix) == Some(xattr.suffix) {
                return Ok(Some(xattr.value));
            }
        }
        Ok(None)
    }

    fn directory(&self, dir: Ino) -> Result<Inode, Error> {
        let inode = self.inode(dir)?;
        if inode.attributes.kind != FileType::Directory {
            return Err(corrupt(dir, "not a directory"));
        }
        Ok(inode)
    }

    fn inode(&self, ino: Ino) -> Result<Inode, Error> {
        if !self.last.is_in(self.bytes.as_ref()) {
            return Err(Error::CutShort);
        }
        let start = ino
            .0
            .checked_mul(NID_UNIT)
            .ok_or(corrupt(ino, "a number out of range"))?;
        let head = self.slice(ino, start, COMPACT_SIZE)?;
        let format = le16(head);
        let layout = (format >> 1) & 0x7;
        if format >> 4 != 0 || ![LAYOUT_PLAIN, LAYOUT_INLINE, LAYOUT_CHUNKS].contains(&layout) {
            return Err(corrupt(ino, "an unknown inode format"));
        }
        let mode = le16(&head[4..]);
        let kind = match mode & S_IFMT {
            S_IFREG => FileType::Regular,
            S_IFDIR => FileType::Directory,
            S_IFCHR => FileType::CharDevice,
            S_IFBLK => FileType::BlockDevice,
            S_IFIFO => FileType::Fifo,
            S_IFLNK => FileType::Symlink,
            _ => return Err(corrupt(ino, "an unknown file type")),
        };
        let union;
        let inode_size;
        let mut attributes = Attributes {
            kind,
            mode: mode & 0o7777,
            links: 0,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: self.epoch,
            device: (0, 0),
        };
        if format & FORMAT_EXTENDED == 0 {
            inode_size = COMPACT_SIZE;
            attributes.links = le16(&head[6..]).into();
            attributes.size = le32(&head[8..]).into();
            union = le32(&head[16..]);
            attributes.uid = le16(&head[24..]).into();
            attributes.gid = le16(&head[26..]).into();
        } else {
            inode_size = EXTENDED_SIZE;
            let head = self.slice(ino, start, EXTENDED_SIZE)?;
            attributes.size = le64(&head[8..]);
            union = le32(&head[16..]);
            attributes.uid = le32(&head[24..]);
            attributes.gid = le32(&head[28..]);
            attributes.mtime = Mtime {
                secs: le64(&head[32..]).cast_signed(),
                nanos: le32(&head[40..]),
            };
            attributes.links = le32(&head[44..]);
        }
        // Keeps all arithmetic on offsets far from overflow.
        if attributes.size > u64::from(DATA_BLOCKS_MAX) * BLOCK {
            return Err(corrupt(ino, "an impossible size"));
        }
        if matches!(kind, FileType::CharDevice | FileType::BlockDevice) {
            attributes.device = decode_device(union);
        }
        let xattr_size = match le16(&head[2..]) {
            0 => 0,
            count => XATTR_HEADER_SIZE + (u64::from(count) - 1) * XATTR_ENTRY_SIZE,
        };
        Ok(Inode {
            attributes,
            layout,
            union,
            xattr_size,
            body: start + inode_size + xattr_size,
        })
    }

    /// One block's worth of the content that the image itself holds.
    fn content_block(&self, ino: Ino, inode: &Inode, block: u64) -> Result<&[u8], Error> {
        let size = inode.attributes.size;
        let start = block * BLOCK;
        let length = size.saturating_sub(start).min(BLOCK);
        let at = if inode.layout == LAYOUT_INLINE && block + 1 == inode.blocks() {
            inode.body
        } else {
            u64::from(inode.union) * BLOCK + start
        };
        self.slice(ino, at, length)
    }

    fn dir_block(&self, dir: Ino, inode: &Inode, block: u64) -> Result<DirBlock<'_>, Error> {
        let bytes = self.content_block(dir, inode, block)?;
        DirBlock::new(dir, bytes)
    }

    fn slice(&self, ino: Ino, start: u64, length: u64) -> Result<&[u8], Error> {
        start
            .checked_add(length)
            .and_then(|end| {
                let range = usize::try_from(start).ok()?..usize::try_from(end).ok()?;
                self.bytes.as_ref().get(range)
            })
            .ok_or(corrupt(ino, "an offset beyond the image"))
    }
}

/// An inode's fields.
#[derive(Clone, Copy)]
struct Inode {
    attributes: Attributes,
    layout: u16,
    union: u32,
    xattr_size: u64,
    /// What follows the inode and its attributes.
    body: u64,
}

impl Inode {
    fn blocks(&self) -> u64 {
        self.attributes.size.div_ceil(BLOCK)
    }
}

fn corrupt(ino: Ino, what: &'static str) -> Error {
    Error::Corrupt { what, nid: ino.0 }
}

// Of slices whose length was checked.

fn le16(bytes: &[u8]) -> u16 {
    u16::from_le_bytes([bytes[0], bytes[1]])
}

fn le32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn le64(bytes: &[u8]) -> u64 {
    u64::from(le32(bytes)) | (u64::from(le32(&bytes[4..])) << 32)
}
