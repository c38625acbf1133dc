//! What all layers of the node share when they fetch.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::activity::UnderWay;
use super::unstored::Storage;
use super::{Admission, Link, LinkFigures, Request};

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
    /// How far ahead of a sequential reader is fetched at most, in bytes.
    pub read_ahead: u64,
    /// Units decoded at once.
    pub decoders: usize,
}

impl Default for Config {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        Self {
            memory: 64 << 20,
            connections: 16,
            deadline: Duration::from_secs(300),
            retry: Duration::from_millis(100),
            retry_limit: Duration::from_secs(5),
            longest_range: 4 << 20,
            read_ahead: 16 << 20,
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
    /// Kibibytes that may be decoded to at once.
    decoded: Arc<Semaphore>,
    links: Mutex<HashMap<String, Arc<Link>>>,
    demand: Demand,
    storage: Storage,
    under_way: UnderWay,
}

/// Part of the memory that may hold what the disk does not take.
const UNSTORED: u64 = 4;

/// Readers that wait now.
#[derive(Debug)]
struct Demand {
    waiting: AtomicU64,
    started: Instant,
    /// Milliseconds from `started` to when the last reader stopped waiting.
    last_end: AtomicU64,
    none: Notify,
}

/// How long no reader may have waited before background work goes on.
const IDLE: Duration = Duration::from_millis(50);

impl Engine {
    /// An engine with nothing to do, whose tasks run on `runtime`.
    pub fn new(config: Config, runtime: Handle) -> Self {
        Self(Arc::new(Shared {
            runtime,
            admission: Admission::new(config.memory, config.connections),
            decoders: Arc::new(Semaphore::new(config.decoders.max(1))),
            decoded: Arc::new(Semaphore::new(kibibytes(config.memory) as usize)),
            links: Mutex::default(),
            demand: Demand {
                waiting: AtomicU64::new(0),
                started: Instant::now(),
                last_end: AtomicU64::new(0),
                none: Notify::new(),
            },
            storage: Storage::new(config.memory / UNSTORED),
            under_way: UnderWay::default(),
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

    /// Its budget.
    pub fn admission(&self) -> &Admission {
        &self.0.admission
    }

    /// How the disk takes what is fetched.
    pub(super) fn storage(&self) -> &Storage {
        &self.0.storage
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
    pub(super) fn link(&self, host: &str) -> Arc<Link> {
        let mut links = self.0.links.lock();
        match links.get(host) {
            Some(link) => Arc::clone(link),
            None => Arc::clone(links.entry(host.to_owned()).or_default()),
        }
    }

    /// Waits for a core to decode on, and for memory for `bytes` of output:
    /// more than there may be at once counts as all of it.
    pub(super) async fn decoder(&self, bytes: u64) -> Option<Decoder> {
        let output = kibibytes(bytes.min(self.0.config.memory));
        let output = Arc::clone(&self.0.decoded).acquire_many_owned(output);
        Some(Decoder {
            _output: output.await.ok()?,
            _core: Arc::clone(&self.0.decoders).acquire_owned().await.ok()?,
        })
    }

    /// A reader waits until the guard is dropped.
    pub(super) fn demand(&self) -> DemandGuard {
        self.0.demand.waiting.fetch_add(1, Ordering::AcqRel);
        DemandGuard(self.clone())
    }

    /// Returns when no reader has waited for a while.
    pub async fn idle(&self) {
        let demand = &self.0.demand;
        loop {
            let none = demand.none.notified();
            if demand.waiting.load(Ordering::Acquire) > 0 {
                none.await;
                continue;
            }
            let end = Duration::from_millis(demand.last_end.load(Ordering::Acquire));
            let quiet = demand.started.elapsed().saturating_sub(end);
            if end.is_zero() || quiet >= IDLE {
                return;
            }
            tokio::time::sleep(IDLE.saturating_sub(quiet)).await;
        }
    }
}

/// The right to decode, until it is dropped.
#[derive(Debug)]
pub(super) struct Decoder {
    _output: OwnedSemaphorePermit,
    _core: OwnedSemaphorePermit,
}

fn kibibytes(bytes: u64) -> u32 {
    u32::try_from(bytes / 1024).unwrap_or(u32::MAX).max(1)
}

/// While it lives, a reader waits.
#[derive(Debug)]
pub(super) struct DemandGuard(Engine);

impl Drop for DemandGuard {
    fn drop(&mut self) {
        let demand = &self.0.0.demand;
        let now = demand.started.elapsed().as_millis() as u64;
        demand.last_end.store(now.max(1), Ordering::Release);
        if demand.waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
            demand.none.notify_waiters();
        }
    }
}
