//! The strict fake of the data plane.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use sluice_oci::Digest;

use super::super::*;

/// Remembers what it was asked and objects to what the trait forbids.
#[derive(Debug, Default)]
pub(super) struct Fake {
    root: PathBuf,
    pub(super) state: Mutex<FakeState>,
    pub(super) opened: AtomicUsize,
}

#[derive(Debug, Default)]
pub(super) struct FakeState {
    pub(super) on_disk: HashSet<Digest>,
    /// In `open` or `remove` now.
    busy: HashSet<Digest>,
    pub(super) not_lazy: HashSet<Digest>,
    pub(super) broken: HashSet<Digest>,
    pub(super) requests: Vec<LayerRequest>,
    /// What the last call to make room was told.
    pub(super) in_use: Option<HashSet<Digest>>,
    pub(super) starts: Vec<ImageUse>,
    pub(super) runs: Vec<(Vec<Digest>, Option<Program>)>,
    pub(super) proofs: HashMap<Digest, Proof>,
    pub(super) settling: Vec<Digest>,
    /// What is found out of layers; of others nothing in time.
    pub(super) truths: HashMap<Digest, Result<Proof, &'static str>>,
}

impl Fake {
    pub(super) fn new(root: &Path) -> Arc<Self> {
        Arc::new(Self {
            root: root.to_owned(),
            ..Self::default()
        })
    }

    pub(super) fn directory(&self, layer: Digest) -> PathBuf {
        self.root.join("m").join(&layer.hex()[..8])
    }

    fn begin(&self, layer: Digest) {
        let first = self.state.lock().busy.insert(layer);
        assert!(first, "open and remove of one layer overlap");
    }

    fn end(&self, layer: Digest) {
        self.state.lock().busy.remove(&layer);
    }

    pub(super) fn on_disk(&self) -> HashSet<Digest> {
        self.state.lock().on_disk.clone()
    }
}

impl LazyLayers for Fake {
    async fn open(&self, request: LayerRequest) -> Result<(), NotLazy> {
        let layer = request.digest;
        self.begin(layer);
        tokio::task::yield_now().await;
        self.opened.fetch_add(1, Ordering::Relaxed);
        let lazy = {
            let mut state = self.state.lock();
            state.requests.push(request);
            let lazy = !state.not_lazy.contains(&layer);
            if lazy {
                state.on_disk.insert(layer);
            }
            lazy
        };
        self.end(layer);
        if lazy {
            Ok(())
        } else {
            Err(NotLazy::new(layer, "it has no table of contents"))
        }
    }

    async fn mount(&self, layer: Digest) -> Result<PathBuf, MountError> {
        let state = self.state.lock();
        if !state.on_disk.contains(&layer) {
            return Err(MountError::Unknown(layer));
        }
        if state.broken.contains(&layer) {
            return Err(MountError::failed(layer, "meta.erofs is damaged"));
        }
        let directory = self.directory(layer);
        fs::create_dir_all(&directory).unwrap();
        Ok(directory)
    }

    async fn owner(&self, layer: Digest) -> Result<Owner, MountError> {
        let metadata = fs::metadata(self.mount(layer).await?);
        let metadata = metadata.map_err(|error| MountError::failed(layer, error))?;
        use std::os::unix::fs::MetadataExt as _;
        Ok(Owner {
            uid: metadata.uid(),
            gid: metadata.gid(),
        })
    }

    async fn starts(&self, image: ImageUse) {
        self.state.lock().starts.push(image);
    }

    async fn runs(
        &self,
        layers: Vec<Digest>,
        program: impl Future<Output = Option<Program>> + Send,
    ) {
        let program = program.await;
        self.state.lock().runs.push((layers, program));
    }

    async fn remove(&self, layer: Digest) -> Result<(), MountError> {
        self.begin(layer);
        tokio::task::yield_now().await;
        let broken = self.state.lock().broken.contains(&layer);
        if !broken {
            self.state.lock().on_disk.remove(&layer);
        }
        self.end(layer);
        if broken {
            return Err(MountError::failed(layer, "target is busy"));
        }
        Ok(())
    }

    async fn usage(&self, layer: Digest) -> Result<Usage, MountError> {
        if !self.on_disk().contains(&layer) {
            return Err(MountError::Unknown(layer));
        }
        Ok(Usage {
            bytes: 77,
            inodes: 7,
        })
    }

    async fn retain(&self, known: HashSet<Digest>) -> Result<(), MountError> {
        self.state.lock().on_disk.retain(|l| known.contains(l));
        Ok(())
    }

    async fn make_room(&self, in_use: InUse) {
        let in_use = tokio::task::spawn_blocking(move || in_use()).await;
        self.state.lock().in_use = in_use.unwrap();
    }

    async fn proof(&self, layer: Digest) -> Option<Proof> {
        self.state.lock().proofs.get(&layer).copied()
    }

    fn settle(
        &self,
        layer: Digest,
        _: Duration,
    ) -> impl Future<Output = Result<(), Arc<str>>> + Send {
        let mut state = self.state.lock();
        state.settling.push(layer);
        let found = state.truths.get(&layer).copied();
        if let Some(Ok(proof)) = found {
            state.proofs.insert(layer, proof);
        }
        let found = found.unwrap_or(Err("it takes too long"));
        std::future::ready(found.map(drop).map_err(Arc::from))
    }

    async fn next_proof(&self) -> Digest {
        std::future::pending().await
    }
}
