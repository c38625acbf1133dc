//! Sluice and the others read what either writes: stargz-snapshotter's
//! library through the Go program in `tests/reference`, and skopeo.

#![allow(clippy::unwrap_used, reason = "a test through and through")]

mod archive;
mod listing;
mod rebuilt;
mod reference;
mod skopeo;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;

use archive::{Archive, noise};
use listing::Listing;
use sluice_layer::write::{Chunking, Options, write_layer};
use sluice_layer::{Format, LayerAnnotations, Limits, TocTrust, locate_toc, read_toc};

const FORMATS: [Format; 2] = [Format::Estargz, Format::ZstdChunked];

/// A layer with one of everything.
fn odd_layer() -> Vec<u8> {
    let mut tar = Archive::new();
    tar.directory("./", 0o755);
    tar.directory("usr/", 0o755);
    tar.directory("usr/bin/", 0o755);
    tar.file("usr/bin/tool", 0o4755, &noise(100_000));
    tar.file("usr/bin/small", 0o755, b"#!/bin/sh\n");
    tar.file("usr/empty", 0o644, b"");
    tar.file("usr/one-chunk-exactly", 0o644, &noise(65_536));
    tar.file(
        "usr/sparse",
        0o600,
        &[&noise(5_000)[..], &vec![0; 300_000], &noise(70_000)].concat(),
    );
    tar.hard_link("usr/bin/same", "usr/bin/tool", 0o4755);
    tar.directory("var/", 0o1777);
    tar.hard_link("var/same-again", "usr/bin/same", 0o4755);
    tar.symlink("usr/lib", "bin");
    tar.symlink("var/dangling", "/no/where/…");
    tar.device("var/null", tar::EntryType::Char, 1, 3);
    tar.device("var/disk", tar::EntryType::Block, 259, 70_000);
    tar.device("var/pipe", tar::EntryType::Fifo, 0, 0);
    tar.file("implied/parents/of/file", 0o640, b"content");
    tar.file("names/ünïcödé <&> \" \\ 😀", 0o644, b"utf-8");
    tar.file(&format!("names/{}", "long".repeat(60)), 0o644, b"long");
    tar.file(
        &format!("deep/{}x", "directory/".repeat(40)),
        0o644,
        b"deep",
    );
    tar.xattrs(&[
        ("user.text", b"value"),
        (
            "security.capability",
            b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        ),
    ]);
    tar.file("usr/bin/capable", 0o755, b"capable");
    tar.owner(1_000_000, 3_000_000);
    tar.file("usr/owned", 0o644, b"owned");
    tar.directory("cleared/", 0o700);
    tar.file("cleared/.wh..wh..opq", 0o644, b"");
    tar.file("cleared/new", 0o644, b"new");
    tar.file("usr/.wh.gone", 0o644, b"");
    tar.finish()
}

/// Reads a blob as the node does: annotations, footer, TOC, every chunk.
fn read_blob(blob: &[u8], annotations: &BTreeMap<String, String>) -> Listing {
    let annotations = LayerAnnotations::parse(annotations).unwrap();
    let size = blob.len() as u64;
    let location = locate_toc(blob, size).unwrap();
    if let Some(stated) = annotations.toc_location() {
        assert_eq!(stated, location);
    }
    if let Some(hint) = annotations.toc_hint() {
        assert_eq!(
            (hint.format, hint.range()),
            (location.format, location.range())
        );
    }
    let compressed = location.slice_of(blob, size).unwrap();
    let limits = Limits::default();
    let toc = read_toc(
        &location,
        compressed,
        &annotations.trust().unwrap(),
        &limits,
    )
    .unwrap();
    let by_json = annotations.toc_digest().map(TocTrust::Uncompressed);
    let by_compressed = annotations
        .compressed_toc_digest()
        .map(TocTrust::Compressed);
    for trust in [by_json, by_compressed].into_iter().flatten() {
        assert_eq!(
            read_toc(&location, compressed, &trust, &limits).unwrap(),
            toc
        );
    }
    Listing::of_toc(&toc, blob)
}

