//! The content that an attached profile carries: what a start needs of all
//! layers, in the order of need, as one compressed stream.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::future::select_all;
use futures_util::stream::{FuturesOrdered, StreamExt as _};
use sluice_layer::profile::decode_content;
use sluice_layer::{Unit, verify_chunk};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::ahead::Handle;
use super::incoming::{Arrived, Incoming};
use super::inflight::Claim;
use super::layer::LazyLayer;
use super::reads::Planned;
use super::stream::{Patience, courtesy};
use super::{Link, Priority, RangeSource, SourceError, Unstored};
use crate::layer_dir::{ChunkId, Present};

/// Readers of what is within so many uncompressed bytes of the place that the
/// stream has come to wait for it; what lies behind they ask for themselves.
const CLAIMED: u64 = 2 << 20;
/// Ranges that have arrived and wait to be decoded.
const QUEUED: usize = 4;

/// A part of the content.
#[derive(Debug, Clone)]
pub struct Piece {
    /// Its bytes, uncompressed.
    pub size: u64,
    /// Which chunk that is. None is passed over.
    pub chunk: Option<(Arc<LazyLayer>, ChunkId)>,
}

/// Content to be received.
pub struct Content {
    /// Where it is.
    pub source: Box<dyn RangeSource>,
    /// Its size as stored.
    pub size: u64,
    /// What is in it, in its order.
    pub pieces: Vec<Piece>,
}

impl Content {
    /// Receives it and stores what is missing, each chunk once it has the
    /// digest that its layer's TOC gives. `done` is called at the end, and
    /// told whether all of it came.
    pub fn receive(self, done: impl FnOnce(bool) + Send + 'static) -> Option<Handle> {
        let chunks = |piece: &Piece| piece.chunk.clone();
        let first = self.pieces.iter().find_map(chunks)?.0;
        let missing =
            |(layer, chunk): &(Arc<LazyLayer>, ChunkId)| !layer.dir().present().contains(*chunk);
        if !self.pieces.iter().filter_map(chunks).any(|c| missing(&c)) {
            return None;
        }
        let layers = self.layers();
        let by = Arc::clone(&first);
        Some(first.go(async move {
            take_over(&self.pieces).await;
            if !self.pieces.iter().filter_map(chunks).any(|c| missing(&c)) {
                return done(true);
            }
            let (sender, receiver) = mpsc::channel(QUEUED);
            let pieces = self.pieces;
            let decoding = tokio::task::spawn_blocking(move || decode(pieces, receiver));
            let fetched = fetch(&by, &layers, &*self.source, self.size, sender).await;
            let decoded = decoding.await;
            let why = match (&fetched, &decoded) {
                (Err(error), _) => Some(error.to_string()),
                (_, Ok(Err(error))) => Some(error.to_string()),
                (_, Err(_)) => Some("decoding it failed; see the log".to_owned()),
                _ => None,
            };
            if let Some(why) = &why {
                tracing::warn!("the content of an attached profile is given up: {why}");
            }
            done(why.is_none());
        }))
    }

    /// The layers that it is of, told what is on its way.
    fn layers(&self) -> Vec<Arc<LazyLayer>> {
        let mut layers: HashMap<_, (Arc<LazyLayer>, Present)> = HashMap::new();
        for (layer, chunk) in self.pieces.iter().filter_map(|piece| piece.chunk.as_ref()) {
            let new = || {
                let none = Present::empty(layer.dir().chunks().len());
                (Arc::clone(layer), none)
            };
            let (_, planned) = layers.entry(layer.digest()).or_insert_with(new);
            planned.insert(*chunk);
        }
        let told = |(layer, planned): (Arc<LazyLayer>, Present)| {
            layer.reads().plan(Planned::Chunks(planned));
            layer
        };
        layers.into_values().map(told).collect()
    }
}

/// Takes from other layers what they have of it.
async fn take_over(pieces: &[Piece]) {
    let mut layers: HashMap<_, (&Arc<LazyLayer>, BTreeSet<Unit>)> = HashMap::new();
    for (layer, chunk) in pieces.iter().filter_map(|piece| piece.chunk.as_ref()) {
        let dir = layer.dir();
        if !dir.present().contains(*chunk) {
            let (_, units) = layers
                .entry(layer.digest())
                .or_insert((layer, BTreeSet::new()));
            units.insert(dir.chunks().get(*chunk).unit);
        }
    }
    for (layer, units) in layers.into_values() {
        layer.take_over(units.into_iter().collect()).await;
    }
}

/// Fetches the whole in ranges, several of them under way, and hands them on
/// in order. Ends early when nobody takes them any more.
async fn fetch(
    by: &LazyLayer,
    layers: &[Arc<LazyLayer>],
    source: &dyn RangeSource,
    size: u64,
    to: mpsc::Sender<Arrived>,
) -> Result<(), SourceError> {
    let link = by.engine().link(source.host());
    let mut flights = FuturesOrdered::new();
    let mut next = 0;
    while next < size || !flights.is_empty() {
        let may_ask = next < size && (flights.len() as u64) < in_flight(&link);
        if may_ask {
            let is_in_doubt = layers.iter().all(|layer| layer.reads().is_in_doubt());
            if is_in_doubt && next >= link.doubtful() {
                let reads = layers.iter().map(|layer| layer.reads());
                select_all(reads.map(|reads| Box::pin(reads.without_doubt()))).await;
                continue;
            }
            // Of one layer at least, what it carries is being read.
            select_all(layers.iter().map(|layer| Box::pin(layer.reads().pays()))).await;
            let engine = by.engine();
            if let Some((quiet, longest)) = courtesy(by) {
                engine.give_way(quiet, longest, || false).await;
            }
            let len = link.piece_of_plan(is_in_doubt).min(size - next);
            let permit = engine.admission().admit(Priority::Prefetch, len).await;
            let offset = next;
            next += len;
            let link = &link;
            flights.push_back(async move {
                let bytes = range(by, source, link, offset, len).await?;
                Ok::<_, SourceError>((bytes, permit))
            });
            continue;
        }
        if let Some(arrived) = flights.next().await
            && to.send(arrived?).await.is_err()
        {
            return Ok(());
        }
    }
    Ok(())
}

