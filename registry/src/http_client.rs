//! The connections, and what the HTTP library's errors mean.

use std::io;
use std::time::Duration;

use http::{HeaderMap, Method};
use reqwest::{Response, Url, redirect};

use crate::Config;
use crate::endpoint::{is_loopback, shown};
use crate::error::{Context, Error, ErrorKind, printable};
use crate::hosts::certificates::Tls;

/// What a host's connections are to have beyond the client's settings.
#[derive(Debug, Clone, Default)]
pub(crate) struct Special {
    pub(crate) tls: Tls,
    pub(crate) connect_timeout: Option<Duration>,
    /// A proxy in place of the environment's.
    pub(crate) proxy: Option<Url>,
}

impl Special {
    pub(crate) fn is_default(&self) -> bool {
        let Tls {
            ca,
            client,
            skip_verify,
        } = &self.tls;
        let tls = ca.is_empty() && client.is_empty() && !skip_verify;
        tls && self.connect_timeout.is_none() && self.proxy.is_none()
    }
}

/// Bytes of an HTTP/2 answer that may come before they are read.
const STREAM_WINDOW: u32 = 4 << 20;

/// One pool of connections through whatever proxy the environment names, and
/// one for loopback hosts, which no proxy could reach.
#[derive(Debug)]
pub(crate) struct HttpClient {
    proxied: reqwest::Client,
    direct: reqwest::Client,
}

impl HttpClient {
    /// Fails with what is wrong with which file.
    pub(crate) fn new(config: &Config, special: &Special) -> Result<Self, String> {
        let mut tls = special.tls.clone();
        tls.ca.extend(config.ca_certificates.iter().cloned());
        let tls = tls.config()?;
        let connect_timeout = special.connect_timeout.unwrap_or(config.connect_timeout);
        let build = |no_proxy: bool| {
            let builder = reqwest::Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .user_agent(&config.user_agent)
                // Redirects carry no credentials and are cached: ours to do.
                .redirect(redirect::Policy::none())
                .referer(false)
                .connect_timeout(connect_timeout)
                .tcp_keepalive(Duration::from_secs(30))
                // HTTP/2's initial 64 KiB would cap a stream at one window a
                // round trip: this much in 100 ms is 320 Mbit/s. All streams
                // to a host share one connection. Nobody is to wait because
                // others do not read theirs, so it has room for 32 of them.
                .http2_initial_stream_window_size(STREAM_WINDOW)
                .http2_initial_connection_window_size(32 * STREAM_WINDOW);
            let builder = match &special.proxy {
                Some(proxy) => {
                    let proxy = reqwest::Proxy::all(proxy.clone());
                    builder.proxy(proxy.map_err(|error| chain(&error))?)
                }
                None if no_proxy => builder.no_proxy(),
                None => builder,
            };
            builder.build().map_err(|error| chain(&error))
        };
        Ok(Self {
            proxied: build(false)?,
            direct: build(true)?,
        })
    }

    pub(crate) fn request(
        &self,
        method: Method,
        url: Url,
        headers: HeaderMap,
    ) -> reqwest::RequestBuilder {
        let client = if url.host_str().is_some_and(is_loopback) {
            &self.direct
        } else {
            &self.proxied
        };
        client.request(method, url).headers(headers)
    }
}

const PLAIN_HTTP: &str =
    "if the registry speaks plain HTTP, pass --plain-http or list it as plain_http";

/// Translates a failure to get an answer.
pub(crate) fn no_answer(context: &Context, url: &Url, error: reqwest::Error) -> Error {
    let error = error.without_url();
    let place = shown(url);
    let why = format!("no answer from {place} ({})", chain(&error));
    if let Some(tls) = find::<rustls::Error>(&error) {
        let remedy = match tls {
            rustls::Error::InvalidMessage(_) => PLAIN_HTTP,
            rustls::Error::InvalidCertificate(_) => {
                "if its certificate is right, add its authority to the system's certificates"
            }
            _ => "check the registry's TLS settings",
        };
        return context.error(ErrorKind::Tls, why).with_remedy(remedy);
    }
    if error.is_builder() {
        return context.error(ErrorKind::Protocol, why);
    }
    let ended = why.contains("tls handshake eof");
    let error = context.error(ErrorKind::Connect, why);
    if ended {
        return error.with_remedy(PLAIN_HTTP);
    }
    error
}

/// Translates a failure in the middle of a body.
pub(crate) fn broken_body(context: &Context, error: reqwest::Error) -> Error {
    let why = format!("the body ended early ({})", chain(&error.without_url()));
    context.error(ErrorKind::Truncated, why)
}

/// An error and its causes on one line, repetitions left out.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    printable(&text, 400)
}

/// The first cause of type `E`, looking into I/O errors as well.
fn find<'a, E: std::error::Error + 'static>(
    error: &'a (dyn std::error::Error + 'static),
) -> Option<&'a E> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(found) = cause.downcast_ref::<E>() {
            return Some(found);
        }
        let inner = cause
            .downcast_ref::<io::Error>()
            .and_then(|io| io.get_ref())
            .map(|inner| inner as &(dyn std::error::Error + 'static));
        next = inner.or_else(|| cause.source());
    }
    None
}

/// Whether an answer came by a protocol that the registry chose by ALPN; for
/// the log.
pub(crate) fn log_answer(method: &Method, url: &Url, response: &Response) {
    tracing::debug!(
        %method,
        url = %shown(url),
        status = response.status().as_u16(),
        version = ?response.version(),
        "answer"
    );
}
