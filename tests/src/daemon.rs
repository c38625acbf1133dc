//! The daemon under test, `sluice-snapshotter serve`.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::command::wait_for;
use crate::scratch::{Process, Scratch};
use crate::systemd::Systemd;

/// How layers are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// By the kernel's EROFS over one file a layer.
    Erofs,
    /// As a tree served through FUSE.
    Fuse,
}

impl Mode {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Erofs, Self::Fuse];

    /// As the configuration and `--mode` spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Fuse => "fuse",
        }
    }
}

/// Lines of TOML with which nothing is fetched but what is read, to which others
/// of the section `fetch` may be added.
pub const ON_DEMAND: &str = "[prefetch]\nenabled = false\n[background]\nenabled = false\n\
                             [fetch]\nread_ahead_mib = 0\n";

/// What differs between one daemon and another.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The mount mode, or what the probe finds.
    pub mode: Option<Mode>,
    /// Registries spoken to without TLS, beyond loopback.
    pub plain_http: Vec<String>,
    /// The socket of the containerd that uses it, when it is told and has not
    /// to find out.
    pub containerd: Option<PathBuf>,
    /// More lines of TOML, after everything else.
    pub more: String,
    /// Run by `supervise`, which is then the process.
    pub supervised: bool,
    /// Run by a systemd of its own, which is then the process, as the unit
    /// says that is shipped.
    pub systemd: bool,
    /// The program, when it is not the one just built.
    pub program: Option<PathBuf>,
    /// Its limit of file descriptors, soft and hard, when it is not our own.
    pub descriptors: Option<(u64, u64)>,
    /// Whether it logs all that it can.
    pub traced: bool,
    /// The file that arms its crash points; then the program is the one that
    /// has some.
    pub crash_points: Option<PathBuf>,
    /// Where its layers are, when that is elsewhere than below its root.
    pub layers: Option<PathBuf>,
    /// Where all of its root is, when that is elsewhere than beside its
    /// configuration.
    pub root: Option<PathBuf>,
}

const DOCKER_CONFIG: &str = "docker.json";
const HOSTS_DIR: &str = "certs.d";

/// A daemon with its own root and socket.
pub struct Daemon {
    scratch: Scratch,
    dir: PathBuf,
    options: Options,
    process: Process,
    systemd: Option<Systemd>,
}

impl Daemon {
    /// Starts one and waits until it answers.
    pub fn start(scratch: &Scratch, options: &Options) -> Result<Self> {
        let dir = scratch.fresh_dir("sluice")?;
        let config = config(&dir, options);
        fs::write(dir.join("config.toml"), config)?;
        if let Some(root) = &options.root {
            std::os::unix::fs::symlink(root, dir.join("root"))?;
        }
        if let Some(layers) = &options.layers {
            fs::create_dir(dir.join("root"))?;
            std::os::unix::fs::symlink(layers, dir.join("root/layers"))?;
        }
        let systemd = match options.systemd {
            true => Some(Systemd::start(scratch, &dir)?),
            false => None,
        };
        let process = match &systemd {
            Some(systemd) => systemd.process().clone(),
            None => launch(scratch, &dir, Self::command(&dir, options)?)?,
        };
        Ok(Self {
            systemd,
            scratch: scratch.clone(),
            dir,
            options: options.clone(),
            process,
        })
    }

    /// The command that starts the daemon whose files are in `dir`.
    fn command(dir: &Path, options: &Options) -> Result<Command> {
        let program = match (&options.program, &options.crash_points) {
            (Some(program), _) => program.clone(),
            (None, Some(_)) => crate::programs::crashing_snapshotter()?,
            (None, None) => crate::programs::snapshotter()?,
        };
        let mut command = match options.descriptors {
            Some((soft, hard)) => {
                let mut limited = Command::new("prlimit");
                limited.arg(format!("--nofile={soft}:{hard}")).arg(program);
                limited
            }
            None => Command::new(program),
        };
        if let Some(file) = &options.crash_points {
            command.env(sluice_snapshotter::crash_points::FILE, file);
        }
        if options.supervised {
            command.args(["supervise", "--"]);
        }
        command
            .arg("serve")
            .arg("--config")
            .arg(dir.join("config.toml"))
            .env("DOCKER_CONFIG", "/nonexistent");
        if options.traced {
            command.env("RUST_LOG", "trace");
        }
        Ok(command)
    }

