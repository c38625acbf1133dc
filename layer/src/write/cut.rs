//! Where content-defined chunks end.

use fastcdc::v2020::{AVERAGE_MIN, FastCDC};

use super::Chunking;

/// Cuts one file after the other into chunks of `average` bytes on average.
#[derive(Debug)]
pub(super) struct Cutter {
    average: usize,
    /// What has come of the current file and is in no chunk yet.
    pending: Vec<u8>,
}

impl Cutter {
    pub(super) fn new(average: u64) -> Self {
        let average = average.clamp(AVERAGE_MIN as u64, Chunking::LARGEST_AVERAGE);
        Self {
            average: usize::try_from(average).unwrap_or(AVERAGE_MIN),
            pending: Vec::new(),
        }
    }

    fn largest(&self) -> usize {
        self.average * 4
    }

    /// Takes content of the file and hands out its chunks as soon as they are
    /// certain, whatever the pieces in which the content comes. `last` says
    /// that the file ends with it.
    pub(super) fn push(&mut self, bytes: &[u8], last: bool, mut chunk: impl FnMut(&[u8])) {
        let (least, largest) = (self.average / 4, self.largest());
        self.pending.extend_from_slice(bytes);
        let mut start = 0;
        // A place to cut is certain when all that may belong to the chunk is
        // here.
        while let rest = &self.pending[start..]
            && (rest.len() >= largest || last && !rest.is_empty())
        {
            let cutter = FastCDC::new(rest, least, self.average, largest);
            let (_, end) = cutter.cut(0, rest.len());
            chunk(&rest[..end]);
            start += end;
        }
        self.pending.drain(..start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AVERAGE: usize = 4 << 10;

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1u64;
        (0..len)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 32) as u8
            })
            .collect()
    }

    fn chunks(content: &[u8], piece: usize) -> Vec<Vec<u8>> {
        let mut cutter = Cutter::new(AVERAGE as u64);
        let mut chunks = Vec::new();
        let mut left = content.len();
        for bytes in content.chunks(piece) {
            left -= bytes.len();
            cutter.push(bytes, left == 0, |chunk| chunks.push(chunk.to_vec()));
        }
        assert!(cutter.pending.is_empty());
        chunks
    }

    #[test]
    fn the_pieces_do_not_matter() {
        let content = noise(200_000);
        let whole = chunks(&content, content.len());
        assert_eq!(whole.concat(), content);
        for piece in [1_000, 4_096, 70_001] {
            assert_eq!(chunks(&content, piece), whole);
        }
        let last = whole.len() - 1;
        for (at, chunk) in whole.iter().enumerate() {
            assert!(chunk.len() <= AVERAGE * 4);
            assert!(chunk.len() >= AVERAGE / 4 || at == last);
        }
        let mean = content.len() / whole.len();
        assert!((AVERAGE / 2..AVERAGE * 2).contains(&mean), "{mean}");
    }

    #[test]
    fn an_insertion_changes_the_chunks_around_it() {
        let before = noise(400_000);
        let mut after = before.clone();
        after.splice(200_000..200_000, b"inserted".iter().copied());
        let (before, after) = (chunks(&before, 10_000), chunks(&after, 10_000));
        let new = after.iter().filter(|chunk| !before.contains(chunk));
        assert!((1..=3).contains(&new.count()));
    }

    /// Other places would make every image that is converted anew share
    /// nothing with what nodes have of the former one.
    #[test]
    fn the_places_stay_where_they_are() {
        let sizes: Vec<usize> = chunks(&noise(40_000), 999).iter().map(Vec::len).collect();
        assert_eq!(
            sizes,
            [
                6_354, 4_615, 6_531, 5_148, 2_098, 6_793, 4_372, 2_963, 1_126
            ]
        );
    }

    #[test]
    fn content_without_places_to_cut_is_cut_at_the_largest_size() {
        let sizes: Vec<usize> = chunks(&[0; 40_000], 999).iter().map(Vec::len).collect();
        assert_eq!(sizes, [16_384, 16_384, 7_232]);
    }
}
