//! Opening all layers of an image at once, and connections to its registry
//! beforehand.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use sluice_oci::{Descriptor, Digest, Reference};
use sluice_registry::Connections;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::Node;
use crate::profiles::ImageId;
use crate::remote::{Error, Known};
use crate::service::LayerRequest;

/// To a registry from which an image is about to be pulled: its table of
/// contents, what profiles are attached to it, and the first of what it reads
/// are asked for at once. To one that is far away, all requests of a prefetch
/// and two of readers find a connection; over a shorter round trip, to open
/// those that nobody needs takes more time than is saved.
const CONNECTIONS: Connections = Connections {
    near: 10,
    far: 18,
    far_from: Duration::from_millis(30),
};

/// How long connections are waited for that are being opened, rather than that
/// others are opened.
const MOMENT: Duration = Duration::from_millis(20);

/// Registries that are being connected to, by host.
pub(super) type Connecting = Mutex<HashMap<String, JoinHandle<()>>>;

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

    /// Connects to the registry of an image that is about to be pulled.
    pub fn connect_ahead(&self, reference: &Reference) {
        if !self.0.config.lazy_from.allows(reference) {
            return;
        }
        let (client, of) = (self.0.remote.client().clone(), reference.clone());
        let link = self.0.engine.link(reference.host());
        let connecting = tokio::spawn(async move {
            if let Some(round_trip) = client.connect_ahead(&of, CONNECTIONS).await {
                link.suppose(round_trip);
            }
        });
        let mut all = self.0.connecting.lock();
        all.insert(reference.host().to_owned(), connecting);
    }

    /// Returns when there are connections that were about to be there, as there
    /// are when the image's manifest has come over another.
    pub async fn connected(&self, reference: &Reference) {
        let connecting = self.0.connecting.lock().remove(reference.host());
        if let Some(connecting) = connecting {
            let _ = timeout(MOMENT, connecting).await;
        }
    }

    /// Remembers the layers of an image that is about to be pulled, so that its
    /// manifest is not fetched.
    pub fn know_image(&self, reference: &Reference, manifest: Digest, layers: Vec<Descriptor>) {
        self.0.remote.know_image(reference, manifest, layers);
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
