//! What the cache's quota leaves for content that nobody asked for.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

/// Bytes that may be fetched ahead until somebody looks at the disk again.
#[derive(Debug)]
pub(super) struct Room {
    left: AtomicU64,
    changed: Notify,
}

impl Default for Room {
    /// As much as one likes.
    fn default() -> Self {
        Self {
            left: AtomicU64::new(u64::MAX),
            changed: Notify::new(),
        }
    }
}

impl Room {
    /// There is room for `bytes`.
    pub(super) fn set(&self, bytes: u64) {
        self.left.store(bytes, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Whether there is any.
    pub(super) fn is_left(&self) -> bool {
        self.left.load(Ordering::Acquire) > 0
    }

    /// Uses up `bytes`, or what is left.
    pub(super) fn take(&self, bytes: u64) {
        let less = |left: u64| (left != u64::MAX).then(|| left.saturating_sub(bytes));
        let _ = (self.left).fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
    }

    /// Returns when there is some.
    pub(super) async fn wait(&self) {
        loop {
            let changed = self.changed.notified();
            if self.is_left() {
                return;
            }
            changed.await;
        }
    }
}
