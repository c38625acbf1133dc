//! Which images of an index are wanted.

use std::fmt;
use std::str::FromStr;

use sluice_oci::{Descriptor, Platform};

/// The platforms to convert.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Platforms {
    /// Every one.
    #[default]
    All,
    /// These alone.
    Only(Vec<WantedPlatform>),
}

/// `os/arch` or `os/arch/variant`. Without a variant, every variant matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedPlatform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

/// Why a text names no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no platform: write os/architecture or os/architecture/variant, for example linux/arm64"
)]
pub struct PlatformError(String);

impl FromStr for WantedPlatform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let part = |part: &&str| {
            let ok = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            !part.is_empty() && part.chars().all(ok)
        };
        let parts: Vec<&str> = text.split('/').collect();
        let (os, architecture, variant) = match parts.as_slice() {
            [os, arch] => (os, arch, None),
            [os, arch, variant] => (os, arch, Some((*variant).to_owned())),
            _ => return Err(PlatformError(text.to_owned())),
        };
        if !parts.iter().all(part) {
            return Err(PlatformError(text.to_owned()));
        }
        Ok(Self {
            os: (*os).to_owned(),
            architecture: match *architecture {
                "x86_64" => "amd64".to_owned(),
                "aarch64" => "arm64".to_owned(),
                other => other.to_owned(),
            },
            variant,
        })
    }
}

impl fmt::Display for WantedPlatform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if let Some(variant) = &self.variant {
            write!(f, "/{variant}")?;
        }
        Ok(())
    }
}

impl WantedPlatform {
    fn matches(&self, platform: &Platform) -> bool {
        self.os == platform.os
            && self.architecture == platform.architecture
            && (self.variant.is_none() || self.variant == platform.variant)
    }
}

impl Platforms {
    /// Whether an image of that platform is wanted.
    pub(crate) fn want(&self, platform: &Platform) -> bool {
        match self {
            Self::All => true,
            Self::Only(wanted) => wanted.iter().any(|w| w.matches(platform)),
        }
    }
}

/// How a platform is written.
pub fn platform_text(platform: &Platform) -> String {
    let Platform {
        os,
        architecture,
        variant,
        ..
    } = platform;
    match variant {
        Some(variant) => format!("{os}/{architecture}/{variant}"),
        None => format!("{os}/{architecture}"),
    }
}

/// Whether an entry of an index is no image to run, but a statement about
/// one, such as a provenance attestation.
pub(crate) fn is_attestation(entry: &Descriptor) -> bool {
    let unknown = |p: &Platform| p.os == "unknown" && p.architecture == "unknown";
    entry.platform.as_ref().is_some_and(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        let wanted: WantedPlatform = text.parse().unwrap();
        Platform {
            architecture: wanted.architecture,
            os: wanted.os,
            variant: wanted.variant,
            other: Default::default(),
        }
    }

    #[test]
    fn variants_match_when_not_named() {
        let wants = |wanted: &str, platform_is: &str| {
            Platforms::Only(vec![wanted.parse().unwrap()]).want(&platform(platform_is))
        };
        assert!(wants("linux/arm64", "linux/arm64/v8"));
        assert!(wants("linux/aarch64", "linux/arm64"));
        assert!(wants("linux/arm/v7", "linux/arm/v7"));
        assert!(!wants("linux/arm/v7", "linux/arm/v6"));
        assert!(!wants("linux/arm64/v8", "linux/arm64"));
        assert!(!wants("linux/amd64", "windows/amd64"));
    }

    #[test]
    fn refuses_what_is_no_platform() {
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/am d64"] {
            assert!(bad.parse::<WantedPlatform>().is_err(), "{bad}");
        }
    }
}
