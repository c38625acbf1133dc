//! The daemon's configuration file.
//!
//! Every key has a default and the file itself is optional. A key that does
//! not exist is refused: a misspelt one would otherwise be a default.
//! `systemd/config.toml` lists all of them.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Deserializer};

/// All that can be configured.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where snapshots, layers and the database are. Default `/var/lib/sluice`.
    pub root: PathBuf,
    /// The socket that containerd connects to. Default
    /// `/run/sluice/snapshotter.sock`.
    pub address: PathBuf,
    /// What is logged: `error`, `warn`, `info` (default), `debug` or `trace`,
    /// or a filter such as `warn,sluice_snapshotter=debug`.
    pub log_level: Option<String>,
    /// Where containerd is.
    pub containerd: Containerd,
    /// How registries are reached.
    pub registry: Registry,
    /// How layers are mounted.
    pub mount: Mount,
    /// How chunks are fetched.
    pub fetch: Fetch,
    /// Fetching what an image says it will need.
    pub prefetch: Prefetch,
    /// Recording what images read while they start.
    pub profiles: Profiles,
    /// Fetching the rest when nothing else is wanted.
    pub background: Background,
    /// How much may be kept.
    pub cache: Cache,
    /// Reading what is kept, to see whether it still is what it was.
    pub scrub: Scrub,
}

/// Section `[containerd]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Containerd {
    /// The socket of the containerd that uses this snapshotter. Default: that of
    /// the process that calls, or else `/run/containerd/containerd.sock`, if it
    /// is there.
    pub address: Option<PathBuf>,
}

/// Section `[registry]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Registry {
    /// Registries (`host` or `host:port`) that are reached by plain HTTP.
    /// Loopback hosts always are. Default: none.
    pub plain_http: Vec<String>,
    /// Docker configuration files with credentials, in the file as
    /// `docker_config`, one path or a list; the first that has some for the
    /// registry wins. Default: `config.json` in `$DOCKER_CONFIG` or
    /// `~/.docker`, then the kubelet's `/var/lib/kubelet/config.json`.
    #[serde(rename = "docker_config", deserialize_with = "one_or_many")]
    pub docker_configs: Vec<PathBuf>,
    /// PEM files with certificate authorities to trust beside the system's.
    /// Default: none.
    pub ca_certificates: Vec<PathBuf>,
    /// Directories with containerd's `hosts.toml` files, in the file as
    /// `config_path`, one path, several separated by colons, or a list. The
    /// first that has a directory for a registry, or a `_default`, counts.
    /// Default: `/etc/containerd/certs.d`.
    #[serde(rename = "config_path", deserialize_with = "search_path")]
    pub hosts_dirs: Vec<PathBuf>,
}

/// Section `[mount]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mount {
    /// `auto` (default), `erofs` or `fuse`.
    pub mode: MountMode,
    /// Places from which images are mounted lazily: `host[:port]`, or that and
    /// the beginning of a repository. Default: none, which is all.
    pub lazy_from: Vec<String>,
}

/// How a layer becomes a directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountMode {
    /// `erofs` where the kernel can, otherwise `fuse`.
    #[default]
    Auto,
    /// The kernel's EROFS over one file of content a layer (Linux 6.12).
    Erofs,
    /// A tree that the daemon serves.
    Fuse,
}

/// Section `[fetch]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fetch {
    /// Memory for everything in flight, in MiB. Default 64.
    pub memory_mib: NonZeroU64,
    /// Memory for tables of contents that are being read, in MiB. Default 160,
    /// which is enough for a layer of some 280,000 files. One that needs more
    /// is unpacked.
    pub toc_memory_mib: NonZeroU64,
    /// Requests to registries at once. Default 32.
    pub connections: NonZeroU64,
    /// How far ahead of a reader is fetched at most, in MiB. Default 32; with
    /// 0, nothing is fetched but what is asked for.
    pub read_ahead_mib: u64,
    /// How long a read waits for a registry that does not deliver, in seconds,
    /// before it fails with EIO. Default 300.
    pub deadline_seconds: NonZeroU64,
}

/// Section `[prefetch]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Prefetch {
    /// Default true.
    pub enabled: bool,
}

