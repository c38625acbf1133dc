//! The labels by which containerd, its garbage collector and a lazy
//! snapshotter find their way.

use sluice_oci::{Descriptor, Digest, Manifest, Reference};

use super::node::Labels;

/// Names the snapshot that a `Prepare` is about.
const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// The image through which a layer was asked for.
pub(super) const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// The layer's digest.
pub(super) const LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
/// Only labels that begin so are passed on to a snapshotter.
const TO_SNAPSHOTTER: &str = "containerd.io/snapshot/";
/// Annotations of a layer that a snapshotter needs although they do not begin
/// so: those of zstd:chunked layers.
const ZSTD_CHUNKED: [&str; 2] = [
    "io.github.containers.zstd-chunked.",
    "io.containers.zstd-chunked.",
];
/// containerd's bound on a label's key and value together.
const MAX_LABEL: usize = 4096;

/// For the `Prepare` and `Commit` of the layer at `index`.
pub(crate) fn for_snapshot(
    image: &Reference,
    manifest_digest: Digest,
    manifest: &Manifest,
    index: usize,
    chain_id: Digest,
) -> Labels {
    let layers = &manifest.layers[index..];
    let mut labels = Labels::new();
    for (key, value) in &layers[0].annotations {
        if key.starts_with(TO_SNAPSHOTTER) {
            labels.insert(key.clone(), value.clone());
        } else if ZSTD_CHUNKED.iter().any(|prefix| key.starts_with(prefix)) {
            labels.insert(format!("{TO_SNAPSHOTTER}{key}"), value.clone());
        }
    }
    labels.retain(|key, value| key.len() + value.len() <= MAX_LABEL);
    let mut put = |key: &str, value: String| {
        labels.insert(key.to_owned(), value);
    };
    put(SNAPSHOT_REF, chain_id.to_string());
    put(IMAGE_REF, image.to_string());
    put(LAYER_DIGEST, layers[0].digest.to_string());
    put(
        "containerd.io/snapshot/cri.manifest-digest",
        manifest_digest.to_string(),
    );
    let key = "containerd.io/snapshot/cri.image-layers";
    put(key, list(layers, MAX_LABEL - key.len()));
    labels
}

/// As many digests as fit, separated by commas.
fn list(layers: &[Descriptor], limit: usize) -> String {
    let mut text = String::new();
    for layer in layers {
        let digest = layer.digest.to_string();
        if text.len() + 1 + digest.len() > limit {
            break;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&digest);
    }
    text
}

/// What an index refers to.
pub(crate) fn of_index(manifests: &[Descriptor]) -> Labels {
    numbered("containerd.io/gc.ref.content.m", manifests)
}

/// What a manifest refers to. Layers that were not downloaded are named as
/// well: the collector does not mind, and a later download is kept.
pub(crate) fn of_manifest(manifest: &Manifest) -> Labels {
    let mut labels = numbered("containerd.io/gc.ref.content.l", &manifest.layers);
    labels.insert(
        "containerd.io/gc.ref.content.config".to_owned(),
        manifest.config.digest.to_string(),
    );
    labels
}

/// The snapshot that a configuration keeps alive.
pub(crate) fn of_config(snapshotter: &str, chain_id: Digest) -> Labels {
    Labels::from([(
        format!("containerd.io/gc.ref.snapshot.{snapshotter}"),
        chain_id.to_string(),
    )])
}

fn numbered(prefix: &str, descriptors: &[Descriptor]) -> Labels {
    let pairs = descriptors.iter().enumerate();
    pairs
        .map(|(number, descriptor)| (format!("{prefix}.{number}"), descriptor.digest.to_string()))
        .collect()
}

/// Where content came from, added to what `present` says already. containerd
/// leaves the port out.
pub(crate) fn source(image: &Reference, present: Option<&Labels>) -> Labels {
    let host = match image.host().rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => image.host(),
    };
    let key = format!(
        "containerd.io/distribution.source.{}",
        host.trim_matches(['[', ']'])
    );
    let known = present.and_then(|labels| labels.get(&key));
    let mut repositories: Vec<&str> = known.map_or(Vec::new(), |known| known.split(',').collect());
    repositories.push(image.repository());
    repositories.sort_unstable();
    repositories.dedup();
    let value = repositories.join(",");
    if key.len() + value.len() > MAX_LABEL {
        return Labels::new();
    }
    Labels::from([(key, value)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_oci::media_type;

    fn manifest(layers: usize) -> Manifest {
        let descriptor = |name: String| {
            Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::of(name.as_bytes()), 1)
        };
        Manifest {
            schema_version: 2,
            media_type: None,
            config: descriptor("config".to_owned()),
            layers: (0..layers).map(|n| descriptor(n.to_string())).collect(),
            annotations: Default::default(),
            other: Default::default(),
        }
    }

    fn labels(manifest: &Manifest, index: usize) -> Labels {
        let image = "r.io/app:v1".parse().unwrap();
        for_snapshot(&image, Digest::of(b"m"), manifest, index, Digest::of(b"c"))
    }

    #[test]
    fn every_label_fits() {
        let mut many = manifest(120);
        let long = "x".repeat(5000);
        let layer = &mut many.layers[1].annotations;
        layer.insert("containerd.io/snapshot/long".to_owned(), long);
        layer.insert("containerd.io/snapshot/short".to_owned(), "s".to_owned());
        layer.insert("org.example.other".to_owned(), "o".to_owned());
        layer.insert(
            "io.github.containers.zstd-chunked.manifest-checksum".to_owned(),
            "c".to_owned(),
        );
        let labels = labels(&many, 1);
        for (key, value) in &labels {
            assert!(key.len() + value.len() <= MAX_LABEL, "{key}");
        }
        assert_eq!(labels["containerd.io/snapshot/short"], "s");
        assert_eq!(
            labels["containerd.io/snapshot/io.github.containers.zstd-chunked.manifest-checksum"],
            "c"
        );
        assert_eq!(labels.len(), 7);
        let list = &labels["containerd.io/snapshot/cri.image-layers"];
        let digests: Vec<Digest> = list.split(',').map(|d| d.parse().unwrap()).collect();
        assert_eq!(digests.len(), 56);
        assert_eq!(digests[0], many.layers[1].digest);
    }

    #[test]
    fn sources_are_added_to() {
        let image: Reference = "127.0.0.1:5000/b:v1".parse().unwrap();
        let key = "containerd.io/distribution.source.127.0.0.1";
        let first = source(&image, None);
        assert_eq!(first[key], "b");
        let known = Labels::from([(key.to_owned(), "a,c,b".to_owned())]);
        assert_eq!(source(&image, Some(&known))[key], "a,b,c");
        let six: Reference = "[::1]:5000/b".parse().unwrap();
        assert!(source(&six, None).contains_key("containerd.io/distribution.source.::1"));
    }
}
