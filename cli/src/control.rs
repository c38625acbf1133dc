//! The daemon's control service, as seen from the command line.

use std::path::Path;

use anyhow::anyhow;
use sluice_proto::control::v1::control_client::ControlClient;
use sluice_snapshotter::control::MAX_MESSAGE;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::pull::node::causes;

/// A connection to the daemon.
pub(crate) async fn connect(socket: &Path) -> anyhow::Result<ControlClient<Channel>> {
    let channel = containerd_client::connect(socket).await.map_err(|error| {
        anyhow!(
            "cannot reach the daemon at {}: {}; check that sluice-snapshotter runs, that \
             --address names its socket, and that you may open it (root)",
            socket.display(),
            causes(&error)
        )
    })?;
    Ok(ControlClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

/// What the daemon says of a call that failed.
pub(crate) fn failed(status: &Status) -> anyhow::Error {
    match status.code() {
        Code::Unimplemented => {
            anyhow!("the daemon is older than this command; upgrade it, or use its own 'sluice'")
        }
        _ => anyhow!("{}", status.message()),
    }
}
