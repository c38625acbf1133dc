//! Converting one layer: decompress, cut, compress on all cores, write in
//! order. What is in flight is bounded, whatever the layer's size.

mod budget;
mod input;

use std::collections::BTreeMap;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::num::NonZero;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use sluice_layer::write::{
    Assembler, CompressedUnit, Options, Order, RawUnit, Split, Splitter, Tail, TarIndex,
    UnitCompressor, Units, WriteError, finish,
};
use sluice_layer::{Limits, StartReads, TocTrust, locate_toc, read_toc};
use sluice_oci::{Digest, Hasher};

use self::budget::Budget;
use self::input::pieces;
pub(crate) use self::input::{Counted, decompressed, spooled};
use crate::Error;
use crate::layout::Spool;

/// Uncompressed bytes between the splitter and the writer, besides what one
/// unit holds.
const IN_FLIGHT: u64 = 24 << 20;

/// How to convert.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) layer: Digest,
    pub(crate) size: u64,
    pub(crate) options: Options,
    pub(crate) prioritized: Arc<[String]>,
    pub(crate) start_reads: Option<Arc<StartReads>>,
    pub(crate) workers: NonZero<usize>,
    /// Where the result is spooled.
    pub(crate) spool: PathBuf,
    /// Where a tar whose entries change places is spooled.
    pub(crate) scratch: PathBuf,
    /// Set when nobody waits for the result any more.
    pub(crate) stop: Arc<AtomicBool>,
}

/// A converted layer.
#[derive(Debug)]
pub(crate) struct Converted {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) spool: Spool,
    pub(crate) tail: Tail,
    /// Digest of the tar that was read.
    pub(crate) input_diff_id: Option<Digest>,
    /// Prioritized names that the layer does not hold.
    pub(crate) missing: Vec<String>,
}

impl Job {
    /// Runs on the calling thread and some more until the layer is spooled.
    pub(crate) fn run(
        &self,
        blob: impl Read + Send,
        read: impl Fn(u64) + Send,
    ) -> Result<Converted, Error> {
        let blob = Counted::new(blob, read);
        let spool = Spool::new(&self.spool)?;
        let budget = Budget::new(IN_FLIGHT);
        let (jobs, job_queue) = mpsc::channel::<(u64, RawUnit)>();
        let (results, result_queue) = mpsc::channel();
        let job_queue = Mutex::new(job_queue);
        let (split, written) = thread::scope(|scope| {
            for _ in 0..self.workers.get() {
                let (queue, results) = (&job_queue, results.clone());
                scope.spawn(move || compress(&self.options, queue, &results));
            }
            drop(results);
            let (spool, budget) = (&spool, &budget);
            let writer = scope.spawn(move || {
                let written = write(spool, &result_queue, budget);
                // Lets the splitter go on, or stop if this failed.
                budget.close();
                written
            });
            let mut number = 0;
            let split = self.split(blob, budget, &mut |unit| {
                // Nobody listens if the writer failed, and it says why.
                if budget.take(unit.size() as u64) {
                    let _ = jobs.send((number, unit));
                    number += 1;
                }
            });
            drop(jobs);
            let written = writer.join().unwrap_or_else(|_| Err(self.stopped()));
            (split, written)
        });
        // A full disk stops the splitter too, but it is the reason.
        let mut written = written.map_err(|error| self.name(error))?;
        let (split, input_diff_id, missing) = split?;
        let tail = finish(split, written.placed).map_err(|cause| self.failed(&cause))?;
        spool.write_all(&tail.bytes)?;
        written.hasher.update(&tail.bytes);
        written.size += tail.bytes.len() as u64;
        self.check(&tail, written.size)?;
        Ok(Converted {
            digest: written.hasher.finish(),
            size: written.size,
            spool,
            input_diff_id: input_diff_id.or(tail.input_diff_id),
            tail,
            missing,
        })
    }

    fn failed(&self, cause: &WriteError) -> Error {
        Error::Layer {
            layer: self.layer,
            cause: cause.clone(),
        }
    }

