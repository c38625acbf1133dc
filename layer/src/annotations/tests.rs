use super::*;

fn parse(pairs: &[(&str, &str)]) -> Result<LayerAnnotations, AnnotationError> {
    let annotations = pairs
        .iter()
        .map(|(key, value)| (key.to_string(), value.to_string()))
        .collect();
    LayerAnnotations::parse(&annotations)
}

fn location() -> TocLocation {
    TocLocation {
        format: Format::ZstdChunked,
        offset: 100,
        compressed_size: 20,
        uncompressed_size: Some(30),
    }
}

#[test]
fn all_dialects_are_read() {
    let json = Digest::of(b"json");
    let compressed = Digest::of(b"compressed");
    let (json_text, compressed_text) = (json.to_string(), compressed.to_string());

    let none = parse(&[("org.opencontainers.image.title", "x")]).unwrap();
    assert_eq!((none.trust(), none.toc_location()), (None, None));

    let estargz = parse(&[
        ("containerd.io/snapshot/stargz/toc.digest", &json_text),
        ("io.containers.estargz.uncompressed-size", "12345"),
    ])
    .unwrap();
    assert_eq!(estargz.trust(), Some(TocTrust::Uncompressed(json)));
    assert_eq!(estargz.toc_location(), None);
    assert_eq!(estargz.uncompressed_size(), Some(12345));

    let stargz_snapshotter = parse(&[
        ("containerd.io/snapshot/stargz/toc.digest", &json_text),
        (
            "io.containers.zstd-chunked.manifest-checksum",
            &compressed_text,
        ),
        (
            "io.containers.zstd-chunked.manifest-position",
            "100:20:30:1",
        ),
    ])
    .unwrap();
    assert_eq!(
        stargz_snapshotter.trust(),
        Some(TocTrust::Compressed(compressed))
    );
    assert_eq!(stargz_snapshotter.toc_digest(), Some(json));
    assert_eq!(stargz_snapshotter.toc_location(), Some(location()));

    let storage = parse(&[
        (
            "io.github.containers.zstd-chunked.manifest-checksum",
            &compressed_text,
        ),
        (
            "io.github.containers.zstd-chunked.manifest-position",
            "100:20:30:1",
        ),
        (
            "io.github.containers.zstd-chunked.tarsplit-position",
            "128:7:70",
        ),
    ])
    .unwrap();
    assert_eq!(storage.trust(), Some(TocTrust::Compressed(compressed)));
    assert_eq!(storage.toc_location(), Some(location()));
    assert_eq!(
        storage.tar_split(),
        Some(FramePosition {
            offset: 128,
            compressed_size: 7,
            uncompressed_size: 70
        })
    );
}

#[test]
fn what_does_not_parse_is_refused_by_name() {
    let position = "io.github.containers.zstd-chunked.manifest-position";
    for value in [
        "",
        "1",
        "100:20:30",
        "100:20:30:2",
        "100:20:30:1:1",
        "100:20:30:1:",
        "-1:20:30:1",
        "+100:20:30:1",
        "7:20:30:1",
        "100:0:30:1",
        "100:20: 30:1",
        "18446744073709551615:1:1:1",
        "18446744073709551616:1:1:1",
        "a:b:c:d",
    ] {
        let refused = parse(&[(position, value)]).unwrap_err();
        assert!(refused.to_string().contains(position), "{refused}");
    }
    for key in [
        "containerd.io/snapshot/stargz/toc.digest",
        "io.containers.zstd-chunked.manifest-checksum",
        "io.github.containers.zstd-chunked.manifest-checksum",
        "io.github.containers.zstd-chunked.tarsplit-position",
        "io.containers.estargz.uncompressed-size",
    ] {
        let refused = parse(&[(key, "sha256:nonsense")]).unwrap_err();
        assert!(refused.to_string().contains(key), "{refused}");
    }
}

#[test]
fn a_hint_is_read_or_ignored() {
    let hint = |value: &str| parse(&[(TOC_POSITION, value)]).unwrap().toc_hint();
    for (format, text) in [
        (Format::Estargz, "estargz:100:20:30"),
        (Format::ZstdChunked, "zstd-chunked:100:20:30"),
    ] {
        let expected = TocLocation {
            format,
            ..location()
        };
        assert_eq!(hint(text), Some(expected));
        assert_eq!(toc_position(format, 100, 20, 30), text);
    }
    for value in [
        "",
        "100:20:30",
        "gzip:100:20:30",
        "estargz:100:20",
        "estargz:100:20:30:1",
        "estargz:100:0:30",
        "estargz:-1:20:30",
        "estargz:18446744073709551615:1:1",
    ] {
        assert_eq!(hint(value), None, "{value}");
    }
    let stated = parse(&[(TOC_POSITION, "estargz:100:20:30")]).unwrap();
    assert_eq!(stated.toc_location(), None, "nothing to rely on");
    assert_eq!(stated.without_position(), LayerAnnotations::default());
}

#[test]
fn two_spellings_must_agree() {
    let [new, old] = ZSTD_CHUNKED_PREFIXES.map(|prefix| format!("{prefix}{MANIFEST_POSITION}"));
    assert!(parse(&[(&new, "100:20:30:1"), (&old, "100:20:30:1")]).is_ok());
    assert_eq!(
        parse(&[(&new, "100:20:30:1"), (&old, "100:20:31:1")]),
        Err(AnnotationError::Contradiction(new, old))
    );
}
