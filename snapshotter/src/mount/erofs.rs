//! Mounting a layer's `meta.erofs` by the kernel.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::Error;

/// How the kernel reads what it does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Read `data` past the page cache of the file that holds it, so that
    /// bytes are cached once, by EROFS. Kernels that do not know the option
    /// are asked again without it.
    pub direct_io: bool,
    /// Whether `data` needs nobody who serves it: see [`is_alone`].
    pub alone: bool,
}

/// What stands before the image's name where nobody serves the content. The
/// kernel does not list which file has the content, but it lists the image as
/// it was told, letter for letter, also to the next process.
const ALONE: &str = "./";

/// Whether a mounted layer goes on when whoever mounted it is gone: its `data`
/// was complete.
pub fn is_alone(mount: &super::Mount) -> bool {
    let source = mount.source.as_bytes();
    let name = source.iter().rposition(|byte| *byte == b'/');
    mount.kind == "erofs" && name.is_some_and(|at| source[..=at].ends_with(b"/./"))
}

/// Mounts the image `meta` on the directory `target`, with `data` as the
/// file that holds the content.
///
/// Only `mount(2)` can do this: `mount(8)` puts a loop device in between, and
/// then extra devices that are files are refused. Neither `nosuid` nor
/// `nodev` is set, as a lower directory of overlayfs has neither when it is
/// unpacked: what the container's own mount allows decides.
pub fn mount(meta: &Path, data: &Path, target: &Path, options: Options) -> Result<(), Error> {
    let spelled;
    let meta = match (options.alone, meta.parent(), meta.file_name()) {
        (true, Some(directory), Some(name)) => {
            spelled = directory.join(ALONE).join(name);
            &spelled
        }
        _ => meta,
    };
    let mut text = b"device=".to_vec();
    text.extend_from_slice(data.as_os_str().as_bytes());
    if text.contains(&b',') {
        return Err(Error::Comma(data.into()));
    }
    let result = if options.direct_io {
        let mut direct = text.clone();
        direct.extend_from_slice(b",directio");
        match mount_with(meta, target, direct) {
            Err(Errno::INVAL) => mount_with(meta, target, text),
            result => result,
        }
    } else {
        mount_with(meta, target, text)
    };
    result.map_err(|errno| Error::Mount {
        source_path: meta.into(),
        target: target.into(),
        source: errno.into(),
        remedy: match errno {
            Errno::NODEV | Errno::NOTBLK => "; set [mount] mode = \"fuse\"",
            Errno::PERM => "; it takes CAP_SYS_ADMIN",
            _ => "",
        },
    })
}

fn mount_with(meta: &Path, target: &Path, options: Vec<u8>) -> Result<(), Errno> {
    let path = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let (Ok(meta), Ok(target), Ok(options)) = (path(meta), path(target), CString::new(options))
    else {
        return Err(Errno::INVAL);
    };
    // mount(2) opens the file of contents, and the one who answers that is
    // perhaps this very process.
    super::apart::mount(&meta, &target, c"erofs", MountFlags::RDONLY, &options)
}

/// Why layers cannot be mounted in `erofs` mode.
#[derive(Debug, thiserror::Error)]
pub enum Unsupported {
    /// No `/dev/fuse`, through which missing bytes come.
    #[error("no /dev/fuse ({0}); load the module fuse, or give the container the device")]
    NoFuse(#[source] io::Error),
    /// No EROFS at all.
    #[error("the kernel has no EROFS; build it with CONFIG_EROFS_FS or load the module erofs")]
    NoErofs,
    /// EROFS on block devices only.
    #[error(
        "the kernel mounts EROFS from block devices only; it takes Linux 6.12 with \
         CONFIG_EROFS_FS_BACKED_BY_FILE"
    )]
    NoFileBacked,
    /// Not allowed to mount.
    #[error("not allowed to mount; it takes CAP_SYS_ADMIN in the initial user namespace")]
    NotPermitted,
    /// Something else failed.
    #[error("mounting a small EROFS image in {directory} failed: {source}")]
    Failed {
        /// The directory for the attempt.
        directory: String,
        /// What the system said.
        source: io::Error,
    },
    /// The mount succeeded, but its content was wrong.
    #[error("the kernel read a small EROFS image wrongly: got {0:?}")]
    Wrong(String),
}

/// An image with one file, `probe`, whose content is [`PROBE_CONTENT`] at the
/// beginning of the data.
const PROBE_IMAGE: &[u8] = include_bytes!("probe.erofs");
const PROBE_CONTENT: &str = "read through EROFS\n";

/// Where the attempt is made, below a node's root. Always the same place, so
/// that the next start finds what a process left that died in between.
pub const PROBE: &str = "probe";

