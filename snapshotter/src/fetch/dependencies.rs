//! Following what is read to what it loads: the libraries of a program, the
//! modules that a module imports, and theirs. What these are, somebody else
//! says; here they are fetched before they are asked for.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use sluice_layer::Unit;
use tokio::task::spawn_blocking;

use super::elf;
use super::foreseen::Need;
use super::inflight::Claim;
use super::layer::LazyLayer;
use super::reuse::Asked;
use crate::layer_dir::ChunkId;

/// Of a chunk that has come earlier, so much is looked into. Bytes.
const LARGEST_PART: u32 = 4 << 20;
/// Attempts to read what is fetched and may be gone again.
const ATTEMPTS: usize = 3;
/// A program is fetched whole where that costs no more than so many times as
/// much as a library may: it is certain to run, and most of its code does.
const PROGRAM: u64 = 4;
/// What a file names among its constants is read after what it was linked with,
/// of which there is less.
const CONSTANTS: usize = 1000;

/// Knows what the files of an image load.
pub trait Dependencies: std::fmt::Debug + Send + Sync + 'static {
    /// The files that this one loads when it is used, in the order in which it
    /// does. A guess, from whatever the file says. Looks into the file, whose
    /// bytes may have to come first.
    fn of<'f>(&'f self, file: &'f LazyFile) -> BoxFuture<'f, Vec<LazyFile>>;

    /// The files that texts mean which are among the constants of a program or
    /// library: absolute paths, and names with dots. A guess as well.
    fn named_in<'f>(
        &'f self,
        file: &'f LazyFile,
        texts: Vec<Vec<u8>>,
    ) -> BoxFuture<'f, Vec<LazyFile>>;
}

/// A file of a layer.
#[derive(Debug, Clone)]
pub struct LazyFile {
    layer: Arc<LazyLayer>,
    first: ChunkId,
}

impl LazyFile {
    /// The file of which the content begins at `offset` of the layer's data;
    /// none if no file does.
    pub fn at(layer: &Arc<LazyLayer>, offset: u64) -> Option<Self> {
        let table = layer.dir.chunks();
        let first = table.overlapping(offset, 1).next()?;
        let begins = table.kin(first).is_some() && table.get(first).data_offset == offset;
        begins.then(|| Self {
            layer: Arc::clone(layer),
            first,
        })
    }

    /// Its layer.
    pub fn layer(&self) -> &Arc<LazyLayer> {
        &self.layer
    }

    /// Where its content begins in the layer's data.
    pub fn offset(&self) -> u64 {
        self.layer.dir.chunks().get(self.first).data_offset
    }

    /// Its size in bytes, less zeros at its end.
    pub fn size(&self) -> u64 {
        let table = self.layer.dir.chunks();
        let end = table.get(*table.file_of(self.first).end()).data_end();
        end - self.offset()
    }

    /// Whether its layer is fetched by a plan that does not name it.
    pub fn is_beside_plan(&self) -> bool {
        let record = self.layer.dir.chunks().get(self.first);
        self.layer.reads.has_plan() && !self.layer.reads.is_within(self.first, &record)
    }

    /// Bytes of it, which are fetched as a guess if need be; none if there are
    /// no such bytes, they cannot be had, or nothing is guessed.
    pub async fn read(&self, range: Range<u64>) -> Option<Vec<u8>> {
        let len = range.end.min(self.size()).checked_sub(range.start)?;
        let offset = self.offset().checked_add(range.start)?;
        let layer = &self.layer;
        for _ in 0..ATTEMPTS {
            let chunks = layer.dir.chunks().overlapping(offset, len);
            let present = layer.dir.present();
            let missing: Vec<_> = chunks.filter(|&chunk| !present.contains(chunk)).collect();
            if missing.is_empty() {
                let mut bytes = vec![0; usize::try_from(len).ok()?];
                layer.dir.read_at(&mut bytes, offset).ok()?;
                return Some(bytes);
            }
            layer.fetch_at_once(&missing);
            for chunk in missing {
                let unit = layer.dir.chunks().get(chunk).unit;
                if let Some(waiter) = layer.in_flight.waiter(unit) {
                    let _ = waiter.wait().await;
                }
            }
        }
        None
    }

