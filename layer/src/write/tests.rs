use std::io::Read as _;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use proptest::prelude::*;
use serde_json::Value;
use sluice_oci::Digest;

use super::crc64::Crc64;
use super::header::{Header, Kind, Time, encode};
use super::*;
use crate::{TarPart, TarSplit, locate_toc};

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

/// Every way to cut files.
fn ways() -> impl Iterator<Item = Options> {
    FORMATS.into_iter().flat_map(|format| {
        let content = Options {
            chunking: Chunking::Content,
            ..options(format, 512)
        };
        [options(format, 4096), content]
    })
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

/// Bytes in the middle of a large file are inserted and others removed.
#[test]
fn two_versions_of_a_file_share_their_chunks_where_the_content_says() {
    let before = noise(400_000);
    let mut after = before.clone();
    after.splice(100_000..100_000, *b"inserted");
    after.drain(300_000..300_100);
    for format in FORMATS {
        let new_bytes = |chunking| {
            let options = Options {
                chunking,
                ..options(format, 8192)
            };
            let [before, after] = [&before, &after].map(|content| {
                // In another place of another tar.
                let other = file("other", &content[..content.len() % 1_000]);
                let tar = archive(&[other, file("large", content)]);
                let (blob, tail) = write_layer(&tar, &options, &[]).unwrap();
                let toc = toc(format, &blob, &tail);
                assert_eq!(files(format, &blob, &toc)[1].1, *content);
                let entries = toc["entries"].as_array().unwrap().clone();
                let of_file = entries.into_iter().filter(|entry| entry["name"] == "large");
                of_file
                    .map(|entry| {
                        let digest = entry["chunkDigest"].as_str().unwrap().to_owned();
                        (digest, entry["chunkSize"].as_u64().unwrap())
                    })
                    .collect::<Vec<_>>()
            });
            let new = after.iter().filter(|chunk| !before.contains(chunk));
            new.map(|(_, size)| size).sum::<u64>()
        };
        assert!(new_bytes(Chunking::Fixed) > 190_000);
        assert!(new_bytes(Chunking::Content) < 100_000);
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
fn prioritized_files_come_first_with_what_they_need() {
    let tar = archive(&[
        file("z", b"z"),
        directory("a/"),
        directory("a/b/"),
        file("a/b/target", b"t"),
        file("other", b"o"),
        link("a/link", Kind::HardLink, "a/b/target"),
    ]);
    let wanted = ["/a/link".to_owned(), "nowhere".to_owned()];
    for format in FORMATS {
        let (blob, tail) = write_layer(&tar, &Options::new(format), &wanted).unwrap();
        let unpacked = unpack(format, &blob);
        assert_eq!(Digest::of(&unpacked), tail.diff_id);
        let names: Vec<String> = tar::Archive::new(unpacked.as_slice())
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .filter(|name| name != TOC_NAME)
            .collect();
        assert_eq!(
            names,
            [
                "a/",
                "a/b/",
                "a/b/target",
                "a/link",
                PREFETCH_LANDMARK,
                "z",
                "other"
            ],
            "{format}"
        );
    }
    let mut index = TarIndex::new();
    index.push(&tar).unwrap();
    assert_eq!(index.order(&wanted).unwrap().missing, ["nowhere"]);
}

#[test]
fn converting_twice_leaves_one_toc_and_one_landmark() {
    let tar = archive(&[file("a", b"1"), file("b", b"2")]);
    let prioritized = ["b".to_owned()];
    let (first, _) = write_layer(&tar, &Options::new(Format::Estargz), &prioritized).unwrap();
    let again = unpack(Format::Estargz, &first);
    for format in FORMATS {
        let (blob, tail) = write_layer(&again, &Options::new(format), &[]).unwrap();
        let toc = toc(format, &blob, &tail);
        let names: Vec<&str> = toc["entries"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e["name"].as_str().unwrap())
            .filter(|n| *n != NO_PREFETCH_LANDMARK)
            .collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(Digest::of(&unpack(format, &blob)), tail.diff_id);
    }
}

#[test]
fn the_last_of_a_name_wins_and_a_linked_file_lives_on() {
    let tar = archive(&[
        file("a", b"old"),
        link("b", Kind::HardLink, "a"),
        link("c", Kind::HardLink, "b"),
        file("./a", b"new"),
        directory("d/"),
        file("d/inside", b"gone"),
        link("d", Kind::Symlink, "a"),
    ]);
    let (blob, tail) = write_layer(&tar, &Options::new(Format::ZstdChunked), &[]).unwrap();
    let toc = toc(Format::ZstdChunked, &blob, &tail);
    let seen: Vec<_> = toc["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| {
            (
                e["name"].as_str().unwrap(),
                e["type"].as_str().unwrap(),
                e["linkName"].as_str(),
            )
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("b", "reg", None),
            ("c", "hardlink", Some("b")),
            ("./a", "reg", None),
            ("d", "symlink", Some("a")),
        ]
    );
    assert_eq!(
        files(Format::ZstdChunked, &blob, &toc),
        [
            ("b".to_owned(), b"old".to_vec()),
            ("./a".to_owned(), b"new".to_vec())
        ]
    );
    // A tar-split with one name twice is refused by those who read it.
    let key = "io.github.containers.zstd-chunked.tarsplit-position";
    assert!(!tail.annotations.contains_key(key));
    assert!(toc.get("tarSplitDigest").is_none());
}

#[test]
fn a_directory_twice_keeps_the_attributes_of_both() {
    let with = |name: &str, value: &str| {
        let mut directory = header("d", Kind::Directory, 0);
        directory.xattrs.insert(name.into(), value.into());
        encode(&directory)
    };
    let tar = archive(&[with("user.a", "1"), with("user.b", "2")]);
    let (blob, tail) = write_layer(&tar, &Options::new(Format::ZstdChunked), &[]).unwrap();
    let toc = toc(Format::ZstdChunked, &blob, &tail);
    assert_eq!(toc["entries"].as_array().unwrap().len(), 1);
    let xattrs = toc["entries"][0]["xattrs"].as_object().unwrap();
    let names: Vec<&str> = xattrs.keys().map(String::as_str).collect();
    assert_eq!(names, ["user.a", "user.b"]);
}

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

#[test]
fn many_empty_entries_are_cut_into_bounded_units() {
    let entries: Vec<_> = (0..5000).map(|i| directory(&format!("d{i}/"))).collect();
    let tar = archive(&entries);
    let mut sizes = Vec::new();
    let mut push = |unit: RawUnit| sizes.push(unit.size());
    let units: &mut Units<'_> = &mut push;
    let mut splitter = Splitter::new(&Options::new(Format::ZstdChunked), false, units).unwrap();
    splitter.push(&tar, units).unwrap();
    splitter.finish(units).unwrap();
    assert_eq!(sizes.iter().sum::<usize>(), tar.len());
    assert!(sizes.iter().all(|size| *size <= 1 << 20), "{sizes:?}");
}

fn arbitrary_tar() -> impl Strategy<Value = Vec<u8>> {
    let content = prop_oneof![
        Just(0usize),
        1..600usize,
        Just(4096usize),
        4000..20_000usize
    ];
    let entry = (0..6u8, "[a-z\u{e9}]{1,6}(/[a-z]{1,120}){0,2}", content);
    proptest::collection::vec(entry, 0..20).prop_map(|entries| {
        let mut names: Vec<String> = Vec::new();
        let mut raw = Vec::new();
        for (kind, name, size) in entries {
            raw.push(match kind {
                0 => directory(&format!("{name}/")),
                1 => link(&name, Kind::Symlink, "somewhere/else"),
                2 if !names.is_empty() => link(&name, Kind::HardLink, &names[size % names.len()]),
                _ => {
                    names.push(name.clone());
                    file(&name, &noise(size))
                }
            });
        }
        archive(&raw)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pieces_do_not_change_the_blob(tar in arbitrary_tar(), cuts in proptest::collection::vec(1..3000usize, 1..8)) {
        for options in ways() {
            let Ok((_, whole)) = write_layer(&tar, &options, &[]) else { return Ok(()) };
            let mut raw = Vec::new();
            let mut push = |unit| raw.push(unit);
            let units: &mut Units<'_> = &mut push;
            let mut splitter = Splitter::new(&options, false, units).unwrap();
            let (mut rest, mut sizes) = (tar.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
                splitter.push(now, units).unwrap();
                rest = later;
            }
            let split = splitter.finish(units).unwrap();
            let mut compressor = UnitCompressor::new(&options).unwrap();
            let mut assembler = Assembler::new();
            for unit in &raw {
                assembler.place(&compressor.compress(unit).unwrap());
            }
            prop_assert_eq!(finish(split, assembler).unwrap(), whole);
        }
    }

    #[test]
    fn any_tar_keeps_its_files(tar in arbitrary_tar()) {
        for options in ways() {
            let format = options.format;
            let Ok((blob, tail)) = write_layer(&tar, &options, &[]) else { return Ok(()) };
            let unpacked = unpack(format, &blob);
            prop_assert_eq!(Digest::of(&unpacked), tail.diff_id);
            if format == Format::ZstdChunked {
                prop_assert_eq!(&unpacked, &tar);
            }
            files(format, &blob, &toc(format, &blob, &tail));
        }
    }

    #[test]
    fn no_input_panics(mut tar in arbitrary_tar(), flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20)) {
        for (at, value) in flips {
            let at = at.index(tar.len());
            tar[at] = value;
        }
        let _ = write_layer(&tar, &options(Format::Estargz, 4096), &[]);
    }
}

#[test]
fn very_large_files_have_larger_chunks() {
    let options = Options::new(Format::Estargz);
    let gib = 1 << 30;
    for (size, expected) in [
        (0, 64 << 10),
        (gib, 64 << 10),
        (gib + 1, 128 << 10),
        (16 * gib, 1 << 20),
        (64 * gib, 4 << 20),
        (1024 * gib, 4 << 20),
        (u64::MAX, 4 << 20),
    ] {
        assert_eq!(options.chunk_size_of(size), expected, "{size}");
    }
    let chunk_size = 8 << 20;
    let larger = Options {
        chunk_size,
        ..options
    };
    assert_eq!(larger.chunk_size_of(gib), chunk_size);
    let chunking = Chunking::Content;
    let content = Options {
        chunking,
        ..options
    };
    assert_eq!(content.chunk_size_of(16 * gib), 64 << 10);
}
