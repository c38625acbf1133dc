//! One containerd, and what its images say.

use std::collections::HashSet;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_client::Client;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{GetContainerRequest, ListImagesRequest, ReadContentRequest};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use parking_lot::Mutex;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::documents::Document;
use super::known::{Age, Known};
use super::process::{self, Process};
use super::{Failed, containers};
use crate::service::{NamedImage, NamedLayers, Program};

/// Images read at once.
const AT_ONCE: usize = 8;
/// Bytes of a manifest, an index or a configuration. Registries take no
/// manifests above 4 MiB.
const LARGEST: usize = 8 << 20;
/// Manifests, indexes and configurations of one image, all platforms together.
const MOST_DOCUMENTS: usize = 1000;
/// Bytes of a list of images: containerd sends no longer answers.
const LONGEST_LIST: usize = 16 << 20;

/// A containerd, asked by its socket when there is something to ask.
pub(super) struct Containerd {
    address: PathBuf,
    /// Who listens there, if it was found and not told, and its socket.
    found: Option<(Process, OwnedFd)>,
    client: tokio::sync::Mutex<Option<Arc<Client>>>,
    known: Mutex<Known>,
}

impl fmt::Debug for Containerd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Containerd")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Containerd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "containerd at {}", self.address.display())?;
        match &self.found {
            Some((process, _)) => write!(f, " (process {})", process.pid()),
            None => Ok(()),
        }
    }
}

impl Containerd {
    /// The one at `address`, whichever process it is.
    pub(super) fn at(address: PathBuf) -> Self {
        Self {
            address,
            found: None,
            client: tokio::sync::Mutex::default(),
            known: Mutex::default(),
        }
    }

    /// The one that `process` is, if that listens at `socket`, which it sees at
    /// `address`.
    pub(super) fn of(process: Process, address: PathBuf, socket: OwnedFd) -> Self {
        Self {
            found: Some((process, socket)),
            ..Self::at(address)
        }
    }

    /// Where it is, as it sees that itself.
    pub(super) fn address(&self) -> &Path {
        &self.address
    }

    /// Whether it is a containerd at all, and says so.
    pub(super) async fn version(&self) -> Result<String, Failed> {
        let answer = self.client().await?.version().version(()).await?;
        Ok(answer.into_inner().version)
    }

    async fn client(&self) -> Result<Arc<Client>, Failed> {
        let mut place = self.client.lock().await;
        if let Some(client) = &*place {
            return Ok(Arc::clone(client));
        }
        let path = match &self.found {
            Some((_, socket)) => process::reached_by(socket),
            None => self.address.clone(),
        };
        let client = Arc::new(Client::from_path(path).await?);
        *place = Some(Arc::clone(&client));
        Ok(client)
    }

    /// What those of a namespace say of their layers.
    pub(super) async fn images(&self, namespace: &str) -> Result<Vec<NamedImage>, Failed> {
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

    /// What a container of a namespace runs; none if there is no such container,
    /// or it does not say.
    pub(super) async fn program(
        &self,
        namespace: &str,
        container: &str,
    ) -> Result<Option<Program>, Failed> {
        let request = GetContainerRequest {
            id: container.to_owned(),
        };
        let request = in_namespace(request, namespace.parse()?);
        let answer = match self.client().await?.containers().get(request).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => return missing(status, None),
        };
        let specification = answer.container.and_then(|container| container.spec);
        Ok(specification.and_then(|any| containers::program(&any.value)))
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
        in_namespace(message, self.namespace.clone())
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
                    Read::Bytes(bytes) => {
                        named.layers.extend(document.layers(&bytes));
                    }
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
            Err(status) => return missing(status, Read::Missing),
        };
        loop {
            match stream.message().await {
                Ok(Some(message)) => bytes.extend_from_slice(&message.data),
                Ok(None) => return Ok(Read::Bytes(bytes)),
                // The first message tells that there is no such content.
                Err(status) => return missing(status, Read::Missing),
            }
            if bytes.len() > LARGEST {
                return Ok(Read::TooLarge);
            }
        }
    }
}

fn in_namespace<T>(message: T, namespace: AsciiMetadataValue) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("containerd-namespace", namespace);
    request
}

/// That, if there is nothing of such a name.
fn missing<T>(status: Status, nothing: T) -> Result<T, Failed> {
    match status.code() {
        // What is no name at all names nothing either.
        Code::NotFound | Code::InvalidArgument => Ok(nothing),
        _ => Err(status.into()),
    }
}
