//! Whether lazily mounted layers are those that their snapshots are named for.
//!
//! containerd names a committed snapshot by its chain ID, and takes one that is
//! there for the content that the name stands for. Of a layer that it unpacks it
//! has compared the digest of the tar; of one that was mounted before it was
//! downloaded nobody has, until the data plane knows what its tar is.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use sluice_oci::Digest;

use super::error::Error;
use super::lazy_layers::{LazyLayers, Proof};
use super::logic::Snapshots;
use super::snapshot::{Info, Key, Kind, Labels};

/// A committed snapshot, with what it is said to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Its name here.
    pub(crate) name: Key,
    /// The digest over its diff ID and those below.
    pub(crate) chain_id: Option<Digest>,
    /// Its layer, if that is mounted lazily; of others, containerd has compared
    /// the content.
    pub(crate) layer: Option<Digest>,
    /// The image through which it was asked for.
    pub(crate) image: Option<String>,
}

impl Claim {
    pub(super) fn new(name: Key, labels: &Labels, layer: Option<Digest>) -> Self {
        let named = super::labels::target(labels).filter(|_| layer.is_some());
        let named = named.as_ref().unwrap_or(&name).in_containerd().1;
        Self {
            chain_id: named.parse().ok(),
            layer,
            image: super::labels::image(labels),
            name,
        }
    }
}

/// Whether the content of a snapshot is what its name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It is, and so is all below.
    Verified,
    /// That is not known yet.
    Unknown,
    /// It is not.
    Contradicted(Contradiction),
}

/// A snapshot whose content is not what its name says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contradiction {
    snapshot: Key,
    image: Option<String>,
    layer: Digest,
    claimed: Digest,
    what: String,
}

impl Standing {
    /// In one word.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Verified => "verified",
            Self::Unknown => "unknown",
            Self::Contradicted(_) => "contradicted",
        }
    }
}

impl fmt::Display for Contradiction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            snapshot,
            image,
            layer,
            claimed,
            what,
        } = self;
        let image = image.as_deref().unwrap_or("an unknown image");
        let name = snapshot.in_containerd().1;
        write!(
            f,
            "layer {layer} of {image} is not what the image says, chain ID {claimed}: {what}; \
             nothing new is made from snapshot '{name}': remove the image, every other that shows \
             this snapshot, and what runs from them, and pull again what is to be trusted"
        )
    }
}

/// The chain ID of a layer over what has the chain ID `below`.
fn chain_id(below: Option<Digest>, diff_id: Digest) -> Digest {
    match below {
        None => diff_id,
        Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
    }
}

/// Compares the claim of a lazily mounted layer with what is known of its tar.
/// The answer is none when that contradicts, but may be wrong itself.
fn compare(claim: &Claim, below: Option<&Claim>, proof: Option<Proof>) -> Option<Standing> {
    let (Some(layer), Some(claimed)) = (claim.layer, claim.chain_id) else {
        return Some(Standing::Unknown);
    };
    let Some(proof) = proof else {
        return Some(Standing::Unknown);
    };
    let below = match below.map(|below| below.chain_id) {
        Some(None) => return Some(Standing::Unknown),
        Some(below) => below,
        None => None,
    };
    let what = match proof.diff_id {
        None => "its blob holds no tar that is cut as its table of contents says".to_owned(),
        Some(diff_id)
            if [Some(diff_id), proof.padded]
                .into_iter()
                .flatten()
                .all(|diff_id| chain_id(below, diff_id) != claimed) =>
        {
            let over = below.map_or_else(String::new, |below| format!(" over {below}"));
            let chain = chain_id(below, diff_id);
            format!("its diff ID is {diff_id}{over}, which is chain ID {chain}")
        }
        Some(_) if !proof.tree_fits => {
            "its table of contents describes other files than its tar holds".to_owned()
        }
        Some(_) => return Some(Standing::Verified),
    };
    proof.certain.then(|| {
        Standing::Contradicted(Contradiction {
            snapshot: claim.name.clone(),
            image: claim.image.clone(),
            layer,
            claimed,
            what,
        })
    })
}

/// That of what stands on both.
fn together(below: Standing, own: Standing) -> Standing {
    match (below, own) {
        (Standing::Contradicted(why), _) | (_, Standing::Contradicted(why)) => {
            Standing::Contradicted(why)
        }
        (Standing::Verified, Standing::Verified) => Standing::Verified,
        _ => Standing::Unknown,
    }
}

impl<L: LazyLayers> Snapshots<L> {
    /// What is known of a committed snapshot and all below it.
    pub async fn standing(&self, parent: &Key) -> Result<Standing, Error> {
        let chain = self.store().claims(parent.clone()).await?;
        Ok(self.judge(&chain, &mut HashMap::new()).await)
    }

    /// What is known of a snapshot. One of a lazily mounted layer has a label
    /// more, which tells whether it is what it is named for.
    pub async fn stat_with_standing(&self, key: Key) -> Result<Info, Error> {
        let mut info = self.stat(key).await?;
        if info.kind == Kind::Committed {
            let chain = self.store().claims(info.name.clone()).await?;
            if chain.first().is_some_and(|claim| claim.layer.is_some()) {
                let standing = self.judge(&chain, &mut HashMap::new()).await;
                super::labels::tell_standing(&mut info.labels, &standing);
            }
        }
        Ok(info)
    }

