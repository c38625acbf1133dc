//! One hostile layer: an honest tar with one file, and a table of contents
//! that says what it likes.

use std::collections::BTreeMap;
use std::io::{self, Read as _};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use sluice_layer::Format;
use sluice_oci::{Digest, Hasher, media_type};
use sluice_tests::image::{Meta, Noise, Tarball};

use crate::blobs::{Blob, compress};

/// Where the digest of the TOC is told.
pub(crate) const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Bytes of the one file.
pub(crate) const SIZE: u64 = 5000;

/// What becomes of the layer.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    /// It is unpacked, and the log tells a reason that holds this text.
    Unpacked(&'static str),
    /// It is mounted lazily, and shows these.
    Lazy(Vec<(String, Seen)>),
    /// Either.
    Any,
}

/// What is seen under a path.
#[derive(Debug, Clone)]
pub(crate) enum Seen {
    Content(Vec<u8>),
    /// Any read fails with an I/O error.
    Broken,
    /// Something is there.
    Exists,
}

/// A layer ready to be pushed.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) name: String,
    pub(crate) format: Format,
    pub(crate) blob: Vec<u8>,
    pub(crate) diff_id: Digest,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) outcome: Outcome,
}

/// The layer's units, before there is a TOC.
#[derive(Debug, Clone)]
pub(crate) struct Content {
    pub(crate) name: String,
    pub(crate) format: Format,
    pub(crate) bytes: Vec<u8>,
    /// Of the file's unit.
    pub(crate) offset: u64,
    pub(crate) file: Vec<u8>,
}

impl Content {
    /// A tar that holds the directory `name` with the file `inside`.
    pub(crate) fn new(format: Format, name: &str) -> Result<Self> {
        let mut file = Vec::new();
        let seed = Digest::of(name.as_bytes()).as_raw()[0];
        Noise(u64::from(seed) << 32 | name.len() as u64)
            .take(SIZE)
            .read_to_end(&mut file)?;
        let mut tar = Vec::new();
        let mut writer = Tarball::new(&mut tar);
        writer.dir(name, &Meta::mode(0o755))?;
        writer.file(&format!("{name}/inside"), &Meta::mode(0o644), &file)?;
        writer.finish()?;
        let at = tar.len() - 1024 - file.len().next_multiple_of(512);
        let mut end = tar.len();
        if format == Format::Estargz {
            // The archive ends after its table of contents.
            end -= 1024;
        }
        let mut bytes = compress(format, &tar[..at]);
        let offset = bytes.len() as u64;
        bytes.extend(compress(format, &tar[at..end]));
        Ok(Self {
            name: name.to_owned(),
            format,
            bytes,
            offset,
            file,
        })
    }

    /// The path of something in the layer's directory.
    pub(crate) fn path(&self, below: &str) -> String {
        format!("{}/{below}", self.name)
    }

    /// An entry for the file under a name, with other fields on top.
    pub(crate) fn entry(&self, name: &str, more: Value) -> Value {
        let digest = Digest::of(&self.file);
        let mut entry = json!({
            "name": name, "type": "reg", "size": SIZE, "mode": 0o100644,
            "modtime": "2020-09-13T12:26:40Z", "offset": self.offset,
            "digest": digest, "chunkDigest": digest,
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            entry[key] = value.clone();
        }
        entry
    }

    /// What an honest TOC says of the directory.
    pub(crate) fn directory(&self) -> Value {
        json!({
            "name": format!("{}/", self.name), "type": "dir", "mode": 0o40755,
            "modtime": "2020-09-13T12:26:40Z",
        })
    }

    /// What an honest TOC says.
    pub(crate) fn honest(&self) -> Value {
        self.entry(&self.path("inside"), json!({}))
    }

    /// The layer with a TOC of these entries.
    pub(crate) fn with(self, entries: &[Value], outcome: Outcome) -> Result<Layer> {
        let toc = json!({"version": 1, "entries": entries});
        self.with_json(&serde_json::to_vec(&toc)?, outcome)
    }

    /// The layer with whatever for a TOC, and an annotation that vouches for
    /// it.
    pub(crate) fn with_json(self, json: &[u8], outcome: Outcome) -> Result<Layer> {
        let blob = Blob::with_toc(self.format, self.bytes, json.to_vec()).bytes;
        Layer::new(&self.name, self.format, blob, Digest::of(json), outcome)
    }
}

impl Layer {
    /// A layer of any bytes.
    pub(crate) fn new(
        name: &str,
        format: Format,
        blob: Vec<u8>,
        toc_digest: Digest,
        outcome: Outcome,
    ) -> Result<Self> {
        let mut tar = Hashed(Hasher::new());
        match format {
            Format::Estargz => {
                io::copy(&mut flate2::read::MultiGzDecoder::new(&*blob), &mut tar)?;
            }
            Format::ZstdChunked => zstd::stream::copy_decode(&*blob, &mut tar)?,
        }
        Ok(Self {
            name: name.to_owned(),
            format,
            blob,
            diff_id: tar.0.finish(),
            annotations: BTreeMap::from([(TOC_DIGEST.to_owned(), toc_digest.to_string())]),
            outcome,
        })
    }

    /// Digest of the blob.
    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }

    /// With the last bytes of the blob replaced.
    pub(crate) fn with_end(mut self, end: &[u8]) -> Result<Self> {
        let start = self.blob.len().checked_sub(end.len());
        let Some(start) = start else {
            bail!("the blob of {} is too short", self.name)
        };
        self.blob[start..].copy_from_slice(end);
        Ok(self)
    }

    pub(crate) fn annotate(mut self, key: &str, value: impl ToString) -> Self {
        self.annotations.insert(key.to_owned(), value.to_string());
        self
    }

    pub(crate) fn media_type(&self) -> &'static str {
        match self.format {
            Format::Estargz => media_type::OCI_LAYER_GZIP,
            Format::ZstdChunked => media_type::OCI_LAYER_ZSTD,
        }
    }
}

struct Hashed(Hasher);

impl io::Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
