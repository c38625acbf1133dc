//! The gRPC adapter: translate, call, reply.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, stream};
use prost_types::Timestamp;
use rustix::process::Pid;
use sluice_proto::containerd::services::snapshots::v1 as api;
use sluice_proto::containerd::types;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status};
use tracing::Instrument;

use super::error::{Error, ErrorKind};
use super::filter::Filter;
use super::lazy_layers::LazyLayers;
use super::logic::Snapshots;
use super::mounts::Mount;
use super::snapshot::{Info, Key, Kind, Labels};

/// Snapshots in one message of a list.
const LIST_BATCH: usize = 100;

/// Serves [`Snapshots`] to containerd.
#[derive(Debug)]
pub struct Adapter<L> {
    snapshots: Arc<Snapshots<L>>,
    calls: TaskTracker,
}

/// The tonic service of `snapshots`. Its calls run on `calls`.
pub fn server<L: LazyLayers>(
    snapshots: Arc<Snapshots<L>>,
    calls: TaskTracker,
) -> api::snapshots_server::SnapshotsServer<Adapter<L>> {
    api::snapshots_server::SnapshotsServer::new(Adapter { snapshots, calls })
}

impl<L: LazyLayers> Adapter<L> {
    /// Calls the logic in a task of its own: a client that goes away does not
    /// stop a change half-way.
    async fn call<T, F>(
        &self,
        span: tracing::Span,
        call: impl FnOnce(Arc<Snapshots<L>>) -> F,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let work = call(Arc::clone(&self.snapshots)).instrument(span.clone());
        let result = self.calls.spawn(work).await;
        let result = result.unwrap_or(Err(Error::BrokeOff));
        result.map_err(|error| span.in_scope(|| status(&error)))
    }

    /// Waits as long as the client does: nothing is changed meanwhile.
    async fn settle_disputes(&self, span: &tracing::Span, new: New) -> Result<New, Status> {
        let snapshots = Arc::clone(&self.snapshots);
        let work = async move {
            let parent = new.parent.as_ref();
            let settled = snapshots.settle_disputes(new.caller, &new.key, parent, &new.labels);
            settled.await?;
            Ok(new)
        };
        let settled = AbortOnDropHandle::new(tokio::spawn(work.instrument(span.clone()))).await;
        let settled = settled.unwrap_or(Err(Error::BrokeOff));
        settled.map_err(|error| span.in_scope(|| status(&error)))
    }
}

/// A snapshot that is to be made.
struct New {
    caller: Option<Pid>,
    key: Key,
    parent: Option<Key>,
    labels: Labels,
}

impl New {
    fn parse(
        caller: Option<Pid>,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Self, Status> {
        Ok(Self {
            caller,
            key: Key::try_from(key).map_err(|error| status(&error.into()))?,
            parent: Key::try_from(parent).ok(),
            labels: labels.into_iter().collect(),
        })
    }
}

/// The number of the process that made the connection. None if it is in a PID
/// namespace that is not below this one.
fn caller<T>(request: &Request<T>) -> Option<Pid> {
    let connection = request.extensions().get::<UdsConnectInfo>()?;
    Pid::from_raw(connection.peer_cred?.pid()?)
}

#[tonic::async_trait]
impl<L: LazyLayers> api::snapshots_server::Snapshots for Adapter<L> {
    async fn prepare(
        &self,
        request: Request<api::PrepareSnapshotRequest>,
    ) -> Result<Response<api::PrepareSnapshotResponse>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let span = tracing::info_span!("prepare", key = request.key);
        let new = New::parse(caller, request.key, request.parent, request.labels)?;
        let new = self.settle_disputes(&span, new).await?;
        let mounts = self
            .call(span, |snapshots| async move {
                snapshots.prepare(new.key, new.parent, new.labels).await
            })
            .await?;
        Ok(Response::new(api::PrepareSnapshotResponse {
            mounts: to_mounts(mounts),
        }))
    }

