//! Images that mean harm, through a real registry, containerd and daemon: each
//! layer is refused with a reason and unpacked as usual, or served as it
//! should be; no other image notices.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use sluice_layer::Format;
use sluice_oci::Digest;
use sluice_tests::command;
use sluice_tests::daemon::{Mode, ON_DEMAND};
use sluice_tests::image::{self, LayoutWriter, Noise};
use sluice_tests::node::{Node, snapshotter};
use sluice_tests::{Registry, Scratch};

#[path = "../../../layer/tests/blobs/mod.rs"]
#[allow(dead_code, reason = "shared with the layer crate's tests")]
mod blobs;
mod claims;
mod kinds;
mod layer;
mod memory;
mod random;

use layer::{Content, Layer, Outcome, Seen};

/// Layers of one image: more would not fit into one page of mount options.
const LAYERS: usize = 16;

/// Files of the good image.
const GOOD_FILES: u64 = 64;
/// Their size.
const GOOD_SIZE: usize = 200_000;

fn good_content(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; GOOD_SIZE];
    let mut noise = Noise(0x600d << 32 | number << 16);
    noise.read_exact(&mut bytes).expect("noise does not fail");
    bytes
}

struct World {
    node: Node,
    /// Where the good image is mounted, and its next unread file, by mode.
    good: [(PathBuf, u64); 2],
}

impl World {
    fn new() -> Result<Self> {
        let node = Node::start(ON_DEMAND)?;
        let content: Vec<_> = (0..GOOD_FILES).map(good_content).collect();
        let parts: Vec<_> = (0_u64..)
            .zip(&content)
            .map(|(number, bytes)| blobs::Part::file(&number.to_string(), bytes))
            .collect();
        let blob = blobs::Blob::new(Format::ZstdChunked, &parts);
        let digest = Digest::of(&blob.json);
        let format = Format::ZstdChunked;
        let layer = Layer::new(
            "good",
            format,
            blob.bytes,
            digest,
            Outcome::Lazy(Vec::new()),
        )?;
        let reference = push(&node, "good:image", &[layer])?;
        let mount = |mode| Ok::<_, anyhow::Error>((node.mount_lazily(&reference, mode)?, 0));
        let good = [mount(Mode::Erofs)?, mount(Mode::Fuse)?];
        Ok(Self { node, good })
    }

    /// Reads a file of the good image that was not read before.
    fn read_good(&mut self, mode: Mode) -> Result<()> {
        let (dir, next) = &mut self.good[mode as usize];
        let number = *next % GOOD_FILES;
        *next += 1;
        let read = std::fs::read(dir.join(number.to_string()))
            .with_context(|| format!("the daemon's log:\n{}", self.node.daemon(mode).log()))?;
        ensure!(
            read == good_content(number),
            "file {number} of the good image"
        );
        Ok(())
    }

    /// Pulls an image, checks what became of each layer, and that the good one
    /// is served as before.
    fn pull(&mut self, reference: &str, layers: &[Layer], mode: Mode) -> Result<()> {
        let logged = self.node.daemon(mode).log().len();
        let name = snapshotter(mode);
        (self.node.containerd).lazy_pull(reference, name)?;
        let log = self.node.daemon(mode).log().split_off(logged);
        ensure!(!log.contains("panicked"), "{log}");
        for layer in layers {
            let digest = Digest::of(&layer.blob);
            let dir = self.node.layer_dir(mode, &digest.hex());
            let lazy = dir.join("meta.erofs").exists();
            let refusal = log
                .lines()
                .find(|line| line.contains("cannot be lazy") && line.contains(&digest.to_string()));
            match &layer.outcome {
                Outcome::Unpacked(reason) => ensure!(
                    !lazy && refusal.is_some_and(|line| line.contains(reason)),
                    "{}: lazy: {lazy}, refused: {refusal:?} instead of '{reason}'",
                    layer.name
                ),
                Outcome::Lazy(_) => ensure!(lazy, "{}: {refusal:?}", layer.name),
                Outcome::Any => ensure!(lazy == refusal.is_none(), "{}: {log}", layer.name),
            }
        }
        let dir = (self.node.containerd).mount(reference, name)?;
        for layer in layers {
            check_seen(&dir, layer).with_context(|| format!("{} in {mode:?}", layer.name))?;
            self.read_good(mode)?;
        }
        self.node.containerd.unmount(&dir)?;
        Ok(())
    }

    /// Nothing got anywhere where it does not belong.
    fn check_nothing_escaped(&self) -> Result<()> {
        let escaped = command::text(
            Command::new("find")
                .arg(self.node.scratch.path())
                .args(["-xdev", "-name", "escape*"]),
        )?;
        ensure!(escaped.is_empty(), "{escaped}");
        Ok(())
    }
}

