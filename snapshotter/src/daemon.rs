//! The composition root: what the daemon is made of, in the order in which it
//! comes up, and taken down in the opposite one.

use std::collections::HashSet;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sluice_oci::Digest;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;

use crate::config::Config;
use crate::notify::Notifier;
use crate::service::{
    self, LayerRequest, LazyLayers, MountError, NotLazy, OverlayOptions, Snapshots, Store, Usage,
};
use crate::socket::{self, Root, Socket};

/// How long calls that are under way may take to finish when the daemon stops.
const DRAIN: Duration = Duration::from_secs(10);

/// How long a client may take to let go of its connection after that. One that
/// hangs is no reason to be killed by the service manager.
const LET_GO: Duration = Duration::from_secs(1);

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The root directory or the socket.
    #[error(transparent)]
    Place(#[from] socket::Error),
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

/// Runs the daemon until `stop` completes.
pub async fn run(
    config: Config,
    notifier: Notifier,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let root = Root::take(&config.root)?;
    let (socket, listener) = Socket::bind(&config.address)?;
    // Before anything is written: this refuses a root of a newer version.
    let store = Store::open(root.path())?;
    let overlay = OverlayOptions::probe();
    let layers = Arc::new(NoLayers);
    let snapshots = Snapshots::start(root.path(), store, layers, overlay).await?;
    let snapshots = Arc::new(snapshots);

    let served = serve(&config, Arc::clone(&snapshots), listener, &notifier, stop).await;

    snapshots.close().await;
    drop(socket);
    drop(root);
    served?;
    tracing::info!("stopped");
    Ok(())
}

async fn serve<L: LazyLayers>(
    config: &Config,
    snapshots: Arc<Snapshots<L>>,
    listener: std::os::unix::net::UnixListener,
    notifier: &Notifier,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
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
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            let _ = drained.await;
        });
    tokio::pin!(server);
    notifier.ready();
    tracing::info!(
        address = %config.address.display(),
        root = %config.root.display(),
        "serving"
    );
    tokio::select! {
        ended = &mut server => return ended.map_err(|error| failed(error.into())),
        () = stop => {}
    }
    tracing::info!("stopping");
    notifier.stopping();
    let _ = drain.send(());
    calls.close();
    tokio::select! {
        ended = &mut server => return ended.map_err(|error| failed(error.into())),
        () = calls.wait() => {}
        () = tokio::time::sleep(DRAIN) => {
            tracing::warn!("some calls did not finish in {DRAIN:?} and are broken off");
        }
    }
    match tokio::time::timeout(LET_GO, server).await {
        Ok(ended) => ended.map_err(|error| failed(error.into())),
        Err(_) => Ok(()),
    }
}

/// A node on which every layer is unpacked.
#[derive(Debug)]
struct NoLayers;

impl LazyLayers for NoLayers {
    async fn open(&self, request: LayerRequest) -> Result<(), NotLazy> {
        Err(NotLazy::new(
            request.digest,
            "this node mounts no layers lazily",
        ))
    }

    async fn mount(&self, layer: Digest) -> Result<PathBuf, MountError> {
        Err(MountError::Unknown(layer))
    }

    async fn remove(&self, _: Digest) -> Result<(), MountError> {
        Ok(())
    }

    async fn usage(&self, layer: Digest) -> Result<Usage, MountError> {
        Err(MountError::Unknown(layer))
    }

    async fn retain(&self, _: HashSet<Digest>) -> Result<(), MountError> {
        Ok(())
    }
}
