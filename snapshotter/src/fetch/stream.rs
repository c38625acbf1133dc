//! Requests for ranges, and their bytes as they arrive.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::Instant;

use super::activity::{Entered, Request};
use super::decode::{Arrived, decode_all, decoded_size};
use super::inflight::Claim;
use super::layer::LazyLayer;
use super::link::Receiving;
use super::pace::Turn;
use super::{Blame, Engine, FetchError, Permit, Priority, RangeBody, RangeSource, SourceError};

/// A request holds at most this much of its range in memory, unless one unit
/// is larger.
const WINDOW: u64 = 4 << 20;
/// Units that arrived together are decoded together up to this size.
const BATCH: usize = 512 << 10;
/// A prefetch that gives way to readers goes on after so many round trips,
/// within bounds: it may be slowed down, not stopped.
const GIVE_WAY: (u32, Duration, Duration) =
    (10, Duration::from_millis(250), Duration::from_secs(1));
/// Bounds of how long it stays quiet after a reader's request.
const QUIET: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));
/// A permanent refusal is asked again so often before it is believed.
const REFUSALS: u32 = 2;

/// Bytes of memory that a request for units up to `largest` takes.
pub(super) fn window(range: u64, largest: u64) -> u64 {
    range.min(WINDOW.max(largest.saturating_mul(2)))
}

/// How long a prefetch keeps quiet after a request for a reader, for the next
/// one is likely to follow soon, and how long it gives way at most. None while
/// what is read is what it fetches: then readers need all of it, and a pause
/// leaves the link idle for a round trip.
pub(super) fn courtesy(layer: &LazyLayer) -> Option<(Duration, Duration)> {
    if layer.reads().fits() {
        return None;
    }
    let round_trip = layer.link().round_trip();
    let quiet = round_trip.clamp(QUIET.0, QUIET.1);
    let (round_trips, shortest, longest) = GIVE_WAY;
    Some((quiet, (round_trip * round_trips).clamp(shortest, longest)))
}

/// An answer that is read unit by unit.
pub(super) struct Arriving {
    body: Box<dyn RangeBody>,
    /// None where somebody else receives it, and measures.
    receiving: Option<Receiving>,
    buffered: Bytes,
    position: u64,
    end: u64,
    _under_way: Option<Entered>,
}

impl Arriving {
    /// Asks for a range of a blob.
    pub(super) async fn request(
        engine: &Engine,
        source: &dyn RangeSource,
        request: Request,
    ) -> Result<Self, SourceError> {
        let Request { start, end, .. } = request;
        let under_way = engine.under_way().enter(request);
        let link = engine.link(source.host());
        let body = source.range(start, end - start).await?;
        link.answered(request.age());
        Ok(Self {
            body,
            receiving: Some(link.receive()),
            buffered: Bytes::new(),
            position: start,
            end,
            _under_way: Some(under_way),
        })
    }

    /// Asks for `start..end` of the layer's blob.
    pub(super) async fn of_layer(
        layer: &LazyLayer,
        start: u64,
        end: u64,
        priority: Priority,
    ) -> Result<Self, SourceError> {
        let request = Request {
            layer: layer.digest(),
            start,
            end,
            priority,
            since: Instant::now(),
        };
        Self::request(layer.engine(), layer.source(), request).await
    }

    /// The answer to a request for `start..end` that was sent before.
    pub(super) fn begun(body: Box<dyn RangeBody>, start: u64, end: u64) -> Self {
        Self {
            body,
            receiving: None,
            buffered: Bytes::new(),
            position: start,
            end,
            _under_way: None,
        }
    }

    fn covers(&self, start: u64, end: u64) -> bool {
        self.position <= start && end <= self.end
    }

    /// The bytes that come next, however many these are.
    pub(super) async fn next(&mut self) -> Result<Bytes, SourceError> {
        if self.buffered.is_empty() {
            self.more().await?;
        }
        self.position += self.buffered.len() as u64;
        Ok(std::mem::take(&mut self.buffered))
    }

