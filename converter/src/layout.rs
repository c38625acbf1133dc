//! OCI layout directories: `oci-layout`, `index.json`, `blobs/sha256/…`.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use sluice_oci::{Descriptor, Digest, Index};

use crate::Error;

mod write;

pub(crate) use write::{LayoutWriter, Spool};

/// The annotation of an index entry that names an image within a layout.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Documents beyond this are refused: no index or manifest comes near.
pub(crate) const MAX_DOCUMENT: u64 = 16 << 20;

/// An existing layout, read only.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    directory: PathBuf,
}

impl Layout {
    /// Opens a layout; checks its version marker.
    pub(crate) fn open(directory: &Path) -> Result<Self, Error> {
        let refuse = |why: String| Error::NoLayout {
            path: directory.to_owned(),
            why,
        };
        if !directory.is_dir() {
            return Err(refuse("there is no such directory".to_owned()));
        }
        let marker = directory.join("oci-layout");
        let text = match read_limited(&marker) {
            Ok(text) => text,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                return Err(refuse("it has no file oci-layout".to_owned()));
            }
            Err(cause) => return Err(Error::file("cannot read", &marker)(cause)),
        };
        let version = serde_json::from_slice::<serde_json::Value>(&text)
            .ok()
            .and_then(|value| Some(value.get("imageLayoutVersion")?.as_str()?.to_owned()));
        match version {
            Some(version) if version.starts_with("1.") => Ok(Self {
                directory: directory.to_owned(),
            }),
            Some(version) => Err(refuse(format!("its version is {version}, not 1.x"))),
            None => Err(refuse("its file oci-layout states no version".to_owned())),
        }
    }

    /// Reads `index.json`.
    pub(crate) fn index(&self) -> Result<Index, Error> {
        let path = self.directory.join("index.json");
        let bytes = read_limited(&path).map_err(Error::file("cannot read", &path))?;
        serde_json::from_slice(&bytes).map_err(|cause| Error::NoLayout {
            path: self.directory.clone(),
            why: format!("its index.json cannot be read: {cause}"),
        })
    }

    /// The image called `tag`, or the only one.
    pub(crate) fn find(&self, tag: Option<&str>) -> Result<Descriptor, Error> {
        let mut images = self.index()?.manifests;
        let name = |image: &Descriptor| image.annotations.get(REF_NAME).cloned();
        let position = match tag {
            Some(tag) => images.iter().position(|i| name(i).as_deref() == Some(tag)),
            None => (images.len() == 1).then_some(0),
        };
        match position {
            Some(position) => Ok(images.swap_remove(position)),
            None => {
                let mut has: Vec<_> = images.iter().filter_map(name).collect();
                has.truncate(10);
                Err(Error::NoImage {
                    path: self.directory.clone(),
                    wanted: match tag {
                        Some(tag) => format!("named '{tag}'"),
                        None => "that is the only one: name one as oci:DIR:TAG".to_owned(),
                    },
                    has: match (images.len(), has.is_empty()) {
                        (0, _) => "none".to_owned(),
                        (count, true) => format!("{count} without a name"),
                        _ => has.join(", "),
                    },
                })
            }
        }
    }

    /// Where a blob is, or would be.
    pub(crate) fn blob_path(&self, digest: Digest) -> PathBuf {
        blob_path(&self.directory, digest)
    }

    /// Opens a blob.
    pub(crate) fn open_blob(&self, what: &'static str, digest: Digest) -> Result<File, Error> {
        let path = self.blob_path(digest);
        File::open(&path).map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => Error::MissingBlob {
                place: self.directory.display().to_string(),
                what,
                digest,
            },
            _ => Error::file("cannot read", &path)(cause),
        })
    }

    /// Reads a document and checks its digest.
    pub(crate) fn document(&self, what: &'static str, digest: Digest) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.open_blob(what, digest)?
            .take(MAX_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .map_err(Error::file("cannot read", &self.blob_path(digest)))?;
        crate::document::check(what, digest, &bytes)?;
        Ok(bytes)
    }
}

fn blob_path(directory: &Path, digest: Digest) -> PathBuf {
    directory.join("blobs/sha256").join(digest.hex())
}

fn read_limited(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_DOCUMENT)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}