    /// Fails when a snapshot over `parent` would show what is not what it is
    /// named for.
    pub(super) async fn refuse_contradicted(&self, parent: Option<&Key>) -> Result<(), Error> {
        let Some(parent) = parent else { return Ok(()) };
        match self.standing(parent).await {
            Ok(Standing::Contradicted(why)) => Err(Error::Contradicted(Box::new(why))),
            // Who goes on finds out that it was removed.
            Ok(Standing::Verified | Standing::Unknown) | Err(Error::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// `chain` is given nearest first; `proofs` are those that were looked up.
    async fn judge(
        &self,
        chain: &[Claim],
        proofs: &mut HashMap<Digest, Option<Proof>>,
    ) -> Standing {
        let each = self.judge_each(chain, proofs).await;
        each.into_iter()
            .fold(Standing::Verified, |below, (_, own)| together(below, own))
    }

    /// What is known of each snapshot of a lazily mounted layer by itself, the
    /// lowest first.
    pub(super) async fn judge_each<'a>(
        &self,
        chain: &'a [Claim],
        proofs: &mut HashMap<Digest, Option<Proof>>,
    ) -> Vec<(&'a Claim, Standing)> {
        let mut standings = Vec::new();
        let mut below = None;
        for claim in chain.iter().rev() {
            if let Some(layer) = claim.layer {
                let proof = match proofs.get(&layer) {
                    Some(proof) => *proof,
                    None => self.layers().proof(layer).await,
                };
                proofs.insert(layer, proof);
                let own = compare(claim, below, proof).unwrap_or_else(|| {
                    // Who needs to know it waits for it.
                    drop(self.layers().settle(layer, Duration::ZERO));
                    Standing::Unknown
                });
                standings.push((claim, own));
            }
            below = Some(claim);
        }
        standings
    }

    /// Of every lazily mounted layer, the worst that is known of a snapshot of
    /// it.
    pub async fn standings(&self) -> Result<HashMap<Digest, Standing>, Error> {
        let mut all: HashMap<Digest, Standing> = HashMap::new();
        let mut proofs = HashMap::new();
        for chain in self.store().all_claims().await? {
            let Some(layer) = chain.first().and_then(|claim| claim.layer) else {
                continue;
            };
            let own = self.judge(&chain, &mut proofs).await;
            let known = all.remove(&layer).unwrap_or(Standing::Verified);
            all.insert(layer, together(known, own));
        }
        Ok(all)
    }

    /// Says which snapshots are not what they are named for, as soon as that is
    /// known. Never ends.
    pub async fn watch_claims(&self) {
        // What a former process had found out, it has said.
        loop {
            let layer = self.layers().next_proof().await;
            let chains = match self.store().all_claims().await {
                Ok(chains) => chains,
                Err(error) => {
                    tracing::warn!(%layer, "{error}");
                    continue;
                }
            };
            let of_layer =
                |chain: &&Vec<Claim>| chain.first().is_some_and(|c| c.layer == Some(layer));
            for chain in chains.iter().filter(of_layer) {
                let snapshot = &chain[0].name;
                match self.judge(chain, &mut HashMap::new()).await {
                    Standing::Contradicted(why) => tracing::error!("{why}"),
                    Standing::Verified => {
                        tracing::info!(%layer, %snapshot, "it is what its image says");
                    }
                    Standing::Unknown => {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(chain_id: Option<Digest>, layer: &[u8]) -> Claim {
        Claim {
            name: "n".try_into().unwrap(),
            chain_id,
            layer: Some(Digest::of(layer)),
            image: None,
        }
    }

    fn proof(diff_id: Option<Digest>, tree_fits: bool, certain: bool) -> Option<Proof> {
        Some(Proof {
            diff_id,
            padded: None,
            tree_fits,
            certain,
        })
    }

    #[test]
    fn a_layer_is_compared_with_its_name_over_the_name_below() {
        let [a, b, x] = [&b"a"[..], b"b", b"x"].map(Digest::of);
        let ab = Digest::of(format!("{a} {b}").as_bytes());
        let (base, top) = (claim(Some(a), b"1"), claim(Some(ab), b"2"));
        let fits = proof(Some(b), true, false);
        assert_eq!(
            compare(&base, None, proof(Some(a), true, false)),
            Some(Standing::Verified)
        );
        assert_eq!(compare(&top, Some(&base), fits), Some(Standing::Verified));
        assert_eq!(compare(&top, Some(&base), None), Some(Standing::Unknown));
        assert_eq!(
            compare(&top, Some(&claim(None, b"1")), fits),
            Some(Standing::Unknown)
        );
        for (diff_id, tree_fits) in [(Some(x), true), (Some(b), false), (None, false)] {
            assert_eq!(
                compare(&top, Some(&base), proof(diff_id, tree_fits, false)),
                None
            );
            let certain = compare(&top, Some(&base), proof(diff_id, tree_fits, true));
            assert!(
                matches!(certain, Some(Standing::Contradicted(_))),
                "{certain:?}"
            );
        }
        // Of a tar whose last zeros were dropped.
        for (padded, expected) in [(Some(b), Some(Standing::Verified)), (Some(a), None)] {
            let proof = proof(Some(x), true, false).map(|proof| Proof { padded, ..proof });
            assert_eq!(compare(&top, Some(&base), proof), expected);
        }
        // Right, but of something else.
        assert_eq!(compare(&top, None, fits), None);
    }
}
