//! What a program reads when it starts, of files that come first in a layer
//! for its sake: chunks of them, said in one annotation.

use std::collections::HashMap;
use std::ops::Range;

use base64::prelude::{BASE64_STANDARD, Engine as _};

use crate::Profile;

/// containerd takes labels up to 4,096 bytes, the key included.
const LONGEST: usize = 4000;

/// Parts of files, by their names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartReads(HashMap<String, Vec<Range<u64>>>);

impl StartReads {
    /// What a profile tells, of all its layers.
    pub fn of(profile: &Profile) -> Self {
        let mut files: HashMap<String, Vec<Range<u64>>> = HashMap::new();
        for read in profile.reads() {
            let name = String::from_utf8_lossy(&read.path).into_owned();
            let range = read.offset..read.offset.saturating_add(read.len);
            files.entry(name).or_default().push(range);
        }
        Self(files)
    }

    /// Whether any byte of that part of a file is read. Of a file that is not
    /// named everything is: it is there because of one that is.
    pub(crate) fn reads(&self, name: &str, part: &Range<u64>) -> bool {
        let overlaps = |read: &Range<u64>| read.start < part.end && part.start < read.end;
        self.0
            .get(name)
            .is_none_or(|reads| reads.iter().any(overlaps))
    }
}

/// Which chunks before a landmark are read, in the order of the blob. A hint:
/// whoever wrote the manifest says so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartChunks(Vec<u8>);

impl StartChunks {
    /// From the annotation's value; none if it is none.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        let bits = BASE64_STANDARD.decode(value).ok()?;
        (value.len() <= LONGEST).then_some(Self(bits))
    }

    /// The annotation's value; none where containerd would not take it.
    pub(crate) fn annotation(&self) -> Option<String> {
        let value = BASE64_STANDARD.encode(&self.0);
        (value.len() <= LONGEST).then_some(value)
    }

    /// Whether the chunk at that position is read.
    pub fn contains(&self, position: usize) -> bool {
        let byte = self.0.get(position / 8).copied().unwrap_or_default();
        byte >> (position % 8) & 1 == 1
    }
}

impl FromIterator<bool> for StartChunks {
    fn from_iter<I: IntoIterator<Item = bool>>(chunks: I) -> Self {
        let mut bits = Vec::new();
        for (position, read) in chunks.into_iter().enumerate() {
            if position % 8 == 0 {
                bits.push(0);
            }
            if let Some(last) = bits.last_mut() {
                *last |= u8::from(read) << (position % 8);
            }
        }
        Self(bits)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_part_is_read_where_a_read_touches_it() {
        let reads = StartReads([("a/b".to_owned(), vec![10..20, 30..31])].into());
        assert!(reads.reads("a/b", &(0..11)) && reads.reads("a/b", &(19..25)));
        assert!(!reads.reads("a/b", &(0..10)) && !reads.reads("a/b", &(20..30)));
        assert!(reads.reads("a/b", &(30..40)));
        assert!(reads.reads("other", &(0..1)));
    }

    #[test]
    fn what_is_no_such_value_is_none() {
        assert_eq!(StartChunks::parse("no base64!"), None);
        assert_eq!(StartChunks::parse(&"A".repeat(LONGEST + 4)), None);
        let many: StartChunks = (0..LONGEST * 8).map(|_| true).collect();
        assert_eq!(many.annotation(), None);
    }

    proptest! {
        #[test]
        fn chunks_come_back_from_their_annotation(chunks in prop::collection::vec(any::<bool>(), 0..2000)) {
            let set: StartChunks = chunks.iter().copied().collect();
            let value = set.annotation().unwrap();
            let parsed = StartChunks::parse(&value).unwrap();
            for (position, read) in chunks.iter().enumerate() {
                prop_assert_eq!(parsed.contains(position), *read);
            }
            prop_assert!(!parsed.contains(chunks.len() + 8));
        }
    }
}
