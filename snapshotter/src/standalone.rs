//! A whole image, mounted read-only without containerd.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use futures_util::future::try_join_all;
use rustix::mount::{MountFlags, UnmountFlags};
use sluice_oci::{Descriptor, Reference};
use sluice_registry::Client;
use tempfile::TempDir;

use crate::mount;
use crate::node::{self, Node};
use crate::service::{LayerRequest, LazyLayers, MountError, NotLazy, OverlayOptions};
use crate::socket::{self, Root};

/// Where caches go that nobody named a place for: on a disk, unlike `/tmp`.
const CACHES: &str = "/var/tmp";

/// Bytes of options that mount(2) takes.
const PAGE: usize = 4096;

/// What to mount, where and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The directory that will show the image.
    pub target: PathBuf,
    /// Where layers are kept, also for the next time. Without one, a new
    /// directory that goes with the mount.
    pub root: Option<PathBuf>,
    /// How layers are mounted; none asks the kernel what it can do.
    pub mode: Option<node::Mode>,
}

/// Why an image is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The mount point is no directory.
    #[error("cannot mount on {}: {source}", path.display())]
    Target {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The place for layers.
    #[error(transparent)]
    Root(#[from] socket::Error),
    /// No temporary directory.
    #[error("cannot make a directory in {CACHES}: {0}")]
    Cache(#[source] io::Error),
    /// The node does not start.
    #[error(transparent)]
    Node(#[from] node::StartError),
    /// A layer cannot be mounted without being downloaded.
    #[error(transparent)]
    NotLazy(#[from] NotLazy),
    /// A layer cannot be mounted.
    #[error(transparent)]
    Layer(#[from] MountError),
    /// An image without layers.
    #[error("the image has no layers")]
    Empty,
    /// The layers' directories do not fit into the mount options.
    #[error(
        "the image has {layers} layers, and their directories do not fit into one page of mount \
         options; give a shorter --root"
    )]
    TooMany {
        /// How many.
        layers: usize,
    },
    /// Overlayfs refused.
    #[error("cannot mount the image on {}: {source}", target.display())]
    Overlay {
        /// The mount point.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image cannot be unmounted.
    #[error(transparent)]
    Unmount(#[from] mount::Error),
}

/// A mounted image. To be ended by [`ImageMount::close`].
#[derive(Debug)]
pub struct ImageMount {
    target: PathBuf,
    place: Place,
}

/// Where layers are, and the node that serves them.
struct Place {
    node: Node,
    root: Root,
    /// Goes with this value, after the node has stopped.
    temporary: Option<TempDir>,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.root.fmt(f)
    }
}

impl ImageMount {
    /// Mounts the image whose manifest lists `layers`, lowest first. To be
    /// called within the runtime that serves it.
    pub async fn new(
        client: Client,
        reference: &Reference,
        layers: &[Descriptor],
        options: Options,
    ) -> Result<Self, Error> {
        if layers.is_empty() {
            return Err(Error::Empty);
        }
        let target = mount_point(&options.target)?;
        let place = Place::new(client, &options)?;
        match place.mount(reference, layers, &target).await {
            Ok(()) => Ok(Self { target, place }),
            Err(error) => {
                place.close().await;
                Err(error)
            }
        }
    }

    /// Where it is mounted.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Whether it is still mounted: somebody else may have unmounted it.
    pub fn is_mounted(&self) -> Result<bool, Error> {
        let mounts = mount::mounts_below(&self.target)?;
        Ok(mounts.iter().any(|mount| mount.target == self.target))
    }

    /// Unmounts it. False when something still uses it.
    pub fn unmount(&self) -> Result<bool, Error> {
        match rustix::mount::unmount(&self.target, UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(true),
            Err(rustix::io::Errno::BUSY) => Ok(false),
            Err(source) => Err(Error::Unmount(mount::Error::Unmount {
                target: self.target.clone(),
                source: source.into(),
            })),
        }
    }

    /// Takes it away even from those who use it, stops serving and deletes
    /// what was temporary.
    pub async fn close(self) -> Result<(), Error> {
        let detached = if self.unmount()? {
            Ok(())
        } else {
            mount::detach(&self.target)
        };
        self.place.close().await;
        Ok(detached?)
    }
}

impl Place {
    fn new(client: Client, options: &Options) -> Result<Self, Error> {
        let temporary = match options.root {
            Some(_) => None,
            None => Some(
                tempfile::Builder::new()
                    .prefix("sluice-")
                    .tempdir_in(CACHES)
                    .map_err(Error::Cache)?,
            ),
        };
        let path = options
            .root
            .as_deref()
            .or(temporary.as_ref().map(TempDir::path));
        let root = Root::take(path.unwrap_or(Path::new(CACHES)))?;
        let config = node::Config {
            mode: options.mode,
            // One looks at an image; what is not looked at stays where it is.
            background: None,
            ..node::Config::new(root.path())
        };
        Ok(Self {
            node: Node::start(config, client)?,
            root,
            temporary,
        })
    }

    async fn mount(
        &self,
        reference: &Reference,
        layers: &[Descriptor],
        target: &Path,
    ) -> Result<(), Error> {
        let directories = try_join_all(layers.iter().map(|layer| async move {
            self.node.open(request(reference, layer)).await?;
            Ok::<_, Error>(self.node.mount(layer.digest).await?)
        }))
        .await?;
        // Overlayfs wants two: a layer alone would show its whiteouts.
        let nothing = self.root.path().join("empty");
        fs::create_dir_all(&nothing).map_err(|source| Error::Target {
            path: nothing.clone(),
            source,
        })?;
        let top_first = directories.iter().rev().chain([&nothing]);
        overlay(top_first, layers.len(), target)
    }

    async fn close(self) {
        self.node.stop().await;
        drop(self.root);
        if let Some(temporary) = self.temporary {
            let path = temporary.path().to_owned();
            if let Err(error) = temporary.close() {
                tracing::warn!("{} stays: {error}", path.display());
            }
        }
    }
}

fn request(reference: &Reference, layer: &Descriptor) -> LayerRequest {
    LayerRequest {
        reference: reference.clone(),
        digest: layer.digest,
        manifest_digest: None,
        annotations: layer.annotations.clone(),
        image_layers: vec![layer.digest],
    }
}

/// The directory, with no symbolic link in its path: so it is found again
/// among the mounts.
fn mount_point(path: &Path) -> Result<PathBuf, Error> {
    let found = fs::canonicalize(path).and_then(|found| match found.is_dir() {
        true => Ok(found),
        false => Err(io::ErrorKind::NotADirectory.into()),
    });
    found.map_err(|source| Error::Target {
        path: path.to_owned(),
        source,
    })
}

fn overlay<'a>(
    top_first: impl Iterator<Item = &'a PathBuf>,
    layers: usize,
    target: &Path,
) -> Result<(), Error> {
    let mut options = b"lowerdir=".to_vec();
    for (index, directory) in top_first.enumerate() {
        if index > 0 {
            options.push(b':');
        }
        options.extend_from_slice(directory.as_os_str().as_bytes());
    }
    if OverlayOptions::probe().userxattr {
        options.extend_from_slice(b",userxattr");
    }
    if options.len() >= PAGE {
        return Err(Error::TooMany { layers });
    }
    let failed = |source| Error::Overlay {
        target: target.to_owned(),
        source,
    };
    let options = CString::new(options).map_err(|error| failed(error.into()))?;
    // Somebody else's image must not bring devices or setuid programs to this
    // machine's own name space.
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
    rustix::mount::mount("overlay", target, "overlay", flags, options.as_c_str())
        .map_err(|error| failed(error.into()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use sluice_oci::media_type;

    use super::*;
    use crate::sample::{Layout, Registry, Sample, SampleFile, noise};

    fn sample(name: &str, seed: u64) -> Sample {
        let file = |name: &str, seed| SampleFile {
            name: name.to_owned(),
            content: noise(seed, 10_000),
        };
        let files = vec![file(name, seed), file("both", seed + 1)];
        Sample::new(files, &Layout::default())
    }

    fn annotations(sample: &Sample) -> serde_json::Value {
        json!({"containerd.io/snapshot/stargz/toc.digest": sample.toc_digest.to_string()})
    }

    fn descriptor(sample: &Sample, annotations: serde_json::Value) -> Descriptor {
        Descriptor {
            annotations: serde_json::from_value(annotations).unwrap(),
            ..Descriptor::new(
                media_type::OCI_LAYER_GZIP,
                sample.digest(),
                sample.blob.len() as u64,
            )
        }
    }

    fn options(target: &Path, root: Option<&Path>) -> Options {
        Options {
            target: target.to_owned(),
            root: root.map(Path::to_owned),
            mode: None,
        }
    }

    fn client() -> Client {
        Client::new(sluice_registry::Config::default()).unwrap()
    }

    async fn read(path: PathBuf) -> io::Result<Vec<u8>> {
        tokio::task::spawn_blocking(move || fs::read(path))
            .await
            .unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_image_is_mounted_and_gone_without_a_trace() {
        let (low, high) = (sample("low", 1), sample("high", 11));
        let registry = Registry::serve(&[(&low, annotations(&low)), (&high, annotations(&high))]);
        let layers = [&low, &high].map(|s| descriptor(s, annotations(s)));
        let home = tempfile::tempdir().unwrap();
        let target = home.path().join("mnt");
        fs::create_dir(&target).unwrap();
        let options = options(&target, None);
        let image = ImageMount::new(client(), &registry.reference(), &layers, options)
            .await
            .unwrap();
        let cache = image.place.root.path().to_owned();
        assert!(image.is_mounted().unwrap());
        assert!(read(target.join("low")).await.unwrap() == noise(1, 10_000));
        assert!(read(target.join("both")).await.unwrap() == noise(12, 10_000));
        let refused = fs::write(target.join("new"), "x").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem);

        let held = fs::File::open(target.join("high")).unwrap();
        assert!(!image.unmount().unwrap(), "it is in use");
        drop(held);
        assert!(image.unmount().unwrap());
        assert!(!image.is_mounted().unwrap());
        image.close().await.unwrap();
        assert!(!cache.exists());
        assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_fetched_is_kept_in_a_named_root() {
        let only = sample("only", 1);
        let registry = Registry::serve(&[(&only, annotations(&only))]);
        let layers = [descriptor(&only, annotations(&only))];
        let home = tempfile::tempdir().unwrap();
        let (target, root) = (home.path().join("mnt"), home.path().join("root"));
        fs::create_dir(&target).unwrap();
        for round in 0..2 {
            registry.take_log();
            let options = options(&target, Some(&root));
            let image = ImageMount::new(client(), &registry.reference(), &layers, options)
                .await
                .unwrap();
            assert!(read(target.join("only")).await.unwrap() == noise(1, 10_000));
            image.close().await.unwrap();
            assert_eq!(registry.requests() > 0, round == 0);
        }
        assert!(mount::mounts_below(home.path()).unwrap().is_empty());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_layer_without_toc_is_named_with_the_remedy() {
        let (good, bad) = (sample("good", 1), sample("bad", 11));
        let registry = Registry::serve(&[(&good, annotations(&good)), (&bad, json!({}))]);
        let layers = [
            descriptor(&good, annotations(&good)),
            descriptor(&bad, json!({})),
        ];
        let home = tempfile::tempdir().unwrap();
        let error = ImageMount::new(
            client(),
            &registry.reference(),
            &layers,
            options(home.path(), Some(&home.path().join("root"))),
        )
        .await
        .unwrap_err()
        .to_string();
        let digest = bad.digest().to_string();
        assert!(
            error.contains(&digest) && error.contains("sluice convert"),
            "{error}"
        );
        assert!(mount::mounts_below(home.path()).unwrap().is_empty());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_mount_point_that_is_none_is_refused_first() {
        let only = sample("only", 1);
        let registry = Registry::serve(&[(&only, annotations(&only))]);
        let layers = [descriptor(&only, annotations(&only))];
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [&file, &home.path().join("none")] {
            let error = ImageMount::new(
                client(),
                &registry.reference(),
                &layers,
                options(path, None),
            )
            .await
            .unwrap_err()
            .to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
        assert_eq!(registry.requests(), 0);
    }
}
