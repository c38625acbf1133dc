use std::os::unix::fs::FileExt as _;

use sluice_layer::{Wanted, decode_unit};

use super::*;
use crate::erofs::{XattrNamespace, write_image};
use crate::sample::{Layout, Sample, SampleFile, files, noise};

fn sample() -> Sample {
    let mut all = files(40, 10_000);
    all.push(SampleFile {
        name: "large".to_owned(),
        content: noise(99, 300_000),
    });
    all.push(SampleFile {
        name: "empty".to_owned(),
        content: Vec::new(),
    });
    let layout = Layout {
        shared: 30_000,
        prioritized: 5,
        ..Layout::default()
    };
    Sample::new(all, &layout)
}

pub(crate) fn make(parent: &Path, sample: &Sample) -> Result<PathBuf, Error> {
    make_as(parent, sample, 7)
}

/// The layer with this number on the node.
pub(crate) fn make_as(parent: &Path, sample: &Sample, number: u64) -> Result<PathBuf, Error> {
    let new = NewLayer {
        toc: &sample.toc(),
        digest: sample.digest(),
        blob_size: sample.blob.len() as u64,
        trust: sample.trust(),
        compressed_toc: Digest::of(b"toc"),
        reference: &"r.example/app:v1".parse().unwrap(),
        number,
    };
    create(parent, &new, |toc, placement, out| {
        write_image(toc, placement, XattrNamespace::Trusted, out)
            .map(|_| ())
            .map_err(|e| Problem::Erofs(Box::new(e)))
    })?;
    Ok(parent.join(sample.digest().hex()))
}

pub(crate) fn fill(dir: &LayerDir, sample: &Sample, units: usize) {
    for unit in dir.chunks().units_from(0).take(units) {
        let chunks: Vec<ChunkId> = dir.chunks().of_unit(unit.offset).collect();
        let wanted: Vec<Wanted> = chunks
            .iter()
            .map(|&chunk| {
                let record = dir.chunks().get(chunk);
                Wanted {
                    inner_offset: u64::from(record.inner_offset),
                    size: u64::from(record.size),
                    digest: record.digest,
                }
            })
            .collect();
        let bytes = &sample.blob[unit.offset as usize..(unit.offset + unit.size) as usize];
        decode_unit(dir.identity().format, bytes, &wanted, |index, chunk| {
            dir.store(chunks[index], &chunk).unwrap();
        })
        .unwrap();
    }
}

#[test]
fn what_was_made_is_found_again() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    let path = make(scratch.path(), &sample).unwrap();
    let dir = LayerDir::open(&path, sample.digest()).unwrap();
    let identity = dir.identity();
    assert_eq!(identity.digest, sample.digest());
    assert_eq!(identity.blob_size, sample.blob.len() as u64);
    assert_eq!(identity.trust, sample.trust());
    assert_eq!(identity.compressed_toc, Digest::of(b"toc"));
    assert_eq!(identity.reference.to_string(), "r.example/app:v1");
    assert_eq!(identity.number, 7);
    assert_eq!(identity.prefetch_end, sample.toc().prefetch_end());
    assert!(identity.prefetch_end.is_some());
    assert_eq!(&LayerDir::identify(&path).unwrap(), identity);
    assert_eq!(dir.chunks().len(), 40 + 5);
    assert!(!dir.is_complete());

    // By offset in `data`: without gap or overlap within a file.
    let all: Vec<ChunkId> = dir.chunks().overlapping(0, u64::MAX).collect();
    assert_eq!(all.len(), 45);
    for &chunk in &all {
        let record = dir.chunks().get(chunk);
        let size = u64::from(record.size);
        let exact: Vec<_> = dir.chunks().overlapping(record.data_offset, size).collect();
        assert_eq!(exact, [chunk]);
        let last: Vec<_> = dir.chunks().overlapping(record.data_end() - 1, 1).collect();
        assert_eq!(last, [chunk]);
        let file = dir.chunks().file_of(chunk);
        assert!(file.contains(&chunk) && dir.chunks().get(*file.start()).starts_file);
        match dir.chunks().after(chunk).next() {
            Some(next) if file.contains(&next) => {
                assert_eq!(dir.chunks().get(next).data_offset, record.data_end());
            }
            next => {
                assert_eq!(*file.end(), chunk);
                assert!(next.is_none_or(|next| dir.chunks().get(next).starts_file));
            }
        }
        assert_eq!(dir.chunks().before(chunk).count(), chunk.index());
    }
    // By unit: each chunk once.
    let mut by_unit = Vec::new();
    let mut end = 0;
    for unit in dir.chunks().units_from(0) {
        assert!(unit.offset >= end);
        end = unit.offset + unit.size;
        by_unit.extend(dir.chunks().of_unit(unit.offset));
    }
    assert!(end <= identity.toc_offset);
    by_unit.sort_unstable();
    assert_eq!(by_unit, all);
    assert_eq!(dir.chunks().of_unit(1).count(), 0);
}

