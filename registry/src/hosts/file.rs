//! `hosts.toml`, as containerd reads it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use reqwest::Url;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::certificates::ClientPair;
use crate::error::printable;

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// Content by its digest.
    pub(crate) pull: bool,
    /// What a tag means. A host that may not is less trusted.
    pub(crate) resolve: bool,
    /// Storing content.
    pub(crate) push: bool,
}

impl Capabilities {
    pub(crate) const ALL: Self = Self {
        pull: true,
        resolve: true,
        push: true,
    };
}

/// One host of a file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    /// The root of its API; none is the registry's own.
    pub(super) root: Option<Url>,
    pub(super) capabilities: Capabilities,
    /// Files with authorities to trust beside the system's.
    pub(super) ca: Vec<PathBuf>,
    pub(super) client: Vec<ClientPair>,
    pub(super) skip_verify: Option<bool>,
    pub(super) headers: HeaderMap,
    pub(super) dial_timeout: Option<Duration>,
    pub(super) proxy: Option<Url>,
}

impl Entry {
    /// The registry itself, with nothing special.
    pub(super) fn own() -> Self {
        Self {
            root: None,
            capabilities: Capabilities::ALL,
            ca: Vec::new(),
            client: Vec::new(),
            skip_verify: None,
            headers: HeaderMap::new(),
            dial_timeout: None,
            proxy: None,
        }
    }
}

/// What is wrong with a file, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Invalid {
    path: PathBuf,
    line: usize,
    /// With what to do about it.
    message: String,
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            path,
            line,
            message,
        } = self;
        write!(f, "{}:{line}: {message}", path.display())
    }
}

type Key<'i> = Spanned<std::borrow::Cow<'i, str>>;
type Value<'i> = Spanned<DeValue<'i>>;

/// A file being read; its text is kept for the numbers of lines.
struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
}

/// The hosts of a file in the order in which they are asked: those of its
/// `host` tables in the order of the file, then its `server`.
pub(super) fn parse(text: &str, path: &Path) -> Result<Vec<Entry>, Invalid> {
    let reader = Reader { path, text };
    let table = DeTable::parse(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        let message = error.message().replace('\n', " ");
        reader.invalid(at, format!("{message}; write it as TOML"))
    })?;
    let mut server = None;
    let mut hosts = Vec::new();
    let mut fields = Vec::new();
    for (key, value) in table.get_ref() {
        match key.get_ref().as_ref() {
            "server" => server = Some((reader.string(key, value)?, value.span().start)),
            "host" => {
                for (url, value) in reader.table(key, value)? {
                    hosts.push((url, reader.table(url, value)?));
                }
            }
            _ => fields.push((key, value)),
        }
    }
    // The map is sorted by name, and keys know where they stood. A host may
    // begin with a table below it.
    hosts.sort_by_key(|(url, table)| {
        let fields = table.keys().map(|key| key.span().start);
        fields.chain([url.span().start]).min()
    });
    let mut entries = Vec::new();
    for (url, table) in hosts {
        let root = (url.get_ref().as_ref(), url.span().start);
        entries.push(reader.entry(Some(root), table.iter())?);
    }
    let server = server.filter(|(server, _)| !server.is_empty());
    entries.push(reader.entry(server, fields.into_iter())?);
    Ok(entries)
}

impl<'a> Reader<'a> {
    fn invalid(&self, at: usize, message: impl Into<String>) -> Invalid {
        let before = self.text.as_bytes().iter().take(at);
        Invalid {
            path: self.path.to_owned(),
            line: 1 + before.filter(|byte| **byte == b'\n').count(),
            message: message.into(),
        }
    }

