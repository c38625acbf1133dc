//! One layer that is fetched as it is read.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use sluice_layer::Unit;
use sluice_oci::Digest;
use tokio_util::sync::CancellationToken;

use super::activity::{Activity, Counters};
use super::dependencies::Followed;
use super::engine::Engine;
use super::foreseen::Foreseen;
use super::inflight::{Abandoned, Claim, InFlight, Waiter};
use super::plan;
use super::readahead::ReadAhead;
use super::reads::Reads;
use super::reuse::Asked;
use super::stream::{self, Terms};
use super::trace::{Recording, Trace};
use super::{FetchError, Link, Priority, RangeSource, Unstored};
use crate::fuse::Content;
use crate::layer_dir::{ChunkId, LayerDir};

/// Finds the file that an offset of `data` belongs to, for messages.
pub type PathOf = Box<dyn Fn(u64) -> Option<PathBuf> + Send + Sync>;

/// How often a read takes over fetches that others gave up.
const ATTEMPTS: usize = 16;

/// Causes of trouble that are told until bytes come again.
const CAUSES: usize = 32;

/// A layer's directory and where its missing bytes come from.
pub struct LazyLayer {
    pub(super) me: Weak<Self>,
    pub(super) dir: Arc<LayerDir>,
    source: Box<dyn RangeSource>,
    pub(super) engine: Engine,
    pub(super) link: Arc<Link>,
    pub(super) in_flight: InFlight,
    pub(super) read_ahead: ReadAhead,
    pub(super) reads: Reads,
    pub(super) followed: Followed,
    pub(super) foreseen: Foreseen,
    path_of: PathOf,
    trouble: Mutex<HashSet<String>>,
    closed: CancellationToken,
    /// Chunks that the disk did not give back, and how often.
    pub(super) unreadable: Mutex<HashMap<ChunkId, u32>>,
    counters: Counters,
    trace: Trace,
    mended: Mutex<Option<String>>,
    /// Whether it was told that another layer's bytes are not what they were.
    rotten: AtomicBool,
}