#[test]
fn bits_are_durable_after_their_bytes_and_not_before() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    let path = make(scratch.path(), &sample).unwrap();
    let open = || LayerDir::open(&path, sample.digest()).unwrap();

    let dir = open();
    fill(&dir, &sample, 3);
    let first = dir.present().count();
    assert!(first > 0);
    assert!(dir.persist().unwrap());
    assert!(!dir.persist().unwrap(), "nothing is new");
    fill(&dir, &sample, 6);
    assert!(dir.present().count() > first);
    drop(dir);

    let dir = open();
    assert_eq!(
        dir.present().count(),
        first,
        "what was not persisted is not believed"
    );
    fill(&dir, &sample, usize::MAX);
    assert!(dir.is_complete());
    dir.persist().unwrap();
    let dir = open();
    assert!(dir.is_complete());
    for file in &sample.files {
        let content: Vec<u8> = file.content.clone();
        if content.is_empty() {
            continue;
        }
        let found = dir.chunks().overlapping(0, u64::MAX).any(|chunk| {
            let record = dir.chunks().get(chunk);
            let mut bytes = vec![0; content.len().min(record.size as usize)];
            dir.read_at(&mut bytes, record.data_offset).unwrap();
            record.starts_file && content.starts_with(&bytes)
        });
        assert!(found, "{}", file.name);
    }
}

#[test]
fn regression_what_a_shortened_file_has_lost_is_not_present() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    let path = make(scratch.path(), &sample).unwrap();
    let open = || LayerDir::open(&path, sample.digest()).unwrap();
    let present = |dir: &LayerDir| -> Vec<u64> {
        let all = dir.chunks().overlapping(0, u64::MAX);
        all.filter(|chunk| dir.present().contains(*chunk))
            .map(|chunk| dir.chunks().get(chunk).data_end())
            .collect()
    };
    for by_store in [false, true] {
        let dir = open();
        fill(&dir, &sample, usize::MAX);
        dir.persist().unwrap();
        assert!(dir.is_complete());
        // In the middle of a chunk, which goes with the end.
        let middle: Vec<ChunkId> = dir.chunks().overlapping(0, u64::MAX).collect();
        let middle = dir.chunks().get(middle[middle.len() / 2]);
        let left = middle.data_offset + 5;
        let file = File::options().write(true).open(dir.data_path()).unwrap();
        file.set_len(left).unwrap();
        let mut byte = [0];
        let error = dir.read_at(&mut byte, left).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        if by_store {
            // The first unit's chunks are there; writing them again finds out.
            fill(&dir, &sample, 1);
        } else {
            dir.restore().unwrap();
        }
        let kept = present(&dir);
        assert!(
            !kept.is_empty() && kept.iter().all(|end| *end <= left),
            "{kept:?}"
        );
        assert!(!dir.is_complete());
        assert_eq!(
            fs::metadata(dir.data_path()).unwrap().len(),
            dir.identity().data_size
        );
        // The machine may crash now.
        drop(dir);
        assert_eq!(present(&open()), kept);
    }
}

#[test]
fn damage_is_found_when_the_directory_is_opened() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    for (file, change, expected) in [
        (CHUNKS, "flip 5000", "its checksum does not match"),
        (CHUNKS, "flip 100", "header's checksum"),
        (CHUNKS, "flip 3", "does not begin as a chunk table"),
        (CHUNKS, "cut", "bytes instead of"),
        (CHUNKS, "empty", "cut short"),
        (CHUNKS, "remove", "No such file"),
        (META, "cut", "bytes instead of"),
        (META, "remove", "No such file"),
        (META, "flip 5000", "its checksum does not match"),
        (META, "flip 1100", "its checksum does not match"),
    ] {
        let path = make(scratch.path(), &sample).unwrap();
        damage(&path.join(file), change);
        let error = LayerDir::open(&path, sample.digest())
            .and_then(|dir| dir.check_meta())
            .unwrap_err();
        assert!(error.is_damage(), "{file} {change}: {error}");
        let text = error.to_string();
        assert!(text.contains(expected), "{file} {change}: {text}");
        assert!(text.contains(path.join(file).to_str().unwrap()), "{text}");
        fs::remove_dir_all(&path).unwrap();
    }
}

