//! The connections, and what the HTTP library's errors mean.

use std::io;
use std::path::Path;
use std::sync::Arc;

use http::{HeaderMap, Method};
use reqwest::{Response, Url, redirect};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::Config;
use crate::endpoint::{is_loopback, shown};
use crate::error::{Context, Error, ErrorKind, printable};

/// One pool of connections through whatever proxy the environment names, and
/// one for loopback hosts, which no proxy could reach.
pub(crate) struct HttpClient {
    proxied: reqwest::Client,
    direct: reqwest::Client,
}

impl HttpClient {
    pub(crate) fn new(config: &Config) -> Result<Self, Error> {
        let context = Context {
            action: "make",
            subject: "the registry client".to_owned(),
            host: String::new(),
        };
        let tls = tls(config, &context)?;
        let build = |no_proxy: bool| {
            let builder = reqwest::Client::builder()
                .tls_backend_preconfigured(tls.clone())
                .user_agent(&config.user_agent)
                // Redirects carry no credentials and are cached: ours to do.
                .redirect(redirect::Policy::none())
                .referer(false)
                .connect_timeout(config.connect_timeout)
                .tcp_keepalive(std::time::Duration::from_secs(30))
                // HTTP/2's initial 64 KiB would cap a stream at one window a
                // round trip: this much in 100 ms is 320 Mbit/s. All streams
                // to a host share one connection, which buffers no more than
                // the second in memory when nobody reads.
                .http2_initial_stream_window_size(4 << 20)
                .http2_initial_connection_window_size(16 << 20);
            let builder = if no_proxy {
                builder.no_proxy()
            } else {
                builder
            };
            builder
                .build()
                .map_err(|error| context.error(ErrorKind::Config, chain(&error)))
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

fn tls(config: &Config, context: &Context) -> Result<rustls::ClientConfig, Error> {
    let mut roots = RootCertStore::empty();
    let native = rustls_native_certs::load_native_certs();
    // A machine without certificates can still use plain HTTP; a handshake
    // will say that the issuer is unknown.
    for error in &native.errors {
        tracing::debug!(%error, "a certificate of the system could not be read");
    }
    roots.add_parsable_certificates(native.certs);
    for path in &config.ca_certificates {
        add_file(&mut roots, path).map_err(|why| {
            context.error(
                ErrorKind::Config,
                format!(
                    "the certificates in {} cannot be used: {why}",
                    path.display()
                ),
            )
        })?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| context.error(ErrorKind::Config, error.to_string()))?;
    let mut tls = builder.with_root_certificates(roots).with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(tls)
}

fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())?;
    let mut any = false;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
        any = true;
    }
    if any {
        Ok(())
    } else {
        Err("it holds no PEM certificate".to_owned())
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
