//! The tree seen through each mount mode is the tree that containerd's own
//! overlayfs unpacks from the image as it was before conversion: for eStargz
//! and zstd:chunked, ours and of other tools. And so is the tree that other
//! tools see in ours.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context as _, Result, anyhow, ensure};
use sluice_tests::daemon::Mode;
use sluice_tests::image::{self, Image, MANY_FILES, SPARSE_SIZE};
use sluice_tests::node::{Node, snapshotter};
use sluice_tests::proxy::Proxy;
use sluice_tests::tools::{self, Buildah, Target};
use sluice_tests::tree::{self, Excuse, Summary, Times};

/// An image pushed and unpacked as usual.
struct Original {
    image: Image,
    name: &'static str,
    reference: String,
    unpacked: PathBuf,
}

/// One node for the whole file, and the originals that tests have asked for.
struct World {
    node: Node,
    originals: [OnceLock<Result<Original, String>>; 3],
}

fn world() -> Result<&'static World> {
    static WORLD: OnceLock<Result<World, String>> = OnceLock::new();
    let make = || -> Result<World> {
        Ok(World {
            node: Node::start("")?,
            originals: Default::default(),
        })
    };
    known(WORLD.get_or_init(|| make().map_err(|error| format!("{error:#}"))))
}

fn known<T>(made: &Result<T, String>) -> Result<&T> {
    made.as_ref().map_err(|error| anyhow!("{error}"))
}

/// A node for one producer's images. The same image of another producer may
/// have the same chain IDs, and its snapshots would be taken for this one's.
struct Bench {
    world: &'static World,
    node: Node,
}

impl Bench {
    fn new() -> Result<Self> {
        Ok(Self {
            world: world()?,
            node: Node::start("")?,
        })
    }

