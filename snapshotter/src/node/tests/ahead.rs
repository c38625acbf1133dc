//! What is fetched before anybody reads it.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use sluice_layer::annotations::{START_CHUNKS, START_RANGES};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefetch_streams_the_prioritized_files_in_one_request() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let registry = Registry::serve(&[(&sample, labels(&sample))]);
    let mut config = config(&root);
    config.prefetch = true;
    let node = Node::start(config, client()).unwrap();
    node.open(request(&registry, &sample)).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    let prefetched = async |count: usize| {
        while registry.requests() < count || node.in_use() != (0, 0) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    prefetched(2).await;
    let ranges = registry.take_ranges();
    let end = sample.toc().prefetch_end().unwrap();
    assert_eq!(ranges.len(), 2);
    assert_eq!(ranges[1].0, 0);
    assert!(ranges[1].1 <= end);
    for file in &sample.files[..6] {
        assert!(read(mount.join(&file.name)).await.unwrap() == file.content);
    }
    assert!(registry.take_log().is_empty());
    node.stop().await;
}

/// A layer of which the first six files come before the landmark.
fn prioritized(root: &TempDir) -> (Sample, Registry, Node) {
    let layout = Layout {
        prioritized: 6,
        ..Layout::default()
    };
    let sample = Sample::new(files(12, 90_000), &layout);
    let registry = Registry::serve(&[(&sample, labels(&sample))]);
    let mut config = config(root);
    config.prefetch = true;
    let node = Node::start(config, client()).unwrap();
    (sample, registry, node)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefetch_leaves_out_what_a_start_does_not_read() {
    let root = tempfile::tempdir().unwrap();
    let (sample, registry, node) = prioritized(&root);
    let mut request = request(&registry, &sample);
    // Of two chunks a file, the first of file 0 and both of file 3.
    let bits = BASE64_STANDARD.encode([0b1100_0001]);
    request.annotations.insert(START_CHUNKS.to_owned(), bits);
    node.open(request).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    while registry.requests() < 3 || node.in_use() != (0, 0) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    registry.take_log();
    let third = &sample.files[3];
    assert!(read(mount.join(&third.name)).await.unwrap() == third.content);
    assert!(registry.take_log().is_empty());
    let first = &sample.files[0];
    assert!(read(mount.join(&first.name)).await.unwrap() == first.content);
    assert_eq!(registry.take_log().len(), 1, "its second chunk");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_start_reads_first_comes_with_the_table_of_contents() {
    let root = tempfile::tempdir().unwrap();
    let (sample, registry, node) = prioritized(&root);
    let mut request = request(&registry, &sample);
    let end = sample.toc().prefetch_end().unwrap();
    let range = format!("0-{end}");
    request.annotations.insert(START_RANGES.to_owned(), range);
    node.open(request).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    while node.in_use() != (0, 0) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for file in &sample.files[..6] {
        assert!(read(mount.join(&file.name)).await.unwrap() == file.content);
    }
    let asked = registry.take_ranges();
    assert!(asked.contains(&(0, end)), "in one: {asked:?}");
    assert_eq!(asked.len(), 2, "and the table of contents: {asked:?}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_background_download_takes_one_request_and_completes_the_layer() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let registry = Registry::serve(&[(&sample, labels(&sample))]);
    let mut config = config(&root);
    config.background = Some(Duration::ZERO);
    let node = Node::start(config, client()).unwrap();
    node.open(request(&registry, &sample)).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    let complete = || {
        let path = root.path().join("layers").join(sample.digest().hex());
        LayerDir::open(&path, sample.digest())
            .unwrap()
            .is_complete()
    };
    assert_eq!(node.next_proof().await, sample.digest());
    assert!(complete());
    // And then what the tar has between files: of this blob, the landmark and
    // the TOC.
    let ranges = registry.take_ranges();
    assert!(ranges.len() >= 2, "the TOC and the rest: {ranges:?}");
    assert_eq!(ranges[1].1, sample.toc().toc_offset(), "in one: {ranges:?}");
    assert_content(&mount, &sample).await;
    assert!(registry.take_log().is_empty());
    node.stop().await;
}
