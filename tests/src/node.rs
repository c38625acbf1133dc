//! A whole node: one containerd with a daemon in each mount mode, and a
//! registry.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use sluice_snapshotter::layer_dir::LayerDir;

use crate::command::wait_for;
use crate::containerd::Containerd;
use crate::daemon::{Daemon, Mode, Options};
use crate::image::Image;
use crate::programs::sluice_command;
use crate::registry::Registry;
use crate::scratch::Scratch;

/// See the module. The parts are independent of each other but for the
/// directory they are in.
pub struct Node {
    /// Where it all is.
    pub scratch: Scratch,
    /// On loopback.
    pub registry: Registry,
    /// A daemon a mode, in the order of [`Mode::ALL`].
    pub daemons: [Daemon; 2],
    /// With each daemon as the snapshotter of [`snapshotter`].
    pub containerd: Containerd,
}

/// The name under which containerd knows the daemon of a mode.
pub fn snapshotter(mode: Mode) -> &'static str {
    match mode {
        Mode::Erofs => "sluice-erofs",
        Mode::Fuse => "sluice-fuse",
    }
}

impl Node {
    /// Starts everything; `more` goes into both daemons' configuration.
    pub fn start(more: &str) -> Result<Self> {
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        let daemon = |mode| {
            Daemon::start(
                &scratch,
                &Options {
                    mode: Some(mode),
                    more: more.to_owned(),
                    ..Options::default()
                },
            )
        };
        let daemons = [daemon(Mode::Erofs)?, daemon(Mode::Fuse)?];
        let containerd = Containerd::start_with(
            &scratch,
            &[
                (snapshotter(Mode::Erofs), &daemons[0]),
                (snapshotter(Mode::Fuse), &daemons[1]),
            ],
        )?;
        Ok(Self {
            scratch,
            registry,
            daemons,
            containerd,
        })
    }

    /// The daemon of a mode.
    pub fn daemon(&self, mode: Mode) -> &Daemon {
        match mode {
            Mode::Erofs => &self.daemons[0],
            Mode::Fuse => &self.daemons[1],
        }
    }

    /// Converts an image into the registry with `sluice`.
    pub fn convert(&self, image: &Image, format: &str, name: &str) -> Result<String> {
        let reference = self.registry.reference(name);
        crate::command::run(
            sluice_command()?
                .args(["convert", "--format", format])
                .arg(image.source())
                .arg(&reference),
        )?;
        Ok(reference)
    }

    /// Pulls lazily and makes sure that it was: with every layer unpacked as
    /// usual all else would hold, too, and prove nothing.
    pub fn pull_lazily(&self, reference: &str, mode: Mode) -> Result<()> {
        self.containerd.lazy_pull(reference, snapshotter(mode))?;
        let manifest = self.registry.manifest(reference)?;
        for layer in &manifest.layers {
            let dir = self.layer_dir(mode, &layer.digest.hex());
            ensure!(
                dir.join("meta.erofs").exists(),
                "layer {} of {reference} was not mounted lazily; the daemon's log:\n{}",
                layer.digest,
                self.daemon(mode).log()
            );
        }
        Ok(())
    }

    /// Waits until the background download has brought everything.
    pub fn wait_until_complete(&self, reference: &str, mode: Mode) -> Result<()> {
        for layer in self.registry.manifest(reference)?.layers {
            let dir = self.layer_dir(mode, &layer.digest.hex());
            wait_for("the background download", || {
                let open = LayerDir::open(&dir, layer.digest)?;
                Ok(open.is_complete().then_some(()))
            })
            .with_context(|| format!("the daemon's log:\n{}", self.daemon(mode).log()))?;
        }
        Ok(())
    }

    /// Where the daemon of a mode keeps a layer.
    pub fn layer_dir(&self, mode: Mode, hex: &str) -> PathBuf {
        self.daemon(mode).root().join("layers").join(hex)
    }

    /// Pulls lazily and mounts, read-only.
    pub fn mount_lazily(&self, reference: &str, mode: Mode) -> Result<PathBuf> {
        self.pull_lazily(reference, mode)?;
        self.containerd
            .mount(reference, snapshotter(mode))
            .with_context(|| format!("the daemon's log:\n{}", self.daemon(mode).log()))
    }
}
