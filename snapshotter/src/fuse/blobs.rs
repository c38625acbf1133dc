//! One FUSE mount for the node with one read-only file a layer: its `data`.
//! EROFS mounts name these files as their devices.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyXattr, Request,
};
use parking_lot::RwLock;

use super::session::{guarded, negotiate};
use super::{Content, Reader};

/// Attributes never change.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// Names come and go with their layers, and are looked up only to mount.
const NEVER: Duration = Duration::ZERO;

const BLOCK: u32 = 4096;

/// The layers whose content the mount shows. Clones share them.
#[derive(Clone, Default)]
pub struct BlobTable(Arc<RwLock<HashMap<u64, Arc<dyn Content>>>>);

impl BlobTable {
    /// A mount that shows nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Shows a layer's content under its number, until it is removed.
    pub fn insert(&self, number: u64, content: Arc<dyn Content>) {
        self.0.write().insert(number, content);
    }

    /// Hides it. Whoever has the file open gets an error from the next read.
    pub fn remove(&self, number: u64) {
        self.0.write().remove(&number);
    }

    /// The file's name in the mount.
    pub fn file_name(number: u64) -> PathBuf {
        PathBuf::from(number.to_string())
    }

    fn get(&self, inode: INodeNo) -> Option<Arc<dyn Content>> {
        let number = inode.0.checked_sub(FIRST_INODE)?;
        self.0.read().get(&number).cloned()
    }
}

impl std::fmt::Debug for BlobTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.read().keys()).finish()
    }
}

/// Inode of layer 0. A layer's inode is its number and this, also in the next
/// process.
const FIRST_INODE: u64 = 2;

/// The file system.
#[derive(Debug)]
pub struct Blobs {
    table: BlobTable,
    reader: Reader,
}

impl Blobs {
    /// Shows what `table` holds.
    pub fn new(table: BlobTable, reader: Reader) -> Self {
        Self { table, reader }
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size) = if inode == INodeNo::ROOT {
            (FileType::Directory, 0o500, 0)
        } else {
            (FileType::RegularFile, 0o400, self.table.get(inode)?.size())
        };
        let epoch = SystemTime::UNIX_EPOCH;
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            crtime: epoch,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        })
    }
}

impl fuser::Filesystem for Blobs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Reads arrive as direct I/O; without FUSE_ASYNC_DIO each would hold
        // its reader in an uninterruptible wait.
        negotiate(
            config,
            InitFlags::FUSE_ASYNC_DIO
                | InitFlags::FUSE_PARALLEL_DIROPS
                | InitFlags::FUSE_HAS_RESEND,
        );
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded("lookup", || {
            let number = name
                .to_str()
                .filter(|text| !text.starts_with(['+', '0']) || *text == "0")
                .and_then(|text| text.parse::<u64>().ok());
            let found = number
                .filter(|_| parent == INodeNo::ROOT)
                .and_then(|number| number.checked_add(FIRST_INODE))
                .and_then(|inode| self.attributes(INodeNo(inode)));
            match found {
                Some(attributes) => reply.entry(&NEVER, &attributes, Generation(0)),
                None => reply.error(Errno::ENOENT),
            }
        });
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        guarded("getattr", || match self.attributes(inode) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ESTALE),
        });
    }

    fn open(&self, _: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        guarded("open", || {
            if flags.acc_mode() != OpenAccMode::O_RDONLY {
                return reply.error(Errno::EROFS);
            }
            match self.table.get(inode) {
                Some(_) => reply.opened(
                    FileHandle(0),
                    FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH,
                ),
                None => reply.error(Errno::ESTALE),
            }
        });
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guarded("read", || match self.table.get(inode) {
            Some(content) => self.reader.read(content, offset, size, u64::MAX, reply),
            None => reply.error(Errno::ESTALE),
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // The kernel does not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        guarded("readdir", || {
            if inode != INodeNo::ROOT {
                return reply.error(Errno::ENOTDIR);
            }
            let mut numbers: Vec<u64> = self.table.0.read().keys().copied().collect();
            numbers.sort_unstable();
            let dots = [".", ".."].map(|dot| (INodeNo::ROOT, FileType::Directory, dot.to_owned()));
            let files = numbers.iter().map(|number| {
                let inode = INodeNo(number + FIRST_INODE);
                (inode, FileType::RegularFile, number.to_string())
            });
            let entries = (1..).zip(dots.into_iter().chain(files));
            for (next, (inode, kind, name)) in entries.skip(offset as usize) {
                if reply.add(inode, next, kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }
}
