//! Content that is asked for before its layer's table of contents is here. Where
//! it lies in the blob, a profile says; what it is, nobody believes before the
//! layer is open, and then as ever.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use sluice_layer::Unit;
use sluice_oci::Digest;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::activity::Request;
use super::ahead::Handle;
use super::inflight::Claim;
use super::layer::LazyLayer;
use super::pace::{Due, Share, Turn};
use super::prefetch::{LOOK_AHEAD, length, neighbours};
use super::stream::{Arriving, Terms, fetch_claimed};
use super::{Blame, Engine, Permit, Priority, RangeBody, RangeSource, SourceError};

/// So much of a layer is begun with at most: it stays in memory until the layer
/// is open.
const MOST: u64 = 8 << 20;
/// A table of contents that takes longer gives back the memory, which others
/// may need.
const PATIENCE: Duration = Duration::from_secs(10);

/// Ranges of a blob that are on their way. Dropping it ends their requests.
#[derive(Debug)]
pub struct Begun {
    ranges: Arc<Mutex<Vec<Range>>>,
    /// Asks for more of them.
    _asking: Handle,
}

/// One of them.
#[derive(Debug)]
struct Range {
    start: u64,
    end: u64,
    /// What it is asked for, in the order of the blob.
    wanted: Vec<Unit>,
    answer: Answer,
    permit: Permit,
}

/// The answer to a request that somebody else receives.
struct Answer {
    parts: mpsc::UnboundedReceiver<Result<Bytes, SourceError>>,
    blame: Arc<Mutex<Option<Blame>>>,
    _receiving: Handle,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answer").finish_non_exhaustive()
    }
}

impl RangeBody for Answer {
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>> {
        Box::pin(async move { self.parts.recv().await.transpose() })
    }

    fn blame(&self) -> Blame {
        let blame = self.blame.lock().take();
        blame.unwrap_or_else(|| Box::new(|| {}))
    }
}

impl Engine {
    /// Asks for units of the layer's blob, or several at once that adjoin, which
    /// are first needed after so long, in this order, while its table of
    /// contents is on its way.
    pub fn begin(
        &self,
        layer: Digest,
        source: Arc<dyn RangeSource>,
        wanted: Vec<(Unit, Duration)>,
    ) -> Begun {
        let ranges: Arc<Mutex<Vec<Range>>> = Arc::default();
        let (engine, to) = (self.clone(), Arc::clone(&ranges));
        let asking = self.runtime().spawn(async move {
            let until = Instant::now() + PATIENCE;
            let _ = timeout_at(until, engine.ask(layer, source, wanted, &to)).await;
            sleep_until(until).await;
            to.lock().clear();
        });
        Begun {
            ranges,
            _asking: Handle::of(&asking),
        }
    }

    async fn ask(
        &self,
        layer: Digest,
        source: Arc<dyn RangeSource>,
        wanted: Vec<(Unit, Duration)>,
        to: &Mutex<Vec<Range>>,
    ) {
        let link = self.link(source.host());
        let started = Instant::now();
        let possible = |(unit, _): &(Unit, _)| (1..=MOST).contains(&unit.size);
        let mut wanted = wanted.into_iter().filter(possible);
        let mut order = VecDeque::new();
        let mut soon: BTreeMap<u64, Unit> = BTreeMap::new();
        let mut asked = 0;
        loop {
            let piece = link.piece_of_plan(true);
            let mut in_sight: u64 = soon.values().map(|unit| unit.size).sum();
            while in_sight < piece * LOOK_AHEAD
                && let Some((unit, at)) = wanted.next()
            {
                if soon.insert(unit.offset, unit).is_none() {
                    in_sight += unit.size;
                    order.push_back((unit, at));
                }
            }
            let Some((first, at)) = order.pop_front() else {
                return;
            };
            if !soon.contains_key(&first.offset) {
                continue;
            }
            let mut units = neighbours(&soon, first, piece, link.parallel_gap());
            let len = length(&units, first);
            units.push(first);
            units.sort_unstable();
            for unit in &units {
                soon.remove(&unit.offset);
            }
            let start = units[0].offset;
            let end = start + len;
            asked += end - start;
            if asked > MOST.min(link.doubtful()) {
                return;
            }
            let due = Due::At(started + at);
            let turn = link.turn(due, end - start, Share::Doubtful).await;
            let admission = self.admission();
            let permit = admission.admit(Priority::Prefetch, end - start).await;
            let request = Request {
                layer,
                start,
                end,
                priority: Priority::Prefetch,
                since: Instant::now(),
            };
            let answer = self.receive(Arc::clone(&source), request, turn);
            to.lock().push(Range {
                start,
                end,
                wanted: units,
                answer,
                permit,
            });
        }
    }

    /// Asks for a range and keeps what comes: an answer that is not read would
    /// stop.
    fn receive(&self, source: Arc<dyn RangeSource>, request: Request, mut turn: Turn) -> Answer {
        let (to, parts) = mpsc::unbounded_channel();
        let blame: Arc<Mutex<Option<Blame>>> = Arc::default();
        let (engine, blames) = (self.clone(), Arc::clone(&blame));
        let receiving = self.runtime().spawn(async move {
            let arrival = async {
                let mut arriving = Arriving::request(&engine, &*source, request).await?;
                *blames.lock() = Some(arriving.blame());
                let mut left = request.end - request.start;
                while left > 0 {
                    let bytes = arriving.next().await?;
                    left = left.saturating_sub(bytes.len() as u64);
                    turn.arrived(bytes.len() as u64);
                    let _ = to.send(Ok(bytes));
                }
                Ok(())
            };
            if let Err(error) = arrival.await {
                let _ = to.send(Err(error));
            }
        });
        Answer {
            parts,
            blame,
            _receiving: Handle::of(&receiving),
        }
    }
}

impl LazyLayer {
    /// Takes over what was asked for before it was open. What of it is no whole
    /// unit is dropped.
    pub fn take_begun(self: &Arc<Self>, begun: Begun) {
        for range in std::mem::take(&mut *begun.ranges.lock()) {
            let table = self.dir().chunks();
            let units = range.wanted.into_iter().flat_map(|wanted| {
                let end = wanted.offset + wanted.size;
                let units = table.units_from(wanted.offset);
                units.take_while(move |unit| unit.offset + unit.size <= end)
            });
            let claims: Vec<Claim> = units.filter_map(|unit| self.claim(unit)).collect();
            if claims.is_empty() {
                continue;
            }
            let body = Box::new(range.answer);
            let terms = Terms {
                permit: Some(range.permit),
                begun: Some(Arriving::begun(body, range.start, range.end)),
                ..Terms::new(Priority::Prefetch)
            };
            let layer = Arc::clone(self);
            self.spawn(async move {
                // Who waits is told of errors by the claims.
                let _ = fetch_claimed(&layer, claims, terms).await;
            });
        }
    }
}