/// Finds out whether the kernel mounts layers in `erofs` mode, by mounting a
/// small image below `root` and reading a file.
pub fn probe(root: &Path) -> Result<(), Unsupported> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(Unsupported::NoFuse)?;
    let directory = root.join(PROBE);
    let failed = |source| Unsupported::Failed {
        directory: directory.display().to_string(),
        source,
    };
    clear_probe(root).map_err(failed)?;
    let outcome = attempt(&directory);
    clear_probe(root).map_err(failed)?;
    outcome
}

/// Unmounts and removes what an attempt has left.
pub fn clear_probe(root: &Path) -> io::Result<()> {
    let directory = root.join(PROBE);
    for mount in super::mounts_below(&directory).map_err(io::Error::other)? {
        super::detach(&mount.target).map_err(io::Error::other)?;
        crash_point!("probe.unmounted");
    }
    match std::fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn attempt(directory: &Path) -> Result<(), Unsupported> {
    let failed = |source| Unsupported::Failed {
        directory: directory.display().to_string(),
        source,
    };
    let (meta, data, target) = (
        directory.join("meta.erofs"),
        directory.join("data"),
        directory.join("mnt"),
    );
    let mut content = PROBE_CONTENT.as_bytes().to_vec();
    content.resize(4096, 0);
    std::fs::create_dir_all(&target).map_err(failed)?;
    std::fs::write(&meta, PROBE_IMAGE).map_err(failed)?;
    std::fs::write(&data, content).map_err(failed)?;
    mount(&meta, &data, &target, Options::default()).map_err(|error| match error {
        Error::Mount { source, .. } => match Errno::from_io_error(&source) {
            Some(Errno::NODEV) => Unsupported::NoErofs,
            Some(Errno::NOTBLK) => Unsupported::NoFileBacked,
            Some(Errno::PERM) => Unsupported::NotPermitted,
            _ => failed(source),
        },
        other => failed(io::Error::other(other)),
    })?;
    crash_point!("probe.mounted");
    match std::fs::read_to_string(target.join("probe")).map_err(failed)? {
        content if content == PROBE_CONTENT => Ok(()),
        content => Err(Unsupported::Wrong(content)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_mounts_file_backed_erofs() {
        let scratch = tempfile::tempdir().unwrap();
        probe(scratch.path()).unwrap();
        let left: Vec<_> = std::fs::read_dir(scratch.path()).unwrap().collect();
        assert!(left.is_empty());
        assert!(
            crate::mount::mounts_below(scratch.path())
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn regression_what_a_killed_probe_left_is_cleared() {
        let root = tempfile::tempdir().unwrap();
        // Twice: as a process leaves it that died right after mounting.
        for _ in 0..2 {
            let directory = root.path().join(PROBE);
            attempt(&directory).unwrap();
            let left = crate::mount::mounts_below(root.path()).unwrap();
            assert_eq!(left[0].target, directory.join("mnt"));
            probe(root.path()).unwrap();
            assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
            assert!(crate::mount::mounts_below(root.path()).unwrap().is_empty());
        }
    }

    #[test]
    fn errors_name_image_target_and_remedy() {
        let scratch = tempfile::tempdir().unwrap();
        let missing = scratch.path().join("meta.erofs");
        let error = mount(&missing, &missing, scratch.path(), Options::default()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("meta.erofs"), "{text}");
        assert!(text.contains(scratch.path().to_str().unwrap()), "{text}");
        assert!(text.contains("No such file"), "{text}");

        let error = mount(
            &missing,
            Path::new("/a,b"),
            scratch.path(),
            Options::default(),
        );
        assert!(error.unwrap_err().to_string().contains("comma"));
    }

    #[test]
    fn a_mount_tells_whether_anybody_serves_its_content() {
        let scratch = tempfile::tempdir().unwrap();
        for alone in [false, true] {
            let directory = scratch.path().join(alone.to_string());
            attempt(&directory).unwrap();
            let target = directory.join("mnt");
            super::super::unmount(&target).unwrap();
            let options = Options {
                direct_io: false,
                alone,
            };
            let files = ["meta.erofs", "data"].map(|name| directory.join(name));
            mount(&files[0], &files[1], &target, options).unwrap();
            let mounts = crate::mount::mounts_below(&target).unwrap();
            assert_eq!(is_alone(&mounts[0]), alone, "{:?}", mounts[0]);
            assert_eq!(Path::new(&mounts[0].source), files[0]);
            super::super::unmount(&target).unwrap();
        }
    }

    #[test]
    fn unmounting_what_is_not_mounted_is_no_error() {
        let scratch = tempfile::tempdir().unwrap();
        crate::mount::unmount(scratch.path()).unwrap();
        crate::mount::detach(scratch.path()).unwrap();
        crate::mount::unmount(&scratch.path().join("gone")).unwrap();
    }
}
