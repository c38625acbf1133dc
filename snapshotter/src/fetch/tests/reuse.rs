//! Layers that have the same chunks.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use super::*;
use crate::layer_dir::ChunkId;
use crate::layer_dir::tests::make_as;

/// Knows all layers by looking through them.
#[derive(Debug, Default)]
struct Others(Mutex<Vec<Arc<LazyLayer>>>);

impl ChunkFinder for Others {
    fn find(
        &self,
        digest: sluice_oci::Digest,
        size: u32,
        _by: &sluice_oci::Reference,
    ) -> Option<Found> {
        let layers = self.0.lock();
        let places = || {
            layers.iter().flat_map(|layer| {
                let all = layer.dir().chunks().overlapping(0, u64::MAX);
                all.map(move |chunk: ChunkId| (layer, chunk))
            })
        };
        let there = places().find(|(layer, chunk)| layer.dir().claims(*chunk, digest, size));
        if let Some((layer, chunk)) = there {
            return Some(Found::There(layer.shared_dir(), chunk));
        }
        let coming = |(layer, chunk): &(&Arc<LazyLayer>, ChunkId)| {
            layer.dir().describes(*chunk, digest, size) && layer.is_coming(*chunk)
        };
        let (layer, chunk) = places().find(coming)?;
        Some(Found::Coming(Arc::clone(layer), chunk))
    }
}

/// Layers of one node.
struct Node {
    root: TempDir,
    others: Arc<Others>,
    engine: Engine,
}

impl Node {
    fn new() -> Self {
        let others = Arc::<Others>::default();
        let finder = Arc::clone(&others) as Arc<dyn ChunkFinder>;
        let runtime = tokio::runtime::Handle::current();
        Self {
            root: tempfile::tempdir().unwrap(),
            engine: Engine::with_finder(config(), runtime, finder),
            others,
        }
    }

    fn layer(&self, files: Vec<SampleFile>, layout: &Layout) -> Setup {
        let sample = Sample::new(files, layout);
        let number = self.others.0.lock().len() as u64;
        let path = make_as(self.root.path(), &sample, number).unwrap();
        let dir = LayerDir::open(&path, sample.digest()).unwrap();
        let s = setup_on(&self.engine, dir, sample);
        self.others.0.lock().push(Arc::clone(&s.layer));
        s
    }
}

/// Files of which those from `new` on have content of their own.
fn version(count: usize, new: usize) -> Vec<SampleFile> {
    let mut all = files(count, 60_000);
    for (index, file) in all.iter_mut().enumerate().skip(new) {
        file.content = noise(1_000 + (new + index) as u64, 60_000);
    }
    all
}

fn chunks_of(size: usize) -> Layout {
    Layout {
        chunk: size,
        ..Layout::default()
    }
}

/// The bytes of the blob that were asked for.
fn asked(s: &Setup) -> u64 {
    let requests = s.source.take_requests();
    requests.iter().map(|(start, end)| end - start).sum()
}

/// A plan of all chunks, in the order of the blob.
fn everything(s: &Setup) -> Plan {
    let table = s.layer.dir().chunks();
    Plan::Order(table.overlapping(0, u64::MAX).collect())
}

fn reused(s: &Setup) -> u64 {
    s.layer.activity().reused
}

#[tokio::test]
async fn what_another_layer_has_is_not_fetched() {
    let node = Node::new();
    let first = node.layer(version(6, 6), &chunks_of(40_000));
    let second = node.layer(version(6, 4), &chunks_of(40_000));
    for file in 0..3 {
        first.read(file).await.unwrap();
    }
    for file in 0..3 {
        second.read(file).await.unwrap();
    }
    assert_eq!(second.source.take_requests(), []);
    assert_eq!(reused(&second), 3 * 60_000);
    // Neither has this one.
    second.read(3).await.unwrap();
    assert_eq!(second.source.take_requests().len(), 1);
    // And the other way round.
    first.source.take_requests();
    first.read(3).await.unwrap();
    assert_eq!(first.source.take_requests(), []);
    second.read(4).await.unwrap();
    assert_eq!(second.source.take_requests().len(), 1);
    assert!(second.layer.activity().fetched.iter().sum::<u64>() > 0);
    until(|| first.nothing_is_held() && second.nothing_is_held()).await;
}

#[tokio::test]
async fn a_read_fetches_only_what_no_layer_has() {
    let node = Node::new();
    let first = node.layer(version(6, 6), &chunks_of(20_000));
    let second = node.layer(
        version(6, 6),
        &Layout {
            prioritized: 3,
            ..chunks_of(20_000)
        },
    );
    // The middle chunk of the third file, and all of the fourth.
    first
        .layer
        .fetch(first.starts[2] + 20_000, 20_000)
        .await
        .unwrap();
    first.read(3).await.unwrap();
    let all = second.starts[2]..second.starts[4];
    second
        .layer
        .fetch(all.start, all.end - all.start)
        .await
        .unwrap();
    let both = [second.unit(2, 0), second.unit(2, 2)];
    let mut requests = second.source.take_requests();
    requests.sort_unstable();
    assert_eq!(requests, both);
    assert_eq!(reused(&second), 20_000 + 60_000);
    second.read(2).await.unwrap();
    second.read(3).await.unwrap();
}

#[tokio::test]
async fn regression_of_a_shared_unit_only_what_is_read_has_to_be_there() {
    let node = Node::new();
    let first = node.layer(version(3, 3), &Layout::default());
    // All three files in one unit.
    let second = node.layer(
        version(3, 2),
        &Layout {
            shared: 200_000,
            ..Layout::default()
        },
    );
    first.read(0).await.unwrap();
    second.read(0).await.unwrap();
    assert_eq!(second.source.take_requests(), []);
    assert_eq!(second.layer.dir().present().count(), 1);
    join_all([second.read(1), second.read(2)]).await;
    assert_eq!(second.source.take_requests().len(), 1);
    assert!(second.layer.dir().is_complete());
}

