//! containerd's images, which say what is meant by a snapshot, and its
//! containers, which say what is run.

mod callers;
mod client;
mod containers;
mod documents;
mod known;
mod process;

use std::error::Error as StdError;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use rustix::process::Pid;
use tokio::time::Instant;
use tonic::Status;

use crate::service::{ImagesAnswer, Metadata, NamedImage, Program};
use callers::{Callers, NotFound};
use client::Containerd;

/// Where it is if the configuration does not say, and it is not who calls.
pub const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";

/// How long it is asked again when it does not answer.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(100);

type Failed = Box<dyn StdError + Send + Sync>;

/// The containerds that use this snapshotter.
#[derive(Debug)]
pub struct Containerds {
    /// The one at the address that is configured, or at the default one.
    told: Arc<Containerd>,
    /// Whether it is the only one, and has to be there.
    configured: bool,
    callers: Callers,
    warned: AtomicBool,
}

impl Containerds {
    /// The one at `address`; or whoever calls, or else the one at
    /// [`DEFAULT_ADDRESS`], if it is there.
    pub fn new(address: Option<PathBuf>) -> Self {
        Self {
            configured: address.is_some(),
            told: Arc::new(Containerd::at(
                address.unwrap_or_else(|| DEFAULT_ADDRESS.into()),
            )),
            callers: Callers::default(),
            warned: AtomicBool::new(false),
        }
    }

    /// The one that is to be asked for what `caller` has, if there is any.
    async fn of(&self, caller: Option<Pid>) -> Result<Option<Arc<Containerd>>, Failed> {
        if self.configured {
            return Ok(Some(Arc::clone(&self.told)));
        }
        let why = match self.callers.find(caller).await {
            Ok(containerd) => return Ok(Some(containerd)),
            Err(NotFound::Unclear(why)) => return Err(why),
            Err(NotFound::Nobody(why)) => why,
        };
        let there = self.told.address().exists();
        if !self.warned.swap(true, Ordering::Relaxed) {
            self.warn(&why, there);
        }
        Ok(there.then(|| Arc::clone(&self.told)))
    }

    async fn ask(
        &self,
        caller: Option<Pid>,
        namespace: &str,
    ) -> Result<Option<Vec<NamedImage>>, Failed> {
        let Some(containerd) = self.of(caller).await? else {
            return Ok(None);
        };
        let images = containerd.images(namespace).await;
        let images = images.map_err(|why| format!("{containerd}: {}", causes(why.as_ref())))?;
        Ok(Some(images))
    }

    fn warn(&self, why: &str, there: bool) {
        let address = self.told.address().display();
        let instead = match there {
            true => format!("the one at {address} is asked what images say of layers"),
            false => format!(
                "there is none at {address} either: what an image says of a layer that is not \
                 downloaded yet is not compared with what other images say"
            ),
        };
        tracing::warn!(
            "who asks for a snapshot is not found to be a containerd: {why}; {instead}; set \
             `address` in section [containerd] of the configuration to the socket of the \
             containerd that uses this snapshotter"
        );
    }
}

impl Metadata for Containerds {
    fn images<'a>(
        &'a self,
        caller: Option<Pid>,
        namespace: &'a str,
    ) -> BoxFuture<'a, ImagesAnswer> {
        Box::pin(async move {
            let mut why: Failed = match self.configured {
                true => format!("{}: it does not answer", self.told).into(),
                false => "the containerd that asks for it does not answer".into(),
            };
            let asked = async {
                let mut pause = PAUSE;
                loop {
                    match self.ask(caller, namespace).await {
                        Ok(images) => break images,
                        Err(error) => why = error,
                    }
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
            };
            let since = Instant::now();
            let images = tokio::time::timeout(PATIENCE, asked).await;
            let took = since.elapsed();
            tracing::debug!(namespace, ?took, "containerd's images were asked");
            images.map_err(|_| {
                format!(
                    "{why}; check that `address` in section [containerd] of the configuration \
                     names the socket of the containerd that uses this snapshotter, and try again"
                )
                .into()
            })
        })
    }

    fn program<'a>(
        &'a self,
        caller: Option<Pid>,
        namespace: &'a str,
        container: &'a str,
    ) -> BoxFuture<'a, Option<Program>> {
        Box::pin(async move {
            let asked = async {
                match self.of(caller).await? {
                    Some(containerd) => containerd.program(namespace, container).await,
                    None => Ok(None),
                }
            };
            let failed = |why: &Failed| {
                tracing::debug!(container, "what it runs: {}", causes(why.as_ref()));
            };
            // It comes in time or is of no use.
            let answer = tokio::time::timeout(PATIENCE, asked).await.ok()?;
            answer.inspect_err(failed).ok().flatten()
        })
    }
}

/// An error with what caused it, in one line.
fn causes(error: &(dyn StdError + 'static)) -> String {
    if let Some(status) = error.downcast_ref::<Status>() {
        return status.message().to_owned();
    }
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn nobody_is_asked_by_default_and_somebody_has_to_answer_if_configured() {
        let root = tempfile::tempdir().unwrap();
        let address = root.path().join("containerd.sock");
        let nobody = Containerds {
            configured: false,
            ..Containerds::new(Some(address.clone()))
        };
        // As from another namespace of processes.
        let images = nobody.images(None, "default").await;
        assert!(images.unwrap().is_none());
        let somebody = Containerds::new(Some(address.clone()));
        let error = somebody.images(None, "default").await.unwrap_err();
        let error = error.to_string();
        let parts = [address.to_str().unwrap(), "[containerd]", "No such file"];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}
