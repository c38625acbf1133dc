//! Manifests and indexes as they were received.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use sluice_oci::{Descriptor, Digest, Index, Manifest, media_type};

use crate::error::{Context, Error, ErrorKind, printable};

/// The types asked for, most wanted first.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.docker.distribution.manifest.v2+json";

/// A manifest or index: its exact bytes, and what they are.
#[derive(Debug, Clone)]
pub struct Document {
    /// Its media type, on which the header and the content agree.
    pub media_type: String,
    /// The digest of `bytes`.
    pub digest: Digest,
    /// What the registry sent; re-serialising would change the digest.
    pub bytes: Bytes,
    context: Context,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<Value>,
    layers: Option<Value>,
    config: Option<Value>,
}

impl Document {
    /// Takes over `bytes`, whose digest the caller computed.
    pub(crate) fn new(
        content_type: Option<&str>,
        digest: Digest,
        bytes: Bytes,
        context: &Context,
    ) -> Result<Self, Error> {
        let outline: Outline = serde_json::from_slice(&bytes)
            .map_err(|error| context.protocol(format!("it is not a manifest ({error})")))?;
        let media_type = settle_type(&outline, content_type, context)?;
        Ok(Self {
            media_type,
            digest,
            bytes,
            context: context.clone(),
        })
    }

    /// Whether it is an index (or manifest list).
    pub fn is_index(&self) -> bool {
        media_type::is_index(&self.media_type)
    }

    /// A descriptor that points at it.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(
            self.media_type.clone(),
            self.digest,
            self.bytes.len() as u64,
        )
    }

    /// Parsed as one image's manifest.
    pub fn manifest(&self) -> Result<Manifest, Error> {
        self.parse("a manifest of one image")
    }

    /// Parsed as an index.
    pub fn index(&self) -> Result<Index, Error> {
        self.parse("an index")
    }

    fn parse<T: for<'de> Deserialize<'de>>(&self, what: &str) -> Result<T, Error> {
        serde_json::from_slice(&self.bytes).map_err(|error| {
            self.context
                .protocol(format!("{} is not {what} ({error})", self.digest))
        })
    }
}

/// The header, the `mediaType` field and the other fields must tell the same
/// story: a document that is an index to one reader and a manifest to another
/// has one digest but two contents.
fn settle_type(
    outline: &Outline,
    content_type: Option<&str>,
    context: &Context,
) -> Result<String, Error> {
    let header = content_type
        .map(|text| text.split(';').next().unwrap_or(text).trim())
        .filter(|text| known(text));
    let declared = outline.media_type.as_deref();
    if outline.schema_version == Some(1) {
        return Err(context
            .protocol("it is a manifest of the withdrawn schema 1")
            .with_remedy("push the image again with a current tool"));
    }
    let has_images = outline.manifests.is_some();
    let has_layers = outline.layers.is_some() || outline.config.is_some();
    let settled = match (declared, header) {
        (Some(declared), Some(header)) if declared != header => {
            return Err(context.protocol(format!(
                "the registry calls it {header}, its content {}",
                printable(declared, 100)
            )));
        }
        (Some(one), _) | (None, Some(one)) => one,
        (None, None) if has_images => media_type::OCI_INDEX,
        (None, None) => media_type::OCI_MANIFEST,
    };
    let fits = if media_type::is_index(settled) {
        has_images && !has_layers
    } else {
        has_layers && !has_images
    };
    if !known(settled) || !fits {
        return Err(context.protocol(format!(
            "it is neither an image manifest nor an index (type {})",
            printable(settled, 100)
        )));
    }
    Ok(settled.to_owned())
}

fn known(media_type: &str) -> bool {
    media_type::is_index(media_type) || media_type::is_manifest(media_type)
}

/// Checks bytes against the digest they were asked by.
pub(crate) fn check_digest(
    expected: Digest,
    actual: Digest,
    who: &str,
    context: &Context,
) -> Result<(), Error> {
    if expected == actual {
        return Ok(());
    }
    Err(context.error(
        ErrorKind::DigestMismatch,
        format!("the content has digest {actual}, but {who} {expected}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(content_type: Option<&str>, json: &str) -> Result<String, ErrorKind> {
        let context = Context {
            action: "fetch",
            subject: "manifest".to_owned(),
            host: "r.io".to_owned(),
        };
        let bytes = Bytes::from(json.to_owned());
        Document::new(content_type, Digest::of(&bytes), bytes, &context)
            .map(|document| document.media_type)
            .map_err(|error| error.kind())
    }

    #[test]
    fn type_from_header_field_or_shape() {
        let index = r#"{"schemaVersion":2,"manifests":[]}"#;
        let manifest = r#"{"schemaVersion":2,"config":{},"layers":[]}"#;
        assert_eq!(parse(None, index).unwrap(), media_type::OCI_INDEX);
        assert_eq!(
            parse(Some("application/json"), manifest).unwrap(),
            media_type::OCI_MANIFEST
        );
        assert_eq!(
            parse(
                Some("application/vnd.docker.distribution.manifest.v2+json; charset=utf-8"),
                manifest
            )
            .unwrap(),
            media_type::DOCKER_MANIFEST
        );
    }

    #[test]
    fn refuses_what_two_readers_could_read_differently() {
        for (header, json) in [
            (
                None,
                r#"{"schemaVersion":2,"config":{},"layers":[],"manifests":[]}"#,
            ),
            (None, r#"{"schemaVersion":2}"#),
            (None, r#"{"schemaVersion":1,"fsLayers":[]}"#),
            (None, "[]"),
            (None, "not json"),
            (
                Some(media_type::OCI_INDEX),
                r#"{"schemaVersion":2,"config":{},"layers":[]}"#,
            ),
            (
                Some(media_type::OCI_MANIFEST),
                r#"{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#,
            ),
            (None, r#"{"mediaType":"text/html","layers":[]}"#),
        ] {
            assert_eq!(parse(header, json), Err(ErrorKind::Protocol), "{json}");
        }
    }
}