    async fn view(
        &self,
        request: Request<api::ViewSnapshotRequest>,
    ) -> Result<Response<api::ViewSnapshotResponse>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let span = tracing::info_span!("view", key = request.key);
        let new = New::parse(caller, request.key, request.parent, request.labels)?;
        let new = self.settle_disputes(&span, new).await?;
        let mounts = self
            .call(span, |snapshots| async move {
                snapshots.view(new.key, new.parent, new.labels).await
            })
            .await?;
        Ok(Response::new(api::ViewSnapshotResponse {
            mounts: to_mounts(mounts),
        }))
    }

    async fn mounts(
        &self,
        request: Request<api::MountsRequest>,
    ) -> Result<Response<api::MountsResponse>, Status> {
        let caller = caller(&request);
        let request = request.into_inner();
        let span = tracing::info_span!("mounts", key = request.key);
        let key = Key::try_from(request.key).map_err(|error| status(&error.into()))?;
        let of = key.clone();
        let mounts = self
            .call(span, |snapshots| async move { snapshots.mounts(of).await })
            .await?;
        let snapshots = Arc::clone(&self.snapshots);
        // Whoever starts the container does not wait for that.
        tokio::spawn(async move {
            if let Err(error) = snapshots.tell_program(caller, &key).await {
                tracing::debug!(%error, "what runs in a snapshot");
            }
        });
        Ok(Response::new(api::MountsResponse {
            mounts: to_mounts(mounts),
        }))
    }

    async fn commit(
        &self,
        request: Request<api::CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!("commit", key = request.key, name = request.name);
        self.call(span, |snapshots| async move {
            let name = Key::try_from(request.name)?;
            let key = Key::try_from(request.key)?;
            snapshots
                .commit(name, key, from_labels(request.labels))
                .await
        })
        .await
        .map(Response::new)
    }

    async fn remove(
        &self,
        request: Request<api::RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!("remove", key = request.key);
        self.call(span, |snapshots| async move {
            snapshots.remove(Key::try_from(request.key)?).await
        })
        .await
        .map(Response::new)
    }

    async fn stat(
        &self,
        request: Request<api::StatSnapshotRequest>,
    ) -> Result<Response<api::StatSnapshotResponse>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!("stat", key = request.key);
        let info = self
            .call(span, |snapshots| async move {
                let key = Key::try_from(request.key)?;
                snapshots.stat_with_standing(key).await
            })
            .await?;
        Ok(Response::new(api::StatSnapshotResponse {
            info: Some(to_info(info)),
        }))
    }

    async fn update(
        &self,
        request: Request<api::UpdateSnapshotRequest>,
    ) -> Result<Response<api::UpdateSnapshotResponse>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!("update");
        let info = self
            .call(span, |snapshots| async move {
                let info = request.info.ok_or(Error::Missing("snapshot to update"))?;
                let paths = request.update_mask.unwrap_or_default().paths;
                let key = Key::try_from(info.name)?;
                snapshots
                    .update(key, from_labels(info.labels), &paths)
                    .await
            })
            .await?;
        Ok(Response::new(api::UpdateSnapshotResponse {
            info: Some(to_info(info)),
        }))
    }

    type ListStream =
        Pin<Box<dyn Stream<Item = Result<api::ListSnapshotsResponse, Status>> + Send>>;

    async fn list(
        &self,
        request: Request<api::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!("list");
        let found = self
            .call(span, |snapshots| async move {
                let filters = request.filters.iter().map(|text| Filter::parse(text));
                snapshots.list(filters.collect::<Result<_, _>>()?).await
            })
            .await?;
        let mut infos = found.into_iter().map(to_info).peekable();
        let batches = std::iter::from_fn(move || {
            infos.peek()?;
            let info = infos.by_ref().take(LIST_BATCH).collect();
            Some(Ok(api::ListSnapshotsResponse { info }))
        });
        Ok(Response::new(Box::pin(stream::iter(batches))))
    }

    async fn usage(
        &self,
        request: Request<api::UsageRequest>,
    ) -> Result<Response<api::UsageResponse>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!("usage", key = request.key);
        let usage = self
            .call(span, |snapshots| async move {
                snapshots.usage(Key::try_from(request.key)?).await
            })
            .await?;
        Ok(Response::new(api::UsageResponse {
            size: i64::try_from(usage.bytes).unwrap_or(i64::MAX),
            inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        }))
    }

    async fn cleanup(&self, _: Request<api::CleanupRequest>) -> Result<Response<()>, Status> {
        let span = tracing::info_span!("cleanup");
        self.call(span, |snapshots| async move { snapshots.cleanup().await })
            .await
            .map(Response::new)
    }
}

/// The code that containerd turns into the error of the same name.
fn status(error: &Error) -> Status {
    let message = error.to_string();
    match error.kind() {
        ErrorKind::NotFound => Status::not_found(message),
        ErrorKind::AlreadyExists => Status::already_exists(message),
        ErrorKind::FailedPrecondition => Status::failed_precondition(message),
        ErrorKind::InvalidArgument => Status::invalid_argument(message),
        // These are for the operator too: the others are containerd's to judge.
        ErrorKind::ResourceExhausted => {
            tracing::error!("{message}");
            Status::resource_exhausted(message)
        }
        ErrorKind::Unavailable => {
            tracing::error!("{message}");
            Status::unavailable(message)
        }
        ErrorKind::Internal => {
            tracing::error!("{message}");
            Status::internal(message)
        }
    }
}

fn from_labels(labels: HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

fn to_mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    mounts
        .into_iter()
        .map(|mount| types::Mount {
            r#type: mount.fs_type.to_owned(),
            source: mount.source,
            target: String::new(),
            options: mount.options,
        })
        .collect()
}

fn to_info(info: Info) -> api::Info {
    let kind = match info.kind {
        Kind::View => api::Kind::View,
        Kind::Active => api::Kind::Active,
        Kind::Committed => api::Kind::Committed,
    };
    api::Info {
        name: info.name.into(),
        parent: info.parent.map(String::from).unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(Timestamp::from(info.created)),
        updated_at: Some(Timestamp::from(info.updated)),
        labels: info.labels.into_iter().collect(),
    }
}
