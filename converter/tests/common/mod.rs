//! OCI layouts made by hand, and what the tests share.
#![allow(clippy::unwrap_used, dead_code, reason = "a test helper")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sluice_converter::{
    Conversion, Error, Event, LayerOutcome, Location, Platforms, Progress, Report, Verification,
};
use sluice_layer::Format;
use sluice_layer::write::Options;
use sluice_oci::{Descriptor, Digest, Manifest, media_type};
use sluice_registry::{Client, Config};
use tempfile::TempDir;

/// A directory with a layout `in` to convert to a layout `out`.
pub(crate) struct Bench {
    pub(crate) directory: TempDir,
}

/// Keeps what it hears.
#[derive(Debug, Default)]
pub(crate) struct Log(
    pub(crate) Mutex<Vec<(Digest, LayerOutcome)>>,
    pub(crate) Mutex<Vec<String>>,
);

impl Progress for Log {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::LayerEnds { layer, outcome } => {
                self.0.lock().unwrap().push((layer, outcome.clone()));
            }
            Event::NotFound { name } => self.1.lock().unwrap().push(name.to_owned()),
            _ => {}
        }
    }
}

impl Bench {
    pub(crate) fn new() -> Self {
        let bench = Self {
            directory: TempDir::new().unwrap(),
        };
        let layout = bench.path("in");
        fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
        fs::write(
            layout.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        fs::create_dir(bench.path("scratch")).unwrap();
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Stores a blob in the source.
    pub(crate) fn blob(&self, media_type: &str, bytes: &[u8]) -> Descriptor {
        let digest = Digest::of(bytes);
        fs::write(self.blob_path("in", digest), bytes).unwrap();
        Descriptor::new(media_type, digest, bytes.len() as u64)
    }

    pub(crate) fn blob_path(&self, layout: &str, digest: Digest) -> PathBuf {
        self.path(layout).join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn layer(&self, tar: &[u8]) -> (Descriptor, Digest) {
        (
            self.blob(media_type::OCI_LAYER_GZIP, &gzip(tar)),
            Digest::of(tar),
        )
    }

    /// A manifest of these layers, with fields that Sluice does not know.
    pub(crate) fn manifest(&self, layers: &[(Descriptor, Digest)]) -> Descriptor {
        let config = json!({
            "created": "2020-01-01T00:00:00Z",
            "architecture": "amd64",
            "os": "linux",
            "x-unknown": {"kept": [1, 2.5, null]},
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|l| l.1).collect::<Vec<_>>()},
            "history": [{"created_by": "test"}],
        });
        let config = self.blob(media_type::OCI_CONFIG, config.to_string().as_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media_type::OCI_MANIFEST,
            "config": config,
            "layers": layers.iter().map(|l| &l.0).collect::<Vec<_>>(),
            "annotations": {"org.example": "kept"},
            "subject": {"mediaType": "x/y", "digest": Digest::of(b"s"), "size": 1},
            "x-unknown": true,
        });
        self.blob(media_type::OCI_MANIFEST, manifest.to_string().as_bytes())
    }

    /// Names documents in the source's index.
    pub(crate) fn name(&self, images: &[(&str, &Descriptor)]) {
        let manifests: Vec<Value> = images
            .iter()
            .map(|(tag, image)| {
                let mut image = serde_json::to_value(image).unwrap();
                image["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
                image
            })
            .collect();
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.path("in/index.json"), index.to_string()).unwrap();
    }

    /// An image of one layer, named `v1`.
    pub(crate) fn simple(tar: &[u8]) -> (Self, Descriptor) {
        let bench = Self::new();
        let layer = bench.layer(tar);
        let manifest = bench.manifest(std::slice::from_ref(&layer));
        bench.name(&[("v1", &manifest)]);
        (bench, layer.0)
    }

    pub(crate) fn conversion(&self, format: Format) -> Conversion {
        Conversion {
            options: Options {
                chunk_size: 16 << 10,
                ..Options::new(format)
            },
            platforms: Platforms::All,
            prioritized: Vec::new(),
            start_reads: None,
            force: false,
            scratch: self.path("scratch"),
            workers: NonZero::new(2).unwrap(),
        }
    }

    pub(crate) fn location(&self, layout: &str) -> Location {
        format!("oci:{}:v1", self.path(layout).display())
            .parse()
            .unwrap()
    }

    /// Converts `in` to `out`.
    pub(crate) async fn convert(
        &self,
        conversion: &Conversion,
    ) -> Result<(Report, Arc<Log>), Error> {
        self.convert_between("in", "out", conversion).await
    }

    pub(crate) async fn convert_between(
        &self,
        from: &str,
        to: &str,
        conversion: &Conversion,
    ) -> Result<(Report, Arc<Log>), Error> {
        let log = Arc::new(Log::default());
        let report = sluice_converter::convert(
            &client(),
            &self.location(from),
            &self.location(to),
            conversion,
            Arc::clone(&log) as Arc<dyn Progress>,
        )
        .await?;
        Ok((report, log))
    }

    pub(crate) async fn verify(&self, layout: &str) -> Verification {
        sluice_converter::verify(&client(), &self.location(layout), &self.path("scratch"))
            .await
            .unwrap()
    }

    /// A document of a layout.
    pub(crate) fn document(&self, layout: &str, digest: Digest) -> Value {
        let bytes = fs::read(self.blob_path(layout, digest)).unwrap();
        assert_eq!(Digest::of(&bytes), digest);
        serde_json::from_slice(&bytes).unwrap()
    }

    pub(crate) fn manifest_of(&self, layout: &str, digest: Digest) -> Manifest {
        serde_json::from_value(self.document(layout, digest)).unwrap()
    }

    /// Every file below a directory with its content's digest.
    pub(crate) fn snapshot(&self, name: &str) -> BTreeMap<PathBuf, Option<Digest>> {
        let mut found = BTreeMap::new();
        let mut pending = vec![self.path(name)];
        while let Some(path) = pending.pop() {
            if path.is_dir() {
                pending.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
                found.insert(path, None);
            } else if path.exists() {
                found.insert(path.clone(), Some(Digest::of(&fs::read(&path).unwrap())));
            }
        }
        found
    }
}

pub(crate) fn client() -> Client {
    Client::new(Config::default()).unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let level = flate2::Compression::new(1);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn gunzip(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path).unwrap();
    std::io::Read::read_to_end(&mut flate2::read::MultiGzDecoder::new(file), &mut bytes).unwrap();
    bytes
}

/// Bytes that hardly compress, the same for the same seed.
pub(crate) fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// A tar of plain files.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_600_000_000);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A tar with some of everything that ordinary images hold.
pub(crate) fn usual_tar() -> Vec<u8> {
    tar(&[
        ("etc/hosts", b"127.0.0.1 localhost\n"),
        ("usr/bin/tool", &noise(1, 50_000)),
        ("usr/lib/empty", b""),
        ("usr/lib/zeros", &[0; 40_000]),
    ])
}
