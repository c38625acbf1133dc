//! Checking an image: every byte that a digest speaks of.

use std::collections::HashSet;
use std::io::{self, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sluice_layer::annotations::TOC_POSITION;
use sluice_layer::{
    Chunk, ChunkSource, DecodeError, Limits, NodeId, NodeKind, Toc, Unit, Wanted, decode_unit,
};
use sluice_oci::{Descriptor, Digest, Hasher, Index, Manifest, media_type};

use crate::destination::blocking;
use crate::pipeline::{decompressed, spooled};
use crate::source::{BlobReader, Source};
use crate::toc::{self, NoToc};
use crate::{Error, document, media};

/// What was checked, and what is wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verification {
    /// Layers that were read.
    pub layers: usize,
    /// Of these, how many have a TOC.
    pub seekable: usize,
    /// Chunks that were decoded.
    pub chunks: usize,
    /// Everything that is wrong, one line each.
    pub defects: Vec<String>,
}

/// Checks an image. Errors are what prevents checking; what is wrong with
/// the image itself are defects.
pub(crate) async fn verify(source: &Source, scratch: &Path) -> Result<Verification, Error> {
    let mut found = Verification::default();
    let (root, bytes) = source.root().await?;
    let mut seen = HashSet::new();
    let mut pending = vec![(root, bytes)];
    while let Some((entry, bytes)) = pending.pop() {
        if !seen.insert(entry.digest) {
            continue;
        }
        if !media_type::is_index(&entry.media_type) {
            image(source, &entry, &bytes, scratch, &mut found, &mut seen).await?;
            continue;
        }
        let index: Index = match document::parse("index", entry.digest, &bytes) {
            Ok(index) => index,
            Err(error) => {
                found.defects.push(error.to_string());
                continue;
            }
        };
        for entry in index.manifests.into_iter().rev() {
            match source.manifest(&entry).await {
                Ok(bytes) if bytes.len() as u64 != entry.size => found.defects.push(format!(
                    "manifest {}: it has {} bytes, but the index says {}",
                    entry.digest,
                    bytes.len(),
                    entry.size
                )),
                Ok(bytes) => pending.push((entry, bytes)),
                Err(error) => found.note(error)?,
            }
        }
    }
    Ok(found)
}

async fn image(
    source: &Source,
    entry: &Descriptor,
    bytes: &[u8],
    scratch: &Path,
    found: &mut Verification,
    seen: &mut HashSet<Digest>,
) -> Result<(), Error> {
    let manifest: Manifest = match document::parse("manifest", entry.digest, bytes) {
        Ok(manifest) => manifest,
        Err(error) => {
            found.defects.push(error.to_string());
            return Ok(());
        }
    };
    let config = match source.blob("configuration", &manifest.config).await {
        Ok(bytes) => serde_json::from_slice::<Value>(&bytes).unwrap_or_default(),
        Err(error) => {
            found.note(error)?;
            Value::Null
        }
    };
    let diff_ids = config.pointer("/rootfs/diff_ids").and_then(Value::as_array);
    if let Some(diff_ids) = diff_ids
        && diff_ids.len() != manifest.layers.len()
    {
        found.defects.push(format!(
            "configuration {}: it lists {} diff IDs for {} layers",
            manifest.config.digest,
            diff_ids.len(),
            manifest.layers.len()
        ));
    }
    for (position, layer) in manifest.layers.iter().enumerate() {
        if media::is_foreign(layer) || !seen.insert(layer.digest) {
            continue;
        }
        let diff_id = diff_ids
            .and_then(|ids| ids.get(position)?.as_str())
            .map(str::to_owned);
        match check_layer(source, layer, diff_id, scratch).await {
            Ok(checked) => {
                found.layers += 1;
                found.seekable += usize::from(checked.seekable);
                found.chunks += checked.chunks;
                let name = |defect| format!("layer {}: {defect}", layer.digest);
                found.defects.extend(checked.defects.into_iter().map(name));
            }
            Err(error) => found.note(error)?,
        }
    }
    Ok(())
}

