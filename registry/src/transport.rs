//! One request: authorization, redirects, and what refusals mean. Retries
//! are the callers', who know what a new try has to redo.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, LOCATION};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};
use reqwest::{Response, Url};
use serde::Deserialize;
use sluice_oci::{Digest, Reference};

use crate::auth::{Auth, Challenge, Scope, log_in};
use crate::endpoint::{Endpoint, shown};
use crate::error::{Context, Error, ErrorKind, printable};
use crate::hosts::{Capabilities, Health, Host, Hosts, Round, authority};
use crate::http_client::{broken_body, log_answer, no_answer};
use crate::redirect::{Key, Redirects};
use crate::retry::{Attempts, retry_after};
use crate::upload::{BlobSource, Metered, Progress};
use crate::{Config, body};

const MAX_REDIRECTS: usize = 8;
const MAX_ERROR_BODY: usize = 16 << 10;
/// A registry may digest gigabytes before it answers the end of an upload.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(300);

/// What all handles of a client share.
pub(crate) struct Transport {
    pub(crate) config: Config,
    hosts: Hosts,
    pub(crate) health: Health,
    auth: Auth,
    redirects: Redirects,
}

/// What is to be done with a repository, and so which hosts may do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Get what has a digest.
    Pull,
    /// Get what a tag means.
    Resolve,
    /// Store something.
    Push,
}

impl Purpose {
    /// Of getting what a reference names.
    pub(crate) fn of(reference: &Reference) -> Self {
        match reference.digest() {
            Some(_) => Self::Pull,
            None => Self::Resolve,
        }
    }

    fn suits(self, host: Capabilities) -> bool {
        match self {
            Self::Pull => host.pull,
            Self::Resolve => host.pull && host.resolve,
            Self::Push => host.push,
        }
    }
}

/// One request, as often as it has to be sent.
pub(crate) struct Call<'a> {
    pub(crate) endpoint: &'a Endpoint,
    pub(crate) scope: &'a Scope,
    pub(crate) context: &'a Context,
    pub(crate) method: Method,
    pub(crate) headers: HeaderMap,
    pub(crate) payload: Payload,
}

#[derive(Clone)]
pub(crate) enum Payload {
    None,
    Bytes(Bytes),
    Source { source: BlobSource, size: u64 },
}

impl<'a> Call<'a> {
    pub(crate) fn new(
        method: Method,
        endpoint: &'a Endpoint,
        scope: &'a Scope,
        context: &'a Context,
    ) -> Self {
        Self {
            endpoint,
            scope,
            context,
            method,
            headers: HeaderMap::new(),
            payload: Payload::None,
        }
    }
}

impl Transport {
    pub(crate) fn new(config: Config) -> Result<Self, Error> {
        Ok(Self {
            hosts: Hosts::new(&config)?,
            health: Health::default(),
            auth: Auth::new(
                config.docker_configs.clone(),
                config.connect_timeout + config.stall_timeout,
            ),
            redirects: Redirects::default(),
            config,
        })
    }

    /// The hosts to ask, in their order; at least one.
    pub(crate) fn endpoints(
        &self,
        reference: &Reference,
        purpose: Purpose,
        context: &Context,
    ) -> Result<Vec<Endpoint>, Error> {
        let hosts = self.hosts.of(reference.host(), context)?;
        let mut suitable: Vec<&Arc<Host>> = Vec::new();
        for host in hosts.iter().filter(|h| purpose.suits(h.capabilities)) {
            // A file may name the registry's own host to say how to speak to it.
            // Asked once more without that, it would fail, and be left alone.
            if suitable.iter().all(|other| other.root != host.root) {
                suitable.push(host);
            }
        }
        let endpoints: Vec<_> = suitable
            .into_iter()
            .map(|host| Endpoint::new(Arc::clone(host), reference.repository()))
            .collect();
        if endpoints.is_empty() {
            let capability = match purpose {
                Purpose::Pull => "pull",
                Purpose::Resolve => "resolve",
                Purpose::Push => "push",
            };
            return Err(context
                .error(
                    ErrorKind::Config,
                    format!("the hosts.toml of {} has no host for it", reference.host()),
                )
                .with_remedy(format!("add the capability '{capability}' to one")));
        }
        Ok(endpoints)
    }

