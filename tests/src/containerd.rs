//! A containerd of one's own: Debian's, under its own root and socket.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use sluice_oci::Digest;

use crate::command::{attempt, run, text, wait_for};
use crate::daemon::Daemon;
use crate::scratch::{Process, Scratch};

/// The socket that the scratch directory's containerd of this number, from 0,
/// has, or will have.
pub fn socket(scratch: &Scratch, number: usize) -> PathBuf {
    socket_in(&scratch.path().join(format!("containerd-{number}")))
}

fn socket_in(dir: &Path) -> PathBuf {
    dir.join("containerd.sock")
}

/// A running containerd.
pub struct Containerd {
    dir: PathBuf,
    socket: PathBuf,
    namespace: String,
    process: Process,
    scratch: Scratch,
    mounts: AtomicU32,
}

impl Containerd {
    /// Without any snapshotter but its own.
    pub fn start(scratch: &Scratch) -> Result<Self> {
        Self::start_with(scratch, &[])
    }

    /// With daemons as proxy snapshotters, each under a name.
    pub fn start_with(scratch: &Scratch, snapshotters: &[(&str, &Daemon)]) -> Result<Self> {
        let sockets = snapshotters
            .iter()
            .map(|(name, daemon)| (*name, daemon.socket()));
        Self::start_with_sockets(scratch, &sockets.collect::<Vec<_>>())
    }

    /// With proxy snapshotters behind sockets, each under a name.
    pub fn start_with_sockets(scratch: &Scratch, snapshotters: &[(&str, PathBuf)]) -> Result<Self> {
        let dir = scratch.fresh_dir("containerd")?;
        let socket = socket_in(&dir);
        let mut config = format!(
            "version = 2\n\
             root = \"{root}\"\n\
             state = \"{state}\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\", \
             \"io.containerd.tracing.processor.v1.otlp\", \"io.containerd.internal.v1.tracing\"]\n\
             [grpc]\naddress = \"{socket}\"\n\
             [proxy_plugins]\n",
            root = dir.join("root").display(),
            state = dir.join("state").display(),
            socket = socket.display(),
        );
        for (name, socket) in snapshotters {
            config += &format!(
                "[proxy_plugins.{name}]\ntype = \"snapshot\"\naddress = \"{}\"\n",
                socket.display()
            );
        }
        fs::write(dir.join("config.toml"), config)?;
        let process = launch(scratch, &dir)?;
        let containerd = Self {
            dir,
            socket,
            // Control groups are named after it, so it is nobody else's.
            namespace: scratch
                .path()
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .replace('.', "-"),
            process,
            scratch: scratch.clone(),
            mounts: AtomicU32::new(0),
        };
        containerd.wait_until_it_answers()?;
        Ok(containerd)
    }

    fn wait_until_it_answers(&self) -> Result<()> {
        wait_for("containerd", || {
            if !self.process.is_running() {
                bail!("containerd ended: {}", self.process.log());
            }
            let answer = attempt(self.ctr().arg("version"))?;
            Ok(answer.status.success().then_some(()))
        })
    }

    /// Ends it and starts it again. Containers run on.
    pub fn restart(&mut self) -> Result<()> {
        self.process.stop()?;
        self.process = launch(&self.scratch, &self.dir)?;
        self.wait_until_it_answers()
    }

