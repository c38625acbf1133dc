//! What a program reads when it starts, of files that come first in a layer
//! for its sake: chunks of them, said in one annotation.

use std::collections::HashMap;
use std::ops::Range;

use base64::prelude::{BASE64_STANDARD, Engine as _};

use crate::Profile;

/// containerd takes labels up to 4,096 bytes, the key included.
const LONGEST: usize = 4000;
/// A range is no longer, so that several can be on their way.
const LONGEST_RANGE: u64 = 256 << 10;
/// So many bytes are said to be read first: what may be asked for before the TOC
/// is here, over any link.
const FIRST: u64 = 8 << 20;

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

/// Where in the blob the chunks before a landmark lie that are read first, in
/// the order of the blob. A hint: whoever wrote the manifest says so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartRanges(Vec<Range<u64>>);

impl StartRanges {
    /// Of chunks that lie there, in the order of the blob.
    pub(crate) fn of(chunks: impl IntoIterator<Item = Range<u64>>) -> Self {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut first = 0;
        for chunk in chunks {
            first += chunk.end - chunk.start;
            if first > FIRST {
                break;
            }
            match ranges.last_mut() {
                Some(last)
                    if last.end == chunk.start && chunk.end - last.start <= LONGEST_RANGE =>
                {
                    last.end = chunk.end;
                }
                _ => ranges.push(chunk),
            }
        }
        Self(ranges)
    }

    /// From the annotation's value; none if it is none.
    pub(crate) fn parse(value: &str) -> Option<Self> {
        if value.len() > LONGEST {
            return None;
        }
        let mut before = 0;
        let range = |text: &str| {
            let (start, end) = text.split_once('-')?;
            let number = |digits: &str| {
                let all = digits.bytes().all(|byte| byte.is_ascii_digit());
                digits.parse().ok().filter(|_| all)
            };
            let range: Range<u64> = number(start)?..number(end)?;
            let follows = before <= range.start && range.start < range.end;
            before = range.end;
            follows.then_some(range)
        };
        value.split(',').map(range).collect::<Option<_>>().map(Self)
    }

    /// The annotation's value, of as many as containerd would take; none where
    /// nothing is read.
    pub(crate) fn annotation(&self) -> Option<String> {
        let mut value = String::new();
        for Range { start, end } in &self.0 {
            let comma = if value.is_empty() { "" } else { "," };
            let range = format!("{comma}{start}-{end}");
            if value.len() + range.len() > LONGEST {
                break;
            }
            value.push_str(&range);
        }
        (!value.is_empty()).then_some(value)
    }

    /// They do not overlap, and none is empty.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + use<'_> {
        self.0.iter().cloned()
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

    #[test]
    fn what_adjoins_is_one_range_up_to_a_bound() {
        let ranges = |chunks: &[Range<u64>]| StartRanges::of(chunks.to_vec()).annotation();
        assert_eq!(ranges(&[]), None);
        let adjoining = [10..20, 20..50, 51..60, 100..100 + LONGEST_RANGE];
        assert_eq!(
            ranges(&adjoining).unwrap(),
            format!("10-50,51-60,100-{}", 100 + LONGEST_RANGE)
        );
        let half = LONGEST_RANGE / 2 + 1;
        let long = ranges(&[0..half, half..2 * half]).unwrap();
        assert_eq!(long, format!("0-{half},{half}-{}", 2 * half));
        assert_eq!(
            ranges(&[0..FIRST, FIRST..FIRST + 1]).unwrap(),
            format!("0-{FIRST}")
        );
        let many: Vec<_> = (0..5000).map(|at| at * 10..at * 10 + 5).collect();
        assert!(ranges(&many).unwrap().len() <= LONGEST);
    }

    #[test]
    fn ranges_that_cannot_be_are_none() {
        for value in [
            "", "1", "1-", "-2", "2-2", "3-2", "1-5,4-6", "1-2,", "+1-2", "1-2-3",
        ] {
            assert_eq!(StartRanges::parse(value), None, "{value}");
        }
        assert_eq!(StartRanges::parse(&format!("0-{}", "9".repeat(30))), None);
    }

    proptest! {
        #[test]
        fn ranges_come_back_from_their_annotation(lengths in prop::collection::vec((0..99u64, 1..99u64), 1..200)) {
            let mut at = 0;
            let chunks = lengths.iter().map(|(gap, len)| {
                let start = at + gap;
                at = start + len;
                start..at
            });
            let ranges = StartRanges::of(chunks);
            let parsed = StartRanges::parse(&ranges.annotation().unwrap());
            prop_assert_eq!(parsed, Some(ranges));
        }

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
