//! What must hold for any bytes that a registry or a credentials file holds.
//! The fuzz targets and this crate's tests run these.

use http::header::CONTENT_RANGE;
use http::{HeaderMap, HeaderValue};
use sluice_oci::{Digest, Index, Manifest, Reference};

pub use crate::auth::fuzzing::{challenge, docker_config};
use crate::content_range::ContentRange;
use crate::document::Document;
use crate::error::Context;

/// A range of a blob is none, or lies within it.
pub fn content_range(data: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(data) else {
        return;
    };
    let headers = HeaderMap::from_iter([(CONTENT_RANGE, value)]);
    let Some(range) = ContentRange::parse(&headers) else {
        return;
    };
    match (range.part, range.total) {
        (Some((first, len)), total) => {
            let end = first.checked_add(len).expect("a range has an end");
            assert!(len > 0 && total.is_none_or(|total| end <= total));
        }
        (None, total) => assert!(total.is_some()),
    }
}

/// A document is refused, or is what it says; written again, it says the same.
pub fn document(data: &[u8]) {
    let bytes = bytes::Bytes::copy_from_slice(data);
    let context = Context {
        action: "fetch",
        subject: "manifest".to_owned(),
        host: "r.io".to_owned(),
    };
    let Ok(document) = Document::new(None, Digest::of(data), bytes, &context) else {
        return;
    };
    if document.is_index() {
        let Ok(index) = document.index() else { return };
        let written = serde_json::to_vec(&index).expect("it can be written");
        let again: Index = serde_json::from_slice(&written).expect("and read");
        assert_eq!(index, again);
    } else if let Ok(manifest) = document.manifest() {
        let written = serde_json::to_vec(&manifest).expect("it can be written");
        let again: Manifest = serde_json::from_slice(&written).expect("and read");
        assert_eq!(manifest, again);
    }
}

/// A reference is refused, or names what it says when it is written.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(reference) = text.parse::<Reference>() else {
        return;
    };
    let written = reference.to_string();
    assert_eq!(written.parse(), Ok(reference.clone()));
    assert!(!written.contains(|c: char| c.is_whitespace() || c.is_control()));
    // It becomes part of URLs.
    for part in reference.repository().split('/') {
        assert!(!part.is_empty() && part != "." && part != "..", "{written}");
    }
    assert!(!reference.host().contains(['/', '@', '?', '#', '%']));
}

#[cfg(test)]
#[path = "../../layer/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::replay;

    fn replay(target: &str, check: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        replay::replay(&corpus.join(target), 2000, check);
    }

    #[test]
    fn corpora_of_what_registries_send() {
        replay("challenge", super::challenge);
        replay("content_range", super::content_range);
        replay("document", super::document);
        replay("reference", super::reference);
    }

    #[test]
    fn corpus_of_credentials_files() {
        replay("docker_config", super::docker_config);
    }
}
