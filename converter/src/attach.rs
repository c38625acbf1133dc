//! Attaching a profile to an image, as an artifact that refers to it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufReader};
use std::num::NonZero;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::json;
use sluice_layer::profile::{
    ARTIFACT_TYPE, Attachment, CONTENT_TYPE, CONTENT_WINDOW_LOG, DOCUMENT_TYPE, Part, Read,
};
use sluice_layer::{ChunkSource, Limits, NodeKind, Profile, Toc, Unit, Wanted, decode_unit};
use sluice_oci::{Descriptor, Digest, Index, Manifest, Reference, media_type};
use sluice_registry::{BlobSource, Client};

use crate::destination::blocking;
use crate::layout::Spool;
use crate::source::Source;
use crate::toc::{self, NoToc};
use crate::{Error, Location, document};

/// Units are fetched together over gaps up to this size.
const GAP: u64 = 64 << 10;
/// The longest range of one request.
const LONGEST: u64 = 8 << 20;
/// Requests that are under way at once.
const AT_ONCE: usize = 4;
/// Each takes some 100 MB of memory at high levels.
const MOST_WORKERS: usize = 8;
/// The empty document that takes the place of a configuration.
const EMPTY: &[u8] = b"{}";

/// How a profile is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attaching {
    /// With the content of all that it names, compressed at this level of
    /// Zstandard.
    pub data: Option<i32>,
    /// Threads that compress, eight at most.
    pub workers: NonZero<usize>,
}

/// What was attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Digest of the artifact's manifest.
    pub artifact: Digest,
    /// Digest of the manifest of the image that it refers to.
    pub image: Digest,
    /// Chunks that the profile names.
    pub chunks: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of the artifact's blobs.
    pub stored: u64,
}

/// Attaches `profile` to the image at `reference`, which stays as it is. Of
/// an index, to the image that has the profile's layers.
pub async fn attach(
    client: &Client,
    reference: &Reference,
    profile: &Profile,
    attaching: Attaching,
    scratch: &Path,
) -> Result<Attached, Error> {
    let source = Source::open(client, &Location::Registry(reference.clone()))?;
    let (image, manifest) = find_image(&source, reference, profile).await?;
    let mut layers = Vec::new();
    for digest in profile.layers() {
        let layer = manifest.layers.iter().find(|layer| layer.digest == *digest);
        let layer = layer.ok_or_else(|| other_image(reference, *digest))?;
        layers.push((*digest, verified_toc(&source, layer).await?));
    }
    let (exact, chunks) = to_chunks(profile, &layers)?;
    let mut bytes = exact.compress().map_err(in_scratch(scratch))?;
    bytes.shrink_to_fit();
    let mut attachment = Attachment {
        document: part(&bytes),
        content: None,
    };
    let mut stored = attachment.document.size;
    for small in [Bytes::from_static(EMPTY), bytes.into()] {
        let size = small.len() as u64;
        let digest = Digest::of(&small);
        let from = BlobSource::bytes(small);
        client.push_blob(reference, digest, size, from).await?;
    }
    if let Some(level) = attaching.data {
        let raw = Spool::new(scratch)?;
        fetch_content(&source, &layers, chunks, &raw, scratch).await?;
        let (place, workers) = (scratch.to_owned(), attaching.workers);
        let compressed = blocking(move || compress(&raw, level, workers, &place));
        let (spool, content) = compressed.await?;
        stored += content.size;
        attachment.content = Some(content);
        let from = BlobSource::file(spool.path());
        client
            .push_blob(reference, content.digest, content.size, from)
            .await?;
    }
    let artifact = artifact(&image, &attachment);
    Ok(Attached {
        artifact: client.push_referrer(reference, &artifact).await?,
        image: image.digest,
        chunks: exact.reads().len(),
        bytes: exact.bytes(),
        stored,
    })
}

