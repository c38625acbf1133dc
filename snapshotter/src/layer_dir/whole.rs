//! Whether a mapped file still has its end.

use std::hint::black_box;

/// The last byte of a file that is not 0, as it was when the file was mapped.
///
/// Of a file that another program cuts short, whole pages are gone, and who
/// looks at them is killed (SIGBUS). But the rest of the last page that is left
/// reads as zeros, which would pass for something else. Whatever such a cut
/// makes of the file, if it changes it at all, it takes this byte away.
#[derive(Debug, Clone, Copy)]
pub struct LastByte {
    at: usize,
    value: u8,
}

impl LastByte {
    /// That of `bytes`; a file of zeros has none, and nothing to lose.
    pub fn of(bytes: &[u8]) -> Self {
        let at = bytes.iter().rposition(|byte| *byte != 0);
        let at = at.unwrap_or_default();
        Self {
            at,
            value: bytes.get(at).copied().unwrap_or_default(),
        }
    }

    /// Whether it is there, in the same file.
    pub fn is_in(self, bytes: &[u8]) -> bool {
        // Somebody else changes what Rust takes for constant.
        black_box(bytes).get(self.at).copied().unwrap_or_default() == self.value
    }
}

/// Ends the process, as the loss of a whole page does: nothing that was looked
/// up since is to be relied on, and the next process mends the file while its
/// readers wait.
pub fn end_for_want_of(what: &dyn std::fmt::Display) -> ! {
    tracing::error!(
        "{what} was cut short by another program; this process ends, for the next one to mend it"
    );
    std::process::abort();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_that_changes_anything_is_seen() {
        for file in [&b"abc\0de\0\0\0"[..], b"a\0\0", b"abc", b"\0\0", b""] {
            let last = LastByte::of(file);
            assert!(last.is_in(file));
            for left in 0..file.len() {
                let mut cut = file.to_vec();
                cut[left..].fill(0);
                assert_eq!(last.is_in(&cut), cut == file, "{file:?} to {left}");
            }
        }
    }
}
