//! What will be needed as files that were read say, in that order and just so
//! fast that the link is busy: what turns out to be needed first must not wait
//! for what is needed last.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use sluice_layer::Unit;

use super::Priority;
use super::inflight::Claim;
use super::layer::LazyLayer;
use super::pace::{Due, Share};
use super::prefetch::{length, neighbours};
use super::reuse::Asked;
use super::stream::{Terms, window};
use crate::layer_dir::ChunkId;

/// So many steps are made from a file that was read: what it loads, what that
/// loads, and what that does. Each step is a round trip that a reader need not
/// wait for; with each, more of what is found is never read.
const STEPS: usize = 5;

/// When a file is needed, as files that were read say. A program loads what one
/// file names before it goes on with the file that named that one: so what the
/// last one names comes first, and everything right after what names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Need {
    /// The number of the file that was read.
    read: Reverse<u64>,
    /// Positions among what is named, from 1, one for each step; then zeros.
    path: [u16; STEPS],
}

impl Need {
    /// Of what is read itself.
    pub(super) fn now(number: u64) -> Self {
        Self {
            read: Reverse(number),
            path: [0; STEPS],
        }
    }

    /// Of what every start needs, or a container's command names: after whatever
    /// is read.
    pub(super) fn at_start(position: usize) -> Option<Self> {
        Self {
            read: Reverse(0),
            path: [0; STEPS],
        }
        .of_named(position)
    }

    /// Whether that is of what a start needs itself, not of what that loads.
    pub(super) fn is_at_start(&self) -> bool {
        self.read == Reverse(0) && self.steps() == 1
    }

    /// Of what is like a file that is read: after all that it names.
    fn guessed(number: u64) -> Self {
        Self {
            read: Reverse(number),
            path: [u16::MAX; STEPS],
        }
    }

    /// How many steps away that is.
    pub(super) fn steps(&self) -> usize {
        self.path.iter().filter(|&&step| step > 0).count()
    }

    /// Of what a file names at a position; none where that is too far away.
    pub(super) fn of_named(mut self, position: usize) -> Option<Self> {
        let step = self.path.iter_mut().find(|step| **step == 0)?;
        *step = u16::try_from(position + 1).ok()?;
        Some(self)
    }
}

/// Units of one layer that will be needed.
#[derive(Debug, Default)]
pub(super) struct Foreseen(Mutex<Queue>);

#[derive(Debug, Default)]
struct Queue {
    order: BTreeMap<(Need, u64), Unit>,
    /// The same by their place in the blob.
    units: BTreeMap<u64, Unit>,
    needs: BTreeMap<u64, Need>,
    /// Whether somebody fetches them.
    running: bool,
}

impl Queue {
    /// Adds a unit, or moves it forward.
    fn add(&mut self, unit: Unit, need: Need) {
        match self.needs.get(&unit.offset) {
            Some(known) if *known <= need => return,
            Some(known) => drop(self.order.remove(&(*known, unit.offset))),
            None => {}
        }
        self.order.insert((need, unit.offset), unit);
        self.needs.insert(unit.offset, need);
        self.units.insert(unit.offset, unit);
    }

    fn remove(&mut self, unit: Unit) {
        self.units.remove(&unit.offset);
        if let Some(need) = self.needs.remove(&unit.offset) {
            self.order.remove(&(need, unit.offset));
        }
    }

    /// The first that is missing.
    fn first(&mut self, layer: &LazyLayer) -> Option<(Need, Unit)> {
        loop {
            let (&(need, _), &unit) = self.order.first_key_value()?;
            if !layer.has_unit(unit) {
                return Some((need, unit));
            }
            self.remove(unit);
        }
    }
}

impl LazyLayer {
    /// Chunks will be needed then: they are fetched when their turn comes.
    pub(super) fn fetch_foreseen(self: &Arc<Self>, chunks: &[ChunkId], need: Need) {
        let records = chunks
            .iter()
            .map(|&chunk| (chunk, self.dir.chunks().get(chunk)));
        let may = records.filter(|(chunk, record)| self.reads.foresee(*chunk, record));
        self.enqueue(may.map(|(_, record)| record.unit), need);
    }

    /// Chunks may be needed because the file with that number is read.
    pub(super) fn fetch_guessed(self: &Arc<Self>, chunks: &[ChunkId], number: u64) {
        let units = chunks.iter().map(|&chunk| {
            let record = self.dir.chunks().get(chunk);
            self.reads.guess(chunk, &record);
            record.unit
        });
        self.enqueue(units, Need::guessed(number));
    }

    /// Whether a chunk will be fetched when its turn comes.
    pub(super) fn is_queued(&self, chunk: ChunkId) -> bool {
        let unit = self.dir.chunks().get(chunk).unit;
        self.foreseen.0.lock().needs.contains_key(&unit.offset)
    }

    fn enqueue(self: &Arc<Self>, units: impl Iterator<Item = Unit>, need: Need) {
        if self.engine().storage().is_failing() {
            return;
        }
        let mut queue = self.foreseen.0.lock();
        units.for_each(|unit| queue.add(unit, need));
        if !queue.order.is_empty() && !std::mem::replace(&mut queue.running, true) {
            drop(queue);
            let layer = Arc::clone(self);
            self.spawn(async move { layer.bring_foreseen().await });
        }
    }

    async fn bring_foreseen(self: &Arc<Self>) {
        loop {
            let first = {
                let mut queue = self.foreseen.0.lock();
                let first = queue.first(self);
                queue.running = first.is_some();
                first.map(|(need, unit)| {
                    let (piece, gap) = (self.link().piece(), self.link().parallel_gap());
                    let near = neighbours(&queue.units, unit, piece, gap);
                    (need, unit, length(&near, unit))
                })
            };
            let Some((need, first, range)) = first else {
                return;
            };
            let due = Due::Foreseen(need);
            let turn = self.link().turn(due, range, Share::Foreseen).await;
            // Something else may be first by then.
            let bytes = window(self.link().piece().max(first.size), first.size);
            let admission = self.engine().admission();
            let permit = admission.admit(Priority::Prefetch, bytes).await;
            // Only now, so that a reader that came before did not wait for it.
            let claims = self.take_foreseen();
            let terms = Terms {
                priority: Priority::Prefetch,
                permit: Some(permit),
                turn: Some(turn),
                // What is read is what was foreseen, or needs little.
                gives_way: false,
                begun: None,
            };
            if claims.is_empty() {
                continue;
            }
            if self.engine().finder().is_none() {
                self.request_on(claims, terms);
                continue;
            }
            let layer = Arc::clone(self);
            self.spawn(layer.bring(claims, 0, Asked::default(), Some(terms)));
        }
    }

    /// Claims what is needed first, and what can share its request.
    fn take_foreseen(&self) -> Vec<Claim> {
        let mut queue = self.foreseen.0.lock();
        let Some((_, seed)) = queue.first(self) else {
            return Vec::new();
        };
        let (piece, gap) = (self.link().piece(), self.link().parallel_gap());
        let mut units = neighbours(&queue.units, seed, piece, gap);
        units.push(seed);
        units.sort_by_key(|unit| unit.offset);
        units.iter().for_each(|&unit| queue.remove(unit));
        drop(queue);
        units
            .into_iter()
            .filter_map(|unit| self.claim(unit))
            .collect()
    }
}