/// The image's manifest: the reference's, or the first of its index that has
/// the profile's layers.
async fn find_image(
    source: &Source,
    reference: &Reference,
    profile: &Profile,
) -> Result<(Descriptor, Manifest), Error> {
    let (root, bytes) = source.root().await?;
    if !media_type::is_index(&root.media_type) {
        let manifest = document::parse("manifest", root.digest, &bytes)?;
        return Ok((root, manifest));
    }
    let index: Index = document::parse("index", root.digest, &bytes)?;
    for entry in index.manifests {
        if !media_type::is_manifest(&entry.media_type) {
            continue;
        }
        let bytes = source.manifest(&entry).await?;
        let manifest: Manifest = document::parse("manifest", entry.digest, &bytes)?;
        let has = |digest: &Digest| manifest.layers.iter().any(|layer| layer.digest == *digest);
        if profile.layers().iter().all(has) {
            let size = bytes.len() as u64;
            let descriptor = Descriptor::new(entry.media_type, entry.digest, size);
            return Ok((descriptor, manifest));
        }
    }
    let first = profile.layers().first().copied();
    Err(other_image(reference, first.unwrap_or(root.digest)))
}

fn other_image(reference: &Reference, layer: Digest) -> Error {
    Error::OtherProfile {
        reference: reference.to_string(),
        layer,
    }
}

async fn verified_toc(source: &Source, layer: &Descriptor) -> Result<Toc, Error> {
    let refuse = |why: String| Error::Damaged {
        what: "layer",
        digest: layer.digest,
        why,
    };
    let found = match toc::find(source, layer).await? {
        Ok(found) => found,
        Err(NoToc::Ordinary) => return Err(refuse("it has no table of contents".to_owned())),
        Err(NoToc::Broken(why)) => return Err(refuse(why)),
    };
    if !found.trust.is_some_and(|trust| found.toc.matches(&trust)) {
        let why = "its table of contents is not the one that the manifest vouches for";
        return Err(refuse(why.to_owned()));
    }
    let toc = found.toc.parse_without_trust(&Limits::default());
    toc.map_err(|cause| refuse(cause.to_string()))
}

/// A chunk whose content is to be carried.
struct Carried {
    /// Position in the profile's layers.
    layer: usize,
    unit: Unit,
    inner_offset: u64,
    size: u64,
    digest: Digest,
    /// Where it lies in the content.
    at: u64,
}

/// The profile with each read widened to whole chunks, each chunk once, and
/// the chunks in that order. Chunks of zeros are nothing to carry.
fn to_chunks(
    profile: &Profile,
    layers: &[(Digest, Toc)],
) -> Result<(Profile, Vec<Carried>), Error> {
    let mut seen = HashSet::new();
    let mut reads = Vec::new();
    let mut carried = Vec::new();
    let mut at = 0;
    for read in profile.reads() {
        let (_, toc) = &layers[read.layer];
        let Some(NodeKind::Regular(file)) = toc.find(&read.path).map(|node| &node.kind) else {
            continue;
        };
        for index in file.chunks.clone() {
            let chunk = &toc.chunks()[index as usize];
            let ChunkSource::Blob { unit, inner_offset } = chunk.source else {
                continue;
            };
            let apart = chunk.file_offset >= read.offset.saturating_add(read.len)
                || chunk.file_offset + chunk.size <= read.offset;
            if apart || !seen.insert((read.layer, index)) {
                continue;
            }
            reads.push(Read {
                offset: chunk.file_offset,
                len: chunk.size,
                // The TOCs are there before the artifact is.
                unit: None,
                ..read.clone()
            });
            carried.push(Carried {
                layer: read.layer,
                unit,
                inner_offset,
                size: chunk.size,
                digest: chunk.digest,
                at,
            });
            at += chunk.size;
        }
    }
    let exact = Profile::new(profile.starts(), profile.layers().to_vec(), reads)?;
    Ok((exact, carried))
}

