//! What the node's layers hold, for layers that need the same.

use std::collections::HashMap;
use std::io;
use std::num::NonZero;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use lru::LruCache;
use parking_lot::Mutex;
use sluice_oci::{Digest, Reference};
use tokio::task::spawn_blocking;

use super::Node;
use super::memory::give_back;
use super::release::list;
use crate::chunk_index::{ChunkIndex, LayerName};
use crate::fetch::{ChunkFinder, Found, LazyLayer};
use crate::layer_dir::LayerDir;

/// The index's directory.
pub(super) const INDEX: &str = "chunk-index";
/// Layers that are held open only because another takes chunks from them. Each
/// has a descriptor and a few kilobytes.
const PEEKED: NonZero<usize> = NonZero::new(16).unwrap();
/// So many of them are opened for one lookup: readers wait for it.
const PEEKS: usize = 2;
/// A digest that more places have than this is looked up no further.
const PLACES: usize = 256;

/// From which layers a layer takes chunks. What its TOC says of them is not
/// verified before the bytes are there, so that an image could name what
/// another one holds, and be given it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sharing {
    /// From those of its repository: whoever can push there can read there.
    #[default]
    Repository,
    /// From those of its registry.
    Registry,
    /// From all.
    Node,
}

impl Sharing {
    fn allows(self, a: &Reference, b: &Reference) -> bool {
        match self {
            Self::Repository => a.host() == b.host() && a.repository() == b.repository(),
            Self::Registry => a.host() == b.host(),
            Self::Node => true,
        }
    }
}

/// The layers that chunks can be taken from.
#[derive(Debug)]
pub(super) struct Elsewhere {
    layers: PathBuf,
    sharing: Sharing,
    index: ChunkIndex,
    open: Mutex<HashMap<u64, Weak<LazyLayer>>>,
    /// Of layers that are not open, and of those that have nothing. Held while
    /// one is opened, so that what is forgotten stays forgotten.
    peeked: Mutex<LruCache<u64, Option<Arc<LayerDir>>>>,
}

impl Elsewhere {
    /// With the index below `root`, which is made `anew` where the disk may
    /// have lost a part of it.
    pub(super) fn new(root: &Path, layers: PathBuf, sharing: Sharing, anew: bool) -> Self {
        Self {
            layers,
            sharing,
            index: ChunkIndex::open(&root.join(INDEX), anew),
            open: Mutex::default(),
            peeked: Mutex::new(LruCache::new(PEEKED)),
        }
    }

    /// Whether a layer of the one takes chunks from a layer of the other.
    pub(super) fn allows(&self, one: &Reference, other: &Reference) -> bool {
        self.sharing.allows(one, other)
    }

    /// A layer is open from now on.
    pub(super) fn opened(&self, layer: &Arc<LazyLayer>) {
        let number = layer.dir().identity().number;
        self.open.lock().insert(number, Arc::downgrade(layer));
        self.forget(number);
    }

    /// A layer's content is gone, or is going to be read by whoever opens it.
    pub(super) fn forget(&self, number: u64) {
        self.peeked.lock().pop(&number);
    }

    /// A layer has been removed. Blocks.
    pub(super) fn removed(&self, number: u64) {
        self.forget(number);
        if let Err(error) = self.prune() {
            tracing::warn!("what the index of chunks has of removed layers stays: {error}");
        }
    }

    fn prune(&self) -> io::Result<()> {
        self.index.prune(|layer| self.lives(layer))
    }

    /// Adds a layer's chunks to the index. Without them it is a layer like any
    /// other. Blocks.
    fn add(&self, dir: &LayerDir) {
        if self.index.covers(LayerName::of(dir)) {
            return;
        }
        let added = self.index.add(dir);
        let merged = added.and_then(|()| self.index.merge(|layer| self.lives(layer)));
        // It may have been removed meanwhile.
        let merged = merged.and_then(|()| self.prune());
        if let Err(error) = merged {
            tracing::warn!(
                layer = %dir.identity().digest,
                "other layers do not find its chunks, and fetch them again: {error}"
            );
        }
        give_back();
    }

