//! Verification finds what is wrong and names it.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;

use common::{Bench, noise, tar};
use serde_json::{Value, json};
use sluice_converter::Lazy;
use sluice_layer::{Format, Limits, UntrustedToc, locate_toc};
use sluice_oci::{Digest, Manifest};

/// A converted image in the layout `out`, and its manifest.
async fn converted(format: Format) -> (Bench, Digest, Manifest) {
    let (bench, _) = Bench::simple(&tar(&[
        ("dir/first", &noise(1, 40_000)),
        ("dir/second", &noise(2, 10_000)),
    ]));
    let (report, _) = bench.convert(&bench.conversion(format)).await.unwrap();
    let manifest = bench.manifest_of("out", report.digest);
    (bench, report.digest, manifest)
}

/// Replaces a blob by other bytes, and mends every digest up to the index,
/// as whoever tampers with an image would.
fn replace(bench: &Bench, root: Digest, change: impl FnOnce(&mut Value), blob: Option<Vec<u8>>) {
    let mut manifest = bench.document("out", root);
    if let Some(blob) = blob {
        let digest = Digest::of(&blob);
        fs::write(bench.blob_path("out", digest), &blob).unwrap();
        manifest["layers"][0]["digest"] = json!(digest);
        manifest["layers"][0]["size"] = json!(blob.len());
    }
    change(&mut manifest);
    let bytes = manifest.to_string().into_bytes();
    let digest = Digest::of(&bytes);
    fs::write(bench.blob_path("out", digest), &bytes).unwrap();
    let index = fs::read_to_string(bench.path("out/index.json")).unwrap();
    let index = index.replace(&root.to_string(), &digest.to_string());
    fs::write(bench.path("out/index.json"), index).unwrap();
}

fn blob(bench: &Bench, manifest: &Manifest) -> Vec<u8> {
    fs::read(bench.blob_path("out", manifest.layers[0].digest)).unwrap()
}

/// A position in the middle of a file's only chunk, or its first.
fn middle(blob: &[u8], name: &str) -> usize {
    let size = blob.len() as u64;
    let location = locate_toc(blob, size).unwrap();
    let compressed = location.slice_of(blob, size).unwrap();
    let toc = UntrustedToc::read(&location, compressed, &Limits::default()).unwrap();
    let toc: Value = serde_json::from_slice(toc.json()).unwrap();
    let mut entries = toc["entries"].as_array().unwrap().iter();
    let entry = entries.find(|e| e["name"] == name).unwrap();
    entry["offset"].as_u64().unwrap() as usize + 5000
}

#[tokio::test]
async fn a_tampered_chunk() {
    for format in [Format::Estargz, Format::ZstdChunked] {
        let (bench, root, manifest) = converted(format).await;
        let mut bytes = blob(&bench, &manifest);
        let at = middle(&bytes, "dir/second");
        bytes[at] ^= 1;
        replace(&bench, root, |_| (), Some(bytes.clone()));
        let found = bench.verify("out").await;
        let layer = Digest::of(&bytes);
        let chunk = format!("layer {layer}: /dir/second: the chunk at byte 0: ");
        assert_eq!(
            found
                .defects
                .iter()
                .filter(|d| d.starts_with(&chunk))
                .count(),
            1,
            "{:?}",
            found.defects
        );
        // The tar is not what the configuration says either.
        assert_eq!(found.defects.len(), 2, "{:?}", found.defects);
    }
}

