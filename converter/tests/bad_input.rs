//! What is wrong is said in a line, and leaves nothing behind.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};

use common::{Bench, gzip, noise, tar, usual_tar};
use serde_json::json;
use sluice_layer::Format;
use sluice_oci::{Descriptor, Digest, media_type};

/// Converts what must fail, once to a new layout and once into an existing
/// one, and returns the error.
async fn refused(bench: &Bench) -> String {
    let (good, _) = Bench::simple(&tar(&[("a", b"b")]));
    let conversion = good.conversion(Format::Estargz);
    good.convert(&conversion).await.unwrap();
    fs::rename(good.path("out"), bench.path("existing")).unwrap();
    let before = bench.snapshot("existing");

    let conversion = bench.conversion(Format::Estargz);
    let error = bench.convert(&conversion).await.unwrap_err().to_string();
    assert!(!bench.path("out").exists(), "{error}");
    let again = bench
        .convert_between("in", "existing", &conversion)
        .await
        .unwrap_err();
    assert_eq!(again.to_string(), error);
    assert_eq!(bench.snapshot("existing"), before, "{error}");
    assert!(
        fs::read_dir(bench.path("scratch"))
            .unwrap()
            .next()
            .is_none()
    );
    assert!(!error.contains('\n'), "{error}");
    error
}

/// An image whose first layer is fine and whose second is `blob`.
fn with_layer(blob: &[u8], diff_id: Digest) -> (Bench, Descriptor) {
    let bench = Bench::new();
    let layer = bench.blob(media_type::OCI_LAYER_GZIP, blob);
    let manifest = bench.manifest(&[bench.layer(&usual_tar()), (layer.clone(), diff_id)]);
    bench.name(&[("v1", &manifest)]);
    (bench, layer)
}

#[tokio::test]
async fn a_layer_that_is_no_tar() {
    for blob in [gzip(&noise(3, 100_000)), noise(4, 5000)] {
        let (bench, layer) = with_layer(&blob, Digest::of(b""));
        let digest = layer.digest;
        assert_eq!(
            refused(&bench).await,
            format!("layer {digest}: it is no tar archive")
        );
    }
}

#[tokio::test]
async fn truncated_gzip() {
    let usual = usual_tar();
    let whole = gzip(&usual);
    let (bench, layer) = with_layer(&whole[..whole.len() / 2], Digest::of(&usual));
    let digest = layer.digest;
    assert_eq!(
        refused(&bench).await,
        format!(
            "the layer {digest} is damaged: its compressed data ends too soon; copy the image again"
        )
    );
}

#[tokio::test]
async fn a_tar_that_ends_too_soon() {
    let usual = usual_tar();
    let (bench, _) = with_layer(&gzip(&usual[..30_000]), Digest::of(&usual));
    assert!(
        refused(&bench)
            .await
            .ends_with("in the middle of an entry, after 30000 bytes")
    );
}

#[tokio::test]
async fn a_blob_that_was_changed() {
    let (bench, layer) = Bench::simple(&tar(&[("f", &noise(9, 200_000))]));
    let path = bench.blob_path("in", layer.digest);
    let mut file = fs::File::options().write(true).open(path).unwrap();
    // Stored noise: the gzip stays valid but for its checksum.
    file.seek(SeekFrom::Start(layer.size / 2)).unwrap();
    file.write_all(b"changed").unwrap();
    let error = refused(&bench).await;
    assert!(
        error.starts_with(&format!("the layer {} is damaged: ", layer.digest)),
        "{error}"
    );
}

#[tokio::test]
async fn a_wrong_diff_id() {
    let usual = tar(&[("x", b"y")]);
    let (bench, layer) = with_layer(&gzip(&usual), Digest::of(b"something else"));
    assert_eq!(
        refused(&bench).await,
        format!(
            "layer {} unpacks to {}, but the image's configuration says {}: \
             the image is inconsistent, build it again",
            layer.digest,
            Digest::of(&usual),
            Digest::of(b"something else")
        )
    );
}

