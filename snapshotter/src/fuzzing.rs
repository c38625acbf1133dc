//! What must hold for any bytes in the files of a layer, in containerd's calls
//! and in the keeper's messages. The fuzz targets and this crate's tests run
//! these.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::SystemTime;

use crate::erofs::{FileType, Image, Ino};
use crate::fuse;
use crate::keeper::supervise;
use crate::layer_dir::{self, LayerDir};
use crate::service::{Filter, Info, Key, Kind, Labels, layer_request, target};

/// Inodes, entries and chunks that are looked at.
const MOST: usize = 2000;

/// A `meta.erofs` is refused, or can be walked without leaving it.
pub fn erofs(data: &[u8]) {
    const SUPERBLOCK: usize = 1024;
    let mut bytes = data.to_vec();
    // So that more than the checksum is tried.
    if let Some(block) = bytes.get_mut(SUPERBLOCK..4096) {
        block[4..8].fill(0);
        let sum = crate::erofs::crc32c(block);
        block[4..8].copy_from_slice(&sum.to_le_bytes());
    }
    let Ok(image) = Image::new(bytes) else { return };
    let mut pending = vec![image.root()];
    let mut seen = 0;
    while let Some(ino) = pending.pop().filter(|_| seen < MOST) {
        seen += 1;
        let Ok(attributes) = image.attributes(ino) else {
            continue;
        };
        for xattr in image.xattrs(ino).into_iter().flatten().take(MOST).flatten() {
            let name = [xattr.prefix, xattr.suffix].concat();
            let _ = image.xattr(ino, OsStr::from_bytes(&name));
        }
        match attributes.kind {
            FileType::Directory => {
                for entry in image
                    .entries(ino, 0)
                    .into_iter()
                    .flatten()
                    .take(MOST)
                    .flatten()
                {
                    assert!((1..=255).contains(&entry.name.len()));
                    let _ = image.lookup(ino, OsStr::from_bytes(entry.name));
                    pending.push(entry.ino);
                }
            }
            FileType::Regular => {
                if let Ok(Some(extent)) = image.data_extent(ino) {
                    let end = extent.offset.checked_add(extent.size);
                    assert!(end.is_some_and(|end| end <= image.data_size()));
                }
            }
            FileType::Symlink => drop(image.symlink_target(ino).map(<[u8]>::len)),
            _ => {}
        }
    }
    let _ = image.attributes(Ino(u64::MAX));
}

/// A `chunks` is refused, or every look-up in it ends.
pub fn chunks(data: &[u8]) {
    const HEADER: usize = 4096;
    let mut bytes = data.to_vec();
    if let Some((header, body)) = bytes.split_first_chunk_mut::<HEADER>() {
        header[28..32].copy_from_slice(&libdeflater::crc32(body).to_le_bytes());
        let sum = libdeflater::crc32(&header[..HEADER - 4]);
        header[HEADER - 4..].copy_from_slice(&sum.to_le_bytes());
    }
    let meta_size = bytes
        .get(64..72)
        .map(|size| size.try_into().map(u64::from_le_bytes));
    let Ok(scratch) = tempfile::tempdir() else {
        return;
    };
    let path = scratch.path();
    if std::fs::write(path.join(layer_dir::CHUNKS), bytes).is_err() {
        return;
    }
    let (Ok(identity), Some(Ok(meta_size))) = (LayerDir::identify(path), meta_size) else {
        return;
    };
    for (name, size) in [
        (layer_dir::META, meta_size),
        (layer_dir::DATA, identity.data_size),
    ] {
        let made = File::create(path.join(name)).and_then(|file| file.set_len(size));
        if made.is_err() {
            return;
        }
    }
    let Ok(dir) = LayerDir::open(path, identity.digest) else {
        return;
    };
    let table = dir.chunks();
    for chunk in table.overlapping(0, u64::MAX).take(MOST) {
        let record = table.get(chunk);
        assert!(table.file_of(chunk).contains(&chunk));
        let _ = table
            .after(chunk)
            .chain(table.before(chunk))
            .take(MOST)
            .count();
        let _ = table
            .overlapping(record.data_offset, record.size.into())
            .take(MOST)
            .count();
        let _ = table.of_unit(record.unit.offset).take(MOST).count();
        assert!(!dir.present().contains(chunk));
        assert!(record.data_end() >= record.data_offset);
    }
    let _ = table.units_from(0).take(MOST).count();
    let _ = dir.has(0, u64::MAX);
}

