//! Writing into a layout so that nothing half-written ever has a name.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use sluice_oci::{Descriptor, Digest, Index, media_type};

use super::{Layout, REF_NAME, blob_path};
use crate::Error;

const MARKER: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

/// A layout that receives an image. Until [`LayoutWriter::commit`], dropping
/// it removes every blob and directory that it added.
#[derive(Debug)]
pub(crate) struct LayoutWriter {
    directory: PathBuf,
    added: Mutex<Vec<PathBuf>>,
    /// Directories that did not exist before, outermost first.
    made: Vec<PathBuf>,
    /// Whether the layout itself did not exist before.
    new: bool,
    committed: bool,
    /// The blob directory, locked shared: other writers may rely on blobs
    /// that this one added.
    users: File,
}

/// A file without a name that becomes a blob once its digest is known. The
/// kernel frees it when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Spool {
    file: File,
    place: PathBuf,
}

impl Spool {
    /// A nameless file in `directory`.
    pub(crate) fn new(directory: &Path) -> Result<Self, Error> {
        let place = directory.to_owned();
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = match rustix::fs::open(directory, flags, Mode::from_raw_mode(0o644)) {
            Ok(file) => File::from(file),
            // Not every file system has O_TMPFILE. An unlinked file serves as
            // well, but `LayoutWriter::adopt` has to copy it.
            Err(_) => tempfile::tempfile_in(directory)
                .map_err(Error::file("cannot create a temporary file in", directory))?,
        };
        Ok(Self { file, place })
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// A path that opens the file anew, from its start.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// Writes, naming the directory if it fails.
    pub(crate) fn write_all(&self, bytes: &[u8]) -> Result<(), Error> {
        (&self.file).write_all(bytes).map_err(Error::file(
            "cannot write to a temporary file in",
            &self.place,
        ))
    }
}

impl LayoutWriter {
    /// Opens or makes the layout's directory. Refuses a directory with
    /// content that is no layout.
    pub(crate) fn open(directory: &Path) -> Result<Self, Error> {
        let occupied = fs::read_dir(directory).is_ok_and(|mut names| names.next().is_some());
        if occupied {
            Layout::open(directory)?;
        }
        let blobs = directory.join("blobs/sha256");
        let mut made: Vec<PathBuf> = blobs
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && !path.exists())
            .map(Path::to_owned)
            .collect();
        made.reverse();
        fs::create_dir_all(directory).map_err(Error::file("cannot create", directory))?;
        let marker = directory.join("oci-layout");
        let new = !marker.exists();
        if new {
            // First of all, so that what an interrupted conversion leaves is
            // a layout that the next one can go on with.
            replace(&marker, MARKER.as_bytes())?;
        }
        fs::create_dir_all(&blobs).map_err(Error::file("cannot create", &blobs))?;
        let users = File::open(&blobs).map_err(Error::file("cannot open", &blobs))?;
        rustix::fs::flock(&users, FlockOperation::LockShared)
            .map_err(|cause| Error::file("cannot lock", &blobs)(cause.into()))?;
        Ok(Self {
            directory: directory.to_owned(),
            added: Mutex::default(),
            made,
            new,
            committed: false,
            users,
        })
    }

    /// Where spools should be, so that they can become blobs by a link.
    pub(crate) fn spool_directory(&self) -> PathBuf {
        self.directory.join("blobs/sha256")
    }

    /// Whether the blob is there with that size.
    pub(crate) fn has(&self, digest: Digest, size: u64) -> bool {
        fs::metadata(blob_path(&self.directory, digest))
            .is_ok_and(|found| found.is_file() && found.len() == size)
    }

    /// Makes a spool, made in [`LayoutWriter::spool_directory`] and holding
    /// the bytes of `digest`, a blob.
    pub(crate) fn adopt(&self, spool: &Spool, digest: Digest) -> Result<(), Error> {
        let path = blob_path(&self.directory, digest);
        let fail = |cause: io::Error| Error::file("cannot write", &path)(cause);
        spool.file.sync_data().map_err(fail)?;
        let own = spool.path();
        // Replaces nothing: a blob of that name holds the same bytes, unless
        // it was cut short, in which case it goes first.
        if path.exists() {
            let whole = spool.file.metadata().map_err(fail)?.len();
            if fs::metadata(&path).is_ok_and(|found| found.len() == whole) {
                return Ok(());
            }
            fs::remove_file(&path).map_err(fail)?;
        }
        match rustix::fs::linkat(CWD, &own, CWD, &path, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Ok(()),
            Err(_) => self.copy(spool, &path)?,
        }
        self.added.lock().push(path);
        Ok(())
    }

