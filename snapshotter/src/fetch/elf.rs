//! What of an ELF program or library is read as soon as it is loaded: the
//! loader goes through tables, relocates data, and runs initializers. Only
//! then is code read here and there.

use std::ops::{Range, RangeInclusive};

/// The beginning, where tables are followed by the first code.
const HEAD: u64 = 512 << 10;
/// Constant data up to this size is read whole, of more the end.
const CONSTANTS: u64 = 256 << 10;
const CONSTANTS_END: u64 = 128 << 10;
/// More segments than linkers make.
const SEGMENTS: usize = 64;
/// Texts of one part of a file, and how long one is. Bytes.
const TEXTS: usize = 256;
const TEXT: RangeInclusive<usize> = 4..=200;

/// How the files begin that are looked into: 64-bit, little-endian.
pub const ELF_64_LITTLE: &[u8] = b"\x7fELF\x02\x01";
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const EXECUTABLE: u32 = 1;
const WRITABLE: u32 = 2;

/// A program header of a 64-bit little-endian file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its type, of the constants `PT_*`.
    pub kind: u32,
    /// The bits `PF_*`.
    pub flags: u32,
    /// Where it begins in the file.
    pub offset: u64,
    /// Where it is in memory.
    pub address: u64,
    /// Bytes that it has in the file.
    pub size: u64,
}

impl Segment {
    /// The type of what is mapped from the file, `PT_LOAD`.
    pub const LOAD: u32 = 1;
}

/// The segments of a file that begins with `head`, as far as it tells them:
/// none if it is no ELF file. Nothing of it is checked.
pub fn segments(head: &[u8]) -> Vec<Segment> {
    if !head.starts_with(ELF_64_LITTLE) || head.len() < HEADER {
        return Vec::new();
    }
    let number = |at: usize, len: usize| {
        let bytes = head[at..at + len].iter().rev();
        bytes.fold(0u64, |number, &byte| number << 8 | u64::from(byte))
    };
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let table = usize::try_from(table).unwrap_or(usize::MAX);
    if size != PROGRAM_HEADER as u64 {
        return Vec::new();
    }
    (0..(count as usize).min(SEGMENTS))
        .map(|index| table.saturating_add(index * PROGRAM_HEADER))
        .take_while(|at| at.saturating_add(PROGRAM_HEADER) <= head.len())
        .map(|at| Segment {
            kind: number(at, 4) as u32,
            flags: number(at + 4, 4) as u32,
            offset: number(at + 8, 8),
            address: number(at + 16, 8),
            size: number(at + 32, 8),
        })
        .collect()
}

/// Ranges of a file that begins with `head`, if it is one: empty otherwise. A
/// hint, from whatever the file says.
pub(super) fn loaded_first(head: &[u8]) -> Vec<Range<u64>> {
    let segments = segments(head);
    if segments.is_empty() {
        return Vec::new();
    }
    let beginning = 0..HEAD;
    let mut ranges = vec![beginning];
    let mut constants = 0;
    for segment in segments {
        let Segment { kind, flags, .. } = segment;
        let (offset, end) = (segment.offset, segment.offset.saturating_add(segment.size));
        if kind != Segment::LOAD || (flags & EXECUTABLE != 0 && flags & WRITABLE == 0) {
            continue;
        }
        // The tables come first, and are read whole.
        constants += u32::from(flags & WRITABLE == 0);
        let whole = flags & WRITABLE != 0 || constants == 1 || segment.size <= CONSTANTS;
        ranges.push(match whole {
            true => offset..end,
            false => end.saturating_sub(CONSTANTS_END)..end,
        });
    }
    ranges
}

/// Texts in a part of a file that may name other files: absolute paths, and
/// names with dots in them. What a part begins or ends with may be cut, and is
/// left out.
pub(super) fn texts(part: &[u8]) -> Vec<Vec<u8>> {
    let whole = part.split(|&byte| byte == 0).skip(1);
    let mut texts: Vec<Vec<u8>> = Vec::new();
    let mut before: Option<&[u8]> = None;
    for text in whole {
        // The last one is not followed by a NUL.
        if let Some(text) = before.replace(text).filter(|text| may_name(text)) {
            texts.push(text.to_vec());
        }
        if texts.len() == TEXTS {
            break;
        }
    }
    texts
}

