//! Layers that are about to be used by a snapshot that is not recorded yet.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;
use sluice_oci::Digest;

/// How many callers are about to use a layer. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Pins(Arc<Mutex<HashMap<Digest, usize>>>);

/// Holds its layers until it is dropped.
#[derive(Debug)]
pub(super) struct Pinned {
    pins: Pins,
    layers: Vec<Digest>,
}

impl Pins {
    pub(super) fn hold(&self, layers: impl IntoIterator<Item = Digest>) -> Pinned {
        let layers: Vec<Digest> = layers.into_iter().collect();
        let mut pins = self.0.lock();
        for layer in &layers {
            *pins.entry(*layer).or_default() += 1;
        }
        Pinned {
            pins: self.clone(),
            layers,
        }
    }

    pub(super) fn held(&self) -> HashSet<Digest> {
        self.0.lock().keys().copied().collect()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut pins = self.pins.0.lock();
        for layer in &self.layers {
            if let Some(count) = pins.get_mut(layer) {
                *count -= 1;
                if *count == 0 {
                    pins.remove(layer);
                }
            }
        }
    }
}
