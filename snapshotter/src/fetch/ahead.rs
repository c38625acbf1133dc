//! Fetching what nobody waits for: the rest of the layer.

use std::sync::Arc;
use std::time::Duration;

use sluice_layer::Unit;
use tokio::task::{AbortHandle, JoinHandle};

use super::decode::Arrived;
use super::layer::LazyLayer;
use super::stream::{Arriving, Decoding, Patience, window};
use super::{Priority, SourceError};

/// However busy readers are, a background download gets on by a little after
/// this time: its connection stays open, and it ends some day.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A gap of this size is always cheaper to fetch than another request.
const SMALLEST_GAP: u64 = 16 << 10;

/// Units that are looked for in other layers at once.
const BATCH: usize = 256;

/// How long nothing is fetched ahead when the disk does not take it; it
/// doubles.
const DISK_PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_DISK_PAUSE: Duration = Duration::from_secs(60);

/// After the deadline, a registry that does not deliver is asked again so much
/// later; it doubles.
const REST: Duration = Duration::from_secs(60);
/// The longest such rest.
const LONGEST_REST: Duration = Duration::from_secs(600);
/// When it is looked again for what readers were fetching when all else was
/// there; it doubles.
const PASSED_OVER: Duration = Duration::from_millis(100);

/// Work that goes on by itself and ends when this is dropped.
#[derive(Debug)]
pub struct Handle(AbortHandle);

impl Handle {
    pub(super) fn of(task: &JoinHandle<()>) -> Self {
        Self(task.abort_handle())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl LazyLayer {
    /// Downloads what is missing, after `delay`, in one stream that pauses
    /// while any reader of the node waits, and makes it durable. `then` is
    /// done when all is here.
    pub fn download(
        self: &Arc<Self>,
        delay: Duration,
        then: impl Future<Output = ()> + Send + 'static,
    ) -> Handle {
        let layer = Arc::clone(self);
        self.go(async move {
            tokio::time::sleep(delay).await;
            layer.take_over_all().await;
            let mut pause = PASSED_OVER;
            layer.stream().await;
            while !layer.dir().is_complete() && pause < LONGEST_PAUSE {
                // What readers have claimed, they bring, unless they give up.
                tokio::time::sleep(pause).await;
                pause *= 2;
                layer.stream().await;
            }
            let persisted = tokio::task::spawn_blocking(move || {
                let done = layer.dir().persist();
                (layer, done)
            });
            match persisted.await {
                Ok((layer, Err(error))) => tracing::warn!(layer = %layer.digest(), "{error}"),
                Ok((layer, Ok(new))) if layer.dir().is_complete() => {
                    if new {
                        tracing::info!(layer = %layer.digest(), "the whole layer is present");
                    }
                    then.await;
                }
                _ => {}
            }
        })
    }

    /// Does something that ends with the layer.
    pub fn go(self: &Arc<Self>, work: impl Future<Output = ()> + Send + 'static) -> Handle {
        let closed = self.closed().clone();
        let task = self.engine().runtime().spawn(async move {
            closed.run_until_cancelled(work).await;
        });
        Handle::of(&task)
    }

    /// Takes from other layers what they have, some units at a time while no
    /// reader waits.
    async fn take_over_all(self: &Arc<Self>) {
        let mut next = 0;
        loop {
            let units = self.dir().chunks().units_from(next);
            let missing = units.filter(|&unit| !self.has_unit(unit));
            let batch: Vec<Unit> = missing.take(BATCH).collect();
            let Some(last) = batch.last() else { return };
            next = last.offset + 1;
            self.engine().idle(LONGEST_PAUSE).await;
            self.engine().room().wait().await;
            self.take_over(batch).await;
        }
    }

    /// Fetches the missing units of the blob, in its order. A registry that
    /// does not deliver until the deadline is left alone for longer and longer:
    /// readers that need the bytes will ask for them.
    async fn stream(self: &Arc<Self>) {
        let mut patience = Patience::new(self);
        let mut resting = None;
        let mut next = 0;
        let mut pause = DISK_PAUSE;
        loop {
            if !self.engine().room().is_left() {
                tracing::debug!(layer = %self.digest(), "the quota has no room for the rest of it");
                self.engine().room().wait().await;
                next = 0;
            }
            if self.engine().storage().is_failing() {
                // A few units now and then tell when there is space again.
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_DISK_PAUSE);
                self.engine().storage().try_again();
                next = 0;
            }
            let Some(run) = self.next_run(next) else {
                return;
            };
            let permit = {
                let bytes = window(run.end - run.start, run.largest);
                let admission = self.engine().admission();
                admission.admit(Priority::Background, bytes).await
            };
            next = run.start;
            let outcome = self.stream_run(&run, &mut next).await;
            drop(permit);
            if next > run.start {
                patience.renew();
                if resting.take().is_some() {
                    tracing::info!(layer = %self.digest(), "the rest of it is fetched ahead again");
                }
            }
            let Err(error) = outcome else { continue };
            let wait = match (resting, patience.after(&error)) {
                (None, Some(wait)) => wait,
                (last, _) => {
                    if last.is_none() {
                        tracing::warn!(
                            layer = %self.digest(),
                            "the rest of it is fetched ahead when the registry delivers: {error}"
                        );
                    }
                    let rest = last.map_or(REST, |last: Duration| LONGEST_REST.min(last * 2));
                    resting = Some(rest);
                    // What readers had claimed may have failed with them.
                    next = 0;
                    rest
                }
            };
            tokio::time::sleep(wait).await;
        }
    }

    /// The missing units at or after `from` that one request should fetch.
    fn next_run(&self, from: u64) -> Option<Run> {
        let gap = self.link().worthwhile_gap();
        let mut run: Option<Run> = None;
        for unit in self.dir().chunks().units_from(from) {
            if self.has_unit(unit) {
                continue;
            }
            match &mut run {
                None => {
                    run = Some(Run {
                        start: unit.offset,
                        end: unit.offset + unit.size,
                        largest: unit.size,
                        wanted: unit.size,
                        passed: 0,
                    });
                }
                Some(run) => {
                    let between = unit.offset.saturating_sub(run.end);
                    // Nobody waits, so that a request more costs little: of
                    // what is here, no more comes again than is wanted.
                    let most = run.wanted.saturating_sub(run.passed).max(SMALLEST_GAP);
                    if between > gap.min(most) {
                        break;
                    }
                    run.passed += between;
                    run.wanted += unit.size;
                    run.end = unit.offset + unit.size;
                    run.largest = run.largest.max(unit.size);
                }
            }
        }
        run
    }

    /// Bytes that a unit takes in `data`.
    fn stored_size(&self, unit: Unit) -> u64 {
        let table = self.dir().chunks();
        let chunks = table.of_unit(unit.offset);
        chunks.map(|chunk| u64::from(table.get(chunk).size)).sum()
    }

    fn units(&self, from: u64, end: u64) -> impl Iterator<Item = Unit> + '_ {
        self.dir()
            .chunks()
            .units_from(from)
            .take_while(move |unit| unit.offset < end)
    }

