//! Containers by runc alone, where hundreds of shims would cost more than what
//! they are to show.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::command::{run, show};
use crate::scratch::Scratch;

/// Where the containers of one test are.
pub struct Runc {
    dir: PathBuf,
}

/// A container that was started.
pub struct Container {
    id: String,
    dir: PathBuf,
    process: u32,
}

impl Runc {
    /// No container yet.
    pub fn new(scratch: &Scratch) -> Result<Self> {
        let dir = scratch.fresh_dir("runc")?;
        fs::create_dir(dir.join("shared"))?;
        Ok(Self { dir })
    }

    /// A directory that all containers see as `/shared`.
    pub fn shared(&self) -> PathBuf {
        self.dir.join("shared")
    }

    fn command(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.dir.join("state"));
        command
    }

    /// Starts a program in a container whose root `mount` mounts on an empty
    /// directory, and returns when the program runs.
    pub fn start(
        &self,
        id: &str,
        program: &[&str],
        mount: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Container> {
        let dir = self.dir.join(id);
        let root = dir.join("rootfs");
        fs::create_dir_all(&root)?;
        mount(&root)?;
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": program,
                "env": ["PATH=/usr/bin:/bin"],
                "cwd": "/",
            },
            "root": {"path": "rootfs"},
            "mounts": [
                // runc itself needs it to start the program.
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/shared", "source": self.shared(), "options": ["bind", "ro"]},
            ],
            "linux": {
                "cgroupsPath": format!("/sluice-tests/{}-{id}", std::process::id()),
                "namespaces": [{"type": "pid"}, {"type": "mount"}],
            },
        });
        fs::write(dir.join("config.json"), serde_json::to_vec(&config)?)?;
        let (output, pid_file) = (File::create(dir.join("output"))?, dir.join("pid"));
        let mut command = self.command();
        command
            .args(["run", "--detach", "--bundle"])
            .arg(&dir)
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(id)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let container = Container {
            id: id.to_owned(),
            process: 0,
            dir,
        };
        let status = command.status()?;
        ensure!(
            status.success(),
            "{} ended with {status}: {}",
            show(&command),
            container.output()?
        );
        let process = fs::read_to_string(&pid_file)?.trim().parse()?;
        Ok(Container {
            process,
            ..container
        })
    }

    /// Ends a container and unmounts its root.
    pub fn remove(&self, container: &Container) -> Result<()> {
        run(self.command().args(["delete", "--force", &container.id]))?;
        let root = container.dir.join("rootfs");
        rustix::mount::unmount(&root, rustix::mount::UnmountFlags::empty())
            .with_context(|| format!("cannot unmount {}", root.display()))
    }
}

impl Container {
    /// What it wrote so far.
    pub fn output(&self) -> Result<String> {
        Ok(fs::read_to_string(self.dir.join("output"))?)
    }

    /// Whether its program still runs.
    pub fn is_alive(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process));
        status.is_ok_and(|status| !status.contains("State:\tZ"))
    }
}
