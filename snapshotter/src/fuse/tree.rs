//! One FUSE mount for the node with one read-only directory a layer: its
//! tree. Overlayfs mounts name these directories where the kernel cannot
//! mount `meta.erofs` itself.
//!
//! Everything in a layer is immutable, so the kernel may keep whatever it
//! learns: names, absent names, attributes, listings, targets and content.
//! It is told never to ask about opening and closing.

use std::ffi::OsStr;
use std::io;
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyXattr, Request,
};
use sluice_layer::Mtime;

use super::Reader;
use super::session::{guarded, negotiate};
use super::trees::{Layer, NID_BITS, Place, ROOT, Refusal, TreeTable};
use crate::erofs::{self, Attributes, FileType, Ino};
use crate::layer_dir::end_for_want_of;

const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// The names of layers come and go, and are looked up only to mount.
const NEVER: Duration = Duration::ZERO;

const BLOCK: u32 = 4096;

/// The file system.
#[derive(Debug, Clone)]
pub struct Trees {
    table: TreeTable,
    reader: Reader,
}

impl Trees {
    /// Shows what `table` holds.
    pub fn new(table: TreeTable, reader: Reader) -> Self {
        Self { table, reader }
    }

    /// Answers now, or when the layer of `inode` is there.
    fn answer(
        &self,
        what: &'static str,
        inode: INodeNo,
        answer: impl FnOnce(&Self) + Send + 'static,
    ) {
        match self.table.awaited(inode.0) {
            None => guarded(what, || answer(self)),
            Some(there) => {
                let me = self.clone();
                self.reader.spawn(async move {
                    there.await;
                    guarded(what, || answer(&me));
                });
            }
        }
    }

    fn in_layer(&self, inode: INodeNo) -> Result<(Layer, Ino), Refusal> {
        match self.table.at(inode.0)? {
            Place::In(layer, ino) => Ok((layer, ino)),
            Place::Root => Err(Refusal::IsADirectory),
        }
    }

    fn lookup_entry(&self, parent: INodeNo, name: &OsStr) -> Result<(Duration, FileAttr), Refusal> {
        match self.table.at(parent.0)? {
            Place::Root => {
                let layer = self.table.by_name(name)?;
                let attributes = file_attr(&layer, layer.root())?;
                Ok((NEVER, attributes))
            }
            Place::In(layer, dir) => {
                let attributes = match layer.lookup(dir, name)? {
                    Some(ino) => file_attr(&layer, ino)?,
                    None => absent(),
                };
                Ok((FOREVER, attributes))
            }
        }
    }

    fn attributes(&self, inode: INodeNo) -> Result<FileAttr, Refusal> {
        match self.table.at(inode.0)? {
            Place::Root => Ok(root_attr()),
            Place::In(layer, ino) => file_attr(&layer, ino),
        }
    }

    /// The layers' directories, for a listing of the root.
    fn list_root(&self, from: u64) -> impl Iterator<Item = (u64, u64, String)> {
        let dots = [".", ".."].map(|dot| (ROOT, dot.to_owned()));
        let layers: Vec<_> = self
            .table
            .numbers()
            .into_iter()
            .filter_map(|number| {
                let layer = self.table.layer(number).ok()?;
                let inode = layer.inode(layer.root()).ok()?;
                Some((inode, number.to_string()))
            })
            .collect();
        (1..)
            .zip(dots.into_iter().chain(layers))
            .skip(usize::try_from(from).unwrap_or(usize::MAX))
            .map(|(next, (inode, name))| (next, inode, name))
    }

    fn list(&self, dir: INodeNo, from: u64, reply: &mut ReplyDirectory) -> Result<(), Refusal> {
        match self.table.at(dir.0)? {
            Place::Root => {
                for (next, inode, name) in self.list_root(from) {
                    if reply.add(INodeNo(inode), next, fuser::FileType::Directory, name) {
                        break;
                    }
                }
                Ok(())
            }
            Place::In(layer, dir) => layer.list(dir, from, |entry| {
                Ok(reply.add(
                    INodeNo(entry.inode),
                    entry.next,
                    file_type(entry.kind),
                    entry.name,
                ))
            }),
        }
    }

