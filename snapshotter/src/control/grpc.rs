//! The gRPC adapter: translate, call, reply.

use std::time::SystemTime;

use sluice_oci::{Digest, Reference};
use sluice_proto::control::v1 as api;
use tonic::{Request, Response, Status};

use super::{Control, ControlError, Looked, UsedImage};
use crate::fetch::Priority;
use crate::node::{LayerStatus, Mode, ProfileSource};
use crate::profiles::{ImageId, Stored};
use crate::service::Standing;

/// The longest message: a profile's document and what is around it.
pub const MAX_MESSAGE: usize = sluice_layer::profile::MAX_BYTES + (64 << 10);

/// Serves [`Control`].
#[derive(Clone)]
pub struct Adapter(Control);

/// The tonic service of `control`.
pub fn server(control: Control) -> api::control_server::ControlServer<Adapter> {
    api::control_server::ControlServer::new(Adapter(control)).max_decoding_message_size(MAX_MESSAGE)
}

#[tonic::async_trait]
impl api::control_server::Control for Adapter {
    async fn status(
        &self,
        _: Request<api::StatusRequest>,
    ) -> Result<Response<api::StatusResponse>, Status> {
        let Looked {
            node,
            images,
            standings,
        } = self.0.status().await?;
        let layers = node.layers.iter();
        let budget = |(used, limit)| Some(api::Budget { used, limit });
        let fetches = node.requests.iter().map(|request| api::Fetch {
            layer: request.layer.to_string(),
            start: request.start,
            end: request.end,
            priority: match request.priority {
                Priority::OnDemand => api::Priority::OnDemand,
                Priority::Prefetch => api::Priority::Prefetch,
                Priority::Background => api::Priority::Background,
            }
            .into(),
            age_milliseconds: request.age().as_millis() as u64,
        });
        let links = node.links.iter().map(|(host, figures)| api::Link {
            host: host.clone(),
            round_trip_microseconds: figures.round_trip.as_micros() as u64,
            bytes_per_second: figures.bandwidth,
        });
        Ok(Response::new(api::StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mode: match node.mode {
                Mode::Erofs => "erofs",
                Mode::Fuse => "fuse",
            }
            .to_owned(),
            images: images.into_iter().map(to_image).collect(),
            layers: layers
                .map(|layer| to_layer(layer, standings.get(&layer.digest)))
                .collect(),
            fetches: fetches.collect(),
            waiting_readers: node.waiting,
            memory: budget(node.memory),
            connections: budget(node.connections),
            links: links.collect(),
        }))
    }

    async fn list_profiles(
        &self,
        _: Request<api::ListProfilesRequest>,
    ) -> Result<Response<api::ListProfilesResponse>, Status> {
        let profiles = self.0.profiles().into_iter().map(to_stored).collect();
        Ok(Response::new(api::ListProfilesResponse { profiles }))
    }

    async fn get_profile(
        &self,
        request: Request<api::GetProfileRequest>,
    ) -> Result<Response<api::GetProfileResponse>, Status> {
        let image = request.into_inner().image;
        let (stored, profile) = self
            .blocking(move |control| control.profile(&image))
            .await?;
        Ok(Response::new(api::GetProfileResponse {
            stored: Some(to_stored(stored)),
            document: profile.to_json().into_bytes(),
        }))
    }

    async fn put_profile(
        &self,
        request: Request<api::PutProfileRequest>,
    ) -> Result<Response<api::PutProfileResponse>, Status> {
        let request = request.into_inner();
        let manifest = match request.manifest_digest.as_str() {
            "" => None,
            digest => Some(Self::digest(digest)?),
        };
        let image = Some(request.image).filter(|image| !image.is_empty());
        self.blocking(move |control| control.put_profile(image, manifest, &request.document))
            .await?;
        Ok(Response::new(api::PutProfileResponse {}))
    }

    async fn clear_profile(
        &self,
        request: Request<api::ClearProfileRequest>,
    ) -> Result<Response<api::ClearProfileResponse>, Status> {
        let image = request.into_inner().image;
        self.blocking(move |control| control.clear_profile(&image))
            .await?;
        Ok(Response::new(api::ClearProfileResponse {}))
    }

    async fn finish_recording(
        &self,
        request: Request<api::FinishRecordingRequest>,
    ) -> Result<Response<api::FinishRecordingResponse>, Status> {
        let name = request.into_inner().name;
        let recorded = self.0.finish_recording(&name).await?;
        Ok(Response::new(api::FinishRecordingResponse {
            document: recorded.profile.to_json().into_bytes(),
            whole: recorded.whole,
        }))
    }

    async fn expect_image(
        &self,
        request: Request<api::ExpectImageRequest>,
    ) -> Result<Response<api::ExpectImageResponse>, Status> {
        let request = request.into_inner();
        let reference = request.reference.parse::<Reference>();
        let reference = reference.map_err(|error| Status::invalid_argument(error.to_string()))?;
        match request.manifest_digest.as_str() {
            "" => self.0.expect_pull(&reference),
            digest => {
                let digest = Self::digest(digest)?;
                self.0.expect_image(&reference, digest, &request.manifest)?;
            }
        }
        Ok(Response::new(api::ExpectImageResponse {}))
    }
}

