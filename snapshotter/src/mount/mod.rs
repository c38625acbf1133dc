//! Mounting and unmounting layers, and what is mounted.

mod apart;
pub mod erofs;
mod table;
pub mod users;

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

pub use table::{Mount, mounts, mounts_below};

/// Why a mount could not be made, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `mount(2)` refused.
    #[error("cannot mount {source_path} on {target}: {source}{remedy}")]
    Mount {
        /// What was to be mounted.
        source_path: PathBuf,
        /// Where.
        target: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do about it, after a separator, or nothing.
        remedy: &'static str,
    },
    /// A path that mount options cannot express.
    #[error(
        "cannot mount with the path {0}: it has a comma, which mount options cannot express; choose another root directory"
    )]
    Comma(PathBuf),
    /// `umount2(2)` refused.
    #[error("cannot unmount {target}: {source}")]
    Unmount {
        /// What was to be unmounted.
        target: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The table of mounts could not be read.
    #[error("cannot read /proc/self/mountinfo: {0}; is /proc mounted?")]
    Table(#[source] io::Error),
}

impl Error {
    /// Whether something uses the mount.
    pub fn is_busy(&self) -> bool {
        match self {
            Self::Unmount { source, .. } => Errno::from_io_error(source) == Some(Errno::BUSY),
            _ => false,
        }
    }
}

/// Unmounts the topmost mount on `target`. That nothing is mounted there is
/// no error.
pub fn unmount(target: &Path) -> Result<(), Error> {
    unmount_with(target, UnmountFlags::NOFOLLOW)
}

/// Takes the topmost mount on `target` out of sight at once; the kernel
/// unmounts it when its last user is gone.
pub fn detach(target: &Path) -> Result<(), Error> {
    unmount_with(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)
}

fn unmount_with(target: &Path, flags: UnmountFlags) -> Result<(), Error> {
    match rustix::mount::unmount(target, flags) {
        // EINVAL: not a mount point.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(source) => Err(Error::Unmount {
            target: target.into(),
            source: source.into(),
        }),
    }
}
