//! The gRPC adapter: translate, call, reply.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt as _};
use sluice_proto::control::v1 as api;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Report, Scrubber};

/// Serves a [`Scrubber`] to whoever may open the daemon's socket.
#[derive(Debug)]
pub struct Adapter<S>(Arc<S>);

/// The tonic service of `scrubber`.
pub fn server<S: Scrubber>(scrubber: Arc<S>) -> api::scrub_server::ScrubServer<Adapter<S>> {
    api::scrub_server::ScrubServer::new(Adapter(scrubber))
}

#[tonic::async_trait]
impl<S: Scrubber> api::scrub_server::Scrub for Adapter<S> {
    type RunStream = Pin<Box<dyn Stream<Item = Result<api::ScrubbedLayer, Status>> + Send>>;

    async fn run(
        &self,
        _: Request<api::ScrubRequest>,
    ) -> Result<Response<Self::RunStream>, Status> {
        let (each, reports) = mpsc::channel(16);
        let scrubber = Arc::clone(&self.0);
        tokio::spawn(async move { scrubber.scrub(each).await });
        let reports = ReceiverStream::new(reports).map(|report| Ok(to_message(report)));
        Ok(Response::new(Box::pin(reports)))
    }
}

fn to_message(report: Report) -> api::ScrubbedLayer {
    api::ScrubbedLayer {
        digest: report.layer.to_string(),
        checked_chunks: report.checked,
        checked_bytes: report.bytes,
        wrong_chunks: report.wrong,
        repaired: report.repaired.unwrap_or_default(),
        failed: report.failed.unwrap_or_default(),
    }
}

/// The other direction; none if the digest is none.
pub(super) fn from_message(message: api::ScrubbedLayer) -> Option<Report> {
    let text = |text: String| (!text.is_empty()).then_some(text);
    Some(Report {
        layer: message.digest.parse().ok()?,
        checked: message.checked_chunks,
        bytes: message.checked_bytes,
        wrong: message.wrong_chunks,
        repaired: text(message.repaired),
        failed: text(message.failed),
    })
}
