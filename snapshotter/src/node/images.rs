//! Opening all layers of an image at once.

use futures_util::future::join_all;

use super::Node;
use crate::profiles::ImageId;
use crate::remote::{Error, Known};
use crate::service::LayerRequest;

impl From<&LayerRequest> for ImageId {
    fn from(request: &LayerRequest) -> Self {
        Self {
            reference: Some(request.reference.to_string()),
            manifest: request.manifest_digest,
            layers: request.image_layers.clone(),
        }
    }
}

impl Node {
    /// What vouches for the layer's TOC: the labels when they carry it, and
    /// otherwise the image's manifest.
    pub(super) async fn known(&self, request: &LayerRequest) -> Result<Known, Error> {
        let known = Known::new(&request.annotations, None)?;
        if known.trust().is_some() {
            return Ok(known);
        }
        let layers = self
            .0
            .remote
            .layers(&request.reference, request.manifest_digest, request.digest)
            .await?;
        layers
            .into_iter()
            .find(|layer| layer.digest == request.digest)
            .map(|layer| layer.known)
            .ok_or_else(|| Error::NotInImage(request.reference.clone()))
    }

    /// Opens the other layers of the request's image, so that the requests for
    /// them, which come one after the other, find the work done. What fails
    /// here is told when it is asked for.
    pub(super) async fn open_image(&self, request: &LayerRequest) {
        let known = self
            .0
            .remote
            .layers(&request.reference, request.manifest_digest, request.digest)
            .await;
        let image = &ImageId::from(request);
        let layers = match known {
            Ok(layers) => layers,
            Err(error) => {
                tracing::debug!(image = %request.reference, "not opened ahead: {error}");
                return;
            }
        };
        let others = layers.into_iter().filter(|layer| {
            layer.digest != request.digest
                && request.image_layers.contains(&layer.digest)
                && layer.known.trust().is_some()
        });
        join_all(others.map(|layer| async move {
            // The budget of the node, not of the image: many images may be
            // pulled at once.
            let Ok(_turn) = self.0.opening.acquire().await else {
                return;
            };
            let opened = self.open_layer(&request.reference, image, layer.digest, &layer.known);
            if let Err(error) = opened.await {
                tracing::debug!("not opened ahead: {error}");
            }
        }))
        .await;
    }
}
