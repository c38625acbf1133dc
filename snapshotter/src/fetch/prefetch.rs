//! Fetching what a plan names, in its order, ahead of the readers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use sluice_layer::Unit;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::ahead::Handle;
use super::inflight::Claim;
use super::layer::LazyLayer;
use super::pace::{Due, Share, Turn};
use super::reads::Planned;
use super::stream::{Terms, courtesy, fetch_claimed, window};
use super::{Priority, SourceError};
use crate::layer_dir::{ChunkId, Present};

/// What to fetch before it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// The prioritized files of the layer itself, in the order of the blob.
    Landmark,
    /// These chunks, in the order in which they are expected to be read.
    Order(Arc<[ChunkId]>),
    /// The same, with the time of each from the start of the container, so
    /// that what several layers need comes in the order of need.
    Timed(Arc<[(ChunkId, Duration)]>),
}

/// Neighbours in the blob are fetched together, and so out of order, when they
/// are needed within so many pieces.
pub(super) const LOOK_AHEAD: u64 = 2;
/// The share of a range that may come before the unit that it is fetched for.
const BEFORE_SHARE: u64 = 4;
/// Where a plan names no times, it is taken to be needed at this rate, in bytes
/// a second: only that all layers are treated alike matters.
const ASSUMED_NEED: f64 = 12.5e6;

impl LazyLayer {
    /// Streams what `plan` names while the container runs already. None where
    /// that is nothing: a layer without prioritized files, an empty order.
    pub fn prefetch(self: &Arc<Self>, plan: Plan) -> Option<Handle> {
        let nothing = match &plan {
            Plan::Landmark => self.dir().identity().prefetch_end.is_none(),
            Plan::Order(order) => order.is_empty(),
            Plan::Timed(order) => order.is_empty(),
        };
        if nothing {
            return None;
        }
        let layer = Arc::clone(self);
        Some(self.go(async move {
            if let Err(error) = layer.follow(plan).await {
                tracing::warn!(
                    layer = %layer.digest(),
                    "what is not read yet is no longer fetched ahead: {error}"
                );
            }
        }))
    }

    /// Several ranges are under way: as many as keep the link busy.
    async fn follow(self: &Arc<Self>, plan: Plan) -> Result<(), SourceError> {
        let mut queue = Queue::new(self, plan);
        self.reads().plan(queue.planned());
        let mut flights = JoinSet::new();
        let started = Instant::now();
        let mut asked = 0u64;
        loop {
            let is_in_doubt = self.reads().is_in_doubt();
            let piece = self.link().piece_of_plan(is_in_doubt);
            let gap = self.link().parallel_gap();
            queue.fill(piece * LOOK_AHEAD);
            let new = std::mem::take(&mut queue.new);
            let more = !new.is_empty();
            self.take_over(new).await;
            queue.pass_over();
            let Some((first, at)) = queue.first() else {
                match more {
                    true => continue,
                    false => break,
                }
            };
            if is_in_doubt && asked >= self.link().doubtful() {
                self.reads().without_doubt().await;
                continue;
            }
            self.reads().pays().await;
            let assumed = || Duration::from_secs_f64(asked as f64 / ASSUMED_NEED);
            let due = Due::At(started + at.unwrap_or_else(assumed));
            let range = queue.range(first, piece, gap);
            let mut turn = self.turn(due, range).await;
            if let Some((quiet, longest)) = courtesy(self) {
                self.engine().give_way(quiet, longest, || false).await;
            }
            let bytes = window(range, first.size);
            let admission = self.engine().admission();
            let permit = admission.admit(Priority::Prefetch, bytes).await;
            // Only now, so that a reader that came before did not wait for it.
            let claims = queue.take(piece, gap);
            if let (Some(first), Some(last)) = (claims.first(), claims.last()) {
                let range = last.unit().offset + last.unit().size - first.unit().offset;
                turn.resize(range);
                asked += range;
                let layer = Arc::clone(self);
                let terms = Terms {
                    priority: Priority::Prefetch,
                    permit: Some(permit),
                    turn: Some(turn),
                    gives_way: true,
                    begun: None,
                };
                flights.spawn(async move { fetch_claimed(&layer, claims, terms).await });
            }
            while let Some(done) = flights.join_next().now_or_never().flatten() {
                done.unwrap_or(Ok(()))?;
            }
        }
        while let Some(done) = flights.join_next().await {
            done.unwrap_or(Ok(()))?;
        }
        Ok(())
    }

    /// Waits for the turn to ask for about so many bytes of a plan: behind tables
    /// of contents, while it is in doubt.
    async fn turn(&self, due: Due, bytes: u64) -> Turn {
        if self.reads().is_in_doubt() {
            tokio::select! {
                biased;
                turn = self.link().turn(due, bytes, Share::Doubtful) => return turn,
                () = self.reads().without_doubt() => {}
            }
        }
        self.link().turn(due, bytes, Share::Plan).await
    }
}

/// The units of a plan that are missing, in its order.
struct Queue<'a> {
    layer: &'a LazyLayer,
    plan: Plan,
    /// How far the plan was looked at: a position in the order, or an offset
    /// of the blob.
    next: u64,
    /// What comes soon, in order; some of it may be taken already.
    order: VecDeque<(Unit, Option<Duration>)>,
    /// What of that is not taken, by its place in the blob.
    soon: BTreeMap<u64, Unit>,
    bytes: u64,
    /// What came in sight last.
    new: Vec<Unit>,
}

