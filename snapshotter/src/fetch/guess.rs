//! What a layer fetches that nobody has asked for yet, because of what was read.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use sluice_layer::Unit;

use super::elf;
use super::foreseen::Need;
use super::inflight::Claim;
use super::layer::LazyLayer;
use super::readahead::Budget;
use super::relatives::{Allowance, State, relatives};
use super::reuse::Asked;
use crate::layer_dir::ChunkId;

/// What is fetched around a read that misses, in percent of what a miss costs,
/// and where that is dear: the best in starts of programs.
const AROUND_PERCENT: u64 = 150;
const AROUND_PERCENT_WHERE_DEAR: u64 = 200;
/// Its bounds: less saves nothing, since a request costs as much; more delays
/// what is read next by too much when it is wrong.
const LEAST_AROUND: u64 = 32 << 10;
const MOST_AROUND: u64 = 16 << 20;
/// A file up to this size, uncompressed, is read whole as a rule.
const SMALL_FILE: u64 = 1 << 20;
/// So is a larger one, to some bound, of so many times what a miss costs, and of
/// more where that is dear: of the parts of a library that are not, most are
/// missed one after the other.
const SMALL: u64 = 4;
const SMALL_WHERE_DEAR: u64 = 8;
const LARGEST_SMALL_FILE: u64 = 64 << 20;
/// Where a miss costs less than this, bytes are what is dear.
const DEAR_MISS: u64 = 512 << 10;
/// Beyond that, this part of what is fetched around a miss is fetched of whatever
/// lies behind the file: with all of it, what is wrong is in the way.
const ONWARDS: u64 = 2;
/// And guesses may be wrong once as often for each so many bytes that
/// a miss costs.
const ONCE_MORE: u64 = 128 << 10;

impl LazyLayer {
    /// Adds to `claims` what may be wanted after them and can share their
    /// request, and returns what cannot.
    pub(super) fn guess(
        &self,
        first: ChunkId,
        last: ChunkId,
        asked: &BTreeSet<Unit>,
        claims: &mut Vec<Claim>,
    ) -> Vec<Claim> {
        let Some(budget) = self.budget() else {
            return Vec::new();
        };
        let guess = self
            .read_ahead
            .missed(self.dir.chunks(), (first, last), &budget, |chunk| {
                self.is_missing(chunk)
            });
        claims.extend(self.claim_chunks(&guess.ahead, asked));
        self.claim_chunks(&guess.before, asked)
    }

    /// A file up to this size is fetched whole.
    pub(super) fn small_file(&self) -> u64 {
        let price = self.link.price_of_miss();
        let times = match price {
            ..DEAR_MISS => SMALL,
            _ => SMALL_WHERE_DEAR,
        };
        (price * times).clamp(SMALL_FILE, LARGEST_SMALL_FILE)
    }

    /// Whether anything may be fetched on a guess: not where read-ahead is off.
    pub(super) fn guesses(&self) -> bool {
        self.engine.config().read_ahead > 0
    }

    /// How much may be guessed; none where read-ahead is off.
    fn budget(&self) -> Option<Budget> {
        let longest = self.engine.config().read_ahead;
        let price = self.link.price_of_miss();
        let percent = match price {
            ..DEAR_MISS => AROUND_PERCENT,
            _ => AROUND_PERCENT_WHERE_DEAR,
        };
        let around = (price * percent / 100).clamp(LEAST_AROUND, MOST_AROUND);
        let around = around.min(longest);
        let (onwards, times) = match price {
            ..DEAR_MISS => (0, 1),
            _ => (around / ONWARDS, price / ONCE_MORE),
        };
        (longest > 0).then(|| Budget {
            around,
            onwards,
            sequential: self.link.window().max(around).min(longest),
            piece: self.link.piece(),
            credit: self.reads.credit(times),
            small: self.small_file(),
        })
    }

    /// The file that begins with `first` is read: others are likely to be.
    pub(super) fn fetch_relatives(self: &Arc<Self>, first: ChunkId, number: u64) {
        let (Some(budget), Some(kin)) = (self.budget(), self.dir.chunks().kin(first)) else {
            return;
        };
        let allowance = Allowance {
            small: self.small_file(),
            family: budget.around,
            namesakes: self.reads.again(kin),
            onwards: budget.onwards,
            credit: budget.credit,
        };
        let chunks = relatives(self.dir.chunks(), first, allowance, |chunk| {
            match self.reads.contains(chunk) {
                true => State::Read,
                false if self.is_missing(chunk) && !self.is_queued(chunk) => State::Missing,
                false => State::Unread,
            }
        });
        self.fetch_guessed(&chunks, number);
    }

