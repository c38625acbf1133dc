//! Which hosts have a registry's images: its own, and the mirrors that
//! containerd's `hosts.toml` files name.
//!
//! Files are looked at again before each request, which costs a few calls of
//! `stat`, and read when they have changed. One that has become wrong leaves
//! the hosts as they were: a slip of the pen must not break what runs.

pub(crate) mod certificates;
mod file;
mod health;
mod round;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use reqwest::Url;

use self::certificates::{ClientPair, Tls};
pub(crate) use self::file::Capabilities;
use self::file::Entry;
pub(crate) use self::health::Health;
pub(crate) use self::round::Round;
pub use self::round::Senders;
use crate::Config;
use crate::endpoint::{is_loopback, is_plain};
use crate::error::{Context, Error, ErrorKind};
use crate::http_client::{HttpClient, Special};

/// A file of hosts larger than this is none.
const MAX_FILE: u64 = 1 << 20;
/// Registries whose hosts are remembered; more are read again.
const CAPACITY: usize = 1024;

/// One host, and how it is spoken to.
#[derive(Debug)]
pub(crate) struct Host {
    /// Its name, with the port, by which credentials are found.
    pub(crate) name: String,
    /// The root of its API, without a slash at the end.
    pub(crate) root: Url,
    /// The registry that it stands in for, if it is another than its own.
    pub(crate) namespace: Option<String>,
    /// What every request to it carries.
    pub(crate) headers: HeaderMap,
    pub(crate) capabilities: Capabilities,
    pub(crate) http: Arc<HttpClient>,
}

type List = Arc<[Arc<Host>]>;

/// Finds the hosts of registries.
pub(crate) struct Hosts {
    config: Config,
    /// For hosts with nothing special.
    http: Arc<HttpClient>,
    known: Mutex<HashMap<String, Known>>,
}

struct Known {
    stamps: Vec<(PathBuf, Stamp)>,
    list: List,
}

/// By which a change of a file is seen; none if it is not there.
type Stamp = Option<(u64, u64, i64, i64)>;

impl Hosts {
    pub(crate) fn new(config: &Config) -> Result<Self, Error> {
        let http = HttpClient::new(config, &Special::default()).map_err(|why| {
            let context = Context {
                action: "make",
                subject: "the registry client".to_owned(),
                host: String::new(),
            };
            context.error(ErrorKind::Config, why)
        })?;
        Ok(Self {
            config: config.clone(),
            http: Arc::new(http),
            known: Mutex::default(),
        })
    }