impl<'a> Queue<'a> {
    fn new(layer: &'a LazyLayer, plan: Plan) -> Self {
        Self {
            layer,
            plan,
            next: 0,
            order: VecDeque::new(),
            soon: BTreeMap::new(),
            bytes: 0,
            new: Vec::new(),
        }
    }

    fn planned(&self) -> Planned {
        let all = Present::empty(self.layer.dir().chunks().len());
        match &self.plan {
            Plan::Landmark => {
                return Planned::Before(self.layer.dir().identity().prefetch_end.unwrap_or(0));
            }
            Plan::Order(order) => order.iter().for_each(|&chunk| {
                all.insert(chunk);
            }),
            Plan::Timed(order) => order.iter().for_each(|&(chunk, _)| {
                all.insert(chunk);
            }),
        }
        Planned::Chunks(all)
    }

    fn next(&mut self) -> Option<(Unit, Option<Duration>)> {
        let table = self.layer.dir().chunks();
        let at = self.next as usize;
        match &self.plan {
            Plan::Landmark => {
                let end = self.layer.dir().identity().prefetch_end?;
                let unit = table.units_from(self.next).next()?;
                self.next = unit.offset + 1;
                (unit.offset < end).then_some((unit, None))
            }
            Plan::Order(order) => {
                self.next += 1;
                let chunk = *order.get(at)?;
                Some((table.get(chunk).unit, None))
            }
            Plan::Timed(order) => {
                self.next += 1;
                let (chunk, at) = *order.get(at)?;
                Some((table.get(chunk).unit, Some(at)))
            }
        }
    }

    /// Looks ahead until so many bytes are in sight.
    fn fill(&mut self, bytes: u64) {
        while self.bytes < bytes || self.soon.is_empty() {
            let Some((unit, at)) = self.next() else {
                return;
            };
            if !self.layer.has_unit(unit) && self.soon.insert(unit.offset, unit).is_none() {
                self.bytes += unit.size;
                self.order.push_back((unit, at));
                self.new.push(unit);
            }
        }
    }

    /// Takes out of sight what has come by other ways, or comes: it would come
    /// once more between what shares a request.
    fn pass_over(&mut self) {
        let (layer, bytes) = (self.layer, &mut self.bytes);
        self.soon.retain(|_, &mut unit| {
            let missing = !layer.has_unit(unit) && !layer.in_flight.contains(unit);
            if !missing {
                *bytes -= unit.size;
            }
            missing
        });
    }

    /// The first unit that is in sight.
    fn first(&mut self) -> Option<(Unit, Option<Duration>)> {
        while let Some(&first) = self.order.front() {
            if self.soon.contains_key(&first.0.offset) {
                return Some(first);
            }
            self.order.pop_front();
        }
        None
    }

    /// How long a request for the unit is going to be, with what can share it.
    fn range(&self, unit: Unit, piece: u64, gap: u64) -> u64 {
        length(&neighbours(&self.soon, unit, piece, gap), unit)
    }

    fn remove(&mut self, unit: Unit) -> Option<Claim> {
        self.soon.remove(&unit.offset)?;
        self.bytes -= unit.size;
        self.layer.claim(unit)
    }

    /// Claims the first unit in sight and what can share its request, sorted.
    /// Nothing where it has come by other ways meanwhile: then the next one is
    /// first, for whose length nobody has waited.
    fn take(&mut self, piece: u64, gap: u64) -> Vec<Claim> {
        let first = self.first();
        let Some(seed) = first.and_then(|(unit, _)| self.remove(unit)) else {
            return Vec::new();
        };
        let near = neighbours(&self.soon, seed.unit(), piece, gap);
        let mut claims = vec![seed];
        for unit in near {
            claims.extend(self.remove(unit));
        }
        claims.sort_by_key(|claim| claim.unit().offset);
        claims
    }
}

/// From the first to the last of some units and one more.
pub(super) fn length(units: &[Unit], more: Unit) -> u64 {
    let all = units.iter().chain([&more]);
    let ends = all.clone().map(|unit| unit.offset + unit.size);
    ends.max().unwrap_or(0) - all.map(|unit| unit.offset).min().unwrap_or(0)
}

/// Of the units that are wanted soon, by their place in the blob, those that can
/// share a request of up to `piece` bytes with `seed`.
pub(super) fn neighbours(
    soon: &BTreeMap<u64, Unit>,
    seed: Unit,
    piece: u64,
    gap: u64,
) -> Vec<Unit> {
    let (mut start, mut end) = (seed.offset, seed.offset + seed.size);
    let mut found = Vec::new();
    loop {
        let after = soon.range(end..).next().map(|(_, &unit)| unit);
        let after = after
            .filter(|unit| unit.offset - end <= gap && unit.offset + unit.size - start <= piece);
        let before = soon.range(..start).next_back().map(|(_, &unit)| unit);
        let before = before.filter(|unit| {
            start.saturating_sub(unit.offset + unit.size) <= gap
                && end - unit.offset <= piece
                && seed.offset - unit.offset <= piece / BEFORE_SHARE
        });
        let Some(unit) = after.or(before) else {
            return found;
        };
        start = start.min(unit.offset);
        end = end.max(unit.offset + unit.size);
        found.push(unit);
    }
}
