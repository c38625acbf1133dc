//! Bounds on the memory that a TOC takes while it is read.

use std::io::{self, Read};

use super::error::EntryError;

/// Adds up what is held. A short TOC can make much of itself: an entry with a
/// long path makes two thousand directories.
#[derive(Debug)]
pub(super) struct Meter {
    used: u64,
    limit: u64,
}

impl Meter {
    /// Of `limit` bytes, `taken` are in use already.
    pub(super) fn new(limit: u64, taken: u64) -> Self {
        Self { used: taken, limit }
    }

    /// Counts `bytes` that live as long as the tree.
    pub(super) fn take(&mut self, bytes: usize) -> Result<(), EntryError> {
        self.used = self.used.saturating_add(bytes as u64);
        if self.used > self.limit {
            return Err(EntryError::TooMuchMemory { limit: self.limit });
        }
        Ok(())
    }
}

/// What the allocator takes for a block of `bytes`.
pub(super) const fn block(bytes: usize) -> usize {
    match bytes {
        0 => 0,
        1..=24 => 32,
        _ => (bytes + 8).next_multiple_of(16),
    }
}

/// Longest text in the JSON of a TOC, names and values of extended attributes
/// included.
const MOST_TEXT: usize = 1 << 20;
/// How deep lists and objects may lie in each other. A TOC has four levels.
const MOST_DEPTH: usize = 64;

/// JSON on its way to the parser, which holds each text in memory as a whole
/// and a byte for every open bracket. The JSON ends in an error where that
/// becomes too much.
pub(super) struct BoundedJson<R> {
    inner: R,
    in_text: bool,
    escaped: bool,
    text: usize,
    depth: usize,
}

impl<R: Read> BoundedJson<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            in_text: false,
            escaped: false,
            text: 0,
            depth: 0,
        }
    }

    fn look_at(&mut self, byte: u8) -> Result<(), &'static str> {
        if !self.in_text {
            match byte {
                b'"' => {
                    self.in_text = true;
                    self.text = 0;
                }
                b'[' | b'{' => self.depth += 1,
                b']' | b'}' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            return match self.depth {
                ..=MOST_DEPTH => Ok(()),
                _ => Err("it is nested too deeply"),
            };
        }
        self.text += 1;
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = true,
            b'"' => self.in_text = false,
            _ => {}
        }
        match self.text {
            ..=MOST_TEXT => Ok(()),
            _ => Err("it holds a text of more than a mebibyte"),
        }
    }
}

impl<R: Read> Read for BoundedJson<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        for byte in &buffer[..count] {
            self.look_at(*byte).map_err(io::Error::other)?;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<String, String> {
        // Three bytes at a time: nothing depends on where a piece ends.
        let mut bounded = BoundedJson::new(json.as_bytes());
        let mut text = Vec::new();
        let mut piece = [0; 3];
        loop {
            match bounded
                .read(&mut piece)
                .map_err(|error| error.to_string())?
            {
                0 => return Ok(String::from_utf8(text).unwrap()),
                count => text.extend_from_slice(&piece[..count]),
            }
        }
    }

    #[test]
    fn json_is_passed_on_as_it_is() {
        let json = r#"{"a\"[[":[{"b\\":"}"},[]],"c":1e9}"#;
        assert_eq!(read(json).unwrap(), json);
        let brackets = format!("\"{}\"", "[".repeat(1000));
        assert_eq!(read(&brackets).unwrap(), brackets);
    }

    #[test]
    fn what_a_parser_would_hold_as_a_whole_is_bounded() {
        let text = |size| format!("[\"{}\"]", "x".repeat(size));
        assert!(read(&text(MOST_TEXT - 1)).is_ok());
        assert!(read(&text(MOST_TEXT)).unwrap_err().contains("mebibyte"));
        let nested = |depth| "[".repeat(depth);
        assert!(read(&nested(MOST_DEPTH)).is_ok());
        assert!(read(&nested(MOST_DEPTH + 1)).unwrap_err().contains("deep"));
    }

    #[test]
    fn memory_is_taken_up_to_the_limit_and_no_further() {
        let mut meter = Meter::new(100, 40);
        assert_eq!(meter.take(60), Ok(()));
        let refused = Err(EntryError::TooMuchMemory { limit: 100 });
        assert_eq!(meter.take(1), refused);
        assert_eq!(meter.take(usize::MAX), refused);
    }
}