/// Section `[profiles]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Profiles {
    /// Whether starts are recorded. Default true. Recorded profiles are used
    /// when `[prefetch]` is enabled.
    pub record: bool,
    /// Whether registries are asked for profiles that are attached to images.
    /// Default true; needs `[prefetch]` as well.
    pub attached: bool,
    /// How long a start is recorded at most. Default 120.
    pub seconds: NonZeroU64,
    /// A start is over when nothing new was read for so long, in seconds.
    /// Default 10.
    pub idle_seconds: NonZeroU64,
    /// Images whose profiles are kept; those least recently used go first.
    /// Default 256.
    pub images: NonZeroU64,
}

/// Section `[background]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Background {
    /// Default true. A node that is off the network later needs it.
    pub enabled: bool,
    /// How long after its mount the rest of a layer is fetched, in seconds.
    /// Default 10: the start of a container comes first.
    pub delay_seconds: u64,
}

/// Section `[cache]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cache {
    /// What lazily mounted layers may take on disk, in MiB, before content
    /// that nothing mounts is evicted. Default 0: any amount.
    pub limit_mib: u64,
    /// What is to stay free on their file system, in MiB, in the same way.
    /// Default 0.
    pub min_free_mib: u64,
    /// From which other layers chunks are taken that a layer lacks.
    pub share: Share,
}

/// How far chunks are shared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Share {
    /// Within a repository: from other versions of the image.
    #[default]
    Repository,
    /// Among all images of a registry.
    Registry,
    /// Among all images of the node. Whoever knows the digest of a chunk can
    /// then read it here, and whoever guesses it can find out whether it is.
    Node,
}

/// Section `[scrub]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Scrub {
    /// Hours between the end of one check of all layers and the next. Default
    /// 168, a week; 0 turns it off.
    pub interval_hours: u64,
    /// How fast it reads, in MiB a second. Default 50.
    pub mib_per_second: NonZeroU64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/sluice".into(),
            address: "/run/sluice/snapshotter.sock".into(),
            log_level: None,
            containerd: Containerd::default(),
            registry: Registry::default(),
            mount: Mount::default(),
            fetch: Fetch::default(),
            prefetch: Prefetch::default(),
            profiles: Profiles::default(),
            background: Background::default(),
            cache: Cache::default(),
            scrub: Scrub::default(),
        }
    }
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a path or a list of paths")]
    enum OneOrMany {
        One(PathBuf),
        Many(Vec<PathBuf>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(path) => vec![path],
        OneOrMany::Many(paths) => paths,
    })
}

/// As [`one_or_many`], and as containerd writes several: with colons.
fn search_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    let paths = one_or_many(deserializer)?;
    let split = paths.iter().flat_map(std::env::split_paths);
    Ok(split.filter(|path| !path.as_os_str().is_empty()).collect())
}

const fn nonzero(value: u64) -> NonZeroU64 {
    match NonZeroU64::new(value) {
        Some(value) => value,
        None => NonZeroU64::MIN,
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            plain_http: Vec::new(),
            docker_configs: Vec::new(),
            ca_certificates: Vec::new(),
            hosts_dirs: vec!["/etc/containerd/certs.d".into()],
        }
    }
}

impl Default for Fetch {
    fn default() -> Self {
        Self {
            memory_mib: nonzero(64),
            toc_memory_mib: nonzero(160),
            connections: nonzero(32),
            read_ahead_mib: 32,
            deadline_seconds: nonzero(300),
        }
    }
}

impl Default for Prefetch {
    fn default() -> Self {
        Self { enabled: true }
    }
}

impl Default for Profiles {
    fn default() -> Self {
        Self {
            record: true,
            attached: true,
            seconds: nonzero(120),
            idle_seconds: nonzero(10),
            images: nonzero(256),
        }
    }
}

impl Default for Background {
    fn default() -> Self {
        Self {
            enabled: true,
            delay_seconds: 10,
        }
    }
}