    /// The gRPC socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("snapshotter.sock")
    }

    /// Its root directory.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Where it looks for credentials. There are none at first.
    pub fn docker_config(&self) -> PathBuf {
        self.dir.join(DOCKER_CONFIG)
    }

    /// Where it looks for a registry's `hosts.toml`. There is none at first.
    pub fn hosts_dir(&self) -> PathBuf {
        self.dir.join(HOSTS_DIR)
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The systemd that runs it.
    pub fn systemd(&self) -> Result<&Systemd> {
        self.systemd.as_ref().context("no systemd runs it")
    }

    /// Everything that it has logged, over all its lives.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Ends it in good order.
    pub fn stop(&self) -> Result<()> {
        let status = self.process.stop()?;
        if !status.success() {
            bail!("the daemon ended with {status}: {}", self.log());
        }
        Ok(())
    }

    /// Starts it again after [`Self::stop`] or a kill.
    pub fn start_again(&mut self) -> Result<()> {
        self.process = launch(
            &self.scratch,
            &self.dir,
            Self::command(&self.dir, &self.options)?,
        )?;
        Ok(())
    }

    /// The number of the process that serves, or served last.
    pub fn serving(&self) -> Option<u32> {
        let lock = fs::read_to_string(self.root().join("lock")).ok()?;
        lock.trim().parse().ok()
    }

    /// Waits until another process than `former`, of those that `supervise`
    /// starts, has come to the end of its start.
    pub fn wait_until_ready(&self, former: u32) -> Result<u32> {
        wait_for("the next process to be ready", || {
            if !self.process.is_running() {
                bail!("{} ended: {}", self.dir.display(), self.log());
            }
            let next = self.serving().filter(|next| *next != former);
            let is_ready = |next: &u32| self.log().contains(&format!("process {next} is ready"));
            Ok(next.filter(is_ready))
        })
    }

    /// Waits until another process than `former` serves.
    pub fn wait_for_next(&self, former: u32) -> Result<u32> {
        wait_for("the next process", || {
            if !self.process.is_running() {
                bail!("{} ended: {}", self.dir.display(), self.log());
            }
            let next = self.serving().filter(|next| *next != former);
            Ok(next.filter(|_| UnixStream::connect(self.socket()).is_ok()))
        })
    }
}

fn config(dir: &Path, options: &Options) -> String {
    let hosts: Vec<_> = options
        .plain_http
        .iter()
        .map(|host| format!("{host:?}"))
        .collect();
    let mut text = format!(
        "root = {:?}\naddress = {:?}\n\
         [registry]\nplain_http = [{}]\nconfig_path = {:?}\n",
        dir.join("root"),
        dir.join("snapshotter.sock"),
        hosts.join(", "),
        dir.join(HOSTS_DIR),
    );
    // A test may have a file of its own.
    if !options.more.contains("docker_config") {
        text += &format!("docker_config = {:?}\n", dir.join(DOCKER_CONFIG));
    }
    if let Some(containerd) = &options.containerd {
        text += &format!("[containerd]\naddress = {containerd:?}\n");
    }
    if let Some(mode) = options.mode {
        text += &format!("[mount]\nmode = {:?}\n", mode.name());
    }
    text + &options.more
}

fn launch(scratch: &Scratch, dir: &Path, command: Command) -> Result<Process> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let process = scratch.spawn(&name, command)?;
    wait_for("sluice-snapshotter", || {
        if !process.is_running() {
            bail!("sluice-snapshotter ended: {}", process.log());
        }
        Ok(UnixStream::connect(dir.join("snapshotter.sock")).ok())
    })?;
    Ok(process)
}
