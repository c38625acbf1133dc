//! From a reference's host to URLs.

use std::net::IpAddr;

use reqwest::Url;
use sluice_oci::Reference;

use crate::Config;
use crate::error::{Context, Error, ErrorKind};

/// Where a repository's API is.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    /// The host as references name it; keys the token and redirect caches.
    pub(crate) host: String,
    pub(crate) repository: String,
    base: Url,
}

impl Endpoint {
    pub(crate) fn new(
        reference: &Reference,
        config: &Config,
        context: &Context,
    ) -> Result<Self, Error> {
        let host = reference.host();
        let scheme = if is_plain(host, config) {
            "http"
        } else {
            "https"
        };
        let address = match host {
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            other => other,
        };
        let text = format!("{scheme}://{address}/v2/{}/", reference.repository());
        let base = Url::parse(&text).map_err(|error| {
            context.error(
                ErrorKind::Config,
                format!("'{host}' is no host name ({error})"),
            )
        })?;
        Ok(Self {
            host: host.to_owned(),
            repository: reference.repository().to_owned(),
            base,
        })
    }

    /// The URL of `tail`, relative to the repository.
    pub(crate) fn url(&self, tail: &str) -> Url {
        let mut url = self.base.clone();
        let path = format!("{}{tail}", self.base.path());
        url.set_path(&path);
        url
    }

    /// Whether `url` is on the registry itself, so that it may see the
    /// credentials.
    pub(crate) fn owns(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    pub(crate) fn is_plain(&self) -> bool {
        self.base.scheme() == "http"
    }
}

fn is_plain(host: &str, config: &Config) -> bool {
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
    use super::*;

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
        let endpoint = Endpoint::new(&reference.parse().unwrap(), &config, &context).unwrap();
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
