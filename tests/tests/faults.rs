//! What goes wrong between a node and its registry gives a clear error and
//! never a wrong byte, and what goes wrong for a moment gives none at all.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use sluice_oci::Descriptor;
use sluice_tests::daemon::Mode;
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Noise, Tarball};
use sluice_tests::node::{Node, snapshotter};
use sluice_tests::proxy::{Fault, Proxy};
use sluice_tests::tree::{self, Times};
use sluice_tests::{command, programs};

/// Nothing is fetched but what a reader asks for, and failures come soon.
const ON_DEMAND: &str = "[prefetch]\nenabled = false\n[background]\nenabled = false\n\
                         [fetch]\ndeadline_seconds = 3\nread_ahead_mib = 0\n";

/// Files of the image, each with chunks of its own.
const FILES: u64 = 24;
const FILE_SIZE: u64 = 300_000;

fn file_name(number: u64) -> String {
    format!("file-{number:02}")
}

fn content(number: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    Noise(number * 1_000_000)
        .take(FILE_SIZE)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A node, an image of one layer in its registry, and a proxy in between.
struct World {
    node: Node,
    proxy: Proxy,
    /// Through the proxy.
    reference: String,
    /// The image as it was before conversion, from the registry.
    plain: String,
    layer: Descriptor,
}

impl World {
    fn new(format: &str, configuration: &str) -> Result<Self> {
        let node = Node::start(configuration)?;
        let layout = node.scratch.dir("layout")?;
        let mut writer = LayoutWriter::new(&layout)?;
        writer.layer(Compression::Gzip, |to| {
            let mut tar = Tarball::new(to);
            for number in 0..FILES {
                let meta = Meta::mode(0o644);
                tar.file(&file_name(number), &meta, &content(number)?)?;
            }
            tar.finish()
        })?;
        writer.finish(image::TAG, &[])?;
        let plain = node.registry.push(&layout, image::TAG, "faulty:plain")?;
        let direct = node.registry.reference("faulty:lazy");
        command::run(
            programs::sluice_command()?
                .args(["convert", "--format", format])
                .arg(format!("oci:{}:{}", layout.display(), image::TAG))
                .arg(&direct),
        )?;
        let layer = node.registry.manifest(&direct)?.layers.remove(0);
        let proxy = Proxy::start(node.registry.host())?;
        Ok(Self {
            reference: proxy.reference("faulty:lazy"),
            plain,
            layer,
            proxy,
            node,
        })
    }

    fn mount(&self, mode: Mode) -> Result<PathBuf> {
        (self.node.containerd).lazy_pull(&self.reference, snapshotter(mode))?;
        let meta = self.node.layer_dir(mode, &self.layer.digest.hex());
        ensure!(
            meta.join("meta.erofs").exists(),
            "the layer is not lazy:\n{}",
            self.log(mode)
        );
        self.node
            .containerd
            .mount(&self.reference, snapshotter(mode))
    }

    fn log(&self, mode: Mode) -> String {
        self.node.daemon(mode).log()
    }

    fn fail(&self, times: u64, fault: Fault) {
        self.proxy.fail_ranges("/blobs/", times, fault);
    }

    /// Reads a file piece by piece: whether all came, or a read failed with an
    /// I/O error. A wrong byte is an error of the test.
    fn read(&self, dir: &Path, number: u64) -> Result<bool> {
        let name = file_name(number);
        let expected = content(number)?;
        let file = File::open(dir.join(&name))?;
        let mut buffer = vec![0; 16 << 10];
        for (index, piece) in expected.chunks(buffer.len()).enumerate() {
            let buffer = &mut buffer[..piece.len()];
            buffer.fill(0);
            match file.read_exact_at(buffer, (index * (16 << 10)) as u64) {
                Ok(()) => ensure!(buffer == piece, "{name}: wrong bytes"),
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(false),
                Err(error) => bail!("{name}: {error}"),
            }
        }
        Ok(true)
    }

    /// Waits until a file can be read to its end. The first read that follows
    /// a fault may still meet a request from before.
    fn read_in_the_end(&self, dir: &Path, number: u64) -> Result<()> {
        command::wait_for("the file", || Ok(self.read(dir, number)?.then_some(())))
    }

    fn read_all(&self, dir: &Path) -> Result<Vec<bool>> {
        (0..FILES).map(|number| self.read(dir, number)).collect()
    }
}

const FORMATS: [&str; 2] = ["estargz", "zstd-chunked"];

#[test]
fn a_tampered_chunk_is_never_served() -> Result<()> {
    for format in FORMATS {
        let world = World::new(format, ON_DEMAND)?;
        for mode in Mode::ALL {
            let dir = world.mount(mode)?;
            world.fail(u64::MAX, Fault::Tamper(world.layer.size / 2));
            let outcome = world.read_all(&dir)?;
            let failed = outcome.iter().filter(|complete| !**complete).count();
            ensure!(failed == 1, "one chunk of one file is bad: {outcome:?}");
            let log = world.log(mode);
            let named = log.contains(&world.layer.digest.to_string());
            ensure!(named, "the log does not name the layer:\n{log}");
            // Nothing of it was kept: the file is whole once the registry is.
            world.proxy.heal();
            for number in 0..FILES {
                world.read_in_the_end(&dir, number)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_chunk_tampered_once_is_fetched_again() -> Result<()> {
    let world = World::new("estargz", ON_DEMAND)?;
    for mode in Mode::ALL {
        let dir = world.mount(mode)?;
        world.fail(1, Fault::Tamper(world.layer.size / 2));
        let outcome = world.read_all(&dir)?;
        ensure!(outcome.iter().all(|complete| *complete), "{outcome:?}");
        world.proxy.heal();
    }
    Ok(())
}

/// The table of contents or the footer broken: the layer is not lazy, and
/// unpacked as usual where the blob itself is whole.
#[test]
fn a_tampered_toc_or_footer_is_unpacked_instead() -> Result<()> {
    for format in FORMATS {
        let world = World::new(format, ON_DEMAND)?;
        (world.node.containerd).pull(&world.plain, "overlayfs")?;
        let unpacked = (world.node.containerd).mount(&world.plain, "overlayfs")?;
        let toc = match world
            .layer
            .annotations
            .get("io.containers.zstd-chunked.manifest-position")
        {
            // offset:compressed length:length:type
            Some(position) => {
                let mut numbers = position.split(':').map(str::parse::<u64>);
                let mut next = || {
                    numbers
                        .next()
                        .context("too few numbers")?
                        .context("no number")
                };
                next()? + next()? / 2
            }
            None => world.layer.size - 51 - 500,
        };
        // The footer is read where no annotation says where the TOC is.
        let direct = world.node.registry.reference("faulty:lazy");
        let registry = &world.node.registry;
        registry.push_changed(&world.node.scratch, &direct, "faulty:footer", |manifest| {
            let annotations = &mut manifest.layers[0].annotations;
            annotations.retain(|key, _| !key.ends_with("position"));
        })?;
        let footer = (Mode::Fuse, "faulty:footer", world.layer.size - 20);
        for (mode, name, offset) in [(Mode::Erofs, "faulty:lazy", toc), footer] {
            let reference = world.proxy.reference(name);
            world.fail(u64::MAX, Fault::Tamper(offset));
            (world.node.containerd).lazy_pull(&reference, snapshotter(mode))?;
            let log = world.log(mode);
            ensure!(
                log.contains(&world.layer.digest.to_string()) && log.contains("cannot be lazy"),
                "no reason in the log:\n{log}"
            );
            let mounted = (world.node.containerd).mount(&reference, snapshotter(mode))?;
            tree::compare_but(&unpacked, &mounted, Times::Seconds, |path, what| {
                let own = ["stargz.index.json", ".no.prefetch.landmark"];
                tree::root_time(path, what) || own.iter().any(|name| path == Path::new(name))
            })?;
            world.proxy.heal();
        }
    }
    Ok(())
}

/// Where the blob is broken for everyone, the pull says so and keeps nothing.
#[test]
fn a_tampered_blob_or_manifest_is_refused() -> Result<()> {
    let world = World::new("estargz", ON_DEMAND)?;
    let images = || (world.node.containerd).ctr_text(&["images", "list", "--quiet"]);
    let refusal = |reference: &str| -> Result<String> {
        let name = snapshotter(Mode::Erofs);
        let said =
            command::refusal(&mut world.node.containerd.lazy_pull_command(reference, name)?)?;
        ensure!(images()?.is_empty(), "an image was kept: {}", images()?);
        Ok(said)
    };

    let toc = world.layer.size - 51 - 500;
    world.proxy.fail("/blobs/", u64::MAX, Fault::Tamper(toc));
    let said = refusal(&world.reference)?;
    let layer = world.layer.digest.to_string();
    ensure!(said.contains(&layer), "the layer is not named:\n{said}");
    world.proxy.heal();

    let manifest = world.node.registry.manifest(&world.reference)?;
    let bytes = std::fs::read(world.node.registry.blob_file(&manifest_digest(&world)?))?;
    ensure!(serde_json::from_slice::<sluice_oci::Manifest>(&bytes)? == manifest);
    let text = String::from_utf8(bytes)?.replacen("linux", "Linux", 1) + " ";
    let replaced = Fault::Replace(text.into_bytes());
    world.proxy.fail("/manifests/", u64::MAX, replaced);
    let digest = manifest_digest(&world)?;
    let by_digest = world.proxy.reference(&format!("faulty@{digest}"));
    let said = refusal(&by_digest)?;
    ensure!(said.contains(&digest), "the manifest is not named:\n{said}");
    Ok(())
}

fn manifest_digest(world: &World) -> Result<String> {
    command::text(
        std::process::Command::new("skopeo")
            .args(["--insecure-policy", "inspect", "--no-tags"])
            .args(["--format", "{{.Digest}}", "--tls-verify=false"])
            .arg(format!(
                "docker://{}",
                world.node.registry.reference("faulty:lazy")
            )),
    )
}

#[test]
fn what_fails_for_a_moment_is_not_noticed() -> Result<()> {
    let patient = ON_DEMAND.replace("deadline_seconds = 3", "deadline_seconds = 60");
    let world = World::new("estargz", &patient)?;
    let (mode, mut next) = (Mode::Erofs, 0..FILES);
    let dir = world.mount(mode)?;
    for fault in [
        Fault::Status(500, ""),
        Fault::Status(503, ""),
        Fault::Status(429, "Retry-After: 1\r\n"),
        Fault::Close,
        Fault::Truncate(0),
        Fault::Truncate(100_000),
        Fault::Stall(50_000),
    ] {
        let number = next.next().context("no file is left")?;
        world.fail(1, fault.clone());
        let complete = world.read(&dir, number)?;
        ensure!(complete, "{fault:?} failed a read:\n{}", world.log(mode));
        world.proxy.heal();
    }
    Ok(())
}

#[test]
fn what_fails_for_good_fails_the_read_and_nothing_else() -> Result<()> {
    let world = World::new("zstd-chunked", ON_DEMAND)?;
    for (mode, mut next) in Mode::ALL.into_iter().zip([0..FILES, 0..FILES]) {
        let dir = world.mount(mode)?;
        let first = next.next().context("no file is left")?;
        ensure!(world.read(&dir, first)?, "the first file");
        for fault in [
            Fault::Status(401, ""),
            Fault::Status(403, ""),
            Fault::Status(404, ""),
            Fault::Status(416, ""),
            Fault::Status(429, "Retry-After: 1\r\n"),
            Fault::Status(500, ""),
            Fault::IgnoreRange,
            Fault::Close,
            Fault::Truncate(100),
            Fault::Stall(100),
        ] {
            let number = next.next().context("no file is left")?;
            world.fail(u64::MAX, fault.clone());
            let logged = world.log(mode).len();
            let complete = world.read(&dir, number)?;
            ensure!(!complete, "{fault:?} was not noticed");
            // What is here still is, and the log says what is wrong.
            ensure!(world.read(&dir, first)?, "after {fault:?}");
            let log = world.log(mode).split_off(logged);
            let named = log.contains(&world.layer.digest.to_string());
            ensure!(named, "{fault:?}: the log does not name the layer:\n{log}");
            world.proxy.heal();
            world
                .read_in_the_end(&dir, number)
                .with_context(|| format!("{fault:?} left something behind"))?;
        }
    }
    Ok(())
}
