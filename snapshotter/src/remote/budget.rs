//! The node's memory for TOCs, however many are read at once.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use sluice_layer::likely_memory;

use super::Error;

/// How long a TOC waits for others to be done before its layer is unpacked
/// instead: a registry that delivers a byte now and then must not hold up
/// every other image of the node.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the semaphores count, in bytes.
const GRAIN: u64 = 1024;

/// The part of the memory in which TOCs arrive, compressed. The rest is for
/// those that are being read: two pools, so that those that arrive slowly do
/// not keep others from being read.
const ARRIVING: u64 = 5;

/// The part of a reading's memory that the tree may take while it grows: its
/// files need some more when they are written.
const TREE: (u64, u64) = (3, 4);

/// The memory. Whoever takes some gives it back by dropping what it got.
#[derive(Debug)]
pub struct TocBudget {
    arriving: Pool,
    reading: Pool,
    patience: Duration,
}

#[derive(Debug)]
struct Pool {
    free: Arc<Semaphore>,
    bytes: u64,
}

/// Memory that is taken.
#[derive(Debug)]
pub struct Taken {
    bytes: u64,
    whole: bool,
    _permit: OwnedSemaphorePermit,
}

impl TocBudget {
    /// A budget of `bytes`, at least a mebibyte.
    pub fn new(bytes: u64) -> Self {
        let bytes = bytes.max(1 << 20);
        Self {
            arriving: Pool::new(bytes / ARRIVING),
            reading: Pool::new(bytes - bytes / ARRIVING),
            patience: PATIENCE,
        }
    }

    /// Memory for a compressed TOC of `bytes`.
    pub(super) async fn arrive(&self, bytes: u64) -> Result<Taken, Error> {
        if bytes > self.arriving.bytes {
            return Err(Error::TocMemory {
                needed: bytes,
                limit: self.arriving.bytes,
            });
        }
        self.arriving.take(bytes, self.patience).await
    }

    /// Memory for reading a TOC that takes `bytes`, or all there is when it
    /// takes more.
    pub async fn read(&self, bytes: u64) -> Result<Taken, Error> {
        self.reading.take(bytes, self.patience).await
    }
}

impl Pool {
    fn new(bytes: u64) -> Self {
        // As many as one call can take.
        let grains = (bytes / GRAIN).min(u64::from(u32::MAX));
        let grains = grains.min(Semaphore::MAX_PERMITS as u64);
        Self {
            free: Arc::new(Semaphore::new(grains as usize)),
            bytes: grains * GRAIN,
        }
    }

    async fn take(&self, bytes: u64, patience: Duration) -> Result<Taken, Error> {
        let bytes = bytes.min(self.bytes);
        let grains = bytes.div_ceil(GRAIN) as u32;
        let taken = Arc::clone(&self.free).acquire_many_owned(grains);
        match tokio::time::timeout(patience, taken).await {
            Ok(Ok(permit)) => Ok(Taken {
                bytes,
                whole: bytes == self.bytes,
                _permit: permit,
            }),
            Ok(Err(_)) | Err(_) => Err(Error::TocsInTheWay(patience)),
        }
    }
}

impl Taken {
    /// Whether there is no more to take.
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// What the tree may take of it.
    pub fn for_tree(&self) -> u64 {
        self.bytes / TREE.1 * TREE.0
    }
}

/// What reading a TOC of `bytes` takes as a rule: its JSON, the tree and its
/// files.
pub(super) fn memory_for(bytes: u64) -> u64 {
    const TAR: u64 = 64 << 10;
    let tree = likely_memory(bytes.saturating_add(TAR));
    (tree / TREE.0 + 1).saturating_mul(TREE.1)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn regression_the_tree_gets_what_it_is_likely_to_take() {
        for size in [1 << 20, 13 << 20, 29 << 20] {
            let budget = TocBudget::new(1 << 30);
            let taken = budget.read(memory_for(size)).await.unwrap();
            let needed = likely_memory(size + 1024);
            assert!((needed..needed * 2).contains(&taken.for_tree()), "{size}");
        }
    }

    #[tokio::test]
    async fn all_together_take_no_more_than_there_is() {
        let budget = TocBudget::new(10 << 20);
        let first = budget.read(5 << 20).await.unwrap();
        assert!(!first.is_whole());
        let second = budget.read(3 << 20).await.unwrap();
        let mut third = Box::pin(budget.read(1 << 20));
        assert!((&mut third).now_or_never().is_none());
        // What arrives does not wait for what is read.
        assert!(budget.arrive(1 << 20).now_or_never().is_some());
        drop(second);
        assert!((&mut third).now_or_never().is_some());
    }

    #[tokio::test]
    async fn who_wants_too_much_gets_all_or_is_refused() {
        let budget = TocBudget::new(10 << 20);
        assert!(budget.read(u64::MAX).await.unwrap().is_whole());
        let refused = budget.arrive(u64::MAX).await.unwrap_err().to_string();
        assert!(refused.contains("toc_memory_mib"), "{refused}");
    }

    #[tokio::test]
    async fn nobody_waits_for_ever() {
        let budget = TocBudget {
            patience: Duration::from_millis(1),
            ..TocBudget::new(10 << 20)
        };
        let _held = budget.read(u64::MAX).await.unwrap();
        let refused = budget.read(1).await.unwrap_err().to_string();
        assert!(refused.contains("toc_memory_mib"), "{refused}");
    }
}
