//! The handle that everything starts from.

use std::sync::Arc;

use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use reqwest::Response;
use sluice_oci::{Descriptor, Digest, Reference, media_type};

use crate::auth::Scope;
use crate::blob::Blob;
use crate::config::Config;
use crate::document::{self, Document, check_digest};
use crate::endpoint::Endpoint;
use crate::error::{Context, Error};
use crate::transport::{Call, Purpose, Transport, body_up_to};

/// The distribution specification asks registries to accept this much.
pub(crate) const MAX_MANIFEST: usize = 4 << 20;

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// A client for any number of registries. Clones share connections, tokens
/// and redirects.
#[derive(Clone)]
pub struct Client {
    pub(crate) transport: Arc<Transport>,
}

impl Client {
    /// A client that has spoken to nobody yet.
    pub fn new(config: Config) -> Result<Self, Error> {
        Ok(Self {
            transport: Arc::new(Transport::new(config)?),
        })
    }

    /// Fetches the manifest or index that `reference` names. Of a reference
    /// with tag and digest, the digest counts.
    pub async fn manifest(&self, reference: &Reference) -> Result<Document, Error> {
        let context = about_manifest("fetch", reference);
        let mut attempts = self.transport.attempts();
        loop {
            match self.manifest_once(reference, &context).await {
                Ok(document) => return Ok(document),
                Err(error) => attempts.pause(error).await?,
            }
        }
    }

    pub(crate) async fn manifest_once(
        &self,
        reference: &Reference,
        context: &Context,
    ) -> Result<Document, Error> {
        let purpose = Purpose::of(reference);
        let mut round = self.transport.round(reference, purpose, None, context)?;
        while let Some(endpoint) = round.next() {
            match self.manifest_at(&endpoint, reference, context).await {
                Ok(document) => {
                    round.delivered(&endpoint);
                    return Ok(document);
                }
                Err(error) => round.failed(&endpoint, error),
            }
        }
        Err(round.error(context))
    }

    async fn manifest_at(
        &self,
        endpoint: &Endpoint,
        reference: &Reference,
        context: &Context,
    ) -> Result<Document, Error> {
        let context = &endpoint.context(context);
        let mut response = self.ask(Method::GET, endpoint, reference, context).await?;
        let content_type = header_text(&response, &CONTENT_TYPE);
        let claimed = claimed_digest(&response);
        let stall = self.transport.config.stall_timeout;
        let bytes = body_up_to(&mut response, MAX_MANIFEST, stall, context).await?;
        let digest = Digest::of(&bytes);
        if let Some(expected) = reference.digest() {
            check_digest(expected, digest, "it was asked for by", context)?;
        } else if let Some(claimed) = claimed {
            check_digest(claimed, digest, "the registry says", context)?;
        }
        Document::new(content_type.as_deref(), digest, bytes, context)
    }

    /// Asks what `reference` names, without fetching it where the registry
    /// tells its digest.
    pub async fn resolve(&self, reference: &Reference) -> Result<Descriptor, Error> {
        let context = about_manifest("resolve", reference);
        let mut attempts = self.transport.attempts();
        let response = loop {
            match self.resolve_once(reference, &context).await {
                Ok(response) => break response,
                Err(error) => attempts.pause(error).await?,
            }
        };
        let digest = reference.digest().or_else(|| claimed_digest(&response));
        let size = header_text(&response, &CONTENT_LENGTH).and_then(|text| text.parse().ok());
        let content_type = header_text(&response, &CONTENT_TYPE)
            .map(|text| text.split(';').next().unwrap_or_default().trim().to_owned())
            .filter(|text| media_type::is_index(text) || media_type::is_manifest(text));
        match (content_type, digest, size) {
            (Some(content_type), Some(digest), Some(size)) => {
                Ok(Descriptor::new(content_type, digest, size))
            }
            _ => Ok(self.manifest(reference).await?.descriptor()),
        }
    }

    async fn resolve_once(
        &self,
        reference: &Reference,
        context: &Context,
    ) -> Result<Response, Error> {
        let purpose = Purpose::of(reference);
        let mut round = self.transport.round(reference, purpose, None, context)?;
        while let Some(endpoint) = round.next() {
            let context = &endpoint.context(context);
            match self.ask(Method::HEAD, &endpoint, reference, context).await {
                Ok(response) => {
                    round.delivered(&endpoint);
                    return Ok(response);
                }
                Err(error) => round.failed(&endpoint, error),
            }
        }
        Err(round.error(context))
    }

    async fn ask(
        &self,
        method: Method,
        endpoint: &Endpoint,
        reference: &Reference,
        context: &Context,
    ) -> Result<Response, Error> {
        let scope = Scope::pull(reference.repository());
        let mut call = Call::new(method, endpoint, &scope, context);
        call.headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(document::ACCEPT))]);
        let url = endpoint.pull_url(&manifest_path(reference));
        let response = self.transport.fetch(&call, url, None).await?;
        if response.status() != StatusCode::OK {
            return Err(self.transport.refusal(context, response).await);
        }
        Ok(response)
    }

    /// A handle on a blob of the repository that `reference` names; its tag
    /// or digest does not matter. No request is made.
    pub fn blob(&self, reference: &Reference, digest: Digest) -> Blob {
        Blob::new(Arc::clone(&self.transport), reference, digest)
    }
}

pub(crate) fn about_manifest(action: &'static str, reference: &Reference) -> Context {
    Context {
        action,
        subject: format!("manifest {reference}"),
        host: reference.host().to_owned(),
    }
}

pub(crate) fn manifest_path(reference: &Reference) -> String {
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => format!("manifests/{digest}"),
        (None, tag) => format!("manifests/{}", tag.unwrap_or("latest")),
    }
}

fn header_text(response: &Response, name: &HeaderName) -> Option<String> {
    let value = response.headers().get(name)?;
    value.to_str().ok().map(str::to_owned)
}

/// What the registry says the content's digest is, where it is one that can
/// be checked.
pub(crate) fn claimed_digest(response: &Response) -> Option<Digest> {
    header_text(response, &DOCKER_CONTENT_DIGEST)?.parse().ok()
}
