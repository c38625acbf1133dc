//! A layer that a former process had mounted and whose directory is damaged:
//! its readers wait while it is mended.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::Node;
use crate::erofs::Image;
use crate::fuse::{Content, Tree};
use crate::layer_dir::Identity;

/// Between attempts; it doubles.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What there is of the layer.
#[derive(Clone)]
enum State {
    Damaged,
    Mended(Arc<dyn Content>),
    Lost,
}

/// Content that is not there yet.
struct Pending {
    size: u64,
    deadline: Duration,
    state: watch::Receiver<State>,
}

impl Content for Pending {
    fn size(&self) -> u64 {
        self.size
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        match &*self.state.borrow() {
            State::Mended(content) => content.try_read(offset, buffer),
            State::Damaged | State::Lost => Ok(false),
        }
    }

    fn read_missing(
        self: Arc<Self>,
        offset: u64,
        len: usize,
    ) -> BoxFuture<'static, io::Result<Vec<u8>>> {
        Box::pin(async move {
            let mut state = self.state.clone();
            let decided = async {
                let decided = state.wait_for(|state| !matches!(state, State::Damaged));
                decided.await.map(|state| state.clone())
            };
            match tokio::time::timeout(self.deadline, decided).await {
                Ok(Ok(State::Mended(content))) => {
                    let mut buffer = vec![0; len];
                    match content.try_read(offset, &mut buffer)? {
                        true => Ok(buffer),
                        false => content.read_missing(offset, len).await,
                    }
                }
                _ => Err(io::Error::from_raw_os_error(libc::EIO)),
            }
        })
    }
}

impl Node {
    /// Mends the layer in the background, and serves it again where it was.
    pub(super) fn revive(&self, identity: Identity, mounted: Option<PathBuf>, tree: bool) {
        let (state, pending) = watch::channel(State::Damaged);
        let pending: Arc<dyn Content> = Arc::new(Pending {
            size: identity.data_size,
            deadline: self.0.config.fetch.deadline,
            state: pending,
        });
        self.0.blobs.insert(identity.number, Arc::clone(&pending));
        let meta = self
            .layer_path(identity.digest)
            .join(crate::layer_dir::META);
        let trees = &self.0.trees;
        let mut expectation = None;
        if tree {
            match Image::open(&meta) {
                Ok(image) => trees.insert(identity.number, Tree::new(image, pending)),
                Err(_) => {
                    let deadline = self.0.config.fetch.deadline;
                    expectation = Some(trees.expect(identity.number, deadline));
                }
            }
        }
        let node = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            let _expectation = expectation;
            let digest = identity.digest;
            let mut pause = PAUSE;
            loop {
                let Some(node) = node.upgrade() else { return };
                match Self(node)
                    .revive_now(&identity, mounted.clone(), tree)
                    .await
                {
                    Ok(content) => {
                        let revived = content.is_some();
                        if !revived {
                            tracing::error!(
                                layer = %digest,
                                "its directory is lost: its readers get errors until their \
                                 containers are started again"
                            );
                        }
                        state.send_replace(content.map_or(State::Lost, State::Mended));
                        return;
                    }
                    Err(error) => tracing::warn!(layer = %digest, "its readers wait: {error}"),
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        });
    }

    async fn revive_now(
        &self,
        identity: &Identity,
        mounted: Option<PathBuf>,
        tree: bool,
    ) -> Result<Option<Arc<dyn Content>>, String> {
        let slot = self.slot(identity.digest);
        let mut place = slot.0.lock().await;
        if place.is_none() {
            *place = self.load(identity.digest).await?;
        }
        let Some(open) = place.as_mut() else {
            self.0.blobs.remove(identity.number);
            self.0.trees.remove(identity.number);
            return Ok(None);
        };
        if tree {
            self.show_tree(&open.layer)
                .await
                .map_err(|error| error.to_string())?;
        }
        self.resume_mount(open, mounted);
        Ok(Some(Arc::clone(&open.layer) as Arc<dyn Content>))
    }
}
