//! Which images of an index are wanted.

use sluice_oci::{Descriptor, Platform};

/// The platforms to convert.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Platforms {
    /// Every one.
    #[default]
    All,
    /// These alone. Without a variant, every variant matches.
    Only(Vec<Platform>),
}

impl Platforms {
    /// Whether an image of that platform is wanted.
    pub(crate) fn want(&self, platform: &Platform) -> bool {
        match self {
            Self::All => true,
            Self::Only(wanted) => wanted.iter().any(|w| w.is_met_by(platform)),
        }
    }
}

/// Whether an entry of an index is no image to run, but a statement about
/// one, such as a provenance attestation.
pub(crate) fn is_attestation(entry: &Descriptor) -> bool {
    let unknown = |p: &Platform| p.os == "unknown" && p.architecture == "unknown";
    entry.platform.as_ref().is_some_and(unknown)
}
