//! containerd's API, as far as a pull needs it. Every call goes out with one
//! namespace and one lease.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow, bail};
use containerd_client::Client;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use containerd_client::services::v1::{
    AddResourceRequest, ApplyRequest, CreateImageRequest, CreateRequest, DeleteImageRequest,
    DeleteRequest, GetImageRequest, Image, Info, InfoRequest, PluginsRequest, ReadContentRequest,
    Resource, UpdateImageRequest, UpdateRequest,
};
use containerd_client::types;
use prost_types::{FieldMask, Timestamp};
use sluice_oci::{Descriptor, Digest};
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Code, Request, Status};

/// What a lease protects is collected after this even if nobody ends it.
const LEASE_TIME: Duration = Duration::from_secs(24 * 3600);

/// Labels of content, a snapshot or a lease.
pub(crate) type Labels = HashMap<String, String>;

/// containerd, seen from one pull.
pub(crate) struct Node {
    client: Client,
    socket: String,
    namespace: AsciiMetadataValue,
    lease: AsciiMetadataValue,
}

/// What `Prepare` did.
pub(crate) enum Prepared {
    /// The snapshotter has the snapshot, or serves it without unpacking.
    Exists,
    /// A layer has to be unpacked into these mounts.
    Unpack(Vec<types::Mount>),
}

impl Node {
    /// Connects. What is made before [`Self::take_lease`] is not protected.
    pub(crate) async fn connect(socket: &Path, namespace: &str) -> anyhow::Result<Self> {
        let shown = socket.display().to_string();
        let client = Client::from_path(socket).await.map_err(|error| {
            anyhow!(
                "cannot reach containerd at {shown}: {}; check that it runs, that --containerd \
                 names its socket, and that you may open it (root)",
                causes(&error)
            )
        })?;
        Ok(Self {
            client,
            socket: shown,
            namespace: namespace
                .parse()
                .map_err(|_| anyhow!("'{namespace}' is no name of a containerd namespace"))?,
            lease: unique("sluice-pull").parse()?,
        })
    }

    /// Takes the lease that protects what is made.
    pub(crate) async fn take_lease(&self) -> anyhow::Result<()> {
        let id = self.lease.to_str().unwrap_or_default().to_owned();
        let expires = Timestamp::from(SystemTime::now() + LEASE_TIME).to_string();
        let labels = Labels::from([("containerd.io/gc.expire".to_owned(), expires)]);
        self.client
            .leases()
            .create(self.request(CreateRequest { id, labels }))
            .await
            .map_err(|status| self.failed("take a lease", &status))?;
        Ok(())
    }

