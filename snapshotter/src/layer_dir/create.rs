//! Making a layer directory, at one stroke.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread;

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
    let (meta, table) = (directory.join(META), directory.join(CHUNKS));
    // Neither needs the other but for the checksum, and the disk can take one
    // while the other is thought about.
    let (described, tabled) = thread::scope(|scope| {
        let tabled = scope.spawn(|| {
            let tabled = Table::write(&table, new.toc, &placement)?;
            make_data(&directory.join(DATA), placement.data_size())?;
            Present::empty(tabled.chunks).save(directory, &new.digest)?;
            Ok::<_, Error>(tabled)
        });
        let described = describe(&meta, new.toc, &placement, write_meta);
        (described, tabled.join())
    });
    let described = described?;
    let tabled = tabled.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    tabled.finish(&table, &identity, described)?;
    crash_point!("compile.chunks-written");
    // All four names, of which some came after the map of what is present.
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|e| Error::io("make", directory, e))
}

fn make_data(path: &Path, size: u64) -> Result<(), Error> {
    File::create_new(path)
        .and_then(|file| {
            file.set_len(size)?;
            file.sync_all()
        })
        .map_err(|e| Error::io("make", path, e))?;
    crash_point!("compile.data-made");
    Ok(())
}

/// Writes the EROFS image; its size and checksum.
fn describe(
    path: &Path,
    toc: &Toc,
    placement: &Placement,
    write_meta: impl FnOnce(&Toc, &Placement, &mut File) -> Result<(), Problem>,
) -> Result<(u64, u32), Error> {
    let failed = |e: io::Error| Error::io("write", path, e);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(failed)?;
    write_meta(toc, placement, &mut file).map_err(|p| Error::new(path, p))?;
    crash_point!("compile.meta-written");
    file.rewind().map_err(failed)?;
    // The disk writes while the processor adds up.
    let (synced, checksum) = thread::scope(|scope| {
        let synced = scope.spawn(|| file.sync_all());
        let checksum = chunks::checksum(&file);
        (synced.join(), checksum)
    });
    let synced = synced.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    synced.map_err(failed)?;
    crash_point!("compile.meta-synced");
    let checksum = checksum.map_err(failed)?;
    Ok((file.metadata().map_err(failed)?.len(), checksum))
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

/// A chunk table that lacks its header.
struct Table {
    file: File,
    chunks: u32,
    crc: u32,
}

impl Table {
    fn write(path: &Path, toc: &Toc, placement: &Placement) -> Result<Self, Error> {
        let records = records(toc, placement).map_err(|p| Error::new(path, p))?;
        let mut by_unit: Vec<u32> = (0..records.len() as u32).collect();
        by_unit.sort_unstable_by_key(|&index| {
            let record = &records[index as usize];
            (record.unit.offset, record.inner_offset, index)
        });
        let mut crc = libdeflater::Crc::new();
        let mut write = || {
            let mut out = BufWriter::with_capacity(256 * RECORD, File::create_new(path)?);
            out.write_all(&[0; HEADER])?;
            let mut put = |bytes: &[u8]| {
                crc.update(bytes);
                out.write_all(bytes)
            };
            for record in &records {
                put(&record.encode())?;
            }
            for index in &by_unit {
                put(&index.to_le_bytes())?;
            }
            let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
            // Beside the tree, so that little is left to wait for.
            file.sync_data()?;
            Ok(file)
        };
        let file = write().map_err(|e| Error::io("write", path, e))?;
        Ok(Self {
            file,
            chunks: records.len() as u32,
            crc: crc.sum(),
        })
    }

    /// Puts the header before it, and makes it durable.
    fn finish(
        self,
        path: &Path,
        identity: &Identity,
        (meta_size, meta_crc): (u64, u32),
    ) -> Result<(), Error> {
        let reference = identity.reference.to_string();
        if reference.len() > REFERENCE_MAX {
            let what = "the image's reference is too long to keep".to_owned();
            return Err(Error::new(path, Problem::Unsupported(what)));
        }
        let fields = HeaderFields {
            identity,
            chunks: self.chunks,
            body_crc: self.crc,
            meta_size,
            meta_crc,
        };
        let header = chunks::encode_header(&fields, &reference);
        debug_assert_eq!(header.len(), HEADER);
        self.file
            .write_all_at(&header, 0)
            .and_then(|()| self.file.sync_all())
            .map_err(|e| Error::io("write", path, e))
    }
}
