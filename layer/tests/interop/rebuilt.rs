//! Puts a layer's tar together from its units, as the node does.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::ops::Range;

use sluice_layer::write::TarTree;
use sluice_layer::{
    ChunkSource, Format, LayerAnnotations, Limits, Node, NodeKind, Toc, TocTrust, Wanted,
    decode_unit, locate_toc, read_toc, unpack,
};
use sluice_oci::{Digest, Hasher};

/// A chunk, and where the content of its file has it.
struct Placed {
    wanted: Wanted,
    content: u64,
}

pub(crate) fn check(which: &str, blob: &[u8], annotations: &BTreeMap<String, String>) {
    let annotations = LayerAnnotations::parse(annotations).unwrap();
    let location = locate_toc(blob, blob.len() as u64).unwrap();
    let compressed = location.slice_of(blob, blob.len() as u64).unwrap();
    let trust = annotations.trust().unwrap();
    let toc = read_toc(&location, compressed, &trust, &Limits::default()).unwrap();
    let format = toc.format();

    let mut units: BTreeMap<u64, Vec<Placed>> = BTreeMap::new();
    let mut sizes = BTreeMap::new();
    let mut starts = BTreeMap::new();
    let mut next = 0;
    for (index, node) in toc.nodes().iter().enumerate() {
        let NodeKind::Regular(content) = &node.kind else {
            continue;
        };
        starts.insert(index, next);
        for chunk in &toc.chunks()[content.chunks.start as usize..content.chunks.end as usize] {
            if let ChunkSource::Blob { unit, inner_offset } = chunk.source {
                sizes.insert(unit.offset, unit.size);
                units.entry(unit.offset).or_default().push(Placed {
                    wanted: Wanted {
                        inner_offset,
                        size: chunk.size,
                        digest: chunk.digest,
                    },
                    content: next + chunk.file_offset,
                });
            }
        }
        next += content.size;
    }

    let mut hasher = Hasher::new();
    let mut tree = TarTree::new(64 << 20);
    let mut push = |bytes: &[u8], origin: Option<u64>| {
        hasher.update(bytes);
        tree.push(bytes, origin).unwrap();
    };
    let end = match format {
        Format::Estargz => blob.len() as u64,
        Format::ZstdChunked => toc.toc_offset(),
    };
    let mut at = 0;
    while at < end {
        let Some(chunks) = units.get_mut(&at) else {
            let next = units.range(at..).next().map_or(end, |(next, _)| *next);
            let mut bytes = Vec::new();
            let part = &blob[at as usize..next as usize];
            unpack(format, part)
                .unwrap()
                .read_to_end(&mut bytes)
                .unwrap();
            push(&bytes, None);
            at = next;
            continue;
        };
        chunks.sort_by_key(|chunk| chunk.wanted.inner_offset);
        let wanted: Vec<Wanted> = chunks.iter().map(|chunk| chunk.wanted).collect();
        let part = &blob[at as usize..(at + sizes[&at]) as usize];
        let mut content = Vec::new();
        let decoded = decode_unit(format, part, &wanted, |_, c| content.push(c.to_vec())).unwrap();
        let ranges: Vec<Range<u64>> = wanted
            .iter()
            .map(|w| w.inner_offset..w.inner_offset + w.size)
            .collect();
        let rest = decoded.rest(&ranges, 1 << 20).unwrap();
        let (mut rest, mut position) = (&rest[..], 0);
        for (chunk, bytes) in chunks.iter().zip(&content) {
            let gap;
            (gap, rest) = rest.split_at((chunk.wanted.inner_offset - position) as usize);
            push(gap, None);
            push(bytes, Some(chunk.content));
            position = chunk.wanted.inner_offset + chunk.wanted.size;
        }
        push(rest, None);
        at += part.len() as u64;
    }

    // What anybody else makes of the blob.
    let mut whole = Vec::new();
    unpack(format, blob)
        .unwrap()
        .read_to_end(&mut whole)
        .unwrap();
    assert_eq!(hasher.finish(), Digest::of(&whole), "{which}");
    if let TocTrust::Uncompressed(digest) = trust {
        let in_tar = (format == Format::Estargz).then_some(digest);
        assert_eq!(tree.toc_digest(), in_tar, "{which}");
    }
    let unpacked = tree.finish(&Limits::default()).unwrap();
    same(which, &toc, unpacked.tree(), &|index, theirs: &Node| {
        let NodeKind::Regular(content) = &toc.nodes()[index].kind else {
            return;
        };
        let zeros = |chunk: &sluice_layer::Chunk| matches!(chunk.source, ChunkSource::Zeros);
        let chunks = &toc.chunks()[content.chunks.start as usize..content.chunks.end as usize];
        let stored: u64 = chunks.iter().filter(|c| !zeros(c)).map(|c| c.size).sum();
        match unpacked.origin(theirs) {
            Some(origin) => {
                assert_eq!(origin.from_chunks, stored, "{which}");
                let base = (stored > 0).then(|| starts[&index]);
                assert_eq!(origin.base, base, "{which}");
            }
            None => assert_eq!(content.size, 0, "{which}"),
        }
    });
}

fn same(which: &str, ours: &Toc, theirs: &Toc, each: &dyn Fn(usize, &Node)) {
    let mut pairs = vec![(String::new(), 0, 0)];
    while let Some((path, a, b)) = pairs.pop() {
        let (one, other) = (&ours.nodes()[a], &theirs.nodes()[b]);
        let attributes = |n: &Node| {
            (
                n.mode,
                n.uid,
                n.gid,
                n.mtime.secs,
                n.links,
                n.xattrs.clone(),
            )
        };
        assert_eq!(attributes(one), attributes(other), "{which}: {path}");
        match (&one.kind, &other.kind) {
            (NodeKind::Directory(one), NodeKind::Directory(other)) => {
                assert_eq!(one.opaque, other.opaque, "{which}: {path}");
                let names = |d: &sluice_layer::Directory| {
                    let names = d.children.iter().map(|c| c.name.clone());
                    names.collect::<Vec<_>>()
                };
                assert_eq!(names(one), names(other), "{which}: {path}");
                for (one, other) in one.children.iter().zip(&other.children) {
                    let name = String::from_utf8_lossy(&one.name);
                    pairs.push((
                        format!("{path}/{name}"),
                        one.node.index(),
                        other.node.index(),
                    ));
                }
            }
            (NodeKind::Regular(one), NodeKind::Regular(file)) => {
                assert_eq!(one.size, file.size, "{which}: {path}");
                each(a, other);
            }
            (one, other) => assert_eq!(one, other, "{which}: {path}"),
        }
    }
}
