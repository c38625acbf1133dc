//! What a caller can set.

use std::path::PathBuf;
use std::time::Duration;

/// Settings of a [`Client`](crate::Client). The default is anonymous access
/// over TLS, and plain HTTP to loopback hosts.
#[derive(Debug, Clone)]
pub struct Config {
    /// Registries (`host` or `host:port`, as in a reference) that are reached
    /// by plain HTTP. Loopback hosts always are.
    pub plain_http: Vec<String>,
    /// Docker configuration files with credentials, the first that has some
    /// for the registry wins. They are read when a registry asks for
    /// authentication, so rotated credentials are seen without a restart.
    pub docker_configs: Vec<PathBuf>,
    /// Directories with a directory a registry that holds its `hosts.toml`,
    /// as containerd's `config_path` names them. The first that has one for a
    /// registry counts, also if that is its `_default`.
    pub hosts_dirs: Vec<PathBuf>,
    /// PEM files with certificate authorities to trust beside the system's.
    pub ca_certificates: Vec<PathBuf>,
    /// How often and how long a failed request is tried again.
    pub retry: RetryPolicy,
    /// Bound on resolving, connecting and the TLS handshake together.
    pub connect_timeout: Duration,
    /// A response, or a body, that gives nothing for this long has stalled.
    pub stall_timeout: Duration,
    /// How long the target of a blob's redirect is used without asking the
    /// registry again.
    pub redirect_ttl: Duration,
    /// The User-Agent header.
    pub user_agent: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            plain_http: Vec::new(),
            docker_configs: Vec::new(),
            hosts_dirs: Vec::new(),
            ca_certificates: Vec::new(),
            retry: RetryPolicy::default(),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(20),
            // Signed URLs live 10 to 20 minutes; an expired one costs one
            // request, because its refusal sends us back to the registry.
            redirect_ttl: Duration::from_secs(8 * 60),
            user_agent: concat!("sluice/", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// Exponential back-off with jitter, bounded in attempts and in time.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Tries in all, the first included; at least one is made.
    pub attempts: u32,
    /// Pause after the first failure; doubles from there.
    pub base_delay: Duration,
    /// Longest pause, unless the registry asks for more by `Retry-After`.
    pub max_delay: Duration,
    /// No try starts later than this after the first one did. A body that
    /// makes progress starts anew.
    pub deadline: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 5,
            base_delay: Duration::from_millis(250),
            max_delay: Duration::from_secs(10),
            deadline: Duration::from_secs(120),
        }
    }
}
