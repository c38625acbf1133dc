//! What all layers of the node share when they fetch.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout};

use super::activity::UnderWay;
use super::room::Room;
use super::unstored::Storage;
use super::{Admission, ChunkFinder, Link, LinkFigures, Request};

/// How the node fetches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Bytes of fetched, not yet decoded data in memory at once, and as many
    /// of what it is decoded to.
    pub memory: u64,
    /// Requests under way at once.
    pub connections: u64,
    /// How long a read waits for a registry that does not deliver before it
    /// gets EIO.
    pub deadline: Duration,
    /// The first wait before a failed request is sent again; it doubles.
    pub retry: Duration,
    /// The longest such wait.
    pub retry_limit: Duration,
    /// The longest range of one on-demand request, in bytes.
    pub longest_range: u64,
    /// How far ahead of a reader is fetched at most, in bytes; with 0, nothing
    /// is fetched but what is asked for.
    pub read_ahead: u64,
    /// Units decoded at once.
    pub decoders: usize,
}

impl Default for Config {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self {
            memory: 64 << 20,
            connections: 32,
            deadline: Duration::from_secs(300),
            retry: Duration::from_millis(100),
            retry_limit: Duration::from_secs(5),
            longest_range: 4 << 20,
            read_ahead: 32 << 20,
            decoders: cores,
        }
    }
}

/// The node's fetch engine. Clones are the same engine.
#[derive(Debug, Clone)]
pub struct Engine(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    runtime: Handle,
    config: Config,
    admission: Admission,
    decoders: Arc<Semaphore>,
    /// How many of them may decode what nobody waits for.
    unhurried: Arc<Semaphore>,
    /// Kibibytes that may be decoded to at once.
    decoded: Arc<Semaphore>,
    links: Mutex<HashMap<String, Arc<Link>>>,
    demand: Demand,
    storage: Storage,
    room: Room,
    under_way: UnderWay,
    proving: Semaphore,
    finder: Option<Arc<dyn ChunkFinder>>,
    /// Files that were read so far and name others.
    read: AtomicU64,
}

/// Part of the memory that may hold what the disk does not take.
const UNSTORED: u64 = 4;

/// Readers that wait now.
#[derive(Debug)]
struct Demand {
    waiting: AtomicU64,
    /// Those for whose sake requests of their own are under way.
    jumping: AtomicU64,
    started: Instant,
    /// Milliseconds from `started` to when the last reader stopped waiting, and
    /// to when the last stopped for whose sake there was a request.
    last_end: AtomicU64,
    last_jump: AtomicU64,
    changed: Notify,
}

/// How long no reader may have waited before background work goes on.
const IDLE: Duration = Duration::from_millis(50);

impl Engine {
    /// An engine with nothing to do, whose tasks run on `runtime`.
    pub fn new(config: Config, runtime: Handle) -> Self {
        Self::build(config, runtime, None)
    }

    /// The same, of which no layer fetches what `finder` knows elsewhere.
    pub fn with_finder(config: Config, runtime: Handle, finder: Arc<dyn ChunkFinder>) -> Self {
        Self::build(config, runtime, Some(finder))
    }

    fn build(config: Config, runtime: Handle, finder: Option<Arc<dyn ChunkFinder>>) -> Self {
        Self(Arc::new(Shared {
            runtime,
            admission: Admission::new(config.memory, config.connections),
            decoders: Arc::new(Semaphore::new(config.decoders.max(1))),
            unhurried: Arc::new(Semaphore::new(config.decoders.saturating_sub(1).max(1))),
            decoded: Arc::new(Semaphore::new(kibibytes(config.memory) as usize)),
            links: Mutex::default(),
            demand: Demand {
                waiting: AtomicU64::new(0),
                jumping: AtomicU64::new(0),
                started: Instant::now(),
                last_end: AtomicU64::new(0),
                last_jump: AtomicU64::new(0),
                changed: Notify::new(),
            },
            storage: Storage::new(config.memory / UNSTORED),
            room: Room::default(),
            under_way: UnderWay::default(),
            proving: Semaphore::new(1),
            finder,
            read: AtomicU64::new(0),
            config,
        }))
    }

