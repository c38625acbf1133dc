//! The shipped unit under a real systemd: one that manages this scratch
//! directory's service and nothing else of the machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use crate::command::{self, run, wait_for};
use crate::killer::signal;
use crate::programs;
use crate::scratch::{Process, Scratch};

/// The unit's name.
pub const UNIT: &str = "sluice-snapshotter.service";
const SHIPPED: &str = include_str!("../../systemd/sluice-snapshotter.service");

/// What becomes systemd: in a mount namespace of its own, where the machine
/// seems to have been booted by systemd, and in a control group of its own.
const BECOME_SYSTEMD: &str = r#"
set -e
scratch=$1
shift
# What other tests have mounted must not be held here. Their own file systems
# go with all that is in them, which nobody may look at: it may be served by
# nobody now.
for place in $(cut -d ' ' -f 5 /proc/self/mountinfo); do
    case $place in
        "$scratch" | "${scratch%/*}"/sluice-*/*) ;;
        "${scratch%/*}"/sluice-*)
            if mount --make-rprivate "$place"; then umount --lazy "$place" || true; fi ;;
    esac
done
mount --bind /run /run
mount --make-private /run
mkdir -p /run/systemd
mount -t tmpfs tmpfs /run/systemd
mkdir /run/systemd/system
for group in "$@"; do echo $$ > "$group/cgroup.procs"; done
exec /lib/systemd/systemd --user --log-target=console --log-level=notice
"#;

/// A systemd, as users have one each, that runs the unit.
pub struct Systemd {
    runtime: PathBuf,
    groups: Vec<PathBuf>,
    process: Process,
}

impl Systemd {
    /// Starts systemd, and the shipped unit with the configuration in `dir`
    /// for the one that it names. What the service logs goes to the log of
    /// systemd's process.
    pub fn start(scratch: &Scratch, dir: &Path) -> Result<Self> {
        // What the service mounts is to be seen here, as it is where all are
        // in one namespace.
        share(scratch.path())?;
        let runtime = dir.join("run");
        let units = dir.join("units");
        let drop_in = units.join("systemd/user").join(format!("{UNIT}.d"));
        fs::create_dir_all(&runtime)?;
        fs::create_dir_all(&drop_in)?;
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let log = scratch.dir("log")?.join(format!("{name}.log"));
        let unit = SHIPPED
            .replace(
                "/usr/local/bin/sluice-snapshotter",
                &programs::snapshotter()?.display().to_string(),
            )
            .replace(
                "/etc/sluice/config.toml",
                &dir.join("config.toml").display().to_string(),
            );
        fs::write(units.join("systemd/user").join(UNIT), unit)?;
        let log = format!(
            "[Service]\nStandardOutput=append:{log}\nStandardError=append:{log}\n\
             Environment=DOCKER_CONFIG=/nonexistent\n",
            log = log.display()
        );
        fs::write(drop_in.join("log.conf"), log)?;
        let unique = scratch.path().file_name().unwrap_or_default();
        let groups = control_groups(&format!("{}-{name}", unique.to_string_lossy()))?;
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "unchanged"])
            .args(["sh", "-c", BECOME_SYSTEMD, "systemd"])
            .arg(scratch.path())
            .args(&groups)
            .env("HOME", dir)
            .env("XDG_RUNTIME_DIR", &runtime)
            .env("XDG_CONFIG_HOME", &units)
            .env_remove("DBUS_SESSION_BUS_ADDRESS")
            .env_remove("NOTIFY_SOCKET");
        let process = scratch.spawn(&name, command)?;
        let systemd = Self {
            runtime,
            groups,
            process,
        };
        wait_for("systemd", || {
            ensure!(systemd.process.is_running(), "{}", systemd.process.log());
            Ok(systemd
                .runtime
                .join("systemd/private")
                .exists()
                .then_some(()))
        })?;
        systemd.control(&["start", UNIT])?;
        Ok(systemd)
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// What `systemctl` answers.
    pub fn control(&self, arguments: &[&str]) -> Result<String> {
        let mut systemctl = Command::new("systemctl");
        systemctl
            .arg("--user")
            .args(arguments)
            .env("XDG_RUNTIME_DIR", &self.runtime)
            .env_remove("DBUS_SESSION_BUS_ADDRESS");
        command::text(&mut systemctl).with_context(|| self.process.log())
    }

    /// A property of the unit.
    pub fn property(&self, name: &str) -> Result<String> {
        let shown = self.control(&["show", "--value", "--property", name, UNIT])?;
        Ok(shown.trim().to_owned())
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        if self.process.is_running() {
            let _ = self.process.kill();
        }
        for group in &self.groups {
            // Whoever was killed leaves it in a moment.
            let _ = wait_for("a control group to be empty", || {
                end_group(group);
                Ok((!group.exists()).then_some(()))
            });
        }
    }
}

/// Makes what is mounted below `dir` visible in namespaces that come from
/// this one, and the other way round.
fn share(dir: &Path) -> Result<()> {
    let shared = |command: &mut Command| run(command.arg("--make-shared").arg(dir));
    if shared(&mut Command::new("mount")).is_err() {
        run(Command::new("mount").arg("--bind").args([dir, dir]))?;
        shared(&mut Command::new("mount"))?;
    }
    Ok(())
}

/// A new control group below this process's own, in each hierarchy that
/// systemd uses.
fn control_groups(name: &str) -> Result<Vec<PathBuf>> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mounted = |kind: &str, option: &str| {
        let line = mounts.lines().find(|line| {
            let end = line.split_once(" - ").map_or("", |(_, end)| end);
            let mut fields = end.split(' ');
            fields.next() == Some(kind) && end.contains(option)
        })?;
        Some(PathBuf::from(line.split(' ').nth(4)?))
    };
    let mut groups = Vec::new();
    for line in own.lines() {
        let place = match line.splitn(3, ':').collect::<Vec<_>>()[..] {
            [_, "name=systemd", path] => mounted("cgroup", "name=systemd").map(|at| (at, path)),
            [_, "", path] => mounted("cgroup2", "").map(|at| (at, path)),
            _ => None,
        };
        if let Some((at, path)) = place {
            let group = at.join(path.trim_start_matches('/')).join(name);
            fs::create_dir(&group)
                .with_context(|| format!("cannot make the control group {}", group.display()))?;
            groups.push(group);
        }
    }
    ensure!(!groups.is_empty(), "there are no control groups: {own}");
    Ok(groups)
}

/// Kills all that are in a control group of ours, and removes it when they are
/// gone.
fn end_group(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            end_group(&entry.path());
        }
    }
    let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    for member in members.lines().filter_map(|line| line.parse().ok()) {
        let _ = signal(member, Signal::KILL);
    }
    let _ = fs::remove_dir(group);
}
