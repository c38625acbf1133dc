//! Two versions of one image: what the node has of the first is not fetched
//! for the second.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sluice_oci::{Descriptor, Digest};
use sluice_tests::command::{run, text, wait_for};
use sluice_tests::content::noise;
use sluice_tests::daemon::{Mode, ON_DEMAND, Options};
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Tarball};
use sluice_tests::programs::sluice_command;
use sluice_tests::proxy::Proxy;
use sluice_tests::{Containerd, Daemon, Registry, Scratch};

/// Packages of a Python environment: a library and some modules each.
const PACKAGES: u64 = 4;
const LIBRARY: usize = 1 << 20;
const MODULES: u64 = 80;
/// The one that the second version changes.
const CHANGED: u64 = 2;
/// What it inserts into the library.
const INSERTED: &[u8] = b"some bytes that move all that follows";

type Files = BTreeMap<String, Vec<u8>>;

/// Text that compresses, as that of modules does.
fn module(seed: u64) -> Vec<u8> {
    let bytes = noise(600 + seed as usize % 1_000, seed);
    let mut text = Vec::new();
    for byte in bytes {
        // To memory, which does not fail.
        let _ = write!(text, "{byte:02x} ");
    }
    text
}

fn packages() -> Files {
    let mut files = Files::new();
    for package in 0..PACKAGES {
        let library = noise(LIBRARY, 1 << 32 | package);
        files.insert(format!("packages/{package}/lib.so"), library);
        for number in 0..MODULES {
            let content = module(package * MODULES + number);
            files.insert(format!("packages/{package}/{number:03}.py"), content);
        }
    }
    files
}

/// What the second version has beside or instead of that.
fn changes(first: &Files) -> Result<Files> {
    let name = format!("packages/{CHANGED}/lib.so");
    let mut library = first.get(&name).context("no library")?.clone();
    library.splice(LIBRARY / 2..LIBRARY / 2, INSERTED.iter().copied());
    let mut changed = Files::from([(name, library)]);
    for number in (0..MODULES / 2).chain(MODULES..MODULES + 10) {
        let content = module(1_000_000 + number);
        changed.insert(format!("packages/{CHANGED}/{number:03}.py"), content);
    }
    Ok(changed)
}

/// Both versions in a registry, converted apart: `packages:1` and
/// `packages:2`. They share their first layer as it is.
fn publish(scratch: &Scratch, registry: &Registry, how: &[&str]) -> Result<[Files; 2]> {
    let first = packages();
    let changed = changes(&first)?;
    let mut second = first.clone();
    second.extend(changed.clone());
    for (version, files) in [(1, &first), (2, &second)] {
        let layout = scratch.fresh_dir("layout")?;
        let mut writer = LayoutWriter::new(&layout)?;
        writer.layer(Compression::None, |to| {
            let mut tar = Tarball::new(to);
            image::add_programs(&mut tar, &["sh", "cat", "sha256sum"])?;
            tar.finish()
        })?;
        writer.layer(Compression::Gzip, |to| {
            let mut tar = Tarball::new(to);
            for (name, content) in files {
                tar.file(name, &Meta::mode(0o644), content)?;
            }
            tar.finish()
        })?;
        writer.finish(image::TAG, &["/usr/bin/sh"])?;
        run(sluice_command()?
            .args(["convert", "--plain-http", "--chunk-size", "64K"])
            .args(how)
            .arg(format!("oci:{}:{}", layout.display(), image::TAG))
            .arg(registry.reference(&format!("packages:{version}"))))?;
    }
    Ok([second, changed])
}

/// A node that reaches the registry through a proxy.
struct World {
    registry: Registry,
    proxy: Proxy,
    daemon: Daemon,
    containerd: Containerd,
    scratch: Scratch,
}

const SNAPSHOTTER: &str = "sluice";

impl World {
    fn new(mode: Mode, more: &str) -> Result<Self> {
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        let options = Options {
            mode: Some(mode),
            more: more.to_owned(),
            ..Options::default()
        };
        let daemon = Daemon::start(&scratch, &options)?;
        Ok(Self {
            proxy: Proxy::start(registry.host())?,
            containerd: Containerd::start_with(&scratch, &[(SNAPSHOTTER, &daemon)])?,
            registry,
            daemon,
            scratch,
        })
    }

    fn reference(&self, version: u32) -> String {
        self.proxy.reference(&format!("packages:{version}"))
    }

    /// The layer that differs.
    fn layer(&self, version: u32) -> Result<Descriptor> {
        let reference = self.registry.reference(&format!("packages:{version}"));
        let mut layers = self.registry.manifest(&reference)?.layers;
        layers.pop().context("no layer")
    }

    /// What the daemon says of its layers.
    fn layers(&self) -> Result<Vec<Value>> {
        let mut status = sluice_command()?;
        status.args(["status", "--json", "--address"]);
        let json = text(status.arg(self.daemon.socket()))?;
        let status: Value = serde_json::from_str(&json)?;
        Ok(status["layers"].as_array().cloned().unwrap_or_default())
    }

    fn status_of(&self, layer: &Digest) -> Result<Value> {
        let layers = self.layers()?.into_iter();
        let mut layers = layers.filter(|found| found["digest"] == layer.to_string().as_str());
        layers.next().context("the layer is not open")
    }

