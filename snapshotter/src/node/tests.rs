use std::fs;
use std::time::Duration;

use serde_json::json;
use sluice_registry::{Client, RetryPolicy};
use tempfile::TempDir;

mod ahead;
mod disk;
mod elsewhere;
mod faults;
mod left;
mod prove;

use super::*;
use crate::layer_dir::LayerDir;
use crate::sample::{Fault, Layout, Registry, Sample, SampleFile, files, noise};

/// A node without anything that fetches by itself.
pub(super) fn config(root: &TempDir) -> Config {
    Config {
        mode: Some(Mode::Erofs),
        prefetch: false,
        background: None,
        fetch: fetch::Config {
            retry: Duration::from_millis(1),
            retry_limit: Duration::from_millis(20),
            // What is fetched is what is asked for.
            read_ahead: 0,
            ..fetch::Config::default()
        },
        ..Config::new(root.path())
    }
}

pub(super) fn client() -> Client {
    Client::new(sluice_registry::Config {
        retry: RetryPolicy {
            attempts: 1,
            ..RetryPolicy::default()
        },
        stall_timeout: Duration::from_millis(500),
        ..sluice_registry::Config::default()
    })
    .unwrap()
}

pub(super) fn labels(sample: &Sample) -> serde_json::Value {
    json!({"containerd.io/snapshot/stargz/toc.digest": sample.toc_digest.to_string()})
}

pub(super) fn request(registry: &Registry, sample: &Sample) -> LayerRequest {
    LayerRequest {
        reference: registry.reference(),
        digest: sample.digest(),
        manifest_digest: None,
        annotations: serde_json::from_value(labels(sample)).unwrap(),
        image_layers: vec![sample.digest()],
    }
}

/// Reads files as a container does. A reading thread of its own, so that the
/// runtime is free to fetch.
async fn read(path: PathBuf) -> std::io::Result<Vec<u8>> {
    tokio::task::spawn_blocking(move || fs::read(path))
        .await
        .unwrap()
}

/// The same, by readers that try again: a busy machine may not do anything
/// within a short deadline.
async fn read_in_the_end(path: PathBuf) -> Vec<u8> {
    loop {
        match read(path.clone()).await {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {}
            content => return content.unwrap(),
        }
    }
}

async fn assert_content(mount: &std::path::Path, sample: &Sample) {
    for file in &sample.files {
        let found = read(mount.join(&file.name)).await.unwrap();
        assert!(found == file.content, "{}", file.name);
    }
}

fn sample() -> Sample {
    let mut all = files(30, 9_000);
    all.push(SampleFile {
        name: "large".to_owned(),
        content: noise(1_000, 1_000_000),
    });
    let layout = Layout {
        shared: 40_000,
        prioritized: 6,
        ..Layout::default()
    };
    Sample::new(all, &layout)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_is_mounted_with_one_request_and_read_as_needed() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let registry = Registry::serve(&[(&sample, labels(&sample))]);
    let node = Node::start(config(&root), client()).unwrap();

    node.open(request(&registry, &sample)).await.unwrap();
    assert_eq!(
        registry.take_log().len(),
        1,
        "TOC and footer in one request"
    );
    node.open(request(&registry, &sample)).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    assert_eq!(node.mount(sample.digest()).await.unwrap(), mount);
    assert!(registry.take_log().is_empty());

    let first = read(mount.join(&sample.files[0].name)).await.unwrap();
    assert!(first == sample.files[0].content);
    let ranges = registry.take_ranges();
    assert_eq!(ranges.len(), 1, "{ranges:?}");
    assert!(ranges[0].1 - ranges[0].0 < 80_000, "{ranges:?}");

    assert_content(&mount, &sample).await;
    registry.take_log();
    assert_content(&mount, &sample).await;
    assert!(registry.take_log().is_empty(), "everything is here");
    let usage = node.usage(sample.digest()).await.unwrap();
    assert_eq!(usage.inodes, 6);
    assert!(usage.bytes >= 1_270_000);

    node.remove(sample.digest()).await.unwrap();
    assert!(!mount.exists());
    assert!(matches!(
        node.mount(sample.digest()).await,
        Err(MountError::Unknown(_))
    ));
    assert_eq!(fs::read_dir(root.path().join("layers")).unwrap().count(), 0);
    node.stop().await;
}

/// A mounted layer and the registry behind it.
async fn mounted(root: &TempDir, sample: &Sample) -> (Registry, Node, PathBuf) {
    mounted_with(config(root), sample).await
}

/// The same, on a node of another kind.
async fn mounted_with(config: Config, sample: &Sample) -> (Registry, Node, PathBuf) {
    let registry = Registry::serve(&[(sample, labels(sample))]);
    let node = Node::start(config, client()).unwrap();
    node.open(request(&registry, sample)).await.unwrap();
    let mount = node.mount(sample.digest()).await.unwrap();
    registry.take_log();
    (registry, node, mount)
}

