//! Comparing what is kept of the layers with their digests: after a process
//! that did not end in order, when somebody asks, and on a timer.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use sluice_oci::Digest;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::Node;
use super::release::list;
use crate::fetch::LazyLayer;
use crate::layer_dir::{ChunkId, Verdict};
use crate::scrub::{Report, Scrubber};

/// Bytes that are read and compared before others get their turn.
const TURN: u64 = 4 << 20;
/// How long readers can hold it up each time: it has to come to an end.
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// Tells by its time when all layers were last checked.
const SCRUBBED: &str = "scrubbed";
/// How often the timer is looked at: the clock may be set.
const LOOK: Duration = Duration::from_secs(3600);

/// Keeps a rate of bytes.
struct Pace {
    per_second: u64,
    since: Instant,
    bytes: u64,
}

impl Pace {
    fn new(per_second: u64) -> Self {
        Self {
            per_second: per_second.max(1),
            since: Instant::now(),
            bytes: 0,
        }
    }

    async fn spend(&mut self, bytes: u64) {
        self.bytes += bytes;
        let due = Duration::from_secs_f64(self.bytes as f64 / self.per_second as f64);
        tokio::time::sleep(due.saturating_sub(self.since.elapsed())).await;
    }
}

impl Scrubber for Node {
    async fn scrub(&self, each: mpsc::Sender<Report>) {
        let _one_at_a_time = self.0.scrubbing.lock().await;
        let mut pace = Pace::new(self.0.config.scrub_rate);
        for digest in self.layers_on_disk().await {
            if let Some(report) = self.scrub_layer(digest, &mut pace, true).await
                && each.send(report).await.is_err()
            {
                return;
            }
        }
        let stamp = self.0.config.root.join(SCRUBBED);
        if let Err(error) = std::fs::write(&stamp, "") {
            tracing::warn!("cannot write {}: {error}", stamp.display());
        }
    }
}

impl Node {
    /// Checks all layers each time so long after the last.
    pub async fn scrub_every(&self, interval: Duration) {
        let stamp = self.0.config.root.join(SCRUBBED);
        if !stamp.exists() {
            let _ = std::fs::write(&stamp, "");
        }
        // A disk that takes no stamp is no reason to check without a pause.
        let mut ended: Option<Instant> = None;
        loop {
            let last = stamp.metadata().and_then(|found| found.modified());
            let age = last
                .ok()
                .and_then(|last| SystemTime::now().duration_since(last).ok())
                .unwrap_or_default();
            let age = ended.map_or(age, |ended| age.min(ended.elapsed()));
            let left = interval.saturating_sub(age);
            if !left.is_zero() {
                tokio::time::sleep(left.min(LOOK)).await;
                continue;
            }
            let (each, mut reports) = mpsc::channel::<Report>(16);
            let told = async {
                let (mut layers, mut wrong) = (0, 0);
                while let Some(report) = reports.recv().await {
                    layers += 1;
                    wrong += u64::from(!report.is_clean());
                    if let Some(why) = &report.failed {
                        tracing::warn!(layer = %report.layer, "not checked: {why}");
                    }
                }
                tracing::info!(layers, wrong, "all layers were checked");
            };
            tokio::join!(self.scrub(each), told);
            ended = Some(Instant::now());
        }
    }

    /// Verifies what the last process left, which did not end in order.
    pub(super) async fn verify_all(&self) {
        let _one_at_a_time = self.0.scrubbing.lock().await;
        let mut pace = Pace::new(self.0.config.scrub_rate);
        let mut failed = false;
        for digest in self.layers_on_disk().await {
            let report = self.scrub_layer(digest, &mut pace, false).await;
            if let Some(why) = report.and_then(|report| report.failed) {
                tracing::warn!(layer = %digest, "not verified after an unclean stop: {why}");
                failed = true;
            }
            crash_point!("verify.layer-done");
        }
        if !failed {
            self.0.doubted.store(false, Ordering::Relaxed);
            self.0.marker.settle();
            crash_point!("verify.settled");
            tracing::info!("all layers are verified after an unclean stop");
        }
    }

    async fn layers_on_disk(&self) -> Vec<Digest> {
        let layers = self.layers_dir();
        let listed = spawn_blocking(move || list(&layers)).await;
        match listed.map_err(io::Error::other).flatten() {
            Ok(mut listed) => {
                listed.sort_unstable();
                listed
            }
            Err(error) => {
                tracing::warn!("cannot list the layers on this node: {error}");
                Vec::new()
            }
        }
    }

    /// Checks one layer, unless it is gone.
    async fn scrub_layer(
        &self,
        digest: Digest,
        pace: &mut Pace,
        drop_cache: bool,
    ) -> Option<Report> {
        let mut report = Report::new(digest);
        let (layer, borrowed) = match self.borrow_layer(digest).await {
            Ok(Some(borrowed)) => borrowed,
            Ok(None) => return None,
            Err(error) => return Some(Report::failed(digest, error)),
        };
        report.repaired = layer
            .mended()
            .map(|what| format!("{what}; it has been mended"));
        match self.check_description(&layer, digest).await {
            Ok(None) => {}
            Ok(repaired) => report.repaired = repaired,
            Err(error) => report.failed = Some(error),
        }
        let wrong = self
            .check_content(&layer, pace, drop_cache, &mut report)
            .await;
        let persisted = {
            let layer = Arc::clone(&layer);
            spawn_blocking(move || layer.dir().persist()).await
        };
        if report.wrong > 0
            && let Ok(Err(error)) = persisted
        {
            report.failed = Some(format!("what is wrong could not be noted: {error}"));
        }
        self.return_layer(digest, &layer, borrowed, &wrong).await;
        Some(report)
    }

