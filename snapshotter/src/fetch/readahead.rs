//! Guessing what of a file will be read next from what was read last: the rest
//! of a small one, more of one that is read on and on, more around the places
//! of one that is read here and there.

use std::ops::RangeInclusive;

use parking_lot::Mutex;

use crate::layer_dir::{ChunkId, ChunkTable};

/// Files of one layer whose readers are followed at once.
const FILES: usize = 16;
/// Two reads so near to each other, uncompressed, are one after the other: the
/// kernel asks for several pieces at once, in any order.
const NEAR: u64 = 256 << 10;
/// So many steps from one read to the next make a sequence: a program that
/// jumps about makes one by chance.
const SEQUENCE: u32 = 2;
/// Chunks looked at for one guess.
const STEPS: usize = 4096;
/// Of what may be guessed around a read: how much behind one place of a file
/// that is read here and there, and how much before it. Code is read in pieces
/// of which the next is rarely the neighbour.
const BEHIND: u64 = 4;
const BEFORE: u64 = 16;

/// How much may be guessed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    /// Compressed bytes around one read.
    pub(super) around: u64,
    /// Compressed bytes of whatever lies behind a file in the blob.
    pub(super) onwards: u64,
    /// The largest window of a sequential reader, in compressed bytes.
    pub(super) sequential: u64,
    /// The shortest piece by which such a window is moved on.
    pub(super) piece: u64,
    /// Uncompressed bytes that may turn out wrong.
    pub(super) credit: u64,
    /// A file up to this size, uncompressed, is taken whole.
    pub(super) small: u64,
}

/// What to fetch beside what was asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Guess {
    /// What lies behind it in the blob, and so can share its request.
    pub(super) ahead: Vec<ChunkId>,
    /// What lies before it.
    pub(super) before: Vec<ChunkId>,
}

/// Follows the readers of one layer.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    /// The one that was read last is last.
    files: Mutex<Vec<Followed>>,
}

/// A file that is being read.
#[derive(Debug, Clone)]
struct Followed {
    chunks: RangeInclusive<ChunkId>,
    /// Where its reader is.
    reader: ChunkId,
    /// The last chunk that was fetched for it.
    end: ChunkId,
    /// Compressed bytes fetched around one read, or ahead of a sequence.
    window: u64,
    /// Steps from one chunk to the next, and where the first began.
    sequence: u32,
    from: ChunkId,
    /// At this chunk the window of a sequence grows.
    mark: ChunkId,
    /// Guesses that came true since the last miss.
    hits: u32,
}

impl ReadAhead {
    /// A reader has asked for `first..=last`, which nobody was fetching.
    /// `missing` says whether a chunk is neither here nor on its way.
    pub(super) fn missed(
        &self,
        table: &ChunkTable,
        (first, last): (ChunkId, ChunkId),
        budget: &Budget,
        missing: impl Fn(ChunkId) -> bool,
    ) -> Guess {
        let walk = Walk {
            table,
            credit: budget.credit,
            missing,
        };
        let mut files = self.files.lock();
        let known = files.iter().position(|file| file.chunks.contains(&first));
        let (followed, guess) = match known {
            Some(at) => files.remove(at).missed(first, last, budget, &walk),
            None => Followed::new(first, last, budget, &walk),
        };
        if files.len() == FILES {
            files.remove(0);
        }
        files.push(followed);
        guess
    }

    /// A reader has read `chunk` for the first time; `hit` says that it had
    /// been guessed. Returns what to fetch for it in addition.
    pub(super) fn read(
        &self,
        table: &ChunkTable,
        chunk: ChunkId,
        hit: bool,
        budget: &Budget,
        missing: impl Fn(ChunkId) -> bool,
    ) -> Vec<ChunkId> {
        let mut files = self.files.lock();
        let found = files.iter_mut().find(|file| file.chunks.contains(&chunk));
        let Some(file) = found else {
            return Vec::new();
        };
        file.hits += u32::from(hit);
        file.read(table, chunk, budget, missing)
    }
}

impl Followed {
    /// The first read of a file.
    fn new<M: Fn(ChunkId) -> bool>(
        first: ChunkId,
        last: ChunkId,
        budget: &Budget,
        walk: &Walk<'_, M>,
    ) -> (Self, Guess) {
        let table = walk.table;
        let window = budget.around;
        let chunks = table.file_of(last);
        let size = table.get(*chunks.end()).data_end() - table.get(*chunks.start()).data_offset;
        let mut guess = Guess::default();
        let rest = table.after(last).take_while(|c| c <= chunks.end());
        if size <= budget.small {
            guess.ahead = walk.all(rest);
            let before = table.before(first).take_while(|c| c >= chunks.start());
            guess.before = walk.all(before);
        } else {
            guess.ahead = walk.up_to(rest, window / BEHIND);
        }
        let end = guess.ahead.last().copied().unwrap_or(last);
        let followed = Self {
            reader: last,
            end,
            window,
            sequence: 0,
            from: first,
            mark: end,
            hits: 0,
            chunks,
        };
        (followed, guess)
    }

