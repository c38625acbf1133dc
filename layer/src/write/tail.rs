//! What follows the units: TOC, tar-split and footer.

use std::collections::BTreeMap;
use std::ops::Range;

use sluice_oci::Digest;

use super::entries::PlacedChunk;
use super::header::{BLOCK, Header, Kind, encode};
use super::{CompressedUnit, Split, TOC_NAME, UnitCompressor, WriteError};
use crate::annotations::{
    MANIFEST_CHECKSUM, MANIFEST_POSITION, START_CHUNKS, START_RANGES, TARSPLIT_POSITION,
    TOC_DIGEST, TOC_POSITION, UNCOMPRESSED_SIZE, ZSTD_CHUNKED_PREFIXES, toc_position,
};
use crate::{Format, StartRanges};

const SKIPPABLE_MAGIC: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
/// Bytes of a skippable frame before its payload.
const SKIPPABLE_HEADER: u64 = 8;
/// The only type of manifest that exists.
const MANIFEST_TYPE: u64 = 1;
const ZSTD_FOOTER_MAGIC: [u8; 8] = *b"GnUlInUx";

/// Gives each unit its place in the blob. Takes them in their order.
#[derive(Debug, Default)]
pub struct Assembler {
    offset: u64,
    chunks: Vec<PlacedChunk>,
}

impl Assembler {
    /// An empty blob.
    pub fn new() -> Self {
        Self::default()
    }

    /// Places the next unit: its bytes are next in the blob.
    pub fn place(&mut self, unit: &CompressedUnit) {
        if let Some(digest) = unit.chunk {
            self.chunks.push(PlacedChunk {
                offset: self.offset,
                digest,
            });
        }
        self.offset += unit.bytes.len() as u64;
    }

    /// Where a chunk lies, with what follows it up to the next one.
    fn range(&self, chunk: usize) -> Option<Range<u64>> {
        let start = self.chunks.get(chunk)?.offset;
        let next = self.chunks.get(chunk + 1);
        Some(start..next.map_or(self.offset, |next| next.offset))
    }
}

/// The end of a blob, and what the image's documents must say of the layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tail {
    /// The bytes after the last unit.
    pub bytes: Vec<u8>,
    /// Digest of the layer's uncompressed tar.
    pub diff_id: Digest,
    /// Digest of the tar that was read, where it is known: when entries
    /// changed places it is not.
    pub input_diff_id: Option<Digest>,
    /// Size of the uncompressed tar.
    pub uncompressed_size: u64,
    /// Digest of the TOC's uncompressed JSON.
    pub toc_digest: Digest,
    /// Annotations for the layer's descriptor.
    pub annotations: BTreeMap<String, String>,
}

