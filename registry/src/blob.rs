//! Reading blobs, whole and by range.

use std::sync::Arc;
use std::time::Duration;

use http::header::{ACCEPT_ENCODING, CONTENT_LENGTH, RANGE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::Response;
use sluice_oci::{Digest, Reference};

use crate::RetryPolicy;
use crate::auth::Scope;
use crate::body::{Body, Opened};
use crate::content_range::ContentRange;
use crate::endpoint::Endpoint;
use crate::error::{Context, Error, ErrorKind};
use crate::hosts::Round;
use crate::retry::Attempts;
use crate::transport::{Call, Purpose, Transport};

/// Which bytes of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteRange {
    /// `len` bytes from `offset` on; fewer where the blob ends before.
    From {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// The last bytes; all there are where the blob is shorter.
    Suffix(u64),
}

/// A blob in a repository. Cheap to clone; making one costs no request.
#[derive(Clone)]
pub struct Blob {
    transport: Arc<Transport>,
    target: Arc<Target>,
    retries: bool,
}

struct Target {
    reference: Reference,
    scope: Scope,
    context: Context,
    digest: Digest,
}

/// How a registry answered a request for a range.
enum Answer {
    Opened(Box<Opened>),
    /// By the whole blob, which was not received.
    Ignored {
        size: Option<u64>,
    },
    Unsatisfiable {
        size: Option<u64>,
        error: Error,
    },
}

impl Blob {
    pub(crate) fn new(transport: Arc<Transport>, reference: &Reference, digest: Digest) -> Self {
        let host = reference.host();
        let repository = reference.repository();
        let target = Target {
            reference: reference.clone(),
            scope: Scope::pull(repository),
            context: Context {
                action: "fetch",
                subject: format!("blob {digest} of {host}/{repository}"),
                host: host.to_owned(),
            },
            digest,
        };
        Self {
            transport,
            target: Arc::new(target),
            retries: true,
        }
    }

    /// The same for callers that try again themselves: each host is asked at
    /// most once, and what breaks off is told.
    #[must_use]
    pub fn without_retries(mut self) -> Self {
        self.retries = false;
        self
    }

    fn attempts(&self) -> Attempts {
        match self.retries {
            true => self.transport.attempts(),
            false => Attempts::new(&RetryPolicy {
                attempts: 1,
                ..self.transport.config.retry.clone()
            }),
        }
    }

    /// Starts to receive a part of the blob. Its bytes are what the registry
    /// sent, not verified.
    ///
    /// A registry that ignores the range makes this fail with
    /// [`ErrorKind::RangeIgnored`] without receiving the whole blob. A suffix
    /// is asked for a second time by its position when the registry knows no
    /// suffix ranges or finds the suffix too long.
    pub async fn range(&self, range: ByteRange) -> Result<Body, Error> {
        let mut attempts = self.attempts();
        loop {
            match self.open(range).await {
                Ok(opened) => {
                    attempts.restart();
                    return Ok(Body::new(opened, self.clone(), None, attempts));
                }
                Err(error) => attempts.pause(error).await?,
            }
        }
    }

    /// Starts to receive the whole blob. Its digest is checked at the end:
    /// [`Body::next`] fails instead of returning `None` when it is wrong.
    pub async fn whole(&self) -> Result<Body, Error> {
        let digest = self.target.digest;
        let mut attempts = self.attempts();
        loop {
            match self.open_whole().await {
                Ok(opened) => {
                    attempts.restart();
                    return Ok(Body::new(opened, self.clone(), Some(digest), attempts));
                }
                Err(error) => attempts.pause(error).await?,
            }
        }
    }

    pub(crate) fn context(&self) -> &Context {
        &self.target.context
    }

    pub(crate) fn stall_timeout(&self) -> Duration {
        self.transport.config.stall_timeout
    }

    fn round(&self) -> Result<Round<'_>, Error> {
        let Target {
            reference,
            context,
            digest,
            ..
        } = &*self.target;
        self.transport
            .round(reference, Purpose::Pull, Some(*digest), context)
    }

    /// A host has broken off. Whether another is ready to go on.
    pub(crate) fn failed(&self, endpoint: &Endpoint, error: Error) -> bool {
        match self.round() {
            Ok(mut round) => {
                round.failed(endpoint, error);
                round.is_ready()
            }
            Err(_) => false,
        }
    }

    /// A host has sent all that it was asked for.
    pub(crate) fn delivered(&self, endpoint: &Endpoint) {
        if let Ok(round) = self.round() {
            round.delivered(endpoint);
        }
    }

    /// Hosts have sent what is not the blob. Whether another is ready.
    pub(crate) fn distrust(&self, senders: &[Endpoint]) -> bool {
        let Ok(mut round) = self.round() else {
            return false;
        };
        for endpoint in senders {
            let context = endpoint.context(self.context());
            let why = format!("{} sent bytes that are not the blob's", endpoint.name());
            round.failed(endpoint, context.error(ErrorKind::DigestMismatch, why));
        }
        round.is_ready()
    }

    /// One try to open the whole.
    pub(crate) async fn open_whole(&self) -> Result<Opened, Error> {
        let mut round = self.round()?;
        while let Some(endpoint) = round.next() {
            match self.open_whole_at(&endpoint).await {
                Ok(opened) => return Ok(opened),
                Err(error) => round.failed(&endpoint, error),
            }
        }
        Err(round.error(self.context()))
    }

    async fn open_whole_at(&self, endpoint: &Endpoint) -> Result<Opened, Error> {
        let context = endpoint.context(self.context());
        let response = self.request(endpoint, Method::GET, None).await?;
        if response.status() != StatusCode::OK {
            return Err(self.transport.refusal(&context, response).await);
        }
        let len = match content_length(&response) {
            Some(len) => len,
            None => self.size(endpoint).await?,
        };
        Ok(Opened {
            offset: 0,
            len,
            blob_size: Some(len),
            response: Some(response),
            endpoint: endpoint.clone(),
        })
    }

    /// One try to open a range.
    pub(crate) async fn open(&self, range: ByteRange) -> Result<Opened, Error> {
        let mut round = self.round()?;
        while let Some(endpoint) = round.next() {
            match self.open_at(&endpoint, range).await {
                Ok(opened) => return Ok(opened),
                Err(error) => round.failed(&endpoint, error),
            }
        }
        Err(round.error(self.context()))
    }

    async fn open_at(&self, endpoint: &Endpoint, range: ByteRange) -> Result<Opened, Error> {
        let context = &endpoint.context(self.context());
        let answer = self.ask(endpoint, range).await?;
        let size = match (answer, range) {
            (Answer::Opened(opened), _) => return Ok(*opened),
            (Answer::Ignored { size: Some(size) }, ByteRange::Suffix(_)) => size,
            (Answer::Unsatisfiable { size, .. }, ByteRange::Suffix(1..)) if size != Some(0) => {
                match size {
                    Some(size) => size,
                    None => self.size(endpoint).await?,
                }
            }
            (Answer::Ignored { .. }, _) => return Err(ignored(context)),
            (Answer::Unsatisfiable { error, .. }, _) => return Err(error),
        };
        let ByteRange::Suffix(wanted) = range else {
            return Err(ignored(context));
        };
        let len = wanted.min(size);
        let position = ByteRange::From {
            offset: size - len,
            len,
        };
        match self.ask(endpoint, position).await? {
            Answer::Opened(opened) => Ok(*opened),
            Answer::Ignored { .. } => Err(ignored(context)),
            Answer::Unsatisfiable { error, .. } => Err(error),
        }
    }

    async fn ask(&self, endpoint: &Endpoint, range: ByteRange) -> Result<Answer, Error> {
        let context = &endpoint.context(self.context());
        let Some(header) = range.header() else {
            let why = "a range of no bytes, or past the largest offset";
            return Ok(Answer::Unsatisfiable {
                size: None,
                error: context.error(ErrorKind::RangeNotSatisfiable, why),
            });
        };
        let response = self.request(endpoint, Method::GET, Some(header)).await?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let granted = ContentRange::parse(response.headers());
                let (offset, len, blob_size) = check_part(range, granted, context)?;
                if content_length(&response).is_some_and(|length| length != len) {
                    return Err(context.protocol(
                        "Content-Range and Content-Length of the answer contradict each other",
                    ));
                }
                Ok(Answer::Opened(Box::new(Opened {
                    offset,
                    len,
                    blob_size,
                    response: Some(response),
                    endpoint: endpoint.clone(),
                })))
            }
            StatusCode::OK => {
                let size = content_length(&response);
                Ok(match size {
                    Some(size) if range.covers_all_of(size) => Answer::Opened(Box::new(Opened {
                        offset: 0,
                        len: size,
                        blob_size: Some(size),
                        response: Some(response),
                        endpoint: endpoint.clone(),
                    })),
                    // Dropping the answer ends the transfer.
                    size => Answer::Ignored { size },
                })
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                let size = ContentRange::parse(response.headers()).and_then(|range| range.total);
                let error = self.transport.refusal(context, response).await;
                Ok(Answer::Unsatisfiable { size, error })
            }
            _ => Err(self.transport.refusal(context, response).await),
        }
    }

    /// The blob's size, by a request of its own.
    async fn size(&self, endpoint: &Endpoint) -> Result<u64, Error> {
        let context = &endpoint.context(self.context());
        let response = self.request(endpoint, Method::HEAD, None).await?;
        if response.status() != StatusCode::OK {
            return Err(self.transport.refusal(context, response).await);
        }
        content_length(&response)
            .ok_or_else(|| context.protocol("the registry does not tell the size"))
    }

    async fn request(
        &self,
        endpoint: &Endpoint,
        method: Method,
        range: Option<HeaderValue>,
    ) -> Result<Response, Error> {
        let target = &*self.target;
        let key = endpoint.key(target.digest);
        // A signed URL is for one method: that of a HEAD is not for GETs.
        let key = (method == Method::GET).then_some(&key);
        let context = endpoint.context(&target.context);
        let mut call = Call::new(method, endpoint, &target.scope, &context);
        call.headers = HeaderMap::from_iter([(
            ACCEPT_ENCODING,
            // Offsets are those of the stored bytes.
            HeaderValue::from_static("identity"),
        )]);
        if let Some(range) = range {
            call.headers.insert(RANGE, range);
        }
        let url = endpoint.pull_url(&format!("blobs/{}", target.digest));
        self.transport.fetch(&call, url, key).await
    }
}

