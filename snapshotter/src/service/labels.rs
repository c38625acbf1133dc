//! What containerd's labels say about a layer.

use sluice_oci::{Digest, Reference};

use super::claims::Standing;
use super::lazy_layers::{ImageUse, LayerRequest};
use super::snapshot::{Key, Labels};

/// Names the snapshot that is wanted, on a `Prepare` that may be answered
/// without unpacking.
const TARGET: &str = "containerd.io/snapshot.ref";
/// Labels that begin so are passed on to the data plane.
const PASSED_ON: &str = "containerd.io/snapshot/";

// The Kubernetes plugin and the transfer service write the first name of each
// pair, older clients the second.
const REFERENCE: [&str; 2] = [
    "containerd.io/snapshot/cri.image-ref",
    "containerd.io/snapshot/remote/stargz.reference",
];
const LAYER: [&str; 2] = [
    "containerd.io/snapshot/cri.layer-digest",
    "containerd.io/snapshot/remote/stargz.digest",
];
const IMAGE_LAYERS: [&str; 2] = [
    "containerd.io/snapshot/cri.image-layers",
    "containerd.io/snapshot/remote/stargz.layers",
];
/// Tells the client why a layer has to be unpacked.
const NOT_LAZY: &str = "containerd.io/snapshot/sluice.not-lazy";
/// Tells whether a lazily mounted layer is what its snapshot is named for.
pub(crate) const STANDING: &str = "containerd.io/snapshot/sluice.content";
/// Characters; well below containerd's bound of 4096 bytes on a label.
const MAX_REASON: usize = 500;
/// Asks for a recording of what the snapshot's container reads, by a name.
const RECORD: &str = "containerd.io/snapshot/sluice.record";
const MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";

/// The snapshot that the labels ask for by name, if they do.
pub(crate) fn target(labels: &Labels) -> Option<Key> {
    Key::try_from(labels.get(TARGET)?.as_str()).ok()
}

/// Whether `labels` are those of a snapshot that serves as `target`.
pub(crate) fn serves(labels: &Labels, target: &Key) -> bool {
    labels.get(TARGET).map(String::as_str) == Some(target.as_str())
}

/// The image through which a snapshot was asked for.
pub(crate) fn image(labels: &Labels) -> Option<String> {
    REFERENCE.iter().find_map(|name| labels.get(*name)).cloned()
}

/// Adds why the layer that the labels ask for is not served lazily.
pub(crate) fn tell_not_lazy(labels: &mut Labels, reason: &str) {
    let reason = reason.chars().take(MAX_REASON).collect();
    labels.insert(NOT_LAZY.to_owned(), reason);
}

/// Adds whether the content is what the name says.
pub(crate) fn tell_standing(labels: &mut Labels, standing: &Standing) {
    labels.insert(STANDING.to_owned(), standing.as_str().to_owned());
}

/// The layer that the labels ask for, or what is missing to know it.
pub(crate) fn layer_request(labels: &Labels) -> Result<LayerRequest, String> {
    let first = |names: &[&'static str; 2]| {
        let mut names = names.iter().copied();
        names.find_map(|name| Some((name, labels.get(name)?)))
    };
    let (_, reference) = first(&REFERENCE).ok_or_else(|| {
        format!(
            "no label '{}' names the image: the client does not ask for lazy layers",
            REFERENCE[0]
        )
    })?;
    let reference = reference
        .parse::<Reference>()
        .map_err(|error| error.to_string())?;
    let (name, digest) =
        first(&LAYER).ok_or_else(|| format!("no label '{}' names the layer", LAYER[0]))?;
    let digest = digest
        .parse::<Digest>()
        .map_err(|error| format!("label '{name}': {error}"))?;
    let manifest_digest = labels
        .get(MANIFEST)
        .map(|text| text.parse::<Digest>())
        .transpose()
        .map_err(|error| format!("label '{MANIFEST}': {error}"))?;
    // A list that was cut at 4096 bytes may end in half a digest.
    let image_layers = first(&IMAGE_LAYERS)
        .map(|(_, list)| {
            list.split(',')
                .map_while(|d| d.trim().parse().ok())
                .collect()
        })
        .unwrap_or_default();
    let annotations = labels
        .iter()
        .filter(|(name, _)| name.starts_with(PASSED_ON))
        .map(|(name, value)| (annotation(name).to_owned(), value.clone()))
        .collect();
    Ok(LayerRequest {
        reference,
        digest,
        manifest_digest,
        annotations,
        image_layers,
    })
}