/// Makes the end of the blob.
pub fn finish(split: Split, placed: Assembler) -> Result<Tail, WriteError> {
    let mut compressor = UnitCompressor::new(&split.options)?;
    let tar_split = split.tar_split.as_ref().map(|t| t.digest);
    let json = split.entries.json(&placed.chunks, tar_split)?;
    let toc_digest = Digest::of(&json);
    let mut annotations = BTreeMap::new();
    let mut annotate = |key: String, value: String| annotations.insert(key, value);
    let [podman, common] = ZSTD_CHUNKED_PREFIXES;
    annotate(TOC_DIGEST.to_owned(), toc_digest.to_string());
    let mut output = split.output;
    let mut size = split.size;
    let (format, json_size) = (split.options.format, json.len());
    let bytes = match format {
        Format::Estargz => {
            let tar = toc_tar(json);
            output.update(&tar);
            size += tar.len() as u64;
            let mut bytes = compressor.bytes(&tar)?;
            let position = toc_position(format, placed.offset, bytes.len(), json_size);
            annotate(TOC_POSITION.to_owned(), position);
            bytes.extend(estargz_footer(placed.offset));
            bytes
        }
        Format::ZstdChunked => {
            let toc = compressor.bytes(&json)?;
            let toc_offset = placed.offset + SKIPPABLE_HEADER;
            let position = toc_position(format, toc_offset, toc.len(), json_size);
            annotate(TOC_POSITION.to_owned(), position);
            let position = format!("{toc_offset}:{}:{json_size}:{MANIFEST_TYPE}", toc.len());
            let checksum = Digest::of(&toc).to_string();
            annotate(format!("{common}{MANIFEST_CHECKSUM}"), checksum);
            annotate(format!("{common}{MANIFEST_POSITION}"), position.clone());
            // Not the checksum of this family: containers/image from 2024 on
            // refuses a layer that has it beside `toc.digest`, even for an
            // ordinary pull.
            annotate(format!("{podman}{MANIFEST_POSITION}"), position);
            let mut bytes = Vec::new();
            skippable(&mut bytes, &toc)?;
            if let Some(tar_split) = &split.tar_split {
                let offset = placed.offset + bytes.len() as u64 + SKIPPABLE_HEADER;
                annotate(
                    format!("{podman}{TARSPLIT_POSITION}"),
                    format!(
                        "{offset}:{}:{}",
                        tar_split.compressed.len(),
                        tar_split.uncompressed_size
                    ),
                );
                skippable(&mut bytes, &tar_split.compressed)?;
            }
            let mut footer = Vec::with_capacity(40);
            for number in [
                toc_offset,
                toc.len() as u64,
                json_size as u64,
                MANIFEST_TYPE,
            ] {
                footer.extend(number.to_le_bytes());
            }
            footer.extend(ZSTD_FOOTER_MAGIC);
            skippable(&mut bytes, &footer)?;
            bytes
        }
    };
    annotate(UNCOMPRESSED_SIZE.to_owned(), size.to_string());
    if let Some(read_at_start) = split.read_at_start {
        if let Some(chunks) = read_at_start.chunks.annotation() {
            annotate(START_CHUNKS.to_owned(), chunks);
        }
        let ranges = read_at_start
            .numbers
            .iter()
            .filter_map(|&chunk| placed.range(chunk));
        if let Some(ranges) = StartRanges::of(ranges).annotation() {
            annotate(START_RANGES.to_owned(), ranges);
        }
    }
    Ok(Tail {
        bytes,
        diff_id: output.finish(),
        input_diff_id: split.input,
        uncompressed_size: size,
        toc_digest,
        annotations,
    })
}

/// A tar of the TOC alone, which ends the layer's tar.
fn toc_tar(json: Vec<u8>) -> Vec<u8> {
    let mut tar = encode(&Header {
        kind: Kind::Regular,
        name: TOC_NAME.into(),
        link: Vec::new(),
        mode: 0,
        uid: 0,
        gid: 0,
        user: Vec::new(),
        group: Vec::new(),
        size: json.len() as u64,
        mtime: Default::default(),
        atime: None,
        ctime: None,
        dev_major: 0,
        dev_minor: 0,
        xattrs: BTreeMap::new(),
    });
    tar.extend(json);
    tar.resize(tar.len().next_multiple_of(BLOCK) + 2 * BLOCK, 0);
    tar
}

/// A gzip member of an empty stored block whose extra field holds the TOC's
/// offset.
fn estargz_footer(toc_offset: u64) -> Vec<u8> {
    let mut footer = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff, 26, 0];
    footer.extend(b"SG\x16\0");
    footer.extend(format!("{toc_offset:016x}STARGZ").bytes());
    footer.extend([1, 0, 0, 0xff, 0xff]);
    footer.extend([0; 8]);
    footer
}

fn skippable(out: &mut Vec<u8>, payload: &[u8]) -> Result<(), WriteError> {
    let size = u32::try_from(payload.len())
        .map_err(|_| WriteError::unsupported("the TOC is larger than 4 GiB"))?;
    out.extend(SKIPPABLE_MAGIC);
    out.extend(size.to_le_bytes());
    out.extend(payload);
    Ok(())
}
