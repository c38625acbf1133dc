//! Recording what images read while they start.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use sluice_layer::Profile;
use sluice_oci::Digest;
use tokio::task::spawn_blocking;

use super::Node;
use crate::fetch::Recording;
use crate::profiles::{self, ImageId};
use crate::service::ImageUse;

/// Images that are recorded at once. Each costs some memory a layer.
const AT_ONCE: usize = 64;
/// How often it is looked whether a recording has come to its end.
const LOOK: Duration = Duration::from_millis(500);
/// How long a recording lasts at most that somebody asked for by a name.
const ASKED: Duration = Duration::from_secs(3600);

/// The recordings that go on, by number.
#[derive(Default)]
pub(super) struct Recordings(Mutex<Table>);

#[derive(Default)]
struct Table {
    next: u64,
    all: HashMap<u64, ImageRecording>,
}

/// A start that is being recorded.
pub(super) struct ImageRecording {
    image: ImageId,
    layers: Vec<Recording>,
    whole: bool,
    /// By what name it was asked for.
    name: Option<String>,
    began: Instant,
}

/// A recording that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// What was read.
    pub profile: Profile,
    /// Whether nothing was read of the image on this node before, so that all
    /// that was read was seen.
    pub whole: bool,
}

impl ImageRecording {
    /// Whether it records the layer.
    pub(super) fn of(&self, layer: Digest) -> bool {
        self.image.layers.contains(&layer)
    }

    fn noted(&self) -> usize {
        self.layers.iter().map(Recording::noted).sum()
    }
}

impl Node {
    /// A container of an image is about to start: what it needs is fetched,
    /// and what it reads recorded. Of starts of one image at once, the first
    /// is recorded: what it has read comes from the kernel's memory for the
    /// others.
    pub(super) async fn begin(&self, image: ImageUse) {
        let name = image.recording;
        let image = ImageId {
            reference: image.reference,
            manifest: image.manifest_digest,
            layers: image.layers,
        };
        let (layers, whole) = self.starting(&image).await;
        if name.is_none() {
            let known = self.0.profiles.find(&image);
            let worth = whole || known.is_none();
            if !self.0.config.profiles.record || !worth {
                return;
            }
        }
        let number = {
            let mut table = self.0.recordings.0.lock();
            let busy = table.all.values().any(|other| other.image == image);
            if name.is_none() && (busy || table.all.len() >= AT_ONCE) {
                return;
            }
            let number = table.next;
            table.next += 1;
            let recording = ImageRecording {
                layers: layers.iter().map(|layer| layer.record()).collect(),
                began: Instant::now(),
                image,
                whole,
                name,
            };
            table.all.insert(number, recording);
            number
        };
        let node = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            let mut noted = 0;
            let mut quiet = Instant::now();
            loop {
                tokio::time::sleep(LOOK).await;
                let Some(node) = node.upgrade().map(Node) else {
                    return;
                };
                let now = {
                    let table = node.0.recordings.0.lock();
                    let Some(recording) = table.all.get(&number) else {
                        return;
                    };
                    let limits = &node.0.config.profiles;
                    let (longest, idle) = match recording.name {
                        Some(_) => (ASKED, ASKED),
                        None => (limits.longest, limits.idle),
                    };
                    let now = recording.noted();
                    // Who waits for bytes, or has not begun, is not idle.
                    if now != noted || now == 0 || node.0.engine.waiting() > 0 {
                        quiet = Instant::now();
                    }
                    let over = recording.began.elapsed() >= longest || quiet.elapsed() >= idle;
                    (!over).then_some(now)
                };
                match now {
                    Some(now) => noted = now,
                    None => {
                        node.end_recording(number).await;
                        return;
                    }
                }
            }
        });
    }

    /// Ends the recording that somebody asked for by `name`.
    pub async fn finish_recording(&self, name: &str) -> Option<Recorded> {
        let number = {
            let table = self.0.recordings.0.lock();
            let named = |r: &&ImageRecording| r.name.as_deref() == Some(name);
            let mut all = table.all.iter();
            *all.find(|(_, recording)| named(recording))?.0
        };
        self.end_recording(number).await
    }

    /// Ends those recordings that `which` names, early.
    pub(super) async fn end_recordings(&self, which: impl Fn(&ImageRecording) -> bool) {
        let numbers: Vec<u64> = {
            let table = self.0.recordings.0.lock();
            let wanted = table.all.iter().filter(|(_, recording)| which(recording));
            wanted.map(|(number, _)| *number).collect()
        };
        for number in numbers {
            self.end_recording(number).await;
        }
    }

    /// The references of the images that are being recorded.
    pub(super) fn recorded_images(&self) -> Vec<ImageId> {
        let table = self.0.recordings.0.lock();
        table.all.values().map(|r| r.image.clone()).collect()
    }

    async fn end_recording(&self, number: u64) -> Option<Recorded> {
        let recording = self.0.recordings.0.lock().all.remove(&number)?;
        let store = Arc::clone(&self.0.profiles);
        let ended = spawn_blocking(move || {
            let image = &recording.image;
            let shown = image.reference.as_deref().unwrap_or("an image");
            let profile = match profile(&recording) {
                Ok(profile) => profile,
                Err(error) => {
                    tracing::warn!("what {shown} read cannot be told: {error}");
                    return None;
                }
            };
            let whole = recording.whole;
            if !profile.reads().is_empty() {
                match store.record(image, profile.clone(), whole) {
                    Ok(stored) => tracing::info!(
                        image = shown,
                        reads = profile.reads().len(),
                        stored,
                        "recorded what its start reads"
                    ),
                    Err(error) => tracing::warn!("{error}"),
                }
            }
            Some(Recorded { profile, whole })
        });
        ended.await.ok().flatten()
    }
}

/// What was read, by the names of files.
fn profile(recording: &ImageRecording) -> Result<Profile, Box<dyn std::error::Error>> {
    let mut reads = Vec::new();
    for layer in &recording.layers {
        let chunks = layer.reads();
        if chunks.is_empty() {
            continue;
        }
        let dir = layer.layer().dir();
        let digest = dir.identity().digest;
        let index = recording.image.layers.iter().position(|l| *l == digest);
        reads.extend(profiles::reads(dir, index.unwrap_or_default(), &chunks)?);
    }
    reads.sort_by_key(|read| read.at);
    reads.truncate(sluice_layer::profile::MAX_READS);
    Ok(Profile::new(1, recording.image.layers.clone(), reads)?)
}

#[cfg(test)]
mod tests;