fn push(node: &Node, name: &str, layers: &[Layer]) -> Result<String> {
    push_to(&node.scratch, &node.registry, name, layers)
}

fn push_to(scratch: &Scratch, registry: &Registry, name: &str, layers: &[Layer]) -> Result<String> {
    let layout = scratch.fresh_dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    for layer in layers {
        let annotations = layer.annotations.clone();
        writer.raw_layer(layer.media_type(), &layer.blob, layer.diff_id, annotations)?;
    }
    writer.finish(image::TAG, &[])?;
    registry.push(&layout, image::TAG, name)
}

fn check_seen(dir: &Path, layer: &Layer) -> Result<()> {
    match &layer.outcome {
        Outcome::Unpacked(_) => {
            // The honest tar, whatever the TOC said.
            let content = Content::new(layer.format, &layer.name)?;
            let path = dir.join(&layer.name).join("inside");
            ensure!(
                std::fs::read(path)? == content.file,
                "not what the tar holds"
            );
        }
        Outcome::Lazy(seen) => {
            for (path, expected) in seen {
                check_path(&dir.join(path), expected).with_context(|| path.clone())?;
            }
        }
        Outcome::Any => {}
    }
    Ok(())
}

fn check_path(path: &Path, expected: &Seen) -> Result<()> {
    match expected {
        Seen::Content(content) => {
            ensure!(std::fs::read(path)? == *content, "other content");
        }
        Seen::Broken => {
            let mut buffer = [0; 100];
            match File::open(path)?.read_at(&mut buffer, 0) {
                Ok(count) => bail!("{count} bytes that nobody vouches for: {buffer:?}"),
                Err(error) => ensure!(error.raw_os_error() == Some(libc::EIO), "{error}"),
            }
        }
        Seen::Exists => {
            path.symlink_metadata()?;
        }
    }
    Ok(())
}

/// Every kind of hostile layer, several to an image, so that each has others
/// to harm.
#[test]
fn hostile_layers_harm_nobody() -> Result<()> {
    let mut world = World::new()?;
    let processes: Vec<_> = Mode::ALL
        .map(|mode| world.node.daemon(mode).serving())
        .into();
    let layers = kinds::all()?;
    for (number, layers) in layers.chunks(LAYERS).enumerate() {
        let reference = push(&world.node, &format!("hostile:{number}"), layers)?;
        for mode in Mode::ALL {
            world.pull(&reference, layers, mode)?;
        }
    }
    let layers = random::layers(2 * LAYERS)?;
    for (number, layers) in layers.chunks(LAYERS).enumerate() {
        let reference = push(&world.node, &format!("random:{number}"), layers)?;
        let mode = Mode::ALL[number % 2];
        world.pull(&reference, layers, mode)?;
    }
    world.check_nothing_escaped()?;
    let still: Vec<_> = Mode::ALL
        .map(|mode| world.node.daemon(mode).serving())
        .into();
    ensure!(processes == still, "a daemon was started again");
    Ok(())
}

/// An image that names another's layer, with a table of contents of its own
/// for it, gets neither: it does not decide what the other reads, and does
/// not read what it is not vouched for.
#[test]
fn a_lie_about_anothers_layer_changes_nothing() -> Result<()> {
    let mut world = World::new()?;
    let content = Content::new(Format::Estargz, "shared")?;
    let lie = content.entry("shared/lie", serde_json::json!({}));
    let honest = content.honest();
    let (path, file) = (content.path("inside"), content.file.clone());
    let layer = content.with(&[honest], Outcome::Any)?;
    let claims = serde_json::to_vec(&serde_json::json!({"version": 1, "entries": [lie]}))?;
    let liar = layer
        .clone()
        .annotate(layer::TOC_DIGEST, Digest::of(&claims));
    for (first, mode) in [(&liar, Mode::Erofs), (&layer, Mode::Fuse)] {
        let second = if std::ptr::eq(first, &liar) {
            &layer
        } else {
            &liar
        };
        for (name, layer) in [("first", first), ("second", second)] {
            // One layer below tells the images' chain IDs apart.
            let below = Content::new(Format::Estargz, &format!("{name}-{mode:?}"))?;
            let entry = below.honest();
            let below = below.with(&[entry], Outcome::Any)?;
            let reference = push(
                &world.node,
                &format!("{name}:{}", mode.name()),
                &[below, layer.clone()],
            )?;
            (world.node.containerd).lazy_pull(&reference, snapshotter(mode))?;
            let dir = (world.node.containerd).mount(&reference, snapshotter(mode))?;
            ensure!(
                std::fs::read(dir.join(&path))? == file,
                "{name} in {mode:?}"
            );
            ensure!(!dir.join("shared/lie").exists(), "{name} in {mode:?}");
            world.node.containerd.unmount(&dir)?;
            world.read_good(mode)?;
        }
    }
    Ok(())
}