    /// Its gRPC socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The namespace that the harness works in.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its own directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// A `ctr` command towards it.
    pub fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(&self.socket)
            .args(["--namespace", &self.namespace]);
        command
    }

    /// Waits until containerd has connected to a snapshotter again: after a
    /// refused connection it takes its time. What it lists it may know by
    /// itself, so it is made to ask.
    pub fn wait_for_snapshotter(&self, name: &str) -> Result<()> {
        let snapshots = ["snapshots", "--snapshotter", name];
        wait_for("containerd to connect to the snapshotter", || {
            let made = attempt(self.ctr().args(snapshots).args(["prepare", "reachable"]))?;
            if made.status.success() {
                run(self.ctr().args(snapshots).args(["remove", "reachable"]))?;
            }
            Ok(made.status.success().then_some(()))
        })
    }

    /// Runs a `ctr` command and returns what it wrote.
    pub fn ctr_text(&self, arguments: &[&str]) -> Result<String> {
        text(self.ctr().args(arguments))
    }

    /// An ordinary pull, unpacked by a snapshotter.
    pub fn pull(&self, reference: &str, snapshotter: &str) -> Result<()> {
        run(self.ctr().args([
            "images",
            "pull",
            "--plain-http",
            "--snapshotter",
            snapshotter,
            reference,
        ]))?;
        Ok(())
    }

    /// A lazy pull, by the command of the product.
    pub fn lazy_pull(&self, reference: &str, snapshotter: &str) -> Result<()> {
        run(&mut self.lazy_pull_command(reference, snapshotter)?)?;
        Ok(())
    }

    /// The command of [`Self::lazy_pull`].
    pub fn lazy_pull_command(&self, reference: &str, snapshotter: &str) -> Result<Command> {
        self.lazy_pull_command_in(&self.namespace, reference, snapshotter)
    }

    /// The same, into another namespace.
    pub fn lazy_pull_command_in(
        &self,
        namespace: &str,
        reference: &str,
        snapshotter: &str,
    ) -> Result<Command> {
        let mut command = crate::programs::sluice_command()?;
        command
            .args(["pull", "--plain-http", "--snapshotter", snapshotter])
            .arg("--containerd")
            .arg(&self.socket)
            .args(["--namespace", namespace])
            .arg(reference);
        Ok(command)
    }

    /// Mounts a pulled image, read-only, and returns where. (`ctr images
    /// mount` of containerd 1.6 knows the default snapshotter alone.)
    pub fn mount(&self, reference: &str, snapshotter: &str) -> Result<PathBuf> {
        let number = self.mounts.fetch_add(1, Ordering::Relaxed);
        let dir = self.scratch.dir(&format!("image-{number}-{snapshotter}"))?;
        let key = dir.display().to_string();
        let top = self.top_snapshot(reference)?;
        let snapshots = ["snapshots", "--snapshotter", snapshotter];
        wait_for("a view that the collector leaves alone", || {
            run(self.ctr().args(snapshots).args(["view", &key, &top]))?;
            // Until it has this label, the collector may take it.
            let root = ["label", &key, "containerd.io/gc.root=tests"];
            let kept = attempt(self.ctr().args(snapshots).args(root))?;
            Ok(kept.status.success().then_some(()))
        })?;
        // It prints the mount command, target included.
        let command = text(self.ctr().args(snapshots).args(["mounts", &key, &key]))?;
        run(Command::new("sh").args(["-c", &command]))?;
        Ok(dir)
    }

    /// Pulls an image as usual, for containerd's overlayfs to show what others
    /// are compared with, and mounts it. The image goes again: a conversion with
    /// the same diff IDs would wait until it is known to be the same.
    pub fn yardstick(&self, reference: &str) -> Result<PathBuf> {
        self.pull(reference, "overlayfs")?;
        let dir = self.mount(reference, "overlayfs")?;
        self.ctr_text(&["images", "remove", reference])?;
        Ok(dir)
    }

    /// Unmounts what [`Self::mount`] mounted.
    pub fn unmount(&self, dir: &Path) -> Result<()> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let snapshotter = name.splitn(3, '-').nth(2).context("not mounted here")?;
        // A process that another thread starts has our files open for a moment.
        wait_for("nobody to use the mount", || {
            let unmounted = attempt(Command::new("umount").arg(dir))?;
            let why = String::from_utf8_lossy(&unmounted.stderr);
            ensure!(unmounted.status.success() || why.contains("busy"), "{why}");
            Ok(unmounted.status.success().then_some(()))
        })?;
        run(self
            .ctr()
            .args(["snapshots", "--snapshotter", snapshotter, "remove"])
            .arg(dir))?;
        Ok(())
    }

    /// Bytes and inodes of a snapshot alone, as containerd tells the kubelet.
    pub fn usage(&self, key: &str, snapshotter: &str) -> Result<(u64, u64)> {
        let usage = [
            "snapshots",
            "--snapshotter",
            snapshotter,
            "usage",
            "-b",
            key,
        ];
        let table = self.ctr_text(&usage)?;
        let mut words = table.split_whitespace().rev();
        let mut number = || words.next()?.parse::<u64>().ok();
        let (inodes, bytes) = (number(), number());
        bytes.zip(inodes).with_context(|| table.clone())
    }

    /// The name of an image's topmost snapshot: its chain ID.
    pub fn top_snapshot(&self, reference: &str) -> Result<String> {
        let list = self.ctr_text(&["images", "list", &format!("name=={reference}")])?;
        let digest = list
            .split_whitespace()
            .find(|word| word.starts_with("sha256:"))
            .with_context(|| format!("containerd has no image {reference}"))?;
        let mut document: Value = self.document(digest)?;
        if let Some(manifests) = document["manifests"].as_array() {
            let here = manifests.iter().find(|manifest| {
                let digest = manifest["digest"].as_str().unwrap_or_default();
                self.ctr_text(&["content", "get", digest]).is_ok()
            });
            let here = here.context("no manifest of the index was pulled")?;
            document = self.document(here["digest"].as_str().unwrap_or_default())?;
        }
        let config = document["config"]["digest"].as_str().unwrap_or_default();
        let config = self.document(config)?;
        let diff_ids = config["rootfs"]["diff_ids"].as_array();
        let mut chain = String::new();
        for diff_id in diff_ids.context("the configuration has no diff IDs")? {
            let diff_id = diff_id.as_str().context("a diff ID is no string")?;
            chain = match chain.is_empty() {
                true => diff_id.to_owned(),
                false => Digest::of(format!("{chain} {diff_id}").as_bytes()).to_string(),
            };
        }
        Ok(chain)
    }

    fn document(&self, digest: &str) -> Result<Value> {
        let text = self.ctr_text(&["content", "get", digest])?;
        serde_json::from_str(&text).with_context(|| format!("{digest} is no JSON"))
    }

    /// The command that runs a program in a new container, in the foreground.
    pub fn run_command(
        &self,
        snapshotter: &str,
        reference: &str,
        id: &str,
        program: &[&str],
    ) -> Command {
        let mut command = self.ctr();
        command
            .args(["run", "--rm", "--snapshotter", snapshotter, reference, id])
            .args(program);
        command
    }

    /// Has what nothing refers to removed, and waits for it. Until something
    /// else is removed, no other collection follows.
    pub fn collect_garbage(&self) -> Result<()> {
        self.ctr_text(&["leases", "create", "--id", "collected"])?;
        self.ctr_text(&["leases", "delete", "--sync", "collected"])?;
        Ok(())
    }

    /// Removes every image and waits until nothing of them is left, so that
    /// the next pull starts from nothing.
    pub fn forget_images(&self) -> Result<()> {
        let images = self.ctr_text(&["images", "list", "--quiet"])?;
        for image in images.lines() {
            self.ctr_text(&["images", "remove", "--sync", image])?;
        }
        Ok(())
    }
}

fn launch(scratch: &Scratch, dir: &Path) -> Result<Process> {
    let mut command = Command::new("containerd");
    command.arg("--config").arg(dir.join("config.toml"));
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    scratch.spawn(&name, command)
}
