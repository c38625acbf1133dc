//! Fetching a TOC in as few requests as can be.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use sluice_layer::{
    FOOTER_MAX, LayerAnnotations, Limits, TocLocation, TocTrust, locate_toc, read_toc,
};
use sluice_oci::{Digest, Reference};
use sluice_registry::{Blob, ByteRange, Senders};

use super::budget::memory_for;
use super::{Error, Known, Remote, Taken};

/// The end of a blob that is asked for when nothing is known of its size.
const TAIL: u64 = 256 << 10;
/// Bounds when the size is known: TOCs take some hundredth of their blobs.
const TAIL_MIN: u64 = 64 << 10;
const TAIL_MAX: u64 = 1 << 20;
const TAIL_PART: u64 = 64;

/// A TOC as it arrived, not yet checked.
#[derive(Debug)]
pub struct FetchedToc {
    location: TocLocation,
    compressed: Bytes,
    trust: TocTrust,
    blob_size: u64,
    senders: Vec<Senders>,
    /// How long the first of its parts was waited for.
    waited: Duration,
    /// The memory that it is in.
    memory: Arc<Taken>,
}

/// Is told how many bytes came.
pub type Arrived<'a> = &'a mut (dyn FnMut(u64) + Send);

/// A TOC as the blob stores it.
#[derive(Debug)]
pub struct StoredToc {
    bytes: Bytes,
    _memory: Arc<Taken>,
}

impl AsRef<[u8]> for StoredToc {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A part of a blob as it arrived.
struct Part {
    /// From the request to the first of the answer.
    waited: Duration,
    offset: u64,
    blob_size: Option<u64>,
    bytes: Bytes,
    senders: Senders,
}

impl Remote {
    /// Fetches the layer's TOC: with one request when the annotations say
    /// where it is or the guess was long enough, and otherwise with two. What
    /// they say may be wrong: see [`Error::is_misplaced`]. `arrived` is told how
    /// many bytes came each time that some of the first request's do.
    pub async fn fetch_toc(
        &self,
        reference: &Reference,
        digest: Digest,
        known: &Known,
        arrived: Arrived<'_>,
    ) -> Result<FetchedToc, Error> {
        let trust = known.trust().ok_or(Error::NoTrust)?;
        let blob = self.client().blob(reference, digest);
        let annotations = &known.annotations;
        match annotations.toc_location().or(annotations.toc_hint()) {
            Some(location) => self.at(&blob, location, trust, known.size, arrived).await,
            None => self.in_tail(&blob, trust, known, arrived, false).await,
        }
    }

    async fn at(
        &self,
        blob: &Blob,
        location: TocLocation,
        trust: TocTrust,
        size: Option<u64>,
        arrived: Arrived<'_>,
    ) -> Result<FetchedToc, Error> {
        location.check(&self.limits)?;
        let memory = self.budget.arrive(location.compressed_size).await?;
        let range = ByteRange::From {
            offset: location.offset,
            len: location.compressed_size,
        };
        let limit = location.compressed_size as usize;
        let part = self.part(blob, range, limit, arrived).await?;
        Ok(FetchedToc {
            waited: part.waited,
            senders: vec![part.senders],
            compressed: part.bytes,
            location,
            trust,
            blob_size: part.blob_size.or(size).ok_or(Error::NoSize)?,
            memory: Arc::new(memory),
        })
    }

    /// A part of the blob, within the time that it may take.
    async fn part(
        &self,
        blob: &Blob,
        range: ByteRange,
        limit: usize,
        arrived: Arrived<'_>,
    ) -> Result<Part, Error> {
        self.in_time(async {
            let sent = Instant::now();
            let body = blob.range(range).await?;
            let waited = sent.elapsed();
            let (offset, blob_size, senders) = (body.offset, body.blob_size, body.senders());
            let bytes = body.collect_telling(limit, arrived).await?;
            Ok(Part {
                waited,
                offset,
                blob_size,
                senders,
                bytes,
            })
        })
        .await
    }