/// How many ranges keep the link busy, with one to spare for the time that
/// handing one on takes.
fn in_flight(link: &Link) -> u64 {
    link.outstanding().div_ceil(link.piece()) + 1
}

async fn range(
    by: &LazyLayer,
    source: &dyn RangeSource,
    link: &Arc<Link>,
    offset: u64,
    len: u64,
) -> Result<Bytes, SourceError> {
    let mut patience = Patience::new(by);
    let mut bytes = BytesMut::with_capacity(len as usize);
    loop {
        let (from, before) = (offset + bytes.len() as u64, bytes.len());
        let Err(error) = more(source, link, from, offset + len, &mut bytes).await else {
            return Ok(bytes.freeze());
        };
        if bytes.len() > before {
            patience.renew();
        }
        let wait = patience.after(&error).ok_or(error)?;
        tokio::time::sleep(wait).await;
    }
}

async fn more(
    source: &dyn RangeSource,
    link: &Arc<Link>,
    from: u64,
    end: u64,
    bytes: &mut BytesMut,
) -> Result<(), SourceError> {
    let sent = Instant::now();
    let mut left = (end - from) as usize;
    let mut body = source.range(from, end - from).await?;
    link.answered(sent.elapsed());
    let mut receiving = link.receive();
    while left > 0 {
        let piece = body.next().await?.ok_or_else(SourceError::truncated)?;
        let piece = &piece[..piece.len().min(left)];
        receiving.received(piece.len() as u64, true);
        bytes.extend_from_slice(piece);
        left -= piece.len();
    }
    Ok(())
}

/// Decodes, verifies and stores. What does not verify is passed over: whoever
/// reads it asks the image's registry.
fn decode(pieces: Vec<Piece>, receiver: mpsc::Receiver<Arrived>) -> io::Result<()> {
    let mut decoder = decode_content(Incoming::new(receiver))?;
    let mut claims = Claims::default();
    let mut bytes = Vec::new();
    let mut wrong = 0;
    for (at, piece) in pieces.iter().enumerate() {
        claims.extend(&pieces, at);
        match &piece.chunk {
            Some((layer, chunk)) if !layer.dir().present().contains(*chunk) => {
                bytes.resize(piece.size as usize, 0);
                decoder.read_exact(&mut bytes)?;
                let digest = layer.dir().chunks().get(*chunk).digest;
                match verify_chunk(&bytes, digest) {
                    // What the disk does not take is fetched when it is read.
                    Some(verified) => drop(layer.store(*chunk, &verified)),
                    None => wrong += 1,
                }
            }
            _ => {
                let skipped = (&mut decoder).take(piece.size);
                if io::copy(&mut { skipped }, &mut io::sink())? < piece.size {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
        claims.done(piece);
    }
    if wrong > 0 {
        let what = "chunks of it are not those of the image";
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{wrong} {what}"),
        ));
    }
    Ok(())
}

/// The units that the stream is about to bring, claimed so that their readers
/// wait for it.
#[derive(Default)]
struct Claims {
    claims: HashMap<Key, (Option<Claim>, u32)>,
    /// How far it has claimed: a position in the pieces, and bytes beyond the
    /// one that is decoded.
    next: usize,
    ahead: u64,
}

/// A layer, by its number, and a unit's offset.
type Key = (u64, u64);

impl Claims {
    fn extend(&mut self, pieces: &[Piece], at: usize) {
        while self.next <= at || self.ahead < CLAIMED {
            let Some(piece) = pieces.get(self.next) else {
                return;
            };
            self.next += 1;
            self.ahead += piece.size;
            let Some((layer, chunk)) = &piece.chunk else {
                continue;
            };
            let unit = layer.dir().chunks().get(*chunk).unit;
            let claim = || (layer.claim(unit), 0);
            let key = (layer.dir().identity().number, unit.offset);
            self.claims.entry(key).or_insert_with(claim).1 += 1;
        }
    }

    fn done(&mut self, piece: &Piece) {
        self.ahead = self.ahead.saturating_sub(piece.size);
        let Some((layer, chunk)) = &piece.chunk else {
            return;
        };
        let unit = layer.dir().chunks().get(*chunk).unit;
        let key = (layer.dir().identity().number, unit.offset);
        if let Some((_, left)) = self.claims.get_mut(&key) {
            *left -= 1;
            if *left == 0
                && let Some((Some(claim), _)) = self.claims.remove(&key)
            {
                // Who waits looks whether what it needs was among it.
                claim.finish(Ok(Unstored::default()));
            }
        }
    }
}
