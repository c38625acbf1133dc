//! A node that reads through a registry that misbehaves: an image of many
//! files in one layer, each one chunk, whose content is known.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use sluice_oci::Descriptor;

use crate::command;
use crate::daemon::Mode;
use crate::image::{self, Compression, LayoutWriter, Meta, Noise, Tarball};
use crate::node::{Node, snapshotter};
use crate::proxy::{Fault, Proxy};

/// Files of the image.
pub const FILES: u64 = 24;
const FILE_SIZE: u64 = 300_000;

/// The name of a file.
pub fn file_name(number: u64) -> String {
    format!("file-{number:02}")
}

/// What a file holds.
pub fn content(number: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    Noise(number * 1_000_000)
        .take(FILE_SIZE)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A node, an image of one layer in its registry, and a proxy in between.
pub struct World {
    /// A daemon a mode.
    pub node: Node,
    /// In front of its registry.
    pub proxy: Proxy,
    /// Through the proxy.
    pub reference: String,
    /// The image as it was before conversion, from the registry.
    pub plain: String,
    /// The layer.
    pub layer: Descriptor,
}

impl World {
    /// With the image in one of the formats, and this in the daemons'
    /// configuration.
    pub fn new(format: &str, configuration: &str) -> Result<Self> {
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
        let chunks = ["--chunk-size", "1M", "--format", format];
        image::convert(&layout, &direct, &chunks)?;
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

    /// Pulls the image through the proxy and mounts it.
    pub fn mount(&self, mode: Mode) -> Result<PathBuf> {
        self.mount_from(&self.reference, mode)
    }

    /// The same by another name.
    pub fn mount_from(&self, reference: &str, mode: Mode) -> Result<PathBuf> {
        (self.node.containerd).lazy_pull(reference, snapshotter(mode))?;
        let meta = self.node.layer_dir(mode, &self.layer.digest.hex());
        ensure!(
            meta.join("meta.erofs").exists(),
            "the layer is not lazy:\n{}",
            self.log(mode)
        );
        self.node.containerd.mount(reference, snapshotter(mode))
    }

    /// What a daemon has logged.
    pub fn log(&self, mode: Mode) -> String {
        self.node.daemon(mode).log()
    }

    /// Breaks the next answers to requests for content.
    pub fn fail(&self, times: u64, fault: Fault) {
        self.proxy.fail_ranges("/blobs/", times, fault);
    }

    /// Reads a file piece by piece: whether all came, or a read failed with an
    /// I/O error. A wrong byte is an error of the test.
    pub fn read(&self, dir: &Path, number: u64) -> Result<bool> {
        let name = file_name(number);
        let expected = content(number)?;
        let logs = || Mode::ALL.map(|mode| self.log(mode)).join("\n");
        let file =
            File::open(dir.join(&name)).with_context(|| format!("opening {name}:\n{}", logs()))?;
        let mut buffer = vec![0; 16 << 10];
        for (index, piece) in expected.chunks(buffer.len()).enumerate() {
            let buffer = &mut buffer[..piece.len()];
            buffer.fill(0);
            match file.read_exact_at(buffer, (index * (16 << 10)) as u64) {
                Ok(()) => ensure!(buffer == piece, "{name}: wrong bytes"),
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(false),
                Err(error) => bail!("reading {name}: {error}\n{}", logs()),
            }
        }
        Ok(true)
    }

    /// Waits until a file can be read to its end. The first read that follows
    /// a fault may still meet a request from before.
    pub fn read_in_the_end(&self, dir: &Path, number: u64) -> Result<()> {
        command::wait_for("the file", || Ok(self.read(dir, number)?.then_some(())))
    }

    /// All files in turn.
    pub fn read_all(&self, dir: &Path) -> Result<Vec<bool>> {
        (0..FILES).map(|number| self.read(dir, number)).collect()
    }
}