    /// What to call when the bytes are wrong.
    pub(super) fn blame(&self) -> Blame {
        self.body.blame()
    }

    async fn more(&mut self) -> Result<(), SourceError> {
        let mut next = self.body.next();
        let (answer, waited) = match (&mut next).now_or_never() {
            Some(answer) => (answer, false),
            None => (next.await, true),
        };
        match answer? {
            Some(bytes) => {
                if let Some(receiving) = &mut self.receiving {
                    receiving.received(bytes.len() as u64, waited);
                }
                self.buffered = bytes;
                Ok(())
            }
            None => Err(SourceError::truncated()),
        }
    }

    /// It will not be read for a while.
    pub(super) fn pause(&mut self) {
        if let Some(receiving) = &mut self.receiving {
            receiving.pause();
        }
    }

    /// Whether everything up to `end` is here already.
    pub(super) fn has(&self, end: u64) -> bool {
        end.saturating_sub(self.position) <= self.buffered.len() as u64
    }

    /// The bytes `start..end` of the blob; what lies before is passed over.
    pub(super) async fn take(&mut self, start: u64, end: u64) -> Result<Bytes, SourceError> {
        self.skip_to(start).await?;
        let len = (end - start) as usize;
        if self.buffered.is_empty() {
            self.more().await?;
        }
        if self.buffered.len() >= len {
            self.position = end;
            return Ok(self.buffered.split_to(len));
        }
        let mut bytes = BytesMut::with_capacity(len);
        while bytes.len() < len {
            if self.buffered.is_empty() {
                self.more().await?;
            }
            let part = self
                .buffered
                .split_to(self.buffered.len().min(len - bytes.len()));
            bytes.extend_from_slice(&part);
            self.position += part.len() as u64;
        }
        Ok(bytes.freeze())
    }

    /// Passes over what lies before `start`.
    pub(super) async fn skip_to(&mut self, start: u64) -> Result<(), SourceError> {
        while self.position < start {
            if self.buffered.is_empty() {
                self.more().await?;
            }
            let skip = (start - self.position).min(self.buffered.len() as u64);
            let _ = self.buffered.split_to(skip as usize);
            self.position += skip;
        }
        Ok(())
    }
}

/// Decodes what arrives on blocking threads, a batch at a time.
pub(super) struct Decoding<'a> {
    layer: &'a Arc<LazyLayer>,
    priority: Priority,
    batch: Vec<Arrived>,
    bytes: usize,
    jobs: FuturesUnordered<JoinHandle<Vec<Claim>>>,
}

impl<'a> Decoding<'a> {
    pub(super) fn new(layer: &'a Arc<LazyLayer>, priority: Priority) -> Self {
        Self {
            layer,
            priority,
            batch: Vec::new(),
            bytes: 0,
            jobs: FuturesUnordered::new(),
        }
    }

    /// Adds a unit. `more` says that the next one is here already, and so can
    /// be decoded together with this.
    pub(super) async fn push(&mut self, arrived: Arrived, more: bool) {
        self.bytes += arrived.bytes.len();
        self.batch.push(arrived);
        if !more || self.bytes >= BATCH {
            self.flush().await;
        }
    }

    async fn flush(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let units = self.batch.iter().map(|arrived| arrived.claim.unit());
        let output = units.map(|unit| decoded_size(self.layer.dir(), unit)).max();
        let engine = self.layer.engine();
        let awaited = self.batch.iter().any(|arrived| arrived.claim.is_awaited());
        let Some(core) = engine.decoder(output.unwrap_or_default(), awaited).await else {
            return;
        };
        let batch = std::mem::take(&mut self.batch);
        self.bytes = 0;
        let layer = Arc::clone(self.layer);
        let priority = self.priority;
        self.jobs.push(spawn_blocking(move || {
            let _core = core;
            decode_all(&layer, priority, batch)
        }));
    }