#[test]
fn a_damaged_presence_map_counts_as_empty() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    for change in ["flip 70", "flip 20", "flip 2", "cut", "empty", "remove"] {
        let path = make(scratch.path(), &sample).unwrap();
        let dir = LayerDir::open(&path, sample.digest()).unwrap();
        fill(&dir, &sample, usize::MAX);
        dir.persist().unwrap();
        drop(dir);
        damage(&path.join(PRESENT), change);
        let dir = LayerDir::open(&path, sample.digest()).unwrap();
        assert_eq!(dir.present().count(), 0, "{change}");
        fs::remove_dir_all(&path).unwrap();
    }
}

#[test]
fn content_of_another_size_counts_as_none() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    for change in ["cut", "empty", "remove"] {
        let path = make(scratch.path(), &sample).unwrap();
        let dir = LayerDir::open(&path, sample.digest()).unwrap();
        fill(&dir, &sample, usize::MAX);
        dir.persist().unwrap();
        damage(&path.join(DATA), change);
        let again = LayerDir::open(&path, sample.digest()).unwrap();
        assert_eq!(again.present().count(), 0, "{change}");
        assert_eq!(LayerDir::content_size(&path).unwrap(), 0, "{change}");
        // Whoever still has the old file says nothing of the new one.
        dir.take_back(ChunkId(0));
        fill(&again, &sample, usize::MAX);
        again.persist().unwrap();
        assert!(
            LayerDir::open(&path, sample.digest())
                .unwrap()
                .is_complete()
        );
        fs::remove_dir_all(&path).unwrap();
    }
}

#[test]
fn wrong_content_is_found_and_taken_back() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    let path = make(scratch.path(), &sample).unwrap();
    let dir = LayerDir::open(&path, sample.digest()).unwrap();
    let wrong = ChunkId(3);
    assert!(matches!(dir.verify(wrong, true), Verdict::Absent));
    fill(&dir, &sample, usize::MAX);
    dir.persist().unwrap();
    damage(
        &path.join(DATA),
        &format!("flip {}", dir.chunks().get(wrong).data_end() - 1),
    );
    let count = dir.present().count();
    let all: Vec<_> = dir.present().iter().collect();
    for chunk in all {
        match dir.verify(chunk, true) {
            Verdict::Good => assert_ne!(chunk, wrong),
            Verdict::Wrong => assert_eq!(chunk, wrong),
            other => panic!("{chunk:?}: {other:?}"),
        }
    }
    assert_eq!(dir.present().count(), count - 1);
    assert!(!dir.has(dir.chunks().get(wrong).data_offset, 1));
    assert!(dir.persist().unwrap());
    let again = LayerDir::open(&path, sample.digest()).unwrap();
    assert_eq!(again.present().count(), count - 1);
    fill(&again, &sample, usize::MAX);
    assert!(matches!(again.verify(wrong, true), Verdict::Good));
}

#[test]
fn what_is_doubted_is_present_once_it_was_verified() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    let path = make(scratch.path(), &sample).unwrap();
    let dir = LayerDir::open(&path, sample.digest()).unwrap();
    fill(&dir, &sample, usize::MAX);
    dir.persist().unwrap();
    let (good, wrong) = (ChunkId(1), ChunkId(3));
    let at = dir.chunks().get(wrong).data_offset;
    damage(&path.join(DATA), &format!("flip {at}"));
    let open = || LayerDir::open(&path, sample.digest()).unwrap();
    let dir = open().doubted();
    let count = dir.claimed().count();
    assert_eq!((count, dir.present().count()), (45, 0));
    assert!(matches!(dir.verify(good, false), Verdict::Good));
    assert!(matches!(dir.verify(wrong, false), Verdict::Wrong));
    assert!(dir.present().contains(good) && !dir.present().contains(wrong));
    assert_eq!(dir.claimed().count(), count - 2);
    // Claims outlive the process, as claims; what is wrong does not.
    dir.persist().unwrap();
    let again = open().doubted();
    assert_eq!(again.claimed().count(), count - 1);
    assert!(!again.claimed().contains(wrong));
}

