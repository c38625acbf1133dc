//! Layers whose tars are put together and compared with their trees.

use std::io::Read as _;

use sluice_layer::write::Options;
use sluice_layer::{Format, unpack};

use super::*;
use crate::layer_dir::{DIFF_ID, TAR_REST};
use crate::service::Proof;

#[path = "../../../../layer/tests/blobs/mod.rs"]
#[allow(dead_code, reason = "shared with the layer crate's tests")]
mod blobs;

const LONG: Duration = Duration::from_secs(600);
const FORMATS: [Format; 2] = [Format::Estargz, Format::ZstdChunked];

fn downloading(root: &TempDir) -> Config {
    Config {
        background: Some(Duration::ZERO),
        ..config(root)
    }
}

/// A layer as the converter writes it.
fn converted(format: Format) -> Sample {
    let mut all = files(40, 3_000);
    all.push(SampleFile {
        name: "large".to_owned(),
        content: noise(7, 300_000),
    });
    let options = Options {
        chunk_size: 64 << 10,
        ..Options::new(format)
    };
    Sample::converted(all, &options).0
}

/// What unpacking the whole blob gives.
fn tar(format: Format, blob: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    unpack(format, blob).unwrap().read_to_end(&mut tar).unwrap();
    tar
}

fn diff_id(format: Format, blob: &[u8]) -> Digest {
    Digest::of(&tar(format, blob))
}

/// The same with whole records.
fn padded(format: Format, blob: &[u8]) -> Digest {
    let mut tar = tar(format, blob);
    tar.resize(tar.len().next_multiple_of(10_240), 0);
    Digest::of(&tar)
}

/// The layer without its TOC, and another TOC.
fn with_other_toc(format: Format, sample: &Sample, change: (&str, &str)) -> Sample {
    let toc = sample.toc();
    let size = sample.blob.len() as u64;
    let location = sluice_layer::locate_toc(&sample.blob, size).unwrap();
    let compressed = location.slice_of(&sample.blob, size).unwrap();
    let read = sluice_layer::UntrustedToc::read(&location, compressed, &Default::default());
    let json = String::from_utf8(read.unwrap().json().to_vec()).unwrap();
    let json = json.replacen(change.0, change.1, 1);
    let units = sample.blob[..toc.toc_offset() as usize].to_vec();
    let other = blobs::Blob::with_toc(format, units, json.into_bytes());
    Sample {
        toc_digest: Digest::of(&other.json),
        blob: other.bytes,
        files: Vec::new(),
    }
}

