//! From whole blobs to trees and content, made here byte by byte.

#![allow(clippy::unwrap_used, reason = "a test through and through")]

mod blobs;

use blobs::{Blob, Part};
use sluice_layer::{
    ChunkSource, Format, LayerAnnotations, Limits, Mtime, NodeKind, TocError, TocLocation,
    TocTrust, UntrustedToc, Wanted, decode_unit, locate_toc, read_toc,
};
use sluice_oci::Digest;

const FORMATS: [Format; 2] = [Format::Estargz, Format::ZstdChunked];

fn sample(format: Format) -> Blob {
    Blob::new(
        format,
        &[
            Part::file("usr/bin/tool", b"first file, in one chunk"),
            Part::chunked(
                "usr/lib/big",
                &[b"chunk one ", b"and chunk two ", b"and three"],
            ),
            Part::shared(&[("etc/a", b"aaaa"), ("etc/b", b"bb")]),
        ],
    )
}

#[test]
fn a_blob_is_read_from_its_end_to_its_chunks() {
    for format in FORMATS {
        let blob = sample(format);
        let size = blob.bytes.len() as u64;
        let location = locate_toc(&blob.bytes, size).unwrap();
        assert_eq!(location.format, format);
        let compressed = location.slice_of(&blob.bytes, size).unwrap();
        for trust in [
            TocTrust::Uncompressed(Digest::of(&blob.json)),
            TocTrust::Compressed(Digest::of(compressed)),
        ] {
            let toc = read_toc(&location, compressed, &trust, &Limits::default()).unwrap();
            assert_eq!(toc.toc_offset(), location.chunks_end());
            let mut files = Vec::new();
            for node in toc.nodes() {
                let NodeKind::Regular(content) = &node.kind else {
                    continue;
                };
                let mut bytes = Vec::new();
                for chunk in
                    &toc.chunks()[content.chunks.start as usize..content.chunks.end as usize]
                {
                    let ChunkSource::Blob { unit, inner_offset } = chunk.source else {
                        panic!("stored nowhere");
                    };
                    assert!(unit.offset + unit.size <= toc.toc_offset());
                    let wanted = Wanted {
                        inner_offset,
                        size: chunk.size,
                        digest: chunk.digest,
                    };
                    let range = unit.offset as usize..(unit.offset + unit.size) as usize;
                    decode_unit(format, &blob.bytes[range], &[wanted], |index, verified| {
                        assert_eq!(index, 0);
                        assert_eq!(bytes.len() as u64, chunk.file_offset);
                        bytes.extend_from_slice(verified.bytes());
                    })
                    .unwrap();
                }
                assert_eq!(bytes.len() as u64, content.size);
                files.push(String::from_utf8(bytes).unwrap());
            }
            assert_eq!(
                files,
                [
                    "first file, in one chunk",
                    "chunk one and chunk two and three",
                    "aaaa",
                    "bb"
                ]
            );
        }
    }
}

#[test]
fn a_toc_that_the_annotation_does_not_vouch_for_is_refused() {
    for format in FORMATS {
        let blob = sample(format);
        let size = blob.bytes.len() as u64;
        let location = locate_toc(&blob.bytes, size).unwrap();
        let compressed = location.slice_of(&blob.bytes, size).unwrap();
        let other = Digest::of(b"another");
        for trust in [TocTrust::Uncompressed(other), TocTrust::Compressed(other)] {
            let refused = read_toc(&location, compressed, &trust, &Limits::default()).unwrap_err();
            assert!(matches!(refused, TocError::Digest { expected, .. } if expected == other));
        }
        let untrusted = UntrustedToc::read(&location, compressed, &Limits::default()).unwrap();
        assert_eq!(untrusted.json(), blob.json);
        assert_eq!(untrusted.json_digest(), Digest::of(&blob.json));
        assert_eq!(untrusted.compressed_digest(), Digest::of(compressed));
        assert!(!untrusted.matches(&TocTrust::Compressed(other)));
        let trust = TocTrust::Uncompressed(untrusted.json_digest());
        assert!(untrusted.matches(&trust));
        assert_eq!(
            untrusted.parse_without_trust(&Limits::default()).unwrap(),
            read_toc(&location, compressed, &trust, &Limits::default()).unwrap()
        );
    }
}