    /// The layer, open for as long as the caller needs it, and whether it was
    /// opened only for that.
    async fn borrow_layer(&self, digest: Digest) -> Result<Option<(Arc<LazyLayer>, bool)>, String> {
        let slot = self.slot(digest);
        let mut place = slot.0.lock().await;
        let borrowed = place.is_none();
        if borrowed {
            let there = self.layer_path(digest).exists();
            *place = self.load(digest).await?;
            if place.is_none() && there {
                return Err(
                    "its directory was beyond repair, and is made again when it is used \
                            next"
                        .to_owned(),
                );
            }
        }
        let layer = place.as_ref().map(|open| Arc::clone(&open.layer));
        drop(place);
        if layer.is_none() {
            self.forget(digest, &slot);
        }
        Ok(layer.map(|layer| (layer, borrowed)))
    }

    /// The caller does not need the layer any more, in which it has found some
    /// chunks wrong.
    async fn return_layer(
        &self,
        digest: Digest,
        layer: &Arc<LazyLayer>,
        borrowed: bool,
        wrong: &[ChunkId],
    ) {
        let slot = self.slot(digest);
        let mut place = slot.0.lock().await;
        let Some(open) = place.as_ref() else { return };
        if !Arc::ptr_eq(&open.layer, layer) {
            return;
        }
        if open.direct {
            // The kernel does not ask: nobody else would fetch them again.
            let missing = |chunk: &ChunkId| !layer.dir().present().contains(*chunk);
            let all = layer.dir().chunks().overlapping(0, u64::MAX);
            layer.fetch_again(&all.filter(missing).collect::<Vec<_>>());
        } else if open.mounted.is_some() {
            layer.fetch_again(wrong);
        }
        let idle = open.mounted.is_none() && !open.used && open.prefetch.is_none();
        if borrowed
            && idle
            && let Some(open) = place.take()
        {
            open.close(self, true).await;
            drop(place);
            self.forget(digest, &slot);
        }
    }

    /// Mends what other programs have done to what describes the open layers:
    /// the kernel reads what is mounted as it is.
    pub(super) async fn look_at_descriptions(&self) {
        for layer in self.open_layers() {
            self.look_at_description(&layer).await;
        }
    }

    async fn look_at_description(&self, layer: &Arc<LazyLayer>) {
        if !layer.dir().is_touched() {
            return;
        }
        // Whoever scrubs may be at it.
        let Ok(_one_at_a_time) = self.0.scrubbing.try_lock() else {
            return;
        };
        let digest = layer.digest();
        match self.check_description(layer, digest).await {
            Ok(_) => {
                layer.dir().see();
                self.0.undescribed.lock().remove(&digest);
            }
            // Told once for each cause: it is tried again and again.
            Err(error) => {
                let mut told = self.0.undescribed.lock();
                if told.insert(digest, error.clone()).as_ref() != Some(&error) {
                    tracing::error!(layer = %digest, "its readers may get errors: {error}");
                }
            }
        }
    }

    /// Checks `chunks` and `meta.erofs`, and mends them.
    async fn check_description(
        &self,
        layer: &Arc<LazyLayer>,
        digest: Digest,
    ) -> Result<Option<String>, String> {
        let checked = {
            let layer = Arc::clone(layer);
            spawn_blocking(move || layer.dir().check_chunks().and(layer.dir().check_meta())).await
        };
        let error = match checked.map_err(|error| error.to_string())? {
            Ok(()) => return Ok(None),
            Err(error) if error.is_damage() => error,
            Err(error) => return Err(error.to_string()),
        };
        match self.mend(digest).await {
            Ok(true) => {
                tracing::warn!(layer = %digest, "{error}; it has been mended");
                Ok(Some(format!("{error}; it has been mended")))
            }
            Ok(false) => Err(format!("{error}; it cannot be mended while it is in use")),
            Err(why) => Err(format!("{error}; it cannot be mended now: {why}")),
        }
    }

    /// Checks what is present, and returns what was wrong.
    async fn check_content(
        &self,
        layer: &Arc<LazyLayer>,
        pace: &mut Pace,
        drop_cache: bool,
        report: &mut Report,
    ) -> Vec<ChunkId> {
        let dir = layer.dir();
        let all: Vec<ChunkId> = dir.present().iter().chain(dir.claimed().iter()).collect();
        let mut wrong = Vec::new();
        let mut rest = &all[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let sizes = rest
                .iter()
                .map(|&chunk| u64::from(dir.chunks().get(chunk).size));
            let turn = sizes
                .take_while(|size| {
                    let first = bytes == 0;
                    bytes += size;
                    first || bytes <= TURN
                })
                .count();
            let (turn, later) = rest.split_at(turn);
            rest = later;
            // Readers first.
            self.0.engine.idle(LONGEST_WAIT).await;
            let checking = Arc::clone(layer);
            let turn = turn.to_vec();
            let checked = spawn_blocking(move || {
                let verify = |chunk| (chunk, checking.verify(chunk, drop_cache));
                turn.into_iter().map(verify).collect::<Vec<_>>()
            });
            for (chunk, verdict) in checked.await.unwrap_or_default() {
                let size = u64::from(dir.chunks().get(chunk).size);
                match verdict {
                    Verdict::Absent => continue,
                    Verdict::Good => {}
                    Verdict::Wrong | Verdict::Unreadable(_) => {
                        report.wrong += 1;
                        wrong.push(chunk);
                    }
                }
                report.checked += 1;
                report.bytes += size;
            }
            pace.spend(bytes.min(TURN)).await;
        }
        wrong
    }
}