impl ByteRange {
    fn header(self) -> Option<HeaderValue> {
        let text = match self {
            Self::From { offset, len } => {
                let last = offset.checked_add(len.checked_sub(1)?)?;
                format!("bytes={offset}-{last}")
            }
            Self::Suffix(0) => return None,
            Self::Suffix(len) => format!("bytes=-{len}"),
        };
        HeaderValue::try_from(text).ok()
    }

    /// Whether a blob of `size` bytes has no bytes outside the range.
    fn covers_all_of(self, size: u64) -> bool {
        match self {
            Self::From { offset, len } => offset == 0 && len >= size,
            Self::Suffix(len) => len >= size,
        }
    }
}

fn ignored(context: &Context) -> Error {
    context
        .error(
            ErrorKind::RangeIgnored,
            "the registry answered a request for a part with the whole",
        )
        .with_remedy("lazy pulling needs a registry (and proxies) with support for HTTP ranges")
}

/// Whether what was granted is what was asked for.
fn check_part(
    range: ByteRange,
    granted: Option<ContentRange>,
    context: &Context,
) -> Result<(u64, u64, Option<u64>), Error> {
    let wrong = || {
        context
            .protocol("the answer's Content-Range does not fit the range that was asked for")
            .with_status(StatusCode::PARTIAL_CONTENT)
    };
    let ContentRange {
        part: Some((first, len)),
        total,
    } = granted.ok_or_else(wrong)?
    else {
        return Err(wrong());
    };
    let fits = match range {
        ByteRange::From { offset, len: asked } => {
            let at_end = total == Some(first + len);
            first == offset && (len == asked || (len < asked && at_end))
        }
        ByteRange::Suffix(asked) => {
            let whole = first == 0 && len < asked;
            total.is_none_or(|total| total == first + len) && (len == asked || whole)
        }
    };
    if !fits {
        return Err(wrong());
    }
    // The last byte of a suffix is that of the blob.
    let total = match range {
        ByteRange::Suffix(_) => Some(first + len),
        ByteRange::From { .. } => total,
    };
    Ok((first, len, total))
}

fn content_length(response: &Response) -> Option<u64> {
    let header = response.headers().get(CONTENT_LENGTH)?;
    header.to_str().ok()?.parse().ok()
}
