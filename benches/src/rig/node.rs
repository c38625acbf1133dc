//! The node under test: registry, link, containerd, and a daemon or several.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use sluice_layer::Profile;
use sluice_tests::command::{attempt, run};
use sluice_tests::daemon::Options;
use sluice_tests::figures::{forget_peak, memory};
use sluice_tests::tls::trust;
use sluice_tests::{Containerd, Daemon, Process, Registry, Scratch, programs};

use super::front::{Front, Protocol};
use super::link::{Link, Shape, Transfer};
use crate::at_first_output;

/// Snapshotter of a daemon as it comes, but for the background download, which
/// would be counted as the start's.
pub const SLUICE: &str = "sluice";
/// The configuration that has no such download.
pub const NO_DOWNLOAD: &str = "[background]\nenabled = false\n";

/// See the module.
pub struct Node {
    /// Where it all is.
    pub scratch: Scratch,
    /// In a network namespace of its own, at the far end.
    pub registry: Registry,
    front: Front,
    /// Where clients find whom to trust, if the registry speaks TLS.
    hosts: Option<PathBuf>,
    /// What pulls go through.
    pub link: Link,
    /// By the names of their snapshotters.
    daemons: Vec<(&'static str, Daemon)>,
    /// With all daemons.
    pub containerd: Containerd,
    events: Process,
    _runtime: tokio::runtime::Runtime,
}

/// Where a start's time went, in seconds from the start of the pull.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Phases {
    /// The pull was done.
    pub pulled: f64,
    /// The container's root was mounted.
    pub mounted: f64,
    /// Its first instruction ran.
    pub started: f64,
    /// The program had done what it is measured by.
    pub ready: f64,
}

/// One start.
#[derive(Debug, Clone, Serialize)]
pub struct Start {
    /// When what was done.
    pub phases: Phases,
    /// Bytes over the link until then.
    pub bytes: u64,
    /// Requests until then.
    pub requests: usize,
    /// Seconds of processor time that the daemon took.
    pub daemon_cpu: f64,
    /// Those that the whole machine took until the program was ready: with
    /// registry and link, containerd, and the program itself.
    pub busy: f64,
    /// The daemon's resident memory at its highest since the pull began, in
    /// KiB.
    pub daemon_peak_kib: u64,
    /// When the container's snapshot was asked for; what is recorded counts
    /// from there. 0 where no daemon was asked.
    pub prepared: f64,
    /// What was asked for and when it came.
    #[serde(skip)]
    pub transfers: Vec<Transfer>,
}

impl Node {
    /// Starts everything, with a link that is not shaped yet and the one daemon
    /// of [`SLUICE`].
    pub fn start(protocol: Protocol) -> Result<Self> {
        Self::start_with(&[(SLUICE, NO_DOWNLOAD)], protocol)
    }

