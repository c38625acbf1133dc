//! Chunks and units, and the numbers that say where they are.

use super::*;

#[test]
fn chunks_of_all_dialects_are_read() {
    let toc = read(&[
        // stargz-snapshotter: the last chunk has no size.
        "{'name':'a','type':'reg','size':25,'offset':100,'digest':'@w','chunkSize':10,'chunkDigest':'@a'}",
        "{'name':'a','type':'chunk','offset':200,'chunkOffset':10,'chunkSize':10,'chunkDigest':'@b'}",
        "{'name':'a','type':'chunk','offset':300,'chunkOffset':20,'chunkDigest':'@c'}",
        // containers/storage: no chunk digest for a single chunk, an end, holes.
        "{'name':'b','type':'reg','size':5,'offset':400,'endOffset':450,'digest':'@d'}",
        "{'name':'c','type':'reg','size':30,'offset':500,'endOffset':570,'digest':'@w','chunkSize':10,'chunkDigest':'@e'}",
        "{'name':'c','type':'chunk','offset':540,'chunkOffset':10,'chunkSize':15,'chunkType':'zeros','chunkDigest':'@f'}",
        "{'name':'c','type':'chunk','offset':550,'chunkOffset':25,'chunkSize':5,'chunkDigest':'@g'}",
        // Several files in one unit, the first with the offset left out.
        "{'name':'d','type':'reg','size':4,'innerOffset':512,'digest':'@h'}",
        "{'name':'e','type':'reg','size':4,'innerOffset':1024,'digest':'@i'}",
        "{'name':'f','type':'reg','size':4,'offset':999000,'digest':'@j'}",
    ])
    .unwrap();
    let units = |path| chunks(&toc, path).iter().map(unit).collect::<Vec<_>>();
    assert_eq!(units("a"), [(100, 100, 0), (200, 100, 0), (300, 100, 0)]);
    assert_eq!(units("b"), [(400, 50, 0)]);
    assert_eq!(unit(&chunks(&toc, "c")[0]), (500, 40, 0));
    assert_eq!(chunks(&toc, "c")[1].source, ChunkSource::Zeros);
    assert_eq!(unit(&chunks(&toc, "c")[2]), (550, 20, 0));
    assert_eq!(
        (units("d"), units("e")),
        (vec![(0, 100, 512)], vec![(0, 100, 1024)])
    );
    assert_eq!(units("f"), [(999_000, 1000, 0)]);
    let described: Vec<_> = chunks(&toc, "a")
        .iter()
        .map(|chunk| (chunk.file_offset, chunk.size, chunk.digest))
        .collect();
    let digest = |text: &[u8]| Digest::of(text);
    assert_eq!(
        described,
        [
            (0, 10, digest(b"a")),
            (10, 10, digest(b"b")),
            (20, 5, digest(b"c"))
        ]
    );
    assert_eq!(chunks(&toc, "b")[0].digest, digest(b"d"));
}

#[test]
fn a_unit_is_no_larger_than_its_chunks_can_need() {
    let toc = read(&["{'name':'a','type':'reg','size':1000,'offset':100,'digest':'@a'}"]).unwrap();
    let (offset, size, _) = unit(&chunks(&toc, "a")[0]);
    assert_eq!((offset, size), (100, 1000 + 250 + 131_072));
}

