//! A disk that fails on command, and whose power can be cut: a FUSE file
//! system in memory that knows what was synced. Everything that was not is
//! lost in a power cut; so a program that forgets an fsync is found out.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use fuser::{
    Errno, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, LockOwner, OpenAccMode,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, SessionACL, TimeOrNow, WriteFlags,
};
use rustix::mount::{MountFlags, UnmountFlags};

const TTL: Duration = Duration::ZERO;

/// What the disk does wrong, until it is told otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Reads of files of the name `data` fail with EIO.
    pub reads: bool,
    /// Writes fail with ENOSPC.
    pub full: bool,
    /// Every change fails with EROFS, of files that are open for writing, too.
    pub read_only: bool,
    /// The next fsync fails with EIO, and what it should have written is lost
    /// without another word, as Linux does it.
    pub sync_once: bool,
    /// Each write takes so long.
    pub slow: Option<Duration>,
}

/// A mounted disk. Unmounted when it is dropped.
pub struct Disk {
    path: PathBuf,
    state: Arc<Mutex<State>>,
    session: Option<fuser::BackgroundSession>,
}

#[derive(Clone)]
enum Node {
    Dir(BTreeMap<OsString, u64>),
    File(Vec<u8>),
}

struct State {
    nodes: HashMap<u64, Node>,
    /// What each would be after a power cut now.
    durable: HashMap<u64, Node>,
    times: HashMap<u64, SystemTime>,
    /// Files whose unsynced bytes the disk has lost already.
    lost: HashMap<u64, Vec<u8>>,
    next: u64,
    faults: Faults,
    /// What there was before each change and each sync, if that is recorded.
    history: Option<Vec<Moment>>,
}

/// What is on the disk at one moment.
#[derive(Clone)]
struct Moment {
    written: HashMap<u64, Node>,
    durable: HashMap<u64, Node>,
}

/// What a power cut does to what was written and not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// All of it is lost.
    AllLost,
    /// All of it had got to the disk.
    NoneLost,
    /// It is lost of files of the name `data` alone: writes are not kept in
    /// order.
    DataLost,
}

impl Cut {
    /// Each.
    pub const ALL: [Self; 3] = [Self::AllLost, Self::NoneLost, Self::DataLost];
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk {
    /// Mounts an empty disk at `path`, a directory.
    pub fn mount(path: &Path) -> Result<Self> {
        let root = Node::Dir(BTreeMap::new());
        let state = Arc::new(Mutex::new(State {
            nodes: HashMap::from([(1, root.clone())]),
            durable: HashMap::from([(1, root)]),
            times: HashMap::new(),
            lost: HashMap::new(),
            next: 2,
            faults: Faults::default(),
            history: None,
        }));
        let device = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open("/dev/fuse")
            .context("cannot open /dev/fuse")?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
            device.as_raw_fd()
        );
        let options = CString::new(options)?;
        let flags = MountFlags::NOATIME;
        rustix::mount::mount("disk", path, "fuse.disk", flags, options.as_c_str())
            .with_context(|| format!("cannot mount at {}", path.display()))?;
        let served = FileSystem(Arc::clone(&state));
        let config = fuser::Config::default();
        let session = fuser::Session::from_fd(served, device.into(), SessionACL::All, config)?;
        Ok(Self {
            path: path.to_owned(),
            state,
            session: Some(session.spawn()?),
        })
    }

    /// Sets what goes wrong from now on.
    pub fn fail(&self, faults: Faults) {
        lock(&self.state).faults = faults;
    }

    /// Remembers from now on what there is at every moment.
    pub fn record(&self) {
        lock(&self.state).history = Some(Vec::new());
    }

    /// How many moments there were at which the power could have been cut.
    pub fn moments(&self) -> usize {
        lock(&self.state).history.as_ref().map_or(0, Vec::len)
    }

