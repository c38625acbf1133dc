//! Bytes that need not be fetched: chunks that other layers of the node, or
//! other files of the same one, have already or are about to have.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use sluice_layer::{Unit, verify_chunk};
use sluice_oci::{Digest, Reference};
use tokio::task::spawn_blocking;

use super::Unstored;
use super::inflight::{Claim, Waiter};
use super::layer::LazyLayer;
use super::stream::Terms;
use crate::layer_dir::{ChunkId, LayerDir};

/// Knows what other layers of the node hold.
pub trait ChunkFinder: std::fmt::Debug + Send + Sync + 'static {
    /// Where a chunk of this digest and size is, or will be soon, that a layer
    /// of the image `by` may have. Nobody believes the answer before the bytes
    /// are verified. Blocks for some reads of the disk.
    fn find(&self, digest: Digest, size: u32, by: &Reference) -> Option<Found>;
}

/// See [`ChunkFinder`].
#[derive(Debug)]
pub enum Found {
    /// A directory claims to have it.
    There(Arc<LayerDir>, ChunkId),
    /// A layer fetches it now.
    Coming(Arc<LazyLayer>, ChunkId),
}

/// What a reader waits for: other chunks of the same units may come as well,
/// and need not.
#[derive(Debug, Default)]
pub(super) struct Asked {
    pub(super) units: BTreeSet<Unit>,
    /// Of `data`.
    pub(super) range: Range<u64>,
}

/// A claimed unit, and where its chunks are.
struct Local {
    claim: Claim,
    chunks: Vec<(ChunkId, Arc<LayerDir>, ChunkId)>,
}

/// Claimed units, by where their bytes come from.
#[derive(Default)]
struct Parted {
    local: Vec<Local>,
    coming: Vec<(Claim, Vec<Waiter>)>,
    rest: Vec<Claim>,
}

impl LazyLayer {
    /// Whether somebody has asked a registry for the chunk and it has not come
    /// yet.
    pub fn is_coming(&self, chunk: ChunkId) -> bool {
        self.coming(chunk).is_some()
    }

    /// Brings claimed units: from other layers what they have, and the rest in
    /// as few requests as pay, over gaps of so many bytes, or in one on these
    /// terms.
    pub(super) async fn bring(
        self: Arc<Self>,
        claims: Vec<Claim>,
        gap: u64,
        asked: Asked,
        terms: Option<Terms>,
    ) {
        let layer = Arc::clone(&self);
        let parted = spawn_blocking(move || {
            let mut parted = layer.part(claims, &asked);
            let gaps = layer.claim_gaps(&mut parted.rest, gap);
            let between = layer.part(gaps, &Asked::default());
            parted.local.extend(between.local);
            parted.coming.extend(between.coming);
            parted.rest.extend(between.rest);
            // Whoever waits comes first.
            let waits = |local: &Local| asked.units.contains(&local.claim.unit());
            parted.local.sort_by_key(|local| !waits(local));
            (parted, asked)
        });
        // Claims that went with a panic wake their waiters.
        let Ok((parted, asked)) = parted.await else {
            return;
        };
        match terms {
            Some(terms) => self.request_on(parted.rest, terms),
            None => self.request(parted.rest, &asked.units),
        }
        if !parted.coming.is_empty() {
            self.engine.join();
        }
        for (claim, waiters) in parted.coming {
            let layer = Arc::clone(&self);
            let (units, range) = (asked.units.clone(), asked.range.clone());
            let asked = Asked { units, range };
            self.spawn(layer.follow_others(claim, waiters, asked));
        }
        let failed = self.copy(parted.local).await;
        self.request(failed, &asked.units);
    }

    /// Waits for what other layers fetch, and takes it from them; what they do
    /// not get is fetched.
    async fn follow_others(self: Arc<Self>, claim: Claim, waiters: Vec<Waiter>, asked: Asked) {
        for waiter in waiters {
            let _ = waiter.wait().await;
        }
        let layer = Arc::clone(&self);
        let parted = spawn_blocking(move || (layer.part(vec![claim], &asked), asked)).await;
        let Ok((parted, asked)) = parted else { return };
        let mut claims = self.copy(parted.local).await;
        // Nobody waits for ever for others that try again and again.
        claims.extend(parted.coming.into_iter().map(|(claim, _)| claim));
        claims.extend(parted.rest);
        self.request(claims, &asked.units);
    }

    /// Takes from other layers what they have of these units, and leaves the
    /// rest.
    pub(super) async fn take_over(self: &Arc<Self>, units: Vec<Unit>) {
        if self.engine.finder().is_none() {
            return;
        }
        let layer = Arc::clone(self);
        let found = spawn_blocking(move || {
            let is_there = |unit: &Unit| {
                let chunks = layer.missing_of(*unit, &Asked::default());
                let find = |&(chunk, _): &(ChunkId, bool)| layer.find(chunk);
                let there = |chunk| matches!(find(chunk), Some(Found::There(..)));
                !chunks.is_empty() && chunks.iter().all(there)
            };
            // Nobody is to wait for what turns out not to be there.
            let units = units.into_iter().filter(is_there);
            let claims = units.filter_map(|unit| layer.claim(unit)).collect();
            layer.part(claims, &Asked::default()).local
        });
        if let Ok(local) = found.await {
            drop(self.copy(local).await);
        }
    }