impl Verification {
    /// Counts an error that is the image's fault as a defect.
    fn note(&mut self, error: Error) -> Result<(), Error> {
        match error {
            Error::Damaged { .. } | Error::MissingBlob { .. } | Error::Document { .. } => {
                self.defects.push(error.to_string());
                Ok(())
            }
            other => Err(other),
        }
    }
}

#[derive(Default)]
struct CheckedLayer {
    seekable: bool,
    chunks: usize,
    defects: Vec<String>,
}

async fn check_layer(
    source: &Source,
    layer: &Descriptor,
    diff_id: Option<String>,
    scratch: &Path,
) -> Result<CheckedLayer, Error> {
    let mut checked = CheckedLayer::default();
    let blob = source.reader(layer.digest).await?;
    let (digest, scratch) = (layer.digest, scratch.to_owned());
    let is_layer = media::is_layer(&layer.media_type);
    let read = blocking(move || read_whole(blob, digest, is_layer, &scratch)).await?;
    if read.size != layer.size {
        checked.defects.push(format!(
            "the blob has {} bytes, but the manifest says {}",
            read.size, layer.size
        ));
    }
    if read.digest != layer.digest {
        let found = read.digest;
        checked
            .defects
            .push(format!("the blob's bytes have the digest {found}"));
    }
    match (&read.diff_id, diff_id) {
        (Some(Err(why)), _) => checked.defects.push(why.clone()),
        (Some(Ok(found)), Some(stated)) if found.to_string() != stated => {
            checked.defects.push(format!(
                "its tar has the digest {found}, but the configuration's diff ID is {stated}"
            ));
        }
        _ => {}
    }
    let toc = match toc::find(source, layer).await? {
        Ok(toc) => toc,
        Err(NoToc::Ordinary) => return Ok(checked),
        Err(NoToc::Broken(why)) => {
            checked.defects.push(why);
            return Ok(checked);
        }
    };
    checked.seekable = true;
    match &toc.trust {
        Some(trust) if toc.toc.matches(trust) => {}
        Some(_) => checked.defects.push(format!(
            "its table of contents has the digest {}, which is not what the annotation says",
            toc.toc.json_digest()
        )),
        None => checked
            .defects
            .push("no annotation vouches for its table of contents".to_owned()),
    }
    if toc.misplaced {
        checked.defects.push(format!(
            "its table of contents is not where the annotation {TOC_POSITION} says"
        ));
    }
    let tree = match toc.toc.parse_without_trust(&Limits::default()) {
        Ok(tree) => tree,
        Err(cause) => {
            checked.defects.push(cause.to_string());
            return Ok(checked);
        }
    };
    blocking(move || {
        check_chunks(&tree, &read, &mut checked)?;
        Ok(checked)
    })
    .await
}

/// A blob that was read from end to end.
struct ReadBlob {
    file: std::fs::File,
    path: PathBuf,
    digest: Digest,
    size: u64,
    /// Digest of its tar, or why there is none; nothing for blobs that are no
    /// layers.
    diff_id: Option<Result<Digest, String>>,
}

/// Reads a blob once, keeping its bytes at hand if they are not local.
fn read_whole(
    blob: BlobReader,
    layer: Digest,
    is_layer: bool,
    scratch: &Path,
) -> Result<ReadBlob, Error> {
    let (spool, end) = spooled(blob, layer, scratch)?;
    let path = spool.path();
    let file = std::fs::File::open(&path).map_err(Error::file("cannot open", &path))?;
    let diff_id = is_layer.then(|| {
        let mut hasher = Digester(Hasher::new());
        let tar = decompressed(&file).and_then(|mut tar| io::copy(&mut tar, &mut hasher));
        match tar {
            Ok(_) => Ok(hasher.0.finish()),
            Err(cause) => Err(format!("it cannot be decompressed: {cause}")),
        }
    });
    Ok(ReadBlob {
        file,
        path: scratch.to_owned(),
        digest: end.digest,
        size: end.size,
        diff_id,
    })
}

