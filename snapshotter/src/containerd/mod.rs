//! containerd's images, which say what is meant by a snapshot.

mod documents;
mod known;

use std::collections::HashSet;
use std::error::Error as StdError;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use containerd_client::Client;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{ListImagesRequest, ReadContentRequest};
use futures_util::future::BoxFuture;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::service::{Images, ImagesAnswer, NamedImage, NamedLayers};
use documents::Document;
use known::{Age, Known};

/// Where it is unless the configuration says otherwise.
pub const DEFAULT_ADDRESS: &str = "/run/containerd/containerd.sock";

/// How long it is asked again when it does not answer.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(100);
/// Images read at once.
const AT_ONCE: usize = 8;
/// Bytes of a manifest, an index or a configuration. Registries take no
/// manifests above 4 MiB.
const LARGEST: usize = 8 << 20;
/// Manifests, indexes and configurations of one image, all platforms together.
const MOST_DOCUMENTS: usize = 1000;
/// Bytes of a list of images: containerd sends no longer answers.
const LONGEST_LIST: usize = 16 << 20;

type Failed = Box<dyn StdError + Send + Sync>;

/// A containerd, asked by its socket when there is something to ask.
pub struct Containerd {
    address: PathBuf,
    /// Whether it has to be there.
    configured: bool,
    client: tokio::sync::Mutex<Option<Arc<Client>>>,
    known: Mutex<Known>,
    told: AtomicBool,
}

impl fmt::Debug for Containerd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Containerd")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Containerd {
    /// The one at `address`, or that at [`DEFAULT_ADDRESS`], if it is there.
    pub fn new(address: Option<PathBuf>) -> Self {
        Self {
            configured: address.is_some(),
            address: address.unwrap_or_else(|| DEFAULT_ADDRESS.into()),
            client: tokio::sync::Mutex::default(),
            known: Mutex::default(),
            told: AtomicBool::new(false),
        }
    }

    async fn client(&self) -> Result<Arc<Client>, Failed> {
        let mut place = self.client.lock().await;
        if let Some(client) = &*place {
            return Ok(Arc::clone(client));
        }
        let client = Arc::new(Client::from_path(&self.address).await?);
        *place = Some(Arc::clone(&client));
        Ok(client)
    }

    async fn ask(&self, namespace: &str) -> Result<Vec<NamedImage>, Failed> {
        let client = self.client().await?;
        let asking = Asking {
            content: client.content(),
            namespace: namespace.parse()?,
        };
        let mut images = client.images().max_decoding_message_size(LONGEST_LIST);
        let list = images.list(asking.request(ListImagesRequest::default()));
        let images = list.await?.into_inner().images;
        // Many names have one target.
        let mut targets: Vec<(String, String, Age)> = Vec::new();
        let mut seen = HashSet::new();
        for image in images {
            let target = image.target.unwrap_or_default().digest;
            let age = Age::from(image.updated_at);
            if seen.insert((target.clone(), age)) {
                targets.push((image.name, target, age));
            }
        }
        stream::iter(targets)
            .map(|(name, target, age)| self.named(&asking, name, target, age))
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
    }

    async fn named(
        &self,
        asking: &Asking,
        name: String,
        target: String,
        age: Age,
    ) -> Result<NamedImage, Failed> {
        let known = self.known.lock().get(&target, age);
        let named = match known {
            Some(named) => named,
            None => {
                let (named, whole) = asking.read_all(&target).await?;
                let named = Arc::new(named);
                self.known
                    .lock()
                    .insert(target, Arc::clone(&named), (!whole).then_some(age));
                named
            }
        };
        Ok(NamedImage { name, named })
    }
}

impl Images for Containerd {
    fn of_namespace<'a>(&'a self, namespace: &'a str) -> BoxFuture<'a, ImagesAnswer> {
        Box::pin(async move {
            if !self.configured && !self.address.exists() {
                if !self.told.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "there is no containerd at {}: what an image says of a layer that is not \
                         downloaded yet is not compared with what other images say; set `address` \
                         in section [containerd] of the configuration to the socket of the \
                         containerd that uses this snapshotter",
                        self.address.display()
                    );
                }
                return Ok(None);
            }
            let mut why: Failed = "it does not answer".into();
            let asked = async {
                let mut pause = PAUSE;
                loop {
                    match self.ask(namespace).await {
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
            images.map(Some).map_err(|_| {
                format!(
                    "containerd at {}: {}; check that `address` in section [containerd] of the \
                     configuration names the socket of the containerd that uses this snapshotter, \
                     and try again",
                    self.address.display(),
                    causes(why.as_ref())
                )
                .into()
            })
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

/// The content of one namespace.
struct Asking {
    content: ContentClient<Channel>,
    namespace: AsciiMetadataValue,
}

enum Read {
    Bytes(Vec<u8>),
    Missing,
    TooLarge,
}

impl Asking {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", self.namespace.clone());
        request
    }

    /// What the image at `target` says of its layers, on all platforms of which
    /// there is something; and whether nothing is missing.
    async fn read_all(&self, target: &str) -> Result<(NamedLayers, bool), Failed> {
        let mut named = NamedLayers::default();
        let mut whole = true;
        let mut seen = HashSet::from([target.to_owned()]);
        let mut next = vec![target.to_owned()];
        while let Some(digest) = next.pop() {
            let document = match self.read(&digest).await? {
                Read::Bytes(bytes) => Document::parse(&bytes),
                Read::Missing => {
                    whole = false;
                    continue;
                }
                Read::TooLarge => {
                    named.cut = true;
                    continue;
                }
            };
            if let Some(config) = &document.config {
                match self.read(&config.digest).await? {
                    Read::Bytes(bytes) => named.layers.extend(document.named(&bytes)),
                    Read::Missing => whole = false,
                    Read::TooLarge => named.cut = true,
                }
            }
            for child in document.manifests {
                if seen.len() >= MOST_DOCUMENTS {
                    named.cut = true;
                } else if seen.insert(child.digest.clone()) {
                    next.push(child.digest);
                }
            }
        }
        Ok((named, whole))
    }

    async fn read(&self, digest: &str) -> Result<Read, Failed> {
        let request = ReadContentRequest {
            digest: digest.to_owned(),
            ..ReadContentRequest::default()
        };
        let answer = self.content.clone().read(self.request(request)).await;
        let mut bytes = Vec::new();
        let mut stream = match answer {
            Ok(answer) => answer.into_inner(),
            Err(status) => return missing(status),
        };
        loop {
            match stream.message().await {
                Ok(Some(message)) => bytes.extend_from_slice(&message.data),
                Ok(None) => return Ok(Read::Bytes(bytes)),
                // The first message tells that there is no such content.
                Err(status) => return missing(status),
            }
            if bytes.len() > LARGEST {
                return Ok(Read::TooLarge);
            }
        }
    }
}

fn missing(status: Status) -> Result<Read, Failed> {
    match status.code() {
        // What is no digest at all names nothing either.
        Code::NotFound | Code::InvalidArgument => Ok(Read::Missing),
        _ => Err(status.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn nobody_is_asked_by_default_and_somebody_has_to_answer_if_configured() {
        let root = tempfile::tempdir().unwrap();
        let address = root.path().join("containerd.sock");
        let nobody = Containerd {
            configured: false,
            ..Containerd::new(Some(address.clone()))
        };
        assert!(nobody.of_namespace("default").await.unwrap().is_none());
        let somebody = Containerd::new(Some(address.clone()));
        let error = somebody.of_namespace("default").await.unwrap_err();
        let error = error.to_string();
        let parts = [address.to_str().unwrap(), "[containerd]", "No such file"];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}