#[test]
fn what_describes_a_layer_is_mended_in_place() {
    use std::os::unix::fs::MetadataExt as _;
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    let path = make(scratch.path(), &sample).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let whole = make(elsewhere.path(), &sample).unwrap();
    let dir = LayerDir::open(&path, sample.digest()).unwrap();
    fill(&dir, &sample, 4);
    dir.persist().unwrap();
    let count = dir.present().count();
    for (file, change) in [
        (META, "flip 5000"),
        (META, "empty"),
        (META, "remove"),
        (CHUNKS, "flip 5000"),
        (CHUNKS, "cut"),
    ] {
        let inode = fs::metadata(path.join(file)).unwrap().ino();
        damage(&path.join(file), change);
        if file == META {
            assert!(dir.check_meta().unwrap_err().is_damage(), "{change}");
        } else {
            assert!(dir.check_chunks().unwrap_err().is_damage(), "{change}");
        }
        assert!(mend(&path, &whole).unwrap(), "{file} {change}");
        let again = LayerDir::open(&path, sample.digest()).unwrap();
        again.check_meta().unwrap();
        dir.check_chunks().unwrap();
        assert_eq!(again.present().count(), count);
        if change != "remove" {
            assert_eq!(fs::metadata(path.join(file)).unwrap().ino(), inode);
        }
    }
    // Not by the files of another layer, or where the header itself is lost.
    damage(&path.join(CHUNKS), "flip 33");
    let before = fs::read(path.join(CHUNKS)).unwrap();
    assert!(!mend(&path, &whole).unwrap());
    assert_eq!(fs::read(path.join(CHUNKS)).unwrap(), before);
}

#[test]
fn a_newer_version_is_not_touched() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    let path = make(scratch.path(), &sample).unwrap();
    let file = File::options().write(true).open(path.join(CHUNKS)).unwrap();
    file.write_all_at(&9u32.to_le_bytes(), 8).unwrap();
    let error = LayerDir::open(&path, sample.digest()).unwrap_err();
    assert!(!error.is_damage());
    assert!(
        error
            .to_string()
            .contains("newer version of Sluice (format 9)")
    );
}

#[test]
fn a_half_made_directory_is_never_seen() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    let new = NewLayer {
        toc: &sample.toc(),
        digest: sample.digest(),
        blob_size: 1,
        trust: sample.trust(),
        compressed_toc: Digest::of(b"toc"),
        reference: &"r.example/app:v1".parse().unwrap(),
        number: 1,
    };
    let error = create(scratch.path(), &new, |_, _, _| {
        Err(Problem::Unsupported("no room".to_owned()))
    })
    .unwrap_err();
    assert!(error.to_string().contains("no room"));
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    // What a crash left behind does not stop the next attempt.
    let left = scratch
        .path()
        .join(format!("{TEMPORARY}{}", sample.digest().hex()));
    fs::create_dir(&left).unwrap();
    fs::write(left.join(DATA), "old").unwrap();
    make(scratch.path(), &sample).unwrap();
    assert!(!left.exists());
}

fn damage(path: &Path, change: &str) {
    let file = || File::options().read(true).write(true).open(path).unwrap();
    match change.split_once(' ').unwrap_or((change, "")) {
        ("flip", at) => {
            let at = at.parse().unwrap();
            let mut byte = [0];
            file().read_exact_at(&mut byte, at).unwrap();
            file().write_all_at(&[byte[0] ^ 4], at).unwrap();
        }
        ("cut", _) => file()
            .set_len(file().metadata().unwrap().len() - 1)
            .unwrap(),
        ("empty", _) => file().set_len(0).unwrap(),
        ("remove", _) => fs::remove_file(path).unwrap(),
        _ => unreachable!("{change}"),
    }
}

/// Two layers with the same files in another order, and one file of their own.
fn two_layers(parent: &Path) -> [(Sample, LayerDir); 2] {
    [false, true].map(|turned| {
        let mut all: Vec<SampleFile> = [5_000, 70_000, 200_000]
            .iter()
            .map(|&size| SampleFile {
                name: format!("file{size}"),
                content: noise(size as u64, size),
            })
            .collect();
        if turned {
            all.reverse();
        }
        all.push(SampleFile {
            name: "own".to_owned(),
            content: noise(u64::from(turned), 50_000),
        });
        let sample = Sample::new(all, &Layout::default());
        let path = make_as(parent, &sample, u64::from(turned)).unwrap();
        let dir = LayerDir::open(&path, sample.digest()).unwrap();
        (sample, dir)
    })
}

