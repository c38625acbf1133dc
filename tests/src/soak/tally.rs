//! What happened during a soak.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};

/// Counts that all workers share.
#[derive(Debug, Default)]
pub struct Tally {
    /// Containers that ran to their end, having compared all their files.
    pub starts: AtomicU64,
    /// Calls to containerd that failed while a daemon or the network was gone,
    /// and were made again.
    pub again: AtomicU64,
    /// Images that were pulled, and removed.
    pub images: AtomicU64,
    /// Files that were read and compared from outside of containers.
    pub reads: AtomicU64,
    /// Times that a daemon was killed.
    pub kills: AtomicU64,
    /// Times that it was replaced in good order.
    pub upgrades: AtomicU64,
    /// Faults of the network that had an effect, by name.
    pub faults: Mutex<BTreeMap<&'static str, u64>>,
    /// Reads that failed or brought wrong bytes.
    pub failures: Mutex<Vec<String>>,
    next_id: AtomicU64,
}

impl Tally {
    pub(super) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// A number that no container had.
    pub(super) fn ids(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// What the proxy has done so far, and further times that it was away.
    pub(super) fn note_faults(&self, struck: &BTreeMap<&'static str, u64>, outages: u64) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.extend(struck);
        *faults.entry("outage").or_default() += outages;
    }

    pub(super) fn fail(&self, what: String) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.push(what);
    }

    /// Fails when something failed that must not, or when nothing was tried.
    pub fn check(&self) -> Result<()> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(failures.is_empty(), "{}", failures.join("\n"));
        for (what, counter) in [
            ("container was started", &self.starts),
            ("image was removed", &self.images),
            ("file was read", &self.reads),
            ("daemon was killed", &self.kills),
            ("daemon was replaced", &self.upgrades),
        ] {
            ensure!(counter.load(Ordering::Relaxed) > 0, "no {what}");
        }
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(!faults.is_empty(), "no fault had an effect");
        Ok(())
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        write!(
            f,
            "{} starts, {} reads, {} images pulled and removed; {} kills, {} upgrades, {} network \
             faults injected ({faults:?}); {} calls made again; {} failures",
            number(&self.starts),
            number(&self.reads),
            number(&self.images),
            number(&self.kills),
            number(&self.upgrades),
            faults.values().sum::<u64>(),
            number(&self.again),
            failures.len(),
        )
    }
}
