//! Opening `/dev/fuse`, mounting, and serving until unmounted.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, Filesystem, SessionACL};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mount::{MountFlags, UnmountFlags};

use super::handshake::{self, Agreement, HandshakeError};

const DEVICE: &str = "/dev/fuse";

/// Threads that read requests. What waits for the network waits elsewhere;
/// what waits for the disk waits here.
const THREADS: usize = 4;

/// More bytes than what is agreed on a mount ever takes.
const MOST_TERMS: u64 = 4096;
/// How long after its unmounting a file system may still be there.
const ENDING: Duration = Duration::from_secs(1);

/// A FUSE file system that is mounted and served.
#[derive(Debug)]
pub struct Session {
    mount_point: PathBuf,
    session: Option<BackgroundSession>,
    /// The number of the descriptor that the session reads and answers on.
    place: RawFd,
    kept: Kept,
    /// Whether the mount is to outlive this.
    outlived: bool,
}

/// What a session can be continued with by another process: kept outside of
/// this one, it holds the mount alive while nobody serves it, and its readers
/// wait.
#[derive(Debug)]
pub struct Kept {
    /// The FUSE device of the mount.
    pub device: OwnedFd,
    /// What was agreed on it; see [`Kept::terms`].
    agreement: Agreement,
}

/// Why a FUSE file system is not served.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// There is no FUSE here.
    #[error(
        "cannot open /dev/fuse: {0}; load the module with `modprobe fuse`, or give the container \
         the device"
    )]
    Device(#[source] io::Error),
    /// The kernel refused the mount.
    #[error("cannot mount FUSE at {}: {source}", mount_point.display())]
    Mount {
        /// Where.
        mount_point: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel and the file system did not come to terms.
    #[error("cannot serve FUSE at {}: {source}", mount_point.display())]
    Serve {
        /// Where.
        mount_point: PathBuf,
        /// Why.
        source: HandshakeError,
    },
    /// What was kept cannot be gone on with.
    #[error("the kept FUSE mount at {} is lost: {reason}", mount_point.display())]
    Lost {
        /// Where.
        mount_point: PathBuf,
        /// Why.
        reason: String,
    },
}

impl Kept {
    /// From a device and the file that [`Kept::terms`] made.
    pub fn new(device: OwnedFd, terms: OwnedFd) -> Result<Self, HandshakeError> {
        let mut terms = File::from(terms);
        let mut bytes = Vec::new();
        terms.rewind()?;
        terms.take(MOST_TERMS).read_to_end(&mut bytes)?;
        Ok(Self {
            device,
            agreement: Agreement::from_bytes(&bytes)?,
        })
    }

    /// What was agreed, as a file in memory that can be kept with the device.
    pub fn terms(&self) -> io::Result<OwnedFd> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut file = File::from(rustix::fs::memfd_create("sluice-fuse-terms", flags)?);
        file.write_all(&self.agreement.to_bytes())?;
        rustix::fs::fcntl_add_seals(
            &file,
            SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
        )?;
        Ok(file.into())
    }

    /// Whether the mount still exists, anywhere.
    pub fn is_connected(&self) -> bool {
        let mut poll = [PollFd::new(&self.device, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        rustix::event::poll(&mut poll, Some(&now)).is_ok()
            && !poll[0].revents().contains(PollFlags::ERR)
    }
}

impl Session {
    /// Mounts `filesystem` read-only at `mount_point`, an existing directory,
    /// and serves it on threads of its own. `name` is what `mount` shows.
    pub fn mount<F: Filesystem>(
        filesystem: F,
        mount_point: &Path,
        name: &str,
    ) -> Result<Self, SessionError> {
        Self::mount_from(Path::new(DEVICE), filesystem, mount_point, name)
    }

    fn mount_from<F: Filesystem>(
        device: &Path,
        filesystem: F,
        mount_point: &Path,
        name: &str,
    ) -> Result<Self, SessionError> {
        // A descriptor that a child inherits would keep the mount alive, and a
        // child that closes one of its own files would wait for itself.
        let device: OwnedFd = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(device)
            .map_err(SessionError::Device)?
            .into();
        let failed = |source: io::Error| SessionError::Mount {
            mount_point: mount_point.to_owned(),
            source,
        };
        let options = format!(
            "fd={},rootmode=40000,user_id={},group_id={},allow_other,default_permissions",
            device.as_raw_fd(),
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let options = CString::new(options).map_err(|e| failed(e.into()))?;
        rustix::mount::mount(
            name,
            mount_point,
            "fuse.sluice",
            MountFlags::RDONLY | MountFlags::NOATIME,
            options.as_c_str(),
        )
        .map_err(|e| failed(e.into()))?;
        crash_point!("session.mounted");
        let served = Agreement::negotiate(device.as_fd(), |socket| {
            fuser::Session::from_fd(filesystem, socket, SessionACL::All, config())
        })
        .and_then(|(agreement, session)| {
            let place = session.as_fd().as_raw_fd();
            handshake::put_in_place(device.as_fd(), place)?;
            crash_point!("session.negotiated");
            Ok((agreement, place, session.spawn()?))
        });
        match served {
            Ok((agreement, place, session)) => Ok(Self {
                mount_point: mount_point.to_owned(),
                session: Some(session),
                place,
                kept: Kept { device, agreement },
                outlived: false,
            }),
            Err(source) => {
                let _ = rustix::mount::unmount(mount_point, UnmountFlags::DETACH);
                Err(SessionError::Serve {
                    mount_point: mount_point.to_owned(),
                    source,
                })
            }
        }
    }

    /// Goes on with a mount that another process has begun and that nobody
    /// serves now. `filesystem` answers for every inode that was handed out.
    /// What the other process left unanswered is answered.
    pub fn adopt<F: Filesystem>(
        filesystem: F,
        mount_point: &Path,
        kept: Kept,
    ) -> Result<Self, SessionError> {
        if !kept.is_connected() {
            return Err(SessionError::Lost {
                mount_point: mount_point.to_owned(),
                reason: "it is not mounted any more".to_owned(),
            });
        }
        let serve = || {
            let session = kept.agreement.replay(|socket| {
                fuser::Session::from_fd(filesystem, socket, SessionACL::All, config())
            })?;
            crash_point!("adopt.replayed");
            let place = session.as_fd().as_raw_fd();
            handshake::put_in_place(kept.device.as_fd(), place)?;
            crash_point!("adopt.in-place");
            if kept.agreement.resends() {
                handshake::resend(kept.device.as_fd())?;
                crash_point!("adopt.resent");
            } else {
                tracing::warn!(
                    "this kernel does not send FUSE requests again (Linux 6.9 does): a read at {} \
                     that the last process left unanswered waits until its reader is killed",
                    mount_point.display()
                );
            }
            Ok((place, session.spawn()?))
        };
        match serve() {
            Ok((place, session)) => Ok(Self {
                mount_point: mount_point.to_owned(),
                session: Some(session),
                place,
                kept,
                outlived: true,
            }),
            Err(source) => Err(SessionError::Serve {
                mount_point: mount_point.to_owned(),
                source,
            }),
        }
    }

    /// What another process needs to go on with the mount.
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Somebody keeps the device: from now on the mount outlives this, unless
    /// it is unmounted in so many words.
    pub fn outlive(&mut self) {
        self.outlived = true;
    }

    /// Whether it does.
    pub fn outlives(&self) -> bool {
        self.outlived
    }

    /// Ends without unmounting, when somebody keeps the device: what is not
    /// answered now is left to the next process. What this one still answers
    /// goes nowhere, so that a task that is dropped unfinished does not tell
    /// its reader that it failed.
    pub fn leave(mut self) {
        self.abandon();
    }

    fn abandon(&mut self) {
        // Holds the descriptor open, so that its number stays its own.
        let Some(_session) = self.session.take() else {
            return;
        };
        let put = nowhere().and_then(|end| handshake::put_in_place(end.as_fd(), self.place));
        if let Err(error) = put {
            tracing::warn!(
                "reads at {} that are under way may fail: {error}",
                self.mount_point.display()
            );
        }
    }

    /// Where it is mounted.
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// Unmounts, and waits until the threads have ended unless something still
    /// holds the file system open.
    pub fn unmount(mut self) {
        self.detach();
    }

    fn detach(&mut self) {
        let Some(session) = self.session.take() else {
            return;
        };
        let busy = rustix::mount::unmount(&self.mount_point, UnmountFlags::empty()).is_err();
        if busy {
            let _ = rustix::mount::unmount(&self.mount_point, UnmountFlags::DETACH);
            return;
        }
        // Another mount namespace may have a copy of the mount.
        let since = Instant::now();
        while self.kept.is_connected() {
            if since.elapsed() > ENDING {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Err(error) = session.join() {
            tracing::warn!("serving FUSE at {}: {error}", self.mount_point.display());
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        match self.outlived {
            true => self.abandon(),
            false => self.detach(),
        }
    }
}

/// A descriptor that never gives anything and takes everything.
fn nowhere() -> io::Result<OwnedFd> {
    let (mut taker, end) = UnixStream::pair()?;
    std::thread::Builder::new()
        .name("nowhere".to_owned())
        .spawn(move || io::copy(&mut taker, &mut io::sink()))?;
    Ok(end.into())
}

fn config() -> Config {
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    config
}

/// Settings that every FUSE mount of the node wants, when the kernel has them.
pub(super) fn negotiate(config: &mut fuser::KernelConfig, wanted: fuser::InitFlags) {
    let wanted = wanted & config.capabilities();
    let _ = config.add_capabilities(wanted);
    // Reads of up to 1 MiB.
    let _ = config.set_max_write(1 << 20);
    // The default is a dozen, and asynchronous reads count: a dozen slow
    // fetches would stop every read of present bytes behind them.
    let _ = config.set_max_background(4096);
}

/// Runs a handler. When it panics, the request is answered with EIO, as every
/// reply is that is dropped unanswered, and the mount lives on.
pub(super) fn guarded(what: &str, handler: impl FnOnce()) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(handler)).is_err() {
        tracing::error!("the FUSE handler of {what} panicked; its caller gets EIO");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;
    impl Filesystem for Nothing {}

    #[test]
    fn a_missing_device_is_named_with_its_remedy() {
        let error =
            Session::mount_from(Path::new("/nonexistent/fuse"), Nothing, Path::new("/"), "x")
                .unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot open /dev/fuse: No such file or directory (os error 2); load the module with \
             `modprobe fuse`, or give the container the device"
        );
    }

    #[test]
    fn regression_a_copy_of_the_mount_holds_up_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let session = Session::mount(Nothing, directory.path(), "x").unwrap();
        // It has a mount namespace of its own, with all mounts of this one.
        let mut holder = std::process::Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .args(["sh", "-c", "echo; exec cat"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        (holder.stdout.as_mut().unwrap().read_exact(&mut line)).unwrap();
        session.unmount();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(directory.path().to_str().unwrap()));
        drop(holder.stdin.take());
        assert!(holder.wait().unwrap().success());
    }

    #[test]
    fn a_missing_mount_point_is_named() {
        let error = Session::mount(Nothing, Path::new("/nonexistent/dir"), "x").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/dir"), "{error}");
    }
}