    /// One try at all the hosts that may succeed.
    pub(crate) fn round(
        &self,
        reference: &Reference,
        purpose: Purpose,
        blob: Option<Digest>,
        context: &Context,
    ) -> Result<Round<'_>, Error> {
        let endpoints = self.endpoints(reference, purpose, context)?;
        Ok(Round::new(&self.health, endpoints, blob))
    }

    pub(crate) fn attempts(&self) -> Attempts {
        Attempts::new(&self.config.retry)
    }

    /// Sends a call and follows redirects, the last known one first where
    /// `key` names what is fetched. Any status but a redirect comes back.
    pub(crate) async fn fetch(
        &self,
        call: &Call<'_>,
        url: Url,
        key: Option<&Key>,
    ) -> Result<Response, Error> {
        if let Some(key) = key
            && let Some(target) = self.redirects.get(key)
        {
            let answer = self.authorized(call, &target).await;
            let works = answer
                .as_ref()
                .is_ok_and(|response| works_as_target(response.status()));
            if works {
                return answer;
            }
            self.redirects.forget(key, &target);
            match answer {
                // Expired: the registry knows a new one.
                Ok(mut response) if !response.status().is_server_error() => {
                    self.drain(&mut response).await;
                }
                // Trouble there: let the caller pause, then ask the registry.
                other => return other,
            }
        }
        let mut url = url;
        let mut moved = false;
        for _ in 0..MAX_REDIRECTS {
            let mut response = self.authorized(call, &url).await?;
            if !is_redirect(response.status()) {
                if let Some(key) = key
                    && moved
                    && response.status().is_success()
                {
                    let ttl = self.config.redirect_ttl;
                    self.redirects.put(key.clone(), url, ttl);
                }
                return Ok(response);
            }
            let next = location(&response, call.context)?;
            if url.scheme() == "https" && next.scheme() != "https" {
                return Err(call.context.protocol(format!(
                    "the registry redirects to {}, which is not behind TLS",
                    shown(&next)
                )));
            }
            self.drain(&mut response).await;
            url = next;
            moved = true;
        }
        Err(call
            .context
            .protocol(format!("more than {MAX_REDIRECTS} redirects")))
    }

    /// Sends a call with what authorizes it, if `url` is the registry's own,
    /// and once more with a new token if it is refused by 401.
    pub(crate) async fn authorized(&self, call: &Call<'_>, url: &Url) -> Result<Response, Error> {
        if !call.endpoint.owns(url) {
            return self.send(call, url, None).await;
        }
        let (endpoint, context) = (call.endpoint, call.context);
        let http = endpoint.http();
        let authorization = self
            .auth
            .current(http, endpoint, call.scope, context)
            .await?;
        let mut response = self.send(call, url, authorization.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let Some(challenge) = Challenge::from_headers(response.headers()) else {
            return Ok(response);
        };
        let refused = refusal(context, &mut response, self.config.stall_timeout).await;
        drop(response);
        let renewed = self
            .auth
            .renew(
                http,
                endpoint,
                call.scope,
                challenge,
                authorization.as_ref(),
                context,
            )
            .await?;
        if Some(&renewed) == authorization.as_ref() {
            return Err(refused);
        }
        self.send(call, url, Some(&renewed)).await
    }

    async fn send(
        &self,
        call: &Call<'_>,
        url: &Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Error> {
        let mut headers = call.headers.clone();
        if call.endpoint.owns(url) {
            for (name, value) in call.endpoint.headers() {
                headers.append(name.clone(), value.clone());
            }
        }
        if let Some(authorization) = authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        let progress = Arc::new(Progress::default());
        let mut size = 0;
        let body = match &call.payload {
            Payload::None => None,
            Payload::Bytes(bytes) => Some(reqwest::Body::from(bytes.clone())),
            Payload::Source { source, size: all } => {
                size = *all;
                headers.insert(CONTENT_LENGTH, HeaderValue::from(size));
                let stream = source
                    .open()
                    .await
                    .map_err(|error| call.context.error(ErrorKind::Source, error.to_string()))?;
                Some(reqwest::Body::wrap_stream(Metered {
                    stream,
                    size,
                    progress: Arc::clone(&progress),
                }))
            }
        };
        let http = call.endpoint.http();
        let mut request = http.request(call.method.clone(), url.clone(), headers);
        if let Some(body) = body {
            request = request.body(body);
        }
        let stalled = self.watch(&progress, size);
        tokio::select! {
            answer = request.send() => {
                if let Some(why) = progress.failure() {
                    return Err(call.context.error(ErrorKind::Source, why));
                }
                let response = answer.map_err(|error| no_answer(call.context, url, error))?;
                log_answer(&call.method, url, &response);
                Ok(response)
            }
            after = stalled => Err(call.context.error(
                ErrorKind::Stalled,
                format!("no answer from {} for {} s", shown(url), after.as_secs_f32()),
            )),
        }
    }

    /// Returns when neither a byte of the request was taken nor an answer
    /// came for too long.
    async fn watch(&self, progress: &Progress, size: u64) -> Duration {
        // Connecting has its own bound.
        let patience = self.config.connect_timeout + self.config.stall_timeout;
        let mut before = 0;
        loop {
            let limit = if size > 0 && before >= size {
                COMMIT_TIMEOUT
            } else {
                patience
            };
            tokio::time::sleep(limit).await;
            let now = progress.sent();
            if now == before {
                return limit;
            }
            before = now;
        }
    }

    /// Sends a call to the root of the host's API, whose answer says nothing but
    /// by which version of HTTP it came. The connection can be used again.
    pub(crate) async fn touch(&self, call: &Call<'_>) -> Result<Version, Error> {
        let mut response = self.authorized(call, &call.endpoint.root_url()).await?;
        self.drain(&mut response).await;
        Ok(response.version())
    }

    /// Reads what little there is, so that the connection can be used again.
    async fn drain(&self, response: &mut Response) {
        let context = Context {
            action: "drain",
            subject: String::new(),
            host: String::new(),
        };
        let _ = body_up_to(
            response,
            MAX_ERROR_BODY,
            self.config.stall_timeout,
            &context,
        )
        .await;
    }

    /// The error that an unexpected status means.
    pub(crate) async fn refusal(&self, context: &Context, mut response: Response) -> Error {
        refusal(context, &mut response, self.config.stall_timeout).await
    }
}

/// Whether a remembered redirect target is still good. 400 is what some
/// stores answer for an expired signature.
fn works_as_target(status: StatusCode) -> bool {
    !matches!(status.as_u16(), 300..=399 | 400 | 401 | 403 | 404 | 410 | 500..)
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The `Location` header, resolved against the URL that was asked.
pub(crate) fn location(response: &Response, context: &Context) -> Result<Url, Error> {
    response
        .headers()
        .get(LOCATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| response.url().join(text).ok())
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| {
            context
                .protocol(format!(
                    "the registry answered {} without a usable Location",
                    response.status()
                ))
                .with_status(response.status())
        })
}

#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<ErrorItem>,
}

