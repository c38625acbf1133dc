//! What a layer and the node have done and are doing, for whoever looks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use sluice_oci::Digest;
use tokio::time::Instant;

use super::Priority;

/// What happened to a layer since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Activity {
    /// Reads that were answered.
    pub reads: u64,
    /// Reads that had to wait for a fetch; those under way included.
    pub waited: u64,
    /// Compressed bytes of units that were fetched and decoded, by
    /// [`Priority`].
    pub fetched: [u64; 3],
    /// Uncompressed bytes of chunks that were taken from other layers.
    pub reused: u64,
}

/// Counts it. Relaxed: figures for people, which decide nothing.
#[derive(Debug, Default)]
pub(super) struct Counters {
    reads: AtomicU64,
    waited: AtomicU64,
    fetched: [AtomicU64; 3],
    reused: AtomicU64,
}

impl Counters {
    pub(super) fn read(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn waits(&self) {
        self.waited.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn fetched(&self, priority: Priority, bytes: u64) {
        self.fetched[priority as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn reused(&self, bytes: u64) {
        self.reused.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Activity {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Activity {
            reads: load(&self.reads),
            waited: load(&self.waited),
            fetched: self.fetched.each_ref().map(load),
            reused: load(&self.reused),
        }
    }
}

/// A request that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Of which layer's blob.
    pub layer: Digest,
    /// Where the range begins.
    pub start: u64,
    /// Where it ends.
    pub end: u64,
    /// Why.
    pub priority: Priority,
    /// Since when.
    pub since: Instant,
}

impl Request {
    /// How long it has been under way.
    pub fn age(&self) -> Duration {
        self.since.elapsed()
    }
}

/// The requests that are under way.
#[derive(Debug, Clone, Default)]
pub(super) struct UnderWay(Arc<Mutex<Requests>>);

#[derive(Debug, Default)]
struct Requests {
    next: u64,
    all: BTreeMap<u64, Request>,
}

impl UnderWay {
    /// Notes a request until the guard is dropped.
    pub(super) fn enter(&self, request: Request) -> Entered {
        let mut requests = self.0.lock();
        let number = requests.next;
        requests.next += 1;
        requests.all.insert(number, request);
        Entered(self.clone(), number)
    }

    /// All of them, the oldest first.
    pub(super) fn list(&self) -> Vec<Request> {
        self.0.lock().all.values().copied().collect()
    }
}

/// While it lives, a request is under way.
#[derive(Debug)]
pub(super) struct Entered(UnderWay, u64);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.0.lock().all.remove(&self.1);
    }
}