    /// Waits for all, and returns the units whose bytes were wrong.
    pub(super) async fn finish(mut self) -> Vec<Claim> {
        self.flush().await;
        let mut wrong = Vec::new();
        while let Some(done) = self.jobs.next().await {
            // A job that panicked has dropped its claims, and their waiters
            // try anew.
            wrong.extend(done.unwrap_or_default());
        }
        wrong
    }
}

/// Waits between failed requests, and how long that may go on.
pub(super) struct Patience {
    next: Duration,
    limit: Duration,
    first: Duration,
    deadline: Duration,
    since: Option<Instant>,
    refusals: u32,
}

impl Patience {
    pub(super) fn new(layer: &LazyLayer) -> Self {
        let config = layer.engine().config();
        Self {
            next: config.retry,
            first: config.retry,
            limit: config.retry_limit,
            deadline: config.deadline,
            since: None,
            refusals: 0,
        }
    }

    /// A request is sent: how long it may take until something comes.
    pub(super) fn begin(&mut self) -> Duration {
        let since = *self.since.get_or_insert_with(Instant::now);
        self.deadline.saturating_sub(since.elapsed())
    }

    /// Bytes came.
    pub(super) fn renew(&mut self) {
        self.since = None;
        self.next = self.first;
        self.refusals = 0;
    }

