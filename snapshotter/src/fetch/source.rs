//! Where a layer's bytes come from.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use sluice_registry::{Blob, Body, ByteRange, ErrorKind};

/// A blob whose ranges can be fetched.
pub trait RangeSource: Send + Sync + 'static {
    /// Asks for `len` bytes from `offset`. The future ends when the answer
    /// begins to arrive.
    fn range(
        &self,
        offset: u64,
        len: u64,
    ) -> BoxFuture<'_, Result<Box<dyn RangeBody>, SourceError>>;

    /// Names the host whose link is measured.
    fn host(&self) -> &str;
}

/// The bytes of a range as they arrive.
pub trait RangeBody: Send {
    /// The next bytes, or none at the end of the range. Dropping the body ends
    /// the request.
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>>;

    /// What to call when the bytes turn out to be wrong, so that others are
    /// asked for from somebody else.
    fn blame(&self) -> Blame {
        Box::new(|| {})
    }
}

/// See [`RangeBody::blame`].
pub type Blame = Box<dyn FnOnce() + Send>;

/// Why bytes did not come.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct SourceError {
    /// In words, with the host.
    pub message: String,
    /// Whether the same request may succeed later.
    pub transient: bool,
    /// How long the host asked to be left alone.
    pub retry_after: Option<Duration>,
}

impl SourceError {
    /// The answer was shorter than the range.
    pub(super) fn truncated() -> Self {
        Self {
            message: "the registry's answer ended before the requested range did".to_owned(),
            transient: true,
            retry_after: None,
        }
    }

    /// Nothing that could be used came until the deadline.
    pub(super) fn late(deadline: Duration) -> Self {
        Self {
            message: format!("the registry did not deliver within {deadline:?}"),
            transient: true,
            retry_after: None,
        }
    }
}

/// A blob in a registry.
pub struct RegistryBlob {
    blob: Blob,
    host: String,
}

impl RegistryBlob {
    /// `host` is the registry's, for the figures of the link to it.
    pub fn new(blob: Blob, host: impl Into<String>) -> Self {
        Self {
            // The engine waits and tries again, and says so.
            blob: blob.without_retries(),
            host: host.into(),
        }
    }
}

impl RangeSource for RegistryBlob {
    fn range(
        &self,
        offset: u64,
        len: u64,
    ) -> BoxFuture<'_, Result<Box<dyn RangeBody>, SourceError>> {
        Box::pin(async move {
            let body = self.blob.range(ByteRange::From { offset, len }).await?;
            Ok(Box::new(body) as Box<dyn RangeBody>)
        })
    }

    fn host(&self) -> &str {
        &self.host
    }
}

impl RangeBody for Body {
    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, SourceError>> {
        Box::pin(async move { Ok(Body::next(self).await?) })
    }

    fn blame(&self) -> Blame {
        let senders = self.senders();
        Box::new(move || {
            senders.distrust();
        })
    }
}

impl From<sluice_registry::Error> for SourceError {
    fn from(error: sluice_registry::Error) -> Self {
        // Credentials are rotated, expired links renewed and slips in files
        // mended, so those are worth the wait; what is absent or answered
        // wrongly is not.
        let transient = error.kind().is_transient()
            || matches!(
                error.kind(),
                ErrorKind::Unauthorized
                    | ErrorKind::Forbidden
                    | ErrorKind::Credentials
                    | ErrorKind::Tls
                    | ErrorKind::Config
            );
        Self {
            transient,
            retry_after: error.retry_after(),
            message: error.to_string(),
        }
    }
}