#[test]
fn blobs_of_the_reference_are_read() {
    let tar = odd_layer();
    for format in FORMATS {
        for chunk_size in [0, 10_000, 65_536] {
            for prioritized in [&[][..], &["usr/bin/small", "usr/sparse", "var/same-again"]] {
                let (blob, annotations) = reference::build(&tar, format, chunk_size, prioritized);
                let ours = read_blob(&blob, &annotations);
                let theirs = reference::dump(&blob, &annotations);
                assert_eq!(theirs.landmark, !prioritized.is_empty());
                ours.assert_equals(&theirs, &format!("{format} {chunk_size} {prioritized:?}"));
            }
        }
    }
}

#[test]
fn our_blobs_are_read_by_the_reference() {
    let tar = odd_layer();
    for format in FORMATS {
        for (chunk_size, chunking) in [
            (10_000, Chunking::Fixed),
            (65_536, Chunking::Fixed),
            (Options::DEFAULT_CHUNK_SIZE, Chunking::Fixed),
            (10_000, Chunking::Content),
        ] {
            for prioritized in [&[][..], &["usr/bin/small", "usr/sparse", "var/same-again"]] {
                let options = Options {
                    chunk_size,
                    chunking,
                    ..Options::new(format)
                };
                let prioritized: Vec<String> =
                    prioritized.iter().map(|name| name.to_string()).collect();
                let (blob, tail) = write_layer(&tar, &options, &prioritized).unwrap();
                let ours = read_blob(&blob, &tail.annotations);
                let theirs = reference::dump(&blob, &tail.annotations);
                assert_eq!(theirs.landmark, !prioritized.is_empty());
                ours.assert_equals(&theirs, &format!("{options:?} {prioritized:?}"));
            }
        }
    }
}

#[test]
fn the_prefetch_ends_where_the_prioritized_files_do() {
    let tar = odd_layer();
    for format in FORMATS {
        let named = ["usr/bin/small", "usr/sparse"];
        let names = named.map(str::to_owned);
        let written = write_layer(&tar, &Options::new(format), &names).unwrap();
        let built = reference::build(&tar, format, 0, &named);
        for (blob, annotations) in [(written.0, written.1.annotations), built] {
            let listing = read_blob(&blob, &annotations);
            let end = listing.prefetch_end.unwrap();
            for (path, offset) in &listing.offsets {
                assert_eq!(
                    *offset < end,
                    named.contains(&path.as_str()),
                    "{format} {path}"
                );
            }
        }
        let (blob, tail) = write_layer(&tar, &Options::new(format), &[]).unwrap();
        assert_eq!(read_blob(&blob, &tail.annotations).prefetch_end, None);
    }
}

/// The same tar by another writer gives the same tree and content.
#[test]
fn blobs_of_skopeo_are_read() {
    let tar = odd_layer();
    let (blob, annotations) = skopeo::convert(&tar);
    assert!(
        annotations
            .keys()
            .any(|key| key.contains("zstd-chunked.manifest-checksum"))
    );
    let theirs = read_blob(&blob, &annotations);
    let options = Options::new(Format::ZstdChunked);
    let (blob, tail) = write_layer(&tar, &options, &[]).unwrap();
    let ours = read_blob(&blob, &tail.annotations);
    ours.without_chunks()
        .assert_equals(&theirs.without_chunks(), "skopeo");
}

