//! A small file system that can be full.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;

/// Mounted until it is dropped.
pub(crate) struct Tmpfs(TempDir);

impl Tmpfs {
    /// `size` as the mount option takes it: `8m`.
    pub(crate) fn new(size: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = CString::new(format!("size={size}")).unwrap();
        rustix::mount::mount(
            "tmpfs",
            directory.path(),
            "tmpfs",
            MountFlags::empty(),
            Some(options.as_c_str()),
        )
        .unwrap();
        Self(directory)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Whether nothing can be changed. Nobody may have a file open for writing.
    pub(crate) fn set_read_only(&self, read_only: bool) {
        let flags = match read_only {
            true => MountFlags::RDONLY,
            false => MountFlags::empty(),
        };
        let flags = MountFlags::BIND | flags;
        rustix::mount::mount_remount(self.path(), flags, "").unwrap();
    }

    /// Leaves no space; it is back when the returned file is removed.
    pub(crate) fn fill(&self) -> PathBuf {
        let ballast = self.path().join("ballast");
        let full = fs::write(&ballast, vec![1; 64 << 20]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        ballast
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH).unwrap();
    }
}