impl std::fmt::Debug for LazyLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LazyLayer")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl LazyLayer {
    /// A layer whose missing bytes `source` has.
    pub fn new(
        dir: LayerDir,
        source: Box<dyn RangeSource>,
        engine: &Engine,
        path_of: PathOf,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            link: engine.link(source.host()),
            read_ahead: ReadAhead::default(),
            reads: Reads::new(dir.chunks().len()),
            followed: Followed::default(),
            foreseen: Foreseen::default(),
            engine: engine.clone(),
            in_flight: InFlight::default(),
            trouble: Mutex::default(),
            closed: CancellationToken::new(),
            unreadable: Mutex::default(),
            counters: Counters::default(),
            trace: Trace::new(dir.chunks().len()),
            mended: Mutex::default(),
            path_of,
            source,
            dir: Arc::new(dir),
            rotten: AtomicBool::new(false),
        })
    }

    /// Its directory.
    pub fn dir(&self) -> &LayerDir {
        &self.dir
    }

    /// The same, for as long as somebody reads it.
    pub fn shared_dir(&self) -> Arc<LayerDir> {
        Arc::clone(&self.dir)
    }

    /// Its digest.
    pub fn digest(&self) -> Digest {
        self.dir.identity().digest
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(super) fn source(&self) -> &dyn RangeSource {
        self.source.as_ref()
    }

    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    pub(super) fn reads(&self) -> &Reads {
        &self.reads
    }

    /// What is cancelled when the layer is closed.
    pub fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// Fetches chunks that nobody reads now, soon.
    pub fn fetch_again(self: &Arc<Self>, chunks: &[ChunkId]) {
        self.start(
            self.claim_chunks(chunks, &BTreeSet::new()),
            Asked::default(),
        );
    }

    /// What was wrong with the directory when it was opened, and is mended.
    pub fn mended(&self) -> Option<String> {
        self.mended.lock().clone()
    }

    /// Notes what was wrong with the directory.
    pub fn was_mended(&self, what: String) {
        *self.mended.lock() = Some(what);
    }

    /// What happened to it since it was opened.
    pub fn activity(&self) -> Activity {
        self.counters.get()
    }

    pub(super) fn count_reused(&self, bytes: u64) {
        self.counters.reused(bytes);
    }

    pub(super) fn count_decoded(&self, priority: Priority, bytes: u64) {
        self.counters.fetched(priority, bytes);
    }

    /// Records what is read of it from now on.
    pub fn record(self: &Arc<Self>) -> Recording {
        Recording::begin(Arc::clone(self))
    }

    pub(super) fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Ends all fetches; readers that wait get an error.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Whether no chunk of a unit has to be fetched, as far as is known.
    pub(super) fn has_unit(&self, unit: Unit) -> bool {
        let (present, claimed) = (self.dir.present(), self.dir.claimed());
        self.dir.is_complete()
            || self
                .dir
                .chunks()
                .of_unit(unit.offset)
                .all(|chunk| present.contains(chunk) || claimed.contains(chunk))
    }

    /// Waits with whoever has asked a registry for the chunk.
    pub(super) fn coming(&self, chunk: ChunkId) -> Option<Waiter> {
        self.in_flight.coming(self.dir.chunks().get(chunk).unit)
    }

    pub(super) fn claim(&self, unit: Unit) -> Option<Claim> {
        self.in_flight.claim(unit, |unit| self.has_unit(unit))
    }

    /// What is about to run is what the layer's plan is of, if it has one, or
    /// something else: then it is not followed before some of it is read all the
    /// same.
    pub fn judge_plan(&self, fits: bool) {
        self.reads.judge_plan(fits);
    }

    /// Returns when `offset..offset + len` of `data` is present, but for what
    /// it returns.
    pub async fn fetch(self: &Arc<Self>, offset: u64, len: u64) -> Result<Unstored, FetchError> {
        let mut demand = self.engine.demand();
        self.settle(offset, len).await;
        let mut unstored = self.kept_unstored(offset, len);
        let mut failure = None;
        for attempt in 0..ATTEMPTS {
            let table = self.dir.chunks();
            let missing: Vec<ChunkId> = table
                .overlapping(offset, len)
                .filter(|&chunk| !self.dir.present().contains(chunk))
                .filter(|&chunk| unstored.get(chunk).is_none())
                .collect();
            let (Some(&first), Some(&last)) = (missing.first(), missing.last()) else {
                // Perhaps the fetch failed only for what lies beside.
                return Ok(unstored);
            };
            if let Some(failure) = failure {
                return Err(failure);
            }
            if self.closed.is_cancelled() {
                return Err(FetchError::Closed);
            }
            let units: BTreeSet<Unit> = missing.iter().map(|&c| table.get(c).unit).collect();
            let (mut claims, waiters) = self
                .in_flight
                .join(units.iter().copied(), |u| self.has_unit(u));
            if claims.len() < waiters.len() {
                self.engine.join();
            }
            // What comes by plan needs no way made for it.
            let beside = |&chunk: &ChunkId| !self.reads.is_planned(chunk, &table.get(chunk));
            if !claims.is_empty() || missing.iter().any(beside) {
                demand.jump();
            }
            if attempt == 0 && !claims.is_empty() && !self.engine.storage().is_failing() {
                let before = self.guess(first, last, &units, &mut claims);
                self.start(before, Asked::default());
            }
            let new = attempt == 0 && !claims.is_empty();
            let range = offset..offset.saturating_add(len);
            self.start(claims, Asked { units, range });
            // What is planned comes with what else is.
            let begins = |&&chunk: &&ChunkId| table.kin(chunk).is_some() && beside(&chunk);
            if new && let Some(&file) = missing.iter().find(begins) {
                self.fetch_relatives(file, self.engine.number_read());
            }
            for waiter in waiters {
                match waiter.wait().await {
                    Ok(Ok(more)) => unstored.extend(more, table, offset, len),
                    Ok(Err(error)) => failure = Some(error),
                    // One that was abandoned is taken over in the next round.
                    Err(Abandoned) => {}
                }
            }
        }
        Err(FetchError::Registry {
            layer: self.digest(),
            why: "fetches of the same bytes were given up again and again".to_owned(),
        })
    }

    /// Starts to bring claimed units.
    pub(super) fn start(self: &Arc<Self>, claims: Vec<Claim>, asked: Asked) {
        self.start_over(claims, self.link.worthwhile_gap(), asked);
    }

    /// The same, over gaps of so many bytes.
    pub(super) fn start_over(self: &Arc<Self>, mut claims: Vec<Claim>, gap: u64, asked: Asked) {
        if claims.is_empty() {
            return;
        }
        if self.engine.finder().is_some() {
            self.spawn(Arc::clone(self).bring(claims, gap, asked, None));
            return;
        }
        let gaps = self.claim_gaps(&mut claims, gap);
        claims.extend(gaps);
        self.request(claims, &asked.units);
    }

    /// Asks for claimed units in as few requests as pay.
    pub(super) fn request(self: &Arc<Self>, mut claims: Vec<Claim>, asked: &BTreeSet<Unit>) {
        claims.sort_by_key(|claim| claim.unit().offset);
        let longest = self.engine.config().longest_range;
        for planned in plan::group(claims, Claim::unit, 0, longest) {
            let waits = |claim: &Claim| asked.contains(&claim.unit());
            let priority = if planned.wanted.iter().any(waits) {
                Priority::OnDemand
            } else {
                Priority::Prefetch
            };
            let layer = Arc::clone(self);
            self.spawn(async move {
                // Whoever waits is told of errors by the claims.
                let terms = Terms::new(priority);
                let _ = stream::fetch_claimed(&layer, planned.wanted, terms).await;
            });
        }
    }

    /// Asks for claimed units in one request.
    pub(super) fn request_on(self: &Arc<Self>, mut claims: Vec<Claim>, mut terms: Terms) {
        claims.sort_by_key(|claim| claim.unit().offset);
        let (Some(first), Some(last)) = (claims.first(), claims.last()) else {
            return;
        };
        if let Some(turn) = &mut terms.turn {
            turn.resize(last.unit().offset + last.unit().size - first.unit().offset);
        }
        let layer = Arc::clone(self);
        self.spawn(async move {
            // Who waits is told of errors by the claims.
            let _ = stream::fetch_claimed(&layer, claims, terms).await;
        });
    }

    /// Claims the units that lie in small gaps between claimed ones: their
    /// bytes come along, and count. Bytes that are here, or on their way, are
    /// never asked for again.
    pub(super) fn claim_gaps(&self, claims: &mut [Claim], gap: u64) -> Vec<Claim> {
        claims.sort_by_key(|claim| claim.unit().offset);
        let mut between = Vec::new();
        for pair in claims.windows(2) {
            let (before, after) = (pair[0].unit(), pair[1].unit());
            let end = before.offset + before.size;
            if (1..=gap).contains(&after.offset.saturating_sub(end)) {
                let units = self.dir.chunks().units_from(end);
                let units = units.take_while(|unit| unit.offset < after.offset);
                between.extend(units.filter_map(|unit| self.claim(unit)));
            }
        }
        between
    }

    /// Runs until the layer is closed. Claims that are dropped unfinished wake
    /// their waiters.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let closed = self.closed.clone();
        self.engine.runtime().spawn(async move {
            closed.run_until_cancelled(work).await;
        });
    }

    /// Says what is wrong and what that means, once for each cause until bytes
    /// come again.
    pub(super) fn report(&self, cause: &str, unit: Unit, outlook: &str) {
        let mut trouble = self.trouble.lock();
        // A registry can word every refusal in a new way.
        if trouble.len() >= CAUSES || !trouble.insert(format!("{cause}; {outlook}")) {
            return;
        }
        drop(trouble);
        let chunk = self.dir.chunks().of_unit(unit.offset).next();
        let path = chunk.map(|chunk| self.path_at(self.dir.chunks().get(chunk).data_offset));
        let path = path.unwrap_or_else(|| "?".into());
        tracing::warn!(
            layer = %self.digest(),
            path = %path.display(),
            "cannot fetch content: {cause}; {outlook}"
        );
    }

    /// The file that an offset of `data` belongs to, for messages.
    pub(super) fn path_at(&self, offset: u64) -> PathBuf {
        (self.path_of)(offset).unwrap_or_else(|| "?".into())
    }

    /// What another layer was thought to have is not what it has.
    pub(super) fn not_there(&self, other: &LayerDir, offset: u64, error: Option<io::Error>) {
        if self.rotten.swap(true, Ordering::Relaxed) {
            return;
        }
        let what = error.map_or_else(
            || "is not what was stored there".to_owned(),
            |error| format!("cannot be read: {error}"),
        );
        tracing::warn!(
            layer = %self.digest(),
            "{} from byte {offset} {what}; what was to be taken from there is fetched; run \
             'sluice-snapshotter scrub'",
            other.data_path().display()
        );
    }

    /// Bytes have come.
    pub(super) fn recovered(&self) {
        let mut trouble = self.trouble.lock();
        if !trouble.is_empty() {
            trouble.clear();
            tracing::info!(layer = %self.digest(), "content is fetched again");
        }
    }
}