fn is_eio(result: std::io::Result<Vec<u8>>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(libc::EIO))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mode_fuse_shows_the_same() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let mut config = config(&root);
    config.mode = Some(Mode::Fuse);
    let (registry, node, mount) = mounted_with(config, &sample).await;
    let first = read(mount.join(&sample.files[0].name)).await.unwrap();
    assert!(first == sample.files[0].content);
    assert_eq!(registry.take_ranges().len(), 1);
    assert_content(&mount, &sample).await;
    node.remove(sample.digest()).await.unwrap();
    assert!(!mount.exists());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn converted_layers_of_both_formats_are_served() {
    use sluice_layer::{Format, write::Options};
    for format in [Format::Estargz, Format::ZstdChunked] {
        let root = tempfile::tempdir().unwrap();
        let mut all = files(200, 3_000);
        all.push(SampleFile {
            name: "large".to_owned(),
            content: noise(7, 3_000_000),
        });
        let options = Options {
            chunk_size: 256 << 10,
            ..Options::new(format)
        };
        let (sample, annotations) = Sample::converted(all, &options);
        let registry = Registry::serve(&[(&sample, annotations)]);
        let node = Node::start(config(&root), client()).unwrap();
        // As podman's images come: no label says anything.
        let mut request = request(&registry, &sample);
        request.annotations.clear();
        node.open(request).await.unwrap();
        let log = registry.take_log();
        assert_eq!(log.len(), 2, "the manifest and the TOC: {log:?}");
        let (_, end) = log[1].range.unwrap();
        assert!(
            end < sample.blob.len() as u64,
            "exactly where the manifest says"
        );
        let mount = node.mount(sample.digest()).await.unwrap();
        assert_content(&mount, &sample).await;
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_readers_cause_one_fetch() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let (registry, node, mount) = mounted(&root, &sample).await;
    let file = &sample.files[10];
    let path = mount.join(&file.name);
    let readers = (0..100).map(|_| read(path.clone()));
    for content in futures_util::future::join_all(readers).await {
        assert!(content.unwrap() == file.content);
    }
    assert_eq!(registry.take_ranges().len(), 1);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_lazy_says_why_and_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let toc = sample.toc().toc_offset();
    let end = sample.blob.len() as u64;
    let registry = Registry::serve(&[(&sample, json!({}))]);
    let node = Node::start(config(&root), client()).unwrap();
    let right = request(&registry, &sample);
    let mut wrong_digest = right.clone();
    wrong_digest.annotations.insert(
        "containerd.io/snapshot/stargz/toc.digest".to_owned(),
        Digest::of(b"another").to_string(),
    );
    let mut unlabelled = right.clone();
    unlabelled.annotations.clear();
    let mut unlisted = unlabelled.clone();
    unlisted.digest = Digest::of(b"another");
    let cases: [(&LayerRequest, Option<Fault>, &str); 8] = [
        (&wrong_digest, None, "manifest's annotation says"),
        (
            &unlabelled,
            None,
            "carries no digest of a table of contents",
        ),
        (&unlisted, None, "does not list it"),
        (&right, Some(Fault::Tamper(toc + 20)), "table of contents"),
        (
            &right,
            Some(Fault::Tamper(end - 51)),
            "neither eStargz nor zstd:chunked",
        ),
        (&right, Some(Fault::IgnoreRange), "range"),
        (&right, Some(Fault::Status(404)), "404"),
        (&right, Some(Fault::Status(500)), "500"),
    ];
    for (request, fault, reason) in cases {
        let told = fault.clone();
        registry.misbehave(move |_| told.clone());
        let error = node.open(request.clone()).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{fault:?}: {error}");
        let left = fs::read_dir(root.path().join("layers")).unwrap().count();
        assert_eq!(left, 0, "{fault:?}");
    }
    registry.misbehave(|_| None);
    node.open(right).await.unwrap();
    // Another image cannot make this one read other content.
    let error = node.open(wrong_digest).await.unwrap_err();
    assert!(error.reason().contains("another table of contents"));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_from_elsewhere_are_not_lazy() {
    let root = tempfile::tempdir().unwrap();
    let sample = sample();
    let registry = Registry::serve(&[(&sample, labels(&sample))]);
    let config = Config {
        lazy_from: LazyFrom::new(["r.example/team".to_owned()]),
        ..config(&root)
    };
    let node = Node::start(config, client()).unwrap();
    let refused = node.open(request(&registry, &sample)).await.unwrap_err();
    assert!(refused.reason().contains("lazy_from"), "{refused}");
    assert!(registry.take_log().is_empty(), "nobody was asked");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_toc_longer_than_the_guess_takes_a_second_request() {
    let root = tempfile::tempdir().unwrap();
    let sample = Sample::new(files(4_000, 10), &Layout::default());
    let toc = sample.toc().toc_offset();
    assert!(
        sample.blob.len() as u64 - toc > 300_000,
        "or the test tests nothing"
    );
    let registry = Registry::serve(&[(&sample, labels(&sample))]);
    let node = Node::start(config(&root), client()).unwrap();
    node.open(request(&registry, &sample)).await.unwrap();
    let ranges = registry.take_ranges();
    assert_eq!(ranges.len(), 2);
    assert_eq!(ranges[1], (toc, ranges[0].0), "no byte twice");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hint_saves_requests_and_is_never_trusted() {
    use sluice_layer::{Format, annotations::TOC_POSITION, write::Options};
    for format in [Format::Estargz, Format::ZstdChunked] {
        let options = Options::new(format);
        let (sample, annotations) = Sample::converted(files(3_000, 10), &options);
        let registry = Registry::serve(&[(&sample, annotations.clone())]);
        // What containerd passes on.
        let mut right = request(&registry, &sample);
        right.annotations = serde_json::from_value(annotations).unwrap();
        (right.annotations).retain(|key, _| key.starts_with("containerd.io/snapshot/"));
        let hint = right.annotations[TOC_POSITION].clone();
        let parts: Vec<&str> = hint.split(':').collect();
        let [name, offset, compressed, size] = parts[..] else {
            panic!("{hint}");
        };
        let number = |text: &str| text.parse::<u64>().unwrap();
        let toc = (number(offset), number(offset) + number(compressed));
        let end = sample.blob.len();
        for (hint, requests) in [
            (hint.clone(), 1),
            // One for what the hint says, then the end, and what of the TOC
            // is not in it.
            (format!("{name}:{}:{compressed}:{size}", toc.0 - 1), 3),
            (
                format!("{name}:{offset}:{}:{size}", number(compressed) - 1),
                3,
            ),
            (format!("{name}:{end}:{compressed}:{size}"), 3),
            (format!("{name}:{}:{compressed}:{size}", end - 9), 3),
            (format!("{name}:{offset}:{compressed}:{}", 1u64 << 40), 2),
            ("estargz:0:100:100".to_owned(), 3),
            ("zstd-chunked:0:100:100".to_owned(), 3),
            ("nonsense".to_owned(), 2),
        ] {
            let root = tempfile::tempdir().unwrap();
            let node = Node::start(config(&root), client()).unwrap();
            let mut request = right.clone();
            (request.annotations).insert(TOC_POSITION.to_owned(), hint.clone());
            node.open(request).await.unwrap();
            let ranges = registry.take_ranges();
            if requests == 1 {
                assert_eq!(ranges, [toc], "{hint}");
            }
            assert!(ranges.len() <= requests, "{hint}: {ranges:?}");
            node.stop().await;
        }
        // Nor does the fall-back trust anything but the digest.
        let root = tempfile::tempdir().unwrap();
        let node = Node::start(config(&root), client()).unwrap();
        registry.misbehave(move |_| Some(Fault::Tamper(toc.0 + 20)));
        let error = node.open(right).await.unwrap_err();
        assert!(error.reason().contains("table of contents"), "{error}");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_manifest_is_fetched_once_when_labels_do_not_vouch() {
    let root = tempfile::tempdir().unwrap();
    let layers: Vec<Sample> = (1..4)
        .map(|count| Sample::new(files(count, 100), &Layout::default()))
        .collect();
    let described: Vec<_> = layers
        .iter()
        .map(|sample| (sample, labels(sample)))
        .collect();
    let registry = Registry::serve(&described);
    let node = Node::start(config(&root), client()).unwrap();
    for sample in &layers {
        let mut request = request(&registry, sample);
        request.annotations.clear();
        node.open(request).await.unwrap();
    }
    let log = registry.take_log();
    let manifests = log
        .iter()
        .filter(|request| request.path.contains("manifests"));
    assert_eq!((log.len(), manifests.count()), (4, 1));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_layer_starts_all_of_its_image() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout {
        shared: 10_000,
        ..Layout::default()
    };
    let layers: Vec<Sample> = (1..6)
        .map(|count| Sample::new(files(count, 100), &layout))
        .collect();
    let described: Vec<_> = layers
        .iter()
        .map(|sample| (sample, labels(sample)))
        .collect();
    let registry = Registry::serve(&described);
    let node = Node::start(config(&root), client()).unwrap();
    let mut first = request(&registry, &layers[0]);
    first.image_layers = layers.iter().map(Sample::digest).collect();
    node.open(first).await.unwrap();
    let on_disk = || fs::read_dir(root.path().join("layers")).unwrap().count();
    while on_disk() < layers.len() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for sample in &layers {
        node.open(request(&registry, sample)).await.unwrap();
        let mount = node.mount(sample.digest()).await.unwrap();
        assert_content(&mount, sample).await;
    }
    let tocs = registry.take_ranges();
    assert_eq!(tocs.len(), 2 * layers.len(), "a TOC and a read for each");
    let kept = HashSet::from([layers[1].digest()]);
    node.retain(kept).await.unwrap();
    assert_eq!(on_disk(), 1);
    node.stop().await;
}
