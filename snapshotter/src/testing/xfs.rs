//! A small file system that shares extents between files.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use rustix::mount::UnmountFlags;
use tempfile::TempDir;

/// Bytes, mostly a hole; mkfs.xfs makes nothing smaller.
const SIZE: u64 = 300 << 20;

/// Mounted until it is dropped.
pub(crate) struct Xfs(TempDir);

impl Xfs {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().with_extension("xfs");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        run(Command::new("mkfs.xfs")
            .args(["-q", "-K", "-m", "reflink=1"])
            .arg(&image));
        run(Command::new("mount")
            .args(["-t", "xfs", "-o", "loop"])
            .arg(&image)
            .arg(directory.path()));
        // The mount is all there is to take away.
        std::fs::remove_file(image).unwrap();
        Self(directory)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH).unwrap();
    }
}

/// Bytes of a file that other files have as well, as `filefrag` lists them.
pub(crate) fn shared_extents(path: &Path) -> u64 {
    let listed = Command::new("filefrag")
        .args(["-v", "-b1"])
        .arg(path)
        .output()
        .unwrap();
    assert!(listed.status.success(), "{listed:?}");
    let text = String::from_utf8(listed.stdout).unwrap();
    // "   0:        0..   65535:   1000..  66535:  65536:   shared"
    let shared = text.lines().filter(|line| line.contains("shared"));
    shared
        .filter_map(|line| line.split(':').nth(3)?.trim().parse::<u64>().ok())
        .sum()
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}
