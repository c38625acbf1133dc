//! The daemon's socket and its root directory: both root's alone, both for one
//! daemon at a time.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode};

/// Why the daemon cannot have its root directory or socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another daemon answers there.
    #[error(
        "socket {} is already in use by a running process; stop it, or give another --address",
        .0.display()
    )]
    SocketInUse(PathBuf),
    /// Something that is no socket is in the way.
    #[error("{} exists and is no socket; remove it, or give another --address", .0.display())]
    NoSocket(PathBuf),
    /// Another daemon works in the root directory.
    #[error(
        "root directory {} is in use by another daemon{holder}; stop it, or give another --root",
        root.display()
    )]
    RootInUse {
        /// The directory.
        root: PathBuf,
        /// ` (process N)`, when it is known.
        holder: String,
    },
    /// A path that overlayfs could not be told.
    #[error(
        "root directory {} has a character that mount options cannot hold (',', ':', '\\', '\"' or \
         one that is not UTF-8); give another --root", .0.display()
    )]
    Unmountable(PathBuf),
    /// A path that no socket can have.
    #[error("cannot {action} {}: {source}{remedy}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
        /// What to do about it, after a separator, or nothing.
        remedy: &'static str,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io {
        action,
        path,
        remedy: match source.kind() {
            io::ErrorKind::StorageFull => "; free space on that file system",
            io::ErrorKind::PermissionDenied => "; the daemon has to run as root",
            _ => "",
        },
        source,
    }
}

/// The root directory, held until this is dropped or the process ends.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    /// Keeps the lock.
    _lock: File,
}

impl Root {
    /// Makes the directory if it is not there, closes it to others than root,
    /// and takes it for this process.
    pub fn take(path: &Path) -> Result<Self, Error> {
        let path = std::path::absolute(path).map_err(failed("find", path))?;
        let unmountable = |text: &str| text.contains([',', ':', '\\', '"', '\n']);
        if path.to_str().is_none_or(unmountable) {
            return Err(Error::Unmountable(path));
        }
        make_private(&path)?;
        let found = fs::metadata(&path).map_err(failed("look at", &path))?;
        // Not for nothing: the file system may have become read-only.
        if found.permissions().mode() & 0o7777 != 0o700 {
            fs::set_permissions(&path, Permissions::from_mode(0o700))
                .map_err(failed("close to others", &path))?;
        }
        let lock = take_lock(&path)?;
        Ok(Self { path, _lock: lock })
    }

    /// The directory, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn make_private(path: &Path) -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed("create the directory", path))
}

fn take_lock(root: &Path) -> Result<File, Error> {
    let path = root.join("lock");
    let opened = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .or_else(|error| match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem => File::open(&path),
            _ => Err(error),
        });
    let mut file = opened.map_err(failed("open", &path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut holder = String::new();
            let _ = file.take(32).read_to_string(&mut holder);
            let holder = match holder.trim() {
                "" => String::new(),
                number => format!(" (process {number})"),
            };
            return Err(Error::RootInUse {
                root: root.to_owned(),
                holder,
            });
        }
        Err(error) => return Err(failed("lock", &path)(error.into())),
    }
    // Only for the message above: a full disk must not keep the daemon down.
    let _ = file.set_len(0);
    let _ = file.write_all(format!("{}\n", std::process::id()).as_bytes());
    Ok(file)
}

/// A listening socket. Its file goes when this is dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    /// Device and inode, so that a successor's socket is left alone.
    identity: (u64, u64),
}

impl Socket {
    /// Listens at `path`. A socket there that nobody answers on is replaced.
    pub fn bind(path: &Path) -> Result<(Self, UnixListener), Error> {
        let path = std::path::absolute(path).map_err(failed("find", path))?;
        if let Some(parent) = path.parent() {
            make_private(parent)?;
        }
        remove_stale(&path)?;
        // Nobody may connect between bind and chmod.
        let umask = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(&path);
        rustix::process::umask(umask);
        let listener = bound.map_err(failed("listen at", &path))?;
        let metadata = fs::metadata(&path).map_err(failed("look at", &path))?;
        let socket = Self {
            identity: (metadata.dev(), metadata.ino()),
            path,
        };
        Ok((socket, listener))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), Error> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", path)(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(Error::NoSocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::SocketInUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the stale socket", path))
        }
        Err(error) => Err(failed("connect to", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_root_is_one_daemons_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        let root = Root::take(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        let error = Root::take(&path).unwrap_err().to_string();
        let named = format!("(process {})", std::process::id());
        assert!(
            error.contains(&named) && error.contains("--root"),
            "{error}"
        );
        drop(root);
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        Root::take(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
    }

    #[test]
    fn a_root_that_overlayfs_cannot_name_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["a:b", "a,b", "a\\b", "a\nb"] {
            let path = directory.path().join(name);
            assert!(matches!(Root::take(&path), Err(Error::Unmountable(_))));
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/s.sock");
        let (socket, listener) = Socket::bind(&path).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        let error = Socket::bind(&path).unwrap_err().to_string();
        assert!(
            error.contains("s.sock") && error.contains("--address"),
            "{error}"
        );
        // As a crash leaves it.
        drop(listener);
        std::mem::forget(socket);
        let (socket, _listener) = Socket::bind(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::bind(&path), Err(Error::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
