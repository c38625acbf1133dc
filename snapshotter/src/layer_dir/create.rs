//! Making a layer directory, at one stroke.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, Write};
use std::path::Path;

use sluice_layer::{ChunkSource, NodeKind, Toc, TocTrust};
use sluice_oci::{Digest, Reference};

use super::chunks::{self, HEADER, HeaderFields, Kin, RECORD, REFERENCE_MAX, Record};
use super::error::{Error, Problem};
use super::placement::Placement;
use super::{CHUNKS, DATA, Identity, META, Present, TEMPORARY};

/// Larger chunks are refused: decoding one needs its size in memory.
const MAX_CHUNK: u64 = 64 << 20;
/// Larger units are refused, for the same reason.
const MAX_UNIT: u64 = 96 << 20;
/// No unit may decode to more than this.
const MAX_UNIT_OUTPUT: u64 = 1 << 30;

/// What a directory is made from.
pub struct NewLayer<'a> {
    /// The verified TOC.
    pub toc: &'a Toc,
    /// Digest of the blob.
    pub digest: Digest,
    /// Size of the blob.
    pub blob_size: u64,
    /// What the TOC was checked against.
    pub trust: TocTrust,
    /// Digest of the TOC as the blob stores it.
    pub compressed_toc: Digest,
    /// An image that holds the layer.
    pub reference: &'a Reference,
    /// The layer's number on the node.
    pub number: u64,
}

/// Makes `parent/<hex>` with all four files, durable and complete: until this
/// returns, no directory of that name exists. `write_meta` writes the EROFS
/// image.
pub fn create(
    parent: &Path,
    new: &NewLayer<'_>,
    write_meta: impl FnOnce(&Toc, &Placement, &mut File) -> Result<(), Problem>,
) -> Result<(), Error> {
    let hex = new.digest.hex();
    let path = parent.join(&hex);
    let temporary = parent.join(format!("{TEMPORARY}{hex}"));
    let _ = fs::remove_dir_all(&temporary);
    fs::create_dir(&temporary).map_err(|e| Error::io("make", &temporary, e))?;
    crash_point!("compile.directory-made");
    let made = fill(&temporary, new, write_meta).and_then(|()| {
        crash_point!("compile.filled");
        fs::rename(&temporary, &path)
            .and_then(|()| {
                crash_point!("compile.named");
                File::open(parent)?.sync_all()
            })
            .map_err(|e| Error::io("make", &path, e))
    });
    crash_point!("compile.synced");
    if made.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    made
}

fn fill(
    directory: &Path,
    new: &NewLayer<'_>,
    write_meta: impl FnOnce(&Toc, &Placement, &mut File) -> Result<(), Problem>,
) -> Result<(), Error> {
    let placement = Placement::new(new.toc);
    let identity = Identity {
        digest: new.digest,
        blob_size: new.blob_size,
        format: new.toc.format(),
        trust: new.trust,
        compressed_toc: new.compressed_toc,
        reference: new.reference.clone(),
        number: new.number,
        toc_offset: new.toc.toc_offset(),
        prefetch_end: new.toc.prefetch_end(),
        data_size: placement.data_size(),
    };
    let at = |name: &str| directory.join(name);
    let meta = at(META);
    let failed = |e: io::Error| Error::io("write", &meta, e);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&meta)
        .map_err(failed)?;
    write_meta(new.toc, &placement, &mut file).map_err(|p| Error::new(&meta, p))?;
    crash_point!("compile.meta-written");
    file.sync_all().map_err(failed)?;
    crash_point!("compile.meta-synced");
    file.rewind().map_err(failed)?;
    let meta_crc = chunks::checksum(&file).map_err(failed)?;
    let meta_size = file.metadata().map_err(failed)?.len();

    let data = at(DATA);
    File::create_new(&data)
        .and_then(|file| {
            file.set_len(placement.data_size())?;
            file.sync_all()
        })
        .map_err(|e| Error::io("make", &data, e))?;
    crash_point!("compile.data-made");

    let table = at(CHUNKS);
    let records = records(new.toc, &placement).map_err(|p| Error::new(&table, p))?;
    write_chunks(&table, &identity, (meta_size, meta_crc), &records)?;
    crash_point!("compile.chunks-written");
    let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
    Present::empty(count).save(directory, &new.digest)
}

