//! The daemon's side of the service manager's protocol: notifications, the
//! descriptor store, and the descriptors that a process is started with.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::FdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::pipe::PipeFlags;

/// Names the socket of the service manager.
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";
/// Number of descriptors, from [`FIRST_FD`] on.
pub const LISTEN_FDS: &str = "LISTEN_FDS";
/// The process that they are for.
pub const LISTEN_PID: &str = "LISTEN_PID";
/// Their names, with colons between.
pub const LISTEN_FDNAMES: &str = "LISTEN_FDNAMES";
/// How many descriptors the manager keeps at most: systemd 254 and later says
/// so, and the shipped unit for those before.
pub const FDSTORE: &str = "FDSTORE";
/// The first descriptor that a process is started with beyond the usual three.
pub const FIRST_FD: RawFd = 3;
/// More descriptors than any manager is asked to keep.
pub const MOST_FDS: usize = 64;

/// How long the manager may take to have handled what it was sent.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why the service manager was not told, or did not hand over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No socket at the address.
    #[error("cannot reach the service manager at {address}: {source}")]
    Unreachable {
        /// What `NOTIFY_SOCKET` says.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// It did not take a message.
    #[error("cannot tell the service manager {what}: {source}")]
    Untold {
        /// What it was not told.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// It was sent descriptors and has not handled them.
    #[error(
        "the service manager has not answered within {} s; does its unit say `NotifyAccess=main` \
         and `FileDescriptorStoreMax=`?",
        PATIENCE.as_secs()
    )]
    Silent,
    /// The environment makes no sense.
    #[error("{variable}={value:?} is no answer of a service manager")]
    Environment {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: OsString,
    },
}

/// A name under which a descriptor is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(&'static str);

impl Name {
    /// A name of at most 255 printable characters, no colon.
    ///
    /// # Panics
    /// When it is not: names are constants.
    pub const fn new(name: &'static str) -> Self {
        assert!(is_name(name.as_bytes()), "not a name for a descriptor");
        Self(name)
    }

    /// As text.
    pub const fn as_str(self) -> &'static str {
        self.0
    }
}

/// Whether the protocol allows it as a descriptor's name.
pub(super) const fn is_name(name: &[u8]) -> bool {
    let mut at = 0;
    while at < name.len() {
        if name[at] < b' ' || name[at] > b'~' || name[at] == b':' {
            return false;
        }
        at += 1;
    }
    !name.is_empty() && name.len() <= 255
}

/// The service manager that started this process.
#[derive(Debug)]
pub struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    /// The manager at the address that `NOTIFY_SOCKET` holds: a path, or `@`
    /// and an abstract name.
    pub fn connect(address: &OsStr) -> Result<Self, Error> {
        let unreachable = |source| Error::Unreachable {
            address: address.to_string_lossy().into_owned(),
            source,
        };
        let socket = UnixDatagram::unbound().map_err(unreachable)?;
        match address.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(address),
        }
        .and_then(|address| socket.connect_addr(&address))
        .map_err(unreachable)?;
        Ok(Self { socket })
    }

    /// The start is over.
    pub fn ready(&self) -> Result<(), Error> {
        self.tell("READY=1", &[])
    }

    /// The end has begun.
    pub fn stopping(&self) -> Result<(), Error> {
        self.tell("STOPPING=1", &[])
    }

    /// One line for the person who asks for the state of the service.
    pub fn status(&self, status: &str) -> Result<(), Error> {
        self.tell(&format!("STATUS={}", status.replace('\n', " ")), &[])
    }

    /// Has a descriptor kept under a name, in addition to what has that name.
    pub fn store(&self, name: Name, fd: BorrowedFd<'_>) -> Result<(), Error> {
        // FDPOLL=0: the manager must not drop it for a hang-up of its own
        // reading.
        let message = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}", name.as_str());
        self.tell(&message, &[fd])
    }

    /// Has it keep nothing under the name any more.
    pub fn forget(&self, name: Name) -> Result<(), Error> {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={}", name.as_str()), &[])
    }

    /// Returns when the manager has handled everything that it was told.
    pub fn barrier(&self) -> Result<(), Error> {
        let untold = |source: io::Error| Error::Untold {
            what: "BARRIER=1".to_owned(),
            source,
        };
        let (read, write) =
            rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| untold(e.into()))?;
        self.tell("BARRIER=1", &[write.as_fd()])?;
        drop(write);
        // The manager closes its copy, the last one.
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or_default();
            let mut poll = [PollFd::new(&read, PollFlags::IN)];
            match rustix::event::poll(&mut poll, Some(&timeout)) {
                Ok(0) => return Err(Error::Silent),
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(untold(error.into())),
            }
        }
    }

    fn tell(&self, message: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let bytes = [IoSlice::new(message.as_bytes())];
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.socket, &bytes, &mut control, SendFlags::NOSIGNAL)
        })
        .map(drop)
        .map_err(|error| Error::Untold {
            what: message.replace('\n', " "),
            source: error.into(),
        })
    }
}

