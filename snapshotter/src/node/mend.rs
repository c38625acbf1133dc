//! Making what only describes a layer again, where the disk has damaged it.

use std::fs;

use sluice_oci::Digest;
use tokio::task::spawn_blocking;

use super::Node;
use crate::layer_dir::{self, Identity, LayerDir, TEMPORARY};
use crate::remote::Known;

impl Node {
    /// Puts a damaged directory's `meta.erofs` and `chunks` right, with its
    /// content and where they are mounted. The answer is no when the directory
    /// does not say any more what it was made from. Fails when the registry
    /// does not help.
    pub(super) async fn mend(&self, digest: Digest) -> Result<bool, String> {
        let path = self.layer_path(digest);
        let identified = spawn_blocking(move || LayerDir::identify(&path)).await;
        let Ok(Ok(identity)) = identified else {
            return Ok(false);
        };
        if identity.digest != digest {
            return Ok(false);
        }
        let fetched = self
            .0
            .remote
            .fetch_toc(
                &identity.reference,
                digest,
                &Known::trusted(identity.trust),
                &mut |_| {},
            )
            .await
            .map_err(|error| error.to_string())?;
        let place = self
            .layers_dir()
            .join(format!("{TEMPORARY}mend-{}", digest.hex()));
        let _ = fs::remove_dir_all(&place);
        fs::create_dir(&place).map_err(|error| error.to_string())?;
        let Identity {
            reference, number, ..
        } = identity;
        let made = self.compile(place.clone(), fetched, digest, &reference, number);
        let made = made.await.map_err(|error| error.to_string());
        crash_point!("mend.compiled");
        let path = self.layer_path(digest);
        let mended = spawn_blocking(move || {
            let mended = made.and_then(|()| {
                let whole = place.join(digest.hex());
                layer_dir::mend(&path, &whole).map_err(|error| error.to_string())
            });
            crash_point!("mend.done");
            let _ = fs::remove_dir_all(&place);
            mended
        });
        mended.await.map_err(|error| error.to_string())?
    }
}
