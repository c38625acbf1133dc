//! What manifests, indexes and configurations say of layers, read as containerd
//! reads them. Any image may be hostile; one that is not, and that containerd
//! can run, is understood.

use serde::Deserialize;
use sluice_oci::Digest;

/// Overlayfs takes no more layers than this, so that nothing runs from more.
const MOST_LAYERS: usize = 500;

/// A manifest, an index, or what claims to be both.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Document {
    /// The images of an index.
    pub(super) manifests: Vec<Descriptor>,
    /// The configuration of an image.
    pub(super) config: Option<Descriptor>,
    layers: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    pub(super) digest: String,
    #[serde(default)]
    media_type: String,
}

#[derive(Deserialize)]
struct Configuration {
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

impl Document {
    /// Reads one. What is none names nothing.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).unwrap_or_default()
    }

    /// The chain IDs of the image's layers by its configuration, each with the
    /// digest of the layer's blob, if that is a SHA-256. None if nothing can run
    /// from it.
    pub(super) fn layers(&self, configuration: &[u8]) -> Vec<(Digest, Option<Digest>)> {
        let Ok(Configuration { rootfs }) = serde_json::from_slice(configuration) else {
            return Vec::new();
        };
        let diff_ids = rootfs.diff_ids;
        let all: Vec<&Descriptor> = self.layers.iter().collect();
        // Newer versions of containerd pass over what is no layer.
        let layers = match all.len() == diff_ids.len() {
            true => all,
            false => all.into_iter().filter(|layer| layer.is_layer()).collect(),
        };
        if layers.len() != diff_ids.len() || layers.len() > MOST_LAYERS {
            return Vec::new();
        }
        let mut named = Vec::with_capacity(layers.len());
        let mut below: Option<String> = None;
        for (layer, diff_id) in layers.into_iter().zip(diff_ids) {
            let chain_id = match below {
                None => diff_id,
                Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()).to_string(),
            };
            // The lowest may have another algorithm than those above.
            if let Ok(name) = chain_id.parse() {
                named.push((name, layer.digest.parse().ok()));
            }
            below = Some(chain_id);
        }
        named
    }
}

impl Descriptor {
    fn is_layer(&self) -> bool {
        let families = [
            "application/vnd.oci.image.layer.",
            "application/vnd.docker.image.rootfs.",
        ];
        families
            .iter()
            .any(|family| self.media_type.starts_with(family))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn named(layers: &serde_json::Value, diff_ids: &[&str]) -> Vec<(Digest, Option<Digest>)> {
        let manifest = json!({"config": {"digest": "c"}, "layers": layers});
        let document = Document::parse(manifest.to_string().as_bytes());
        assert_eq!(document.config.as_ref().unwrap().digest, "c");
        let configuration = json!({"rootfs": {"type": "layers", "diff_ids": diff_ids}});
        document.layers(configuration.to_string().as_bytes())
    }

    #[test]
    fn layers_are_named_by_the_chain_of_their_diff_ids() {
        let [a, b, one, two] = [b"a", b"b", b"1", b"2"].map(|text| Digest::of(text));
        let chain = Digest::of(format!("{a} {b}").as_bytes());
        let (first, second) = (a.to_string(), b.to_string());
        let diff_ids = [first.as_str(), &second];
        let layer = |digest: Digest| json!({"digest": digest, "mediaType": ""});
        let expected = vec![(a, Some(one)), (chain, Some(two))];
        assert_eq!(named(&json!([layer(one), layer(two)]), &diff_ids), expected);
        // What is no layer is passed over, where the numbers say so.
        let typed = |digest: Digest, name| json!({"digest": digest, "mediaType": name});
        let oci = "application/vnd.oci.image.layer.v1.tar+zstd";
        let docker = "application/vnd.docker.image.rootfs.diff.tar.gzip";
        let layers = json!([
            typed(one, oci),
            typed(a, "application/vnd.in-toto+json"),
            typed(two, docker)
        ]);
        assert_eq!(named(&layers, &diff_ids), expected);
        // Other algorithms are other layers.
        let sha512 = format!("sha512:{}", "0".repeat(128));
        let layers = json!([layer(one), {"digest": sha512}]);
        assert_eq!(named(&layers, &diff_ids), [(a, Some(one)), (chain, None)]);
        let over = Digest::of(format!("{sha512} {b}").as_bytes());
        let layers = json!([layer(one), layer(two)]);
        let found = named(&layers, &[&sha512, &second]);
        assert_eq!(found, [(over, Some(two))]);
    }

    #[test]
    fn what_nothing_can_run_from_names_nothing() {
        let digest = Digest::of(b"a").to_string();
        let layer = json!({"digest": digest});
        assert_eq!(named(&json!([layer, layer]), &[&digest]), []);
        assert_eq!(named(&json!([]), &[]), []);
        let many = vec![digest.as_str(); MOST_LAYERS + 1];
        assert_eq!(named(&json!(vec![layer; many.len()]), &many), []);
        for rubbish in ["", "[]", "{\"layers\": 7}", "\"text\"", "{\"a\": \"b\"}"] {
            let document = Document::parse(rubbish.as_bytes());
            assert!(document.manifests.is_empty() && document.config.is_none());
            assert_eq!(document.layers(rubbish.as_bytes()), []);
        }
        let index = json!({"manifests": [{"digest": "x"}, {"digest": "y"}]}).to_string();
        let index = Document::parse(index.as_bytes());
        let digests: Vec<_> = index.manifests.iter().map(|m| &m.digest).collect();
        assert_eq!(digests, ["x", "y"]);
    }
}