    /// What is fetched of it when it is about to be loaded: all of one up to
    /// `small` bytes, of a larger one the beginning, which tells the rest.
    fn missing(&self, small: u64) -> Vec<ChunkId> {
        let chunks = self.layer.dir.chunks().file_of(self.first);
        let last = match self.size() <= small {
            true => *chunks.end(),
            false => self.first,
        };
        let after = self.layer.dir.chunks().after(self.first);
        let chunks = std::iter::once(self.first).chain(after.take_while(|&chunk| chunk <= last));
        chunks.filter(|&c| self.layer.is_missing(c)).collect()
    }
}

/// The files of one layer that were followed.
#[derive(Debug, Default)]
pub(super) struct Followed {
    dependencies: Mutex<Option<Arc<dyn Dependencies>>>,
    /// When files are needed, by where they begin.
    needs: Mutex<HashMap<ChunkId, Need>>,
    /// From how many steps away those that have come were looked into.
    seen: Mutex<HashMap<ChunkId, usize>>,
    /// Programs and libraries that are needed: their first chunks, their last,
    /// and when.
    elf: Mutex<BTreeMap<ChunkId, (ChunkId, Need)>>,
    /// The first chunks of others that have come as guesses.
    guessed_elf: Mutex<HashSet<ChunkId>>,
}

impl Followed {
    /// Whether the file is needed earlier than was known.
    fn is_needed(&self, first: ChunkId, need: Need) -> bool {
        let mut needs = self.needs.lock();
        let earlier = needs.get(&first).is_none_or(|known| need < *known);
        if earlier {
            needs.insert(first, need);
        }
        earlier
    }

    /// Whether the file, which is here, is fewer steps away from one that was
    /// read than when it was last looked into.
    fn comes(&self, first: ChunkId, need: Need) -> bool {
        let mut seen = self.seen.lock();
        let steps = need.steps();
        let nearer = seen.get(&first).is_none_or(|&known| steps < known);
        if nearer {
            seen.insert(first, steps);
        }
        nearer
    }
}

impl LazyLayer {
    /// Whether it is known what its files load.
    pub fn has_dependencies(&self) -> bool {
        self.followed.dependencies.lock().is_some()
    }

    /// From now on, what is read of it is followed to what `dependencies` say,
    /// and what has come already because every start needs it.
    pub fn set_dependencies(self: &Arc<Self>, dependencies: Arc<dyn Dependencies>) {
        *self.followed.dependencies.lock() = Some(dependencies);
        // Not what these load: the start of another image may have left it.
        let at_start: Vec<(ChunkId, Need)> = {
            let needs = self.followed.needs.lock();
            let at_start = needs.iter().filter(|(_, need)| need.is_at_start());
            at_start.map(|(&first, &need)| (first, need)).collect()
        };
        self.look_again(at_start);
    }

    /// Looks into what is here of files that are needed then.
    fn look_again(self: &Arc<Self>, files: Vec<(ChunkId, Need)>) {
        let layer = Arc::clone(self);
        self.spawn(async move {
            let look = move || {
                for (first, need) in files {
                    layer.look_at_present(first, need);
                }
            };
            let _ = spawn_blocking(look).await;
        });
    }

    /// The same of one of them, unless it is no program or library.
    fn look_at_present(self: &Arc<Self>, first: ChunkId, need: Need) {
        let (table, present) = (self.dir.chunks(), self.dir.present());
        let mut content = Vec::new();
        let last = *table.file_of(first).end();
        let after = table.after(first).take_while(|&chunk| chunk <= last);
        for chunk in std::iter::once(first).chain(after) {
            let record = table.get(chunk);
            content.resize(record.size.min(LARGEST_PART) as usize, 0);
            let here = present.contains(chunk);
            let here = here && self.dir.read_at(&mut content, record.data_offset).is_ok();
            if chunk == first {
                if !here || !self.fetch_loaded(first, need, &content) {
                    return;
                }
                self.fetch_dependencies(first, need);
                self.note_elf(first, need);
            }
            if here {
                self.fetch_named(first, need, &content);
            }
        }
    }

    /// The end of that, unless others have taken their place.
    pub fn clear_dependencies(&self, dependencies: &Arc<dyn Dependencies>) {
        let mut current = self.followed.dependencies.lock();
        if current
            .as_ref()
            .is_some_and(|c| Arc::ptr_eq(c, dependencies))
        {
            *current = None;
            self.followed.needs.lock().clear();
            self.followed.seen.lock().clear();
            self.followed.elf.lock().clear();
            self.followed.guessed_elf.lock().clear();
        }
    }

