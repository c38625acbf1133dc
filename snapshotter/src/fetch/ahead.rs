//! Fetching what nobody waits for: the prioritized files, and the rest of the
//! layer.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use sluice_layer::Unit;
use tokio::task::AbortHandle;

use super::decode::Arrived;
use super::layer::LazyLayer;
use super::stream::{Arriving, Decoding, Patience, fetch_claimed, window};
use super::{Priority, SourceError, plan};
use crate::layer_dir::ChunkId;

/// Chunks of an order that are looked at together, so that neighbours among
/// them share a request.
const TOGETHER: usize = 64;

/// What to fetch before it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// The prioritized files of the layer itself, in the order of the blob.
    Landmark,
    /// These chunks, in the order in which they are expected to be read.
    Order(Arc<[ChunkId]>),
}

/// How long nothing is fetched ahead when the disk does not take it; it
/// doubles.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Work that goes on by itself and ends when this is dropped.
#[derive(Debug)]
pub struct Handle(AbortHandle);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl LazyLayer {
    /// Streams what `plan` names while the container runs already. None where
    /// that is nothing: a layer without prioritized files, an empty order.
    pub fn prefetch(self: &Arc<Self>, plan: Plan) -> Option<Handle> {
        let layer = Arc::clone(self);
        match plan {
            Plan::Landmark => {
                let end = self.dir().identity().prefetch_end?;
                Some(self.go(async move {
                    layer.stream(0..end, Priority::Prefetch).await;
                }))
            }
            Plan::Order(order) if order.is_empty() => None,
            Plan::Order(order) => Some(self.go(async move {
                layer.follow(&order).await;
            })),
        }
    }

    /// Fetches chunks in the order given, but for neighbours.
    async fn follow(self: &Arc<Self>, order: &[ChunkId]) {
        for together in order.chunks(TOGETHER) {
            let mut units: Vec<Unit> = together
                .iter()
                .map(|&chunk| self.dir().chunks().get(chunk).unit)
                .collect();
            units.sort_unstable_by_key(|unit| unit.offset);
            units.dedup();
            let gap = self.link().worthwhile_gap();
            let longest = self.engine().config().longest_range;
            for planned in plan::group(units, |unit| *unit, gap, longest) {
                let units = planned.wanted.into_iter();
                let claims = units.filter_map(|unit| self.claim(unit)).collect();
                fetch_claimed(self, claims, Priority::Prefetch).await;
            }
        }
    }

    /// Downloads what is missing, after `delay`, in one stream that pauses
    /// while any reader of the node waits, and makes it durable.
    pub fn download(self: &Arc<Self>, delay: Duration) -> Handle {
        let layer = Arc::clone(self);
        self.go(async move {
            tokio::time::sleep(delay).await;
            layer.stream(0..u64::MAX, Priority::Background).await;
            let persisted = tokio::task::spawn_blocking(move || {
                let done = layer.dir().persist();
                (layer, done)
            });
            match persisted.await {
                Ok((layer, Err(error))) => tracing::warn!(layer = %layer.digest(), "{error}"),
                Ok((layer, Ok(_))) if layer.dir().is_complete() => {
                    tracing::info!(layer = %layer.digest(), "the whole layer is present");
                }
                _ => {}
            }
        })
    }

    fn go(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) -> Handle {
        let closed = self.closed().clone();
        let task = self.engine().runtime().spawn(async move {
            closed.run_until_cancelled(work).await;
        });
        Handle(task.abort_handle())
    }

    /// Fetches the missing units of a part of the blob, in its order. Gives up
    /// when the registry does not deliver until the deadline: readers that
    /// need the bytes will ask for them.
    async fn stream(self: &Arc<Self>, part: Range<u64>, priority: Priority) {
        let mut patience = Patience::new(self);
        let mut next = part.start;
        let mut pause = PAUSE;
        loop {
            if self.engine().storage().is_failing() {
                // A few units now and then tell when there is space again.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                self.engine().storage().try_again();
                next = part.start;
            }
            let Some(run) = self.next_run(next, part.end) else {
                return;
            };
            let permit = {
                let bytes = window(run.end - run.start, run.largest);
                self.engine().admission().admit(priority, bytes).await
            };
            next = run.start;
            let outcome = self.stream_run(&run, &mut next, priority).await;
            drop(permit);
            if next > run.start {
                patience.renew();
            }
            let Err(error) = outcome else { continue };
            let Some(wait) = patience.after(&error) else {
                tracing::warn!(
                    layer = %self.digest(),
                    "what is not read yet is no longer fetched ahead: {error}"
                );
                return;
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// The missing units at or after `from` that one request should fetch.
    fn next_run(&self, from: u64, end: u64) -> Option<Run> {
        let gap = self.link().worthwhile_gap();
        let mut run: Option<Run> = None;
        for unit in self.units(from, end) {
            if self.has_unit(unit) {
                continue;
            }
            match &mut run {
                None => {
                    run = Some(Run {
                        start: unit.offset,
                        end: unit.offset + unit.size,
                        largest: unit.size,
                    });
                }
                Some(run) if unit.offset.saturating_sub(run.end) <= gap => {
                    run.end = unit.offset + unit.size;
                    run.largest = run.largest.max(unit.size);
                }
                Some(_) => break,
            }
        }
        run
    }

    fn units(&self, from: u64, end: u64) -> impl Iterator<Item = Unit> + '_ {
        self.dir()
            .chunks()
            .units_from(from)
            .take_while(move |unit| unit.offset < end)
    }

    /// One request. `next` follows what is done.
    async fn stream_run(
        self: &Arc<Self>,
        run: &Run,
        next: &mut u64,
        priority: Priority,
    ) -> Result<(), SourceError> {
        if priority == Priority::Background {
            self.engine().idle().await;
        }
        let gap = self.link().worthwhile_gap();
        let mut arriving = Arriving::request(self, run.start, run.end, priority).await?;
        let mut decoding = Decoding::new(self, priority);
        let mut outcome = Ok(());
        let mut units = self.units(run.start, run.end).peekable();
        while let Some(unit) = units.next() {
            let end = unit.offset + unit.size;
            if priority == Priority::Background {
                // Between units, so that no reader waits for a unit of a
                // stream that waits for readers.
                self.engine().idle().await;
            }
            // Nobody's until its bytes are about to arrive: a reader that
            // needs it earlier does not wait for all that lies before.
            if self.engine().storage().is_failing() {
                break;
            }
            let Some(claim) = self.claim(unit) else {
                *next = end;
                // When much of what follows has come in meanwhile, a new
                // request is better.
                let missing = self.units(end, run.end).find(|&unit| !self.has_unit(unit));
                match missing {
                    Some(missing) if missing.offset - end <= gap => continue,
                    _ => break,
                }
            };
            match arriving.take(unit.offset, end).await {
                Ok(bytes) => {
                    *next = end;
                    let more = units
                        .peek()
                        .is_some_and(|unit| arriving.has(unit.offset + unit.size));
                    let arrived = Arrived {
                        claim,
                        bytes,
                        again: false,
                    };
                    decoding.push(arrived, more).await;
                }
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        drop(arriving);
        // What is wrong is left to the reader who needs it.
        drop(decoding.finish().await);
        outcome
    }
}

/// A part of the blob that one request fetches.
struct Run {
    start: u64,
    end: u64,
    largest: u64,
}