    /// Makes the index survive a loss of power after the process has ended.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.index.sync()
    }

    /// Merges what has been added, and adds what is missing. Blocks.
    fn tidy(&self) -> io::Result<()> {
        let missing = |digest: Digest| -> Option<LayerDir> {
            let path = self.layers.join(digest.hex());
            let identity = LayerDir::identify(&path).ok()?;
            let (number, digest) = (identity.number, identity.digest);
            let covered = self.index.covers(LayerName { number, digest });
            // A damaged one is mended, or told of, by whoever needs it.
            (!covered).then(|| LayerDir::peek(&path, digest).ok())?
        };
        for digest in list(&self.layers)? {
            if let Some(dir) = missing(digest) {
                self.index.add(&dir)?;
            }
        }
        self.index.merge(|layer| self.lives(layer))?;
        self.prune()
    }

    /// The layers whose chunks are in the index.
    #[cfg(test)]
    pub(super) fn indexed(&self) -> Vec<Digest> {
        let layers = self.index.layers().into_iter();
        layers.map(|layer| layer.digest).collect()
    }

    fn lives(&self, layer: LayerName) -> bool {
        let path = self.layers.join(layer.digest.hex());
        LayerDir::identify(&path).is_ok_and(|found| found.number == layer.number)
    }

    fn open_layer(&self, number: u64) -> Option<Arc<LazyLayer>> {
        self.open.lock().get(&number)?.upgrade()
    }

    /// The directory of a layer that is not open, if it is held or `more` may
    /// be opened.
    fn peek(&self, layer: LayerName, more: &mut usize) -> Option<Arc<LayerDir>> {
        let mut peeked = self.peeked.lock();
        if let Some(known) = peeked.get(&layer.number) {
            return known.clone();
        }
        *more = more.checked_sub(1)?;
        let path = self.layers.join(layer.digest.hex());
        let dir = LayerDir::peek(&path, layer.digest).ok();
        let has_any =
            |dir: &LayerDir| dir.identity().number == layer.number && dir.present().count() > 0;
        let dir = dir.filter(has_any).map(Arc::new);
        peeked.put(layer.number, dir.clone());
        dir
    }
}

impl ChunkFinder for Elsewhere {
    fn find(&self, digest: Digest, size: u32, by: &Reference) -> Option<Found> {
        let mut found = None;
        let mut places = 0;
        let mut peeks = PEEKS;
        self.index.find(&digest, |place| {
            let open = self.open_layer(place.layer.number);
            let dir = match &open {
                Some(layer) => Some(layer.shared_dir()),
                None => self.peek(place.layer, &mut peeks),
            };
            let allowed = |dir: &Arc<LayerDir>| self.sharing.allows(by, &dir.identity().reference);
            if let Some(dir) = dir.filter(allowed) {
                if dir.claims(place.chunk, digest, size) {
                    found = Some(Found::There(dir, place.chunk));
                    return ControlFlow::Break(());
                }
                let coming = |layer: &Arc<LazyLayer>| {
                    dir.describes(place.chunk, digest, size) && layer.is_coming(place.chunk)
                };
                if let Some(layer) = open.filter(coming) {
                    found = Some(Found::Coming(layer, place.chunk));
                }
            }
            places += 1;
            match places < PLACES {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
        found
    }
}

impl Node {
    /// Adds a layer to the index in the background: it is mounted, so that
    /// nobody waits for that.
    pub(super) fn index_layer(&self, layer: &LazyLayer) {
        let (elsewhere, dir) = (Arc::clone(&self.0.elsewhere), layer.shared_dir());
        drop(spawn_blocking(move || elsewhere.add(&dir)));
    }

    /// Brings the index up to date in the background.
    pub(super) fn tidy_index(&self) {
        let elsewhere = Arc::clone(&self.0.elsewhere);
        drop(spawn_blocking(move || {
            let tidied = elsewhere.tidy();
            give_back();
            if let Err(error) = tidied {
                tracing::warn!(
                    "the index of chunks is not up to date, so that some are fetched again: {error}"
                );
            }
        }));
    }
}
