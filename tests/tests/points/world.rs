//! A node whose daemon dies where it is told to.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use sluice_tests::agreement::check_agreement;
use sluice_tests::command::{run, wait_for};
use sluice_tests::containerd::{self, Containerd};
use sluice_tests::content::{self, noise};
use sluice_tests::daemon::{Mode, ON_DEMAND, Options};
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Tarball};
use sluice_tests::relay::Relay;
use sluice_tests::{Daemon, Registry, Scratch};

pub(crate) const SLUICE: &str = "sluice";
const LAYERS: usize = 2;
/// Files of a layer, each with a chunk of its own.
const FILES: usize = 40;
const FILE_SIZE: usize = 5000;
/// The last files of the last layer have the content of the first ones of the
/// first layer.
pub(crate) const TWINS: usize = 2;

/// An image in a registry.
pub(crate) struct Source {
    pub(crate) reference: String,
    pub(crate) files: Vec<(String, Vec<u8>)>,
    _registry: Registry,
    _scratch: Scratch,
}

impl Source {
    pub(crate) fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        let layout = scratch.fresh_dir("layout")?;
        let mut writer = LayoutWriter::new(&layout)?;
        let mut files = Vec::new();
        for layer in 0..LAYERS {
            writer.layer(Compression::Gzip, |to| {
                let mut tar = Tarball::new(to);
                for file in 0..FILES {
                    let number = layer * FILES + file;
                    let twin = (number + TWINS).checked_sub(LAYERS * FILES);
                    let content = noise(FILE_SIZE, twin.unwrap_or(number) as u64);
                    let name = format!("{layer}-{file}");
                    tar.file(&name, &Meta::mode(0o644), &content)?;
                    files.push((name, content));
                }
                tar.finish()
            })?;
        }
        writer.finish(image::TAG, &["/none"])?;
        let reference = registry.reference("points:1");
        image::convert(&layout, &reference, &["--format", "estargz"])?;
        Ok(Self {
            reference,
            files,
            _registry: registry,
            _scratch: scratch,
        })
    }
}

/// A node whose daemon dies where it is told to.
pub(crate) struct World<'s> {
    pub(crate) source: &'s Source,
    pub(crate) mode: Mode,
    pub(crate) daemon: Daemon,
    pub(crate) containerd: Containerd,
    pub(crate) orders: Orders,
    /// Files that no process has read yet.
    unread: Mutex<VecDeque<usize>>,
    _relay: Relay,
    _scratch: Scratch,
}

/// The file that tells the daemon where to die.
pub(crate) struct Orders(pub(crate) PathBuf);

impl Orders {
    pub(crate) fn give(&self, points: &[&str]) -> Result<()> {
        let draft = self.0.with_extension("new");
        fs::write(&draft, points.join("\n"))?;
        Ok(fs::rename(draft, &self.0)?)
    }

    /// What has struck so far: the points, each with the process.
    pub(crate) fn struck(&self) -> Result<Vec<(String, u32)>> {
        let mut path = self.0.clone().into_os_string();
        path.push(".struck");
        let text = fs::read_to_string(path).unwrap_or_default();
        let parse = |line: &str| {
            let (point, process) = line.split_once(' ')?;
            Some((point.to_owned(), process.parse().ok()?))
        };
        let each = text.lines().map(|line| parse(line).context("half a line"));
        each.collect()
    }

    /// Waits until `points` have struck after the first `before`; returns the
    /// last process that died.
    pub(crate) fn wait(&self, before: usize, points: &[&str]) -> Result<u32> {
        let struck = wait_for(&format!("the daemon to reach {points:?}"), || {
            let struck = self.struck()?;
            Ok((struck.len() >= before + points.len()).then_some(struck))
        })?;
        for ((struck, _), point) in struck[before..].iter().zip(points) {
            let (name, _) = point.split_once(' ').unwrap_or((point, ""));
            ensure!(struck == name, "{struck} struck instead of {name}");
        }
        Ok(struck.last().context("nothing struck")?.1)
    }
}

/// A supervised daemon that obeys orders.
pub(crate) fn options(mode: Mode, orders: &Orders) -> Options {
    Options {
        mode: Some(mode),
        more: ON_DEMAND.to_owned(),
        supervised: true,
        crash_points: Some(orders.0.clone()),
        ..Options::default()
    }
}

