//! A process that calls, and the sockets at which it listens.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::{ffi::OsStr, str};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::process::Pid;
use tokio::net::UnixStream;

/// Bytes of the table of sockets: some 500,000 of them.
const LONGEST_TABLE: u64 = 64 << 20;
/// Files that a process has open.
const MOST_FILES: usize = 1 << 18;
/// Sockets at which a process listens. containerd has four at most.
const MOST_SOCKETS: usize = 64;

/// In the flags of a socket that listens, as in the kernel's `__SO_ACCEPTCON`.
const LISTENS: u32 = 1 << 16;
/// The type of a stream socket.
const STREAM: u32 = 1;

/// A process, which no later one of the same number is mistaken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Process {
    pid: Pid,
    /// When it started, in the kernel's ticks since the machine did.
    started: u64,
}

impl Process {
    /// The one that has this number now.
    pub(super) fn of(pid: Pid) -> io::Result<Self> {
        let mut stat = Vec::new();
        let file = File::open(format!("/proc/{}/stat", pid.as_raw_pid()))?;
        file.take(4096).read_to_end(&mut stat)?;
        let started = started(&stat).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { pid, started })
    }

    /// Its number.
    pub(super) fn pid(self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// Fails when it has ended.
    fn check(self) -> io::Result<()> {
        match Self::of(self.pid)? == self {
            true => Ok(()),
            false => Err(io::Error::new(io::ErrorKind::NotFound, "it has ended")),
        }
    }

    fn dir(self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.pid()))
    }

    /// Where it listens for streams, in paths as it sees them itself. Others
    /// may have smuggled some in: [`Self::connect`] tells. Waits for `/proc`
    /// alone. Fails with [`io::ErrorKind::FileTooLarge`] when there is more than
    /// can be read.
    pub(super) fn listens_at(self) -> io::Result<BTreeSet<PathBuf>> {
        let sockets = self.sockets()?;
        let table = File::open(self.dir().join("net/unix"))?;
        let mut table = BufReader::new(table.take(LONGEST_TABLE));
        let mut paths = BTreeSet::new();
        let mut line = Vec::new();
        while table.read_until(b'\n', &mut line)? > 0 {
            if let Some((socket, path)) = listener(&line)
                && sockets.contains(&socket)
            {
                paths.insert(path);
            }
            line.clear();
        }
        if table.get_ref().limit() == 0 || paths.len() > MOST_SOCKETS {
            return Err(too_many());
        }
        self.check()?;
        Ok(paths)
    }

    /// The inodes of the sockets that it has open.
    fn sockets(self) -> io::Result<HashSet<u64>> {
        let mut sockets = HashSet::new();
        for (count, file) in fs::read_dir(self.dir().join("fd"))?.enumerate() {
            if count == MOST_FILES {
                return Err(too_many());
            }
            // One that was closed meanwhile is none.
            if let Ok(link) = fs::read_link(file?.path())
                && let Some(socket) = socket(link.as_os_str().as_bytes())
            {
                sockets.insert(socket);
            }
        }
        Ok(sockets)
    }

    /// The socket's file at `path`, as the process sees it. Whatever comes to
    /// lie there later, this is the same one.
    pub(super) fn open(self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = openat(CWD, self.dir().join("root"), flags, Mode::empty())?;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(root, path, flags, Mode::empty(), resolve)?)
    }

    /// Connects to a socket that was opened, and fails when another process
    /// listens there.
    pub(super) async fn connect(self, socket: &OwnedFd) -> io::Result<UnixStream> {
        let connection = UnixStream::connect(reached_by(socket)).await?;
        let listener = connection.peer_cred()?.pid();
        if listener != Some(self.pid()) {
            let other = io::Error::other("another process listens there");
            return Err(other);
        }
        self.check()?;
        Ok(connection)
    }
}

fn too_many() -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, "there are too many")
}

/// The path by which this process connects to an opened socket.
pub(super) fn reached_by(socket: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", socket.as_raw_fd()))
}