    /// Writes what is left of a recorded moment, or of this one, into the
    /// directory `to`.
    pub fn after_power_cut(&self, moment: Option<usize>, cut: Cut, to: &Path) -> Result<()> {
        let state = lock(&self.state);
        let recorded = moment.and_then(|at| state.history.as_ref()?.get(at));
        let now = state.now();
        let moment = recorded.unwrap_or(&now);
        let mut queue = vec![(1, to.to_owned())];
        while let Some((ino, path)) = queue.pop() {
            let lost = match cut {
                Cut::AllLost => true,
                Cut::NoneLost => false,
                Cut::DataLost => path.ends_with("data"),
            };
            let nodes = if lost {
                &moment.durable
            } else {
                &moment.written
            };
            match nodes.get(&ino) {
                Some(Node::Dir(entries)) => {
                    fs::create_dir_all(&path)?;
                    queue.extend(entries.iter().map(|(name, ino)| (*ino, path.join(name))));
                }
                Some(Node::File(bytes)) => fs::write(&path, bytes)?,
                // A name that was synced before what it names.
                None => fs::write(&path, "")?,
            }
        }
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, UnmountFlags::DETACH);
        drop(self.session.take());
    }
}

impl State {
    fn now(&self) -> Moment {
        Moment {
            written: self.nodes.clone(),
            durable: self.durable.clone(),
        }
    }

    /// Before every change and sync.
    fn step(&mut self) {
        if self.history.is_some() {
            let now = self.now();
            self.history.get_or_insert_default().push(now);
        }
    }

    fn dir(&mut self, ino: u64) -> Result<&mut BTreeMap<OsString, u64>, Errno> {
        match self.nodes.get_mut(&ino) {
            Some(Node::Dir(entries)) => Ok(entries),
            Some(Node::File(_)) => Err(Errno::ENOTDIR),
            None => Err(Errno::ENOENT),
        }
    }

    fn file(&mut self, ino: u64) -> Result<&mut Vec<u8>, Errno> {
        match self.nodes.get_mut(&ino) {
            Some(Node::File(bytes)) => Ok(bytes),
            Some(Node::Dir(_)) => Err(Errno::EISDIR),
            None => Err(Errno::ENOENT),
        }
    }

    fn find(&mut self, parent: u64, name: &OsStr) -> Result<u64, Errno> {
        self.dir(parent)?.get(name).copied().ok_or(Errno::ENOENT)
    }

    fn is_content(&self, ino: u64) -> bool {
        let named = |node: &Node| match node {
            Node::Dir(entries) => entries.get(OsStr::new("data")) == Some(&ino),
            Node::File(_) => false,
        };
        self.nodes.values().any(named)
    }

    /// Whether anything may be changed.
    fn writable(&self) -> Result<(), Errno> {
        match self.faults.read_only {
            true => Err(Errno::EROFS),
            false => Ok(()),
        }
    }

    fn make(&mut self, parent: u64, name: &OsStr, node: Node) -> Result<FileAttr, Errno> {
        self.writable()?;
        if self.faults.full {
            return Err(Errno::ENOSPC);
        }
        let ino = self.next;
        self.next += 1;
        self.step();
        self.dir(parent)?.insert(name.to_owned(), ino);
        self.nodes.insert(ino, node);
        self.attr(ino)
    }

    fn remove(&mut self, parent: u64, name: &OsStr) -> Result<(), Errno> {
        self.writable()?;
        self.step();
        self.dir(parent)?.remove(name).ok_or(Errno::ENOENT)?;
        Ok(())
    }

    fn sync(&mut self, ino: u64) -> Result<(), Errno> {
        self.writable()?;
        self.step();
        let node = self.nodes.get(&ino).ok_or(Errno::ENOENT)?.clone();
        if std::mem::take(&mut self.faults.sync_once) {
            // The cache keeps the bytes; the disk never gets them.
            if let Some(Node::File(old)) = self.durable.get(&ino) {
                self.lost.insert(ino, old.clone());
            }
            return Err(Errno::EIO);
        }
        let durable = match (&node, self.lost.get(&ino)) {
            (Node::File(_), Some(old)) => Node::File(old.clone()),
            _ => node,
        };
        self.durable.insert(ino, durable);
        Ok(())
    }