impl<'s> World<'s> {
    pub(crate) fn start(source: &'s Source, mode: Mode) -> Result<Self> {
        let scratch = Scratch::new()?;
        let orders = Orders(scratch.path().join("orders"));
        let options = Options {
            // It is the relay that calls.
            containerd: Some(containerd::socket(&scratch, 0)),
            ..options(mode, &orders)
        };
        let daemon = Daemon::start(&scratch, &options)?;
        let relay = Relay::start(scratch.path().join("relay.sock"), daemon.socket())?;
        let sockets = [(SLUICE, relay.path().to_owned())];
        let containerd = Containerd::start_with_sockets(&scratch, &sockets)?;
        Ok(Self {
            source,
            mode,
            daemon,
            containerd,
            orders,
            unread: Mutex::default(),
            _relay: relay,
            _scratch: scratch,
        })
    }

    /// Does what makes the daemon pass `points`, one process after the other
    /// dying at each, and waits for the process that lives. Whoever caused it
    /// may have got an error.
    pub(crate) fn die(&self, points: &[&str], cause: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.orders.struck()?.len();
        self.orders.give(points)?;
        let outcome = cause();
        let dead = self
            .orders
            .wait(before, points)
            .with_context(|| format!("{outcome:?}; log:\n{}", self.daemon.log()))?;
        self.daemon.wait_until_ready(dead)?;
        Ok(())
    }

    /// The same; then everything has to agree.
    pub(crate) fn crash(&self, points: &[&str], cause: impl FnOnce() -> Result<()>) -> Result<()> {
        self.die(points, cause)?;
        self.agrees(false)
            .with_context(|| format!("after {points:?}; log:\n{}", self.daemon.log()))
    }

    /// The daemon stops, and the next one starts.
    pub(crate) fn restart(&self) -> Result<()> {
        let process = self.daemon.serving().context("no process")?;
        self.daemon.process().signal(Signal::HUP)?;
        self.daemon.wait_until_ready(process)?;
        Ok(())
    }

    /// That the daemon agrees with itself, and with containerd.
    pub(crate) fn agrees(&self, with_containerd: bool) -> Result<()> {
        let containerd = with_containerd.then_some((&self.containerd, SLUICE));
        // What is present is made durable whenever the time has come for it.
        let mut last = Ok(());
        for _ in 0..30 {
            last = check_agreement(&self.daemon, self.mode, containerd);
            match (&last, with_containerd) {
                (Ok(()), _) => return Ok(()),
                (Err(_), true) => self.collect()?,
                (Err(_), false) => std::thread::sleep(std::time::Duration::from_millis(20)),
            }
        }
        last
    }

    pub(crate) fn snapshots(&self, arguments: &[&str]) -> Result<()> {
        run(self
            .containerd
            .ctr()
            .args(["snapshots", "--snapshotter", SLUICE])
            .args(arguments))?;
        Ok(())
    }

    /// Has containerd remove what it no longer refers to, also what the daemon
    /// has and containerd never heard of.
    pub(crate) fn collect(&self) -> Result<()> {
        // A removal is what makes it look.
        self.snapshots(&["prepare", "passing"])?;
        self.snapshots(&["remove", "passing"])?;
        self.containerd.collect_garbage()
    }

    pub(crate) fn pull(&self) -> Result<()> {
        self.containerd.lazy_pull(&self.source.reference, SLUICE)?;
        *self.unread.lock().unwrap_or_else(PoisonError::into_inner) =
            (0..self.source.files.len()).collect();
        Ok(())
    }

    pub(crate) fn mount(&self) -> Result<PathBuf> {
        self.containerd.mount(&self.source.reference, SLUICE)
    }

    /// Reads a file that is not on the node yet.
    pub(crate) fn read(&self, root: &Path) -> Result<()> {
        let next = self
            .unread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        let number = next.context("all files were read")?;
        content::check(root, &self.source.files[number])
    }

    pub(crate) fn remove_image(&self) -> Result<()> {
        self.containerd.forget_images()
    }

    /// That nothing of any image is left, anywhere.
    pub(crate) fn is_empty(&self) -> Result<()> {
        self.agrees(true)?;
        for directory in ["layers", "snapshots", "m"] {
            let left = fs::read_dir(self.daemon.root().join(directory))?.count();
            ensure!(left == 0, "{left} left in {directory}");
        }
        Ok(())
    }

    /// The directory of an active snapshot.
    pub(crate) fn upper(&self, key: &str) -> Result<PathBuf> {
        let mounts = self.containerd.ctr_text(&[
            "snapshots",
            "--snapshotter",
            SLUICE,
            "mounts",
            "/nowhere",
            key,
        ])?;
        let upper = mounts.split(',').find_map(|o| o.strip_prefix("upperdir="));
        Ok(upper.context("no upper directory")?.into())
    }
}
