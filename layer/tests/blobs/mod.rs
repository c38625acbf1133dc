//! Makes small blobs of either format, frame by frame, for tests of reading.

#![allow(clippy::unwrap_used, reason = "a helper of tests")]

use std::io::Write;

use sluice_layer::Format;
use sluice_oci::Digest;

/// A blob and what is in it.
pub(crate) struct Blob {
    pub(crate) bytes: Vec<u8>,
    pub(crate) json: Vec<u8>,
}

/// One or more units, and the entries that point into them.
pub(crate) struct Part {
    units: Vec<Vec<u8>>,
    entries: Vec<Entry>,
}

struct Entry {
    name: String,
    kind: &'static str,
    /// The whole file.
    file: Vec<u8>,
    chunk: std::ops::Range<usize>,
    unit: usize,
    inner: usize,
}

impl Part {
    pub(crate) fn file(name: &str, content: &[u8]) -> Self {
        Self::chunked(name, &[content])
    }

    pub(crate) fn chunked(name: &str, chunks: &[&[u8]]) -> Self {
        let mut entries = Vec::new();
        let mut offset = 0;
        for (unit, chunk) in chunks.iter().enumerate() {
            entries.push(Entry {
                name: name.to_owned(),
                kind: if unit == 0 { "reg" } else { "chunk" },
                file: chunks.concat(),
                chunk: offset..offset + chunk.len(),
                unit,
                inner: 0,
            });
            offset += chunk.len();
        }
        Self {
            units: chunks.iter().map(|chunk| chunk.to_vec()).collect(),
            entries,
        }
    }

    /// Files that share a unit, with something else between them.
    pub(crate) fn shared(files: &[(&str, &[u8])]) -> Self {
        let mut unit = Vec::new();
        let mut entries = Vec::new();
        for (name, content) in files {
            unit.extend_from_slice(b"a header");
            entries.push(Entry {
                name: (*name).to_owned(),
                kind: "reg",
                file: content.to_vec(),
                chunk: 0..content.len(),
                unit: 0,
                inner: unit.len(),
            });
            unit.extend_from_slice(content);
        }
        Self {
            units: vec![unit],
            entries,
        }
    }
}

impl Blob {
    pub(crate) fn new(format: Format, parts: &[Part]) -> Self {
        let mut bytes = compress(format, b"what comes before the first file");
        let mut lines = Vec::new();
        for part in parts {
            let offsets: Vec<usize> = part
                .units
                .iter()
                .map(|unit| {
                    let offset = bytes.len();
                    bytes.extend(compress(format, unit));
                    offset
                })
                .collect();
            for entry in &part.entries {
                let mut line = format!(
                    r#"{{"name":"{}","type":"{}","offset":{},"innerOffset":{},"chunkOffset":{},"chunkSize":{},"chunkDigest":"{}""#,
                    entry.name,
                    entry.kind,
                    offsets[entry.unit],
                    entry.inner,
                    entry.chunk.start,
                    entry.chunk.len(),
                    Digest::of(&entry.file[entry.chunk.clone()]),
                );
                if entry.kind == "reg" {
                    let (size, digest) = (entry.file.len(), Digest::of(&entry.file));
                    line += &format!(r#","size":{size},"digest":"{digest}""#);
                }
                lines.push(line + "}");
            }
        }
        let json = format!(r#"{{"version":1,"entries":[{}]}}"#, lines.join(",\n")).into_bytes();
        Self::with_toc(format, bytes, json)
    }

    /// Appends a TOC and footer to compressed content.
    pub(crate) fn with_toc(format: Format, mut bytes: Vec<u8>, json: Vec<u8>) -> Self {
        let offset = bytes.len() as u64;
        match format {
            Format::Estargz => {
                let mut tar = tar::Builder::new(Vec::new());
                let mut header = tar::Header::new_ustar();
                header.set_size(json.len() as u64);
                header.set_cksum();
                tar.append_data(&mut header, "stargz.index.json", &*json)
                    .unwrap();
                bytes.extend(compress(format, &tar.into_inner().unwrap()));
                bytes.extend(estargz_footer(offset));
            }
            Format::ZstdChunked => {
                let compressed = compress(format, &json);
                skippable(&mut bytes, &compressed);
                let footer = zstd_footer(offset + 8, compressed.len() as u64, json.len() as u64);
                skippable(&mut bytes, &footer);
            }
        }
        Self { bytes, json }
    }
}

pub(crate) fn compress(format: Format, content: &[u8]) -> Vec<u8> {
    match format {
        Format::Estargz => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(content).unwrap();
            gzip.finish().unwrap()
        }
        Format::ZstdChunked => zstd::bulk::compress(content, 1).unwrap(),
    }
}

pub(crate) fn skippable(bytes: &mut Vec<u8>, payload: &[u8]) {
    bytes.extend([0x50, 0x2a, 0x4d, 0x18]);
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
}

pub(crate) fn estargz_footer(offset: u64) -> Vec<u8> {
    let mut footer = vec![
        0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0, b'S', b'G', 22, 0,
    ];
    footer.extend(format!("{offset:016x}STARGZ").bytes());
    footer.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    footer
}

pub(crate) fn zstd_footer(offset: u64, compressed: u64, size: u64) -> Vec<u8> {
    let mut footer: Vec<u8> = [offset, compressed, size, 1]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect();
    footer.extend(b"GnUlInUx");
    footer
}
