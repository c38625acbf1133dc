//! A profile as an OCI artifact that refers to an image.
//!
//! The artifact's layers are the document and, in a profile with data, the
//! content of everything that it names. Both are named in annotations, too:
//! registries repeat those in their list of referrers, so that whoever finds
//! the artifact there need not fetch its manifest.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read};

use sluice_oci::Digest;

use super::{MAX_BYTES, Profile, ProfileError};

/// The artifact's type.
pub const ARTIFACT_TYPE: &str = "application/vnd.sluice.profile.v1";
/// The document, compressed with Zstandard.
pub const DOCUMENT_TYPE: &str = "application/vnd.sluice.profile.document.v1+zstd";
/// The content of all that the document names, in its order, without anything
/// between: one Zstandard frame.
pub const CONTENT_TYPE: &str = "application/vnd.sluice.profile.content.v1+zstd";
/// Readers of content keep a window of two to the power of this many bytes.
pub const CONTENT_WINDOW_LOG: u32 = 23;
/// Annotation: digest and size of the document, as stored.
const DOCUMENT: &str = "vnd.sluice.profile.document";
/// Annotation: digest and size of the content, as stored.
const CONTENT: &str = "vnd.sluice.profile.content";

/// A blob of the artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes, as stored.
    pub size: u64,
}

/// What an artifact holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attachment {
    /// The document.
    pub document: Part,
    /// The content, if it carries that.
    pub content: Option<Part>,
}

impl Attachment {
    /// As annotations.
    pub fn to_annotations(&self) -> BTreeMap<String, String> {
        let text = |part: &Part| format!("{} {}", part.digest, part.size);
        let document = (DOCUMENT.to_owned(), text(&self.document));
        let content = self.content.as_ref();
        let content = content.map(|content| (CONTENT.to_owned(), text(content)));
        [document].into_iter().chain(content).collect()
    }

    /// From annotations; none where they say nothing that makes sense.
    pub fn parse(annotations: &BTreeMap<String, String>) -> Option<Self> {
        let part = |key| {
            let (digest, size) = annotations.get(key)?.split_once(' ')?;
            let (digest, size) = (digest.parse().ok()?, size.parse().ok()?);
            (size > 0 && size <= i64::MAX as u64).then_some(Part { digest, size })
        };
        Some(Self {
            document: part(DOCUMENT)?,
            content: part(CONTENT),
        })
    }
}

/// Reads the content of an artifact, whoever wrote it: its bytes, within a
/// bounded window of memory. Nothing vouches for them.
pub fn decode_content<R: BufRead>(stored: R) -> io::Result<impl Read> {
    let mut decoder = zstd::Decoder::with_buffer(stored)?.single_frame();
    decoder.window_log_max(CONTENT_WINDOW_LOG)?;
    Ok(decoder)
}

impl Profile {
    /// The document as an artifact stores it.
    pub fn compress(&self) -> io::Result<Vec<u8>> {
        zstd::bulk::compress(self.to_json().as_bytes(), zstd::DEFAULT_COMPRESSION_LEVEL)
    }

    /// Parses a document as an artifact stores it, whoever wrote it.
    pub fn parse_compressed(document: &[u8]) -> Result<Self, ProfileError> {
        let mut text = Vec::new();
        decode_content(document)
            .and_then(|decoder| decoder.take(MAX_BYTES as u64 + 1).read_to_end(&mut text))
            .map_err(|error| ProfileError::Compression(error.to_string()))?;
        Self::parse(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_say_what_there_is() {
        let part = |n: u8| Part {
            digest: Digest::of(&[n]),
            size: 100 + u64::from(n),
        };
        for content in [None, Some(part(2))] {
            let attachment = Attachment {
                document: part(1),
                content,
            };
            let annotations = attachment.to_annotations();
            assert_eq!(Attachment::parse(&annotations), Some(attachment));
        }
        for wrong in [
            "",
            "sha256:00 1",
            "sha256:00",
            &format!("{} 0", part(1).digest),
        ] {
            let annotations = [(DOCUMENT.to_owned(), wrong.to_owned())].into();
            assert_eq!(Attachment::parse(&annotations), None, "{wrong}");
        }
    }

    #[test]
    fn a_compressed_document_is_bounded() {
        let profile = Profile::new(1, vec![Digest::of(b"layer")], Vec::new()).unwrap();
        let stored = profile.compress().unwrap();
        assert_eq!(Profile::parse_compressed(&stored).unwrap(), profile);
        assert!(Profile::parse_compressed(&stored[..stored.len() - 1]).is_err());
        assert!(Profile::parse_compressed(b"{}").is_err());
        let bomb = zstd::bulk::compress(&vec![b' '; MAX_BYTES + 1], 1).unwrap();
        let refused = Profile::parse_compressed(&bomb);
        assert_eq!(refused, Err(ProfileError::TooLarge(MAX_BYTES + 1)));
    }
}