    /// Its configuration.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Where its tasks run.
    pub(super) fn runtime(&self) -> &Handle {
        &self.0.runtime
    }

    /// Who knows what other layers hold.
    pub(super) fn finder(&self) -> Option<&dyn ChunkFinder> {
        self.0.finder.as_deref()
    }

    /// The number of a file that is read just now.
    pub(super) fn number_read(&self) -> u64 {
        self.0.read.fetch_add(1, Ordering::Relaxed)
    }

    /// Its budget.
    pub fn admission(&self) -> &Admission {
        &self.0.admission
    }

    /// How the disk takes what is fetched.
    pub(super) fn storage(&self) -> &Storage {
        &self.0.storage
    }

    /// Says for how many bytes the background download has room on the disk:
    /// for any number, until this is called. Readers are not concerned.
    pub fn set_room(&self, bytes: u64) {
        self.0.room.set(bytes);
    }

    /// What there is for the background download.
    pub(super) fn room(&self) -> &Room {
        &self.0.room
    }

    pub(super) fn under_way(&self) -> &UnderWay {
        &self.0.under_way
    }

    /// The requests that are under way, the oldest first.
    pub fn requests(&self) -> Vec<Request> {
        self.0.under_way.list()
    }

    /// Readers that wait now.
    pub fn waiting(&self) -> u64 {
        self.0.demand.waiting.load(Ordering::Relaxed)
    }

    /// What is known of the links, by host.
    pub fn links(&self) -> Vec<(String, LinkFigures)> {
        let links = self.0.links.lock();
        let mut links: Vec<_> = links
            .iter()
            .map(|(host, link)| (host.clone(), link.figures()))
            .collect();
        links.sort_by(|(a, _), (b, _)| a.cmp(b));
        links
    }

    /// What is known of the link to `host`.
    pub fn link(&self, host: &str) -> Arc<Link> {
        let mut links = self.0.links.lock();
        match links.get(host) {
            Some(link) => Arc::clone(link),
            None => Arc::clone(links.entry(host.to_owned()).or_default()),
        }
    }

    /// Waits for a core to decode on, and for memory for `bytes` of output:
    /// more than there may be at once counts as all of it. What nobody waits
    /// for leaves one core to programs.
    pub(super) async fn decoder(&self, bytes: u64, awaited: bool) -> Option<Decoder> {
        let unhurried = match awaited {
            true => None,
            false => Some(Arc::clone(&self.0.unhurried).acquire_owned().await.ok()?),
        };
        let output = kibibytes(bytes.min(self.0.config.memory));
        let output = Arc::clone(&self.0.decoded).acquire_many_owned(output);
        Some(Decoder {
            _unhurried: unhurried,
            _output: output.await.ok()?,
            _core: Arc::clone(&self.0.decoders).acquire_owned().await.ok()?,
        })
    }