/// When the process started of which this is the `stat`.
fn started(stat: &[u8]) -> Option<u64> {
    // A program's name may have spaces and parentheses.
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    let fields = str::from_utf8(&stat[end_of_name + 1..]).ok()?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The inode in the link of a descriptor, if it is of a socket.
fn socket(link: &[u8]) -> Option<u64> {
    let number = link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    str::from_utf8(number).ok()?.parse().ok()
}

/// The inode and path in a line of `/proc/PID/net/unix`, if it tells of a
/// stream socket that listens at an absolute path.
fn listener(line: &[u8]) -> Option<(u64, PathBuf)> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut rest = line;
    let mut field = || {
        let start = rest.trim_ascii_start();
        let end = start.iter().position(|byte| *byte == b' ')?;
        let (field, after) = start.split_at(end);
        rest = after;
        str::from_utf8(field).ok()
    };
    let [_, _, _] = [field()?, field()?, field()?];
    let flags = u32::from_str_radix(field()?, 16).ok()?;
    let kind = u32::from_str_radix(field()?, 16).ok()?;
    let _state = field()?;
    let inode = field()?.parse().ok()?;
    // The path may have spaces, and begin with one.
    let path = Path::new(OsStr::from_bytes(rest.strip_prefix(b" ")?));
    let listens = flags & LISTENS != 0 && kind == STREAM && path.is_absolute();
    listens.then(|| (inode, path.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn own() -> Process {
        Process::of(rustix::process::getpid()).unwrap()
    }

    #[test]
    fn a_process_is_told_from_a_later_one_of_its_number() {
        let stat = b"7 (a) R 1 (b)) S 1 7 7 0 -1 4194560 5 6 0 0 7 8 9 10 20 0 5 0 4711 1 2\n";
        assert_eq!(started(stat), Some(4711));
        for cut in ["", "7 (a", "7 (a)", "7 (a) S 1 7", "7 (a) \u{e9} \u{0}"] {
            assert_eq!(started(cut.as_bytes()), None);
        }
        assert_eq!(own(), own());
        let init = Process::of(Pid::INIT).unwrap();
        assert!(init.started <= own().started);
        let former = Process {
            started: own().started - 1,
            ..own()
        };
        let error = former.listens_at().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(own().pid(), std::process::id().cast_signed());
    }

    #[test]
    fn the_kernels_table_is_read() {
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01   123 /run/a b.sock\n";
        let found = listener(line.as_bytes());
        assert_eq!(found, Some((123, "/run/a b.sock".into())));
        for (from, to) in [
            ("00010000", "00000000"), // does not listen
            ("0001 01", "0005 01"),   // for packets
            ("/run", "@run"),         // has no file
            ("/run", "run"),          // of an unknown directory
            (" /run", "  /run"),
            (" /run/a b.sock", ""),
            ("123", "x"),
            ("123", "123456789012345678901"),
            ("00010000 ", ""),
        ] {
            assert!(line.contains(from));
            let other = line.replace(from, to);
            assert_eq!(listener(other.as_bytes()), None, "{other}");
        }
        let header = b"Num       RefCount Protocol Flags    Type St Inode Path\n";
        assert_eq!(listener(header), None);
        assert_eq!(socket(b"socket:[12]"), Some(12));
        for other in ["pipe:[12]", "socket:[]", "socket:[1", "/socket:[1]"] {
            assert_eq!(socket(other.as_bytes()), None);
        }
    }

    #[tokio::test]
    async fn where_a_process_listens_is_found_and_who_does_is_checked() {
        let directory = tempfile::tempdir().unwrap();
        // Longer than the path of a socket may be, once it is below `/proc`.
        let place = directory.path().join("d".repeat(60));
        fs::create_dir(&place).unwrap();
        let path = |name: &str| place.join(name);
        let listener = UnixListener::bind(path("a socket")).unwrap();
        let _datagrams = UnixDatagram::bind(path("datagrams")).unwrap();
        drop(UnixListener::bind(path("closed")).unwrap());
        let _accepted = UnixStream::connect(path("a socket")).unwrap();
        let found = own().listens_at().unwrap();
        let mine = found.iter().filter(|found| found.starts_with(&place));
        assert_eq!(mine.collect::<Vec<_>>(), [&path("a socket")]);

        // Also when the way there leads through absolute links.
        std::os::unix::fs::symlink(&place, directory.path().join("link")).unwrap();
        let socket = own().open(&directory.path().join("link/a socket")).unwrap();
        own().connect(&socket).await.unwrap();
        let init = Process::of(Pid::INIT).unwrap();
        let error = init.connect(&socket).await.unwrap_err().to_string();
        assert!(error.contains("another process"), "{error}");
        let former = Process {
            started: own().started - 1,
            ..own()
        };
        let error = former.connect(&socket).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);

        // Who takes the name is not taken for the one who had it.
        fs::remove_file(path("a socket")).unwrap();
        let _successor = UnixListener::bind(path("a socket")).unwrap();
        own().connect(&socket).await.unwrap();
        drop(listener);
        let error = own().connect(&socket).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(own().open(&path("closed/x")).is_err());
    }
}