    /// A chunk has come that somebody waits for, or that was guessed: what it
    /// says of its file may tell what is read next.
    pub(super) fn look_into(&self, chunk: ChunkId, content: &[u8], awaited: bool) {
        let table = self.dir.chunks();
        if !(awaited || self.reads.is_guessed(chunk)) {
            return;
        }
        let begins = table.kin(chunk).is_some();
        let elf = if begins { None } else { self.elf_of(chunk) };
        let Some(me) = self.me.upgrade().filter(|_| begins || elf.is_some()) else {
            return;
        };
        if self.budget().is_none() || self.reads.is_planned(chunk, &table.get(chunk)) {
            return;
        }
        if let Some((first, need)) = elf {
            return me.fetch_named(first, need, content);
        }
        let known = self.need_of(chunk).filter(|_| !awaited);
        if let Some(need) = known {
            me.fetch_dependencies(chunk, need);
        }
        let need = known.unwrap_or_else(|| Need::now(self.engine.number_read()));
        if !me.fetch_loaded(chunk, need, content) {
            return;
        }
        if known.is_some() || awaited {
            me.note_elf(chunk, need);
            me.fetch_named(chunk, need, content);
        } else {
            me.note_guessed_elf(chunk);
        }
    }

    /// A file that begins so is needed then: if it is a program or library, so
    /// is what of it is read when it is loaded. Whether it is one.
    pub(super) fn fetch_loaded(self: &Arc<Self>, first: ChunkId, need: Need, head: &[u8]) -> bool {
        let ranges = elf::loaded_first(head);
        if ranges.is_empty() {
            return false;
        }
        self.fetch_foreseen(&self.missing_within(first, &ranges), need);
        true
    }

    /// What is missing of these ranges of the file that begins with `first`.
    fn missing_within(&self, first: ChunkId, ranges: &[Range<u64>]) -> Vec<ChunkId> {
        let table = self.dir.chunks();
        let begin = table.get(first).data_offset;
        let end = table.get(*table.file_of(first).end()).data_end();
        let place = |at: u64| begin.saturating_add(at).min(end);
        let chunks: BTreeSet<ChunkId> = ranges
            .iter()
            .map(|range| (place(range.start), place(range.end)))
            .flat_map(|(from, to)| table.overlapping(from, to.saturating_sub(from)))
            .filter(|&chunk| self.is_missing(chunk))
            .collect();
        chunks.into_iter().collect()
    }

    /// Whether a chunk is neither here nor on its way.
    pub(super) fn is_missing(&self, chunk: ChunkId) -> bool {
        let unit = self.dir.chunks().get(chunk).unit;
        !self.dir.present().contains(chunk) && !self.in_flight.contains(unit)
    }

    pub(super) fn claim_chunks(&self, chunks: &[ChunkId], except: &BTreeSet<Unit>) -> Vec<Claim> {
        let records = chunks.iter().map(|&chunk| {
            let record = self.dir.chunks().get(chunk);
            self.reads.guess(chunk, &record);
            record.unit
        });
        let units: BTreeSet<Unit> = records.filter(|unit| !except.contains(unit)).collect();
        units
            .into_iter()
            .filter_map(|unit| self.claim(unit))
            .collect()
    }

    /// A reader has read present bytes: what is read for the first time may
    /// call for more.
    pub(super) fn note_read(&self, offset: u64, len: u64) {
        let table = self.dir.chunks();
        for chunk in table.overlapping(offset, len) {
            if self.reads.contains(chunk) {
                continue;
            }
            let Some(hit) = self.reads.read(chunk, &table.get(chunk)) else {
                continue;
            };
            let (Some(budget), Some(me)) = (self.budget(), self.me.upgrade()) else {
                continue;
            };
            let missing = |chunk| self.is_missing(chunk);
            let further = self.read_ahead.read(table, chunk, hit, &budget, missing);
            if !further.is_empty() {
                let claims = self.claim_chunks(&further, &BTreeSet::new());
                me.start(claims, Asked::default());
            }
            if table.kin(chunk).is_some() {
                let number = self.engine.number_read();
                me.fetch_dependencies(chunk, Need::now(number));
                // What files say is needed is not added to.
                if hit && !self.reads.was_foreseen(chunk) {
                    me.fetch_relatives(chunk, number);
                }
            }
        }
    }
}