/// A `present` is believed, or counts as empty. The bytes stand in the
/// directory of the layer in the corpus of `chunks`.
pub fn present(data: &[u8]) {
    const CHUNKS: &[u8] = include_bytes!("../fuzz/corpus/chunks/layer");
    let mut bytes = data.to_vec();
    if let Some((header, body)) = bytes.split_first_chunk_mut::<64>() {
        header[48..52].copy_from_slice(&libdeflater::crc32(body).to_le_bytes());
        let sum = libdeflater::crc32(&header[..60]);
        header[60..].copy_from_slice(&sum.to_le_bytes());
    }
    let Ok(scratch) = tempfile::tempdir() else {
        return;
    };
    let Some(dir) = layer(scratch.path(), CHUNKS, &bytes) else {
        return;
    };
    assert!(dir.present().count() <= dir.chunks().len());
    let found = dir.chunks().overlapping(0, u64::MAX);
    let present = found.filter(|chunk| dir.present().contains(*chunk)).count();
    assert_eq!(present, dir.present().count() as usize);
}

fn layer(path: &Path, chunks: &[u8], present: &[u8]) -> Option<LayerDir> {
    std::fs::write(path.join(layer_dir::CHUNKS), chunks).ok()?;
    std::fs::write(path.join(layer_dir::PRESENT), present).ok()?;
    let identity = LayerDir::identify(path).ok()?;
    let meta_size = u64::from_le_bytes(chunks.get(64..72)?.try_into().ok()?);
    for (name, size) in [
        (layer_dir::META, meta_size),
        (layer_dir::DATA, identity.data_size),
    ] {
        let file = File::create(path.join(name)).ok()?;
        file.set_len(size).ok()?;
    }
    LayerDir::open(path, identity.digest).ok()
}

/// A filter is refused, or matches or does not.
pub fn filter(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let (Ok(filter), Ok(name)) = (Filter::parse(text), Key::try_from("k8s.io/1/sha256:ab")) else {
        return;
    };
    let info = Info {
        name,
        parent: None,
        kind: Kind::Committed,
        created: SystemTime::UNIX_EPOCH,
        updated: SystemTime::UNIX_EPOCH,
        labels: Labels::from([("a/b.c".to_owned(), "x, y".to_owned())]),
    };
    assert_eq!(filter.matches(&info), filter.clone().matches(&info));
}

/// Labels ask for a layer, or say what is missing. Each line is `key=value`.
pub fn labels(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let labels: Labels = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let _ = target(&labels);
    match layer_request(&labels) {
        Ok(request) => assert!(request.annotations.len() <= labels.len()),
        Err(reason) => assert!(!reason.is_empty()),
    }
}

/// Messages to the keeper of descriptors name nothing that is no name.
pub fn notify(data: &[u8]) {
    for name in supervise::forgotten(data) {
        assert!((1..=255).contains(&name.len()));
        assert!(
            name.bytes()
                .all(|byte| (b' '..0x7f).contains(&byte) && byte != b':'),
            "{name:?}"
        );
    }
}

/// What was agreed on a mount is refused, or is written as it was read.
pub fn terms(data: &[u8]) {
    if let Ok(agreement) = fuse::Agreement::from_bytes(data) {
        assert_eq!(agreement.to_bytes(), data);
        let _ = (agreement.terms(), agreement.resends());
    }
}

/// The names in a Python module, and what an ELF file has, are a few or none.
pub fn dependencies(data: &[u8]) {
    assert!(crate::dependencies::names_in(data).len() <= data.len());
    assert!(crate::fetch::segments(data).len() <= data.len());
}

#[cfg(test)]
#[path = "../../layer/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::*;

    fn replay(target: &str, mutations: u32, check: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        replay::replay(&corpus.join(target), mutations, check);
    }

    #[test]
    fn corpora_of_a_layers_files() {
        replay("erofs", 200, erofs);
        replay("chunks", 60, chunks);
        replay("present", 60, present);
    }

    #[test]
    fn corpora_of_calls_and_messages() {
        replay("filter", 2000, filter);
        replay("labels", 1000, labels);
        replay("notify", 1000, notify);
        replay("terms", 2000, terms);
    }

    #[test]
    fn corpora_of_what_files_load() {
        replay("dependencies", 2000, dependencies);
    }
}
