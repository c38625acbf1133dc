//! Small real eStargz blobs for tests.

mod registry;

use std::io::Write as _;

use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sluice_layer::{TocTrust, locate_toc};
use sluice_oci::Digest;

pub(crate) use registry::{Fault, Registry};

/// A file of a sample.
pub(crate) struct SampleFile {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
}

/// How a sample is laid out.
pub(crate) struct Layout {
    /// Bytes of a chunk, uncompressed.
    pub(crate) chunk: usize,
    /// Whether neighbouring files share gzip members of up to this many bytes.
    pub(crate) shared: usize,
    /// How many files come before the landmark.
    pub(crate) prioritized: usize,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            chunk: 64 << 10,
            shared: 0,
            prioritized: 0,
        }
    }
}

/// A blob, and what a correct reader finds in it.
pub(crate) struct Sample {
    pub(crate) blob: Vec<u8>,
    pub(crate) toc_digest: Digest,
    pub(crate) files: Vec<SampleFile>,
}

/// Bytes that do not compress, different for each `seed`.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

/// `count` files of `size` bytes of noise.
pub(crate) fn files(count: usize, size: usize) -> Vec<SampleFile> {
    (0..count)
        .map(|index| SampleFile {
            name: format!("dir/file{index:05}"),
            content: noise(index as u64 + 1, size),
        })
        .collect()
}

impl Sample {
    pub(crate) fn new(files: Vec<SampleFile>, layout: &Layout) -> Self {
        let mut blob = Vec::new();
        let mut entries = vec![json!({"name": "dir/", "type": "dir", "mode": 0o755})];
        let mut member = Vec::new();
        for (index, file) in files.iter().enumerate() {
            if layout.prioritized > 0 && index == layout.prioritized {
                finish_member(&mut blob, &mut member);
                entries.push(landmark(blob.len()));
                blob.extend(gzip(b"\x0f"));
            }
            let digest = Digest::of(&file.content).to_string();
            let mut first = true;
            for (position, chunk) in (0..).zip(file.content.chunks(layout.chunk)) {
                if member.len() + chunk.len() > layout.shared {
                    finish_member(&mut blob, &mut member);
                }
                let mut entry = json!({
                    "name": file.name,
                    "type": if first { "reg" } else { "chunk" },
                    "offset": blob.len(),
                    "chunkOffset": position * layout.chunk,
                    "chunkSize": chunk.len(),
                    "chunkDigest": Digest::of(chunk).to_string(),
                });
                if !member.is_empty() {
                    entry["innerOffset"] = json!(member.len());
                }
                if std::mem::take(&mut first) {
                    entry["size"] = json!(file.content.len());
                    entry["mode"] = json!(0o644);
                    entry["digest"] = json!(digest);
                }
                entries.push(entry);
                member.extend_from_slice(chunk);
            }
        }
        finish_member(&mut blob, &mut member);
        let json = serde_json::to_vec(&json!({"version": 1, "entries": entries})).unwrap();
        let toc_digest = Digest::of(&json);
        let offset = blob.len();
        let mut tar = tar_header("stargz.index.json", json.len());
        tar.extend_from_slice(&json);
        tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
        blob.extend(gzip(&tar));
        blob.extend(footer(offset));
        Self {
            blob,
            toc_digest,
            files,
        }
    }

    /// The layer that the converter's writer makes of the files, and the
    /// annotations it wants.
    pub(crate) fn converted(
        files: Vec<SampleFile>,
        options: &sluice_layer::write::Options,
    ) -> (Self, Value) {
        let mut tar = Vec::new();
        for file in &files {
            tar.extend(tar_header(&file.name, file.content.len()));
            tar.extend_from_slice(&file.content);
            tar.resize(tar.len().next_multiple_of(512), 0);
        }
        tar.resize(tar.len() + 1024, 0);
        let (blob, tail) = sluice_layer::write::write_layer(&tar, options, &[]).unwrap();
        let sample = Self {
            blob,
            toc_digest: tail.toc_digest,
            files,
        };
        (sample, json!(tail.annotations))
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }

    pub(crate) fn trust(&self) -> TocTrust {
        TocTrust::Uncompressed(self.toc_digest)
    }

    pub(crate) fn toc(&self) -> sluice_layer::Toc {
        let size = self.blob.len() as u64;
        let location = locate_toc(&self.blob, size).unwrap();
        let compressed = location.slice_of(&self.blob, size).unwrap();
        sluice_layer::read_toc(&location, compressed, &self.trust(), &Default::default()).unwrap()
    }
}

fn landmark(offset: usize) -> Value {
    let digest = Digest::of(b"\x0f").to_string();
    json!({
        "name": ".prefetch.landmark", "type": "reg", "size": 1, "offset": offset,
        "digest": digest, "chunkDigest": digest,
    })
}

fn finish_member(blob: &mut Vec<u8>, member: &mut Vec<u8>) {
    if !member.is_empty() {
        blob.extend(gzip(member));
        member.clear();
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn tar_header(name: &str, size: usize) -> Vec<u8> {
    let mut header = vec![0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000444\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

fn footer(offset: usize) -> Vec<u8> {
    let mut footer = vec![
        0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0,
    ];
    footer.extend_from_slice(format!("{offset:016x}STARGZ").as_bytes());
    footer.extend_from_slice(&[1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    footer
}
