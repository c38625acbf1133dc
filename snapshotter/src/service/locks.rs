//! Who makes, records or removes a layer does so alone.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use sluice_oci::Digest;
use tokio::sync::OwnedMutexGuard;

/// One lock a layer, there only while someone holds or awaits it.
#[derive(Debug, Default)]
pub(super) struct LayerLocks(Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>);

/// A layer's lock, held.
pub(super) struct LayerLock {
    locks: Arc<LayerLocks>,
    layer: Digest,
    held: Option<OwnedMutexGuard<()>>,
}

impl LayerLocks {
    /// Waits until nobody else holds the layer's lock.
    pub(super) async fn lock(self: &Arc<Self>, layer: Digest) -> LayerLock {
        let mut lock = LayerLock {
            locks: Arc::clone(self),
            layer,
            held: None,
        };
        let mutex = Arc::clone(self.0.lock().entry(layer).or_default());
        lock.held = Some(mutex.lock_owned().await);
        lock
    }
}

impl Drop for LayerLock {
    fn drop(&mut self) {
        let mut locks = self.locks.0.lock();
        self.held = None;
        if let Some(lock) = locks.get(&self.layer)
            && Arc::strong_count(lock) == 1
        {
            locks.remove(&self.layer);
        }
    }
}
