//! What an image runs on: how it is written, and which image is meant.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Operating system and processor that an image is for, written
/// `linux/amd64` or `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Processor, as Go's `GOARCH` names it.
    pub architecture: String,
    /// Operating system, as Go's `GOOS` names it.
    pub os: String,
    /// Processor variant, for example `v8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Fields that Sluice does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// Why a text names no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no platform: write os/architecture or os/architecture/variant, for example linux/arm64"
)]
pub struct PlatformError(String);

impl Platform {
    /// This machine's, without a variant.
    pub fn of_this_machine() -> Self {
        Self::new("linux", std::env::consts::ARCH, None)
    }

    /// By the names of Go or of the kernel.
    fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let architecture = match architecture {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
            other: Map::new(),
        }
    }

    /// Whether an image for `image` is one for this platform. Without a
    /// variant, every variant is.
    pub fn is_met_by(&self, image: &Self) -> bool {
        self.os == image.os
            && self.architecture == image.architecture
            && (self.variant.is_none() || self.usual_variant() == image.usual_variant())
    }

    /// The variant, or the one that an architecture without it means.
    fn usual_variant(&self) -> Option<&str> {
        match (self.variant.as_deref(), self.architecture.as_str()) {
            (None, "arm64") => Some("v8"),
            (None, "arm") => Some("v7"),
            (variant, _) => variant,
        }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || PlatformError(text.to_owned());
        let parts: Vec<&str> = text.split('/').collect();
        let is_name = |part: &&str| {
            let ok = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            !part.is_empty() && part.chars().all(ok)
        };
        if !parts.iter().all(is_name) {
            return Err(refused());
        }
        match parts[..] {
            [os, architecture] => Ok(Self::new(os, architecture, None)),
            [os, architecture, variant] => Ok(Self::new(os, architecture, Some(variant))),
            _ => Err(refused()),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if let Some(variant) = &self.variant {
            write!(f, "/{variant}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        text.parse().unwrap()
    }

    #[test]
    fn variants_match_when_not_named_or_usual() {
        let meets = |wanted: &str, image: &str| platform(wanted).is_met_by(&platform(image));
        for (wanted, image) in [
            ("linux/arm64", "linux/arm64/v8"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm", "linux/arm/v6"),
            ("linux/arm/v7", "linux/arm/v7"),
            ("linux/arm/v7", "linux/arm"),
        ] {
            assert!(meets(wanted, image), "{wanted} by {image}");
        }
        for (wanted, image) in [
            ("linux/arm/v7", "linux/arm/v6"),
            ("linux/arm64/v9", "linux/arm64"),
            ("linux/amd64/v2", "linux/amd64"),
            ("linux/amd64", "windows/amd64"),
        ] {
            assert!(!meets(wanted, image), "{wanted} by {image}");
        }
    }

    #[test]
    fn reads_what_it_writes_and_refuses_the_rest() {
        for text in ["linux/amd64", "linux/arm/v7"] {
            assert_eq!(platform(text).to_string(), text);
        }
        let bad = [
            "",
            "linux",
            "linux/",
            "/amd64",
            "a/b/",
            "a/b/c/d",
            "linux/am d64",
        ];
        for text in bad {
            let error = text.parse::<Platform>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("'{text}' is no platform")));
        }
    }
}
