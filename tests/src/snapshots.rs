//! A daemon's snapshots as containerd asks for them, one call at a time.

use std::collections::HashMap;
use std::ffi::CString;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{TryStreamExt as _, stream};
use rustix::mount::MountFlags;
use sluice_oci::Descriptor;
use sluice_proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use sluice_proto::containerd::services::snapshots::v1::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use sluice_proto::containerd::types::Mount;
use tonic::Code;
use tonic::transport::Channel;

use crate::daemon::Daemon;

const PREFIX: &str = "containerd.io/snapshot";

/// A connection to a daemon. Clones share it.
#[derive(Debug, Clone)]
pub struct Snapshots(SnapshotsClient<Channel>);

impl Snapshots {
    /// Connects.
    pub async fn connect(daemon: &Daemon) -> Result<Self> {
        let channel = containerd_client::connect(daemon.socket()).await?;
        Ok(Self(SnapshotsClient::new(channel)))
    }

    /// A writable snapshot over a committed one, or over nothing (""), and how
    /// to mount it.
    pub async fn prepare(&self, key: &str, parent: &str) -> Result<Vec<Mount>> {
        let request = PrepareSnapshotRequest {
            key: key.to_owned(),
            parent: parent.to_owned(),
            ..Default::default()
        };
        let answer = self.0.clone().prepare(request).await;
        let answer = answer.with_context(|| format!("cannot prepare {key}"))?;
        Ok(answer.into_inner().mounts)
    }

    /// Writable snapshots over one parent, their numbers as keys: many at once,
    /// which share the daemon's transactions.
    pub async fn prepare_many(&self, parent: &str, numbers: Range<usize>) -> Result<()> {
        stream::iter(numbers.map(Ok))
            .try_for_each_concurrent(256, |number| async move {
                self.prepare(&number.to_string(), parent).await?;
                Ok(())
            })
            .await
    }

    /// Has a layer served lazily under `name`, over a committed snapshot or
    /// over nothing ("").
    pub async fn serve(
        &self,
        name: &str,
        parent: &str,
        reference: &str,
        layer: &Descriptor,
    ) -> Result<()> {
        let digest = layer.digest.to_string();
        let mut labels = HashMap::from([
            (format!("{PREFIX}.ref"), name.to_owned()),
            (format!("{PREFIX}/cri.image-ref"), reference.to_owned()),
            (format!("{PREFIX}/cri.layer-digest"), digest.clone()),
            (format!("{PREFIX}/cri.image-layers"), digest),
        ]);
        let annotations = layer.annotations.iter();
        let passed_on = annotations.filter(|(name, _)| name.starts_with(PREFIX));
        labels.extend(passed_on.map(|(name, value)| (name.clone(), value.clone())));
        let request = PrepareSnapshotRequest {
            key: format!("extract {name}"),
            parent: parent.to_owned(),
            labels,
            ..Default::default()
        };
        match self.0.clone().prepare(request).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => bail!("cannot prepare {name}: {status}"),
            Ok(_) => bail!("layer {} is not served lazily", layer.digest),
        }
    }

    /// Turns an active snapshot into a committed one.
    pub async fn commit(&self, name: &str, key: &str) -> Result<()> {
        let request = CommitSnapshotRequest {
            name: name.to_owned(),
            key: key.to_owned(),
            ..Default::default()
        };
        let answer = self.0.clone().commit(request).await;
        answer.with_context(|| format!("cannot commit {key}"))?;
        Ok(())
    }

    /// Deletes a snapshot.
    pub async fn remove(&self, key: &str) -> Result<()> {
        let request = RemoveSnapshotRequest {
            key: key.to_owned(),
            ..Default::default()
        };
        let answer = self.0.clone().remove(request).await;
        answer.with_context(|| format!("cannot remove {key}"))?;
        Ok(())
    }
}

/// Mounts what a snapshot answered.
pub fn mount(mounts: &[Mount], target: &Path) -> Result<()> {
    let [mount] = mounts else {
        bail!("not one mount but {mounts:?}");
    };
    ensure!(mount.r#type == "overlay", "{mount:?}");
    let options: Vec<_> = mount.options.iter().map(String::as_str).collect();
    let options = CString::new(options.join(","))?;
    let flags = MountFlags::empty();
    rustix::mount::mount("overlay", target, "overlay", flags, options.as_c_str())
        .with_context(|| format!("cannot mount {mount:?} on {}", target.display()))
}