    /// Pulls, mounts, and waits until the background download has brought all
    /// that is missing, and until it is known to be what the image says.
    fn complete(&self, version: u32) -> Result<std::path::PathBuf> {
        let reference = self.reference(version);
        self.containerd.lazy_pull(&reference, SNAPSHOTTER)?;
        let root = self.containerd.mount(&reference, SNAPSHOTTER)?;
        wait_for("all of the image, and that it is verified", || {
            let layers = self.layers()?;
            let complete = |layer: &Value| {
                layer["chunks"] == layer["present_chunks"] && layer["content"] == "verified"
            };
            Ok((layers.iter().all(complete)).then_some(()))
        })
        .with_context(|| self.daemon.log())?;
        Ok(root)
    }
}

fn check_all(root: &Path, files: &Files) -> Result<()> {
    for (name, content) in files {
        let found = std::fs::read(root.join(name)).with_context(|| name.clone())?;
        ensure!(found == *content, "{name} is wrong");
    }
    Ok(())
}

/// What the files take when each is compressed as a whole.
fn compressed(files: &Files, format: &str) -> Result<u64> {
    let mut bytes = 0;
    for content in files.values() {
        bytes += match format {
            "zstd-chunked" => zstd::bulk::compress(content, 3)?.len(),
            _ => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), Default::default());
                gzip.write_all(content)?;
                gzip.finish()?.len()
            }
        } as u64;
    }
    Ok(bytes)
}

/// The figure that is promised: no more than 1.2 times what has changed.
#[test]
fn version_two_fetches_what_has_changed() -> Result<()> {
    let kinds = [
        (Mode::Erofs, "zstd-chunked", "content"),
        (Mode::Fuse, "zstd-chunked", "fixed"),
        (Mode::Erofs, "estargz", "fixed"),
    ];
    for (mode, format, chunking) in kinds {
        let world = World::new(mode, "[background]\ndelay_seconds = 0\n")?;
        let how = ["--format", format, "--chunking", chunking];
        let [second, changed] = publish(&world.scratch, &world.registry, &how)?;
        world.complete(1)?;
        world.proxy.forget();
        let root = world.complete(2)?;
        let layer = world.layer(2)?;
        let fetched = world.proxy.bytes("/blobs/");
        let of_layer = world.proxy.bytes(&layer.digest.to_string());
        check_all(&root, &second)?;
        let changed_bytes = compressed(&changed, format)?;
        let status = world.status_of(&layer.digest)?;
        println!(
            "{format}, {chunking}: {fetched} bytes for {changed_bytes} changed ones of {}; {} \
             were taken from the first version",
            layer.size, status["reused_bytes"]
        );
        // The configuration is a blob, too.
        ensure!(of_layer > fetched / 10 * 9, "{of_layer} of {fetched}");
        ensure!(fetched * 10 <= changed_bytes * 12, "{fetched} bytes");
        // Of the library, the chunk with the insertion and its neighbours are
        // new where the content says where to cut.
        if chunking == "content" {
            ensure!(fetched * 2 < changed_bytes, "{fetched} bytes");
        }
        let all: usize = second.values().map(Vec::len).sum();
        let new: usize = changed.values().map(Vec::len).sum();
        let reused = status["reused_bytes"].as_u64().context("no figure")?;
        ensure!(reused >= (all - new) as u64, "{reused} bytes were reused");
        let read = world.proxy.bytes(&layer.digest.to_string());
        ensure!(read == of_layer, "reading fetched {} more", read - of_layer);
    }
    Ok(())
}

#[test]
fn a_container_reads_what_another_image_has_without_a_request() -> Result<()> {
    for mode in Mode::ALL {
        let mut world = World::new(mode, ON_DEMAND)?;
        let how = ["--format", "zstd-chunked"];
        let [second, changed] = publish(&world.scratch, &world.registry, &how)?;
        let old: Vec<&String> = second
            .keys()
            .filter(|name| !changed.contains_key(*name))
            .collect();
        let read = |world: &World, version: u32, id: &str, files: &[&String]| -> Result<()> {
            let mut arguments = vec!["cat".to_owned()];
            arguments.extend(files.iter().map(|name| format!("/{name}")));
            let command = format!("{} | sha256sum", arguments.join(" "));
            let reference = world.reference(version);
            let program = ["sh", "-c", &command];
            let output = text(&mut world.containerd.run_command(
                SNAPSHOTTER,
                &reference,
                id,
                &program,
            ))?;
            let content: Vec<u8> = files
                .iter()
                .flat_map(|name| second[*name].clone())
                .collect();
            ensure!(output.contains(&Digest::of(&content).hex()), "{output}");
            Ok(())
        };
        world
            .containerd
            .lazy_pull(&world.reference(1), SNAPSHOTTER)?;
        read(&world, 1, "first", &old[..240])?;
        world
            .containerd
            .lazy_pull(&world.reference(2), SNAPSHOTTER)?;
        world.proxy.forget();
        read(&world, 2, "second", &old[..120])?;
        // Also for the process that follows, which has the first version on
        // its disk and does not use it.
        world.daemon.stop()?;
        world.daemon.start_again()?;
        world.containerd.wait_for_snapshotter(SNAPSHOTTER)?;
        read(&world, 2, "third", &old[120..240])?;
        let layer = world.layer(2)?.digest.to_string();
        ensure!(
            world.proxy.requests(&layer) == 0,
            "{:?}",
            world.proxy.seen()
        );
        let new: Vec<&String> = changed.keys().collect();
        read(&world, 2, "fourth", &new[..2])?;
        ensure!(world.proxy.requests(&layer) > 0, "nothing was fetched");
    }
    Ok(())
}
