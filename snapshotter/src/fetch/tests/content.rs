//! Content that an attached profile carries.

use tokio::sync::oneshot;

use super::*;
use crate::layer_dir::ChunkId;

/// The chunks of some files, last file first, and what an artifact holds of
/// them; `wrong` is the position of a byte that is not the file's.
struct Carried {
    pieces: Vec<Piece>,
    source: Source,
    chunks: Vec<ChunkId>,
}

fn carry(s: &Setup, files: std::ops::Range<usize>, wrong: Option<usize>) -> Carried {
    let mut content = Vec::new();
    let (mut pieces, mut chunks) = (Vec::new(), Vec::new());
    for file in files.rev() {
        let bytes = &s.sample.files[file].content;
        let table = s.layer.dir().chunks();
        for chunk in table.overlapping(s.starts[file], bytes.len() as u64) {
            let size = u64::from(table.get(chunk).size);
            let chunk_of = Some((Arc::clone(&s.layer), chunk));
            pieces.push(Piece {
                size,
                chunk: chunk_of,
            });
            chunks.push(chunk);
        }
        content.extend_from_slice(bytes);
    }
    if let Some(at) = wrong {
        content[at] ^= 1;
    }
    let blob = zstd::bulk::compress(&content, 3).unwrap();
    let mut source = s.source.clone();
    source.limit = blob.len() as u64;
    source.blob = Arc::new(blob);
    source.requests = Arc::default();
    source.gate = watch::channel(u64::MAX).0;
    Carried {
        pieces,
        source,
        chunks,
    }
}

impl Carried {
    fn receive(self) -> (Option<Handle>, oneshot::Receiver<bool>) {
        let (sender, done) = oneshot::channel();
        let content = Content {
            size: self.source.limit,
            source: Box::new(self.source),
            pieces: self.pieces,
        };
        let handle = content.receive(move |whole| {
            let _ = sender.send(whole);
        });
        (handle, done)
    }
}

#[tokio::test]
async fn content_is_stored_and_nothing_else_is_asked_for() {
    let s = setup();
    let carried = carry(&s, 3..9, None);
    let (requests, all) = (Arc::clone(&carried.source.requests), carried.chunks.clone());
    let (_handle, done) = carried.receive();
    assert!(done.await.unwrap());
    assert!(
        all.iter()
            .all(|&chunk| s.layer.dir().present().contains(chunk))
    );
    assert_eq!(s.layer.dir().present().count() as usize, all.len());
    for file in 3..9 {
        s.read(file).await.unwrap();
    }
    assert_eq!(s.source.take_requests(), []);
    // Each byte of it once.
    let mut ranges = std::mem::take(&mut *requests.lock());
    ranges.sort_unstable();
    assert!(
        ranges.windows(2).all(|pair| pair[0].1 == pair[1].0),
        "{ranges:?}"
    );
    // What is here already is not received again.
    let (handle, done) = carry(&s, 4..6, None).receive();
    assert!(handle.is_none() && done.await.is_err());
    until(|| s.nothing_is_held()).await;
}

#[tokio::test]
async fn wrong_content_is_not_stored_and_read_from_the_layer() {
    let s = setup();
    // In the second chunk of the last file, which comes first.
    let carried = carry(&s, 0..3, Some(50_000));
    let all = carried.chunks.clone();
    let (_handle, done) = carried.receive();
    assert!(!done.await.unwrap());
    let present = |chunk: &&ChunkId| s.layer.dir().present().contains(**chunk);
    let wrong: Vec<&ChunkId> = all.iter().filter(|chunk| !present(chunk)).collect();
    assert_eq!(wrong, [&all[1]]);
    for file in 0..3 {
        s.read(file).await.unwrap();
    }
    assert_eq!(s.source.take_requests(), [s.unit(2, 1)]);
}

#[tokio::test]
async fn content_that_ends_early_leaves_the_rest_to_its_readers() {
    let s = setup();
    let mut carried = carry(&s, 0..12, None);
    carried.source.limit /= 2;
    let (_handle, done) = carried.receive();
    let reads = join_all((0..12).map(|file| s.read(file)));
    for result in reads.await {
        result.unwrap();
    }
    assert!(!done.await.unwrap());
    until(|| s.nothing_is_held()).await;
}

#[tokio::test]
async fn readers_wait_for_what_is_about_to_come_and_ask_for_the_rest() {
    let s = setup();
    // The large file comes first, and what follows it lies far behind.
    let carried = carry(&s, 0..13, None);
    let gate = carried.source.gate.clone();
    gate.send_replace(1000);
    // What is claimed after all of the large file.
    let next = s.layer.dir().chunks().get(carried.chunks[50]).unit;
    let (_handle, done) = carried.receive();
    until(|| s.layer.claim(next).is_none()).await;
    let soon = s.read(12);
    tokio::pin!(soon);
    let half_a_second = Duration::from_millis(500);
    let waits = tokio::time::timeout(half_a_second, &mut soon).await;
    assert!(waits.is_err());
    assert_eq!(s.source.take_requests(), [], "the stream brings it");
    s.read(0).await.unwrap();
    let whole = (s.unit(0, 0).0, s.unit(0, 1).1);
    assert_eq!(s.source.take_requests(), [whole], "it comes late");
    gate.send_replace(u64::MAX);
    soon.await.unwrap();
    assert!(done.await.unwrap());
    assert_eq!(s.source.take_requests(), []);
}
