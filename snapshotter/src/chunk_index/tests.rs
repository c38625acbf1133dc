use std::collections::BTreeMap;

use tempfile::TempDir;

use super::*;
use crate::layer_dir::ChunkId;
use crate::layer_dir::tests::make_as;
use crate::sample::{Layout, Sample, SampleFile, noise};

/// Layers of files whose content is named by numbers, and what of them is
/// where.
struct Layers {
    root: TempDir,
    index: ChunkIndex,
    dirs: Vec<LayerDir>,
}

impl Layers {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        Self {
            index: ChunkIndex::open(&root.path().join("index"), false),
            dirs: Vec::new(),
            root,
        }
    }

    fn make(&mut self, contents: impl IntoIterator<Item = u64>) -> &LayerDir {
        let file = |seed: u64| SampleFile {
            name: format!("file{seed}"),
            content: noise(seed, 20 + seed as usize % 1_000),
        };
        let files: Vec<SampleFile> = contents.into_iter().map(file).collect();
        let sample = Sample::new(files, &Layout::default());
        let path = make_as(self.root.path(), &sample, self.dirs.len() as u64).unwrap();
        self.dirs
            .push(LayerDir::open(&path, sample.digest()).unwrap());
        self.dirs.last().unwrap()
    }

    fn add(&mut self, contents: impl IntoIterator<Item = u64>) {
        self.make(contents);
        self.index.add(self.dirs.last().unwrap()).unwrap();
    }

    fn reopen(&mut self, anew: bool) {
        self.index = ChunkIndex::open(&self.root.path().join("index"), anew);
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root.path().join("index")).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        names
    }

    /// What is found of every chunk there is has to be what there is, in the
    /// layers that `lives` lets pass.
    fn check(&self, lives: impl Fn(u64) -> bool) {
        let mut all: BTreeMap<Digest, BTreeSet<(u64, usize)>> = BTreeMap::new();
        for dir in &self.dirs {
            let number = dir.identity().number;
            for chunk in dir.chunks().overlapping(0, u64::MAX) {
                let places = all.entry(dir.chunks().get(chunk).digest).or_default();
                if lives(number) {
                    places.insert((number, chunk.index()));
                }
            }
        }
        for (digest, expected) in all {
            assert_eq!(places(&self.index, &digest), expected, "{digest}");
        }
    }
}

fn places(index: &ChunkIndex, digest: &Digest) -> BTreeSet<(u64, usize)> {
    let mut found = BTreeSet::new();
    index.find(digest, |place| {
        assert!(
            found.insert((place.layer.number, place.chunk.index())),
            "twice"
        );
        ControlFlow::Continue(())
    });
    found
}

#[test]
fn every_chunk_is_found_in_every_layer_that_has_it() {
    let mut layers = Layers::new();
    layers.add(0..700);
    layers.check(|_| true);
    for layer in 1..8 {
        layers.add((layer * 50..layer * 65 + 10).chain([7, 7_000 + layer]));
        layers.check(|_| true);
        layers.index.merge(|_| true).unwrap();
        layers.check(|_| true);
    }
    // Small ones are merged, and not again and again with the large one.
    assert!(layers.files().len() <= 3, "{:?}", layers.files());
    assert_eq!(layers.index.layers().len(), 8);
    let again = layers.files();
    layers.index.add(&layers.dirs[3]).unwrap();
    assert_eq!(layers.files(), again, "it is in it");
    layers.reopen(false);
    layers.check(|_| true);
    assert_eq!(layers.files(), again);
    let nowhere = Digest::of(b"nowhere");
    assert_eq!(places(&layers.index, &nowhere), BTreeSet::new());
    layers.reopen(true);
    assert_eq!(layers.files(), [""; 0]);
}

#[test]
fn a_search_ends_where_it_is_told_to() {
    let mut layers = Layers::new();
    for _ in 0..3 {
        layers.add([1, 2 + layers.dirs.len() as u64]);
    }
    let digest = layers.dirs[0].chunks().get(ChunkId::at(0)).digest;
    let mut seen = 0;
    layers.index.find(&digest, |_| {
        seen += 1;
        ControlFlow::Break(())
    });
    assert_eq!(seen, 1);
}

#[test]
fn what_is_gone_is_forgotten_with_the_next_merge() {
    let mut layers = Layers::new();
    for layer in 0..4 {
        layers.add(layer..layer + 10);
    }
    layers.index.merge(|layer| layer.number != 2).unwrap();
    layers.check(|number| number != 2);
    assert_eq!(layers.files().len(), 1);
    assert!(!layers.index.covers(LayerName::of(&layers.dirs[2])));
    assert!(layers.index.covers(LayerName::of(&layers.dirs[3])));
}

