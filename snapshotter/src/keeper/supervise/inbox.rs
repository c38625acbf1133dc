//! The socket that the daemon writes to, and the descriptors that it left.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::Permissions;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, UCred, sockopt,
};
use rustix::process::Pid;
use tempfile::TempDir;

use super::super::fdstore::{FIRST_FD, MOST_FDS, is_name};
use super::Error;

/// Longer messages are not of this protocol.
const MOST_BYTES: usize = 4096;
const DIRECTORIES: [&str; 2] = ["/run", "/tmp"];

/// The notify socket.
#[derive(Debug)]
pub(super) struct Inbox {
    socket: UnixDatagram,
    path: PathBuf,
    /// Nobody else gets into it; removed at the end.
    _directory: TempDir,
}

/// What the daemon says.
#[derive(Debug)]
pub(super) enum Told {
    Ready,
    Store(String, Vec<OwnedFd>),
    Forget(String),
}

impl Inbox {
    pub(super) fn open() -> Result<Self, Error> {
        let mut failed = None;
        for parent in DIRECTORIES {
            match Self::open_in(Path::new(parent)) {
                Ok(inbox) => return Ok(inbox),
                Err(error) => {
                    failed.get_or_insert(Error::system(
                        format!("making a socket under {parent}"),
                        error,
                    ));
                }
            }
        }
        Err(failed.unwrap_or_else(|| {
            Error::system(
                "making a socket",
                std::io::Error::from_raw_os_error(libc::ENOENT),
            )
        }))
    }

    fn open_in(parent: &Path) -> std::io::Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("sluice-supervise.")
            .permissions(Permissions::from_mode(0o700))
            .tempdir_in(parent)?;
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_nonblocking(true)?;
        sockopt::set_socket_passcred(&socket, true)?;
        Ok(Self {
            socket,
            path,
            _directory: directory,
        })
    }

    pub(super) fn address(&self) -> &OsStr {
        self.path.as_os_str()
    }

    /// What process `from` has said so far. Anybody else is not listened to.
    pub(super) fn drain(&self, from: Pid) -> Vec<Told> {
        let mut told = Vec::new();
        loop {
            match self.receive(from) {
                Ok(Some(messages)) => told.extend(messages),
                Ok(None) => {}
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return told,
                Err(error) => {
                    tracing::error!("reading {}: {error}", self.path.display());
                    return told;
                }
            }
        }
    }

    fn receive(&self, from: Pid) -> rustix::io::Result<Option<Vec<Told>>> {
        let mut bytes = [0; MOST_BYTES];
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS), ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )?;
        let mut fds = Vec::new();
        let mut sender: Option<UCred> = None;
        for message in control.drain() {
            match message {
                RecvAncillaryMessage::ScmRights(rights) => fds.extend(rights),
                RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials),
                _ => {}
            }
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            tracing::warn!(
                "a message of more than {MOST_BYTES} bytes or {MOST_FDS} descriptors is ignored"
            );
            return Ok(None);
        }
        if sender.map(|sender| sender.pid) != Some(from) {
            tracing::warn!("a message of a process that is not the daemon's is ignored");
            return Ok(None);
        }
        Ok(Some(parse(&bytes[..received.bytes], fds)))
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Descriptors that the message does not name are closed, which is what
/// `BARRIER=1` waits for.
fn parse(message: &[u8], fds: Vec<OwnedFd>) -> Vec<Told> {
    let message = String::from_utf8_lossy(message);
    let mut name = "stored";
    let (mut ready, mut store, mut forget) = (false, false, false);
    for line in message.lines() {
        match line.split_once('=') {
            Some(("READY", "1")) => ready = true,
            Some(("FDSTORE", "1")) => store = true,
            Some(("FDSTOREREMOVE", "1")) => forget = true,
            Some(("FDNAME", value)) => name = value,
            Some(("STATUS", text)) => tracing::debug!("status: {text}"),
            _ => {}
        }
    }
    let mut told = Vec::new();
    if (store || forget) && !is_name(name.as_bytes()) {
        tracing::warn!("{name:?} is no name for a descriptor");
        return told;
    }
    if forget {
        told.push(Told::Forget(name.to_owned()));
    } else if store && !fds.is_empty() {
        told.push(Told::Store(name.to_owned(), fds));
    }
    if ready {
        told.push(Told::Ready);
    }
    told
}

/// The names that a message wants to be forgotten.
#[cfg(any(test, fuzzing))]
pub(crate) fn forgotten(message: &[u8]) -> Vec<String> {
    let told = parse(message, Vec::new()).into_iter();
    told.filter_map(|told| match told {
        Told::Forget(name) => Some(name),
        Told::Ready | Told::Store(..) => None,
    })
    .collect()
}

/// Descriptors by name, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Kept(VecDeque<(String, OwnedFd)>);

