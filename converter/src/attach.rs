//! Attaching a profile to an image, as an artifact that refers to it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use bytes::Bytes;
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
/// The empty document that takes the place of a configuration.
const EMPTY: &[u8] = b"{}";

/// How a profile is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attaching {
    /// With the content of all that it names, compressed at this level of
    /// Zstandard.
    pub data: Option<i32>,
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
        fetch_content(&source, &layers, &chunks, &raw, scratch).await?;
        let place = scratch.to_owned();
        let (spool, content) = blocking(move || compress(&raw, level, &place)).await?;
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
    chunks: &[Carried],
    to: &Spool,
    scratch: &Path,
) -> Result<(), Error> {
    for (number, (digest, toc)) in layers.iter().enumerate() {
        let mut wanted: Vec<&Carried> = chunks.iter().filter(|c| c.layer == number).collect();
        wanted.sort_by_key(|chunk| (chunk.unit.offset, chunk.inner_offset));
        let mut units: Vec<&[&Carried]> = wanted.chunk_by(|a, b| a.unit == b.unit).collect();
        while let Some(first) = units.first().map(|unit| unit[0].unit) {
            let mut end = first.offset + first.size;
            let mut count = 1;
            for next in &units[1..] {
                let next = next[0].unit;
                let next_end = next.offset + next.size;
                if next.offset - end > GAP || next_end - first.offset > LONGEST {
                    break;
                }
                end = next_end;
                count += 1;
            }
            let range = source.range(*digest, first.offset, end - first.offset);
            let range = range.await?;
            for unit in units.drain(..count) {
                let start = (unit[0].unit.offset - first.offset) as usize;
                let bytes = &range[start..start + unit[0].unit.size as usize];
                store_unit(*digest, toc, bytes, unit, to, scratch)?;
            }
        }
    }
    Ok(())
}

fn store_unit(
    layer: Digest,
    toc: &Toc,
    bytes: &[u8],
    chunks: &[&Carried],
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

fn compress(raw: &Spool, level: i32, scratch: &Path) -> Result<(Spool, Part), Error> {
    let spool = Spool::new(scratch)?;
    let path = raw.path();
    let raw = File::open(&path).map_err(Error::file("cannot open", &path))?;
    let write = || -> io::Result<()> {
        let size = raw.metadata()?.len();
        let mut encoder = zstd::Encoder::new(spool.file(), level)?;
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