#[test]
fn of_layers_that_are_all_gone_no_file_is_left() {
    let mut layers = Layers::new();
    layers.add(0..40);
    layers.add(40..80);
    assert_eq!(layers.files().len(), 2);
    layers.index.prune(|layer| layer.number != 0).unwrap();
    assert_eq!(layers.files().len(), 1);
    layers.index.prune(|_| false).unwrap();
    assert!(layers.files().is_empty());
}

#[test]
fn what_a_process_left_half_done_is_done_or_gone() {
    let mut layers = Layers::new();
    layers.add(0..50);
    layers.add(20..70);
    let index = layers.root.path().join("index");
    let before = tempfile::tempdir().unwrap();
    for name in layers.files() {
        fs::copy(index.join(&name), before.path().join(&name)).unwrap();
    }
    layers.index.merge(|_| true).unwrap();
    // It died after the merge and before what was merged was removed.
    for entry in fs::read_dir(before.path()).unwrap().flatten() {
        fs::copy(entry.path(), index.join(entry.file_name())).unwrap();
    }
    fs::write(index.join("draft-9"), "half").unwrap();
    fs::write(index.join("17"), "no run").unwrap();
    layers.reopen(false);
    assert_eq!(layers.files().len(), 1);
    layers.check(|_| true);
    layers.add(0..5);
    layers.check(|_| true);
}

#[test]
fn a_damaged_run_is_removed_and_its_layers_are_added_again() {
    use std::os::unix::fs::FileExt as _;

    let mut layers = Layers::new();
    layers.add(0..600);
    layers.add(1_000..1_500);
    let index = layers.root.path().join("index");
    let damage = |name: &str, at: u64| {
        let file = fs::File::options()
            .write(true)
            .open(index.join(name))
            .unwrap();
        file.write_all_at(&[0xff; 8], at).unwrap();
    };
    // An entry, which only a merge notices; then the table of layers, and the
    // header.
    damage("0", 64 + 40 + 16);
    layers.index.merge(|_| true).unwrap();
    assert!(!layers.index.covers(LayerName::of(&layers.dirs[0])));
    layers.check(|number| number != 0);
    layers.index.add(&layers.dirs[0]).unwrap();
    layers.check(|_| true);
    for at in [64, 0, 16, 24] {
        let name = layers.files().remove(0);
        damage(&name, at);
        layers.reopen(false);
        assert_eq!(layers.files().len(), 1, "damaged at {at}");
        for dir in &layers.dirs {
            layers.index.add(dir).unwrap();
        }
        layers.check(|_| true);
    }
    // One that is cut short under the running process.
    let name = layers.files().remove(0);
    fs::File::options()
        .write(true)
        .open(index.join(&name))
        .unwrap()
        .set_len(200)
        .unwrap();
    let dirs = layers
        .dirs
        .iter()
        .map(|dir| dir.chunks().get(ChunkId::at(0)).digest);
    for digest in dirs {
        let _ = places(&layers.index, &digest);
    }
    assert!(!layers.files().contains(&name));
}

/// An image can claim digests that lie close together, so that no guess at
/// their place is right.
#[test]
fn digests_that_are_not_spread_evenly_are_found() {
    let scratch = tempfile::tempdir().unwrap();
    let layer = LayerName {
        number: 0,
        digest: Digest::of(b"layer"),
    };
    let mut keys: Vec<u64> = (0..5_000).map(|n| n * 3).collect();
    keys.extend((0..5_000u32).map(|n| 1 << (n % 64)));
    keys.extend([u64::MAX; 700]);
    keys.sort_unstable();
    let mut draft = Draft::new(scratch.path().join("draft"), vec![layer]).unwrap();
    for (chunk, &key) in (0..).zip(&keys) {
        draft
            .push(run::Entry {
                key,
                layer: 0,
                chunk,
            })
            .unwrap();
    }
    let run = draft.finish(&scratch.path().join("0")).unwrap();
    let mut distinct = keys.clone();
    distinct.dedup();
    for key in distinct {
        let mut raw = [0; 32];
        raw[..8].copy_from_slice(&key.to_be_bytes());
        let mut count = 0;
        let mut each = |_: Place| {
            count += 1;
            ControlFlow::Continue(())
        };
        let searched = run.find(&Digest::from_raw(raw), &mut each).unwrap();
        assert!(searched.is_continue());
        assert_eq!(
            count,
            keys.iter().filter(|other| **other == key).count(),
            "{key}"
        );
    }
}