#[derive(Deserialize)]
struct ErrorItem {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The error for a status other than the expected, with what the registry
/// says about it.
pub(crate) async fn refusal(context: &Context, response: &mut Response, stall: Duration) -> Error {
    let status = response.status();
    let after = retry_after(response.headers(), SystemTime::now());
    let asked = response.url().clone();
    let said = body_up_to(response, MAX_ERROR_BODY, stall, context)
        .await
        .ok()
        .and_then(|bytes| serde_json::from_slice::<ErrorBody>(&bytes).ok())
        .and_then(|body| body.errors.into_iter().next())
        .map(|item| printable(&format!("{}: {}", item.code, item.message), 300));
    let mut why = format!("{} answered {status}", authority(&asked));
    if let Some(said) = said {
        why.push_str(&format!(" ({said})"));
    }
    let kind = match status.as_u16() {
        401 => ErrorKind::Unauthorized,
        403 => ErrorKind::Forbidden,
        404 | 410 => ErrorKind::NotFound,
        408 => ErrorKind::Stalled,
        416 => ErrorKind::RangeNotSatisfiable,
        429 => ErrorKind::Throttled,
        400..=499 => ErrorKind::Refused,
        500.. => ErrorKind::Server,
        _ => ErrorKind::Protocol,
    };
    let error = context
        .error(kind, why)
        .with_status(status)
        .with_retry_after(after);
    match kind {
        ErrorKind::Unauthorized => error.with_remedy(log_in(&context.host)),
        ErrorKind::Forbidden => error.with_remedy(format!(
            "check that the account logged in to {} may do this",
            context.host
        )),
        ErrorKind::NotFound => error.with_remedy("check the name and the tag"),
        ErrorKind::Throttled => error.with_remedy("wait, or log in to get a higher limit"),
        _ => error,
    }
}

/// The whole body, if it is at most `limit` bytes.
pub(crate) async fn body_up_to(
    response: &mut Response,
    limit: usize,
    stall: Duration,
    context: &Context,
) -> Result<Bytes, Error> {
    let too_large = || {
        context.error(
            ErrorKind::TooLarge,
            format!("the answer is larger than {limit} bytes"),
        )
    };
    if response
        .content_length()
        .is_some_and(|length| length > limit as u64)
    {
        return Err(too_large());
    }
    let mut all = Vec::new();
    loop {
        let chunk = tokio::time::timeout(stall, response.chunk())
            .await
            .map_err(|_| body::stalled(context, stall))?
            .map_err(|error| broken_body(context, error))?;
        let Some(chunk) = chunk else {
            return Ok(all.into());
        };
        if all.len() + chunk.len() > limit {
            return Err(too_large());
        }
        all.extend_from_slice(&chunk);
    }
}