    /// Ends the lease. With `collect`, what it alone protected is gone when
    /// this returns.
    pub(crate) async fn release(&self, collect: bool) -> anyhow::Result<()> {
        let request = DeleteRequest {
            id: self.lease.to_str().unwrap_or_default().to_owned(),
            sync: collect,
        };
        match self.client.leases().delete(self.request(request)).await {
            // It may not have been taken.
            Err(status) if status.code() != Code::NotFound => {
                Err(self.failed("end the lease", &status))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut metadata = MetadataMap::new();
        metadata.insert("containerd-namespace", self.namespace.clone());
        metadata.insert("containerd-lease", self.lease.clone());
        Request::from_parts(metadata, Default::default(), message)
    }

    /// The namespace.
    pub(crate) fn namespace(&self) -> &str {
        self.namespace.to_str().unwrap_or_default()
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    pub(crate) fn failed(&self, what: &str, status: &Status) -> anyhow::Error {
        anyhow!(
            "containerd ({}) cannot {what}: {}",
            self.socket,
            status.message()
        )
    }

    /// Fails unless containerd knows the snapshotter.
    pub(crate) async fn check_snapshotter(&self, snapshotter: &str) -> anyhow::Result<()> {
        // No snapshot has this name; what matters is who says so.
        match self.stat(snapshotter, "sluice-probe").await {
            Ok(_) => Ok(()),
            Err(status) if not_loaded(&status) => bail!(
                "containerd ({}) has no snapshotter '{snapshotter}'; add to its config.toml \
                 [proxy_plugins.{snapshotter}] with type = \"snapshot\" and address = \
                 \"/run/sluice/snapshotter.sock\", and restart it",
                self.socket
            ),
            Err(status) => Err(self.failed("look up snapshots", &status)),
        }
    }

    /// Where containerd reaches the snapshotter, if it is no part of it.
    pub(crate) async fn snapshotter_address(&self, snapshotter: &str) -> Option<String> {
        let request = PluginsRequest {
            filters: vec![format!(
                "type==io.containerd.snapshotter.v1,id=={snapshotter:?}"
            )],
        };
        let mut introspection = self.client.introspection();
        let answer = introspection.plugins(self.request(request)).await;
        let plugins = answer.ok()?.into_inner().plugins;
        let mut exports = plugins.into_iter().map(|plugin| plugin.exports);
        exports.find_map(|mut exports| exports.remove("address"))
    }

    /// Whether a snapshot exists.
    pub(crate) async fn has_snapshot(&self, snapshotter: &str, key: &str) -> anyhow::Result<bool> {
        let found = self.stat(snapshotter, key).await;
        let found =
            found.map_err(|status| self.failed(&format!("look up snapshot {key}"), &status))?;
        Ok(found.is_some())
    }

    /// Puts a snapshot that exists under the lease.
    pub(crate) async fn hold_snapshot(&self, snapshotter: &str, key: &str) -> anyhow::Result<()> {
        let request = AddResourceRequest {
            id: self.lease.to_str().unwrap_or_default().to_owned(),
            resource: Some(Resource {
                id: key.to_owned(),
                r#type: format!("snapshots/{snapshotter}"),
            }),
        };
        self.client
            .leases()
            .add_resource(self.request(request))
            .await
            .map_err(|status| self.failed(&format!("hold snapshot {key}"), &status))?;
        Ok(())
    }

    /// The labels of a snapshot that exists.
    pub(crate) async fn snapshot_labels(&self, snapshotter: &str, key: &str) -> Labels {
        let found = self.stat(snapshotter, key).await;
        found.ok().flatten().unwrap_or_default()
    }

    async fn stat(&self, snapshotter: &str, key: &str) -> Result<Option<Labels>, Status> {
        let request = StatSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
        };
        match self.client.snapshots().stat(self.request(request)).await {
            Ok(answer) => Ok(Some(answer.into_inner().info.unwrap_or_default().labels)),
            Err(status) if status.code() == Code::NotFound && !not_loaded(&status) => Ok(None),
            Err(status) => Err(status),
        }
    }

    /// Prepares a snapshot that is to become the one named by the labels.
    pub(crate) async fn prepare(
        &self,
        snapshotter: &str,
        key: &str,
        parent: &str,
        labels: Labels,
    ) -> anyhow::Result<Prepared> {
        let request = PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        match self.client.snapshots().prepare(self.request(request)).await {
            Ok(answer) => Ok(Prepared::Unpack(answer.into_inner().mounts)),
            Err(status) if status.code() == Code::AlreadyExists => Ok(Prepared::Exists),
            Err(status) if status.code() == Code::Unavailable => {
                Err(self.failed("prepare a snapshot", &status).context(format!(
                    "snapshotter '{snapshotter}' does not answer; check that its daemon runs"
                )))
            }
            Err(status) => Err(self.failed("prepare a snapshot", &status)),
        }
    }

    /// Makes a prepared snapshot a committed one.
    pub(crate) async fn commit(
        &self,
        snapshotter: &str,
        key: &str,
        name: &str,
        labels: Labels,
    ) -> anyhow::Result<()> {
        let request = CommitSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels,
        };
        match self.client.snapshots().commit(self.request(request)).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {
                self.remove(snapshotter, key).await;
                Ok(())
            }
            Err(status) => Err(self.failed(&format!("commit snapshot {name}"), &status)),
        }
    }

