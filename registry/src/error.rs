//! The one error type: what was attempted, on what, why it failed, and what
//! to do about it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;

/// What went wrong, for code that has to decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The registry does not have it (404, 410).
    NotFound,
    /// No or wrong credentials (401).
    Unauthorized,
    /// The credentials do not allow it (403).
    Forbidden,
    /// The registry answered a request for a range with the whole blob. The
    /// whole was not downloaded.
    RangeIgnored,
    /// The range lies outside the blob (416).
    RangeNotSatisfiable,
    /// Too many requests (429), and it did not get better in time.
    Throttled,
    /// The registry failed (5xx).
    Server,
    /// The registry refused the request for another reason (other 4xx).
    Refused,
    /// No connection, or it broke before an answer came.
    Connect,
    /// The TLS handshake failed.
    Tls,
    /// Nothing arrived for the configured time.
    Stalled,
    /// The body ended early.
    Truncated,
    /// The bytes do not have the digest they were asked by.
    DigestMismatch,
    /// The answer is larger than what is accepted.
    TooLarge,
    /// The answer breaks the protocol.
    Protocol,
    /// Credentials could not be read from the configuration or a helper.
    Credentials,
    /// The client could not be made from its configuration.
    Config,
    /// The source of an upload failed.
    Source,
}

impl ErrorKind {
    /// Whether the same request may succeed later.
    pub fn is_transient(self) -> bool {
        matches!(
            self,
            Self::Throttled | Self::Server | Self::Connect | Self::Stalled | Self::Truncated
        )
    }
}

/// A failed operation on a registry. Cheap to clone, so that one failure can
/// be told to all who waited for the result.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    context: Context,
    why: String,
    status: Option<StatusCode>,
    remedy: Option<String>,
    retry_after: Option<Duration>,
}

/// What is being done, and to what; said by every error.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// An infinitive: `fetch`, `upload`.
    pub(crate) action: &'static str,
    /// `manifest registry.example/app:v1`.
    pub(crate) subject: String,
    /// The registry, as the reference names it.
    pub(crate) host: String,
}

impl Context {
    pub(crate) fn error(&self, kind: ErrorKind, why: impl Into<String>) -> Error {
        Error(Arc::new(Inner {
            kind,
            context: self.clone(),
            why: why.into(),
            status: None,
            remedy: None,
            retry_after: None,
        }))
    }

    pub(crate) fn protocol(&self, why: impl Into<String>) -> Error {
        self.error(ErrorKind::Protocol, why)
    }
}

impl Error {
    /// The kind, to decide by.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The HTTP status that the registry answered, if it did.
    pub fn status(&self) -> Option<u16> {
        self.0.status.map(|status| status.as_u16())
    }

    /// The registry that was spoken to.
    pub fn host(&self) -> &str {
        &self.0.context.host
    }

    /// How long the registry asked to wait.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    pub(crate) fn with_status(mut self, status: StatusCode) -> Self {
        Arc::make_mut(&mut self.0).status = Some(status);
        self
    }

    pub(crate) fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.0).remedy = Some(remedy.into());
        self
    }

    pub(crate) fn with_retry_after(mut self, after: Option<Duration>) -> Self {
        Arc::make_mut(&mut self.0).retry_after = after;
        self
    }

    /// Adds to the reason, for example how often it was tried.
    pub(crate) fn with_note(mut self, note: &str) -> Self {
        Arc::make_mut(&mut self.0).why.push_str(note);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner {
            context,
            why,
            remedy,
            ..
        } = &*self.0;
        write!(f, "cannot {} {}: {why}", context.action, context.subject)?;
        if let Some(remedy) = remedy {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {}

/// Text from outside, cut to `limit` characters and without control
/// characters, so that it can neither flood nor steer a terminal.
pub(crate) fn printable(text: &str, limit: usize) -> String {
    let mut clean: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(limit)
        .collect();
    if text.chars().nth(limit).is_some() {
        clean.push('…');
    }
    clean.trim().to_owned()
}