impl Default for Scrub {
    fn default() -> Self {
        Self {
            interval_hours: 168,
            mib_per_second: nonzero(50),
        }
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not valid.
    #[error("{}:{line}: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
}

impl Config {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Parses the text of the file `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start.min(text.len()));
            let before = text.as_bytes().iter().take(start);
            ConfigError::Invalid {
                path: path.to_owned(),
                line: 1 + before.filter(|byte| **byte == b'\n').count(),
                message: error.message().replace('\n', " "),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::DEFAULT_ADDRESS;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("c.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_is_the_default() {
        assert_eq!(parse("").unwrap(), Config::default());
        assert_eq!(parse("[fetch]\n[mount]\n").unwrap(), Config::default());
    }

    #[test]
    fn keys_are_read() {
        let config = parse(
            "root = '/r'\naddress = '/s'\nlog_level = 'debug'\n\
             [containerd]\naddress = '/c.sock'\n\
             [registry]\nplain_http = ['10.0.0.1:5000']\ndocker_config = '/d.json'\n\
             ca_certificates = ['/ca.pem']\nconfig_path = '/a:/b'\n\
             [mount]\nmode = 'fuse'\nlazy_from = ['r.io/team']\n\
             [fetch]\nmemory_mib = 32\nconnections = 4\nread_ahead_mib = 0\ndeadline_seconds = 9\n\
             [prefetch]\nenabled = false\n[profiles]\nrecord = false\nidle_seconds = 3\n\
             [background]\nenabled = false\n\
             [cache]\nlimit_mib = 7\nmin_free_mib = 8\n\
             [scrub]\ninterval_hours = 0\nmib_per_second = 9\n",
        )
        .unwrap();
        assert_eq!(config.root, Path::new("/r"));
        assert_eq!(config.registry.plain_http, ["10.0.0.1:5000"]);
        assert_eq!(config.containerd.address, Some("/c.sock".into()));
        let dirs = ["/a", "/b"].map(PathBuf::from);
        assert_eq!(config.registry.hosts_dirs, dirs);
        let listed = parse("[registry]\nconfig_path = ['/a', '/b']").unwrap();
        assert_eq!(listed.registry.hosts_dirs, dirs);
        let none = parse("[registry]\nconfig_path = ''").unwrap();
        assert!(none.registry.hosts_dirs.is_empty());
        assert_eq!(config.mount.mode, MountMode::Fuse);
        assert_eq!(config.mount.lazy_from, ["r.io/team"]);
        assert_eq!(config.fetch.deadline_seconds.get(), 9);
        assert!(!config.background.enabled && !config.profiles.record);
        assert_eq!(config.profiles.idle_seconds.get(), 3);
        assert_eq!((config.cache.limit_mib, config.cache.min_free_mib), (7, 8));
        assert_eq!(config.scrub.interval_hours, 0);
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, parts) in [
            ("\nrot = '/r'", ["c.toml:2:", "rot"]),
            ("[mount]\nmod = 'fuse'", ["c.toml:2:", "mod"]),
            ("[mont]", ["c.toml:1:", "mont"]),
            ("[mount]\n\nmode = 'loop'", ["c.toml:3:", "loop"]),
            ("[fetch]\nmemory_mib = 0", ["c.toml:2:", "nonzero"]),
            ("[fetch]\nmemory_mib = '1'", ["c.toml:2:", "string"]),
            ("root = ", ["c.toml:1:", ""]),
        ] {
            let error = parse(text).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    /// The sample names every key, and its values are the defaults.
    #[test]
    fn the_sample_is_the_default() {
        let sample = include_str!("../../systemd/config.toml");
        let set = |line: &str| {
            let (key, value) = line.strip_prefix("# ")?.split_once(" = ")?;
            let known = key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            (known && !value.is_empty()).then(|| line[2..].to_owned())
        };
        let text: String = sample
            .lines()
            .map(|line| set(line).unwrap_or_else(|| line.to_owned()) + "\n")
            .collect();
        let mut config = parse(&text).unwrap();
        assert_eq!(config.log_level.take().as_deref(), Some("info"));
        let containerd = config.containerd.address.take();
        assert_eq!(containerd, Some(DEFAULT_ADDRESS.into()));
        assert_eq!(config.registry.docker_configs.len(), 2);
        config.registry.docker_configs.clear();
        assert_eq!(config, Config::default());
        for key in [
            "root",
            "address",
            "log_level",
            "plain_http",
            "docker_config",
            "ca_certificates",
            "config_path",
            "mode",
            "lazy_from",
            "memory_mib",
            "toc_memory_mib",
            "connections",
            "read_ahead_mib",
            "deadline_seconds",
            "enabled",
            "delay_seconds",
            "limit_mib",
            "min_free_mib",
            "interval_hours",
            "mib_per_second",
            "record",
            "attached",
            "seconds",
            "idle_seconds",
            "images",
        ] {
            assert!(text.contains(&format!("\n{key} = ")), "{key}");
        }
    }
}