/// Whether two requests for one layer come with the same trust: of the same
/// image, or with the same annotations.
pub(crate) fn trust_the_same(one: &LayerRequest, other: &LayerRequest) -> bool {
    let names = [REFERENCE, LAYER, IMAGE_LAYERS].concat();
    let annotations = |request: &LayerRequest| {
        let mut annotations = request.annotations.clone();
        annotations.retain(|name, _| name != MANIFEST && !names.contains(&name.as_str()));
        annotations
    };
    let same_image = one.manifest_digest.is_some() && one.manifest_digest == other.manifest_digest;
    same_image || annotations(one) == annotations(other)
}

/// The image of `layers`, lowest first, from the labels of its topmost
/// snapshot and of the one that is made over it.
pub(crate) fn image_use(top: &Labels, new: &Labels, layers: Vec<Digest>) -> ImageUse {
    let reference = REFERENCE.iter().find_map(|name| top.get(*name));
    ImageUse {
        reference: reference.map(|text| match text.parse::<Reference>() {
            Ok(reference) => reference.to_string(),
            Err(_) => text.clone(),
        }),
        manifest_digest: top.get(MANIFEST).and_then(|text| text.parse().ok()),
        layers,
        recording: new.get(RECORD).cloned(),
    }
}

/// The annotation behind a label. A client puts the prefix before those of
/// zstd:chunked, which containerd would not pass on otherwise.
fn annotation(label: &str) -> &str {
    match label.strip_prefix(PASSED_ON) {
        Some(rest) if rest.starts_with("io.") => rest,
        _ => label,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn both_families_of_labels_name_a_layer() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let list = format!("{a},{b}");
        let [cri, stargz] = [0, 1].map(|family| {
            layer_request(&labels(&[
                (REFERENCE[family], "r.io/app:1"),
                (LAYER[family], &a.to_string()),
                (IMAGE_LAYERS[family], &list),
                ("containerd.io/snapshot/stargz/toc.digest", "t"),
                (
                    "containerd.io/snapshot/io.github.containers.zstd-chunked.manifest-checksum",
                    "c",
                ),
                ("containerd.io/gc.root", "not passed on"),
            ]))
            .unwrap()
        });
        for request in [&cri, &stargz] {
            assert_eq!(request.reference.to_string(), "r.io/app:1");
            assert_eq!(request.digest, a);
            assert_eq!(request.manifest_digest, None);
            assert_eq!(request.image_layers, [a, b]);
            assert_eq!(request.annotations.len(), 5);
            assert_eq!(
                request.annotations["io.github.containers.zstd-chunked.manifest-checksum"],
                "c"
            );
            assert_eq!(
                request.annotations["containerd.io/snapshot/stargz/toc.digest"],
                "t"
            );
        }
    }

    #[test]
    fn a_cut_list_keeps_its_whole_digests() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let cut = format!("{a},{b}").split_at(100).0.to_owned();
        let request = layer_request(&labels(&[
            (REFERENCE[0], "r.io/app:1"),
            (LAYER[0], &a.to_string()),
            (MANIFEST, &b.to_string()),
            (IMAGE_LAYERS[0], &cut),
        ]))
        .unwrap();
        assert_eq!(request.image_layers, [a]);
        assert_eq!(request.manifest_digest, Some(b));
    }

    #[test]
    fn says_what_is_missing_or_wrong() {
        let layer = Digest::of(b"a").to_string();
        for (pairs, named) in [
            (vec![], REFERENCE[0]),
            (vec![(REFERENCE[0], "r.io/app:1")], LAYER[0]),
            (vec![(REFERENCE[1], "r.io/App")], "r.io/App"),
            (
                vec![(REFERENCE[0], "r.io/a"), (LAYER[1], "sha256:1")],
                LAYER[1],
            ),
            (
                vec![
                    (REFERENCE[0], "r.io/a"),
                    (LAYER[0], &layer),
                    (MANIFEST, "x"),
                ],
                MANIFEST,
            ),
        ] {
            let reason = layer_request(&labels(&pairs)).unwrap_err();
            assert!(reason.contains(named), "{reason}");
        }
    }
}
