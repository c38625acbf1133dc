use std::io::Read as _;

use serde_json::Value;
use sluice_oci::Digest;

use super::header::{Header, Kind, Time, encode};
use super::*;

mod cutting;
mod order;
mod random;
mod tar_split;

const FORMATS: [Format; 2] = [Format::Estargz, Format::ZstdChunked];

fn header(name: &str, kind: Kind, size: u64) -> Header {
    Header {
        kind,
        name: name.into(),
        link: Vec::new(),
        mode: 0o755,
        uid: 1000,
        gid: 7,
        user: b"me".to_vec(),
        group: b"us".to_vec(),
        size,
        mtime: Time {
            secs: 1_700_000_000,
            nanos: 123_000_000,
        },
        atime: None,
        ctime: None,
        dev_major: 0,
        dev_minor: 0,
        xattrs: Default::default(),
    }
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    let mut entry = encode(&header(name, Kind::Regular, content.len() as u64));
    entry.extend(content);
    entry.resize(entry.len().next_multiple_of(512), 0);
    entry
}

fn link(name: &str, kind: Kind, target: &str) -> Vec<u8> {
    let mut header = header(name, kind, 0);
    header.link = target.into();
    encode(&header)
}

fn directory(name: &str) -> Vec<u8> {
    encode(&header(name, Kind::Directory, 0))
}

fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut tar = entries.concat();
    tar.resize(tar.len() + 1024, 0);
    tar
}

fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    });
    next.take(size).collect()
}

fn options(format: Format, chunk_size: u64) -> Options {
    Options {
        chunk_size,
        ..Options::new(format)
    }
}

/// The whole blob as an ordinary runtime decompresses it.
fn unpack(format: Format, blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    match format {
        Format::Estargz => flate2::read::MultiGzDecoder::new(blob)
            .read_to_end(&mut tar)
            .unwrap(),
        Format::ZstdChunked => zstd::stream::read::Decoder::new(blob)
            .unwrap()
            .read_to_end(&mut tar)
            .unwrap(),
    };
    tar
}

fn position(tail: &Tail, key: &str) -> Vec<usize> {
    let numbers = tail.annotations[key].split(':');
    numbers.map(|n| n.parse().unwrap()).collect()
}

fn toc(format: Format, blob: &[u8], tail: &Tail) -> Value {
    let json = match format {
        Format::Estargz => {
            let footer = &blob[blob.len() - 51..];
            let offset = std::str::from_utf8(&footer[16..32]).unwrap();
            let offset = usize::from_str_radix(offset, 16).unwrap();
            let mut tar = Vec::new();
            flate2::read::GzDecoder::new(&blob[offset..])
                .read_to_end(&mut tar)
                .unwrap();
            let mut archive = tar::Archive::new(tar.as_slice());
            let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
            let mut json = Vec::new();
            entry.read_to_end(&mut json).unwrap();
            json
        }
        Format::ZstdChunked => {
            let at = position(tail, "io.containers.zstd-chunked.manifest-position");
            let json = zstd::stream::decode_all(&blob[at[0]..at[0] + at[1]]).unwrap();
            assert_eq!(json.len(), at[2]);
            json
        }
    };
    assert_eq!(Digest::of(&json), tail.toc_digest);
    serde_json::from_slice(&json).unwrap()
}

/// Decodes every chunk from its offset alone and rebuilds all files.
fn files(format: Format, blob: &[u8], toc: &Value) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for entry in toc["entries"].as_array().unwrap() {
        let kind = entry["type"].as_str().unwrap();
        if kind == "reg" {
            files.push((entry["name"].as_str().unwrap().to_owned(), Vec::new()));
        }
        let Some(offset) = entry["offset"].as_u64() else {
            continue;
        };
        let size = entry["chunkSize"]
            .as_u64()
            .or(entry["size"].as_u64())
            .unwrap();
        let rest = &blob[offset as usize..];
        let mut chunk = Vec::new();
        match format {
            Format::Estargz => flate2::read::GzDecoder::new(rest).read_to_end(&mut chunk),
            Format::ZstdChunked => zstd::stream::read::Decoder::with_buffer(rest)
                .unwrap()
                .single_frame()
                .read_to_end(&mut chunk),
        }
        .unwrap();
        chunk.truncate(size as usize);
        let digest = entry["chunkDigest"].as_str().unwrap();
        assert_eq!(Digest::of(&chunk).to_string(), digest);
        files.last_mut().unwrap().1.extend(chunk);
    }
    for entry in toc["entries"].as_array().unwrap() {
        if entry["type"] == "reg" {
            let name = entry["name"].as_str().unwrap();
            let (_, content) = files.iter().find(|(n, _)| n == name).unwrap();
            assert_eq!(content.len() as u64, entry["size"].as_u64().unwrap_or(0));
            assert_eq!(entry["digest"], Digest::of(content).to_string());
        }
    }
    files.retain(|(name, _)| !name.ends_with(".landmark"));
    files
}