impl Content for LazyLayer {
    fn size(&self) -> u64 {
        self.dir.identity().data_size
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        if self.trace.is_active() {
            let chunks = self.dir.chunks().overlapping(offset, buffer.len() as u64);
            self.trace.note(chunks);
        }
        let len = buffer.len() as u64;
        let complete = self.dir.is_complete();
        if !complete && !self.dir.has(offset, len) {
            return Ok(false);
        }
        if let Err(error) = self.dir.read_at(buffer, offset) {
            // What the disk does not give, the registry does.
            self.unreadable(offset, len, &error);
            return Ok(false);
        }
        self.counters.read();
        if !complete {
            self.note_read(offset, len);
        }
        Ok(true)
    }

    fn read_missing(
        self: Arc<Self>,
        offset: u64,
        len: usize,
    ) -> BoxFuture<'static, io::Result<Vec<u8>>> {
        self.counters.waits();
        Box::pin(async move {
            let read = self.fetch_and_read(offset, len).await;
            if read.is_ok() {
                self.counters.read();
            }
            Ok(read.inspect_err(|error| {
                if let FetchError::Corrupt { .. } | FetchError::Disk { .. } = error {
                    let chunk = self.dir.chunks().overlapping(offset, len as u64).next();
                    if let Some(chunk) = chunk {
                        let unit = self.dir.chunks().get(chunk).unit;
                        self.report(&error.to_string(), unit, "the reader gets EIO");
                    }
                }
            })?)
        })
    }
}
