//! Image conversion as a library: reads an image from a registry or an OCI
//! layout, rewrites its layers into seekable ones, and writes it to another
//! place; and inspects and verifies such images. It touches neither the
//! terminal nor the environment.

mod attach;
mod convert;
mod destination;
mod document;
mod error;
mod inspect;
mod layout;
mod location;
mod media;
mod pipeline;
mod platform;
mod progress;
mod source;
mod toc;
mod verify;

use std::path::Path;
use std::sync::Arc;

use sluice_registry::Client;

pub use attach::{Attached, Attaching, attach};
pub use convert::{Conversion, Report};
pub use error::Error;
pub use inspect::{InspectedImage, InspectedLayer, InspectedToc, Inspection, Lazy};
pub use location::{Location, LocationError};
pub use platform::Platforms;
pub use progress::{Event, LayerOutcome, Progress};
pub use verify::Verification;

/// Converts the image at `from` and stores the result at `to`. The name of
/// the result is written last: an error leaves `to` as it was.
pub async fn convert(
    client: &Client,
    from: &Location,
    to: &Location,
    conversion: &Conversion,
    progress: Arc<dyn Progress>,
) -> Result<Report, Error> {
    let source = source::Source::open(client, from)?;
    // Nothing is made at the destination for an image that does not exist.
    source.root().await?;
    let destination = destination::Destination::open(client, to, &conversion.scratch)?;
    convert::Converter::new(source, destination, conversion, progress)
        .run()
        .await
}

/// Describes the image at `location`.
pub async fn inspect(client: &Client, location: &Location) -> Result<Inspection, Error> {
    inspect::inspect(&source::Source::open(client, location)?).await
}

/// Checks the image at `location`. Blobs are held in `scratch` meanwhile.
pub async fn verify(
    client: &Client,
    location: &Location,
    scratch: &Path,
) -> Result<Verification, Error> {
    verify::verify(&source::Source::open(client, location)?, scratch).await
}