#[tokio::test]
async fn a_toc_that_the_annotation_does_not_name() {
    for format in [Format::Estargz, Format::ZstdChunked] {
        let (bench, root, _) = converted(format).await;
        let other = Digest::of(b"other").to_string();
        let change = |manifest: &mut Value| {
            let annotations = manifest["layers"][0]["annotations"]
                .as_object_mut()
                .unwrap();
            for (key, value) in annotations {
                if key.ends_with("toc.digest") || key.ends_with("manifest-checksum") {
                    *value = json!(other);
                }
            }
        };
        replace(&bench, root, change, None);
        let found = bench.verify("out").await;
        assert_eq!(found.defects.len(), 1, "{:?}", found.defects);
        assert!(found.defects[0].contains("which is not what the annotation says"));
        let location = bench.location("out");
        let inspection = sluice_converter::inspect(&common::client(), &location).await;
        let layer = inspection.unwrap().images.remove(0).layers.remove(0);
        assert!(matches!(layer.lazy, Lazy::Broken { .. }));
    }
}

#[tokio::test]
async fn a_toc_that_is_not_where_the_hint_says() {
    for format in [Format::Estargz, Format::ZstdChunked] {
        let (bench, root, _) = converted(format).await;
        let change = |manifest: &mut Value| {
            manifest["layers"][0]["annotations"]["containerd.io/snapshot/sluice.toc-position"] =
                json!("estargz:1:2:3");
        };
        replace(&bench, root, change, None);
        let found = bench.verify("out").await;
        assert_eq!(found.defects.len(), 1, "{:?}", found.defects);
        assert!(found.defects[0].contains("sluice.toc-position says"));
        assert_eq!(found.seekable, 1);
    }
}

#[tokio::test]
async fn a_toc_without_annotation() {
    let (bench, root, _) = converted(Format::Estargz).await;
    replace(
        &bench,
        root,
        |m| m["layers"][0]["annotations"] = json!({}),
        None,
    );
    let found = bench.verify("out").await;
    assert_eq!(found.defects.len(), 1);
    assert!(found.defects[0].ends_with("no annotation vouches for its table of contents"));
}

#[tokio::test]
async fn a_blob_with_other_bytes_than_its_digest_says() {
    let (bench, _, manifest) = converted(Format::ZstdChunked).await;
    let mut bytes = blob(&bench, &manifest);
    let at = middle(&bytes, "dir/first");
    bytes[at] ^= 1;
    fs::write(bench.blob_path("out", manifest.layers[0].digest), &bytes).unwrap();
    let found = bench.verify("out").await;
    let wrong = format!("the blob's bytes have the digest {}", Digest::of(&bytes));
    assert!(found.defects[0].ends_with(&wrong), "{:?}", found.defects);
    bytes.truncate(bytes.len() - 100);
    fs::write(bench.blob_path("out", manifest.layers[0].digest), &bytes).unwrap();
    let found = bench.verify("out").await;
    assert!(
        found.defects[0].contains("but the manifest says"),
        "{:?}",
        found.defects
    );
}

#[tokio::test]
async fn a_wrong_diff_id_and_missing_documents() {
    let (bench, root, manifest) = converted(Format::Estargz).await;
    let mut config = bench.document("out", manifest.config.digest);
    config["rootfs"]["diff_ids"][0] = json!(Digest::of(b"wrong"));
    let bytes = config.to_string().into_bytes();
    let digest = Digest::of(&bytes);
    fs::write(bench.blob_path("out", digest), &bytes).unwrap();
    replace(
        &bench,
        root,
        |m| m["config"]["digest"] = json!(digest),
        None,
    );
    let found = bench.verify("out").await;
    assert_eq!(found.defects.len(), 1, "{:?}", found.defects);
    let wrong = format!(
        "but the configuration's diff ID is {}",
        Digest::of(b"wrong")
    );
    assert!(found.defects[0].ends_with(&wrong));

    fs::remove_file(bench.blob_path("out", digest)).unwrap();
    fs::remove_file(bench.blob_path("out", manifest.layers[0].digest)).unwrap();
    let found = bench.verify("out").await;
    assert_eq!(found.defects.len(), 2, "{:?}", found.defects);
    assert!(found.defects[0].contains("lacks the configuration"));
    assert!(found.defects[1].contains("lacks the layer"));
}