/// Writes all content in its order, uncompressed.
async fn fetch_content(
    source: &Source,
    layers: &[(Digest, Toc)],
    mut chunks: Vec<Carried>,
    to: &Spool,
    scratch: &Path,
) -> Result<(), Error> {
    chunks.sort_by_key(|chunk| (chunk.layer, chunk.unit.offset, chunk.inner_offset));
    let requests = runs(&chunks).into_iter().map(|run| async move {
        let (start, end) = extent(run);
        let layer = layers[run[0].layer].0;
        let bytes = source.range(layer, start, end - start).await?;
        Ok::<_, Error>((run, bytes))
    });
    let mut answers = stream::iter(requests).buffer_unordered(AT_ONCE);
    while let Some((run, bytes)) = answers.try_next().await? {
        let (digest, toc) = &layers[run[0].layer];
        for unit in run.chunk_by(|a, b| a.unit == b.unit) {
            let at = unit[0].unit.offset - run[0].unit.offset;
            let range = at as usize..(at + unit[0].unit.size) as usize;
            let bytes = bytes.get(range).unwrap_or_default();
            store_unit(*digest, toc, bytes, unit, to, scratch)?;
        }
    }
    Ok(())
}

/// The chunks, which are in the order of the blobs, in parts that one request
/// each asks for.
fn runs(chunks: &[Carried]) -> Vec<&[Carried]> {
    let mut runs = Vec::new();
    let mut rest = chunks;
    while let Some(first) = rest.first() {
        let (start, mut end) = extent(&rest[..1]);
        let joins = |chunk: &&Carried| {
            let (next, next_end) = extent(std::slice::from_ref(*chunk));
            let near = next.saturating_sub(end) <= GAP && next_end.max(end) - start <= LONGEST;
            let joins = chunk.layer == first.layer && (chunk.unit == first.unit || near);
            if joins {
                end = end.max(next_end);
            }
            joins
        };
        let (run, more) = rest.split_at(rest.iter().take_while(joins).count());
        runs.push(run);
        rest = more;
    }
    runs
}

/// Where in the blob the units of a run begin and end.
fn extent(run: &[Carried]) -> (u64, u64) {
    let ends = run.iter().map(|chunk| chunk.unit.offset + chunk.unit.size);
    (run[0].unit.offset, ends.max().unwrap_or_default())
}

fn store_unit(
    layer: Digest,
    toc: &Toc,
    bytes: &[u8],
    chunks: &[Carried],
    to: &Spool,
    scratch: &Path,
) -> Result<(), Error> {
    let wanted: Vec<Wanted> = chunks
        .iter()
        .map(|chunk| Wanted {
            inner_offset: chunk.inner_offset,
            size: chunk.size,
            digest: chunk.digest,
        })
        .collect();
    let mut stored = Ok(());
    decode_unit(toc.format(), bytes, &wanted, |index, chunk| {
        if stored.is_ok() {
            stored = to.file().write_all_at(&chunk, chunks[index].at);
        }
    })
    .map_err(|cause| Error::Damaged {
        what: "layer",
        digest: layer,
        why: cause.to_string(),
    })?;
    stored.map_err(in_scratch(scratch))
}

/// The same bytes however many workers there are.
fn compress(
    raw: &Spool,
    level: i32,
    workers: NonZero<usize>,
    scratch: &Path,
) -> Result<(Spool, Part), Error> {
    let spool = Spool::new(scratch)?;
    let path = raw.path();
    let raw = File::open(&path).map_err(Error::file("cannot open", &path))?;
    let write = || -> io::Result<()> {
        let size = raw.metadata()?.len();
        let mut encoder = zstd::Encoder::new(spool.file(), level)?;
        // Nearly all of the time goes here.
        encoder.multithread(workers.get().min(MOST_WORKERS) as u32)?;
        encoder.window_log(CONTENT_WINDOW_LOG)?;
        encoder.include_checksum(false)?;
        encoder.set_pledged_src_size(Some(size))?;
        io::copy(&mut BufReader::with_capacity(1 << 20, raw), &mut encoder)?;
        encoder.finish()?;
        Ok(())
    };
    write().map_err(in_scratch(scratch))?;
    let path = spool.path();
    let mut written = File::open(&path).map_err(Error::file("cannot open", &path))?;
    let mut hasher = sluice_oci::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    let mut size = 0;
    loop {
        match io::Read::read(&mut written, &mut buffer).map_err(in_scratch(scratch))? {
            0 => break,
            count => {
                hasher.update(&buffer[..count]);
                size += count as u64;
            }
        }
    }
    let digest = hasher.finish();
    Ok((spool, Part { digest, size }))
}

