//! What has been read of a layer, and whether what was fetched ahead was worth
//! it.

use std::collections::HashSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::layer_dir::{ChunkId, Kin, Present, Record};

/// So many chunks more may be read beside a plan than within it before
/// following the plan is given up for the time being.
const PATIENCE: u32 = 32;
/// What one read within the plan makes up for.
const WORTH: u32 = 2;
/// So many chunks of a plan any program may read, those of the C library and
/// other libraries, though the plan is of another one.
const SHARED: u32 = 128;
/// Once so many bytes were read, that tells whether a plan is of what runs: who
/// starts a container reads a few by itself.
const TELLING: u64 = 256 << 10;
/// A plan is followed without being told after so long: where no container
/// starts, nothing is slowed down by it.
const DOUBT: Duration = Duration::from_millis(500);
/// Guesses may be wrong by so many bytes, and by as many as were read, where
/// bytes are dear: no more than twice what is read is fetched, and this.
const FREE_GUESSES: u64 = 2 << 20;

/// Of what files say that they load, so many bytes are fetched, and as many
/// times what was read, but no more than so many. What is to be fetched is
/// remembered, so that the least of chunks counts as one of some size.
const FORESEEN: (u64, u64) = (32 << 20, 4);
const MOST_FORESEEN: u64 = 512 << 20;
const LEAST_FORESEEN: u32 = 16 << 10;

/// The reads of one layer since it was opened.
#[derive(Debug)]
pub(super) struct Reads {
    read: Present,
    guessed: Present,
    foreseen: Present,
    /// Names of files that were read, as [`Kin`] has them.
    names: Mutex<HashSet<u16>>,
    planned: RwLock<Option<Planned>>,
    /// When there was the first plan.
    since: OnceLock<Instant>,
    read_bytes: AtomicU64,
    wrong_bytes: AtomicU64,
    foreseen_bytes: AtomicU64,
    /// Reads beside the plan, less those within.
    beside: AtomicU32,
    /// Whether the plan was judged.
    judged: AtomicBool,
    /// What was read or judged has changed what is known of the plan.
    changed: Notify,
}

/// The chunks of a plan.
#[derive(Debug)]
pub(super) enum Planned {
    /// Those of units that begin before this offset of the blob.
    Before(u64),
    Chunks(Present),
}

impl Reads {
    pub(super) fn new(chunks: u32) -> Self {
        Self {
            read: Present::empty(chunks),
            guessed: Present::empty(chunks),
            foreseen: Present::empty(chunks),
            names: Mutex::default(),
            planned: RwLock::default(),
            since: OnceLock::new(),
            read_bytes: AtomicU64::new(0),
            wrong_bytes: AtomicU64::new(0),
            foreseen_bytes: AtomicU64::new(0),
            beside: AtomicU32::new(0),
            judged: AtomicBool::new(false),
            changed: Notify::new(),
        }
    }

