//! Opening `/dev/fuse`, mounting, and serving until unmounted.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use fuser::{BackgroundSession, Config, Filesystem, SessionACL};
use rustix::mount::{MountFlags, UnmountFlags};

const DEVICE: &str = "/dev/fuse";

/// Threads that read requests. What waits for the network waits elsewhere;
/// what waits for the disk waits here.
const THREADS: usize = 4;

/// A FUSE file system that is mounted and served.
#[derive(Debug)]
pub struct Session {
    mount_point: PathBuf,
    session: Option<BackgroundSession>,
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
        source: io::Error,
    },
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
        let mut config = Config::default();
        config.n_threads = Some(THREADS);
        let served = fuser::Session::from_fd(filesystem, device, SessionACL::All, config)
            .and_then(fuser::Session::spawn);
        match served {
            Ok(session) => Ok(Self {
                mount_point: mount_point.to_owned(),
                session: Some(session),
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
        } else if let Err(error) = session.join() {
            tracing::warn!("serving FUSE at {}: {error}", self.mount_point.display());
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.detach();
    }
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
    fn a_missing_mount_point_is_named() {
        let error = Session::mount(Nothing, Path::new("/nonexistent/dir"), "x").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/dir"), "{error}");
    }
}
