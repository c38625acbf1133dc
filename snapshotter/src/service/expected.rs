//! Layers that are opened before a client asks for them: because it has told of
//! its image, or has asked for the layers below.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use sluice_oci::Digest;

use super::lazy_layers::{LayerRequest, LazyLayers};
use super::logic::Snapshots;

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

impl<L: LazyLayers> Snapshots<L> {
    /// Opens the layers of an image for which somebody is about to ask, so that
    /// they find the work done: `lowest`, and those that it names.
    pub async fn expect(&self, lowest: LayerRequest) {
        self.expected.put(&lowest.image_layers);
        let _lock = self.locks.lock(lowest.digest).await;
        if let Err(error) = self.layers().open(lowest).await {
            tracing::debug!("not opened ahead: {error}");
        }
    }

    /// Removes the layers that were opened `patience` ago or longer and that
    /// nobody has asked for since.
    pub async fn release_unclaimed(&self, patience: Duration) {
        for layer in self.expected.take(patience) {
            if let Err(error) = self.release(layer).await {
                tracing::warn!(%error, "a layer that was opened ahead stays until the next cleanup");
            }
        }
    }
}