/// The chunks in the order of `data`, without those of zeros.
fn records(toc: &Toc, placement: &Placement) -> Result<Vec<Record>, Problem> {
    let unsupported = |what: String| Problem::Unsupported(what);
    let mut records = Vec::with_capacity(toc.chunks().len());
    let kin = kin(toc);
    for (index, node) in toc.nodes().iter().enumerate() {
        let NodeKind::Regular(content) = &node.kind else {
            continue;
        };
        let start = placement.start_at(index);
        let range = content.chunks.start as usize..content.chunks.end as usize;
        let mut starts_file = true;
        for chunk in &toc.chunks()[range] {
            let ChunkSource::Blob { unit, inner_offset } = chunk.source else {
                starts_file = false;
                continue;
            };
            if chunk.size > MAX_CHUNK {
                return Err(unsupported(format!(
                    "a chunk of {} bytes; at most {MAX_CHUNK} are supported",
                    chunk.size
                )));
            }
            if unit.size == 0
                || unit.size > MAX_UNIT
                || inner_offset.saturating_add(chunk.size) > MAX_UNIT_OUTPUT
            {
                return Err(unsupported(format!(
                    "a compressed unit of {} bytes; 1 to {MAX_UNIT} are supported",
                    unit.size
                )));
            }
            records.push(Record {
                data_offset: start + chunk.file_offset,
                size: chunk.size as u32,
                unit,
                inner_offset: inner_offset as u32,
                starts_file: std::mem::take(&mut starts_file),
                kin: kin[index],
                digest: chunk.digest,
            });
        }
    }
    if u32::try_from(records.len()).is_err() {
        return Err(unsupported("more than 4,294,967,295 chunks".to_owned()));
    }
    records.sort_unstable_by_key(|record| record.data_offset);
    Ok(records)
}

/// What each node's name, or the last of its names, tells.
fn kin(toc: &Toc) -> Vec<Kin> {
    let mut kin = vec![Kin::default(); toc.nodes().len()];
    for (number, node) in (0..).zip(toc.nodes()) {
        if let NodeKind::Directory(directory) = &node.kind {
            for child in &directory.children {
                kin[child.node.index()] = Kin::new(number, &child.name);
            }
        }
    }
    kin
}

fn write_chunks(
    path: &Path,
    identity: &Identity,
    (meta_size, meta_crc): (u64, u32),
    records: &[Record],
) -> Result<(), Error> {
    let mut by_unit: Vec<u32> = (0..records.len() as u32).collect();
    by_unit.sort_unstable_by_key(|&index| {
        let record = &records[index as usize];
        (record.unit.offset, record.inner_offset, index)
    });
    let mut crc = libdeflater::Crc::new();
    for record in records {
        crc.update(&record.encode());
    }
    for index in &by_unit {
        crc.update(&index.to_le_bytes());
    }
    let reference = identity.reference.to_string();
    if reference.len() > REFERENCE_MAX {
        let what = "the image's reference is too long to keep".to_owned();
        return Err(Error::new(path, Problem::Unsupported(what)));
    }
    let fields = HeaderFields {
        identity,
        chunks: records.len() as u32,
        body_crc: crc.sum(),
        meta_size,
        meta_crc,
    };
    let header = chunks::encode_header(&fields, &reference);
    debug_assert_eq!(header.len(), HEADER);
    let write = || {
        let mut out = BufWriter::with_capacity(256 * RECORD, File::create_new(path)?);
        out.write_all(&header)?;
        for record in records {
            out.write_all(&record.encode())?;
        }
        for index in &by_unit {
            out.write_all(&index.to_le_bytes())?;
        }
        out.into_inner()
            .map_err(io::IntoInnerError::into_error)?
            .sync_all()
    };
    write().map_err(|e| Error::io("write", path, e))
}
