//! Files that are likely to be read because one like them is: of the same kind
//! in the same directory, or of the same name in others. A program that loads
//! one library or module of a package loads most of them, and one that looks
//! for `__init__.pyc` or `package.json` in one place does so in the next. Where
//! a miss is dear, whatever lies behind it as well.

use crate::layer_dir::{ChunkId, ChunkTable, Kin};

/// Chunks that are searched in either direction.
const REACH: usize = 8192;
/// Namesakes: how many files are looked at, how large one may be and all of
/// them together, compressed.
const NAMESAKES: usize = 32;
const NAMESAKE: u64 = 16 << 10;
const ALL_NAMESAKES: u64 = 64 << 10;
/// What is on its way is added to by at least so many compressed bytes, and by
/// such a part of what may be: less is not worth a request, and more comes too
/// late for what is read next.
const WORTH: (u64, u64) = (64 << 10, 16);

/// How far a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Neither here nor on its way.
    Missing,
    /// Here or on its way, but nobody has read it.
    Unread,
    /// Somebody has read it.
    Read,
}

/// How much may be fetched: what is there and unread counts as well, so that a
/// guess that does not come true is not repeated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowance {
    /// Compressed bytes of files of the same kind.
    pub(super) family: u64,
    /// Whether a file of the same name has been read before.
    pub(super) namesakes: bool,
    /// Compressed bytes of whatever lies behind in the blob.
    pub(super) onwards: u64,
    /// Uncompressed bytes of all.
    pub(super) credit: u64,
    /// A file up to this size, uncompressed, is taken whole.
    pub(super) small: u64,
}

/// What to fetch because the file that begins with `first` is read.
pub(super) fn relatives(
    table: &ChunkTable,
    first: ChunkId,
    allowance: Allowance,
    state: impl Fn(ChunkId) -> State,
) -> Vec<ChunkId> {
    let Some(kin) = table.kin(first) else {
        return Vec::new();
    };
    let end = *table.file_of(first).end();
    let after = || table.after(end).take(REACH);
    let near = after().chain(table.before(first).take(REACH));
    let family = near.filter(|&chunk| {
        kin.family > 0 && table.kin(chunk).is_some_and(|k| k.family == kin.family)
    });
    let named = |chunk: &ChunkId| {
        kin.name > 0
            && table
                .kin(*chunk)
                .is_some_and(|k| k.name == kin.name && k.family != kin.family)
    };
    let mut choice = Choice {
        table,
        state,
        credit: allowance.credit,
        small: allowance.small,
        chosen: Vec::new(),
    };
    choice.add(family, allowance.family, u64::MAX);
    if allowance.namesakes {
        let namesakes = after().filter(named).take(NAMESAKES);
        choice.add(namesakes, ALL_NAMESAKES, NAMESAKE);
    }
    if allowance.onwards > 0 {
        let others = |k: Kin| kin.family == 0 || k.family != kin.family;
        let files = after().filter(|&chunk| table.kin(chunk).is_some_and(others));
        choice.add(files, allowance.onwards, u64::MAX);
    }
    choice.chosen
}

struct Choice<'t, S> {
    table: &'t ChunkTable,
    state: S,
    credit: u64,
    small: u64,
    chosen: Vec<ChunkId>,
}

impl<S: Fn(ChunkId) -> State> Choice<'_, S> {
    /// Adds files up to so many compressed bytes, those left out that are
    /// larger than `largest`. While something of them is unread, only if it is
    /// worth a request.
    fn add(&mut self, files: impl Iterator<Item = ChunkId>, budget: u64, largest: u64) {
        let worth = WORTH.0.max(budget / WORTH.1);
        let (mut left, mut unread, mut new) = (budget, false, 0);
        let mut chosen = Vec::new();
        for first in files {
            if (self.state)(first) == State::Read {
                continue;
            }
            let end = *self.table.file_of(first).end();
            let size = self.table.get(end).data_end() - self.table.get(first).data_offset;
            // Of a large file its beginning, which tells what it is.
            let last = if size <= self.small { end } else { first };
            let chunks = std::iter::once(first).chain(self.table.after(first));
            let (mut cost, mut risk, mut unit) = (0, 0, None);
            let mut missing = Vec::new();
            for chunk in chunks.take_while(|&chunk| chunk <= last) {
                let record = self.table.get(chunk);
                if unit.replace(record.unit) != Some(record.unit) {
                    cost += record.unit.size;
                }
                if (self.state)(chunk) == State::Missing {
                    risk += u64::from(record.size);
                    missing.push(chunk);
                }
            }
            if cost > largest {
                continue;
            }
            if cost > left || risk > self.credit {
                break;
            }
            left -= cost;
            match missing.is_empty() {
                true => unread = true,
                false => new += cost,
            }
            self.credit -= risk;
            chosen.append(&mut missing);
        }
        if new >= worth || !unread {
            self.chosen.append(&mut chosen);
        }
    }
}