impl Kept {
    pub(super) fn add(&mut self, name: &str, fds: Vec<OwnedFd>) {
        for fd in fds {
            if self.0.len() == MOST_FDS {
                tracing::error!("{MOST_FDS} descriptors are kept; one more for {name} is not");
                return;
            }
            // Out of the way of the numbers at which a child gets them.
            match rustix::io::fcntl_dupfd_cloexec(fd, FIRST_FD + MOST_FDS as i32) {
                Ok(fd) => self.0.push_back((name.to_owned(), fd)),
                Err(error) => tracing::error!("a descriptor for {name} is not kept: {error}"),
            }
        }
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.0.retain(|(kept, _)| kept != name);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|(_, fd)| fd.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::super::fdstore::{Manager, Name};
    use super::*;

    fn pair() -> (Inbox, Manager) {
        let inbox = Inbox::open().unwrap();
        let manager = Manager::connect(inbox.address()).unwrap();
        (inbox, manager)
    }

    fn me() -> Pid {
        rustix::process::getpid()
    }

    #[test]
    fn a_descriptor_arrives_under_its_name_and_is_the_same_file() {
        let (inbox, manager) = pair();
        let (read, write) = rustix::pipe::pipe().unwrap();
        manager.store(Name::new("trees"), read.as_fd()).unwrap();
        drop(read);
        let mut told = inbox.drain(me());
        assert_eq!(told.len(), 1);
        let Told::Store(name, mut fds) = told.remove(0) else {
            panic!("{told:?}")
        };
        assert_eq!(name, "trees");
        std::fs::File::from(write).write_all(b"through").unwrap();
        let mut text = String::new();
        std::fs::File::from(fds.remove(0))
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn what_is_kept_is_closed_on_exec_and_out_of_the_childs_way() {
        let (inbox, manager) = pair();
        manager
            .store(Name::new("a"), std::io::stdin().as_fd())
            .unwrap();
        let mut kept = Kept::default();
        for told in inbox.drain(me()) {
            let Told::Store(name, fds) = told else {
                panic!("{told:?}")
            };
            kept.add(&name, fds);
        }
        use std::os::fd::AsRawFd;
        for fd in kept.fds() {
            assert!(fd.as_raw_fd() >= FIRST_FD + MOST_FDS as i32);
            let flags = rustix::io::fcntl_getfd(fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        }
        assert_eq!(kept.names().collect::<Vec<_>>(), ["a"]);
        kept.remove("b");
        assert_eq!(kept.len(), 1);
        kept.remove("a");
        assert_eq!(kept.len(), 0);
    }

    #[test]
    fn no_more_descriptors_are_kept_than_a_child_can_be_given() {
        let mut kept = Kept::default();
        for _ in 0..MOST_FDS + 5 {
            kept.add("x", vec![rustix::io::dup(std::io::stdin()).unwrap()]);
        }
        assert_eq!(kept.len(), MOST_FDS);
    }

    #[test]
    fn messages_come_in_order() {
        let (inbox, manager) = pair();
        manager.forget(Name::new("old")).unwrap();
        manager.status("one\nline").unwrap();
        manager.ready().unwrap();
        manager.stopping().unwrap();
        let told = inbox.drain(me());
        assert!(
            matches!(&told[..], [Told::Forget(name), Told::Ready] if name == "old"),
            "{told:?}"
        );
    }

    #[test]
    fn a_process_that_is_not_the_daemons_is_not_listened_to() {
        let (inbox, manager) = pair();
        manager.ready().unwrap();
        assert!(inbox.drain(Pid::INIT).is_empty());
        // And its message is gone.
        assert!(inbox.drain(me()).is_empty());
    }

    #[test]
    fn the_barrier_returns_when_all_before_it_is_handled() {
        let (inbox, manager) = pair();
        let handled = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                manager.ready().unwrap();
                manager.barrier()
            });
            let mut told = Vec::new();
            while !waiting.is_finished() {
                told.extend(inbox.drain(me()));
                std::thread::yield_now();
            }
            waiting.join().unwrap().unwrap();
            told
        });
        assert!(matches!(handled[..], [Told::Ready]), "{handled:?}");
    }

    #[test]
    fn names_and_messages_outside_of_the_protocol_are_ignored() {
        for message in [
            &b"FDSTORE=1\nFDNAME=a:b"[..],
            b"FDSTORE=1\nFDNAME=",
            b"FDSTOREREMOVE=1\nFDNAME=\xff",
            b"FDSTORE=1\nFDNAME=no-descriptor",
            b"READY=2",
            b"",
            b"=\n=\n",
        ] {
            assert!(parse(message, Vec::new()).is_empty());
        }
    }

    #[test]
    fn only_root_gets_to_the_socket() {
        let inbox = Inbox::open().unwrap();
        let directory = inbox.path.parent().unwrap();
        let mode = directory.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