    /// One request. `next` follows what is done.
    async fn stream_run(self: &Arc<Self>, run: &Run, next: &mut u64) -> Result<(), SourceError> {
        self.engine().idle(LONGEST_PAUSE).await;
        let gap = self.link().worthwhile_gap();
        let mut arriving =
            Arriving::of_layer(self, run.start, run.end, Priority::Background).await?;
        let mut decoding = Decoding::new(self, Priority::Background);
        let mut outcome = Ok(());
        let mut units = self.units(run.start, run.end).peekable();
        while let Some(unit) = units.next() {
            let end = unit.offset + unit.size;
            if !self.engine().is_idle() {
                // Between units, so that no reader waits for a unit of a
                // stream that waits for readers.
                arriving.pause();
                self.engine().idle(LONGEST_PAUSE).await;
            }
            // Nobody's until its bytes are about to arrive: a reader that
            // needs it earlier does not wait for all that lies before.
            if self.engine().storage().is_failing() || !self.engine().room().is_left() {
                break;
            }
            let Some(claim) = self.claim(unit) else {
                *next = end;
                // When much of what follows has come in meanwhile, a new
                // request is better.
                let missing = self.units(end, run.end).find(|&unit| !self.has_unit(unit));
                match missing {
                    Some(missing) if missing.offset - end <= gap => continue,
                    _ => break,
                }
            };
            claim.request();
            match arriving.take(unit.offset, end).await {
                Ok(bytes) => {
                    *next = end;
                    self.engine().room().take(self.stored_size(unit));
                    let more = units
                        .peek()
                        .is_some_and(|unit| arriving.has(unit.offset + unit.size));
                    let arrived = Arrived {
                        claim,
                        bytes,
                        again: false,
                    };
                    decoding.push(arrived, more).await;
                }
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
        }
        drop(arriving);
        // What is wrong is left to the reader who needs it.
        drop(decoding.finish().await);
        outcome
    }
}

/// A part of the blob that one request fetches.
struct Run {
    start: u64,
    end: u64,
    largest: u64,
    /// Bytes of its units, and of what lies between them.
    wanted: u64,
    passed: u64,
}
