//! A hundred mounted layers, and a daemon that starts again without the
//! registry. What is asserted is behaviour and sizes; times are printed.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::Advice;
use rustix::process::{Pid, Signal, kill_process};
use sluice_oci::Descriptor;
use sluice_tests::command::wait_for;
use sluice_tests::daemon::{Mode, ON_DEMAND, Options};
use sluice_tests::figures::Figures;
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Noise, Tarball};
use sluice_tests::{Daemon, Registry, Scratch, Snapshots, snapshots};

const LAYERS: usize = 100;
/// As many as fit into one mount's options.
const LAYERS_A_MOUNT: usize = 25;
/// What the daemon may hold for a mounted layer.
const MEMORY_A_LAYER: u64 = 256 << 10;
/// What it may hold with none, without its program's own pages.
const MEMORY_IDLE: u64 = 20 << 20;
/// Files that a daemon may have open for a mounted layer.
const DESCRIPTORS_A_LAYER: usize = 1;

/// Files of each layer: one that is read before the restart, and one that is
/// not.
const READ: &str = "read";
const UNREAD: &str = "unread";

fn content(layer: usize, file: &str) -> Result<Vec<u8>> {
    let seed = (layer * 2 + usize::from(file == READ)) as u64;
    let mut bytes = Vec::new();
    Noise(seed << 32).take(30_000).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A registry with an image of a hundred layers.
fn registry_with_layers(scratch: &Scratch) -> Result<(Registry, Vec<Descriptor>)> {
    let registry = Registry::start(scratch)?;
    let layout = scratch.dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    for layer in 0..LAYERS {
        writer.layer(Compression::None, |to| {
            let mut tar = Tarball::new(to);
            for file in [READ, UNREAD] {
                let name = format!("{layer}/{file}");
                tar.file(&name, &Meta::mode(0o644), &content(layer, file)?)?;
            }
            tar.finish()
        })?;
    }
    writer.finish(image::TAG, &[])?;
    let reference = registry.reference("layers:1");
    image::convert(&layout, &reference, &[])?;
    let layers = registry.manifest(&reference)?.layers;
    Ok((registry, layers))
}

/// The layers mounted as containers' roots are, a part of them on each.
struct Mounted {
    daemon: Daemon,
    roots: Vec<PathBuf>,
}

impl Mounted {
    fn root_of(&self, layer: usize) -> &Path {
        &self.roots[layer / LAYERS_A_MOUNT]
    }

    fn read(&self, layer: usize, file: &str) -> Result<()> {
        let path = self.root_of(layer).join(format!("{layer}/{file}"));
        let failed = || format!("reading {}; {}", path.display(), self.daemon.log());
        let mut read = Vec::new();
        let mut open = File::open(&path).with_context(failed)?;
        // From the daemon, not from what the kernel has of it.
        rustix::fs::fadvise(&open, 0, None, Advice::DontNeed).with_context(failed)?;
        open.read_to_end(&mut read).with_context(failed)?;
        ensure!(read == content(layer, file)?, "{} is wrong", path.display());
        Ok(())
    }

    fn process(&self) -> Result<u32> {
        self.daemon.serving().context("no process serves")
    }

    fn figures(&self) -> Result<Figures> {
        Figures::of(self.process()?, &self.daemon.root())
    }

    /// Ends the process by a signal and waits for the next one; prints how
    /// long it takes until every layer is read from.
    fn restart(&self, signal: Signal, layers: impl Iterator<Item = usize>) -> Result<()> {
        let process = self.process()?;
        let clock = Instant::now();
        match signal {
            Signal::HUP => self.daemon.process().signal(signal)?,
            _ => kill_process(
                Pid::from_raw(process.try_into()?).context("no process")?,
                signal,
            )?,
        }
        self.daemon.wait_for_next(process)?;
        let mut first = None;
        for layer in layers {
            self.read(layer, READ)?;
            first.get_or_insert_with(|| clock.elapsed());
        }
        println!(
            "{signal:?}: the first layer answers after {:.0?}, all have after {:.0?}",
            first.unwrap_or_default(),
            clock.elapsed()
        );
        Ok(())
    }
}

#[test]
fn a_hundred_layers_are_served_again_without_the_registry_and_bad_ones_fail_alone() -> Result<()> {
    let scratch = Scratch::new()?;
    let (registry, layers) = registry_with_layers(&scratch)?;
    let runtime = tokio::runtime::Runtime::new()?;
    for mode in Mode::ALL {
        println!("mode {}", mode.name());
        let options = Options {
            mode: Some(mode),
            supervised: true,
            more: format!("{ON_DEMAND}deadline_seconds = 2\n"),
            ..Options::default()
        };
        let mut mounted = Mounted {
            daemon: Daemon::start(&scratch, &options)?,
            roots: Vec::new(),
        };
        let client = runtime.block_on(Snapshots::connect(&mounted.daemon))?;
        // Once it has answered something, it has started.
        runtime.block_on(client.prepare("first", ""))?;
        let idle = mounted.figures()?;
        println!("idle: {idle}");
        ensure!(idle.memory <= MEMORY_IDLE, "{idle}");
        let reference = registry.reference("layers:1");
        for (number, part) in layers.chunks(LAYERS_A_MOUNT).enumerate() {
            let root = scratch.dir(&format!("{}-{number}", mode.name()))?;
            runtime.block_on(async {
                let mut parent = String::new();
                for (layer, descriptor) in part.iter().enumerate() {
                    let name = format!("{number}-{layer}");
                    client.serve(&name, &parent, &reference, descriptor).await?;
                    parent = name;
                }
                let key = format!("container-{number}");
                snapshots::mount(&client.prepare(&key, &parent).await?, &root)
            })?;
            mounted.roots.push(root);
        }
        for layer in 0..LAYERS {
            mounted.read(layer, READ)?;
        }
        let full = mounted.figures()?;
        println!("mounted: {full}");
        let memory = full.memory.saturating_sub(idle.memory) / LAYERS as u64;
        ensure!(memory <= MEMORY_A_LAYER, "{memory} bytes a layer");
        // And the connections to containerd and to the registry.
        let descriptors = full.descriptors.saturating_sub(idle.descriptors + 16) / LAYERS;
        ensure!(descriptors <= DESCRIPTORS_A_LAYER, "{full}");

        registry.process().kill()?;
        mounted.restart(Signal::HUP, 0..LAYERS)?;
        // What was fetched is durable by now: no end is too sudden.
        mounted.restart(Signal::KILL, 0..LAYERS)?;
        let again = mounted.figures()?;
        println!("mounted again: {again}");
        ensure!(again.mounts == full.mounts, "{again}, not {full}");

        // One layer of each mount damaged, each in another file.
        let files = ["chunks", "meta.erofs", "data", "present"];
        let bad: Vec<usize> = (0..4).map(|part| part * LAYERS_A_MOUNT + 3).collect();
        for (&layer, file) in bad.iter().zip(files) {
            let hex = layers[layer].digest.hex();
            let path = mounted.daemon.root().join("layers").join(hex).join(file);
            // A new file: the old one is mapped by the process that runs.
            fs::write(path.with_extension("bad"), "rubbish")?;
            fs::rename(path.with_extension("bad"), &path)?;
        }
        let logged = mounted.daemon.log().len();
        mounted.restart(
            Signal::KILL,
            (0..LAYERS).filter(|layer| !bad.contains(layer)),
        )?;
        let log = mounted.daemon.log().split_off(logged);
        for &layer in &bad {
            let hex = layers[layer].digest.hex();
            let said = log.lines().any(|line| line.contains(&hex));
            ensure!(said, "nothing was said of layer {layer}, {hex}:\n{log}");
        }
        // What nobody has read yet cannot come, and says so.
        let read = mounted.read(1, UNREAD);
        ensure!(read.is_err(), "where did it come from?");

        registry.start_again()?;
        mounted.read(1, UNREAD)?;
        // Whoever mounts a bad layer now finds it mended.
        let client = runtime.block_on(Snapshots::connect(&mounted.daemon))?;
        for part in 0..mounted.roots.len() {
            let root = scratch.dir(&format!("{}-{part}-again", mode.name()))?;
            let parent = format!("{part}-{}", LAYERS_A_MOUNT - 1);
            let key = format!("again-{part}");
            let mounts = runtime.block_on(client.prepare(&key, &parent));
            snapshots::mount(&mounts.with_context(|| mounted.daemon.log())?, &root)?;
            let old = std::mem::replace(&mut mounted.roots[part], root);
            rustix::mount::unmount(&old, rustix::mount::UnmountFlags::empty())?;
        }
        for layer in 0..LAYERS {
            for file in [READ, UNREAD] {
                mounted.read(layer, file)?;
            }
        }
        for root in &mounted.roots {
            rustix::mount::unmount(root, rustix::mount::UnmountFlags::empty())?;
        }
        mounted.daemon.stop()?;
        let root = mounted.daemon.root();
        wait_for("nothing to be mounted", || {
            let left = sluice_tests::scratch::mount_points(&root);
            Ok(left.is_empty().then_some(()))
        })?;
    }
    Ok(())
}