fn certain(proof: Proof) -> Proof {
    Proof {
        certain: true,
        ..proof
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_layers_tar_is_is_known_when_all_of_it_is_here() {
    for format in FORMATS {
        let root = tempfile::tempdir().unwrap();
        let sample = converted(format);
        let digest = sample.digest();
        let registry = Registry::serve(&[(&sample, labels(&sample))]);
        let node = Node::start(downloading(&root), client()).unwrap();
        node.open(request(&registry, &sample)).await.unwrap();
        toc_is_kept(&node, &sample, format).await;
        assert_eq!(node.proof(digest).await, None);
        registry.take_log();
        node.mount(digest).await.unwrap();
        assert_eq!(node.next_proof().await, digest);
        let proof = Proof {
            diff_id: Some(diff_id(format, &sample.blob)),
            padded: Some(padded(format, &sample.blob)),
            tree_fits: true,
            certain: false,
        };
        assert_eq!(node.proof(digest).await, Some(proof), "{format}");
        let directory = node.layer_path(digest);
        assert!(directory.join(DIFF_ID).exists() && !directory.join(TAR_REST).exists());
        // No byte came twice, not even the TOC of an eStargz layer, which is in
        // its tar.
        let ranges = registry.take_ranges();
        let fetched: u64 = ranges.iter().map(|(from, to)| to - from).sum();
        let toc = sample.toc().toc_offset();
        assert!(fetched <= toc, "{format}: {fetched}");
        assert!(
            ranges.iter().all(|(_, to)| *to <= toc),
            "{format}: {ranges:?}"
        );
        // In doubt it is found out from the whole blob.
        node.settle(digest, LONG).await.unwrap();
        assert_eq!(node.next_proof().await, digest);
        assert_eq!(node.proof(digest).await, Some(certain(proof)), "{format}");
        node.stop().await;
        // It is known for good.
        let node = Node::start(downloading(&root), client()).unwrap();
        assert_eq!(node.proof(digest).await, Some(certain(proof)));
        node.stop().await;
    }
}

/// Nobody who opens a layer waits for it.
async fn toc_is_kept(node: &Node, sample: &Sample, format: Format) {
    // It is written at once, and compressed already.
    let toc = sample.blob.len() as u64 - sample.toc().toc_offset();
    let file = node.layer_path(sample.digest()).join(TAR_REST);
    let kept = || std::fs::metadata(&file).is_ok_and(|file| file.len() > toc / 2);
    while format == Format::Estargz && !kept() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_toc_in_the_tar_is_fetched_again_only_if_what_was_kept_of_it_is_damaged() {
    let sample = converted(Format::Estargz);
    let digest = sample.digest();
    let expected = Some(diff_id(Format::Estargz, &sample.blob));
    let (toc, size) = (sample.toc().toc_offset(), sample.blob.len() as u64);
    for (damaged, requests) in [(false, 0), (true, 1)] {
        let root = tempfile::tempdir().unwrap();
        let registry = Registry::serve(&[(&sample, labels(&sample))]);
        let node = Node::start(config(&root), client()).unwrap();
        node.open(request(&registry, &sample)).await.unwrap();
        toc_is_kept(&node, &sample, Format::Estargz).await;
        let path = node.layer_path(digest);
        node.stop().await;
        assert_eq!(registry.take_ranges().len(), 1);
        if damaged {
            // Its checksum is right, and it is no TOC.
            let dir = LayerDir::open(&path, digest).unwrap();
            dir.keep_toc(&noise(1, (size - toc) as usize)).unwrap();
        }
        let node = Node::start(downloading(&root), client()).unwrap();
        node.mount(digest).await.unwrap();
        assert_eq!(node.next_proof().await, digest);
        assert_eq!(node.proof(digest).await.unwrap().diff_id, expected);
        let mut ranges = registry.take_ranges();
        ranges.retain(|(_, to)| *to > toc);
        assert_eq!(ranges.len(), requests, "{ranges:?}");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_kept_of_a_tar_or_is_damaged_is_fetched_again() {
    let damages: [fn(&std::path::Path); 3] = [
        |rest| fs::remove_file(rest).unwrap(),
        |rest| {
            let mut bytes = fs::read(rest).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(rest, bytes).unwrap();
        },
        |rest| {
            let bytes = fs::read(rest).unwrap();
            fs::write(rest, &bytes[..bytes.len() - 3]).unwrap();
        },
    ];
    for (format, damage) in FORMATS.into_iter().cycle().zip(damages) {
        let root = tempfile::tempdir().unwrap();
        let sample = converted(format);
        let digest = sample.digest();
        let (registry, node, mount) = mounted(&root, &sample).await;
        assert_content(&mount, &sample).await;
        node.stop().await;
        let rest = root.path().join("layers").join(digest.hex()).join(TAR_REST);
        damage(&rest);
        registry.take_log();
        let node = Node::start(downloading(&root), client()).unwrap();
        node.mount(digest).await.unwrap();
        assert_eq!(node.next_proof().await, digest);
        let proof = node.proof(digest).await.unwrap();
        assert_eq!(proof.diff_id, Some(diff_id(format, &sample.blob)));
        assert!(proof.tree_fits);
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_toc_that_describes_another_tree_than_the_tar_is_found_out() {
    let honest = converted(Format::ZstdChunked);
    let expected = diff_id(Format::ZstdChunked, &honest.blob);
    for (from, to) in [
        ("\"mode\":292", "\"mode\":2541"),
        ("dir/file00001", "dir/other"),
        ("\"type\":\"reg\"", "\"uid\":7,\"type\":\"reg\""),
    ] {
        let root = tempfile::tempdir().unwrap();
        let liar = with_other_toc(Format::ZstdChunked, &honest, (from, to));
        let digest = liar.digest();
        let registry = Registry::serve(&[(&liar, labels(&liar))]);
        let node = Node::start(downloading(&root), client()).unwrap();
        node.open(request(&registry, &liar)).await.unwrap();
        node.mount(digest).await.unwrap();
        assert_eq!(node.next_proof().await, digest);
        let proof = Proof {
            diff_id: Some(expected),
            padded: Some(padded(Format::ZstdChunked, &honest.blob)),
            tree_fits: false,
            certain: false,
        };
        assert_eq!(node.proof(digest).await, Some(proof), "{to}");
        node.settle(digest, LONG).await.unwrap();
        assert_eq!(node.next_proof().await, digest);
        assert_eq!(node.proof(digest).await, Some(certain(proof)), "{to}");
        node.stop().await;
    }
}

/// Two versions of a layer, of which the second has another last file.
fn versions(format: Format) -> [Sample; 2] {
    let options = Options::new(format);
    [0, 1].map(|version| {
        let mut all = files(60, 20_000);
        all[59].content = noise(1_000 + version, 20_000);
        Sample::converted(all, &options).0
    })
}

/// Downloads and proves both, one after the other; what is known of the second,
/// and the bytes that it took beside its TOC.
async fn second_after_first(first: &Sample, second: &Sample) -> (Node, Proof, u64) {
    let root = tempfile::tempdir().unwrap();
    let all = [first, second].map(|sample| (sample, labels(sample)));
    let registry = Registry::serve(&all);
    let node = Node::start(downloading(&root), client()).unwrap();
    for sample in [first, second] {
        let digest = sample.digest();
        node.open(request(&registry, sample)).await.unwrap();
        registry.take_ranges();
        node.mount(digest).await.unwrap();
        assert_eq!(node.next_proof().await, digest);
        while !node.0.elsewhere.indexed().contains(&digest) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let ranges = registry.take_ranges();
    let fetched = ranges.iter().map(|(from, to)| to - from).sum();
    let proof = node.proof(second.digest()).await.unwrap();
    (node, proof, fetched)
}

/// The blob with its tar-split frame changed.
fn with_other_split(sample: &Sample, change: impl Fn(&mut Vec<u8>)) -> Sample {
    let size = sample.blob.len() as u64;
    let location = sluice_layer::locate_toc(&sample.blob, size).unwrap();
    let range = location.tar_split(size).unwrap();
    let (start, end) = (range.start as usize + 8, range.end as usize);
    let mut lines = zstd::decode_all(&sample.blob[start..end]).unwrap();
    change(&mut lines);
    let frame = zstd::encode_all(&lines[..], 3).unwrap();
    let mut blob = sample.blob[..start - 4].to_vec();
    blob.extend((frame.len() as u32).to_le_bytes());
    blob.extend(frame);
    blob.extend(&sample.blob[end..]);
    Sample {
        toc_digest: sample.toc_digest,
        blob,
        files: Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_copied_is_proven_without_its_units() {
    for format in FORMATS {
        let [first, second] = versions(format);
        let expected = diff_id(format, &second.blob);
        let (node, proof, fetched) = second_after_first(&first, &second).await;
        assert_eq!((proof.diff_id, proof.tree_fits), (Some(expected), true));
        let all = second.blob.len();
        assert!(fetched < 50_000, "{format}: {fetched} of {all}");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tar_split_that_is_wrong_proves_nothing_wrong() {
    let format = Format::ZstdChunked;
    let [first, second] = versions(format);
    let expected = diff_id(format, &second.blob);

    // A frame that is no use costs what there is no frame for.
    let broken = with_other_split(&second, |lines| lines.truncate(lines.len() / 2));
    let (node, proof, fetched) = second_after_first(&first, &broken).await;
    assert_eq!((proof.diff_id, proof.tree_fits), (Some(expected), true));
    assert!(fetched > 400_000, "{fetched}");
    node.stop().await;

    // One that lies is found out by who knows the right digest.
    let lying = with_other_split(&second, |lines| {
        let text = std::str::from_utf8(lines).unwrap();
        let at = text.find("AAAAAAAA").unwrap();
        lines[at..at + 4].copy_from_slice(b"MDAw");
    });
    let (node, proof, fetched) = second_after_first(&first, &lying).await;
    assert_ne!(proof.diff_id, Some(expected));
    assert!(!proof.certain && fetched < 40_000, "{fetched}");
    node.settle(lying.digest(), LONG).await.unwrap();
    assert_eq!(node.next_proof().await, lying.digest());
    let proof = node.proof(lying.digest()).await.unwrap();
    assert_eq!((proof.diff_id, proof.tree_fits), (Some(expected), true));
    assert!(proof.certain);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_layer_after_another() {
    let root = tempfile::tempdir().unwrap();
    let one = converted(Format::ZstdChunked);
    let other = with_other_toc(Format::ZstdChunked, &one, ("dir/file00001", "dir/other"));
    let all = [&one, &other].map(|sample| (sample, labels(sample)));
    let registry = Registry::serve(&all);
    let node = Node::start(downloading(&root), client()).unwrap();
    for (sample, _) in all.iter().rev() {
        let digest = sample.digest();
        node.open(request(&registry, sample)).await.unwrap();
        node.mount(digest).await.unwrap();
        assert_eq!(node.next_proof().await, digest);
        node.settle(digest, LONG).await.unwrap();
        assert_eq!(node.next_proof().await, digest);
        node.remove(digest).await.unwrap();
        assert_eq!(node.in_use(), (0, 0));
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_layer_is_is_found_out_at_once_when_somebody_waits_for_it() {
    for format in FORMATS {
        let root = tempfile::tempdir().unwrap();
        let sample = converted(format);
        let digest = sample.digest();
        let (registry, node, mount) = mounted(&root, &sample).await;
        let all = [(); 3].map(|()| node.settle(digest, LONG));
        for settled in futures_util::future::join_all(all).await {
            settled.unwrap();
        }
        let proof = Proof {
            diff_id: Some(diff_id(format, &sample.blob)),
            padded: Some(padded(format, &sample.blob)),
            tree_fits: true,
            certain: true,
        };
        assert_eq!(node.proof(digest).await, Some(proof), "{format}");
        assert_eq!(registry.take_ranges(), [(0, sample.blob.len() as u64)]);
        // It was for the comparison alone.
        assert!(
            !LayerDir::open(&node.layer_path(digest), digest)
                .unwrap()
                .is_complete()
        );
        assert_content(&mount, &sample).await;
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_for_what_takes_long_is_told_so_and_it_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let sample = converted(Format::ZstdChunked);
    let digest = sample.digest();
    let (registry, node, _) = mounted(&root, &sample).await;
    registry.misbehave(|_| Some(Fault::Stall(0)));
    for wait in [Duration::from_millis(1), Duration::ZERO] {
        let told = node.settle(digest, wait).await.unwrap_err();
        assert!(told.contains("takes longer than"), "{told}");
    }
    registry.misbehave(|_| None);
    registry.unstall();
    node.settle(digest, LONG).await.unwrap();
    assert!(node.proof(digest).await.is_some_and(|proof| proof.certain));
    node.stop().await;
}
