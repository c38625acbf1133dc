//! Image references: `[host[:port]/]repository[:tag][@digest]`.

use std::fmt;
use std::str::FromStr;

use crate::Digest;

/// A registry reference, normalised as Docker does: `ubuntu` is
/// `docker.io/library/ubuntu:latest`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not an image reference: {why}")]
pub struct ReferenceError {
    text: String,
    why: &'static str,
}

impl Reference {
    /// The registry's host, with the port if one was given.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository within the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one was given or implied. A reference by digest alone has
    /// none.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was given.
    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same repository, at one digest.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            digest: Some(digest),
            tag: None,
            ..self.clone()
        }
    }

    /// The same repository, at the tag under which a registry that cannot list
    /// referrers keeps the index of those of `subject` (OCI distribution
    /// specification 1.1, "referrers tag schema").
    pub fn with_referrers_tag(&self, subject: Digest) -> Self {
        Self {
            digest: None,
            tag: Some(format!("sha256-{}", subject.hex())),
            ..self.clone()
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = |why| ReferenceError {
            text: text.chars().take(300).collect(),
            why,
        };
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => {
                let digest = digest
                    .parse()
                    .map_err(|_| refuse("the digest is not of the form sha256:<hex>"))?;
                (name, Some(digest))
            }
            None => (text, None),
        };
        let (name, tag) = match name.rsplit_once(':') {
            Some((rest, tag)) if !tag.contains('/') => (rest, Some(tag)),
            _ => (name, None),
        };
        if let Some(tag) = tag {
            let first = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let later = |c: char| first(c) || c == '.' || c == '-';
            if tag.len() > 128 || !tag.starts_with(first) || !tag.chars().all(later) {
                return Err(refuse("a tag is 1 to 128 letters, digits, '_', '.' or '-'"));
            }
        }
        let (host, repository) = match name.split_once('/') {
            Some((host, rest))
                if host.contains(['.', ':']) || host == "localhost" || has_upper(host) =>
            {
                (host.to_owned(), rest.to_owned())
            }
            Some(_) => ("docker.io".to_owned(), name.to_owned()),
            None => ("docker.io".to_owned(), format!("library/{name}")),
        };
        let host_ok = |c: char| c.is_ascii_alphanumeric() || ".-:[]_".contains(c);
        if host.is_empty() || !host.chars().all(host_ok) {
            return Err(refuse("the host holds a character that no host name has"));
        }
        if repository.len() > 255 || !repository.split('/').all(is_path_component) {
            return Err(refuse(
                "a repository is lower-case letters, digits and single separators ('.', '_', '-') \
                 in parts joined by '/'",
            ));
        }
        let tag = match (tag, digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self {
            host,
            repository,
            tag,
            digest,
        })
    }
}

fn has_upper(text: &str) -> bool {
    text.chars().any(|c| c.is_ascii_uppercase())
}

/// Whether `part` matches `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_path_component(part: &str) -> bool {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let separator = |s: &str| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-');
    part.starts_with(word)
        && part.ends_with(word)
        && part
            .split(word)
            .filter(|between| !between.is_empty())
            .all(separator)
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalises_as_docker_does() {
        for (text, full) in [
            ("ubuntu", "docker.io/library/ubuntu:latest"),
            ("me/app:v1", "docker.io/me/app:v1"),
            ("localhost/app", "localhost/app:latest"),
            ("127.0.0.1:5000/a/b__c:1.0", "127.0.0.1:5000/a/b__c:1.0"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), full);
        }
        let digest = Digest::of(b"x");
        let by_digest: Reference = format!("r.io/a@{digest}").parse().unwrap();
        assert_eq!(by_digest.tag(), None);
        assert_eq!(by_digest.digest(), Some(digest));
    }

    #[test]
    fn refuses_what_is_no_reference() {
        for bad in [
            "",
            "/",
            "r.io/",
            "r.io/A",
            "r.io/a//b",
            "r.io/a..b",
            "r.io/-a",
            "r.io/a:",
            "r.io/a b",
            "r.io/a:-x",
            "r.io/a@sha256:12",
            "http://r.io/a",
            "r.io/../a",
            "r.io/a___b",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
