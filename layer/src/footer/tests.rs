use super::*;

fn gzip(prefix: &[u8], text: &str) -> Vec<u8> {
    let mut footer = vec![0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 0xff];
    footer.extend(prefix);
    footer.extend(text.bytes());
    footer.extend([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);
    footer
}

fn estargz(offset: u64) -> Vec<u8> {
    gzip(&[26, 0, b'S', b'G', 22, 0], &format!("{offset:016x}STARGZ"))
}

fn legacy(offset: u64) -> Vec<u8> {
    gzip(&[22, 0], &format!("{offset:016x}STARGZ"))
}

fn external() -> Vec<u8> {
    gzip(&[21, 0, b'S', b'G', 17, 0], "STARGZEXTERNALTOC")
}

fn zstd(numbers: &[u64], magic: &[u8; 8]) -> Vec<u8> {
    let mut footer = SKIPPABLE.to_vec();
    footer.extend((numbers.len() as u32 * 8 + 8).to_le_bytes());
    footer.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    footer.extend(magic);
    footer
}

fn blob(size: usize, footer: &[u8]) -> Vec<u8> {
    let mut blob = vec![0xa5; size - footer.len()];
    blob.extend(footer);
    blob
}

fn locate(blob: &[u8]) -> Result<TocLocation, FooterError> {
    locate_toc(blob, blob.len() as u64)
}

#[test]
fn every_dialect_is_found() {
    for (footer, size) in [(estargz(700), 51), (legacy(700), 47)] {
        assert_eq!(footer.len(), size);
        let expected = TocLocation {
            format: Format::Estargz,
            offset: 700,
            compressed_size: 1000 - 700 - size as u64,
            uncompressed_size: None,
        };
        assert_eq!(locate(&blob(1000, &footer)), Ok(expected.clone()));
        assert_eq!(expected.chunks_end(), 700);
    }
    for magic in ZSTD_MAGICS {
        let short = zstd(&[708, 100, 2000, 1], magic);
        let long = zstd(&[708, 100, 2000, 1, 816, 30, 60], magic);
        assert_eq!((short.len(), long.len()), (48, 72));
        for footer in [short, long] {
            let expected = TocLocation {
                format: Format::ZstdChunked,
                offset: 708,
                compressed_size: 100,
                uncompressed_size: Some(2000),
            };
            assert_eq!(locate(&blob(1000, &footer)), Ok(expected.clone()));
            assert_eq!(expected.chunks_end(), 700);
        }
    }
}

#[test]
fn a_tail_is_enough_and_says_when_it_is_not() {
    let blob = blob(1000, &estargz(700));
    let location = locate(&blob).unwrap();
    for length in 0..=blob.len() {
        let found = locate_toc(&blob[1000 - length..], 1000);
        if length < FOOTER_MAX {
            assert_eq!(found, Err(FooterError::TailTooShort { needed: 72 }));
        } else {
            assert_eq!(found.as_ref(), Ok(&location));
        }
        let slice = location.slice_of(&blob[1000 - length..], 1000);
        assert_eq!(slice, (length >= 300).then_some(&blob[700..949]));
    }
    assert_eq!(
        locate_toc(b"short", 10),
        Err(FooterError::TailTooShort { needed: 10 })
    );
    assert_eq!(locate(b"short"), Err(FooterError::NotSeekable));
    assert_eq!(locate(b""), Err(FooterError::NotSeekable));
}

#[test]
fn an_external_toc_is_told_from_an_ordinary_layer() {
    assert_eq!(external().len(), 46);
    let refused = locate(&blob(1000, &external())).unwrap_err();
    assert_eq!(refused, FooterError::ExternalToc);
    assert!(refused.to_string().contains("sluice convert"), "{refused}");
    assert_eq!(locate(&[0; 1000]), Err(FooterError::NotSeekable));
}

#[test]
fn a_toc_outside_of_the_blob_is_refused() {
    for offset in [949, 950, 1000, u64::MAX / 2, u64::MAX] {
        let refused = locate(&blob(1000, &estargz(offset)));
        assert!(
            matches!(refused, Err(FooterError::OutsideBlob { .. })),
            "{offset}"
        );
    }
    for (offset, size) in [
        (0, 100),
        (7, 100),
        (8, 0),
        (900, 53),
        (1000, 1),
        (u64::MAX, 1),
        (1, u64::MAX),
        (u64::MAX, u64::MAX),
    ] {
        let footer = zstd(&[offset, size, 1, 1], ZSTD_MAGICS[0]);
        let refused = locate(&blob(1000, &footer));
        assert!(
            matches!(refused, Err(FooterError::OutsideBlob { .. })),
            "{offset} {size}"
        );
    }
    assert!(locate(&blob(1000, &zstd(&[900, 52, 1, 1], ZSTD_MAGICS[0]))).is_ok());
    assert_eq!(
        locate(&blob(1000, &zstd(&[900, 52, 1, 2], ZSTD_MAGICS[0]))),
        Err(FooterError::UnknownType(2))
    );
}

/// Every value of every byte: whatever is found lies within the blob.
#[test]
fn damage_never_leads_outside_of_the_blob() {
    let footers = [
        estargz(700),
        legacy(700),
        external(),
        zstd(&[708, 100, 2000, 1], ZSTD_MAGICS[0]),
        zstd(&[708, 100, 2000, 1, 816, 30, 60], ZSTD_MAGICS[1]),
    ];
    let mut found = 0;
    for footer in footers {
        let good = blob(1000, &footer);
        for at in 1000 - footer.len()..1000 {
            for value in 0..=255 {
                let mut bad = good.clone();
                bad[at] = value;
                if let Ok(location) = locate(&bad) {
                    found += 1;
                    assert!(location.compressed_size > 0);
                    assert!(location.range().end <= 1000 - 47);
                    assert!(location.chunks_end() <= location.offset);
                }
            }
        }
    }
    assert!(found > 0);
}