impl Adapter {
    fn digest(text: &str) -> Result<Digest, Status> {
        text.parse()
            .map_err(|error: sluice_oci::DigestError| Status::invalid_argument(error.to_string()))
    }

    /// Runs what may wait for a disk off the async threads.
    async fn blocking<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Control) -> Result<T, ControlError> + Send + 'static,
    ) -> Result<T, Status> {
        let control = self.0.clone();
        let done = tokio::task::spawn_blocking(move || call(&control)).await;
        Ok(done.map_err(|_| Status::internal("the call broke off; see the daemon's log"))??)
    }
}

impl From<ControlError> for Status {
    fn from(error: ControlError) -> Self {
        match error {
            ControlError::NotFound(why) => Self::not_found(why),
            ControlError::Invalid(why) => Self::invalid_argument(why),
            ControlError::Failed(why) => Self::internal(why),
        }
    }
}

fn to_image(used: UsedImage) -> api::Image {
    let (reference, manifest_digest, layers) = names(used.image);
    api::Image {
        reference,
        manifest_digest,
        layers,
        users: used.users as u64,
        profile: to_source(used.profile).into(),
        recording: used.recording,
    }
}

fn to_layer(layer: &LayerStatus, standing: Option<&Standing>) -> api::Layer {
    let [on_demand, prefetch, background] = layer.activity.fetched;
    api::Layer {
        digest: layer.digest.to_string(),
        image: layer.image.clone(),
        mounted: layer.mounted,
        blob_bytes: layer.blob_size,
        chunks: layer.chunks.into(),
        present_chunks: layer.present.into(),
        reads: layer.activity.reads,
        waited_reads: layer.activity.waited,
        fetched: Some(api::FetchedBytes {
            on_demand,
            prefetch,
            background,
        }),
        profile: to_source(layer.profile).into(),
        content: standing.unwrap_or(&Standing::Unknown).as_str().to_owned(),
        reused_bytes: layer.activity.reused,
    }
}

fn to_source(source: Option<ProfileSource>) -> api::ProfileSource {
    match source {
        None => api::ProfileSource::Unspecified,
        Some(ProfileSource::Image) => api::ProfileSource::Image,
        Some(ProfileSource::Attached) => api::ProfileSource::Attached,
        Some(ProfileSource::Node) => api::ProfileSource::Node,
    }
}

fn to_stored(stored: Stored) -> api::StoredProfile {
    let (image, manifest_digest, layers) = names(stored.image);
    let used = stored.used.duration_since(SystemTime::UNIX_EPOCH);
    api::StoredProfile {
        image,
        manifest_digest,
        layers,
        recordings: stored.recordings as u64,
        whole: stored.whole,
        used_seconds: used.unwrap_or_default().as_secs(),
    }
}

/// The reference, the manifest's digest and the layers, as the wire has them.
fn names(image: ImageId) -> (String, String, Vec<String>) {
    let manifest = image.manifest.map(|digest| digest.to_string());
    let layers = image.layers.iter().map(ToString::to_string);
    (
        image.reference.unwrap_or_default(),
        manifest.unwrap_or_default(),
        layers.collect(),
    )
}
