//! The composition root: what the daemon is made of, in the order in which it
//! comes up, and taken down in the opposite one.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sluice_registry::Client;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tonic::transport::Server;

use crate::config::{Config, MountMode, Share};
use crate::containerd::Containerds;
use crate::control::{self, Control};
use crate::descriptors;
use crate::fetch;
use crate::keeper::Keeper;
use crate::node::{self, LazyFrom, Node};
use crate::scrub;
use crate::service::{self, Key, LazyLayers, OverlayOptions, Snapshots, Store};
use crate::socket::{self, Root, Socket};

/// How long calls that are under way may take to finish when the daemon stops.
const DRAIN: Duration = Duration::from_secs(10);

/// How long a client may take to let go of its connection after that. One that
/// hangs is no reason to be killed by the service manager.
const LET_GO: Duration = Duration::from_secs(1);

/// How often it is looked whether the layers take more of the disk than they
/// may.
const ROOM: Duration = Duration::from_secs(10);

/// How long a layer that was opened before it was asked for is kept for that: a
/// client may have to download the layers below.
const UNCLAIMED: Duration = Duration::from_secs(600);

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The root directory or the socket.
    #[error(transparent)]
    Place(#[from] socket::Error),
    /// The client for registries.
    #[error(transparent)]
    Registry(#[from] sluice_registry::Error),
    /// The lazily mounted layers.
    #[error(transparent)]
    Node(#[from] node::StartError),
    /// The snapshots or their database.
    #[error(transparent)]
    Service(#[from] service::Error),
    /// The socket stopped working.
    #[error("cannot serve on {}: {source}", address.display())]
    Serve {
        /// The socket.
        address: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// How the daemon is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Another process goes on with the mounts, if somebody keeps them.
    HandOver,
    /// For good: what is not in use is unmounted.
    End,
}

/// Runs the daemon until `stop` completes.
pub async fn run(
    config: Config,
    keeper: Arc<Keeper>,
    stop: impl Future<Output = Stop> + Send,
) -> Result<(), Error> {
    let descriptors = descriptors::raise_limit();
    let root = Root::take(&config.root)?;
    crash_point!("start.root-taken");
    let (socket, listener) = Socket::bind(&config.address)?;
    // Before anything is written: this refuses a root of a newer version.
    let store = Store::open(root.path())?;
    crash_point!("start.database-opened");
    let client = Client::new(registry_config(&config))?;
    let node_config = node::Config {
        keeper: Arc::clone(&keeper),
        ..node_config(&config, root.path())
    };
    let node = Node::start(node_config, client)?;
    let mode = match node.mode() {
        node::Mode::Erofs => "erofs",
        node::Mode::Fuse => "fuse",
    };
    tracing::info!(mode, descriptors, "layers can be mounted");
    let result = serve_node(&config, &root, store, &node, listener, &keeper, stop).await;
    match result {
        Ok(Stop::End) => node.stop().await,
        // What went wrong here may go right in the next process.
        Ok(Stop::HandOver) | Err(_) => node.leave().await,
    }
    drop(socket);
    result?;
    tracing::info!("stopped");
    Ok(())
}

async fn serve_node(
    config: &Config,
    root: &Root,
    store: Store,
    node: &Node,
    listener: std::os::unix::net::UnixListener,
    keeper: &Keeper,
    stop: impl Future<Output = Stop> + Send,
) -> Result<Stop, Error> {
    let overlay = OverlayOptions::probe();
    let layers = Arc::new(node.clone());
    let snapshots = Snapshots::start(root.path(), store, layers, overlay).await?;
    let metadata = Arc::new(Containerds::new(config.containerd.address.clone()));
    let snapshots = Arc::new(snapshots.with_metadata(metadata));
    tell_who_is_affected(node, &snapshots).await;
    let again = node.clone();
    tokio::spawn(async move { again.mount_lost().await });
    let _room = AbortOnDropHandle::new(tokio::spawn(keep_room(Arc::clone(&snapshots))));
    let watched = Arc::clone(&snapshots);
    let _claims = AbortOnDropHandle::new(tokio::spawn(async move { watched.watch_claims().await }));
    let timer = node.clone();
    let interval = Duration::from_secs(config.scrub.interval_hours.saturating_mul(3600));
    let _scrub = AbortOnDropHandle::new(tokio::spawn(async move {
        if !interval.is_zero() {
            timer.scrub_every(interval).await;
        }
    }));
    let control = Control::new(Arc::clone(&snapshots), node.clone());
    let services = (Arc::clone(&snapshots), control, Arc::new(node.clone()));
    let served = serve(config, services, listener, keeper, stop).await;
    crash_point!("stop.drained");
    snapshots.close().await;
    crash_point!("stop.closed");
    served
}

/// Says which containers stand on mounts that nobody can serve any more.
async fn tell_who_is_affected<L: LazyLayers>(node: &Node, snapshots: &Snapshots<L>) {
    for overlay in node.affected() {
        let key = match &overlay.upper {
            Some(upper) => snapshots.key_of(upper).await,
            None => None,
        };
        // containerd's key of a container's snapshot is the container's id.
        let whose = key.as_ref().map(Key::in_containerd);
        let (owner, container) = match whose {
            Some((Some(namespace), name)) => (
                format!(" of container {name} in namespace {namespace}"),
                "it".to_owned(),
            ),
            Some((None, name)) => (format!(" of snapshot {name}"), "its container".to_owned()),
            None => (String::new(), "its container".to_owned()),
        };
        tracing::error!(
            "the mount at {}{owner} stands on layers that a former process served and whose FUSE \
             device was not kept: reads of what is not cached fail there; start {container} again",
            overlay.target.display()
        );
    }
}

/// Keeps the layers within their quota, and removes those that were opened for
/// nobody.
async fn keep_room<L: LazyLayers>(snapshots: Arc<Snapshots<L>>) {
    loop {
        snapshots.release_unclaimed(UNCLAIMED).await;
        snapshots.make_room().await;
        tokio::time::sleep(ROOM).await;
    }
}

async fn serve(
    config: &Config,
    (snapshots, control, scrubber): (Arc<Snapshots<Node>>, Control, Arc<Node>),
    listener: std::os::unix::net::UnixListener,
    keeper: &Keeper,
    stop: impl Future<Output = Stop> + Send,
) -> Result<Stop, Error> {
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Serve {
        address: config.address.clone(),
        source,
    };
    listener
        .set_nonblocking(true)
        .map_err(|error| failed(error.into()))?;
    let listener = UnixListener::from_std(listener).map_err(|error| failed(error.into()))?;
    let calls = TaskTracker::new();
    let (drain, drained) = tokio::sync::oneshot::channel::<()>();
    let server = Server::builder()
        .add_service(service::server(snapshots, calls.clone()))
        .add_service(control::server(control))
        .add_service(scrub::server(scrubber))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            let _ = drained.await;
        });
    tokio::pin!(server);
    crash_point!("start.ready");
    keeper.ready();
    tracing::info!(
        address = %config.address.display(),
        root = %config.root.display(),
        "serving"
    );
    let stop = tokio::select! {
        // A server that ends by itself leaves the rest to the next process.
        ended = &mut server => {
            return ended.map(|()| Stop::HandOver).map_err(|error| failed(error.into()));
        }
        stop = stop => stop,
    };
    tracing::info!("stopping");
    keeper.stopping();
    crash_point!("stop.begun");
    let _ = drain.send(());
    calls.close();
    tokio::select! {
        ended = &mut server => {
            return ended.map(|()| stop).map_err(|error| failed(error.into()));
        }
        () = calls.wait() => {}
        () = tokio::time::sleep(DRAIN) => {
            tracing::warn!("some calls did not finish in {DRAIN:?} and are broken off");
        }
    }
    match tokio::time::timeout(LET_GO, server).await {
        Ok(ended) => ended.map(|()| stop).map_err(|error| failed(error.into())),
        Err(_) => Ok(stop),
    }
}

fn node_config(config: &Config, root: &Path) -> node::Config {
    node::Config {
        mode: match config.mount.mode {
            MountMode::Auto => None,
            MountMode::Erofs => Some(node::Mode::Erofs),
            MountMode::Fuse => Some(node::Mode::Fuse),
        },
        fetch: fetch::Config {
            memory: mebibytes(config.fetch.memory_mib.get()),
            connections: config.fetch.connections.get(),
            read_ahead: mebibytes(config.fetch.read_ahead_mib),
            deadline: Duration::from_secs(config.fetch.deadline_seconds.get()),
            ..fetch::Config::default()
        },
        lazy_from: LazyFrom::new(config.mount.lazy_from.clone()),
        toc_memory: mebibytes(config.fetch.toc_memory_mib.get()),
        prefetch: config.prefetch.enabled,
        profiles: node::ProfileConfig {
            record: config.profiles.record,
            attached: config.profiles.attached,
            longest: Duration::from_secs(config.profiles.seconds.get()),
            idle: Duration::from_secs(config.profiles.idle_seconds.get()),
            images: config.profiles.images.get() as usize,
        },
        background: config
            .background
            .enabled
            .then(|| Duration::from_secs(config.background.delay_seconds)),
        quota: node::Quota {
            limit: (config.cache.limit_mib > 0).then(|| mebibytes(config.cache.limit_mib)),
            min_free: mebibytes(config.cache.min_free_mib),
        },
        sharing: match config.cache.share {
            Share::Repository => node::Sharing::Repository,
            Share::Registry => node::Sharing::Registry,
            Share::Node => node::Sharing::Node,
        },
        scrub_rate: mebibytes(config.scrub.mib_per_second.get()),
        ..node::Config::new(root)
    }
}

fn mebibytes(count: u64) -> u64 {
    count.saturating_mul(1 << 20)
}

fn registry_config(config: &Config) -> sluice_registry::Config {
    let patience = Duration::from_secs(config.fetch.deadline_seconds.get());
    let config = config.registry.clone();
    let default = sluice_registry::Config::default();
    sluice_registry::Config {
        // A dead host must leave a read time to ask others.
        connect_timeout: default.connect_timeout.min(patience / 4),
        stall_timeout: default.stall_timeout.min(patience / 4),
        hosts_dirs: config.hosts_dirs,
        plain_http: config.plain_http,
        docker_configs: config.docker_configs,
        ca_certificates: config.ca_certificates,
        ..default
    }
}
