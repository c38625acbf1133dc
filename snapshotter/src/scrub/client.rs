//! Asking a running daemon.

use std::path::{Path, PathBuf};

use sluice_proto::control::v1 as api;

use super::Report;
use super::grpc::from_message;

/// Why a daemon did not do it.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody answers.
    #[error(
        "cannot reach the daemon at {}: {source}; give its --config, or its --address",
        address.display()
    )]
    Unreachable {
        /// The socket.
        address: PathBuf,
        /// Why.
        source: tonic::transport::Error,
    },
    /// It broke off.
    #[error("the daemon says: {0}")]
    Refused(#[from] Box<tonic::Status>),
}

/// Has the daemon behind the socket check all its layers, and calls `each`
/// with what it finds.
pub async fn ask(address: &Path, mut each: impl FnMut(Report)) -> Result<(), AskError> {
    let channel = containerd_client::connect(address).await;
    let channel = channel.map_err(|source| AskError::Unreachable {
        address: address.to_owned(),
        source,
    })?;
    let mut client = api::scrub_client::ScrubClient::new(channel);
    let refused = |status| AskError::Refused(Box::new(status));
    let answer = client.run(api::ScrubRequest {}).await.map_err(refused)?;
    let mut layers = answer.into_inner();
    while let Some(layer) = layers.message().await.map_err(refused)? {
        if let Some(report) = from_message(layer) {
            each(report);
        }
    }
    Ok(())
}