#[tokio::test]
async fn missing_blobs() {
    for what in ["layer", "configuration"] {
        let (bench, layer) = Bench::simple(&usual_tar());
        let index = fs::read_to_string(bench.path("in/index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_str(&index).unwrap();
        let manifest = index["manifests"][0]["digest"].as_str().unwrap();
        let manifest = bench.manifest_of("in", manifest.parse().unwrap());
        let gone = match what {
            "layer" => layer.digest,
            _ => manifest.config.digest,
        };
        fs::remove_file(bench.blob_path("in", gone)).unwrap();
        let place = bench.path("in");
        assert_eq!(
            refused(&bench).await,
            format!(
                "{} lacks the {what} {gone}: the image is incomplete, copy it again",
                place.display()
            )
        );
    }
}

#[tokio::test]
async fn configurations_that_do_not_fit() {
    for (config, why) in [
        (
            json!({"rootfs": {"diff_ids": []}}),
            "it lists 0 diff IDs for 1 layers",
        ),
        (json!({"rootfs": 1}), "it has no list rootfs.diff_ids"),
        (json!([]), "it has no list rootfs.diff_ids"),
    ] {
        let bench = Bench::new();
        let (layer, _) = bench.layer(&usual_tar());
        let config = bench.blob(media_type::OCI_CONFIG, config.to_string().as_bytes());
        let digest = config.digest;
        let manifest = json!({"schemaVersion": 2, "config": config, "layers": [layer]});
        let manifest = bench.blob(media_type::OCI_MANIFEST, manifest.to_string().as_bytes());
        bench.name(&[("v1", &manifest)]);
        assert_eq!(
            refused(&bench).await,
            format!("the configuration {digest} cannot be read: {why}")
        );
    }
}

#[tokio::test]
async fn sources_that_do_not_exist() {
    let bench = Bench::new();
    bench.name(&[]);
    let error = refused(&bench).await;
    assert!(
        error.ends_with("holds no image named 'v1'; it has: none"),
        "{error}"
    );
    fs::remove_file(bench.path("in/oci-layout")).unwrap();
    let error = bench
        .convert(&bench.conversion(Format::Estargz))
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("is no OCI layout: it has no file oci-layout")
    );
    fs::remove_dir_all(bench.path("in")).unwrap();
    let error = bench
        .convert(&bench.conversion(Format::Estargz))
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("is no OCI layout: there is no such directory")
    );
    assert!(!bench.path("out").exists());
}

#[tokio::test]
async fn a_directory_in_use_for_something_else_is_not_written_to() {
    let (bench, _) = Bench::simple(&usual_tar());
    fs::create_dir(bench.path("out")).unwrap();
    fs::write(bench.path("out/notes.txt"), "mine").unwrap();
    let before = bench.snapshot("out");
    let error = bench
        .convert(&bench.conversion(Format::Estargz))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("is no OCI layout"), "{error}");
    assert_eq!(bench.snapshot("out"), before);
}

/// A file system of its own with little room.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(path: std::path::PathBuf) -> Self {
        fs::create_dir(&path).unwrap();
        let options = Some(c"size=256k");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", &path, "tmpfs", flags, options).unwrap();
        Self(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(&self.0, flags).unwrap();
    }
}

#[tokio::test]
async fn a_full_disk() {
    let (bench, _) = Bench::simple(&tar(&[("big", &noise(8, 3 << 20))]));
    let disk = SmallDisk::mount(bench.path("disk"));
    let conversion = bench.conversion(Format::Estargz);
    let error = bench
        .convert_between("in", "disk/out", &conversion)
        .await
        .unwrap_err();
    let error = error.to_string();
    assert!(
        error.starts_with("cannot write to a temporary file in"),
        "{error}"
    );
    assert!(
        error.ends_with("; free some space and run the command again"),
        "{error}"
    );
    assert!(!bench.path("disk/out").exists());
    drop(disk);

    // The same for the place of temporary files.
    let disk = SmallDisk::mount(bench.path("small"));
    let mut conversion = bench.conversion(Format::Estargz);
    conversion.scratch = bench.path("small");
    conversion.prioritized = vec!["big".to_owned()];
    let error = bench.convert(&conversion).await.unwrap_err().to_string();
    assert!(error.contains("free some space"), "{error}");
    assert!(!bench.path("out").exists());
    drop(disk);
}

#[tokio::test]
async fn a_conversion_that_is_given_up_leaves_nothing() {
    let (bench, _) = Bench::simple(&tar(&[("big", &noise(8, 30 << 20))]));
    let conversion = bench.conversion(Format::Estargz);
    tokio::select! {
        biased;
        result = bench.convert(&conversion) => panic!("it was done at once: {result:?}"),
        () = async { for _ in 0..20 { tokio::task::yield_now().await; } } => {}
    }
    // The threads notice soon, and the last one cleans up.
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(120);
    while bench.path("out").exists() {
        let left = || bench.snapshot("out");
        assert!(std::time::Instant::now() < limit, "{:?}", left());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}
