use std::path::Path;

use super::super::tests::{client, config, labels, request};
use super::super::{Config, ProfileSource};
use super::*;
use crate::sample::{Layout, Registry, Sample, files};
use crate::service::LazyLayers as _;

fn node(root: &tempfile::TempDir) -> Node {
    let config = Config {
        prefetch: true,
        ..config(root)
    };
    Node::start(config, client()).unwrap()
}

fn image(layers: &[&Sample]) -> ImageUse {
    ImageUse {
        reference: Some("r.io/app:v1".to_owned()),
        layers: layers.iter().map(|sample| sample.digest()).collect(),
        ..ImageUse::default()
    }
}

fn stored(node: &Node, image: &ImageUse) -> Arc<Profile> {
    let found = node.profiles().find(&ImageId {
        layers: image.layers.clone(),
        ..ImageId::default()
    });
    node.profiles().load(&found.expect("a profile")).unwrap()
}

/// Layer, file and size of each read.
fn what(profile: &Profile) -> Vec<(usize, String, u64)> {
    let reads = profile.reads().iter();
    reads
        .map(|read| {
            let path = String::from_utf8_lossy(&read.path).into_owned();
            (read.layer, path, read.len)
        })
        .collect()
}

async fn read(mount: &Path, name: &str) {
    let path = mount.join(name);
    let read = spawn_blocking(move || std::fs::read(path)).await.unwrap();
    assert!(read.is_ok(), "{name}: {read:?}");
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("waited in vain for {what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_start_reads_is_fetched_ahead_of_the_next_one() {
    let root = tempfile::tempdir().unwrap();
    let sample = Sample::new(files(30, 9_000), &Layout::default());
    let registry = Registry::serve(&[(&sample, labels(&sample))]);
    let node = node(&root);
    let image = image(&[&sample]);
    let wanted = ["dir/file00020", "dir/file00003", "dir/file00011"];

    node.open(request(&registry, &sample)).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    node.starts(image.clone()).await;
    // Of starts at once, one is recorded.
    node.starts(image.clone()).await;
    assert_eq!(node.recorded_images().len(), 1);
    for name in wanted {
        read(&mount, name).await;
    }
    read(&mount, wanted[0]).await;
    node.end_recordings(|_| true).await;
    let expected = wanted.map(|name| (0, name.to_owned(), 9_000));
    assert_eq!(what(&stored(&node, &image)), expected);

    // What is warm would be missed, and is not worth more than what is known.
    node.starts(image.clone()).await;
    assert!(node.recorded_images().is_empty());

    node.remove(sample.digest()).await.unwrap();
    registry.take_log();
    node.open(request(&registry, &sample)).await.unwrap();
    // A layer that somebody changes just now is in no status.
    let layer = || node.status().layers.first().cloned();
    let fetched = || layer().is_some_and(|layer| layer.present == 3 && layer.profile.is_some());
    until("the prefetch", fetched).await;
    let profile = layer().and_then(|layer| layer.profile);
    assert_eq!(profile, Some(ProfileSource::Node));
    registry.take_log();
    let mount = node.mount(sample.digest()).await.unwrap();
    node.starts(image.clone()).await;
    for name in wanted {
        read(&mount, name).await;
    }
    assert!(registry.take_log().is_empty(), "all was there");
    let activity = layer().unwrap().activity;
    assert!(activity.reads >= 3 && activity.waited == 0, "{activity:?}");
    assert!(activity.fetched[1] > 0 && activity.fetched[0] == 0);

    // That start saw everything as well, and counts.
    node.leave().await;
    assert_eq!(stored(&node, &image).starts(), 2);
    assert_eq!(what(&stored(&node, &image)), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_of_a_shared_layer_counts_for_every_image_that_is_recorded() {
    let root = tempfile::tempdir().unwrap();
    let [base, one, two] = [5, 6, 7].map(|n| Sample::new(files(n, 5_000), &Layout::default()));
    let all = [&base, &one, &two].map(|sample| (sample, labels(sample)));
    let registry = Registry::serve(&all);
    let node = node(&root);
    let mut mounts = Vec::new();
    for (sample, _) in &all {
        node.open(request(&registry, sample)).await.unwrap();
        mounts.push(node.mount(sample.digest()).await.unwrap());
    }
    let (first, second) = (image(&[&base, &one]), image(&[&base, &two]));
    node.starts(first.clone()).await;
    read(&mounts[0], "dir/file00001").await;
    let asked = ImageUse {
        recording: Some("ci".to_owned()),
        ..second.clone()
    };
    node.starts(asked).await;
    read(&mounts[0], "dir/file00002").await;
    read(&mounts[1], "dir/file00005").await;
    read(&mounts[2], "dir/file00006").await;
    assert_eq!(node.finish_recording("other").await, None);
    let recorded = node.finish_recording("ci").await.unwrap();
    // The base had been read before: something may have been missed.
    assert!(!recorded.whole);
    let read_by = |layer, file: &str| (layer, format!("dir/{file}"), 5_000);
    assert_eq!(
        what(&recorded.profile),
        [read_by(0, "file00002"), read_by(1, "file00006")]
    );
    // The removal of a layer ends what could not be told afterwards.
    node.remove(base.digest()).await.unwrap();
    assert!(node.recorded_images().is_empty());
    assert_eq!(
        what(&stored(&node, &first)),
        [
            read_by(0, "file00001"),
            read_by(0, "file00002"),
            read_by(1, "file00005")
        ]
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recording_ends_by_itself_when_nothing_new_is_read() {
    let root = tempfile::tempdir().unwrap();
    let sample = Sample::new(files(3, 5_000), &Layout::default());
    let registry = Registry::serve(&[(&sample, labels(&sample))]);
    let mut config = config(&root);
    config.profiles.idle = Duration::from_millis(1);
    let node = Node::start(config, client()).unwrap();
    node.open(request(&registry, &sample)).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    node.starts(image(&[&sample])).await;
    read(&mount, "dir/file00001").await;
    until("the profile", || !node.profiles().list().is_empty()).await;
    assert!(node.recorded_images().is_empty());
    node.stop().await;
}