    /// A further read that nothing was fetched for.
    fn missed<M: Fn(ChunkId) -> bool>(
        mut self,
        first: ChunkId,
        last: ChunkId,
        budget: &Budget,
        walk: &Walk<'_, M>,
    ) -> (Self, Guess) {
        let table = walk.table;
        let within = |chunk: &ChunkId| self.chunks.contains(chunk);
        let mut guess = Guess::default();
        if first > self.reader && (first <= self.end || near(table, self.end, first)) {
            self.sequence += 1;
            let rest = table.after(last).take_while(within);
            guess.ahead = match self.sequence {
                SEQUENCE.. => {
                    self.window = (self.window * 2).clamp(budget.around, budget.sequential);
                    let credit = self.credit(walk.credit, table, last);
                    let walk = walk.by_ref();
                    Walk { credit, ..walk }.up_to(rest, self.window)
                }
                _ => walk.up_to(rest, self.window / BEHIND),
            };
        } else {
            self.sequence = 0;
            self.from = first;
            let larger = self.window.saturating_mul(2);
            self.window = match self.hits {
                0 => budget.around,
                _ => larger.clamp(budget.around, budget.sequential),
            };
            let rest = table.after(last).take_while(within);
            guess.ahead = walk.up_to(rest, self.window / BEHIND);
            let before = table.before(first).take_while(within);
            guess.before = walk.up_to(before, self.window / BEFORE);
        }
        self.hits = 0;
        self.reader = last;
        self.end = guess.ahead.last().copied().unwrap_or(last);
        self.mark = self.end;
        (self, guess)
    }

    /// A further read of what had been fetched.
    fn read(
        &mut self,
        table: &ChunkTable,
        chunk: ChunkId,
        budget: &Budget,
        missing: impl Fn(ChunkId) -> bool,
    ) -> Vec<ChunkId> {
        if chunk <= self.reader {
            return Vec::new();
        }
        if near(table, self.reader, chunk) {
            self.sequence += 1;
        } else {
            self.sequence = 0;
            self.from = chunk;
        }
        self.reader = chunk;
        if self.sequence < SEQUENCE || self.end >= *self.chunks.end() {
            return Vec::new();
        }
        if chunk >= self.mark {
            self.window = (self.window * 2).clamp(budget.around, budget.sequential);
        }
        let position = |chunk: ChunkId| {
            let unit = table.get(chunk).unit;
            unit.offset + unit.size
        };
        let ahead = position(self.end.max(chunk)).saturating_sub(position(chunk));
        let room = self.window.saturating_sub(ahead);
        if room < budget.piece.max(self.window / 4).min(self.window) {
            return Vec::new();
        }
        let walk = Walk {
            table,
            credit: self.credit(budget.credit, table, chunk),
            missing,
        };
        let file_end = *self.chunks.end();
        let rest = table
            .after(self.end.max(chunk))
            .take_while(|&c| c <= file_end);
        let chunks = walk.up_to(rest, room);
        if let Some(&last) = chunks.last() {
            if chunk >= self.mark {
                self.mark = last;
            }
            self.end = last;
        }
        chunks
    }

    /// Uncompressed bytes that may turn out wrong: a sequence that has come to
    /// `reader` earns as much as it has read, however little else may be
    /// guessed.
    fn credit(&self, common: u64, table: &ChunkTable, reader: ChunkId) -> u64 {
        if self.sequence < SEQUENCE {
            return common;
        }
        let start = table.get(self.from).data_offset;
        common.max(table.get(reader).data_end().saturating_sub(start))
    }
}

/// Whether `next` is little more than one step after `chunk`.
fn near(table: &ChunkTable, chunk: ChunkId, next: ChunkId) -> bool {
    let from = table.get(chunk).data_end();
    next > chunk && table.get(next).data_offset <= from + NEAR
}

/// Chooses among chunks.
struct Walk<'t, M> {
    table: &'t ChunkTable,
    credit: u64,
    missing: M,
}

impl<'t, M: Fn(ChunkId) -> bool> Walk<'t, M> {
    fn by_ref(&self) -> Walk<'t, &M> {
        Walk {
            table: self.table,
            credit: self.credit,
            missing: &self.missing,
        }
    }

    /// All that are missing.
    fn all(&self, chunks: impl Iterator<Item = ChunkId>) -> Vec<ChunkId> {
        chunks
            .take(STEPS)
            .filter(|&chunk| (self.missing)(chunk))
            .collect()
    }

    /// Those that are missing, up to so many compressed bytes.
    fn up_to(&self, chunks: impl Iterator<Item = ChunkId>, budget: u64) -> Vec<ChunkId> {
        let (mut spent, mut risked, mut unit) = (0, 0, None);
        let mut taken = Vec::new();
        for chunk in chunks.take(STEPS) {
            if !(self.missing)(chunk) {
                continue;
            }
            let record = self.table.get(chunk);
            if unit.replace(record.unit) != Some(record.unit) {
                spent += record.unit.size;
            }
            risked += u64::from(record.size);
            if spent > budget || risked > self.credit {
                break;
            }
            taken.push(chunk);
        }
        taken
    }
}