    async fn in_tail(
        &self,
        blob: &Blob,
        trust: TocTrust,
        known: &Known,
        arrived: Arrived<'_>,
        again: bool,
    ) -> Result<FetchedToc, Error> {
        let guess = guess(&known.annotations, known.size);
        let part = self
            .part(blob, ByteRange::Suffix(guess), guess as usize, arrived)
            .await?;
        let tail = part.bytes;
        let blob_size = part.blob_size.unwrap_or(part.offset + tail.len() as u64);
        let mut senders = vec![part.senders];
        let start = blob_size
            .checked_sub(tail.len() as u64)
            .ok_or(Error::NoSize)?;
        let location = match locate_toc(&tail, blob_size) {
            // Another host may have the right end.
            Err(_) if !again && senders[0].distrust() => {
                return Box::pin(self.in_tail(blob, trust, known, &mut |_| {}, true)).await;
            }
            location => location?,
        };
        location.check(&self.limits)?;
        let memory = self.budget.arrive(location.compressed_size).await?;
        let compressed = match location.slice_of(&tail, blob_size) {
            Some(compressed) => tail.slice_ref(compressed),
            None => {
                // Only what the tail did not hold.
                let wanted = location.range();
                let range = ByteRange::From {
                    offset: wanted.start,
                    len: wanted.end.min(start).saturating_sub(wanted.start),
                };
                let limit = location.compressed_size as usize;
                let part = self.part(blob, range, limit, &mut |_| {}).await?;
                senders.push(part.senders);
                let mut whole = BytesMut::with_capacity(limit);
                whole.extend_from_slice(&part.bytes);
                let rest = (wanted.end.saturating_sub(start) as usize).min(tail.len());
                whole.extend_from_slice(&tail[..rest]);
                whole.freeze()
            }
        };
        Ok(FetchedToc {
            location,
            compressed,
            trust,
            blob_size,
            senders,
            waited: part.waited,
            memory: Arc::new(memory),
        })
    }
}

/// How many bytes are asked for first to fetch a TOC.
pub fn asked_for_toc(known: &Known) -> u64 {
    let annotations = &known.annotations;
    match annotations.toc_location().or(annotations.toc_hint()) {
        Some(location) => location.compressed_size,
        None => guess(annotations, known.size),
    }
}

/// How much of the blob's end to ask for.
fn guess(annotations: &LayerAnnotations, size: Option<u64>) -> u64 {
    let size = size.or(annotations.uncompressed_size().map(|size| size / 3));
    let guess = match size {
        Some(size) => (size / TAIL_PART).clamp(TAIL_MIN, TAIL_MAX),
        None => TAIL,
    };
    guess.max(FOOTER_MAX as u64)
}

impl FetchedToc {
    /// Size of the blob.
    pub fn blob_size(&self) -> u64 {
        self.blob_size
    }

    /// How long it took from the request to the first of the answer.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The hosts that sent it.
    pub fn senders(&self) -> Vec<Senders> {
        self.senders.clone()
    }

    /// What the TOC is to match.
    pub fn trust(&self) -> TocTrust {
        self.trust
    }

    /// The TOC as it is stored.
    pub fn stored(&self) -> StoredToc {
        StoredToc {
            bytes: self.compressed.clone(),
            _memory: Arc::clone(&self.memory),
        }
    }

    /// Digest of the TOC as it is stored.
    pub fn compressed_digest(&self) -> Digest {
        Digest::of(&self.compressed)
    }

    /// How much memory reading it takes, going by what an honest one takes.
    pub fn likely_memory(&self) -> u64 {
        let stated = match (
            self.location.uncompressed_size,
            self.compressed.last_chunk(),
        ) {
            (Some(size), _) => size,
            // A gzip member ends in its size.
            (None, Some(size)) => u64::from(u32::from_le_bytes(*size)),
            (None, None) => 0,
        };
        memory_for(stated)
    }

    /// Checks, decompresses and parses it within `memory`. Takes a core for a
    /// while.
    pub fn read(&self, remote: &Remote, memory: &Taken) -> Result<sluice_layer::Toc, Error> {
        let limits = Limits {
            max_memory: memory.for_tree(),
            ..remote.limits.clone()
        };
        Ok(read_toc(
            &self.location,
            &self.compressed,
            &self.trust,
            &limits,
        )?)
    }
}