struct Digester(Hasher);

impl io::Write for Digester {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Decodes every chunk and compares its digest.
fn check_chunks(toc: &Toc, blob: &ReadBlob, checked: &mut CheckedLayer) -> Result<(), Error> {
    let mut placed: Vec<(Unit, u64, usize)> = Vec::new();
    for (index, chunk) in toc.chunks().iter().enumerate() {
        match chunk.source {
            ChunkSource::Blob { unit, inner_offset } => placed.push((unit, inner_offset, index)),
            ChunkSource::Zeros => {
                checked.chunks += 1;
                if !zeros_match(chunk) {
                    let file = path_of(toc, index);
                    checked.defects.push(format!(
                        "{file}: a chunk said to be zeros has another digest"
                    ));
                }
            }
        }
    }
    placed.sort_unstable();
    for group in placed.chunk_by(|a, b| a.0 == b.0) {
        let unit = group[0].0;
        let mut bytes = vec![0; usize::try_from(unit.size).unwrap_or_default()];
        blob.file
            .read_exact_at(&mut bytes, unit.offset)
            .map_err(Error::file("cannot read a temporary file in", &blob.path))?;
        let wanted: Vec<Wanted> = group
            .iter()
            .map(|(_, inner_offset, index)| {
                let chunk = &toc.chunks()[*index];
                Wanted {
                    inner_offset: *inner_offset,
                    size: chunk.size,
                    digest: chunk.digest,
                }
            })
            .collect();
        checked.chunks += wanted.len();
        let mut from = 0;
        while from < wanted.len() {
            let Err(cause) = decode_unit(toc.format(), &bytes, &wanted[from..], |_, _| ()) else {
                break;
            };
            let (DecodeError::Corrupt { index, .. }
            | DecodeError::Truncated { index, .. }
            | DecodeError::Mismatch { index, .. }
            | DecodeError::Order { index }) = cause;
            let (_, _, chunk) = group[from + index];
            let (file, offset) = (path_of(toc, chunk), toc.chunks()[chunk].file_offset);
            let cause = cause.to_string();
            let cause = cause
                .split_once(": ")
                .map_or(cause.as_str(), |(_, why)| why);
            checked
                .defects
                .push(format!("{file}: the chunk at byte {offset}: {cause}"));
            from += index + 1;
        }
    }
    Ok(())
}

fn zeros_match(chunk: &Chunk) -> bool {
    let mut hasher = Digester(Hasher::new());
    let zeros = io::copy(&mut io::repeat(0).take(chunk.size), &mut hasher);
    zeros.is_ok() && hasher.flush().is_ok() && hasher.0.finish() == chunk.digest
}

/// One of the paths of the file that a chunk belongs to. Slow; only defects
/// are named.
fn path_of(toc: &Toc, chunk: usize) -> String {
    let holds = |node: &sluice_layer::Node| match &node.kind {
        NodeKind::Regular(content) => {
            (content.chunks.start as usize..content.chunks.end as usize).contains(&chunk)
        }
        _ => false,
    };
    let Some(mut node) = toc.nodes().iter().position(holds) else {
        return "a file".to_owned();
    };
    let mut path = String::new();
    while node != NodeId::ROOT.index() {
        let parent = toc.nodes().iter().enumerate().find_map(|(at, candidate)| {
            let NodeKind::Directory(directory) = &candidate.kind else {
                return None;
            };
            let child = directory.children.iter().find(|c| c.node.index() == node)?;
            Some((at, child.name.escape_ascii().to_string()))
        });
        let Some((parent, name)) = parent else { break };
        path = format!("/{name}{path}");
        node = parent;
    }
    path
}