    /// With daemons by the names of their snapshotters, each with lines of its
    /// own in its configuration.
    pub fn start_with(daemons: &[(&'static str, &str)], protocol: Protocol) -> Result<Self> {
        let scratch = Scratch::new()?;
        let namespace = sluice_tests::Link::new(&scratch)?;
        let registry = Registry::start_behind(&scratch, &namespace)?;
        let front = Front::start(&scratch, &namespace, &registry, protocol)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let link = runtime.block_on(Link::start(front.address(), UNSHAPED))?;
        let start = |&(name, more): &(&'static str, &str)| {
            let options = Options {
                more: more.to_owned(),
                ..Options::default()
            };
            Ok((name, Daemon::start(&scratch, &options)?))
        };
        let daemons: Vec<_> = daemons.iter().map(start).collect::<Result<_>>()?;
        let mut hosts = None;
        if let Some(authority) = front.authority() {
            let own = scratch.fresh_dir("hosts")?;
            let trusting = daemons.iter().map(|(_, daemon)| daemon.hosts_dir());
            for dir in trusting.chain([own.clone()]) {
                trust(&dir, &link.host(), authority)?;
            }
            hosts = Some(own);
        }
        let snapshotters: Vec<_> = daemons.iter().map(|(name, d)| (*name, d)).collect();
        let containerd = Containerd::start_with(&scratch, &snapshotters)?;
        let mut events = Command::new("ctr");
        events
            .arg("--address")
            .arg(containerd.socket())
            .arg("events");
        let events = scratch.spawn("events", events)?;
        Ok(Self {
            scratch,
            registry,
            front,
            hosts,
            link,
            daemons,
            containerd,
            events,
            _runtime: runtime,
        })
    }

    /// The daemon behind a snapshotter's name.
    pub fn daemon(&self, snapshotter: &str) -> Option<&Daemon> {
        let mut all = self.daemons.iter();
        Some(&all.find(|(name, _)| *name == snapshotter)?.1)
    }

    /// Has a daemon forget what it knows of links, and of profiles in the
    /// registry.
    pub fn restart(&mut self, snapshotter: &str) -> Result<()> {
        let mut all = self.daemons.iter_mut();
        let found = all.find(|(name, _)| *name == snapshotter);
        let daemon = &mut found.context("no such daemon")?.1;
        daemon.stop()?;
        daemon.start_again()?;
        self.containerd.wait_for_snapshotter(snapshotter)
    }

    /// Puts a profile in the place of what the daemon of [`SLUICE`] knows of an
    /// image, or has it know none.
    pub fn set_profile(&self, image: &str, profile: Option<&Path>) -> Result<()> {
        let reference = self.reference(image);
        match profile {
            Some(file) => run(self.profile_command("import")?.arg(reference).arg(file)),
            // It may know none already.
            None => attempt(self.profile_command("clear")?.arg(reference)),
        }?;
        Ok(())
    }

    /// What the start before read. Removes all images: with its layers ends
    /// the recording.
    pub fn take_recording(&self, image: &str) -> Result<Option<Profile>> {
        self.set_profile(image, None)?;
        self.forget()?;
        let mut export = self.profile_command("export")?;
        let exported = attempt(export.arg(self.reference(image)))?;
        self.set_profile(image, None)?;
        match exported.status.success() {
            true => Ok(Some(Profile::parse(&exported.stdout)?)),
            false => Ok(None),
        }
    }

    /// `sluice profile <command>` towards the daemon of [`SLUICE`].
    fn profile_command(&self, name: &str) -> Result<Command> {
        let daemon = self.daemon(SLUICE).context("no daemon uses profiles")?;
        let mut command = programs::sluice_command()?;
        command
            .args(["profile", name, "--address"])
            .arg(daemon.socket());
        Ok(command)
    }

    /// Converts an image into the registry.
    pub fn convert(&self, source: &str, name: &str, format: &str, more: &[String]) -> Result<()> {
        run(programs::sluice_command()?
            .args(["convert", "--plain-http", "--format", format])
            .args(more)
            .arg(source)
            .arg(self.registry.reference(name)))?;
        Ok(())
    }

    /// Runs a program in an image to its end and writes down what it reads.
    pub fn record(&self, image: &str, program: &[&str], to: &Path) -> Result<()> {
        self.link.reset(UNSHAPED);
        let mut record = self.record_command(SLUICE, image, to)?;
        run(record.args(program))?;
        Ok(())
    }

    /// The command that does, without the program.
    pub fn record_command(&self, snapshotter: &str, image: &str, to: &Path) -> Result<Command> {
        let daemon = self.daemon(snapshotter).context("no such daemon")?;
        let mut record = programs::sluice_command()?;
        record
            .args(["profile", "record", "--plain-http", "--output"])
            .arg(to)
            .args(["--snapshotter", snapshotter, "--containerd"])
            .arg(self.containerd.socket())
            .args(["--namespace", self.containerd.namespace()])
            .arg("--address")
            .arg(daemon.socket())
            .args(self.hosts_arguments())
            .arg(self.reference(image))
            .arg("--");
        Ok(record)
    }

    /// A reference to an image of the registry, through the link.
    pub fn reference(&self, image: &str) -> String {
        format!("{}/{image}", self.link.host())
    }

    /// Removes all images, so that the next pull starts from nothing.
    pub fn forget(&self) -> Result<()> {
        self.containerd.forget_images()
    }

    /// Pulls an image and starts a program in it. `overlayfs` pulls as usual,
    /// the other snapshotters lazily, by daemons that do not know the link.
    pub fn pull_and_start(
        &mut self,
        image: &str,
        snapshotter: &str,
        program: &[&str],
        shape: Shape,
    ) -> Result<Start> {
        if self.daemon(snapshotter).is_some() {
            self.restart(snapshotter)?;
        }
        let reference = self.reference(image);
        let mut pull = self.pull_command(&reference, snapshotter)?;
        let daemon = self.daemon(snapshotter);
        // What was written before must not slow down what is measured.
        rustix::fs::sync();
        let process = daemon.map(serving).transpose()?;
        process.map_or(Ok(()), forget_peak)?;
        let cpu = process.map_or(Ok(0.0), processor_seconds)?;
        self.link.reset(shape);
        self.front.forget()?;
        let clock = Clock::start()?;
        run(&mut pull)?;
        let pulled = clock.elapsed();
        let mut start = self.run(&reference, snapshotter, program, &clock)?;
        start.phases.pulled = pulled;
        start.daemon_cpu = process.map_or(Ok(0.0), processor_seconds)? - cpu;
        start.daemon_peak_kib = process.map_or(Ok(0), |id| memory(id, "VmHWM"))? >> 10;
        Ok(start)
    }

    /// Starts a program in an image that is on the node.
    pub fn start_again(&self, image: &str, snapshotter: &str, program: &[&str]) -> Result<f64> {
        let clock = Clock::start()?;
        let start = self.run(&self.reference(image), snapshotter, program, &clock)?;
        Ok(start.phases.ready)
    }

    /// Pulls an image once more that is on the node, and starts a program in it:
    /// seconds until that is ready.
    pub fn pull_and_start_again(
        &self,
        image: &str,
        snapshotter: &str,
        program: &[&str],
    ) -> Result<f64> {
        let reference = self.reference(image);
        let mut pull = self.pull_command(&reference, snapshotter)?;
        rustix::fs::sync();
        let clock = Clock::start()?;
        run(&mut pull)?;
        let start = self.run(&reference, snapshotter, program, &clock)?;
        Ok(start.phases.ready)
    }

    fn pull_command(&self, reference: &str, snapshotter: &str) -> Result<Command> {
        if snapshotter != "overlayfs" {
            let mut pull = self.containerd.lazy_pull_command(reference, snapshotter)?;
            pull.args(self.hosts_arguments());
            return Ok(pull);
        }
        let mut pull = self.containerd.ctr();
        pull.args(["images", "pull", "--snapshotter", snapshotter]);
        match &self.hosts {
            Some(_) => pull.args(self.hosts_arguments()),
            None => pull.arg("--plain-http"),
        };
        pull.arg(reference);
        Ok(pull)
    }

    /// What tells a client whom to trust.
    fn hosts_arguments(&self) -> impl Iterator<Item = &OsStr> {
        let hosts = self.hosts.iter();
        hosts.flat_map(|dir| [OsStr::new("--hosts-dir"), dir.as_os_str()])
    }

    fn run(
        &self,
        reference: &str,
        snapshotter: &str,
        program: &[&str],
        clock: &Clock,
    ) -> Result<Start> {
        let id = format!("start-{}", clock.since_epoch.as_nanos());
        let events = self.events.log().len();
        let mut command = self
            .containerd
            .run_command(snapshotter, reference, &id, program);
        // A program that says nothing is ready with its end.
        let first = || {
            let (elapsed, busy) = (clock.elapsed(), busy_seconds());
            let transfers = self.link.transfers();
            // What is sent by TLS the link does not see.
            let requests = match self.hosts {
                Some(_) => self.front.requests(),
                None => Ok(transfers.len()),
            };
            (elapsed, busy, self.link.bytes(), requests, transfers)
        };
        let (first, _, rest) = at_first_output(&mut command, first)?;
        let (ready, busy, bytes, requests, transfers) = first;
        ensure!(
            rest.status.success(),
            "{program:?} in {reference} ended with {}: {}\n{}",
            rest.status,
            String::from_utf8_lossy(&rest.stderr),
            self.daemon(snapshotter)
                .map(Daemon::log)
                .unwrap_or_default()
        );
        let at = |topic: &str| -> Result<f64> {
            let log = self.events.log();
            let line = log[events..]
                .lines()
                .find(|line| line.contains(topic) && line.contains(&id))
                .with_context(|| format!("containerd told nothing of {topic} of {id}"))?;
            clock.position_of(line)
        };
        let (mounted, started) = (at("/tasks/create")?, at("/tasks/start")?);
        Ok(Start {
            phases: Phases {
                pulled: 0.0,
                mounted,
                started,
                ready: ready.max(started),
            },
            bytes,
            requests: requests?,
            daemon_cpu: 0.0,
            busy: busy? - clock.busy,
            daemon_peak_kib: 0,
            prepared: at("/snapshot/prepare")?,
            transfers,
        })
    }
}

/// So fast that it does not count.
pub const UNSHAPED: Shape = Shape {
    mbit: 100_000,
    round_trip_ms: 0,
};

/// Seconds since a moment, also by containerd's wall clock.
struct Clock {
    instant: Instant,
    since_epoch: std::time::Duration,
    /// Processor time that had been taken by then.
    busy: f64,
}

const DAY: f64 = 86_400.0;

impl Clock {
    fn start() -> Result<Self> {
        Ok(Self {
            busy: busy_seconds()?,
            instant: Instant::now(),
            since_epoch: SystemTime::now().duration_since(UNIX_EPOCH)?,
        })
    }

    fn elapsed(&self) -> f64 {
        self.instant.elapsed().as_secs_f64()
    }

    /// Of an event that begins `2026-01-31 12:34:56.789 +0000 UTC`.
    fn position_of(&self, event: &str) -> Result<f64> {
        let time = event.split(' ').nth(1).unwrap_or_default();
        let mut seconds = 0.0;
        for part in time.split(':') {
            let Ok(part) = part.parse::<f64>() else {
                bail!("no time in '{event}'");
            };
            seconds = seconds * 60.0 + part;
        }
        let start = self.since_epoch.as_secs_f64() % DAY;
        Ok((seconds - start).rem_euclid(DAY))
    }
}

fn serving(daemon: &Daemon) -> Result<u32> {
    daemon.serving().context("the daemon does not serve")
}

/// User and system time of a process.
pub fn processor_seconds(process: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // After the name in parentheses: fields 14 and 15, in ticks of 10 ms.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .context("no process name")?
        .1
        .split_whitespace()
        .collect();
    let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / 100.0)
}

/// Processor time since the machine was booted in which it was not idle.
fn busy_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    // Of all processors, in ticks of 10 ms: "cpu", user, nice, system, idle,
    // waiting for disks, interrupts of two kinds, what the hypervisor took.
    let all = stat.lines().next().unwrap_or_default();
    let ticks = all.split_whitespace().skip(1).take(8).map(str::parse);
    let ticks: Vec<f64> = ticks.collect::<Result<_, _>>()?;
    let [_, _, _, idle, waiting, ..] = ticks[..] else {
        bail!("no processor times in '{all}'");
    };
    Ok((ticks.iter().sum::<f64>() - idle - waiting) / 100.0)
}