#[test]
fn chunks_that_do_not_make_up_the_file_are_refused() {
    let file = |rest: &str| {
        format!("{{'name':'a','type':'reg','digest':'@w','offset':10,'chunkDigest':'@a',{rest}}}")
    };
    let chunk =
        |rest: &str| format!("{{'name':'a','type':'chunk','offset':20,'chunkDigest':'@b',{rest}}}");
    let sized = |offset, size| EntryError::ChunkSize { offset, size };
    let cases = [
        (
            file("'size':10,'chunkOffset':1"),
            None,
            EntryError::ChunkGap {
                expected: 0,
                actual: 1,
            },
        ),
        (file("'size':10,'chunkSize':11"), None, sized(0, 10)),
        (
            file("'size':10,'chunkSize':9"),
            None,
            EntryError::ChunksShort { end: 9, size: 10 },
        ),
        (
            file("'size':10,'chunkSize':5"),
            Some("'chunkOffset':4"),
            EntryError::ChunkGap {
                expected: 5,
                actual: 4,
            },
        ),
        (
            file("'size':10,'chunkSize':5"),
            Some("'chunkOffset':6"),
            EntryError::ChunkGap {
                expected: 5,
                actual: 6,
            },
        ),
        (
            file("'size':10,'chunkSize':5"),
            Some("'chunkOffset':5,'chunkSize':6"),
            sized(5, 10),
        ),
        (
            file("'size':10,'chunkSize':5"),
            Some("'chunkOffset':5,'chunkSize':4"),
            EntryError::ChunksShort { end: 9, size: 10 },
        ),
        (file("'size':10"), Some("'chunkOffset':10"), sized(10, 10)),
        (file("'size':0"), Some("'chunkOffset':0"), sized(0, 0)),
        (
            file("'size':10,'chunkSize':5"),
            Some("'chunkOffset':5,'chunkType':'other'"),
            EntryError::ChunkType("other".into()),
        ),
    ];
    for (first, second, expected) in cases {
        let mut entries = vec![first];
        entries.extend(second.map(chunk));
        let entries: Vec<_> = entries.iter().map(String::as_str).collect();
        assert_eq!(refusal(&entries), expected, "{entries:?}");
    }
    let lone = chunk("'chunkOffset':0");
    assert_eq!(refusal(&[&lone]), EntryError::ChunkWithoutFile);
    let after = ["{'name':'a','type':'fifo'}", &lone];
    assert_eq!(refusal(&after), EntryError::ChunkWithoutFile);
}

#[test]
fn a_file_left_open_is_blamed_by_its_own_name() {
    let refused = read(&[
        "{'name':'first','type':'reg','size':10,'offset':1,'chunkSize':5,'chunkDigest':'@a'}",
        "{'name':'second','type':'fifo'}",
    ])
    .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "entry 0 of the table of contents, 'first': its chunks end at 5, but the file has 10 bytes"
    );
}

#[test]
fn files_without_a_usable_digest_are_refused() {
    let file = |rest: &str| {
        refusal(&[&format!(
            "{{'name':'a','type':'reg','size':9,'offset':1{rest}}}"
        )])
    };
    assert_eq!(file(""), EntryError::DigestMissing);
    assert_eq!(
        file(",'digest':'@a','chunkSize':4"),
        EntryError::DigestMissing
    );
    for bad in ["md5:00", "sha256:00", "sha512:00", "x"] {
        assert_eq!(
            file(&format!(",'digest':'{bad}'")),
            EntryError::Digest(bad.to_owned())
        );
        assert_eq!(
            file(&format!(",'chunkDigest':'{bad}'")),
            EntryError::Digest(bad.to_owned())
        );
    }
}

#[test]
fn overlapping_chunks_are_refused() {
    let file = |name: &str, inner: u64, size: u64, digest: &str| {
        format!(
            "{{'name':'{name}','type':'reg','size':{size},'offset':5,'innerOffset':{inner},'digest':'@{digest}'}}"
        )
    };
    let read_two = |a: &str, b: &str| read(&[a, b]);
    let base = file("a", 10, 10, "x");
    for (inner, size, digest) in [
        (10, 10, "y"),
        (10, 11, "x"),
        (15, 10, "x"),
        (0, 11, "x"),
        (12, 2, "x"),
    ] {
        let refused = read_two(&base, &file("b", inner, size, digest));
        assert!(
            matches!(refused, Err(TocError::OverlappingChunks { offset: 5 })),
            "{inner} {size}"
        );
    }
    for (inner, size, digest) in [(10, 10, "x"), (20, 5, "y"), (0, 10, "y")] {
        assert!(
            read_two(&base, &file("b", inner, size, digest)).is_ok(),
            "{inner} {size}"
        );
    }
}

