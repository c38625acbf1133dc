//! Where a blob was last redirected to, so that further ranges of it go
//! there straight away.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::Url;
use sluice_oci::Digest;
use tokio::time::Instant;

/// More than a node's layers; beyond it everything is forgotten, which costs
/// a request a blob.
const CAPACITY: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) host: String,
    pub(crate) repository: String,
    pub(crate) digest: Digest,
}

#[derive(Default)]
pub(crate) struct Redirects {
    targets: Mutex<HashMap<Key, (Url, Instant)>>,
}

impl Redirects {
    pub(crate) fn get(&self, key: &Key) -> Option<Url> {
        let targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let (url, expires) = targets.get(key)?;
        (*expires > Instant::now()).then(|| url.clone())
    }

    pub(crate) fn put(&self, key: Key, url: Url, ttl: Duration) {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if targets.len() >= CAPACITY {
            targets.retain(|_, (_, expires)| *expires > now);
        }
        if targets.len() >= CAPACITY {
            targets.clear();
        }
        targets.insert(key, (url, now + ttl));
    }

    /// Forgets `url`, unless another request already learned a newer one.
    pub(crate) fn forget(&self, key: &Key, url: &Url) {
        let mut targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner);
        if targets.get(key).is_some_and(|(known, _)| known == url) {
            targets.remove(key);
        }
    }
}
