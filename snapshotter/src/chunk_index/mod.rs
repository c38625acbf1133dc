//! Which chunks of the node's layers have which digest: an index on disk that
//! is made of the layer directories, and can be made of them again at any
//! time.
//!
//! It is a handful of sorted files, the runs. A layer's chunks are sorted into
//! one of its own, which is merged later with those that are not much larger.
//! So memory holds nothing but the names of layers, a lookup reads a page or
//! three of each run, and a chunk is written a few times in its life.

mod run;

#[cfg(test)]
use std::collections::BTreeSet;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use sluice_oci::Digest;

use crate::layer_dir::LayerDir;
use run::{Draft, MergeError, Run};

pub use run::{LayerName, Place};

/// How the name of a run that is being written begins.
const DRAFT: &str = "draft-";
/// A run is merged into one that is up to so many times as large.
const RATIO: u64 = 2;

/// The index. Everything in it is a claim of where a chunk may be: whoever
/// follows it compares the digest in the chunk table, and then the bytes.
#[derive(Debug)]
pub struct ChunkIndex {
    directory: PathBuf,
    runs: RwLock<Vec<Arc<Run>>>,
    next: AtomicU64,
    /// Held while runs are merged.
    merging: Mutex<()>,
}

impl ChunkIndex {
    /// Opens the index in `directory`, which is made if it is not there. Files
    /// that cannot be read are removed: what they held is [`Self::covers`] no
    /// more. With `anew`, so are all others. What the disk does not give is
    /// told and done without: no start may depend on it.
    pub fn open(directory: &Path, anew: bool) -> Self {
        let mut found = look_around(directory, anew).unwrap_or_else(|error| {
            tracing::warn!(
                "the index of chunks in {} cannot be read, so that some are fetched again: {error}",
                directory.display()
            );
            Vec::new()
        });
        // The newest first: what a merge was made of is in it.
        found.sort_unstable_by_key(|(number, _)| std::cmp::Reverse(*number));
        let next = found.first().map_or(0, |(number, _)| number + 1);
        let mut covered = HashSet::new();
        let mut runs = Vec::new();
        for (_, run) in found {
            let new: Vec<bool> = run
                .layers
                .iter()
                .map(|&layer| covered.insert(layer))
                .collect();
            if new.contains(&true) {
                runs.push(Arc::new(run));
            } else {
                // What stays is passed over at the next start, too.
                let _ = fs::remove_file(&run.path);
            }
        }
        Self {
            directory: directory.to_owned(),
            runs: RwLock::new(runs),
            next: AtomicU64::new(next),
            merging: Mutex::default(),
        }
    }

    /// Whether the layer's chunks are in it.
    pub fn covers(&self, layer: LayerName) -> bool {
        let runs = self.runs.read();
        runs.iter().any(|run| run.layers.contains(&layer))
    }

    /// Adds a layer's chunks, unless they are there. Blocks.
    pub fn add(&self, dir: &LayerDir) -> io::Result<()> {
        let layer = LayerName::of(dir);
        if dir.chunks().is_empty() || self.covers(layer) {
            return Ok(());
        }
        let (draft, path) = self.next_paths();
        let written = (|| {
            let mut draft = Draft::new(draft.clone(), vec![layer])?;
            for entry in run::entries_of(dir, 0)? {
                draft.push(entry)?;
            }
            draft.finish(&path)
        })();
        match written {
            Ok(run) => self.runs.write().push(Arc::new(run)),
            Err(error) => {
                let _ = fs::remove_file(draft);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Where the next run is written, and where it is then.
    fn next_paths(&self) -> (PathBuf, PathBuf) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = |name: String| self.directory.join(name);
        (path(format!("{DRAFT}{number}")), path(number.to_string()))
    }

    /// Merges runs where that is due, and forgets their layers that `lives`
    /// does not know. Blocks for as long as it takes to write them, and does
    /// not keep anybody else waiting.
    pub fn merge(&self, lives: impl Fn(LayerName) -> bool) -> io::Result<()> {
        let _merging = self.merging.lock();
        let merged = self.due();
        if merged.len() < 2 {
            return Ok(());
        }
        let (draft, path) = self.next_paths();
        match run::merge(&merged, draft.clone(), &path, lives) {
            Ok(run) => {
                crash_point!("index.merged");
                self.runs.write().push(Arc::new(run));
                merged.iter().try_for_each(|run| self.drop_run(run))
            }
            Err(MergeError::Draft(error)) => {
                let _ = fs::remove_file(draft);
                Err(error)
            }
            Err(MergeError::Run(at, error)) => {
                let _ = fs::remove_file(draft);
                self.damaged(&merged[at], &error);
                Ok(())
            }
        }
    }

    /// Removes runs of which `lives` knows no layer any more. Blocks.
    pub fn prune(&self, lives: impl Fn(LayerName) -> bool) -> io::Result<()> {
        let _merging = self.merging.lock();
        let runs = self.runs.read().clone();
        let gone = runs
            .iter()
            .filter(|run| !run.layers.iter().any(|&layer| lives(layer)));
        gone.into_iter().try_for_each(|run| self.drop_run(run))
    }

    /// The smallest runs, up to one that is much larger than they are.
    fn due(&self) -> Vec<Arc<Run>> {
        let mut runs = self.runs.read().clone();
        runs.sort_by_key(|run| run.len);
        let mut len = 0;
        let mut due = 0;
        for run in &runs {
            if due > 0 && run.len > len * RATIO {
                break;
            }
            len += run.len;
            due += 1;
        }
        runs.truncate(due);
        runs
    }

    fn drop_run(&self, run: &Arc<Run>) -> io::Result<()> {
        self.runs.write().retain(|other| !Arc::ptr_eq(other, run));
        remove(fs::remove_file(&run.path))
    }

    /// What it held is added again when its layers are opened.
    fn damaged(&self, run: &Arc<Run>, error: &io::Error) {
        let path = run.path.display();
        let removed = self.drop_run(run);
        tracing::warn!(
            "{path}: {error}; it is {}",
            match removed {
                Ok(()) => "made anew from the layers, as they are opened".to_owned(),
                Err(error) => format!("not used any more, and cannot be removed: {error}"),
            }
        );
    }

    /// Calls `each` for every place where a chunk of this digest may be, until
    /// it breaks. Blocks for a few reads.
    pub fn find(&self, digest: &Digest, mut each: impl FnMut(Place) -> ControlFlow<()>) {
        let runs = self.runs.read().clone();
        for run in runs {
            match run.find(digest, &mut each) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => self.damaged(&run, &error),
            }
        }
    }

    /// Makes it survive a loss of power.
    pub fn sync(&self) -> io::Result<()> {
        let runs = self.runs.read().clone();
        runs.iter().try_for_each(|run| run.sync())?;
        File::open(&self.directory)?.sync_all()
    }

    /// The layers whose chunks are in it.
    #[cfg(test)]
    pub(crate) fn layers(&self) -> BTreeSet<LayerName> {
        let runs = self.runs.read();
        runs.iter().flat_map(|run| run.layers.clone()).collect()
    }
}

/// The runs in `directory`, with their numbers.
fn look_around(directory: &Path, anew: bool) -> io::Result<Vec<(u64, Run)>> {
    if anew {
        remove(fs::remove_dir_all(directory))?;
    }
    fs::create_dir_all(directory)?;
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let number = name.and_then(|name| name.parse::<u64>().ok());
        match number.and_then(|number| Some((number, Run::open(&path).ok()?))) {
            Some(run) => found.push(run),
            None => remove(fs::remove_file(&path))?,
        }
    }
    Ok(found)
}

fn remove(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