#[test]
fn numbers_out_of_range_are_refused() {
    let file = |rest: &str| format!("{{'name':'a','type':'reg','digest':'@a',{rest}}}");
    for field in [
        "size",
        "offset",
        "innerOffset",
        "endOffset",
        "chunkOffset",
        "chunkSize",
        "mode",
        "uid",
        "gid",
    ] {
        for value in [-1, i64::MIN] {
            let size = if field == "size" { "" } else { "'size':1," };
            let reason = refusal(&[&file(&format!("{size}'{field}':{value}"))]);
            assert!(
                matches!(reason, EntryError::OutOfRange { .. }),
                "{field} {reason}"
            );
        }
    }
    for field in ["uid", "gid"] {
        let reason = refusal(&[&file(&format!("'{field}':4294967295"))]);
        assert!(matches!(reason, EntryError::OutOfRange { .. }));
        assert!(read(&[&file(&format!("'{field}':4294967294"))]).is_ok());
    }
    for (field, value) in [
        ("devMajor", 4096),
        ("devMinor", 1_048_576),
        ("devMajor", -1),
    ] {
        let reason = refusal(&[&format!("{{'name':'c','type':'char','{field}':{value}}}")]);
        assert_eq!(reason, EntryError::OutOfRange { field, value });
    }
    for number in ["9223372036854775808", "1.5", "1e3", "'1'", "null", "true"] {
        let refused = read(&[&file(&format!("'size':{number}"))]);
        assert!(matches!(refused, Err(TocError::Json(_))), "{number}");
    }
}

#[test]
fn sizes_near_the_end_of_numbers_are_refused() {
    let huge = i64::MAX;
    let file = |name: &str, size: i64, rest: &str| {
        format!("{{'name':'{name}','type':'reg','digest':'@a','offset':5,'size':{size}{rest}}}")
    };
    let too_large = EntryError::LayerTooLarge { limit: 1 << 43 };
    assert_eq!(refusal(&[&file("a", huge, "")]), too_large);
    let half = file("a", 1 << 42, ",'chunkType':'zeros'");
    assert!(read(&[&half]).is_ok());
    assert!(read(&[&half, &half]).is_ok());
    assert_eq!(refusal(&[&half, &half, &file("b", 1, "")]), too_large);
    let unit = refusal(&[&file("a", 1, &format!(",'innerOffset':{huge}"))]);
    assert!(matches!(unit, EntryError::UnitTooLarge { .. }));
    let unit = refusal(&[&file("a", (64 << 20) + 1, "")]);
    assert!(matches!(unit, EntryError::UnitTooLarge { .. }));
    assert!(read(&[&file("a", 64 << 20, "")]).is_ok());
    for offset in [END, huge as u64] {
        let entry = format!("{{'name':'a','type':'reg','digest':'@a','offset':{offset},'size':1}}");
        assert_eq!(
            refusal(&[&entry]),
            EntryError::OutsideBlob { offset, end: END }
        );
    }
    // A bound beyond the TOC is no bound, and one before the chunk no harm.
    for end in [huge, 1] {
        let toc = read(&[&file("a", 9, &format!(",'endOffset':{end}"))]).unwrap();
        let (offset, size, _) = unit_of_a(&toc);
        assert!(offset == 5 && offset + size <= END);
    }
}

fn unit_of_a(toc: &Toc) -> (u64, u64, u64) {
    unit(&chunks(toc, "a")[0])
}

#[test]
fn landmarks_are_hidden_and_bound_the_prefetch() {
    let landmark = "{'name':'.prefetch.landmark','type':'reg','size':1,'offset':50,'digest':'@l'}";
    let file = |name: &str, offset: u64| {
        format!("{{'name':'{name}','type':'reg','size':1,'offset':{offset},'digest':'@a'}}")
    };
    let toc = read(&[&file("a", 20), landmark, &file("b", 60)]).unwrap();
    assert_eq!(toc.prefetch_end(), Some(50));
    assert_eq!((toc.nodes().len(), toc.chunks().len()), (3, 2));
    assert_eq!(unit(&chunks(&toc, "a")[0]), (20, 30, 0));
    assert_eq!(
        read(&[landmark, &file("b", 60)]).unwrap().prefetch_end(),
        None
    );
    let none = "{'name':'.no.prefetch.landmark','type':'reg','size':1,'offset':50,'digest':'@l'}";
    let toc = read(&[&file("a", 20), none]).unwrap();
    assert_eq!((toc.prefetch_end(), toc.nodes().len()), (None, 2));
    let elsewhere = landmark.replace(".prefetch", "d/.prefetch");
    assert_eq!(
        tree(&read(&[&elsewhere]).unwrap())[2],
        "/d/.prefetch.landmark reg 1 0 0:0 1"
    );
}
