//! Where files are cut.

use super::*;

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