    fn list_plus(
        &self,
        dir: INodeNo,
        from: u64,
        reply: &mut ReplyDirectoryPlus,
    ) -> Result<(), Refusal> {
        match self.table.at(dir.0)? {
            Place::Root => {
                for (next, inode, name) in self.list_root(from) {
                    let inode = INodeNo(inode);
                    let Ok(attributes) = self.attributes(inode) else {
                        continue;
                    };
                    if reply.add(inode, next, name, &NEVER, &attributes, Generation(0)) {
                        break;
                    }
                }
                Ok(())
            }
            Place::In(layer, dir) => layer.list(dir, from, |entry| {
                let attributes = file_attr(&layer, entry.ino)?;
                Ok(reply.add(
                    attributes.ino,
                    entry.next,
                    entry.name,
                    &FOREVER,
                    &attributes,
                    Generation(0),
                ))
            }),
        }
    }
}

impl fuser::Filesystem for Trees {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        negotiate(
            config,
            InitFlags::FUSE_ASYNC_DIO
                | InitFlags::FUSE_PARALLEL_DIROPS
                | InitFlags::FUSE_DO_READDIRPLUS
                | InitFlags::FUSE_READDIRPLUS_AUTO
                | InitFlags::FUSE_CACHE_SYMLINKS
                | InitFlags::FUSE_NO_OPEN_SUPPORT
                | InitFlags::FUSE_NO_OPENDIR_SUPPORT
                | InitFlags::FUSE_EXPLICIT_INVAL_DATA
                | InitFlags::FUSE_POSIX_ACL
                | InitFlags::FUSE_HAS_RESEND,
        );
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        self.answer("lookup", parent, move |me| {
            match me.lookup_entry(parent, &name) {
                Ok((ttl, attributes)) => reply.entry(&ttl, &attributes, Generation(0)),
                Err(refusal) => reply.error(errno("lookup", parent, &refusal)),
            }
        });
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer("getattr", inode, move |me| match me.attributes(inode) {
            Ok(attributes) => reply.attr(&FOREVER, &attributes),
            Err(refusal) => reply.error(errno("getattr", inode, &refusal)),
        });
    }

    fn readlink(&self, _: &Request, inode: INodeNo, reply: ReplyData) {
        self.answer("readlink", inode, move |me| {
            let read = me.in_layer(inode);
            match read.as_ref().map(|(layer, ino)| layer.target(*ino)) {
                Ok(Ok(target)) => reply.data(target),
                Ok(Err(refusal)) => reply.error(errno("readlink", inode, &refusal)),
                Err(refusal) => reply.error(errno("readlink", inode, refusal)),
            }
        });
    }

    // The kernel does not ask again after the first ENOSYS, and caches
    // content and listings as if it had been told to keep them.

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.error(Errno::ENOSYS);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
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
        self.answer("read", inode, move |me| {
            let found = me
                .in_layer(inode)
                .and_then(|(layer, ino)| Ok((layer.extent(ino)?, layer)));
            match found {
                Ok((Some(extent), layer)) if offset < extent.size => me.reader.read(
                    layer.content(),
                    extent.offset + offset,
                    size,
                    extent.offset + extent.size,
                    reply,
                ),
                Ok(_) => reply.data(&[]),
                Err(refusal) => reply.error(errno("read", inode, &refusal)),
            }
        });
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.answer("readdir", inode, move |me| {
            match me.list(inode, offset, &mut reply) {
                Ok(()) => reply.ok(),
                Err(refusal) => reply.error(errno("readdir", inode, &refusal)),
            }
        });
    }

    fn readdirplus(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        self.answer("readdirplus", inode, move |me| {
            match me.list_plus(inode, offset, &mut reply) {
                Ok(()) => reply.ok(),
                Err(refusal) => reply.error(errno("readdirplus", inode, &refusal)),
            }
        });
    }

    // Never ENOSYS: that would hold for all layers, also for one mounted
    // later whose directories are opaque.

    fn getxattr(&self, _: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let name = name.to_owned();
        self.answer("getxattr", inode, move |me| {
            let found = me.in_layer(inode);
            match found.as_ref().map(|(layer, ino)| layer.xattr(*ino, &name)) {
                Ok(Ok(value)) => answer_xattr(value, size, reply),
                // The mount's root has none.
                Ok(Err(Refusal::NoAttribute)) | Err(Refusal::IsADirectory) => {
                    reply.error(Errno::ENODATA);
                }
                Ok(Err(refusal)) => reply.error(errno("getxattr", inode, &refusal)),
                Err(refusal) => reply.error(errno("getxattr", inode, refusal)),
            }
        });
    }

    fn listxattr(&self, _: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        self.answer("listxattr", inode, move |me| {
            let names = match me.in_layer(inode) {
                Ok((layer, ino)) => layer.xattr_names(ino),
                Err(Refusal::IsADirectory) => Ok(Vec::new()),
                Err(refusal) => Err(refusal),
            };
            match names {
                Ok(names) => answer_xattr(&names, size, reply),
                Err(refusal) => reply.error(errno("listxattr", inode, &refusal)),
            }
        });
    }
}

