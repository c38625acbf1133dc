//! Layers that are opened before a client asks for them: because it has told of
//! its image, or has asked for the layers below.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use sluice_oci::Digest;

/// Since when each was last expected. Many have been asked for since.
#[derive(Debug, Default)]
pub(super) struct Expected(Mutex<HashMap<Digest, Instant>>);

impl Expected {
    pub(super) fn put(&self, layers: &[Digest]) {
        let now = Instant::now();
        self.0
            .lock()
            .extend(layers.iter().map(|&layer| (layer, now)));
    }

    /// Those that have been expected for `patience`; they no longer are.
    pub(super) fn take(&self, patience: Duration) -> Vec<Digest> {
        let mut expected = self.0.lock();
        let over = expected.extract_if(|_, since| since.elapsed() >= patience);
        over.map(|(layer, _)| layer).collect()
    }
}