#[tokio::test]
async fn regression_many_readers_of_one_unit_are_not_turned_away() {
    let node = Node::new();
    let small = |new: usize| {
        let mut all = files(60, 300);
        all[new].content = noise(5_000 + new as u64, 300);
        all
    };
    let first = node.layer(small(30), &Layout::default());
    for file in 0..60 {
        first.read(file).await.unwrap();
    }
    // All files in one unit, of which the first layer lacks one.
    let layout = Layout {
        shared: 100_000,
        ..Layout::default()
    };
    let second = node.layer(small(40), &layout);
    for read in join_all((0..60).map(|file| second.read(file))).await {
        read.unwrap();
    }
    assert!(second.source.take_requests().len() <= 1);
}

#[tokio::test]
async fn rotten_bytes_are_not_taken() {
    let node = Node::new();
    let first = node.layer(version(2, 2), &Layout::default());
    let second = node.layer(version(2, 1), &Layout::default());
    first.read(0).await.unwrap();
    let data = first.layer.dir().data_path();
    let data = File::options().write(true).open(data).unwrap();
    data.write_all_at(b"rotten", first.starts[0] + 100).unwrap();
    second.read(0).await.unwrap();
    assert_eq!(second.source.take_requests(), [second.unit(0, 0)]);
    assert_eq!(reused(&second), 0);
    // From where it is right it is taken again.
    let third = node.layer(version(2, 0), &Layout::default());
    third.read(0).await.unwrap();
    assert_eq!(third.source.take_requests().len(), 1, "it is another file");
}

#[tokio::test]
async fn layers_that_fetch_the_same_at_once_share_it() {
    let node = Node::new();
    let first = node.layer(version(4, 4), &Layout::default());
    let second = node.layer(version(4, 2), &Layout::default());
    first.source.gate.send_replace(0);
    let one = first.read(0);
    tokio::pin!(one);
    assert!((&mut one).now_or_never().is_none());
    until(|| !first.source.requests.lock().is_empty()).await;
    let two = second.read(0);
    tokio::pin!(two);
    let early = tokio::time::timeout(Duration::from_millis(20), &mut two).await;
    assert!(early.is_err(), "it has come from nowhere");
    first.source.gate.send_replace(u64::MAX);
    one.await.unwrap();
    two.await.unwrap();
    assert_eq!(second.source.take_requests(), []);
    // What the other does not get is fetched.
    first.source.fail([refusal(), refusal()]);
    first.source.gate.send_replace(0);
    let (one, two) = tokio::join!(first.read(1), async {
        until(|| first.source.requests.lock().len() > 1).await;
        second.read(1).await
    });
    assert!(one.is_err());
    two.unwrap();
    assert_eq!(second.source.take_requests(), [second.unit(1, 0)]);
    until(|| first.nothing_is_held() && second.nothing_is_held()).await;
}

#[tokio::test(start_paused = true)]
async fn regression_a_prefetch_gives_no_way_to_who_waits_for_it_in_another_layer() {
    let node = Node::new();
    let first = node.layer(version(4, 4), &chunks_of(60_000));
    let second = node.layer(version(4, 3), &chunks_of(60_000));
    first.source.gate.send_replace(0);
    let _prefetch = first.layer.prefetch(everything(&first));
    until(|| !first.source.requests.lock().is_empty()).await;
    let mut other = node.engine.demand();
    other.jump();
    first.layer.judge_plan(false);
    first.source.gate.send_replace(u64::MAX);
    // Before the next file it gives way.
    until(|| first.layer.dir().present().count() == 1).await;
    let reading = tokio::time::timeout(Duration::from_millis(20), second.read(1));
    reading.await.expect("at once").unwrap();
    assert_eq!(second.source.take_requests(), []);
}

#[tokio::test]
async fn a_file_that_is_in_a_layer_twice_is_fetched_once() {
    let node = Node::new();
    let mut twice = files(3, 60_000);
    twice[2].content = twice[0].content.clone();
    let s = node.layer(twice, &Layout::default());
    s.read(0).await.unwrap();
    s.read(2).await.unwrap();
    assert_eq!(s.source.take_requests(), [s.unit(0, 0)]);
}

#[tokio::test]
async fn nothing_is_fetched_ahead_that_another_layer_has() {
    let node = Node::new();
    let layout = Layout {
        prioritized: 5,
        ..chunks_of(20_000)
    };
    let first = node.layer(version(8, 8), &layout);
    for file in 0..8 {
        first.read(file).await.unwrap();
    }
    // Six files are the same; the rest of each way is another.
    let second = node.layer(version(8, 6), &layout);
    let _prefetch = second.layer.prefetch(everything(&second));
    until(|| second.layer.dir().is_complete()).await;
    let units = |s: &Setup, files: std::ops::Range<usize>| {
        let chunks = files.flat_map(|file| (0..3).map(move |chunk| (file, chunk)));
        chunks
            .map(|(file, chunk)| s.unit(file, chunk))
            .map(|(start, end)| end - start)
            .sum::<u64>()
    };
    assert_eq!(asked(&second), units(&second, 6..8));
    let third = node.layer(version(8, 7), &layout);
    let _download = third.layer.download(Duration::ZERO, async {});
    until(|| third.layer.dir().is_complete()).await;
    assert_eq!(asked(&third), units(&third, 7..8));
    for file in 0..8 {
        second.read(file).await.unwrap();
        third.read(file).await.unwrap();
    }
}