    /// These files, of whichever layers, are going to be read when a container
    /// starts, in this order.
    pub fn foresee_start(files: &[LazyFile]) {
        for (position, file) in files.iter().enumerate() {
            let Some(need) = Need::at_start(position) else {
                return;
            };
            let small = file.layer.small_file() * PROGRAM;
            file.layer.foresee_file(file, need, small);
        }
    }

    fn fetch_at_once(self: &Arc<Self>, chunks: &[ChunkId]) {
        if !self.guesses() {
            return;
        }
        let records = chunks
            .iter()
            .map(|&chunk| (chunk, self.dir.chunks().get(chunk)));
        let may = records.filter(|(chunk, record)| self.reads.foresee(*chunk, record));
        let units: BTreeSet<Unit> = may.map(|(_, record)| record.unit).collect();
        let claims: Vec<Claim> = units
            .into_iter()
            .filter_map(|unit| self.claim(unit))
            .collect();
        self.start_over(claims, self.link.parallel_gap(), Asked::default());
    }

    /// When the file that begins with this chunk is needed, if that is known.
    pub(super) fn need_of(&self, first: ChunkId) -> Option<Need> {
        self.followed.needs.lock().get(&first).copied()
    }

    /// The file that begins with `first` has come, and is needed then: what it
    /// loads is needed after it. Not of what comes by plan: so does what it
    /// loads.
    pub(super) fn fetch_dependencies(self: &Arc<Self>, first: ChunkId, need: Need) {
        let Some(dependencies) = self.followed.dependencies.lock().clone() else {
            return;
        };
        if need.of_named(0).is_none()
            || self.reads.is_planned(first, &self.dir.chunks().get(first))
            || !self.followed.comes(first, need)
        {
            return;
        }
        let file = LazyFile {
            layer: Arc::clone(self),
            first,
        };
        self.spawn(async move {
            let loaded = dependencies.of(&file).await;
            Self::foresee_named(&loaded, need, 0);
        });
    }

    /// Of the program or library that begins with `first`, which is needed then,
    /// a part has come.
    pub(super) fn fetch_named(self: &Arc<Self>, first: ChunkId, need: Need, content: &[u8]) {
        let Some(dependencies) = self.followed.dependencies.lock().clone() else {
            return;
        };
        let texts = elf::texts(content);
        if texts.is_empty() || need.of_named(CONSTANTS).is_none() {
            return;
        }
        let file = LazyFile {
            layer: Arc::clone(self),
            first,
        };
        self.spawn(async move {
            let named = dependencies.named_in(&file, texts).await;
            Self::foresee_named(&named, need, CONSTANTS);
        });
    }

    /// The file that begins with `first` is a program or library, and needed
    /// then.
    pub(super) fn note_elf(&self, first: ChunkId, need: Need) {
        if self.has_dependencies() {
            let last = *self.dir.chunks().file_of(first).end();
            self.followed.elf.lock().insert(first, (last, need));
        }
    }

    /// The file that begins with `first` is one as well, but came as a guess:
    /// nobody is known to need it.
    pub(super) fn note_guessed_elf(&self, first: ChunkId) {
        if self.has_dependencies() {
            self.followed.guessed_elf.lock().insert(first);
        }
    }

    /// Where the program or library begins that the chunk is of, and when it is
    /// needed; none if it is of none that is known.
    pub(super) fn elf_of(&self, chunk: ChunkId) -> Option<(ChunkId, Need)> {
        let elf = self.followed.elf.lock();
        let (&first, &(last, need)) = elf.range(..=chunk).next_back()?;
        (chunk <= last).then_some((first, need))
    }

    /// These files are needed after one that is needed then, from that position
    /// among what it names.
    fn foresee_named(files: &[LazyFile], need: Need, position: usize) {
        for (file, position) in files.iter().zip(position..) {
            let Some(need) = need.of_named(position) else {
                return;
            };
            let small = file.layer.small_file();
            file.layer.foresee_file(file, need, small);
        }
    }

    /// A file is needed then, all of it if it has no more than `small` bytes.
    /// Once it has come, so is what it loads.
    fn foresee_file(self: &Arc<Self>, file: &LazyFile, need: Need, small: u64) {
        if !self.guesses() || !self.followed.is_needed(file.first, need) {
            return;
        }
        self.fetch_foreseen(&file.missing(small), need);
        if self.followed.guessed_elf.lock().remove(&file.first) {
            self.look_again(vec![(file.first, need)]);
        } else if self.dir.present().contains(file.first) {
            self.fetch_dependencies(file.first, need);
        }
    }
}