    /// Removes a prepared snapshot. A failure does not matter: it goes with
    /// the lease.
    pub(crate) async fn remove(&self, snapshotter: &str, key: &str) {
        let request = RemoveSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
        };
        if let Err(status) = self.client.snapshots().remove(self.request(request)).await {
            tracing::debug!(key, %status, "a snapshot is left to the garbage collector");
        }
    }

    /// Unpacks a layer that is in the content store; returns the diff ID.
    pub(crate) async fn apply(
        &self,
        layer: &Descriptor,
        mounts: Vec<types::Mount>,
    ) -> anyhow::Result<Digest> {
        let request = ApplyRequest {
            diff: Some(wire(layer)),
            mounts,
            ..ApplyRequest::default()
        };
        let answer = self.client.diff().apply(self.request(request)).await;
        let answer = answer
            .map_err(|status| self.failed(&format!("unpack layer {}", layer.digest), &status))?;
        let applied = answer.into_inner().applied.unwrap_or_default().digest;
        applied
            .parse()
            .with_context(|| format!("containerd unpacked layer {}", layer.digest))
    }

    /// The labels of content, if the store has it.
    pub(crate) async fn content_labels(&self, digest: Digest) -> anyhow::Result<Option<Labels>> {
        let request = InfoRequest {
            digest: digest.to_string(),
        };
        match self.client.content().info(self.request(request)).await {
            Ok(answer) => Ok(answer.into_inner().info.map(|info| info.labels)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.failed(&format!("look up content {digest}"), &status)),
        }
    }

    /// Content of at most `limit` bytes, if the store has it.
    pub(crate) async fn read(
        &self,
        digest: Digest,
        limit: usize,
    ) -> anyhow::Result<Option<Vec<u8>>> {
        let request = ReadContentRequest {
            digest: digest.to_string(),
            offset: 0,
            size: 0,
        };
        let what = format!("read content {digest}");
        let mut stream = match self.client.content().read(self.request(request)).await {
            Ok(answer) => answer.into_inner(),
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            Err(status) => return Err(self.failed(&what, &status)),
        };
        let mut bytes = Vec::new();
        loop {
            match stream.message().await {
                Ok(Some(message)) => bytes.extend_from_slice(&message.data),
                Ok(None) => break,
                // The first message tells that there is no such content.
                Err(status) if status.code() == Code::NotFound => return Ok(None),
                Err(status) => return Err(self.failed(&what, &status)),
            }
            if bytes.len() > limit {
                bail!("{digest} is larger than {limit} bytes");
            }
        }
        Ok(Some(bytes))
    }

    /// Adds labels to content.
    pub(crate) async fn label(&self, digest: Digest, labels: Labels) -> anyhow::Result<()> {
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = UpdateRequest {
            info: Some(Info {
                digest: digest.to_string(),
                labels,
                ..Info::default()
            }),
            update_mask: Some(FieldMask { paths }),
        };
        self.client
            .content()
            .update(self.request(request))
            .await
            .map_err(|status| self.failed(&format!("label content {digest}"), &status))?;
        Ok(())
    }

    /// Whether there is an image of this name.
    pub(crate) async fn has_image(&self, name: &str) -> anyhow::Result<bool> {
        let request = GetImageRequest {
            name: name.to_owned(),
        };
        match self.client.images().get(self.request(request)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(self.failed(&format!("look up image {name}"), &status)),
        }
    }

    /// Takes a name away; no error when there is no such image.
    pub(crate) async fn delete_image(&self, name: &str) -> anyhow::Result<()> {
        let request = DeleteImageRequest {
            name: name.to_owned(),
            ..DeleteImageRequest::default()
        };
        match self.client.images().delete(self.request(request)).await {
            Err(status) if status.code() != Code::NotFound => {
                Err(self.failed(&format!("remove image {name}"), &status))
            }
            _ => Ok(()),
        }
    }

    /// Makes `name` the name of `target`.
    pub(crate) async fn put_image(&self, name: &str, target: &Descriptor) -> anyhow::Result<()> {
        let image = Image {
            name: name.to_owned(),
            target: Some(wire(target)),
            ..Image::default()
        };
        let create = CreateImageRequest {
            image: Some(image.clone()),
            ..CreateImageRequest::default()
        };
        let what = format!("record image {name}");
        match self.client.images().create(self.request(create)).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(self.failed(&what, &status)),
        }
        let update = UpdateImageRequest {
            image: Some(image),
            update_mask: Some(FieldMask {
                paths: vec!["target".to_owned()],
            }),
            ..UpdateImageRequest::default()
        };
        self.client
            .images()
            .update(self.request(update))
            .await
            .map_err(|status| self.failed(&what, &status))?;
        Ok(())
    }
}

fn not_loaded(status: &Status) -> bool {
    status.message().contains("snapshotter not loaded")
}

/// A descriptor on the wire.
pub(crate) fn wire(descriptor: &Descriptor) -> types::Descriptor {
    types::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
        annotations: descriptor.annotations.clone().into_iter().collect(),
    }
}

/// A name that no other pull uses.
pub(crate) fn unique(prefix: &str) -> String {
    use std::hash::{BuildHasher, RandomState};
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let random = RandomState::new().hash_one(std::process::id());
    format!("{prefix}-{}-{random:016x}", now.as_nanos())
}

/// An error with what caused it.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
