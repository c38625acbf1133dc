//! Images that mean different layers by one snapshot.
//!
//! containerd finds a snapshot by the chain ID that an image's configuration
//! gives, and does not ask here whether it shows that image's layer. So before
//! something is made from a lazily mounted layer of which it is not known yet
//! what it is, containerd's images are asked what they mean by its chain ID.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use rustix::process::Pid;
use sluice_oci::Digest;

use super::claims::{Claim, Standing};
use super::error::Error;
use super::labels;
use super::lazy_layers::LazyLayers;
use super::logic::Snapshots;
use super::metadata::NamedImage;
use super::snapshot::{Key, Labels};

/// How long requests wait until it is known what a layer is. No longer, and not
/// each of them: containerd's garbage collection waits for the request, and
/// what is asked for after that waits for the collection.
const WAIT: Duration = Duration::from_secs(30);
/// What contradicts is found out twice.
const ROUNDS: usize = 3;

/// A layer that is mounted lazily under a name by which an image means another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dispute {
    snapshot: Key,
    layer: Digest,
    image: Option<String>,
    other: String,
    /// Why it is not settled.
    why: Arc<str>,
}

impl fmt::Display for Dispute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            snapshot,
            layer,
            image,
            other,
            why,
        } = self;
        let image = image.as_deref().unwrap_or("an unknown image");
        let name = snapshot.in_containerd().1;
        write!(
            f,
            "snapshot '{name}' shows layer {layer} of {image}, which was not compared with its \
             name yet, and image {other} may mean another layer by that name; which is right is \
             found out from all of the layer, but is not known yet: {why}; try again, or remove \
             the image that you do not trust, and every other that shows this snapshot ('ctr \
             images remove --sync'), and pull again what is to run"
        )
    }
}

impl Dispute {
    /// Whether one of `images` means, or may mean, another layer by the name.
    fn new(claim: &Claim, images: &[NamedImage]) -> Option<Self> {
        let (chain_id, layer) = (claim.chain_id?, claim.layer?);
        let other = images.iter().find(|image| {
            let mut named = image.named.layers.iter();
            image.named.cut || named.any(|(name, blob)| *name == chain_id && *blob != Some(layer))
        })?;
        Some(Self {
            snapshot: claim.name.clone(),
            layer,
            image: claim.image.clone(),
            other: other.name.clone(),
            why: "what was found out does not tell".into(),
        })
    }
}

impl<L: LazyLayers> Snapshots<L> {
    /// Returns when no image of containerd's means anything else by `parent`
    /// and what lies below than that shows, or it is known that it is right; or
    /// wrong, which is refused later. To be called before `caller`, the process
    /// of that number if it is known, has a snapshot `key` made; changes
    /// nothing, and can be dropped at any time.
    pub async fn settle_disputes(
        &self,
        caller: Option<Pid>,
        key: &Key,
        parent: Option<&Key>,
        labels: &Labels,
    ) -> Result<(), Error> {
        // What containerd unpacks a layer into is asked about when something
        // is made from that.
        if labels::target(labels).is_some() {
            return Ok(());
        }
        let (Some(parent), Some(namespace)) = (parent, key.in_containerd().0) else {
            return Ok(());
        };
        let Some(metadata) = &self.metadata else {
            return Ok(());
        };
        let chain = match self.store().claims(parent.clone()).await {
            // Who goes on finds out.
            Err(Error::NotFound(_)) => return Ok(()),
            chain => chain?,
        };
        let mut asked: Option<Vec<NamedImage>> = None;
        let mut last = None;
        for _ in 0..ROUNDS {
            let standings = self.judge_each(&chain, &mut HashMap::new()).await;
            let wrong = |(_, own): &(_, Standing)| matches!(own, Standing::Contradicted(_));
            if standings.iter().any(wrong) {
                return Ok(());
            }
            let unknown = standings
                .iter()
                .filter(|(_, own)| *own == Standing::Unknown)
                .map(|(claim, _)| *claim);
            let unknown: Vec<&Claim> = unknown.collect();
            if unknown.is_empty() {
                return Ok(());
            }
            let images = match &asked {
                Some(images) => images,
                None => match metadata.images(caller, namespace).await {
                    Ok(Some(images)) => asked.insert(images),
                    Ok(None) => return Ok(()),
                    Err(source) => {
                        let snapshot = parent.clone();
                        return Err(Error::Images { snapshot, source });
                    }
                },
            };
            let disputes = unknown.into_iter().filter_map(|c| Dispute::new(c, images));
            let mut disputes: Vec<Dispute> = disputes.collect();
            if disputes.is_empty() {
                return Ok(());
            }
            for dispute in disputes.iter().filter(|_| last.is_none()) {
                let Dispute { layer, other, .. } = dispute;
                tracing::info!(%layer, other, "all of it is compared before it is shown again");
            }
            let settling = disputes.iter().map(|d| self.layers().settle(d.layer, WAIT));
            let settled = join_all(settling).await;
            for (dispute, settled) in disputes.drain(..).zip(settled) {
                last = Some(match settled {
                    Ok(()) => dispute,
                    Err(why) => {
                        return Err(Error::Disputed(Box::new(Dispute { why, ..dispute })));
                    }
                });
            }
        }
        match last {
            Some(dispute) => Err(Error::Disputed(Box::new(dispute))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::metadata::NamedLayers;
    use super::*;

    fn image(name: &str, layers: &[(Digest, Option<Digest>)], cut: bool) -> NamedImage {
        NamedImage {
            name: name.to_owned(),
            named: Arc::new(NamedLayers {
                layers: layers.to_vec(),
                cut,
            }),
        }
    }

    #[test]
    fn only_who_means_another_layer_by_the_name_disputes_it() {
        let [name, other_name, layer, other] = [b"n", b"o", b"l", b"x"].map(|t| Digest::of(t));
        let claim = Claim {
            name: "n".try_into().unwrap(),
            chain_id: Some(name),
            layer: Some(layer),
            image: None,
        };
        let same = image("same", &[(other_name, None), (name, Some(layer))], false);
        let elsewhere = image("elsewhere", &[(other_name, Some(other))], false);
        let disputes = |images: &[NamedImage]| {
            let dispute = Dispute::new(&claim, images);
            dispute.map(|dispute| dispute.other)
        };
        assert_eq!(disputes(&[]), None);
        assert_eq!(disputes(&[same.clone(), elsewhere.clone()]), None);
        for who in [
            image(
                "another",
                &[(name, Some(layer)), (name, Some(other))],
                false,
            ),
            image("sha512", &[(name, None)], false),
            image("endless", &[], true),
        ] {
            let expected = Some(who.name.clone());
            assert_eq!(disputes(&[same.clone(), elsewhere.clone(), who]), expected);
        }
        // Of what containerd has unpacked it knows what it is.
        let unpacked = Claim {
            layer: None,
            ..claim.clone()
        };
        let who = image("another", &[(name, Some(other))], false);
        assert_eq!(Dispute::new(&unpacked, &[who]), None);
    }
}