    /// Compares an image with its original, in both modes.
    fn check(&self, original: &Original, reference: &str, like: Like) -> Result<()> {
        // Large trees one after the other: two cores, one disk.
        static ONE: Mutex<()> = Mutex::new(());
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let node = &self.node;
        for mode in Mode::ALL {
            let about = || format!("{reference} in mode {}", mode.name());
            let mounted = node.mount_lazily(reference, mode).with_context(about)?;
            if original.name == "synthetic" {
                // The others are read on demand; here a request for each of
                // so many files would only take time.
                node.wait_until_complete(reference, mode)?;
            }
            let summary = tree::compare_but(&original.unpacked, &mounted, like.times, like.excuse)
                .with_context(about)?;
            expect_content(original.name, &summary)?;
            node.containerd.unmount(&mounted)?;
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

    fn ours(&self, format: &str) -> Result<()> {
        for original in self.world.all()? {
            let name = format!("{}:{format}", original.name);
            let reference = self.node.convert(&original.image, format, &name)?;
            self.check(original, &reference, SECONDS)?;
        }
        Ok(())
    }

    fn of_ctr_remote(&self, originals: &[&Original], target: Target) -> Result<()> {
        for original in originals {
            let name = format!("{}:ctr-remote", original.name);
            let reference = self.node.registry.reference(&name);
            tools::convert_with_ctr_remote(
                &self.node.containerd,
                &original.reference,
                target,
                &reference,
            )?;
            self.check(original, &reference, ROUNDED)?;
        }
        Ok(())
    }
}

impl World {
    fn base(&self) -> Result<&Original> {
        self.original(0, "base", image::base)
    }

    fn odd(&self) -> Result<&Original> {
        self.original(1, "odd", image::odd)
    }

    fn all(&self) -> Result<[&Original; 3]> {
        let synthetic = self.original(2, "synthetic", image::synthetic)?;
        Ok([self.base()?, self.odd()?, synthetic])
    }

    fn original(
        &self,
        number: usize,
        name: &'static str,
        image: fn() -> Result<Image>,
    ) -> Result<&Original> {
        let make = || -> Result<Original> {
            let image = image()?;
            let image_name = format!("{name}:original");
            let node = &self.node;
            let reference = (node.registry).push(image.layout(), image::TAG, &image_name)?;
            let unpacked = node.containerd.yardstick(&reference)?;
            Ok(Original {
                image,
                name,
                reference,
                unpacked,
            })
        };
        let place = &self.originals[number];
        known(place.get_or_init(|| make().map_err(|error| format!("{error:#}"))))
    }
}

/// What a producer's table of contents can hold.
#[derive(Clone, Copy)]
struct Like {
    times: Times,
    excuse: Excuse,
}

const SECONDS: Like = Like {
    times: Times::Seconds,
    excuse: tree::root_time,
};
const ROUNDED: Like = Like {
    times: Times::RoundedSeconds,
    excuse: tree::root_time,
};
/// containers/storage loses extended attributes whose value is empty.
const SKOPEO: Like = Like {
    times: Times::Nanoseconds,
    excuse: |path, what| {
        tree::root_time(path, what)
            || (what == "extended attributes" && path == Path::new("xattrs/user"))
    },
};

/// The same, and what containers/storage 1.43 does not do with a table of
/// contents, whoever wrote it: it looks for owners and times under names that
/// they do not have, and makes no devices. And an overlay over several
/// directories counts no links of its root.
const PARTIAL: Like = Like {
    times: Times::Seconds,
    excuse: |path, what| {
        (SKOPEO.excuse)(path, what)
            || ["owner", "group", "modification time"].contains(&what)
            || (what == "name" && path.starts_with("dev"))
            || (what == "links" && path.as_os_str().is_empty())
    },
};

/// How containers/storage unpacks a whole layer: it keeps `trusted.*`, which
/// containerd does not, and gives the root a mode of its own.
const UNPACKED: Like = Like {
    times: Times::Nanoseconds,
    excuse: |path, what| {
        let trusted = ["xattrs/link", "xattrs/trusted"].map(Path::new);
        (SKOPEO.excuse)(path, what)
            || (what == "extended attributes" && trusted.contains(&path))
            || (what == "mode" && path.as_os_str().is_empty())
    },
};

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
    Bench::new()?.ours("estargz")
}

#[test]
fn zstd_chunked_of_ours() -> Result<()> {
    Bench::new()?.ours("zstd-chunked")
}

#[test]
fn estargz_by_ctr_remote() -> Result<()> {
    let bench = Bench::new()?;
    bench.of_ctr_remote(&bench.world.all()?, Target::Estargz)
}

#[test]
fn zstd_chunked_by_ctr_remote() -> Result<()> {
    let bench = Bench::new()?;
    let most = [bench.world.base()?, bench.world.odd()?];
    bench.of_ctr_remote(&most, Target::ZstdChunked)
}

#[test]
fn zstd_chunked_by_skopeo() -> Result<()> {
    let bench = Bench::new()?;
    for original in bench.world.all()? {
        let name = format!("{}:skopeo", original.name);
        let reference = bench.node.registry.reference(&name);
        let work = bench.node.scratch.fresh_dir("skopeo")?;
        let layout = original.image.layout();
        tools::push_as_podman_zstd_chunked(layout, image::TAG, &work, &reference)?;
        bench.check(original, &reference, SKOPEO)?;
    }
    Ok(())
}

#[test]
fn zstd_chunked_by_buildah() -> Result<()> {
    let bench = Bench::new()?;
    let buildah = Buildah::new(&bench.node.scratch, false)?;
    let original = bench.world.odd()?;
    let reference = bench.node.registry.reference("odd:buildah");
    let (id, _) = buildah.pull(&original.image.source())?;
    buildah.push_zstd_chunked(&id, &reference)?;
    bench.check(original, &reference, SKOPEO)
}

/// Our zstd:chunked is read by podman's own reader of it, file by file, and
/// as an ordinary image.
#[test]
fn zstd_chunked_of_ours_seen_by_buildah() -> Result<()> {
    let bench = Bench::new()?;
    let proxy = Proxy::start(bench.node.registry.host())?;
    for (original, partial) in [(bench.world.base()?, true), (bench.world.odd()?, false)] {
        let name = format!("{}:buildah", original.name);
        let reference = bench.node.convert(&original.image, "zstd-chunked", &name)?;
        let layers = bench.node.registry.manifest(&reference)?.layers;
        let buildah = Buildah::new(&bench.node.scratch, partial)?;
        let (id, said) = buildah.pull(&format!("docker://{}", proxy.reference(&name)))?;
        let retrieved = said.matches("Retrieved partial blob").count();
        ensure!(!partial || retrieved == layers.len(), "{said}");
        for layer in layers {
            let mut seen = proxy.seen();
            seen.retain(|seen| seen.path.contains(&layer.digest.to_string()));
            let by_range = seen.iter().all(|seen| seen.range.is_some());
            ensure!(!seen.is_empty() && by_range == partial, "{seen:?}");
        }
        let like = if partial { PARTIAL } else { UNPACKED };
        let mounted = buildah.mount(&id)?;
        let summary = tree::compare_but(&original.unpacked, &mounted, like.times, like.excuse)
            .with_context(|| reference.clone())?;
        expect_content(original.name, &summary)?;
    }
    Ok(())
}

/// An image that nobody converted is unpacked as usual, with the reason in
/// the log.
#[test]
fn a_layer_that_cannot_be_lazy_is_unpacked() -> Result<()> {
    let world = world()?;
    let odd = world.odd()?;
    for mode in Mode::ALL {
        let reference = &odd.reference;
        (world.node.containerd).lazy_pull(reference, snapshotter(mode))?;
        let mounted = world.node.containerd.mount(reference, snapshotter(mode))?;
        tree::compare(&odd.unpacked, &mounted, Times::Nanoseconds)?;
        world.node.containerd.unmount(&mounted)?;
        let log = world.node.daemon(mode).log();
        for layer in world.node.registry.manifest(reference)?.layers {
            let named = log.contains(&layer.digest.to_string());
            ensure!(named, "no reason for {} in\n{log}", layer.digest);
        }
    }
    Ok(())
}
