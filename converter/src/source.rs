//! Reading an image, wherever it is.

use sluice_oci::Descriptor;

use crate::layout::Layout;
use crate::{Error, Location};

/// An image that exists.
#[derive(Debug)]
pub(crate) enum Source {
    /// In a layout directory.
    Layout { layout: Layout, tag: Option<String> },
}

impl Source {
    pub(crate) fn open(location: &Location) -> Result<Self, Error> {
        match location {
            Location::Layout { directory, tag } => Ok(Self::Layout {
                layout: Layout::open(directory)?,
                tag: tag.clone(),
            }),
            Location::Registry(reference) => Err(Error::NoLayout {
                path: reference.to_string().into(),
                why: "it is a registry reference".to_owned(),
            }),
        }
    }

    /// The document that the location names.
    pub(crate) async fn root(&self) -> Result<(Descriptor, Vec<u8>), Error> {
        match self {
            Self::Layout { layout, tag } => {
                let root = layout.find(tag.as_deref())?;
                let bytes = layout.document("manifest", root.digest)?;
                Ok((root, bytes))
            }
        }
    }

    /// A manifest or configuration.
    pub(crate) async fn document(
        &self,
        what: &'static str,
        descriptor: &Descriptor,
    ) -> Result<Vec<u8>, Error> {
        match self {
            Self::Layout { layout, .. } => layout.document(what, descriptor.digest),
        }
    }
}
