//! Uploading blobs and manifests.

mod chunked;
mod source;

use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::{Response, Url};
use sluice_oci::{Digest, Reference};

pub use self::chunked::ChunkedUpload;
pub use self::source::BlobSource;
pub(crate) use self::source::{Metered, Progress};
use crate::Client;
use crate::auth::Scope;
use crate::client::{MAX_MANIFEST, claimed_digest, manifest_path};
use crate::document::check_digest;
use crate::endpoint::Endpoint;
use crate::error::{Context, Error, ErrorKind};
use crate::referrers::OCI_SUBJECT;
use crate::transport::{Call, Payload, Purpose, Transport, location};

/// What the registry did with a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// It stored it.
    Alone,
    /// And it lists it with the image that it refers to.
    AndListed,
}

/// A repository that is written to.
pub(crate) struct Destination {
    transport: Arc<Transport>,
    endpoint: Endpoint,
    scope: Scope,
    context: Context,
}

impl Destination {
    fn new(client: &Client, reference: &Reference, subject: String) -> Result<Self, Error> {
        let context = Context {
            action: "upload",
            subject,
            host: reference.host().to_owned(),
        };
        let transport = Arc::clone(&client.transport);
        // One host: what is stored must not be spread over several.
        let endpoint = transport
            .endpoints(reference, Purpose::Push, &context)?
            .swap_remove(0);
        Ok(Self {
            context: endpoint.context(&context),
            endpoint,
            scope: Scope::push(reference.repository()),
            transport,
        })
    }

    fn for_blob(client: &Client, reference: &Reference, blob: &str) -> Result<Self, Error> {
        let (host, repository) = (reference.host(), reference.repository());
        Self::new(client, reference, format!("{blob} to {host}/{repository}"))
    }

    fn call(&self, method: Method, payload: Payload, headers: HeaderMap) -> Call<'_> {
        Call {
            payload,
            headers,
            ..Call::new(method, &self.endpoint, &self.scope, &self.context)
        }
    }

    async fn send(
        &self,
        method: Method,
        url: &Url,
        payload: Payload,
        headers: HeaderMap,
    ) -> Result<Response, Error> {
        let call = self.call(method, payload, headers);
        self.transport.authorized(&call, url).await
    }

    /// A response with one of the expected statuses, or the error it means.
    async fn expect(&self, response: Response, expected: &[u16]) -> Result<Response, Error> {
        if expected.contains(&response.status().as_u16()) {
            Ok(response)
        } else {
            Err(self.transport.refusal(&self.context, response).await)
        }
    }

    /// Starts an upload and returns where it goes on.
    async fn begin(&self) -> Result<Response, Error> {
        let url = self.endpoint.url("blobs/uploads/");
        let response = self
            .send(Method::POST, &url, Payload::None, HeaderMap::new())
            .await?;
        self.expect(response, &[202]).await
    }

    /// Ends an upload, with the rest of its bytes if there are some.
    async fn commit(&self, session: &Url, digest: Digest, rest: Payload) -> Result<(), Error> {
        let mut url = session.clone();
        url.query_pairs_mut()
            .append_pair("digest", &digest.to_string());
        let headers = octets();
        let response = self.send(Method::PUT, &url, rest, headers).await?;
        let response = self.expect(response, &[201, 204]).await?;
        match claimed_digest(&response) {
            Some(claimed) => check_digest(
                digest,
                claimed,
                "the registry stored something else than",
                &self.context,
            ),
            None => Ok(()),
        }
    }

    /// Tells the registry that the session will not be used. It would expire
    /// anyway, so a failure does not matter.
    async fn cancel(&self, session: &Url) {
        let _ = self
            .send(Method::DELETE, session, Payload::None, HeaderMap::new())
            .await;
    }

    async fn exists(&self, digest: Digest) -> Result<bool, Error> {
        let url = self.endpoint.url(&format!("blobs/{digest}"));
        let response = self
            .send(Method::HEAD, &url, Payload::None, HeaderMap::new())
            .await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(false),
            // A redirect says where it is, hence that it is.
            status if status.is_success() || status.is_redirection() => Ok(true),
            _ => Err(self.transport.refusal(&self.context, response).await),
        }
    }
}

fn octets() -> HeaderMap {
    HeaderMap::from_iter([(
        CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    )])
}

impl Client {
    /// Whether the repository has the blob.
    pub async fn blob_exists(&self, reference: &Reference, digest: Digest) -> Result<bool, Error> {
        let to = Destination::for_blob(self, reference, &format!("blob {digest}"))?;
        let mut attempts = self.transport.attempts();
        loop {
            match to.exists(digest).await {
                Ok(exists) => return Ok(exists),
                Err(error) => attempts.pause(error).await?,
            }
        }
    }