    /// What is going to be fetched by plan, in the place of any plan before.
    pub(super) fn plan(&self, planned: Planned) {
        *self.planned.write() = Some(planned);
        self.since.get_or_init(Instant::now);
        self.beside.store(0, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// What is going to be read is what the plan is of, or it is something else:
    /// then following it waits until more of it is read all the same than any
    /// program does.
    pub(super) fn judge_plan(&self, fits: bool) {
        let beside = if fits { 0 } else { PATIENCE + SHARED * WORTH };
        self.beside.store(beside, Ordering::Release);
        self.judged.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// A chunk is fetched though nobody has asked for it.
    pub(super) fn guess(&self, chunk: ChunkId, record: &Record) {
        if !self.read.contains(chunk) && self.guessed.insert(chunk) {
            let size = u64::from(record.size);
            self.wrong_bytes.fetch_add(size, Ordering::Relaxed);
        }
    }

    /// A chunk is fetched because a file says that it is needed. Whether it may
    /// be: who says so is rarely wrong, unless it means to be.
    pub(super) fn foresee(&self, chunk: ChunkId, record: &Record) -> bool {
        let size = u64::from(record.size.max(LEAST_FORESEEN));
        let most = self.read_bytes.load(Ordering::Relaxed) * FORESEEN.1 + FORESEEN.0;
        let most = most.min(MOST_FORESEEN);
        let may = self.foreseen_bytes.load(Ordering::Relaxed) + size <= most;
        if may && self.foreseen.insert(chunk) {
            self.foreseen_bytes.fetch_add(size, Ordering::Relaxed);
        }
        may
    }

    /// A file of such a name is read. Says whether one had been read before.
    pub(super) fn again(&self, kin: Kin) -> bool {
        !self.names.lock().insert(kin.name)
    }

    /// Whether the chunk was fetched though nobody had asked for it.
    pub(super) fn is_guessed(&self, chunk: ChunkId) -> bool {
        self.guessed.contains(chunk) || self.foreseen.contains(chunk)
    }

    /// Whether the chunk was fetched because a file says that it is needed.
    pub(super) fn was_foreseen(&self, chunk: ChunkId) -> bool {
        self.foreseen.contains(chunk)
    }

    /// Whether there is or was a plan.
    pub(super) fn has_plan(&self) -> bool {
        self.planned.read().is_some()
    }

    /// Whether the chunk is or was going to be fetched by a plan that pays.
    pub(super) fn is_planned(&self, chunk: ChunkId, record: &Record) -> bool {
        !self.is_resting() && self.is_within(chunk, record)
    }

    /// Whether the chunk is in the plan.
    pub(super) fn is_within(&self, chunk: ChunkId, record: &Record) -> bool {
        match &*self.planned.read() {
            None => false,
            Some(Planned::Before(end)) => record.unit.offset < *end,
            Some(Planned::Chunks(chunks)) => chunks.contains(chunk),
        }
    }

    /// Whether the chunk has been read.
    pub(super) fn contains(&self, chunk: ChunkId) -> bool {
        self.read.contains(chunk)
    }

    /// A chunk is read. Says, for the first time only, whether it had been
    /// guessed.
    pub(super) fn read(&self, chunk: ChunkId, record: &Record) -> Option<bool> {
        if !self.read.insert(chunk) {
            return None;
        }
        let size = u64::from(record.size);
        let before = self.read_bytes.fetch_add(size, Ordering::AcqRel);
        let guessed = self.guessed.contains(chunk);
        if guessed {
            self.wrong_bytes.fetch_sub(size, Ordering::Relaxed);
        }
        if self.planned.read().is_none() {
            return Some(guessed || self.foreseen.contains(chunk));
        }
        let within = self.is_within(chunk, record);
        let step = |beside: u32| match within {
            true => Some(beside.saturating_sub(WORTH)),
            // Nor is what was judged not to fit judged better.
            false => Some((beside + 1).min(PATIENCE * 2).max(beside)),
        };
        let _ = self
            .beside
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, step);
        if within || (before < TELLING && before + size >= TELLING) {
            self.changed.notify_waiters();
        }
        Some(guessed || self.foreseen.contains(chunk))
    }

    /// Returns once following the plan pays: at once, unless reads have gone
    /// elsewhere.
    pub(super) async fn pays(&self) {
        self.until(|| !self.is_resting()).await;
    }

    /// Whether nothing tells yet if the plan is of what runs, nor is it too late
    /// for that to matter.
    pub(super) fn is_in_doubt(&self) -> bool {
        !self.is_told() && self.doubt_ends() > Instant::now()
    }

    /// Returns once it is no longer in doubt.
    pub(super) async fn without_doubt(&self) {
        let told = self.until(|| self.is_told());
        let _ = timeout_at(self.doubt_ends(), told).await;
    }

    fn is_told(&self) -> bool {
        self.judged.load(Ordering::Acquire) || self.read_bytes.load(Ordering::Acquire) >= TELLING
    }

    fn doubt_ends(&self) -> Instant {
        *self.since.get_or_init(Instant::now) + DOUBT
    }

    async fn until(&self, is_so: impl Fn() -> bool) {
        loop {
            let changed = self.changed.notified();
            if is_so() {
                return;
            }
            changed.await;
        }
    }

    fn is_resting(&self) -> bool {
        self.beside.load(Ordering::Acquire) >= PATIENCE
    }

    /// Whether what is read is what was planned.
    pub(super) fn fits(&self) -> bool {
        self.beside.load(Ordering::Acquire) == 0
    }

    /// Bytes, uncompressed, that may be fetched on a guess now, where `times` as
    /// many may be wrong as were read.
    pub(super) fn credit(&self, times: u64) -> u64 {
        let earned = self.read_bytes.load(Ordering::Relaxed) + FREE_GUESSES;
        earned
            .saturating_mul(times)
            .saturating_sub(self.wrong_bytes.load(Ordering::Relaxed))
    }
}
