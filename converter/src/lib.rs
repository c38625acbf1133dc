//! Image conversion as a library: reads an image from a registry or an OCI
//! layout, rewrites its layers into seekable ones, and writes it to another
//! place. It touches neither the terminal nor the environment.

mod document;
mod error;
mod inspect;
mod layout;
mod location;
mod source;

pub use error::Error;
pub use inspect::{InspectedImage, InspectedLayer, Inspection};
pub use location::{Location, LocationError};

/// Describes the image at `location`.
pub async fn inspect(location: &Location) -> Result<Inspection, Error> {
    inspect::inspect(&source::Source::open(location)?).await
}