/// What containers/storage has written since 2024: TOC, then a tar-split
/// frame, then the long footer with the other magic; its own annotations; in
/// the TOC no chunk digest for a single chunk, ends of units, holes, local
/// times with fractions, and fields that concern nobody else.
#[test]
fn the_latest_dialect_of_zstd_chunked_is_read() {
    let format = Format::ZstdChunked;
    let (one, start, end) = (&b"one chunk"[..], &b"start"[..], &b"end"[..]);
    let mut bytes = blobs::compress(format, b"a tar header");
    let mut place = |content: &[u8]| {
        let offset = bytes.len();
        bytes.extend(blobs::compress(format, content));
        (offset, bytes.len())
    };
    let ((one_at, one_end), _) = (place(one), place(b"padding, header"));
    let ((start_at, _), (hole_at, _)) = (place(start), place(&[0; 3000]));
    let (end_at, end_end) = place(end);
    place(b"padding, end of the tar");
    let digest = |content: &[u8]| Digest::of(content).to_string();
    let holey = [start, &[0; 3000], end].concat();
    let json = serde_json::json!({
        "version": 1,
        "entries": [
            {"type": "dir", "name": "d/", "mode": 493, "modtime": "2024-06-01T12:00:00.123456789+02:00",
             "accesstime": "0001-01-01T00:00:00Z", "changetime": "0001-01-01T00:00:00Z"},
            {"type": "reg", "name": "d/one", "mode": 420, "size": one.len(), "uid": 1,
             "modtime": "0001-01-01T00:00:00Z", "digest": digest(one), "offset": one_at, "endOffset": one_end},
            {"type": "reg", "name": "d/holey", "size": holey.len(), "digest": digest(&holey),
             "offset": start_at, "endOffset": end_end, "chunkSize": start.len(), "chunkDigest": digest(start)},
            {"type": "chunk", "name": "d/holey", "offset": hole_at, "chunkOffset": start.len(),
             "chunkSize": 3000, "chunkDigest": digest(&[0; 3000]), "chunkType": "zeros"},
            {"type": "chunk", "name": "d/holey", "offset": end_at, "chunkOffset": start.len() + 3000,
             "chunkSize": end.len(), "chunkDigest": digest(end)},
            {"type": "reg", "name": "d/empty"},
        ],
        "tarSplitDigest": digest(b"tar-split"),
    })
    .to_string();
    let toc = blobs::compress(format, json.as_bytes());
    let position = (bytes.len() as u64 + 8, toc.len() as u64, json.len() as u64);
    blobs::skippable(&mut bytes, &toc);
    let split = (bytes.len() as u64 + 8, 9, 9);
    blobs::skippable(&mut bytes, b"tar-split");
    let numbers = [
        position.0, position.1, position.2, 1, split.0, split.1, split.2,
    ];
    let mut footer: Vec<u8> = numbers
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect();
    footer.extend(b"GNUlInUx");
    blobs::skippable(&mut bytes, &footer);

    let prefix = "io.github.containers.zstd-chunked.";
    let annotations = [
        ("manifest-checksum", digest(&toc)),
        (
            "manifest-position",
            format!("{}:{}:{}:1", position.0, position.1, position.2),
        ),
        (
            "tarsplit-position",
            format!("{}:{}:{}", split.0, split.1, split.2),
        ),
    ]
    .map(|(name, value)| (format!("{prefix}{name}"), value));
    let annotations = LayerAnnotations::parse(&annotations.into()).unwrap();
    let location = locate_toc(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(annotations.toc_location().as_ref(), Some(&location));
    let compressed = location.slice_of(&bytes, bytes.len() as u64).unwrap();
    let trust = annotations.trust().unwrap();
    let toc = read_toc(&location, compressed, &trust, &Limits::default()).unwrap();

    let [root, directory, one_node, holey_node, empty] = toc.nodes() else {
        panic!("{:?}", toc.nodes());
    };
    assert_eq!((root.links, directory.links, empty.links), (3, 2, 1));
    let noon = Mtime {
        secs: 1_717_236_000,
        nanos: 123_456_789,
    };
    assert_eq!((directory.mtime, one_node.mtime), (noon, Mtime::default()));
    assert_eq!(
        (one_node.mode, one_node.uid, holey_node.mode),
        (0o644, 1, 0)
    );
    let read: Vec<Vec<u8>> = toc
        .chunks()
        .iter()
        .map(|chunk| match chunk.source {
            ChunkSource::Zeros => vec![0; chunk.size as usize],
            ChunkSource::Blob { unit, inner_offset } => {
                let range = unit.offset as usize..(unit.offset + unit.size) as usize;
                let wanted = Wanted {
                    inner_offset,
                    size: chunk.size,
                    digest: chunk.digest,
                };
                let mut content = Vec::new();
                decode_unit(format, &bytes[range], &[wanted], |_, chunk| {
                    content = chunk.to_vec();
                })
                .unwrap();
                content
            }
        })
        .collect();
    assert_eq!(read, [one, start, &[0; 3000], end]);
    assert_eq!(toc.chunks()[2].source, ChunkSource::Zeros);
    // Units are exactly as long as their frames, where the TOC says so.
    let ChunkSource::Blob { unit, .. } = toc.chunks()[3].source else {
        panic!()
    };
    assert_eq!(
        (unit.offset, unit.size),
        (end_at as u64, (end_end - end_at) as u64)
    );
}

fn refusal(format: Format, compressed: &[u8], size: Option<u64>, limits: &Limits) -> TocError {
    let location = TocLocation {
        format,
        offset: 1000,
        compressed_size: compressed.len() as u64,
        uncompressed_size: size,
    };
    let trust = TocTrust::Compressed(Digest::of(compressed));
    let refused = read_toc(&location, compressed, &trust, limits).unwrap_err();
    let untrusted = UntrustedToc::read(&location, compressed, limits);
    assert_eq!(untrusted.unwrap_err().to_string(), refused.to_string());
    refused
}

fn toc_tar(name: &str, size: u64, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name).unwrap();
    header.set_size(size);
    header.set_cksum();
    [header.as_bytes().as_slice(), content].concat()
}