    /// A host's table; `root` is its URL as written, and where.
    fn entry<'i: 'k, 'k>(
        &self,
        root: Option<(&str, usize)>,
        fields: impl Iterator<Item = (&'k Key<'i>, &'k Value<'i>)>,
    ) -> Result<Entry, Invalid> {
        let mut entry = Entry::own();
        let mut override_path = false;
        for (key, value) in fields {
            match key.get_ref().as_ref() {
                "capabilities" => entry.capabilities = self.capabilities(key, value)?,
                "ca" => entry.ca = self.paths(key, value)?,
                "client" => entry.client = self.client(key, value)?,
                "skip_verify" => entry.skip_verify = Some(self.boolean(key, value)?),
                "override_path" => override_path = self.boolean(key, value)?,
                "header" => entry.headers = self.headers(key, value)?,
                "dial_timeout" => {
                    let text = self.string(key, value)?;
                    let timeout = duration(text).ok_or_else(|| {
                        self.invalid(
                            value.span().start,
                            "dial_timeout is no time; write it as \"500ms\" or \"10s\"",
                        )
                    })?;
                    entry.dial_timeout = Some(timeout);
                }
                "proxy" => {
                    let text = self.string(key, value)?;
                    let proxy = Url::parse(text)
                        .ok()
                        .filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
                    entry.proxy = Some(proxy.ok_or_else(|| {
                        self.invalid(
                            value.span().start,
                            "proxy is no URL of a proxy; write it as \"http://proxy:8080\"",
                        )
                    })?);
                }
                // containerd passes over what it does not know, so that a
                // file for a newer one works.
                unknown => tracing::warn!(
                    "{}",
                    self.invalid(
                        key.span().start,
                        format!(
                            "'{}' is not known and has no effect",
                            printable(unknown, 50)
                        )
                    )
                ),
            }
        }
        if let Some((text, at)) = root {
            entry.root = Some(self.root(text, at, override_path)?);
        }
        Ok(entry)
    }

    fn root(&self, text: &str, at: usize, override_path: bool) -> Result<Url, Invalid> {
        let full = match text.contains("://") {
            true => text.to_owned(),
            false => format!("https://{text}"),
        };
        let mut url = Url::parse(&full)
            .ok()
            .filter(|url| {
                matches!(url.scheme(), "http" | "https")
                    && url.has_host()
                    && url.username().is_empty()
                    && url.password().is_none()
                    && url.query().is_none()
                    && url.fragment().is_none()
            })
            .ok_or_else(|| {
                // Not what was written: it could hold a password.
                self.invalid(
                    at,
                    "this is no URL of a registry; write it as \"https://host:port\", and \
                     credentials into the Docker configuration",
                )
            })?;
        let path = url.path().trim_end_matches('/').to_owned();
        let path = match override_path || path.ends_with("/v2") {
            true => path,
            false => format!("{path}/v2"),
        };
        url.set_path(&path);
        Ok(url)
    }

    fn capabilities(&self, key: &Key<'_>, value: &Value<'_>) -> Result<Capabilities, Invalid> {
        let mut found = Capabilities {
            pull: false,
            resolve: false,
            push: false,
        };
        let DeValue::Array(items) = value.get_ref() else {
            return Err(self.wrong_type(key, value, "a list of pull, resolve and push"));
        };
        if items.is_empty() {
            return Ok(Capabilities::ALL);
        }
        for item in items.iter() {
            match self.string(key, item)?.to_ascii_lowercase().as_str() {
                "pull" => found.pull = true,
                "resolve" => found.resolve = true,
                "push" => found.push = true,
                other => {
                    let other = printable(other, 50);
                    return Err(self.invalid(
                        item.span().start,
                        format!("unknown capability '{other}'; there are pull, resolve and push"),
                    ));
                }
            }
        }
        Ok(found)
    }

    fn paths(&self, key: &Key<'_>, value: &Value<'_>) -> Result<Vec<PathBuf>, Invalid> {
        match value.get_ref() {
            DeValue::String(path) => Ok(vec![self.path_of(path)]),
            DeValue::Array(items) => items
                .iter()
                .map(|item| Ok(self.path_of(self.string(key, item)?)))
                .collect(),
            _ => Err(self.wrong_type(key, value, "a path or a list of paths")),
        }
    }

    /// A file with certificate and key, several such files, or pairs of a
    /// certificate's file and a key's.
    fn client(&self, key: &Key<'_>, value: &Value<'_>) -> Result<Vec<ClientPair>, Invalid> {
        let alone = |path: &str| ClientPair {
            certificate: self.path_of(path),
            key: None,
        };
        let items = match value.get_ref() {
            DeValue::String(path) => return Ok(vec![alone(path)]),
            DeValue::Array(items) => items,
            _ => return Err(self.wrong_type(key, value, "a path, or a list of paths or pairs")),
        };
        let mut pairs = Vec::new();
        for item in items.iter() {
            pairs.push(match item.get_ref() {
                DeValue::String(path) => alone(path),
                DeValue::Array(pair) => match &pair[..] {
                    [certificate, secret] => {
                        let secret = self.string(key, secret)?;
                        ClientPair {
                            certificate: self.path_of(self.string(key, certificate)?),
                            key: (!secret.is_empty()).then(|| self.path_of(secret)),
                        }
                    }
                    _ => {
                        return Err(self.invalid(
                            item.span().start,
                            "a pair of client has two paths; write [\"client.cert\", \
                             \"client.key\"], the pairs in a list of their own",
                        ));
                    }
                },
                _ => return Err(self.wrong_type(key, item, "a path or a pair of paths")),
            });
        }
        Ok(pairs)
    }

    fn headers(&self, key: &Key<'_>, value: &Value<'_>) -> Result<HeaderMap, Invalid> {
        let mut headers = HeaderMap::new();
        for (name, value) in self.table(key, value)? {
            let header = HeaderName::try_from(name.get_ref().as_ref()).map_err(|_| {
                self.invalid(
                    name.span().start,
                    "this is no name of a header; use letters, digits and '-'",
                )
            })?;
            let texts = match value.get_ref() {
                DeValue::String(text) => vec![text.as_ref()],
                DeValue::Array(items) => items
                    .iter()
                    .map(|item| self.string(name, item))
                    .collect::<Result<_, _>>()?,
                _ => return Err(self.wrong_type(name, value, "a string or a list of strings")),
            };
            for text in texts {
                let mut content = HeaderValue::try_from(text).map_err(|_| {
                    self.invalid(
                        value.span().start,
                        "no header can carry this value; leave out control characters",
                    )
                })?;
                content.set_sensitive(true);
                headers.append(header.clone(), content);
            }
        }
        Ok(headers)
    }

    fn path_of(&self, path: &str) -> PathBuf {
        // Relative to the file; an absolute path stays.
        self.path.parent().unwrap_or(self.path).join(path)
    }

    fn string<'v>(&self, key: &Key<'_>, value: &'v Value<'_>) -> Result<&'v str, Invalid> {
        let text = value.get_ref().as_str();
        text.ok_or_else(|| self.wrong_type(key, value, "a string"))
    }

    fn boolean(&self, key: &Key<'_>, value: &Value<'_>) -> Result<bool, Invalid> {
        let found = value.get_ref().as_bool();
        found.ok_or_else(|| self.wrong_type(key, value, "true or false"))
    }

    fn table<'v, 'i>(
        &self,
        key: &Key<'_>,
        value: &'v Value<'i>,
    ) -> Result<&'v DeTable<'i>, Invalid> {
        let table = value.get_ref().as_table();
        table.ok_or_else(|| self.wrong_type(key, value, "a table"))
    }

    fn wrong_type(&self, key: &Key<'_>, value: &Value<'_>, wanted: &str) -> Invalid {
        let name = printable(key.get_ref(), 80);
        let found = value.get_ref().type_str();
        self.invalid(
            value.span().start,
            format!("{name} is of type {found}; write {wanted}"),
        )
    }
}

/// A time as Go writes it: `500ms`, `1m30s`, `1.5s`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, unit) = rest.split_at(digits);
        let end = unit
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(unit.len());
        let (unit, next) = unit.split_at(end);
        let scale = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * scale;
        rest = next;
    }
    let duration = Duration::try_from_secs_f64(seconds).ok()?;
    (!duration.is_zero()).then_some(duration)
}

#[cfg(test)]
mod tests;
