//! The node under test: registry, link, containerd, and a daemon for each way
//! of knowing what a workload will read.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Serialize;
use sluice_tests::command::{run, text};
use sluice_tests::daemon::Options;
use sluice_tests::{Containerd, Daemon, Process, Registry, Scratch};

use super::link::{Link, Shape, Transfer};
use crate::at_first_output;

/// Snapshotter of a daemon that knows no profiles.
pub const PLAIN: &str = "sluice-plain";
/// Snapshotter of a daemon that uses and records profiles.
pub const PROFILED: &str = "sluice";

/// See the module.
pub struct Node {
    /// Where it all is.
    pub scratch: Scratch,
    /// In a network namespace of its own, at the far end.
    pub registry: Registry,
    /// What pulls go through.
    pub link: Link,
    plain: Daemon,
    profiled: Daemon,
    /// With both daemons.
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
    /// The daemon's resident memory at its highest, in KiB.
    pub daemon_peak_kib: u64,
    /// What was asked for and when it came.
    #[serde(skip)]
    pub transfers: Vec<Transfer>,
}

impl Node {
    /// Starts everything, with a link that is not shaped yet.
    pub fn start() -> Result<Self> {
        let scratch = Scratch::new()?;
        let namespace = sluice_tests::Link::new(&scratch)?;
        let registry = Registry::start_behind(&scratch, &namespace)?;
        let upstream: SocketAddr = registry.host().parse()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let link = runtime.block_on(Link::start(upstream, UNSHAPED))?;
        let daemon = |more: &str| {
            let options = Options {
                more: format!("[background]\nenabled = false\n{more}"),
                ..Options::default()
            };
            Daemon::start(&scratch, &options)
        };
        let plain = daemon("[profiles]\nrecord = false\nattached = false\n")?;
        let profiled = daemon("")?;
        let containerd =
            Containerd::start_with(&scratch, &[(PLAIN, &plain), (PROFILED, &profiled)])?;
        let mut events = Command::new("ctr");
        events
            .arg("--address")
            .arg(containerd.socket())
            .arg("events");
        let events = scratch.spawn("events", events)?;
        Ok(Self {
            scratch,
            registry,
            link,
            plain,
            profiled,
            containerd,
            events,
            _runtime: runtime,
        })
    }

    /// The daemon behind a snapshotter's name.
    pub fn daemon(&self, snapshotter: &str) -> Option<&Daemon> {
        match snapshotter {
            PLAIN => Some(&self.plain),
            PROFILED => Some(&self.profiled),
            _ => None,
        }
    }

    /// Has the daemon that knows profiles forget what it knows of attached
    /// ones.
    pub fn restart(&mut self) -> Result<()> {
        self.profiled.stop()?;
        self.profiled.start_again()?;
        self.containerd.wait_for_snapshotter(PROFILED)
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
    /// the other snapshotters lazily.
    pub fn pull_and_start(
        &self,
        image: &str,
        snapshotter: &str,
        program: &[&str],
        shape: Shape,
    ) -> Result<Start> {
        let reference = self.reference(image);
        let mut pull = match snapshotter {
            "overlayfs" => {
                let mut pull = self.containerd.ctr();
                pull.args(["images", "pull", "--plain-http", "--snapshotter"])
                    .args([snapshotter, &reference]);
                pull
            }
            _ => self.containerd.lazy_pull_command(&reference, snapshotter)?,
        };
        let daemon = self.daemon(snapshotter);
        // What was written before must not slow down what is measured.
        rustix::fs::sync();
        let cpu = daemon.map_or(Ok(0.0), processor_seconds)?;
        self.link.reset(shape);
        let clock = Clock::start()?;
        run(&mut pull)?;
        let pulled = clock.elapsed();
        let (phases, bytes, transfers) = self.run(&reference, snapshotter, program, &clock)?;
        Ok(Start {
            phases: Phases { pulled, ..phases },
            bytes,
            requests: transfers.len(),
            daemon_cpu: daemon.map_or(Ok(0.0), processor_seconds)? - cpu,
            daemon_peak_kib: daemon.map_or(Ok(0), peak_kib)?,
            transfers,
        })
    }

    /// Starts a program in an image that is on the node.
    pub fn start_again(&self, image: &str, snapshotter: &str, program: &[&str]) -> Result<f64> {
        let clock = Clock::start()?;
        let (phases, ..) = self.run(&self.reference(image), snapshotter, program, &clock)?;
        Ok(phases.ready)
    }

    fn run(
        &self,
        reference: &str,
        snapshotter: &str,
        program: &[&str],
        clock: &Clock,
    ) -> Result<(Phases, u64, Vec<Transfer>)> {
        let id = format!("start-{}", clock.since_epoch.as_nanos());
        let events = self.events.log().len();
        let mut command = self
            .containerd
            .run_command(snapshotter, reference, &id, program);
        // A program that says nothing is ready with its end.
        let first = || (clock.elapsed(), self.link.bytes(), self.link.transfers());
        let (first, _, rest) = at_first_output(&mut command, first)?;
        let (ready, bytes, transfers) = first;
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
        let phases = Phases {
            pulled: 0.0,
            mounted,
            started,
            ready: ready.max(started),
        };
        Ok((phases, bytes, transfers))
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
}

const DAY: f64 = 86_400.0;

impl Clock {
    fn start() -> Result<Self> {
        Ok(Self {
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

/// User and system time of the process that serves.
fn processor_seconds(daemon: &Daemon) -> Result<f64> {
    let pid = daemon.serving().context("the daemon does not serve")?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
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

fn peak_kib(daemon: &Daemon) -> Result<u64> {
    let pid = daemon.serving().context("the daemon does not serve")?;
    let status = text(Command::new("grep").args(["VmHWM", &format!("/proc/{pid}/status")]))?;
    let kib = status.split_whitespace().nth(1).context("no VmHWM")?;
    Ok(kib.parse()?)
}