    fn attr(&self, ino: u64) -> Result<FileAttr, Errno> {
        let (kind, size) = match self.nodes.get(&ino).ok_or(Errno::ENOENT)? {
            Node::Dir(_) => (FileType::Directory, 0),
            Node::File(bytes) => (FileType::RegularFile, bytes.len() as u64),
        };
        let time = self.times.get(&ino).copied();
        let time = time.unwrap_or(SystemTime::UNIX_EPOCH);
        Ok(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

struct FileSystem(Arc<Mutex<State>>);

fn entry(made: Result<FileAttr, Errno>, reply: ReplyEntry) {
    match made {
        Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
        Err(error) => reply.error(error),
    }
}

fn done(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl fuser::Filesystem for FileSystem {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = lock(&self.0);
        let found = state.find(parent.0, name).and_then(|ino| state.attr(ino));
        entry(found, reply);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match lock(&self.0).attr(ino.0) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = lock(&self.0);
        if let Err(error) = state.writable() {
            return reply.error(error);
        }
        if let Some(size) = size {
            state.step();
            if let Ok(bytes) = state.file(ino.0) {
                bytes.resize(size as usize, 0);
            }
        }
        match mtime {
            Some(TimeOrNow::SpecificTime(time)) => {
                state.times.insert(ino.0, time);
            }
            Some(TimeOrNow::Now) => {
                state.times.insert(ino.0, SystemTime::now());
            }
            None => {}
        }
        match state.attr(ino.0) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        let made = lock(&self.0).make(parent.0, name, Node::Dir(BTreeMap::new()));
        entry(made, reply);
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let made = lock(&self.0).make(parent.0, name, Node::File(Vec::new()));
        match made {
            Ok(attr) => reply.created(
                &TTL,
                &attr,
                Generation(0),
                FileHandle(0),
                FopenFlags::empty(),
            ),
            Err(error) => reply.error(error),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(lock(&self.0).remove(parent.0, name), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(lock(&self.0).remove(parent.0, name), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut state = lock(&self.0);
        let found = state.writable().and_then(|()| state.find(parent.0, name));
        state.step();
        let moved = found.and_then(|ino| {
            state.dir(parent.0)?.remove(name);
            state.dir(new_parent.0)?.insert(new_name.to_owned(), ino);
            Ok(())
        });
        done(moved, reply);
    }

    fn open(&self, _: &Request, ino: INodeNo, how: OpenFlags, reply: ReplyOpen) {
        let state = lock(&self.0);
        if let (true, Err(error)) = (how.acc_mode() != OpenAccMode::O_RDONLY, state.writable()) {
            return reply.error(error);
        }
        // What is mapped needs the cache; of content every read is to be seen.
        let flags = match state.is_content(ino.0) {
            true => FopenFlags::FOPEN_DIRECT_IO,
            false => FopenFlags::empty(),
        };
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = lock(&self.0);
        if state.faults.reads && state.is_content(ino.0) {
            return reply.error(Errno::EIO);
        }
        match state.file(ino.0) {
            Ok(bytes) => {
                let start = (offset as usize).min(bytes.len());
                let end = (start + size as usize).min(bytes.len());
                reply.data(&bytes[start..end]);
            }
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let slow = lock(&self.0).faults.slow;
        if let Some(slow) = slow {
            std::thread::sleep(slow);
        }
        let mut state = lock(&self.0);
        if let Err(error) = state.writable() {
            return reply.error(error);
        }
        if state.faults.full {
            return reply.error(Errno::ENOSPC);
        }
        state.lost.remove(&ino.0);
        state.step();
        let written = state.file(ino.0).map(|bytes| {
            let end = offset as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[offset as usize..end].copy_from_slice(data);
        });
        match written {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(error),
        }
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(lock(&self.0).sync(ino.0), reply);
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        done(lock(&self.0).sync(ino.0), reply);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let mut state = lock(&self.0);
        let entries: Vec<(OsString, u64)> = match state.dir(ino.0) {
            Ok(entries) => entries.iter().map(|(n, i)| (n.clone(), *i)).collect(),
            Err(error) => return reply.error(error),
        };
        for (next, (name, ino)) in (1..).zip(entries).skip(offset as usize) {
            let kind = match state.nodes.get(&ino) {
                Some(Node::Dir(_)) => FileType::Directory,
                _ => FileType::RegularFile,
            };
            if reply.add(INodeNo(ino), next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let free = if lock(&self.0).faults.full {
            0
        } else {
            1 << 20
        };
        reply.statfs(1 << 20, free, free, 1 << 20, 1 << 20, 4096, 255, 4096);
    }
}
