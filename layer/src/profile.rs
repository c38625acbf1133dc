//! What a workload reads while it starts, in the order in which it first needs
//! it. `docs/profiles.md` describes the document.
//!
//! A profile is a hint: it decides what is fetched early, never what is
//! believed. Whoever applies one still checks every byte against the TOC.

mod attachment;
mod json;
mod merge;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use sluice_oci::Digest;

use crate::toc::{Unit, names};

pub use attachment::{
    ARTIFACT_TYPE, Attachment, CONTENT_TYPE, CONTENT_WINDOW_LOG, DOCUMENT_TYPE, Part,
    decode_content,
};

/// The most bytes of a document that are parsed.
pub const MAX_BYTES: usize = 16 << 20;
/// The most layers that a profile names.
pub const MAX_LAYERS: usize = 1024;
/// The most reads in a profile; a start that reads more is cut after them.
pub const MAX_READS: usize = 1 << 17;
/// The most recordings that one profile stands for.
pub const MAX_STARTS: u32 = 1_000_000;

/// What one or several starts of an image read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    starts: u32,
    layers: Vec<Digest>,
    reads: Vec<Read>,
}

/// A part of a file that was read; of a recording, one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Position in [`Profile::layers`].
    pub layer: usize,
    /// The file, as bytes relative to the layer's root: neither empty nor
    /// absolute, without `.`, `..` and empty components.
    pub path: Arc<[u8]>,
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// Bytes, at least one.
    pub len: u64,
    /// When it was first needed, from the image's first mount on. Whole
    /// milliseconds.
    pub at: Duration,
    /// In how many of the profile's starts it was read, at least one.
    pub starts: u32,
    /// Where in the layer's blob that was, if it is known: enough to ask for it
    /// before the layer's TOC is there.
    pub unit: Option<Unit>,
}

/// Why something is no profile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// Too long to be looked at.
    #[error("the profile has {0} bytes; at most {MAX_BYTES} are read")]
    TooLarge(usize),
    /// It cannot be decompressed.
    #[error("the profile cannot be decompressed: {0}")]
    Compression(String),
    /// Not the JSON that it should be.
    #[error("this is no profile: {0}")]
    Json(String),
    /// A later version of the format.
    #[error("the profile has version {0}; only version 1 is known: use a newer sluice")]
    Version(u64),
    /// More of something than there may be.
    #[error("the profile has more than {limit} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// The number of starts is none, or beyond [`MAX_STARTS`].
    #[error("the profile stands for {0} starts; it has to be 1 to {MAX_STARTS}")]
    Starts(u32),
    /// A layer is listed twice.
    #[error("the profile names layer {0} twice")]
    SameLayer(Digest),
    /// A path that no layer can hold.
    #[error("path '{path}' of the profile: {reason}")]
    Path {
        /// Made printable and cut.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A read that cannot be.
    #[error("read {index} of the profile {reason}")]
    Read {
        /// Position, from 0.
        index: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Recordings of different images cannot become one.
    #[error(
        "the profiles are not of one image: the layers of number {0} differ from those of the first"
    )]
    OtherImage(usize),
    /// A merge of nothing.
    #[error("there is no profile to merge")]
    Nothing,
}

impl Profile {
    /// A profile of `starts` starts. The reads are put in the order of their
    /// first need; of several of the same range, the first counts.
    pub fn new(
        starts: u32,
        layers: Vec<Digest>,
        mut reads: Vec<Read>,
    ) -> Result<Self, ProfileError> {
        if !(1..=MAX_STARTS).contains(&starts) {
            return Err(ProfileError::Starts(starts));
        }
        let too_many = |what, limit| ProfileError::TooMany { what, limit };
        if layers.len() > MAX_LAYERS {
            return Err(too_many("layers", MAX_LAYERS));
        }
        if reads.len() > MAX_READS {
            return Err(too_many("reads", MAX_READS));
        }
        let mut seen = HashSet::new();
        if let Some(twice) = layers.iter().find(|layer| !seen.insert(**layer)) {
            return Err(ProfileError::SameLayer(*twice));
        }
        for (index, read) in reads.iter_mut().enumerate() {
            let wrong = |reason| Err(ProfileError::Read { index, reason });
            if read.layer >= layers.len() {
                return wrong("is of a layer that it does not name");
            }
            let end = read.offset.checked_add(read.len);
            if read.len == 0 || end.is_none_or(|end| end > i64::MAX as u64) {
                return wrong("is of no range that a file can have");
            }
            if !(1..=starts).contains(&read.starts) {
                return wrong("was seen in no start, or in more than there were");
            }
            let unit_end = read.unit.map(|unit| unit.offset.checked_add(unit.size));
            if unit_end.is_some_and(|end| end.is_none_or(|end| end > i64::MAX as u64)) {
                return wrong("is in no range that a blob can have");
            }
            if read.at.as_millis() > u128::from(u32::MAX) {
                return wrong("was first needed after more than 49 days");
            }
            read.at = Duration::from_millis(read.at.as_millis() as u64);
            let cleaned = clean(&read.path)?;
            if *cleaned != *read.path {
                read.path = cleaned;
            }
        }
        reads.sort_by_key(|read| read.at);
        let mut seen = HashSet::new();
        reads.retain(|read| seen.insert((read.layer, Arc::clone(&read.path), read.offset)));
        Ok(Self {
            starts,
            layers,
            reads,
        })
    }

    /// Parses a document, whoever wrote it.
    pub fn parse(document: &[u8]) -> Result<Self, ProfileError> {
        json::parse(document)
    }

    /// The document: one line of JSON.
    pub fn to_json(&self) -> String {
        json::write(self)
    }

    /// Makes one profile of several recordings of one image. What was read in
    /// fewer than a third of all starts is left out; the rest is in the order
    /// of the median of its first needs.
    pub fn merge(profiles: &[Self]) -> Result<Self, ProfileError> {
        merge::merge(profiles)
    }

    /// How many starts it is made of, at least 1.
    pub fn starts(&self) -> u32 {
        self.starts
    }

    /// The layers' blobs, lowest first. No digest is there twice.
    pub fn layers(&self) -> &[Digest] {
        &self.layers
    }

    /// What was read, in the order of first need.
    pub fn reads(&self) -> &[Read] {
        &self.reads
    }

    /// What was read of one layer, in the order of first need.
    pub fn reads_of(&self, layer: Digest) -> impl Iterator<Item = &Read> {
        let index = self.layers.iter().position(|known| *known == layer);
        self.reads
            .iter()
            .filter(move |read| Some(read.layer) == index)
    }

    /// The files that were read, each once, in the order of first need,
    /// whatever their layers.
    pub fn files(&self) -> Vec<Arc<[u8]>> {
        let mut seen = HashSet::new();
        self.reads
            .iter()
            .filter(|read| seen.insert(&read.path))
            .map(|read| Arc::clone(&read.path))
            .collect()
    }

    /// Bytes that were read, uncompressed.
    pub fn bytes(&self) -> u64 {
        self.reads
            .iter()
            .fold(0, |sum, r| sum.saturating_add(r.len))
    }
}

/// The path as a layer's tree names it.
fn clean(path: &[u8]) -> Result<Arc<[u8]>, ProfileError> {
    let refuse = |reason: String| ProfileError::Path {
        path: String::from_utf8_lossy(path)
            .escape_debug()
            .take(100)
            .collect(),
        reason,
    };
    match names::clean(path) {
        Ok(clean) if clean.is_empty() => Err(refuse("it names no file".to_owned())),
        Ok(clean) => Ok(clean.into()),
        Err(error) => Err(refuse(error.to_string())),
    }
}