/// `size` 0 asks how much there is.
fn answer_xattr(bytes: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(bytes.len()) {
        Ok(len) if size == 0 => reply.size(len),
        Ok(len) if len <= size => reply.data(bytes),
        _ => reply.error(Errno::ERANGE),
    }
}

/// What the process sees. A damaged image is also logged.
fn errno(what: &str, inode: INodeNo, refusal: &Refusal) -> Errno {
    match refusal {
        Refusal::NotFound => Errno::ENOENT,
        Refusal::Stale => Errno::ESTALE,
        Refusal::NotADirectory => Errno::ENOTDIR,
        Refusal::IsADirectory => Errno::EISDIR,
        Refusal::NotALink => Errno::EINVAL,
        Refusal::NoAttribute => Errno::ENODATA,
        Refusal::Image(erofs::Error::CutShort) => {
            let whose = match (inode.0 >> NID_BITS).checked_sub(1) {
                Some(number) => format!("meta.erofs of the layer at t/{number}"),
                None => "a layer's meta.erofs".to_owned(),
            };
            end_for_want_of(&whose)
        }
        Refusal::Image(error) => {
            tracing::error!("{what} of inode {:#x}: {error}", inode.0);
            Errno::EIO
        }
    }
}

fn file_attr(layer: &Layer, ino: Ino) -> Result<FileAttr, Refusal> {
    let attributes = layer.attributes(ino)?;
    Ok(to_fuse(layer.inode(ino)?, &attributes))
}

/// An absent name that the kernel may remember: inode 0.
fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        ..root_attr()
    }
}

fn root_attr() -> FileAttr {
    to_fuse(
        ROOT,
        &Attributes {
            kind: FileType::Directory,
            mode: 0o755,
            links: 2,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Mtime::default(),
            device: (0, 0),
        },
    )
}

fn to_fuse(inode: u64, attributes: &Attributes) -> FileAttr {
    let time = system_time(attributes.mtime);
    let (major, minor) = attributes.device;
    FileAttr {
        ino: INodeNo(inode),
        size: attributes.size,
        blocks: attributes.size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attributes.kind),
        perm: attributes.mode,
        nlink: attributes.links,
        uid: attributes.uid,
        gid: attributes.gid,
        // The kernel's encoding: 12 bits of major among 20 of minor.
        rdev: (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
        blksize: BLOCK,
        flags: 0,
    }
}

fn system_time(time: Mtime) -> SystemTime {
    let whole = Duration::from_secs(time.secs.unsigned_abs());
    let base = if time.secs < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(whole)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(whole)
    };
    base.and_then(|base| base.checked_add(Duration::from_nanos(time.nanos.into())))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

fn file_type(kind: FileType) -> fuser::FileType {
    match kind {
        FileType::Regular => fuser::FileType::RegularFile,
        FileType::Directory => fuser::FileType::Directory,
        FileType::CharDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
        FileType::Fifo => fuser::FileType::NamedPipe,
        FileType::Symlink => fuser::FileType::Symlink,
    }
}

#[cfg(test)]
mod tests;