    /// Stops when the writer failed or the conversion was given up.
    fn go_on(&self, budget: &Budget) -> Result<(), Error> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        if budget.is_closed() {
            return Err(self.stopped());
        }
        Ok(())
    }

    /// Another thread failed.
    fn stopped(&self) -> Error {
        self.failed(&WriteError::Compression("a thread stopped".to_owned()))
    }

    fn name(&self, error: Error) -> Error {
        match error {
            Error::Layer { cause, .. } => self.failed(&cause),
            other => other,
        }
    }

    /// Feeds the tar to a splitter, in its own order or prioritized files
    /// first.
    fn split(
        &self,
        blob: Counted<impl Read + Send, impl Fn(u64) + Send>,
        budget: &Budget,
        units: &mut Units<'_>,
    ) -> Result<(Split, Option<Digest>, Vec<String>), Error> {
        let failed = |cause: WriteError| self.failed(&cause);
        let start = |prioritized, units: &mut Units<'_>| {
            Splitter::new(&self.options, prioritized, units).map_err(failed)
        };
        if self.prioritized.is_empty() {
            let mut splitter = start(false, units)?;
            self.read(blob, |bytes| {
                self.go_on(budget)?;
                splitter.push(bytes, units).map_err(failed)
            })?;
            return Ok((splitter.finish(units).map_err(failed)?, None, Vec::new()));
        }
        let tar = Spool::new(&self.scratch)?;
        let mut index = TarIndex::new();
        let mut hasher = Hasher::new();
        self.read(blob, |bytes| {
            self.go_on(budget)?;
            hasher.update(bytes);
            tar.write_all(bytes)?;
            index.push(bytes).map_err(failed)
        })?;
        let padding = vec![0; index.padding_left()];
        tar.write_all(&padding)?;
        index.push(&padding).map_err(failed)?;
        let Order {
            prioritized,
            rest,
            missing,
        } = index.order(&self.prioritized).map_err(failed)?;
        let push = |splitter: &mut Splitter, range: Range<u64>, units: &mut Units<'_>| {
            let fail = Error::file("cannot read a temporary file in", &self.scratch);
            let mut file = tar.file();
            let mut part = match file.seek(SeekFrom::Start(range.start)) {
                Ok(_) => file.take(range.end - range.start),
                Err(cause) => return Err(fail(cause)),
            };
            let mut buffer = vec![0; 256 << 10];
            loop {
                self.go_on(budget)?;
                match part.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(n) => splitter.push(&buffer[..n], units).map_err(failed)?,
                    Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                    Err(cause) => return Err(fail(cause)),
                }
            }
        };
        let mut splitter = start(!prioritized.is_empty(), units)?;
        if !prioritized.is_empty() {
            for range in prioritized {
                push(&mut splitter, range, units)?;
            }
            let reads = self.start_reads.as_deref();
            splitter.end_prioritized(reads, units).map_err(failed)?;
        }
        for range in rest {
            push(&mut splitter, range, units)?;
        }
        let split = splitter.finish(units).map_err(failed)?;
        Ok((split, Some(hasher.finish()), missing))
    }

    /// Decompresses on a thread of its own, hands out the pieces here, and
    /// checks the blob's digest and size at the end.
    fn read(
        &self,
        blob: Counted<impl Read + Send, impl Fn(u64) + Send>,
        mut piece: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel(4);
            let reader = scope.spawn(move || pieces(blob, self.layer, &sender));
            for bytes in receiver {
                piece(&bytes)?;
            }
            match reader.join() {
                Ok(Ok(Some(end))) => end.check("layer", self.layer, self.size),
                Ok(Err(error)) => Err(error),
                Ok(Ok(None)) | Err(_) => Err(self.stopped()),
            }
        })
    }

    /// Reads the TOC back. A layer whose TOC nobody could mount is better
    /// left as it was.
    fn check(&self, tail: &Tail, blob_size: u64) -> Result<(), Error> {
        let unreadable = |why: String| {
            self.failed(&WriteError::Unsupported(format!(
                "it cannot be mounted from a TOC: {why}"
            )))
        };
        let location =
            locate_toc(&tail.bytes, blob_size).map_err(|cause| unreadable(cause.to_string()))?;
        let compressed = location
            .slice_of(&tail.bytes, blob_size)
            .ok_or_else(|| unreadable("its TOC is not where its footer says".to_owned()))?;
        let trust = TocTrust::Uncompressed(tail.toc_digest);
        read_toc(&location, compressed, &trust, &Limits::default())
            .map_err(|cause| unreadable(cause.to_string()))?;
        Ok(())
    }
}

type CompressionResult = Result<CompressedUnit, WriteError>;

/// A worker: compresses units until there are no more.
fn compress(
    options: &Options,
    queue: &Mutex<mpsc::Receiver<(u64, RawUnit)>>,
    results: &mpsc::Sender<(u64, u64, CompressionResult)>,
) {
    let mut compressor = UnitCompressor::new(options);
    loop {
        let next = match queue.lock() {
            Ok(queue) => queue.recv(),
            Err(_) => return,
        };
        let Ok((number, unit)) = next else { return };
        let result = match &mut compressor {
            Ok(compressor) => compressor.compress(&unit),
            Err(cause) => Err(cause.clone()),
        };
        if results.send((number, unit.size() as u64, result)).is_err() {
            return;
        }
    }
}

struct Written {
    hasher: Hasher,
    size: u64,
    placed: Assembler,
}

/// Puts compressed units back in order and writes them.
fn write(
    spool: &Spool,
    results: &mpsc::Receiver<(u64, u64, CompressionResult)>,
    budget: &Budget,
) -> Result<Written, Error> {
    let mut written = Written {
        hasher: Hasher::new(),
        size: 0,
        placed: Assembler::new(),
    };
    let mut early = BTreeMap::new();
    let mut next = 0;
    for (number, raw_size, unit) in results {
        let unit = unit.map_err(|cause| Error::Layer {
            layer: Digest::from_raw([0; 32]),
            cause,
        })?;
        early.insert(number, (raw_size, unit));
        while let Some((raw_size, unit)) = early.remove(&next) {
            spool.write_all(&unit.bytes)?;
            written.hasher.update(&unit.bytes);
            written.size += unit.bytes.len() as u64;
            written.placed.place(&unit);
            budget.give(raw_size);
            next += 1;
        }
    }
    Ok(written)
}
