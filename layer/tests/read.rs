//! From whole blobs to trees and content, made here byte by byte.

mod blobs;

use blobs::{Blob, Part};
use sluice_layer::{
    ChunkSource, Format, Limits, NodeKind, TocError, TocTrust, UntrustedToc, Wanted, decode_unit,
    locate_toc, read_toc,
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
