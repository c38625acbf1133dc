//! Telling the daemon behind a snapshotter of an image before containerd asks
//! for its layers, so that it connects and opens them meanwhile. Nothing waits
//! for it or depends on it: a snapshotter of another kind is not told.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use sluice_oci::{Digest, Reference};
use sluice_proto::control::v1::ExpectImageRequest;
use sluice_proto::control::v1::control_client::ControlClient;
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::node::Node;

/// A pull of which the daemon is told.
pub(crate) struct Ahead {
    manifest: oneshot::Sender<(Digest, Bytes)>,
    telling: AbortOnDropHandle<()>,
}

impl Ahead {
    /// Tells that `reference` is about to be pulled.
    pub(crate) fn of(node: &Arc<Node>, snapshotter: &str, reference: &Reference) -> Self {
        let (manifest, known) = oneshot::channel();
        let (node, snapshotter) = (Arc::clone(node), snapshotter.to_owned());
        let reference = reference.to_string();
        let telling = async move {
            let Some(address) = node.snapshotter_address(&snapshotter).await else {
                return;
            };
            if let Err(why) = tell(&address, reference, known).await {
                tracing::debug!("the daemon at {address} is not told of the image: {why}");
            }
        };
        Self {
            manifest,
            telling: AbortOnDropHandle::new(tokio::spawn(telling)),
        }
    }

    /// This is its manifest. What is under way ends with what is returned.
    pub(crate) fn has_manifest(self, digest: Digest, bytes: Bytes) -> AbortOnDropHandle<()> {
        // Nobody receives it where nobody can be told.
        let _ = self.manifest.send((digest, bytes));
        self.telling
    }
}

async fn tell(
    address: &str,
    reference: String,
    manifest: oneshot::Receiver<(Digest, Bytes)>,
) -> Result<(), Status> {
    let path = Path::new(address.strip_prefix("unix://").unwrap_or(address));
    let channel = containerd_client::connect(path).await;
    let channel = channel.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut daemon = ControlClient::new(channel);
    let by_name = ExpectImageRequest {
        reference: reference.clone(),
        ..ExpectImageRequest::default()
    };
    daemon.expect_image(by_name).await?;
    if let Ok((digest, bytes)) = manifest.await {
        let with_manifest = ExpectImageRequest {
            reference,
            manifest_digest: digest.to_string(),
            manifest: bytes.into(),
        };
        daemon.expect_image(with_manifest).await?;
    }
    Ok(())
}