/// The descriptors that this process was started with.
#[derive(Debug, Default)]
pub struct Inherited(BTreeMap<String, Vec<OwnedFd>>);

impl Inherited {
    /// Takes them over: the descriptors that the three variables announce, if
    /// they are for the process `pid`. To be called once, before anything else
    /// opens or starts anything.
    pub fn take(
        pid: u32,
        listen_pid: Option<OsString>,
        listen_fds: Option<OsString>,
        names: Option<OsString>,
    ) -> Result<Self, Error> {
        let (Some(listen_pid), Some(listen_fds)) = (listen_pid, listen_fds) else {
            return Ok(Self::default());
        };
        let wrong = |variable, value: &OsStr| Error::Environment {
            variable,
            value: value.to_owned(),
        };
        let number = |text: &OsStr| text.to_str()?.parse::<u32>().ok();
        let for_pid = number(&listen_pid).ok_or_else(|| wrong(LISTEN_PID, &listen_pid))?;
        if for_pid != pid {
            return Ok(Self::default());
        }
        let count = number(&listen_fds)
            .filter(|count| *count as usize <= MOST_FDS)
            .ok_or_else(|| wrong(LISTEN_FDS, &listen_fds))?;
        let names = names.unwrap_or_default();
        let mut names = names
            .to_str()
            .ok_or_else(|| wrong(LISTEN_FDNAMES, &names))?
            .split(':');
        let mut inherited = Self::default();
        for raw in (FIRST_FD..).take(count as usize) {
            let name = names.next().filter(|name| !name.is_empty());
            let fd = own(raw).map_err(|_| wrong(LISTEN_FDS, &listen_fds))?;
            let fds = inherited.0.entry(name.unwrap_or("unknown").to_owned());
            fds.or_default().push(fd);
        }
        Ok(inherited)
    }

    /// All descriptors of a name.
    pub fn remove(&mut self, name: Name) -> Vec<OwnedFd> {
        self.0.remove(name.as_str()).unwrap_or_default()
    }

    /// Names of what has not been removed.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// Takes over a descriptor that was left open for this process, and closes it
/// on exec.
#[allow(unsafe_code)]
fn own(raw: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: only borrowed until it is known to be open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and was opened for this process by the one that
    // started it; nothing else here knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// What [`Inherited::take`] is given in the next process: the values of
/// `LISTEN_FDS` and `LISTEN_FDNAMES`.
pub(super) fn announce<'a>(names: impl Iterator<Item = &'a str>) -> (String, String) {
    let mut count = 0;
    let mut joined = String::new();
    for name in names {
        if count > 0 {
            joined.push(':');
        }
        let _ = write!(joined, "{name}");
        count += 1;
    }
    (count.to_string(), joined)
}