/// A tar in which entries meet and contradict each other.
fn contradictory_layer() -> Vec<u8> {
    let mut tar = Archive::new();
    tar.owner(5, 5);
    tar.directory("./", 0o700);
    tar.file("twice", 0o644, b"first");
    tar.file("twice", 0o600, b"second");
    tar.directory("becomes-file/", 0o755);
    tar.file("becomes-file/below", 0o644, b"gone");
    tar.file("becomes-file", 0o644, b"file");
    tar.symlink("becomes-dir", "twice");
    tar.directory("becomes-dir/", 0o711);
    tar.file("becomes-dir/below", 0o644, b"kept");
    tar.file("merged/one", 0o644, b"1");
    tar.xattrs(&[("user.a", b"1"), ("user.b", b"1")]);
    tar.directory("merged/", 0o700);
    tar.xattrs(&[("user.b", b"2"), ("user.c", b"2")]);
    tar.directory("merged/", 0o750);
    tar.file("merged/two", 0o644, b"2");
    tar.xattrs(&[("user.old", b"1")]);
    tar.file("linked/original", 0o644, b"linked");
    tar.owner(7, 8);
    tar.time("1600000000.25");
    tar.xattrs(&[("user.new", b"2")]);
    tar.hard_link("linked/second", "linked/original", 0o4711);
    tar.hard_link("third", "./linked/second", 0o4711);
    tar.xattrs(&[("user.old", b"1"), ("user.kept", b"1")]);
    tar.file("lone/original", 0o644, b"lone");
    tar.owner(7, 8);
    tar.time("1600000000.25");
    tar.xattrs(&[("user.old", b"2")]);
    tar.hard_link("lone/second", "lone/original", 0o4711);
    tar.file("linked/original", 0o600, b"replaced");
    tar.file("lone/original", 0o600, b"replaced");
    tar.hard_link("link-to-link", "becomes-dir/below", 0o640);
    tar.symlink("symlink", "nowhere");
    tar.hard_link("same-symlink", "symlink", 0o600);
    tar.file(".wh.was-below", 0o644, b"");
    tar.file("merged/.wh.gone", 0o644, b"");
    tar.file(".wh.replaced", 0o644, b"");
    tar.file("replaced", 0o644, b"new");
    tar.file(".wh.replaced-dir", 0o644, b"");
    tar.directory("replaced-dir/", 0o755);
    tar.file("opaque/.wh..wh..opq", 0o644, b"");
    tar.file("opaque/new", 0o644, b"new");
    tar.xattrs(&[
        ("trusted.overlay.opaque", b"y"),
        ("trusted.x", b"y"),
        ("nonsense.x", b"y"),
    ]);
    tar.directory("not-opaque/", 0o755);
    tar.xattrs(&[("user.x", b"not on links")]);
    tar.symlink("symlink-with-xattr", "x");
    tar.time("-5.5");
    tar.file("before-1970", 0o644, b"");
    tar.time("99999999999");
    tar.file("after-2262", 0o644, b"");
    tar.device("device", tar::EntryType::Char, 0, 5);
    tar.finish()
}

/// Lazily or not, the same image is the same tree.
#[test]
fn a_layer_looks_as_containerd_unpacks_it() {
    let implied = ["implied", "names", "deep", "linked", "lone", "opaque"];
    for tar in [odd_layer(), contradictory_layer()] {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o755)).unwrap();
        reference::unpack(&tar, &root);
        let unpacked = Listing::of_directory(&root).with_certain_parts(&implied);
        for format in FORMATS {
            let (blob, tail) = write_layer(&tar, &Options::new(format), &[]).unwrap();
            let ours = read_blob(&blob, &tail.annotations).with_certain_parts(&implied);
            ours.assert_equals(&unpacked, &format.to_string());
        }
    }
}

/// What is decoded unit by unit, chunks and the bytes between, is the tar.
#[test]
fn a_layer_is_put_together_to_the_tar_that_it_was() {
    let plain = odd_layer();
    let named = ["usr/bin/small", "usr/sparse"];
    let mut layers = Vec::new();
    for format in FORMATS {
        for prioritized in [&[][..], &named[..]] {
            let (blob, annotations) = reference::build(&plain, format, 10_000, prioritized);
            layers.push((
                format!("reference, {format}, {prioritized:?}"),
                blob,
                annotations,
            ));
            let names: Vec<String> = prioritized.iter().map(|n| (*n).to_owned()).collect();
            let options = Options {
                chunk_size: 10_000,
                ..Options::new(format)
            };
            for tar in [&plain, &contradictory_layer()] {
                let (blob, tail) = write_layer(tar, &options, &names).unwrap();
                layers.push((
                    format!("ours, {format}, {prioritized:?}"),
                    blob,
                    tail.annotations,
                ));
            }
        }
    }
    let (blob, annotations) = skopeo::convert(&plain);
    layers.push(("skopeo".to_owned(), blob, annotations));
    for (which, blob, annotations) in layers {
        rebuilt::check(&which, &blob, &annotations);
    }
}
