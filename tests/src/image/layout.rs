//! Writing OCI layouts.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sluice_oci::{Descriptor, Digest, Hasher, Index, Manifest, Platform, media_type};

use super::Image;

/// How a layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    None,
    /// As most builders do.
    Gzip,
    /// One Zstandard frame.
    Zstd,
}

/// An OCI layout while it is written.
pub struct LayoutWriter {
    dir: PathBuf,
    layers: Vec<Descriptor>,
    diff_ids: Vec<Digest>,
}

impl LayoutWriter {
    /// In a new directory.
    pub fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir.join("blobs/sha256"))
            .with_context(|| format!("cannot make {}", dir.display()))?;
        fs::write(dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(Self {
            dir: dir.to_owned(),
            layers: Vec::new(),
            diff_ids: Vec::new(),
        })
    }

    /// In a new directory, on top of another image, whose layers it shares.
    pub fn on(base: &Image, dir: &Path) -> Result<Self> {
        let mut writer = Self::new(dir)?;
        let from = base.layout().join("blobs/sha256");
        for layer in read_manifest(base.layout())?.layers {
            fs::copy(from.join(layer.digest.hex()), writer.blob(layer.digest))?;
            writer.layers.push(layer);
        }
        let config = read_manifest(base.layout())?.config.digest;
        let config: serde_json::Value =
            serde_json::from_slice(&fs::read(from.join(config.hex()))?)?;
        writer.diff_ids = serde_json::from_value(config["rootfs"]["diff_ids"].clone())?;
        Ok(writer)
    }

    /// Adds a layer on top; `write` writes its tar.
    pub fn layer(
        &mut self,
        compression: Compression,
        write: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        let draft = self.dir.join("draft");
        let file = Hashing::new(BufWriter::with_capacity(1 << 20, File::create(&draft)?));
        let (media, file, diff_id) = match compression {
            Compression::None => {
                let mut tar = Hashing::new(file);
                write(&mut tar)?;
                (media_type::OCI_LAYER, tar.inner, tar.hasher)
            }
            Compression::Gzip => {
                let gzip = flate2::write::GzEncoder::new(file, flate2::Compression::new(6));
                let mut tar = Hashing::new(gzip);
                write(&mut tar)?;
                (media_type::OCI_LAYER_GZIP, tar.inner.finish()?, tar.hasher)
            }
            Compression::Zstd => {
                let mut tar = Hashing::new(zstd::Encoder::new(file, 3)?);
                write(&mut tar)?;
                (media_type::OCI_LAYER_ZSTD, tar.inner.finish()?, tar.hasher)
            }
        };
        let size = file.count;
        let digest = file.hasher.finish();
        file.inner
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        fs::rename(&draft, self.blob(digest))?;
        self.layers.push(Descriptor::new(media, digest, size));
        self.diff_ids.push(diff_id.finish());
        Ok(())
    }

    /// Adds a layer on top whose blob is what it is: neither bytes nor claims
    /// are looked at.
    pub fn raw_layer(
        &mut self,
        media: &str,
        blob: &[u8],
        diff_id: Digest,
        annotations: BTreeMap<String, String>,
    ) -> Result<Digest> {
        let mut layer = self.document(media, blob)?;
        layer.annotations = annotations;
        let digest = layer.digest;
        self.layers.push(layer);
        self.diff_ids.push(diff_id);
        Ok(digest)
    }

    /// Writes configuration, manifest and index under a tag.
    pub fn finish(self, tag: &str, command: &[&str]) -> Result<()> {
        let running = json!({
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": command,
        });
        self.finish_with(tag, &running)
    }

    /// The same, with what the configuration says of how it is run.
    pub fn finish_with(self, tag: &str, running: &Value) -> Result<()> {
        let platform = Platform::of_this_machine();
        let history: Vec<_> = (self.layers.iter())
            .map(|_| json!({"created": "2020-01-01T00:00:00Z", "created_by": "test harness"}))
            .collect();
        let config = json!({
            "created": "2020-01-01T00:00:00Z",
            "architecture": platform.architecture,
            "os": platform.os,
            "config": running,
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
            "history": history,
        });
        let config = self.document(media_type::OCI_CONFIG, &serde_json::to_vec(&config)?)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type::OCI_MANIFEST,
            "config": config,
            "layers": self.layers,
        });
        self.index(&serde_json::to_vec(&manifest)?, tag)
    }

    /// Writes a manifest and the index that names it.
    fn index(&self, manifest: &[u8], tag: &str) -> Result<()> {
        let mut manifest = self.document(media_type::OCI_MANIFEST, manifest)?;
        let key = "org.opencontainers.image.ref.name".to_owned();
        manifest.annotations.insert(key, tag.to_owned());
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(self.dir.join("index.json"), serde_json::to_vec(&index)?)?;
        Ok(())
    }

    fn document(&self, media: &str, bytes: &[u8]) -> Result<Descriptor> {
        let digest = Digest::of(bytes);
        fs::write(self.blob(digest), bytes)?;
        Ok(Descriptor::new(media, digest, bytes.len() as u64))
    }

    fn blob(&self, digest: Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }
}

/// The manifest of a layout's only image.
pub fn read_manifest(layout: &Path) -> Result<Manifest> {
    let read =
        |path: PathBuf| fs::read(&path).with_context(|| format!("cannot read {}", path.display()));
    let index: Index = serde_json::from_slice(&read(layout.join("index.json"))?)?;
    let manifest = index.manifests.first().context("the layout is empty")?;
    let blob = layout.join("blobs/sha256").join(manifest.digest.hex());
    Ok(serde_json::from_slice(&read(blob)?)?)
}

/// Digests and counts what passes through.
struct Hashing<W> {
    inner: W,
    hasher: Hasher,
    count: u64,
}

impl<W: Write> Hashing<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            hasher: Hasher::new(),
            count: 0,
        }
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.count += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Puts a layer, compressed with gzip, on top of a layout's only image.
pub fn append_layer(layout: &Path, tag: &str, gzip: &[u8]) -> Result<()> {
    let writer = LayoutWriter {
        dir: layout.to_owned(),
        layers: Vec::new(),
        diff_ids: Vec::new(),
    };
    let mut manifest = read_manifest(layout)?;
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(writer.blob(manifest.config.digest))?)?;

    let mut tar = Hashing::new(io::sink());
    io::copy(&mut flate2::read::MultiGzDecoder::new(gzip), &mut tar)?;
    config["rootfs"]["diff_ids"]
        .as_array_mut()
        .context("the configuration has no diff IDs")?
        .push(json!(tar.hasher.finish()));
    if let Some(history) = config["history"].as_array_mut() {
        history.push(json!({"created_by": "test harness"}));
    }
    manifest
        .layers
        .push(writer.document(media_type::OCI_LAYER_GZIP, gzip)?);
    manifest.config = Descriptor {
        media_type: manifest.config.media_type.clone(),
        ..writer.document(media_type::OCI_CONFIG, &serde_json::to_vec(&config)?)?
    };
    writer.index(&serde_json::to_vec(&manifest)?, tag)
}