#[test]
fn both_formats_hold_every_file_and_an_ordinary_tar() {
    let big = noise(100_000);
    let tar = archive(&[
        directory("usr/"),
        file("usr/empty", b""),
        file("usr/small", b"hello"),
        file("usr/big", &big),
        link("usr/hard", Kind::HardLink, "usr/big"),
        link("usr/soft", Kind::Symlink, "../x"),
        file("usr/exact", &noise(8192)),
    ]);
    for format in FORMATS {
        let (blob, tail) = write_layer(&tar, &options(format, 4096), &[]).unwrap();
        let unpacked = unpack(format, &blob);
        assert_eq!(Digest::of(&unpacked), tail.diff_id, "{format}");
        assert_eq!(unpacked.len() as u64, tail.uncompressed_size);
        assert_eq!(tail.input_diff_id, Some(Digest::of(&tar)));
        let toc = toc(format, &blob, &tail);
        let expected = [
            ("usr/empty", Vec::new()),
            ("usr/small", b"hello".to_vec()),
            ("usr/big", big.clone()),
            ("usr/exact", noise(8192)),
        ]
        .map(|(name, content)| (name.to_owned(), content));
        assert_eq!(files(format, &blob, &toc), expected, "{format}");
        let names: Vec<String> = tar::Archive::new(unpacked.as_slice())
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        match format {
            Format::ZstdChunked => assert_eq!(unpacked, tar),
            Format::Estargz => {
                assert_eq!(names.first().unwrap(), NO_PREFETCH_LANDMARK);
                assert_eq!(names.last().unwrap(), TOC_NAME);
                assert_eq!(names.len(), 9);
            }
        }
    }
}

#[test]
fn footers_are_the_documented_bytes() {
    let tar = archive(&[file("a", b"b")]);
    let (blob, _) = write_layer(&tar, &Options::new(Format::Estargz), &[]).unwrap();
    let footer = &blob[blob.len() - 51..];
    assert_eq!(
        &footer[..16],
        b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0"
    );
    assert_eq!(&footer[32..], b"STARGZ\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");

    let (blob, tail) = write_layer(&tar, &Options::new(Format::ZstdChunked), &[]).unwrap();
    let footer = &blob[blob.len() - 48..];
    assert_eq!(&footer[..8], b"\x50\x2a\x4d\x18\x28\0\0\0");
    let numbers: Vec<usize> = footer[8..40]
        .chunks(8)
        .map(|n| u64::from_le_bytes(n.try_into().unwrap()) as usize)
        .collect();
    assert_eq!(
        numbers,
        position(&tail, "io.containers.zstd-chunked.manifest-position")
    );
    assert_eq!(&footer[40..], b"\x47\x6e\x55\x6c\x49\x6e\x55\x78");
}

#[test]
fn toc_fields_come_in_the_documented_order() {
    let mut entry = header("f", Kind::Regular, 1);
    entry
        .xattrs
        .insert(b"user.k".to_vec(), b"\x00\xff".to_vec());
    let mut raw = encode(&entry);
    raw.extend(b"x");
    raw.resize(raw.len().next_multiple_of(512), 0);
    let (blob, tail) = write_layer(&archive(&[raw]), &Options::new(Format::Estargz), &[]).unwrap();
    let toc = toc(Format::Estargz, &blob, &tail);
    let entry = toc["entries"][1].as_object().unwrap();
    let keys: Vec<&str> = entry.keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        [
            "name",
            "type",
            "size",
            "modtime",
            "mode",
            "uid",
            "gid",
            "userName",
            "groupName",
            "offset",
            "xattrs",
            "digest",
            "chunkDigest"
        ]
    );
    assert_eq!(entry["modtime"], "2023-11-14T22:13:20.123Z");
    assert_eq!(entry["xattrs"]["user.k"], "AP8=");
}

#[test]
fn what_is_no_sound_tar_is_refused() {
    let tar = archive(&[file("a", &noise(2000)), file("b", b"x")]);
    let options = Options::new(Format::Estargz);
    let write = |tar: &[u8]| write_layer(tar, &options, &[]).map(|_| ());
    assert_eq!(write(&noise(4096)), Err(WriteError::NotTar));
    assert_eq!(write(b"short"), Err(WriteError::NotTar));
    assert!(matches!(
        write(&tar[..1000]),
        Err(WriteError::Truncated { position: 1000 })
    ));
    assert!(matches!(
        write(&tar[..600]),
        Err(WriteError::Truncated { .. })
    ));
    let mut damaged = tar.clone();
    damaged[3584 + 20] ^= 1;
    assert!(matches!(write(&damaged), Err(WriteError::Damaged(_))));
    // Neither end-of-archive blocks nor entries are required.
    assert_eq!(write(&tar[..tar.len() - 1024]), Ok(()));
    assert_eq!(write(b""), Ok(()));
}

#[test]
fn regression_the_last_entry_may_lack_its_padding() {
    let mut tar = [file("first", b"1"), file("last", b"2")].concat();
    tar.truncate(tar.len() - 500);
    for format in FORMATS {
        for prioritized in [vec![], vec!["last".to_owned()]] {
            let (blob, tail) = write_layer(&tar, &Options::new(format), &prioritized).unwrap();
            let unpacked = unpack(format, &blob);
            assert_eq!(Digest::of(&unpacked), tail.diff_id);
            let toc = toc(format, &blob, &tail);
            assert_eq!(files(format, &blob, &toc).len(), 2);
            let mut archive = tar::Archive::new(unpacked.as_slice());
            let names = archive.entries().unwrap().filter(|e| e.is_ok()).count();
            let reserved = match (format, prioritized.is_empty()) {
                (Format::Estargz, _) => 2,
                (Format::ZstdChunked, false) => 1,
                (Format::ZstdChunked, true) => 0,
            };
            assert_eq!(names, 2 + reserved, "{format} {prioritized:?}");
        }
    }
}

#[test]
fn what_a_toc_cannot_hold_is_said() {
    let options = Options::new(Format::Estargz);
    let mut latin1 = header("x", Kind::Regular, 0);
    latin1.name = b"caf\xe9".to_vec();
    for entry in [
        encode(&latin1),
        link("a", Kind::HardLink, "in-a-lower-layer"),
    ] {
        let refused = write_layer(&archive(&[entry]), &options, &[]);
        assert!(matches!(refused, Err(WriteError::Unsupported(_))));
    }
}
