//! From a reference's host to URLs.

use std::net::IpAddr;
use std::sync::Arc;

use http::HeaderMap;
use reqwest::Url;
use sluice_oci::Digest;

use crate::Config;
use crate::error::Context;
use crate::hosts::Host;
use crate::http_client::HttpClient;
use crate::redirect::Key;

/// Where a repository's API is, on one of its hosts.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    host: Arc<Host>,
    pub(crate) repository: String,
    base: Url,
    origin: String,
}

impl Endpoint {
    pub(crate) fn new(host: Arc<Host>, repository: &str) -> Self {
        let mut base = host.root.clone();
        let root = base.path().trim_end_matches('/').to_owned();
        base.set_path(&format!("{root}/{repository}/"));
        Self {
            origin: base.origin().ascii_serialization(),
            repository: repository.to_owned(),
            host,
            base,
        }
    }

    /// The URL of `tail`, relative to the repository.
    pub(crate) fn url(&self, tail: &str) -> Url {
        let mut url = self.base.clone();
        let path = format!("{}{tail}", self.base.path());
        url.set_path(&path);
        url
    }

    /// The same for content to be pulled. A host that stands in for a
    /// registry is told for which.
    pub(crate) fn pull_url(&self, tail: &str) -> Url {
        let mut url = self.url(tail);
        if let Some(namespace) = &self.host.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }

    /// The root of the host's API, which the distribution specification has
    /// clients ask whether it is one.
    pub(crate) fn root_url(&self) -> Url {
        let mut url = self.host.root.clone();
        let path = format!("{}/", url.path().trim_end_matches('/'));
        url.set_path(&path);
        url
    }

    /// The host's name with its port, by which credentials are found.
    pub(crate) fn name(&self) -> &str {
        &self.host.name
    }

    /// Scheme, host and port: what is learned of one never goes to another.
    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }

    /// Names a blob of the repository on this host.
    pub(crate) fn key(&self, digest: Digest) -> Key {
        Key {
            host: self.origin.clone(),
            repository: self.repository.clone(),
            digest,
        }
    }

    pub(crate) fn http(&self) -> &HttpClient {
        &self.host.http
    }

    /// What every request to the host itself carries.
    pub(crate) fn headers(&self) -> &HeaderMap {
        &self.host.headers
    }

    /// A context whose remedies are about this host.
    pub(crate) fn context(&self, context: &Context) -> Context {
        Context {
            host: self.host.name.clone(),
            ..context.clone()
        }
    }

    /// Whether `url` is on the host itself, so that it may see the
    /// credentials.
    pub(crate) fn owns(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    pub(crate) fn is_plain(&self) -> bool {
        self.base.scheme() == "http"
    }
}

pub(crate) fn is_plain(host: &str, config: &Config) -> bool {
    is_loopback(host) || config.plain_http.iter().any(|plain| plain == host)
}

/// Whether `host` (with or without a port) can only be this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// A URL for messages: without the query, which may be a signature.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Fails only for URLs that cannot have a password anyway.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    crate::error::printable(url.as_str(), 300)
}

#[cfg(test)]
mod tests {
    use sluice_oci::Reference;

    use super::*;
    use crate::hosts::Hosts;

    fn url(reference: &str, plain: &[&str]) -> String {
        let config = Config {
            plain_http: plain.iter().map(|&host| host.to_owned()).collect(),
            ..Config::default()
        };
        let context = Context {
            action: "fetch",
            subject: "x".to_owned(),
            host: "x".to_owned(),
        };
        let reference: Reference = reference.parse().unwrap();
        let hosts = Hosts::new(&config).unwrap();
        let hosts = hosts.of(reference.host(), &context).unwrap();
        assert_eq!(hosts.len(), 1);
        let endpoint = Endpoint::new(Arc::clone(&hosts[0]), reference.repository());
        assert_eq!(endpoint.url("tags/list"), endpoint.pull_url("tags/list"));
        endpoint.url("tags/list").to_string()
    }

    #[test]
    fn scheme_and_host() {
        for (reference, plain, expected) in [
            (
                "ubuntu",
                &[][..],
                "https://registry-1.docker.io/v2/library/ubuntu/tags/list",
            ),
            ("r.io/a/b", &[], "https://r.io/v2/a/b/tags/list"),
            (
                "localhost:5000/a",
                &[],
                "http://localhost:5000/v2/a/tags/list",
            ),
            ("127.8.0.1/a", &[], "http://127.8.0.1/v2/a/tags/list"),
            ("[::1]:5000/a", &[], "http://[::1]:5000/v2/a/tags/list"),
            (
                "10.0.0.1:5000/a",
                &["10.0.0.1:5000"],
                "http://10.0.0.1:5000/v2/a/tags/list",
            ),
            (
                "10.0.0.1:5001/a",
                &["10.0.0.1:5000"],
                "https://10.0.0.1:5001/v2/a/tags/list",
            ),
            (
                "127.0.0.1.example.com/a",
                &[],
                "https://127.0.0.1.example.com/v2/a/tags/list",
            ),
        ] {
            assert_eq!(url(reference, plain), expected);
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let url = Url::parse("https://u:p@s3.example/blob?X-Amz-Signature=abc#f").unwrap();
        assert_eq!(shown(&url), "https://s3.example/blob");
    }
}