    /// Parts claimed units by where their bytes come from. Blocks.
    fn part(&self, claims: Vec<Claim>, asked: &Asked) -> Parted {
        let mut parted = Parted::default();
        if self.engine.finder().is_none() {
            parted.rest = claims;
            return parted;
        }
        for claim in claims {
            let mut chunks = Vec::new();
            let mut waiters = Vec::new();
            let mut all = true;
            // Of a unit that others need as well, all that is there is taken,
            // so that who wants another chunk of it need not come again for
            // each.
            for (chunk, wanted) in self.missing_of(claim.unit(), asked) {
                match self.find(chunk) {
                    Some(Found::There(dir, theirs)) => chunks.push((chunk, dir, theirs)),
                    Some(Found::Coming(layer, theirs)) if wanted => {
                        let waiter = layer.coming(theirs);
                        // It has come, or not, since that was said.
                        all &= waiter.is_some();
                        waiters.extend(waiter);
                    }
                    _ => all &= !wanted,
                }
            }
            match (all, waiters.is_empty()) {
                (true, true) => parted.local.push(Local { claim, chunks }),
                (true, false) => parted.coming.push((claim, waiters)),
                (false, _) => parted.rest.push(claim),
            }
        }
        parted
    }

    fn find(&self, chunk: ChunkId) -> Option<Found> {
        let record = self.dir.chunks().get(chunk);
        let by = &self.dir.identity().reference;
        self.engine.finder()?.find(record.digest, record.size, by)
    }

    /// The chunks of a unit that are missing, and whether each is wanted: a
    /// reader waits for it, or for nothing of the unit in particular.
    fn missing_of(&self, unit: Unit, asked: &Asked) -> Vec<(ChunkId, bool)> {
        let (table, present) = (self.dir.chunks(), self.dir.present());
        let all = !asked.units.contains(&unit);
        let is_asked = |chunk: ChunkId| {
            let record = table.get(chunk);
            record.data_offset < asked.range.end && record.data_end() > asked.range.start
        };
        let chunks = table.of_unit(unit.offset);
        let missing = chunks.filter(|&chunk| !present.contains(chunk));
        missing
            .map(|chunk| (chunk, all || is_asked(chunk)))
            .collect()
    }

    /// Copies units, and returns those that were not there after all.
    async fn copy(self: &Arc<Self>, local: Vec<Local>) -> Vec<Claim> {
        let sizes = local.iter().flat_map(|local| &local.chunks);
        let sizes = sizes.map(|(chunk, ..)| self.dir.chunks().get(*chunk).size);
        let Some(largest) = sizes.max() else {
            // Some may have become present, and nothing was left to find.
            local
                .into_iter()
                .for_each(|local| local.claim.finish(Ok(Unstored::default())));
            return Vec::new();
        };
        // A core and memory, as for what is decoded.
        let awaited = local.iter().any(|local| local.claim.is_awaited());
        let Some(core) = self.engine.decoder(u64::from(largest), awaited).await else {
            return Vec::new();
        };
        let layer = Arc::clone(self);
        let copied = spawn_blocking(move || {
            let _core = core;
            let mut failed = Vec::new();
            for Local { claim, chunks } in local {
                crash_point!("copy.found");
                match layer.copy_unit(&chunks, claim.is_awaited()) {
                    Some(unstored) => {
                        claim.finish(Ok(unstored));
                        crash_point!("copy.told");
                    }
                    None => failed.push(claim),
                }
            }
            failed
        });
        copied.await.unwrap_or_default()
    }

    fn copy_unit(
        &self,
        chunks: &[(ChunkId, Arc<LayerDir>, ChunkId)],
        awaited: bool,
    ) -> Option<Unstored> {
        let mut unstored = Unstored::default();
        for (chunk, dir, theirs) in chunks {
            let record = self.dir.chunks().get(*chunk);
            // One that could not be read is written anew.
            let shared = !self.unreadable.lock().contains_key(chunk)
                && self.dir.share(*chunk, dir, *theirs).unwrap_or(false);
            if !shared {
                let mut bytes = vec![0; record.size as usize];
                let offset = dir.chunks().get(*theirs).data_offset;
                let read = dir.read_at(&mut bytes, offset);
                let Some(verified) = verify_chunk(&bytes, record.digest) else {
                    self.not_there(dir, offset, read.err());
                    return None;
                };
                self.look_into(*chunk, &verified, awaited);
                if !self.store(*chunk, &verified) && awaited {
                    unstored.add(*chunk, self.keep_unstored(*chunk, &verified));
                }
            }
            self.count_reused(u64::from(record.size));
        }
        Some(unstored)
    }
}
