//! What must hold for any challenge and any credentials file.

use http::header::WWW_AUTHENTICATE;
use http::{HeaderMap, HeaderValue};

use super::challenge::Challenge;
use super::config;

/// A challenge names where to go, or is none. Each line is one header.
pub fn challenge(data: &[u8]) {
    let headers: HeaderMap = data
        .split(|byte| *byte == b'\n')
        .filter_map(|line| HeaderValue::from_bytes(line).ok())
        .map(|value| (WWW_AUTHENTICATE, value))
        .collect();
    if let Some(Challenge::Bearer(bearer)) = Challenge::from_headers(&headers) {
        assert!(!bearer.realm.is_empty());
        assert!(bearer.service.is_none_or(|service| !service.is_empty()));
        assert!(bearer.scope.is_none_or(|scope| !scope.is_empty()));
    }
}

/// A file is refused without its secrets being told, or names credentials.
pub fn docker_config(data: &[u8]) {
    for (host, repository) in [("r.io", "a/b"), ("docker.io", "library/x"), ("", "")] {
        if let Err(reason) = config::in_file(data, host, repository) {
            // The value of `auth` in the corpus.
            assert!(!reason.contains("dXNlcjpwYXNz"), "{reason}");
        }
    }
}