#[test]
fn bombs_and_lies_about_sizes_are_refused() {
    let limits = Limits {
        max_toc_bytes: 1 << 20,
        ..Limits::default()
    };
    let zeros = vec![0; 64 << 20];
    let gzip = blobs::compress(
        Format::Estargz,
        &toc_tar("stargz.index.json", 64 << 20, &zeros),
    );
    let zstd = blobs::compress(Format::ZstdChunked, &zeros);
    let refused = refusal(Format::Estargz, &gzip, None, &limits);
    assert!(matches!(refused, TocError::TooLarge { .. }), "{refused}");
    // The same with a trailer that hides it.
    let mut hidden = gzip;
    let end = hidden.len();
    hidden[end - 4..].fill(0);
    let refused = refusal(Format::Estargz, &hidden, None, &limits);
    assert!(matches!(refused, TocError::TooLarge { .. }), "{refused}");
    let refused = refusal(Format::ZstdChunked, &zstd, None, &limits);
    assert!(matches!(refused, TocError::TooLarge { .. }), "{refused}");
    for size in [Some(0), Some(1 << 20)] {
        let refused = refusal(Format::ZstdChunked, &zstd, size, &limits);
        assert!(matches!(refused, TocError::Compression { .. }), "{refused}");
    }
    let refused = refusal(Format::ZstdChunked, &zstd, Some(u64::MAX), &limits);
    assert!(matches!(refused, TocError::TooLarge { .. }), "{refused}");
    let small = blobs::compress(Format::ZstdChunked, b"{}");
    let refused = refusal(Format::ZstdChunked, &small, Some(3), &limits);
    assert!(
        matches!(
            refused,
            TocError::Size {
                expected: 3,
                actual: 2
            }
        ),
        "{refused}"
    );

    let location = TocLocation {
        format: Format::ZstdChunked,
        offset: 1000,
        compressed_size: small.len() as u64 + 1,
        uncompressed_size: Some(2),
    };
    let trust = TocTrust::Compressed(Digest::of(&small));
    let refused = read_toc(&location, &small, &trust, &limits).unwrap_err();
    assert!(matches!(refused, TocError::Size { .. }), "{refused}");
}

#[test]
fn an_estargz_toc_is_the_first_entry_of_its_tar() {
    let limits = Limits::default();
    let tar = |name: &str, size: u64, content: &[u8]| {
        blobs::compress(Format::Estargz, &toc_tar(name, size, content))
    };
    let json = br#"{"version":1,"entries":[]}"#;
    for bad in [
        tar("stargz.index.jso", json.len() as u64, json),
        tar("stargz.index.json", json.len() as u64 + 1, json),
        tar("stargz.index.json", 0o77777777777, json),
        blobs::compress(Format::Estargz, b"short"),
        blobs::compress(Format::Estargz, b""),
        b"no gzip at all".to_vec(),
        Vec::new(),
    ] {
        let refused = refusal(Format::Estargz, &bad, None, &limits);
        assert!(matches!(refused, TocError::Compression { .. }), "{refused}");
    }
    for bad in [&b"no zstd at all"[..], b""] {
        let refused = refusal(Format::ZstdChunked, bad, Some(10), &limits);
        assert!(matches!(
            refused,
            TocError::Compression { .. } | TocError::Size { .. }
        ));
    }
}
