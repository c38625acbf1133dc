//! The tree seen through each mount mode is the tree that containerd's own
//! overlayfs unpacks from the image as it was before conversion: for eStargz
//! and zstd:chunked, ours and of other tools.

use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

use anyhow::{Context as _, Result, anyhow, ensure};
use sluice_tests::daemon::Mode;
use sluice_tests::image::{self, Image, MANY_FILES, SPARSE_SIZE};
use sluice_tests::node::{Node, snapshotter};
use sluice_tests::tools::{self, Target};
use sluice_tests::tree::{self, Summary, Times};

/// An image pushed and unpacked as usual.
struct Original {
    image: Image,
    name: &'static str,
    reference: String,
    unpacked: PathBuf,
}

struct World {
    node: Node,
    base: Original,
    odd: Original,
    synthetic: Original,
}

/// One node and one unpacked original of each image for the whole file.
fn world() -> Result<&'static World> {
    static WORLD: OnceLock<Result<World, String>> = OnceLock::new();
    let make = || -> Result<World> {
        let node = Node::start("")?;
        let original = |image: Image, name: &'static str| -> Result<Original> {
            let image_name = format!("{name}:original");
            let reference = node
                .registry
                .push(image.layout(), image::TAG, &image_name)?;
            node.containerd.pull(&reference, "overlayfs")?;
            let unpacked = node.containerd.mount(&reference, "overlayfs")?;
            Ok(Original {
                image,
                name,
                reference,
                unpacked,
            })
        };
        Ok(World {
            base: original(image::base()?, "base")?,
            odd: original(image::odd()?, "odd")?,
            synthetic: original(image::synthetic()?, "synthetic")?,
            node,
        })
    };
    WORLD
        .get_or_init(|| make().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("{error}"))
}

impl World {
    /// Compares an image with its original, in both modes.
    fn check(&self, original: &Original, reference: &str, times: Times) -> Result<()> {
        // Large trees one after the other: two cores, one disk.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().map_err(|_| anyhow!("another comparison failed"));
        // An image in another format may have the same chain IDs, and its
        // snapshots would be taken for this one's.
        let tag = reference.rsplit(':').next().unwrap_or_default();
        let containerd = self.node.containerd.in_namespace(tag);
        for mode in Mode::ALL {
            let about = || format!("{reference} in mode {}", mode.name());
            let mounted = self
                .node
                .mount_lazily_in(&containerd, reference, mode)
                .with_context(about)?;
            if original.name == "synthetic" {
                // The others are read on demand; here a request for each of
                // so many files would only take time.
                self.node.wait_until_complete(reference, mode)?;
            }
            let summary = tree::compare(&original.unpacked, &mounted, times).with_context(about)?;
            expect_content(original.name, &summary)?;
            containerd.unmount(&mounted)?;
            self.fsck(reference, mode).with_context(about)?;
        }
        Ok(())
    }

    /// erofs-utils must find nothing wrong with the layers' metadata.
    fn fsck(&self, reference: &str, mode: Mode) -> Result<()> {
        for layer in self.node.registry.manifest(reference)?.layers {
            let dir = self.node.layer_dir(mode, &layer.digest.hex());
            let mut fsck = std::process::Command::new("fsck.erofs");
            fsck.arg(format!("--device={}", dir.join("data").display()))
                .arg(dir.join("meta.erofs"));
            sluice_tests::command::run(&mut fsck)?;
        }
        Ok(())
    }

    fn ours(&self, format: &str, times: Times) -> Result<()> {
        for original in [&self.base, &self.odd, &self.synthetic] {
            let name = format!("{}:{format}", original.name);
            let reference = self.node.convert(&original.image, format, &name)?;
            self.check(original, &reference, times)?;
        }
        Ok(())
    }

    fn of_ctr_remote(&self, originals: &[&Original], target: Target, tag: &str) -> Result<()> {
        for original in originals {
            let name = format!("{}:{tag}", original.name);
            let reference = self.node.registry.reference(&name);
            tools::convert_with_ctr_remote(
                &self.node.containerd,
                &original.reference,
                target,
                &reference,
            )?;
            self.check(original, &reference, Times::RoundedSeconds)?;
        }
        Ok(())
    }
}

/// That what was compared was the image.
fn expect_content(name: &str, summary: &Summary) -> Result<()> {
    let enough = match name {
        "base" => summary.entries > 5_000 && summary.bytes > 80_000_000,
        "odd" => summary.entries > 300 && summary.links >= 6 && summary.xattrs > 50,
        _ => summary.entries > u64::from(MANY_FILES) && summary.bytes > SPARSE_SIZE,
    };
    ensure!(enough, "{name} holds too little: {summary:?}");
    Ok(())
}

#[test]
fn estargz_of_ours() -> Result<()> {
    world()?.ours("estargz", Times::Seconds)
}

#[test]
fn zstd_chunked_of_ours() -> Result<()> {
    world()?.ours("zstd-chunked", Times::Seconds)
}

#[test]
fn estargz_by_ctr_remote() -> Result<()> {
    let world = world()?;
    let all = [&world.base, &world.odd, &world.synthetic];
    world.of_ctr_remote(&all, Target::Estargz, "ctr-remote-estargz")
}

#[test]
fn zstd_chunked_by_ctr_remote() -> Result<()> {
    let world = world()?;
    let most = [&world.base, &world.odd];
    world.of_ctr_remote(&most, Target::ZstdChunked, "ctr-remote-zstd-chunked")
}

#[test]
fn zstd_chunked_by_skopeo() -> Result<()> {
    let world = world()?;
    for original in [&world.base, &world.odd, &world.synthetic] {
        let name = format!("{}:skopeo", original.name);
        let reference = world.node.registry.reference(&name);
        let work = world.node.scratch.fresh_dir("skopeo")?;
        tools::push_as_podman_zstd_chunked(original.image.layout(), image::TAG, &work, &reference)?;
        world.check(original, &reference, Times::Nanoseconds)?;
    }
    Ok(())
}

/// An image that nobody converted is unpacked as usual, with the reason in
/// the log.
#[test]
fn a_layer_that_cannot_be_lazy_is_unpacked() -> Result<()> {
    let world = world()?;
    for mode in Mode::ALL {
        let reference = &world.odd.reference;
        (world.node.containerd).lazy_pull(reference, snapshotter(mode))?;
        let mounted = world.node.containerd.mount(reference, snapshotter(mode))?;
        tree::compare(&world.odd.unpacked, &mounted, Times::Nanoseconds)?;
        world.node.containerd.unmount(&mounted)?;
        let log = world.node.daemon(mode).log();
        for layer in world.node.registry.manifest(reference)?.layers {
            let named = log.contains(&layer.digest.to_string());
            ensure!(named, "no reason for {} in\n{log}", layer.digest);
        }
    }
    Ok(())
}