    /// Waits for the turn to put a layer's tar together: one at a time does
    /// it. None when the engine ends.
    pub async fn prover(&self) -> Option<SemaphorePermit<'_>> {
        self.0.proving.acquire().await.ok()
    }

    /// A reader waits until the guard is dropped.
    pub(super) fn demand(&self) -> DemandGuard {
        self.0.demand.waiting.fetch_add(1, Ordering::AcqRel);
        DemandGuard {
            engine: self.clone(),
            jumps: false,
        }
    }

    /// Returns when no reader has waited for a while, or after `longest`.
    pub async fn idle(&self, longest: Duration) {
        let _ = timeout(longest, self.quiet()).await;
    }

    /// Whether no reader has waited for a while.
    pub(super) fn is_idle(&self) -> bool {
        let demand = &self.0.demand;
        demand.waiting.load(Ordering::Acquire) == 0
            && demand.left_of(IDLE, &demand.last_end).is_zero()
    }

    async fn quiet(&self) {
        loop {
            let demand = &self.0.demand;
            let changed = demand.changed.notified();
            if demand.waiting.load(Ordering::Acquire) > 0 {
                changed.await;
                continue;
            }
            let busy = demand.left_of(IDLE, &demand.last_end);
            if busy.is_zero() {
                return;
            }
            tokio::time::sleep(busy).await;
        }
    }

    /// Whether requests are under way for readers that wait, or were until less
    /// than `quiet` ago.
    pub(super) fn is_jumped(&self, quiet: Duration) -> bool {
        let demand = &self.0.demand;
        demand.jumping.load(Ordering::Acquire) > 0
            || !demand.left_of(quiet, &demand.last_jump).is_zero()
    }

    /// Returns when that is over, when a reader has come to wait for the
    /// caller's own work, or after `longest`.
    pub(super) async fn give_way(
        &self,
        quiet: Duration,
        longest: Duration,
        awaited: impl Fn() -> bool,
    ) {
        let demand = &self.0.demand;
        let free = async {
            loop {
                let changed = demand.changed.notified();
                if awaited() {
                    return;
                }
                if demand.jumping.load(Ordering::Acquire) > 0 {
                    changed.await;
                    continue;
                }
                let left = demand.left_of(quiet, &demand.last_jump);
                if left.is_zero() {
                    return;
                }
                let _ = timeout(left, changed).await;
            }
        };
        let _ = timeout(longest, free).await;
    }

    /// Somebody waits for what others fetch: they are to know.
    pub(super) fn join(&self) {
        self.0.demand.changed.notify_waiters();
    }

    /// Returns when a reader has come to wait for the caller's own work.
    pub(super) async fn joined(&self, awaited: impl Fn() -> bool) {
        loop {
            let changed = self.0.demand.changed.notified();
            if awaited() {
                return;
            }
            changed.await;
        }
    }
}

impl Demand {
    /// What is left of `time` since `end`, one of the counts of milliseconds.
    fn left_of(&self, time: Duration, end: &AtomicU64) -> Duration {
        match end.load(Ordering::Acquire) {
            0 => Duration::ZERO,
            end => {
                let end = Duration::from_millis(end);
                time.saturating_sub(self.started.elapsed().saturating_sub(end))
            }
        }
    }
}

/// The right to decode, until it is dropped.
#[derive(Debug)]
pub(super) struct Decoder {
    _unhurried: Option<OwnedSemaphorePermit>,
    _output: OwnedSemaphorePermit,
    _core: OwnedSemaphorePermit,
}

fn kibibytes(bytes: u64) -> u32 {
    u32::try_from(bytes / 1024).unwrap_or(u32::MAX).max(1)
}

/// While it lives, a reader waits.
#[derive(Debug)]
pub(super) struct DemandGuard {
    engine: Engine,
    jumps: bool,
}

impl DemandGuard {
    /// The reader's bytes are asked for by requests of its own.
    pub(super) fn jump(&mut self) {
        if !std::mem::replace(&mut self.jumps, true) {
            self.engine.0.demand.jumping.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Drop for DemandGuard {
    fn drop(&mut self) {
        let demand = &self.engine.0.demand;
        let now = (demand.started.elapsed().as_millis() as u64).max(1);
        demand.last_end.store(now, Ordering::Release);
        if self.jumps {
            demand.last_jump.store(now, Ordering::Release);
        }
        let none_jumps = self.jumps && demand.jumping.fetch_sub(1, Ordering::AcqRel) == 1;
        let none_waits = demand.waiting.fetch_sub(1, Ordering::AcqRel) == 1;
        if none_jumps || none_waits {
            demand.changed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn what_nobody_waits_for_leaves_one_core() {
        for (decoders, unhurried) in [(1, 1), (2, 1), (4, 3)] {
            let config = Config {
                decoders,
                ..Config::default()
            };
            let engine = Engine::new(config, Handle::current());
            let decoder = |awaited| engine.decoder(1, awaited).now_or_never().flatten();
            let mut held: Vec<Decoder> = (0..unhurried).filter_map(|_| decoder(false)).collect();
            assert_eq!(held.len(), unhurried);
            assert!(decoder(false).is_none(), "{decoders}");
            assert_eq!(decoder(true).is_some(), decoders > unhurried);
            held.pop();
            assert!(decoder(false).is_some());
        }
    }
}