fn may_name(text: &[u8]) -> bool {
    if !TEXT.contains(&text.len()) {
        return false;
    }
    if text[0] == b'/' {
        return text.iter().all(u8::is_ascii_graphic) && !text.ends_with(b"/");
    }
    let is_name = |name: &[u8]| {
        let begins = name
            .first()
            .is_some_and(|&b| b.is_ascii_alphabetic() || b == b'_');
        begins && name.iter().all(|&b| b.is_ascii_alphanumeric() || b == b'_')
    };
    text.contains(&b'.') && text.split(|&byte| byte == b'.').all(is_name)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The head of a library with these segments: flags, offset, size.
    pub(in crate::fetch) fn library(segments: &[(u32, u64, u64)]) -> Vec<u8> {
        let mut head = vec![0; HEADER];
        head[..6].copy_from_slice(ELF_64_LITTLE);
        head[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        head[54..56].copy_from_slice(&(PROGRAM_HEADER as u16).to_le_bytes());
        head[56..58].copy_from_slice(&(segments.len() as u16).to_le_bytes());
        for &(flags, offset, size) in segments {
            let mut header = [0; PROGRAM_HEADER];
            header[0..4].copy_from_slice(&Segment::LOAD.to_le_bytes());
            header[4..8].copy_from_slice(&flags.to_le_bytes());
            header[8..16].copy_from_slice(&offset.to_le_bytes());
            header[32..40].copy_from_slice(&size.to_le_bytes());
            head.extend(header);
        }
        head
    }

    #[test]
    fn tables_and_data_are_loaded_and_code_is_not() {
        let (read, code, write) = (4, 5, 6);
        let head = library(&[
            (read, 0, 800_000),
            (code, 800_000, 9_000_000),
            (read, 9_800_000, 1_000_000),
            (read, 10_800_000, 1000),
            (write, 11_000_000, 700_000),
        ]);
        assert_eq!(
            loaded_first(&head),
            [
                0..HEAD,
                0..800_000,
                10_800_000 - CONSTANTS_END..10_800_000,
                10_800_000..10_801_000,
                11_000_000..11_700_000,
            ]
        );
        // Cut in the middle of the table: what is there counts.
        assert_eq!(loaded_first(&head[..HEADER + 60]), [0..HEAD, 0..800_000]);
        assert!(loaded_first(b"#!/bin/sh\n").is_empty());
        assert!(loaded_first(&head[..40]).is_empty());
    }

    #[test]
    fn texts_are_paths_and_dotted_names_between_zeros() {
        let found = |part: &[u8]| -> Vec<String> {
            let text = |text: Vec<u8>| String::from_utf8(text).unwrap();
            texts(part).into_iter().map(text).collect()
        };
        let part = b"/etc/cut\0/etc/one\0\0/etc/two words\0/etc/\0/et\0a.b.c_1\0a..b\0\
            a.1\0name\0.a.b\0/usr/lib/\xff\0%s.txt\0/etc/end";
        assert_eq!(found(part), ["/etc/one", "a.b.c_1"]);
        assert!(found(b"/etc/one").is_empty());
        let long = [&b"\0/"[..], &[b'a'; 200], b"\0"].concat();
        assert!(found(&long).is_empty());
        let many = [&b"\0"[..], &b"/etc/one\0".repeat(TEXTS * 2)].concat();
        assert_eq!(found(&many).len(), TEXTS);
    }

    proptest! {
        #[test]
        fn any_bytes_may_hold_texts(part in prop::collection::vec(any::<u8>(), 0..500)) {
            for text in texts(&part) {
                prop_assert!(TEXT.contains(&text.len()));
            }
        }

        #[test]
        fn whatever_the_file_says(
            segments in prop::collection::vec((any::<u32>(), any::<u64>(), any::<u64>()), 0..80),
            table in any::<u64>(),
        ) {
            let mut head = library(&segments);
            prop_assert!(loaded_first(&head).len() <= SEGMENTS + 1);
            head[32..40].copy_from_slice(&table.to_le_bytes());
            loaded_first(&head);
        }
    }
}