    /// Lets the repository of `to` have a blob of the repository of `from`
    /// without sending it. False if the registry does not do that, does not
    /// allow it, or is another one; the blob has to be uploaded then.
    pub async fn mount_blob(
        &self,
        to: &Reference,
        digest: Digest,
        from: &Reference,
    ) -> Result<bool, Error> {
        if to.host() != from.host() || to.repository() == from.repository() {
            return Ok(false);
        }
        let mut destination = Destination::for_blob(self, to, &format!("blob {digest}"))?;
        destination.scope = Scope::mount(to.repository(), from.repository());
        let mut attempts = self.transport.attempts();
        loop {
            match mount_once(&destination, digest, from.repository()).await {
                Ok(mounted) => return Ok(mounted),
                Err(error) => match error.kind() {
                    ErrorKind::Unauthorized
                    | ErrorKind::Forbidden
                    | ErrorKind::NotFound
                    | ErrorKind::Refused => return Ok(false),
                    _ => attempts.pause(error).await?,
                },
            }
        }
    }

    /// Uploads a blob in one request, unless the repository has it; returns
    /// whether it was sent. What breaks off is started again from the
    /// beginning of `source`.
    pub async fn push_blob(
        &self,
        reference: &Reference,
        digest: Digest,
        size: u64,
        source: BlobSource,
    ) -> Result<bool, Error> {
        if self.blob_exists(reference, digest).await? {
            return Ok(false);
        }
        let to = Destination::for_blob(self, reference, &format!("blob {digest}"))?;
        let mut attempts = self.transport.attempts();
        loop {
            match push_once(&to, digest, size, &source).await {
                Ok(()) => return Ok(true),
                Err(error) => attempts.pause(error).await?,
            }
        }
    }

    /// Starts to upload a blob whose size and digest are not known yet.
    pub async fn upload(&self, reference: &Reference) -> Result<ChunkedUpload, Error> {
        let to = Destination::for_blob(self, reference, "a blob")?;
        ChunkedUpload::begin(to).await
    }

    /// Stores a manifest or index under the tag of `reference`, or under its
    /// digest if it has no tag. A digest in the reference must be that of
    /// `bytes`.
    pub async fn push_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Digest, Error> {
        let digest = Digest::of(&bytes);
        self.store_manifest(reference, media_type, bytes).await?;
        Ok(digest)
    }

    pub(crate) async fn store_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Stored, Error> {
        let subject = format!("manifest {reference}");
        let to = Destination::new(self, reference, subject)?;
        let digest = Digest::of(&bytes);
        if let Some(expected) = reference.digest() {
            check_digest(expected, digest, "the reference says", &to.context)?;
        }
        if bytes.len() > MAX_MANIFEST {
            return Err(to.context.error(
                ErrorKind::TooLarge,
                format!(
                    "it has {} bytes, and registries accept {MAX_MANIFEST}",
                    bytes.len()
                ),
            ));
        }
        let mut attempts = self.transport.attempts();
        loop {
            match put_manifest(&to, reference, media_type, &bytes, digest).await {
                Ok(stored) => return Ok(stored),
                Err(error) => attempts.pause(error).await?,
            }
        }
    }
}

async fn mount_once(to: &Destination, digest: Digest, from: &str) -> Result<bool, Error> {
    let mut url = to.endpoint.url("blobs/uploads/");
    url.query_pairs_mut()
        .append_pair("mount", &digest.to_string())
        .append_pair("from", from);
    let response = to
        .send(Method::POST, &url, Payload::None, HeaderMap::new())
        .await?;
    let response = to.expect(response, &[201, 202]).await?;
    if response.status() == StatusCode::CREATED {
        return Ok(true);
    }
    // It started an ordinary upload instead.
    if let Ok(session) = location(&response, &to.context) {
        to.cancel(&session).await;
    }
    Ok(false)
}

async fn push_once(
    to: &Destination,
    digest: Digest,
    size: u64,
    source: &BlobSource,
) -> Result<(), Error> {
    let response = to.begin().await?;
    let session = location(&response, &to.context)?;
    drop(response);
    let body = Payload::Source {
        source: source.clone(),
        size,
    };
    let done = to.commit(&session, digest, body).await;
    if done.is_err() {
        to.cancel(&session).await;
    }
    done
}

async fn put_manifest(
    to: &Destination,
    reference: &Reference,
    media_type: &str,
    bytes: &Bytes,
    digest: Digest,
) -> Result<Stored, Error> {
    let content_type = HeaderValue::try_from(media_type).map_err(|_| {
        to.context
            .protocol(format!("'{}' is no media type", media_type.escape_debug()))
    })?;
    let path = match reference.tag() {
        Some(tag) => format!("manifests/{tag}"),
        None => manifest_path(reference),
    };
    let url = to.endpoint.url(&path);
    let headers = HeaderMap::from_iter([(CONTENT_TYPE, content_type)]);
    let payload = Payload::Bytes(bytes.clone());
    let response = to.send(Method::PUT, &url, payload, headers).await?;
    let response = to.expect(response, &[201]).await?;
    if let Some(claimed) = claimed_digest(&response) {
        check_digest(
            digest,
            claimed,
            "the registry stored something else than",
            &to.context,
        )?;
    }
    Ok(match response.headers().contains_key(OCI_SUBJECT) {
        true => Stored::AndListed,
        false => Stored::Alone,
    })
}
