//! Where an image is: in a registry or in an OCI layout directory.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use sluice_oci::{Reference, ReferenceError};

/// What `SRC` and `DST` name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// An image in a registry.
    Registry(Reference),
    /// An image in an OCI layout directory, written `oci:DIR[:TAG]`.
    Layout {
        /// The directory.
        directory: PathBuf,
        /// The image's `org.opencontainers.image.ref.name`; without one, the
        /// only image of the layout.
        tag: Option<String>,
    },
}

/// Why a text names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    /// Neither `oci:` nor a reference.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// `oci:` and nothing after it.
    #[error("'{0}' names no directory: write oci:DIR or oci:DIR:TAG")]
    NoDirectory(String),
}

impl Location {
    /// The reference, if the image is in a registry.
    pub fn reference(&self) -> Option<&Reference> {
        match self {
            Self::Registry(reference) => Some(reference),
            Self::Layout { .. } => None,
        }
    }
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some(rest) = text.strip_prefix("oci:") else {
            return Ok(Self::Registry(text.parse()?));
        };
        // A colon in a directory's name belongs to the directory unless what
        // follows it can be a tag.
        let (directory, tag) = match rest.rsplit_once(':') {
            Some((directory, tag)) if !tag.is_empty() && !tag.contains('/') => {
                (directory, Some(tag.to_owned()))
            }
            _ => (rest.trim_end_matches(':'), None),
        };
        if directory.is_empty() {
            return Err(LocationError::NoDirectory(text.to_owned()));
        }
        Ok(Self::Layout {
            directory: directory.into(),
            tag,
        })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::Layout { directory, tag } => {
                write!(f, "oci:{}", directory.display())?;
                if let Some(tag) = tag {
                    write!(f, ":{tag}")?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_and_references() {
        for (text, directory, tag) in [
            ("oci:a/b", "a/b", None),
            ("oci:a/b:v1", "a/b", Some("v1")),
            ("oci:/x:y/z", "/x:y/z", None),
            ("oci:/x:", "/x", None),
        ] {
            let expected = Location::Layout {
                directory: directory.into(),
                tag: tag.map(str::to_owned),
            };
            assert_eq!(text.parse::<Location>().unwrap(), expected, "{text}");
        }
        let text = "127.0.0.1:5000/app:v1";
        assert_eq!(text.parse::<Location>().unwrap().to_string(), text);
    }

    #[test]
    fn refuses_what_names_no_image() {
        for bad in ["oci:", "oci::", "", "UPPER//x"] {
            assert!(bad.parse::<Location>().is_err(), "{bad}");
        }
    }
}