/// The chunks of `to` that `from` describes as well.
fn in_both(to: &LayerDir, from: &LayerDir) -> Vec<(ChunkId, ChunkId)> {
    let all = |dir: &LayerDir| -> Vec<ChunkId> { dir.chunks().overlapping(0, u64::MAX).collect() };
    let same = |ours: ChunkId| {
        let record = to.chunks().get(ours);
        let theirs = all(from);
        let theirs = theirs.into_iter();
        theirs
            .filter(|&theirs| from.describes(theirs, record.digest, record.size))
            .map(|theirs| (ours, theirs))
            .next()
    };
    all(to).into_iter().filter_map(same).collect()
}

#[test]
fn extents_are_shared_where_the_file_system_can() {
    let disk = crate::testing::Xfs::new();
    let [(theirs, from), (ours, to)] = two_layers(disk.path());
    fill(&from, &theirs, usize::MAX);
    // Blocks that are not on the disk yet cannot be shared.
    from.persist().unwrap();
    let mut shared = 0;
    let both = in_both(&to, &from);
    assert_eq!(both.len(), 1 + 2 + 4);
    for (chunk, theirs) in both {
        assert!(from.claims(
            theirs,
            to.chunks().get(chunk).digest,
            to.chunks().get(chunk).size
        ));
        let size = to.chunks().get(chunk).size;
        let is_shared = to.share(chunk, &from, theirs).unwrap();
        assert_eq!(is_shared, size >= 16 << 10, "{size} bytes");
        assert_eq!(to.present().contains(chunk), is_shared);
        shared += u64::from(is_shared) * u64::from(size);
    }
    to.persist().unwrap();
    let extents = crate::testing::shared_extents(&to.data_path());
    assert!(
        extents.abs_diff(shared) < 4 * 4096,
        "{extents} bytes of {shared}"
    );
    // They are what the TOC says, and stay it when the other layer's go.
    for (chunk, _) in in_both(&to, &from) {
        let verdict = to.verify(chunk, true);
        assert!(
            matches!(verdict, Verdict::Good | Verdict::Absent),
            "{verdict:?}"
        );
    }
    from.data.set_len(0).unwrap();
    let present = to.present().count();
    for chunk in to.chunks().overlapping(0, u64::MAX) {
        to.verify(chunk, true);
    }
    assert_eq!(to.present().count(), present);
    fill(&to, &ours, usize::MAX);
    assert!(to.is_complete());
}

#[test]
fn what_is_not_what_it_was_is_not_shared() {
    let disk = crate::testing::Xfs::new();
    let [(theirs, from), (_, to)] = two_layers(disk.path());
    fill(&from, &theirs, usize::MAX);
    for (chunk, theirs) in in_both(&to, &from) {
        let offset = from.chunks().get(theirs).data_offset;
        from.data.write_all_at(b"rotten", offset).unwrap();
        assert!(!to.share(chunk, &from, theirs).unwrap());
    }
    assert_eq!(to.present().count(), 0);
}

#[test]
fn without_shared_extents_nothing_is_written() {
    let disk = crate::testing::Tmpfs::new("8m");
    let [(theirs, from), (_, to)] = two_layers(disk.path());
    fill(&from, &theirs, usize::MAX);
    for (chunk, theirs) in in_both(&to, &from) {
        assert!(!to.share(chunk, &from, theirs).unwrap());
    }
    assert_eq!(
        (
            to.present().count(),
            LayerDir::content_size(&to.path).unwrap()
        ),
        (0, 0)
    );
}

#[test]
fn a_directory_can_be_looked_at_without_being_touched() {
    let scratch = tempfile::tempdir().unwrap();
    let sample = sample();
    let path = make(scratch.path(), &sample).unwrap();
    let dir = LayerDir::open(&path, sample.digest()).unwrap();
    fill(&dir, &sample, 3);
    dir.persist().unwrap();
    let peeked = LayerDir::peek(&path, sample.digest()).unwrap();
    assert_eq!(peeked.present().count(), dir.present().count());
    assert_eq!(peeked.identity(), dir.identity());
    // A layer that was evicted has nothing, and one that is cut short is left
    // to whoever opens it.
    dir.evict().unwrap();
    let peeked = LayerDir::peek(&path, sample.digest()).unwrap();
    assert_eq!(peeked.present().count(), 0);
    let data = File::options().write(true).open(path.join(DATA)).unwrap();
    data.set_len(1).unwrap();
    LayerDir::peek(&path, sample.digest()).unwrap();
    assert_eq!(data.metadata().unwrap().len(), 1);
    assert!(LayerDir::peek(&path, Digest::of(b"another")).is_err());
}
