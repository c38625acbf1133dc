//! Has skopeo make a zstd:chunked layer.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use sluice_oci::Digest;

/// Writes a tar as the only layer of an OCI layout, has skopeo recompress it,
/// and gives the blob with its annotations.
pub(crate) fn convert(tar: &[u8]) -> (Vec<u8>, BTreeMap<String, String>) {
    let scratch = tempfile::tempdir().unwrap();
    let layout = scratch.path().join("layout");
    let output = scratch.path().join("output");
    write_layout(&layout, tar);
    let copied = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet"])
        .args(["--dest-compress", "--dest-compress-format", "zstd:chunked"])
        .arg(format!("oci:{}:latest", layout.display()))
        .arg(format!("dir:{}", output.display()))
        .output()
        .unwrap_or_else(|error| panic!("skopeo: {error}: install skopeo"));
    assert!(
        copied.status.success(),
        "skopeo: {}",
        String::from_utf8_lossy(&copied.stderr)
    );
    let manifest: Value =
        serde_json::from_slice(&fs::read(output.join("manifest.json")).unwrap()).unwrap();
    let layer = &manifest["layers"][0];
    let digest = layer["digest"].as_str().unwrap();
    let blob = fs::read(output.join(digest.strip_prefix("sha256:").unwrap())).unwrap();
    let annotations = serde_json::from_value(layer["annotations"].clone()).unwrap();
    (blob, annotations)
}

fn write_layout(layout: &Path, tar: &[u8]) {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |content: &[u8], media_type: &str| {
        let digest = Digest::of(content);
        fs::write(blobs.join(digest.hex()), content).unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": content.len()})
    };
    let put_json =
        |document: Value, media_type: &str| put(document.to_string().as_bytes(), media_type);
    let layer = put(tar, "application/vnd.oci.image.layer.v1.tar");
    let config = put_json(
        json!({"architecture": "amd64", "os": "linux", "config": {},
               "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}}),
        "application/vnd.oci.image.config.v1+json",
    );
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": [layer]});
    let mut manifest = put_json(manifest, manifest_type);
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}
