//! The tar-split frame.

use base64::prelude::{BASE64_STANDARD, Engine as _};

use super::super::crc64::Crc64;
use super::*;
use crate::{TarPart, TarSplit, locate_toc};

#[test]
fn tar_split_rebuilds_the_tar() {
    let mut tar = archive(&[
        directory("d/"),
        file("d/one", &noise(70_000)),
        file("empty", b""),
        file(&"long/".repeat(40), b"x"),
        link("hard", Kind::HardLink, "d/one"),
    ]);
    tar.resize(tar.len().next_multiple_of(10_240), 0);
    let (blob, tail) = write_layer(&tar, &options(Format::ZstdChunked, 4096), &[]).unwrap();
    let toc = toc(Format::ZstdChunked, &blob, &tail);
    let at = position(&tail, "io.github.containers.zstd-chunked.tarsplit-position");
    let frame = &blob[at[0]..at[0] + at[1]];
    assert_eq!(toc["tarSplitDigest"], Digest::of(frame).to_string());
    let lines = zstd::stream::decode_all(frame).unwrap();
    assert_eq!(lines.len(), at[2]);
    let contents = files(Format::ZstdChunked, &blob, &toc);
    let mut rebuilt = Vec::new();
    for (position, line) in lines.split_inclusive(|b| *b == b'\n').enumerate() {
        let line: Value = serde_json::from_slice(line).unwrap();
        assert_eq!(line["position"], position);
        let payload = line["payload"].as_str();
        let payload = payload.map(|p| BASE64_STANDARD.decode(p).unwrap());
        if line["type"] == 2 {
            rebuilt.extend(payload.unwrap());
        } else if line["size"].as_u64().is_some() {
            let (_, content) = contents.iter().find(|(n, _)| line["name"] == **n).unwrap();
            let mut crc = Crc64::new();
            crc.update(content);
            assert_eq!(payload.unwrap(), crc.finish().to_be_bytes());
            rebuilt.extend(content);
        }
    }
    assert_eq!(rebuilt, tar);
    // Readers find it after the TOC, and get the same of it.
    let size = blob.len() as u64;
    let range = locate_toc(&blob, size).unwrap().tar_split(size).unwrap();
    assert_eq!(range, at[0] as u64 - 8..size - 48);
    let after_toc = &blob[range.start as usize..range.end as usize];
    let mut split = TarSplit::new(after_toc, after_toc.len() as u64).unwrap();
    let mut read = Vec::new();
    while let Some(part) = split.next_part().unwrap() {
        match part {
            TarPart::Bytes(bytes) => read.extend(bytes),
            TarPart::Content(size) => {
                let content = &tar[read.len()..read.len() + size as usize];
                assert!(contents.iter().any(|(_, found)| found == content));
                read.extend_from_slice(content);
            }
            TarPart::Unknown => panic!("a frame tells all"),
        }
    }
    assert_eq!(read, tar);
    let broken = &after_toc[..after_toc.len() - 9];
    assert!(TarSplit::new(broken, broken.len() as u64).is_err());
    let (blob, _) = write_layer(&tar, &options(Format::Estargz, 4096), &[]).unwrap();
    let size = blob.len() as u64;
    assert_eq!(locate_toc(&blob, size).unwrap().tar_split(size), None);
}