    /// The hosts that have the images of the registry `namespace`, in the
    /// order in which they are asked; the registry's own is the last one.
    pub(crate) fn of(&self, namespace: &str, context: &Context) -> Result<List, Error> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |why: String| context.error(ErrorKind::Config, why);
        let directory = self.directory(namespace).map_err(|(path, error)| {
            let path = path.display();
            failed(format!("cannot look into {path} for hosts: {error}"))
        })?;
        let file = directory
            .as_ref()
            .map(|directory| directory.join("hosts.toml"));
        let before = known.get(namespace);
        let fresh = |known: &&Known| {
            known.stamps.first().map(|(path, _)| path) == file.as_ref()
                && known.stamps.iter().all(|(path, seen)| stamp(path) == *seen)
        };
        if let Some(before) = before.filter(fresh) {
            return Ok(Arc::clone(&before.list));
        }
        let (stamps, read) = self.read(namespace, directory.as_deref());
        let list = match (read, before) {
            (Ok(list), _) => list,
            (Err(why), Some(before)) => {
                tracing::warn!("{why}; the hosts of {namespace} stay as they were");
                Arc::clone(&before.list)
            }
            (Err(why), None) => return Err(failed(why)),
        };
        if known.len() >= CAPACITY {
            known.clear();
        }
        let kept = Known {
            stamps,
            list: Arc::clone(&list),
        };
        known.insert(namespace.to_owned(), kept);
        Ok(list)
    }

    /// The first directory that is there for a registry. In each of the
    /// configured ones that is its own, with the port written in either way,
    /// or the default.
    fn directory(&self, namespace: &str) -> Result<Option<PathBuf>, (PathBuf, io::Error)> {
        let own = !namespace.contains('/') && !namespace.starts_with('.');
        let with_port = match namespace.rsplit_once(':') {
            Some((host, port)) if own => Some(format!("{host}_{port}_")),
            _ => None,
        };
        let names = [
            with_port,
            own.then(|| namespace.to_owned()),
            Some("_default".to_owned()),
        ];
        for root in &self.config.hosts_dirs {
            for name in names.iter().flatten() {
                let path = root.join(name);
                match fs::metadata(&path) {
                    Ok(_) => return Ok(Some(path)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err((path, error)),
                }
            }
        }
        Ok(None)
    }

    /// The hosts as the files are now, with all the files that decide.
    fn read(
        &self,
        namespace: &str,
        directory: Option<&Path>,
    ) -> (Vec<(PathBuf, Stamp)>, Result<List, String>) {
        let Some(directory) = directory else {
            let own = self.host(namespace, Entry::own(), None);
            return (Vec::new(), own.map(|host| Arc::from([host])));
        };
        let file = directory.join("hosts.toml");
        let mut paths = vec![file.clone(), directory.to_owned()];
        let mut stamps: Vec<_> = paths.iter().map(|path| stamp(path)).collect();
        let list = entries(&file, directory).and_then(|entries| {
            for entry in &entries {
                let client = |pair: &ClientPair| [Some(pair.certificate.clone()), pair.key.clone()];
                paths.extend(entry.ca.iter().cloned());
                paths.extend(entry.client.iter().flat_map(client).flatten());
            }
            // Before the files are read: a change in between is seen later.
            stamps.extend(paths[2..].iter().map(|path| stamp(path)));
            entries
                .into_iter()
                .map(|entry| self.host(namespace, entry, Some(&file)))
                .collect()
        });
        (paths.into_iter().zip(stamps).collect(), list)
    }

    fn host(
        &self,
        namespace: &str,
        entry: Entry,
        file: Option<&Path>,
    ) -> Result<Arc<Host>, String> {
        let tls = !entry.ca.is_empty() || !entry.client.is_empty() || entry.skip_verify.is_some();
        let special = Special {
            tls: Tls {
                ca: entry.ca,
                client: entry.client,
                skip_verify: entry.skip_verify.unwrap_or(false),
            },
            connect_timeout: entry.dial_timeout,
            proxy: entry.proxy,
        };
        let http = if special.is_default() {
            Arc::clone(&self.http)
        } else {
            let client = HttpClient::new(&self.config, &special);
            Arc::new(client.map_err(|why| match file {
                Some(file) => format!("{}: {why}", file.display()),
                None => why,
            })?)
        };
        let (name, root) = match entry.root {
            Some(root) => (authority(&root), root),
            None => (namespace.to_owned(), self.own_root(namespace, tls)?),
        };
        let address = authority(&root);
        let own = address == namespace
            || name == namespace
            || (namespace == "docker.io" && address == "registry-1.docker.io");
        Ok(Arc::new(Host {
            name,
            root,
            namespace: (!own).then(|| namespace.to_owned()),
            headers: entry.headers,
            capabilities: entry.capabilities,
            http,
        }))
    }

    /// The registry's own API. Certificates that are configured for a
    /// loopback registry say that it speaks TLS.
    fn own_root(&self, namespace: &str, tls: bool) -> Result<Url, String> {
        let plain = is_plain(namespace, &self.config) && !(tls && is_loopback(namespace));
        let scheme = if plain { "http" } else { "https" };
        let address = match namespace {
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            other => other,
        };
        Url::parse(&format!("{scheme}://{address}/v2"))
            .map_err(|error| format!("'{namespace}' is no host name ({error})"))
    }
}

/// The entries of a directory: its file's, or those that certificates in the
/// manner of Docker make.
fn entries(file: &Path, directory: &Path) -> Result<Vec<Entry>, String> {
    let cannot = |path: &Path, error: io::Error| format!("cannot read {}: {error}", path.display());
    let text = match fs::metadata(file) {
        Ok(metadata) if metadata.len() > MAX_FILE => {
            let path = file.display();
            return Err(format!(
                "{path} is larger than {MAX_FILE} bytes; shorten it"
            ));
        }
        Ok(_) => fs::read_to_string(file).map_err(|error| cannot(file, error))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(cannot(file, error)),
    };
    if !text.is_empty() {
        return file::parse(&text, file).map_err(|invalid| invalid.to_string());
    }
    let mut own = Entry::own();
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(|error| cannot(directory, error))? {
        found.push(entry.map_err(|error| cannot(directory, error))?.path());
    }
    found.sort();
    for path in found {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => own.ca.push(path),
            Some("cert") => {
                let key = Some(path.with_extension("key")).filter(|key| key.exists());
                own.client.push(ClientPair {
                    certificate: path,
                    key,
                });
            }
            _ => {}
        }
    }
    Ok(vec![own])
}

fn stamp(path: &Path) -> Stamp {
    let metadata = fs::metadata(path).ok()?;
    Some((
        metadata.ino(),
        metadata.len(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    ))
}

/// Host and port of a URL as references write them.
pub(crate) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// How long a host is left alone after its `failures`th failure in a row.
pub(crate) fn rest(first: Duration, longest: Duration, failures: u32) -> Duration {
    let doubled = first.saturating_mul(1 << failures.saturating_sub(1).min(20));
    doubled.min(longest)
}

#[cfg(test)]
mod tests;
