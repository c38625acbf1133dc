//! Profiles that are attached to images in their registries.

use sluice_layer::Profile;
use sluice_layer::profile::{ARTIFACT_TYPE, Attachment, Part};
use sluice_oci::{Digest, Reference};

use super::{Error, Remote};

/// The largest document that is fetched, as stored.
const MAX_DOCUMENT: u64 = 4 << 20;

/// A profile that is attached to an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachedProfile {
    /// What it says.
    pub profile: Profile,
    /// The content of all that it names, in its order, if it carries that.
    pub content: Option<Part>,
}

impl Remote {
    /// The profile that is attached to the image with that manifest, of
    /// several the one listed last. Takes two round trips.
    pub async fn attached(
        &self,
        reference: &Reference,
        manifest: Digest,
    ) -> Result<Option<AttachedProfile>, Error> {
        let client = self.client();
        let found = client.referrers(reference, manifest, ARTIFACT_TYPE).await?;
        let parse = |listed: &sluice_oci::Descriptor| Attachment::parse(&listed.annotations);
        let Some(attachment) = found.iter().rev().find_map(parse) else {
            return Ok(None);
        };
        let Part { digest, size } = attachment.document;
        if size > MAX_DOCUMENT {
            return Err(Error::Profile(format!(
                "its document has {size} bytes; at most {MAX_DOCUMENT} are fetched"
            )));
        }
        let document = client.blob(reference, digest).whole().await?;
        let document = document.collect(size as usize).await?;
        let profile = Profile::parse_compressed(&document);
        Ok(Some(AttachedProfile {
            profile: profile.map_err(|error| Error::Profile(error.to_string()))?,
            content: attachment.content,
        }))
    }
}