    /// How long to wait before the request is sent again, if it is at all.
    pub(super) fn after(&mut self, error: &SourceError) -> Option<Duration> {
        if !error.transient {
            self.refusals += 1;
            if self.refusals >= REFUSALS {
                return None;
            }
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        let left = self.deadline.checked_sub(since.elapsed())?;
        let wait = self.next.max(error.retry_after.unwrap_or_default());
        self.next = (self.next * 2).min(self.limit);
        (!left.is_zero()).then(|| wait.min(left))
    }
}

/// On what terms units are fetched.
pub(super) struct Terms {
    pub(super) priority: Priority,
    /// For the first request, where it was waited for before.
    pub(super) permit: Option<Permit>,
    /// The turn of a prefetch.
    pub(super) turn: Option<Turn>,
    /// Whether it gives way to readers of anything else.
    pub(super) gives_way: bool,
    /// For all of them, the answer to a request that was sent before.
    pub(super) begun: Option<Arriving>,
}

impl Terms {
    pub(super) fn new(priority: Priority) -> Self {
        Self {
            priority,
            permit: None,
            turn: None,
            gives_way: false,
            begun: None,
        }
    }
}

/// Fetches units that are claimed already, in the order of the blob. The error
/// is that of a registry that did not deliver; whoever waits has it, too.
pub(super) async fn fetch_claimed(
    layer: &Arc<LazyLayer>,
    claims: Vec<Claim>,
    mut terms: Terms,
) -> Result<(), SourceError> {
    crash_point!("fill.claimed");
    claims.iter().for_each(Claim::request);
    let mut pending: VecDeque<(Claim, bool)> = claims.into_iter().map(|c| (c, false)).collect();
    let mut patience = Patience::new(layer);
    let mut failed: Option<SourceError> = None;
    while let (Some((first, _)), Some((last, _))) = (pending.front(), pending.back()) {
        let (first, last) = (first.unit(), last.unit());
        let range = last.offset + last.size - first.offset;
        let largest = pending.iter().map(|(claim, _)| claim.unit().size).max();
        let bytes = window(range, largest.unwrap_or(0));
        let permit = match terms.permit.take() {
            Some(permit) => permit,
            None => admit(layer.engine(), &pending, terms.priority, bytes).await,
        };
        let before = pending.len();
        let limit = patience.begin();
        let attempt = attempt(layer, &mut pending, &mut terms, limit).await;
        drop(permit);
        if pending.len() < before {
            patience.renew();
        }
        let Err(mut error) = attempt else {
            layer.recovered();
            failed = None;
            continue;
        };
        // That time ran out says less than why.
        if error == SourceError::late(layer.engine().config().deadline) {
            error = failed.take().unwrap_or(error);
        }
        failed = Some(error.clone());
        let Some(wait) = patience.after(&error) else {
            layer.report(&error.message, first, "the reader gets EIO");
            let failed = FetchError::Registry {
                layer: layer.digest(),
                why: error.message.clone(),
            };
            for (claim, _) in pending {
                claim.finish(Err(failed.clone()));
            }
            return Err(error);
        };
        layer.report(&error.message, first, "the reader waits");
        tokio::time::sleep(wait).await;
    }
    Ok(())
}

/// Waits for the right to ask for what is pending: as a reader does, once one
/// waits for it. Prefetches that hold all they may have give way to that reader.
async fn admit(
    engine: &Engine,
    pending: &VecDeque<(Claim, bool)>,
    priority: Priority,
    bytes: u64,
) -> Permit {
    let awaited = || pending.iter().any(|(claim, _)| claim.is_awaited());
    tokio::select! {
        biased;
        permit = engine.admission().admit(priority, bytes) => permit,
        () = engine.joined(awaited) => {
            engine.admission().admit(Priority::OnDemand, bytes).await
        }
    }
}

/// The client counts every byte as progress: a registry that breaks off again
/// and again after a few of them must not hold a reader for ever.
async fn within<T>(
    limit: Duration,
    deadline: Duration,
    arrival: impl Future<Output = Result<T, SourceError>>,
) -> Result<T, SourceError> {
    tokio::time::timeout(limit, arrival)
        .await
        .unwrap_or_else(|_| Err(SourceError::late(deadline)))
}

/// One request for all that is pending, which has `limit` until the first unit
/// is here. What has arrived is no longer pending, unless its bytes were wrong
/// the first time.
async fn attempt(
    layer: &Arc<LazyLayer>,
    pending: &mut VecDeque<(Claim, bool)>,
    terms: &mut Terms,
    mut limit: Duration,
) -> Result<(), SourceError> {
    let (Some((first, _)), Some((last, _))) = (pending.front(), pending.back()) else {
        return Ok(());
    };
    let (start, end) = (first.unit().offset, last.unit().offset + last.unit().size);
    let deadline = layer.engine().config().deadline;
    let priority = terms.priority;
    let begun = terms.begun.take().filter(|begun| begun.covers(start, end));
    let mut arriving = match begun {
        Some(begun) => begun,
        None => {
            let request = Arriving::of_layer(layer, start, end, priority);
            within(limit, deadline, request).await?
        }
    };
    let mut decoding = Decoding::new(layer, priority);
    let mut outcome = Ok(());
    while let Some((claim, _)) = pending.front() {
        let unit = claim.unit();
        let engine = layer.engine();
        if terms.gives_way
            && let Some((quiet, longest)) = courtesy(layer)
            && engine.is_jumped(quiet)
        {
            // A reader may wait for what is here.
            decoding.flush().await;
            arriving.pause();
            let awaited = || pending.iter().any(|(claim, _)| claim.is_awaited());
            engine.give_way(quiet, longest, awaited).await;
        }
        let before = arriving.position;
        let take = arriving.take(unit.offset, unit.offset + unit.size);
        let bytes = match within(limit, deadline, take).await {
            Ok(bytes) => {
                limit = deadline;
                if let Some(turn) = &mut terms.turn {
                    turn.arrived(arriving.position - before);
                }
                bytes
            }
            Err(error) => {
                outcome = Err(error);
                break;
            }
        };
        let Some((claim, again)) = pending.pop_front() else {
            break;
        };
        let more = pending.front().is_some_and(|(next, _)| {
            let next = next.unit();
            arriving.has(next.offset + next.size)
        });
        let arrived = Arrived {
            claim,
            bytes,
            again,
        };
        decoding.push(arrived, more).await;
    }
    // The connection is free for others while the last units are decoded.
    let blame = arriving.blame();
    drop(arriving);
    let wrong = decoding.finish().await;
    if !wrong.is_empty() {
        blame();
    }
    pending.extend(wrong.into_iter().map(|claim| (claim, true)));
    pending
        .make_contiguous()
        .sort_by_key(|(claim, _)| claim.unit().offset);
    outcome
}