fn in_scratch(scratch: &Path) -> impl Fn(io::Error) -> Error {
    let scratch = scratch.to_owned();
    move |cause| Error::File {
        action: "cannot write to a temporary file in",
        path: scratch.clone(),
        cause,
    }
}

fn part(bytes: &[u8]) -> Part {
    Part {
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
    }
}

fn artifact(image: &Descriptor, attachment: &Attachment) -> Manifest {
    let layer = |media: &str, part: &Part| Descriptor::new(media, part.digest, part.size);
    let document = layer(DOCUMENT_TYPE, &attachment.document);
    let content = attachment.content.as_ref();
    let content = content.map(|content| layer(CONTENT_TYPE, content));
    let mut manifest = Manifest {
        schema_version: 2,
        media_type: Some(media_type::OCI_MANIFEST.to_owned()),
        config: layer(media_type::OCI_EMPTY, &part(EMPTY)),
        layers: [document].into_iter().chain(content).collect(),
        annotations: attachment.to_annotations(),
        other: Default::default(),
    };
    let subject = Descriptor::new(image.media_type.clone(), image.digest, image.size);
    let other = &mut manifest.other;
    other.insert("artifactType".to_owned(), json!(ARTIFACT_TYPE));
    other.insert("subject".to_owned(), json!(subject));
    manifest
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use sluice_layer::profile::decode_content;

    use super::*;

    #[test]
    fn content_is_one_frame_and_the_same_for_any_number_of_workers() {
        let scratch = tempfile::tempdir().unwrap();
        let raw = Spool::new(scratch.path()).unwrap();
        // More than one worker gets at once.
        let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
        for _ in 0..40 {
            raw.file().write_all(&block).unwrap();
        }
        let [one, three] = [1, 3].map(|workers| {
            let workers = NonZero::new(workers).unwrap();
            compress(&raw, 1, workers, scratch.path()).unwrap()
        });
        assert_eq!(one.1, three.1);
        let stored = File::open(one.0.path()).unwrap();
        let mut content = decode_content(BufReader::new(stored)).unwrap();
        let mut read = vec![0; block.len()];
        for _ in 0..40 {
            content.read_exact(&mut read).unwrap();
            assert!(read == block);
        }
        assert_eq!(content.read(&mut read).unwrap(), 0);
    }

    #[test]
    fn a_request_asks_for_neighbours_and_never_for_half_a_unit() {
        let chunk = |layer, offset, size, inner_offset| Carried {
            layer,
            unit: Unit { offset, size },
            inner_offset,
            size: 1,
            digest: Digest::of(b""),
            at: 0,
        };
        let large = LONGEST + 5;
        let chunks = [
            chunk(0, 10, 10, 0),
            chunk(0, 10, 10, 5),
            chunk(0, 20 + GAP, 10, 0),
            chunk(0, 31 + 2 * GAP, large, 0),
            chunk(0, 31 + 2 * GAP, large, 9),
            chunk(0, 31 + 2 * GAP + large, 10, 0),
            chunk(1, 31 + 2 * GAP + large, 10, 0),
        ];
        let lengths: Vec<usize> = runs(&chunks).iter().map(|run| run.len()).collect();
        assert_eq!(lengths, [3, 2, 1, 1]);
        let ends: Vec<_> = runs(&chunks).into_iter().map(extent).collect();
        assert_eq!(ends[0], (10, 30 + GAP));
        assert_eq!(ends[1], (31 + 2 * GAP, 31 + 2 * GAP + large));
    }
}