    /// The way without `O_TMPFILE`: a named temporary file and a rename.
    fn copy(&self, spool: &Spool, path: &Path) -> Result<(), Error> {
        use std::io::Seek as _;
        let fail = |cause: io::Error| Error::file("cannot write", path)(cause);
        let mut named = tempfile::NamedTempFile::new_in(&self.directory).map_err(fail)?;
        (&spool.file).rewind().map_err(fail)?;
        io::copy(&mut &spool.file, named.as_file_mut()).map_err(fail)?;
        named.as_file().sync_data().map_err(fail)?;
        named.persist(path).map_err(|failed| fail(failed.error))?;
        Ok(())
    }

    /// Writes a small blob.
    pub(crate) fn put(&self, digest: Digest, bytes: &[u8]) -> Result<(), Error> {
        if self.has(digest, bytes.len() as u64) {
            return Ok(());
        }
        let spool = Spool::new(&self.spool_directory())?;
        spool.write_all(bytes)?;
        self.adopt(&spool, digest)
    }

    /// Names the image in `index.json`, last of all, and keeps everything.
    /// An image that had the tag loses it; one without a tag replaces an
    /// equal one.
    pub(crate) fn commit(mut self, mut image: Descriptor, tag: Option<&str>) -> Result<(), Error> {
        image.annotations.remove(REF_NAME);
        if let Some(tag) = tag {
            image
                .annotations
                .insert(REF_NAME.to_owned(), tag.to_owned());
        }
        let directory =
            File::open(&self.directory).map_err(Error::file("cannot open", &self.directory))?;
        // Two conversions into one layout must not lose one another's entry.
        rustix::fs::flock(&directory, FlockOperation::LockExclusive)
            .map_err(|cause| Error::file("cannot lock", &self.directory)(cause.into()))?;
        let path = self.directory.join("index.json");
        let mut index = if path.exists() {
            Layout::open(&self.directory)?.index()?
        } else {
            Index {
                schema_version: 2,
                media_type: Some(media_type::OCI_INDEX.to_owned()),
                manifests: Vec::new(),
                annotations: Default::default(),
                other: Default::default(),
            }
        };
        index.manifests.retain(|entry| {
            let name = entry.annotations.get(REF_NAME).map(String::as_str);
            name != tag || (tag.is_none() && entry.digest != image.digest)
        });
        index.manifests.push(image);
        let bytes = serde_json::to_vec(&index).map_err(|cause| Error::File {
            action: "cannot write",
            path: path.clone(),
            cause: cause.into(),
        })?;
        for directory in [&self.spool_directory(), &self.directory] {
            File::open(directory)
                .and_then(|directory| directory.sync_all())
                .map_err(Error::file("cannot flush", directory))?;
        }
        replace(&path, &bytes)?;
        self.committed = true;
        Ok(())
    }
}

/// Replaces a file as a whole.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let fail = |cause: io::Error| Error::file("cannot write", path)(cause);
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut named = tempfile::Builder::new()
        .prefix(".sluice-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(directory)
        .map_err(fail)?;
    named.write_all(bytes).map_err(fail)?;
    named.as_file().sync_all().map_err(fail)?;
    named.persist(path).map_err(|failed| fail(failed.error))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(fail)
}

impl Drop for LayoutWriter {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // Best effort: what stays is a whole blob that nothing names, which
        // does no harm.
        if rustix::fs::flock(&self.users, FlockOperation::NonBlockingLockExclusive).is_err() {
            return;
        }
        for blob in self.added.get_mut().drain(..) {
            let _ = fs::remove_file(blob);
        }
        if self.new {
            let _ = fs::remove_file(self.directory.join("oci-layout"));
        }
        for directory in self.made.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}
