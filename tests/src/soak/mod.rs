//! A node under everything at once, for as long as one likes: containers come
//! and go, images are pulled and removed, the network fails, one daemon dies
//! and is replaced again and again, while the other lives through it all.

mod images;
mod tally;
mod work;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::command::wait_for;
use crate::daemon::{Daemon, Mode, Options};
use crate::figures::{self, Figures};
use crate::proxy::Proxy;
use crate::{Containerd, Registry, Scratch};

pub use images::SoakImage;
pub use tally::Tally;

/// Threads that start containers.
const STARTERS: usize = 2;
/// Content that the layers of a node may keep, in MiB: less than the images
/// have, so that some is evicted.
const QUOTA_MIB: u64 = 4;

/// What a daemon may hold more at the end than after the first round: what
/// is open towards containerd and the registry at that moment, and pages that
/// the allocator keeps.
const MORE_DESCRIPTORS: usize = 12;
const MORE_THREADS: usize = 8;
const MORE_MEMORY: u64 = 16 << 20;
/// The database grows in steps and keeps what it had.
const MORE_DISK: u64 = 4 << 20;

/// The node, and what is counted on it.
pub struct Soak {
    containerd: Containerd,
    daemons: [Daemon; 2],
    proxy: Proxy,
    images: Vec<SoakImage>,
    tally: Tally,
    stop: AtomicBool,
    _registry: Registry,
    _scratch: Scratch,
}

/// As containerd knows the daemon of a mode.
fn snapshotter(mode: Mode) -> &'static str {
    mode.name()
}

impl Soak {
    /// Two daemons, one for each mode, both under `supervise`, and images in a
    /// registry behind a proxy.
    pub fn start() -> Result<Self> {
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        let proxy = Proxy::start(registry.host())?;
        let images = images::make(&scratch, &registry, &proxy, STARTERS)?;
        let start = |mode| {
            let options = Options {
                mode: Some(mode),
                supervised: true,
                more: format!(
                    "[background]\ndelay_seconds = 1\n[cache]\nlimit_mib = {QUOTA_MIB}\n"
                ),
                ..Options::default()
            };
            Daemon::start(&scratch, &options)
        };
        let daemons = [start(Mode::Erofs)?, start(Mode::Fuse)?];
        let named = Mode::ALL.map(snapshotter);
        let named: Vec<_> = named.into_iter().zip(&daemons).collect();
        Ok(Self {
            containerd: Containerd::start_with(&scratch, &named)?,
            daemons,
            proxy,
            images,
            tally: Tally::default(),
            stop: AtomicBool::new(false),
            _registry: registry,
            _scratch: scratch,
        })
    }

    fn daemon(&self, mode: Mode) -> &Daemon {
        match mode {
            Mode::Erofs => &self.daemons[0],
            Mode::Fuse => &self.daemons[1],
        }
    }

    fn process(&self, mode: Mode) -> Result<u32> {
        self.daemon(mode).serving().context("no process serves")
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Half of the time one daemon is disturbed and the other is not, then the
    /// other way round. Prints what happened, and fails when anything did that
    /// must not.
    pub fn run(&self, duration: Duration) -> Result<()> {
        for mode in Mode::ALL {
            self.phase(mode, duration / 2)?;
        }
        println!("{}", self.tally);
        self.tally.check()
    }

    fn phase(&self, disturbed: Mode, duration: Duration) -> Result<()> {
        let end = Instant::now() + duration;
        // One round of everything first: what is made once is no leak.
        for starter in 0..STARTERS {
            self.round(starter)?;
        }
        self.replace(disturbed)?;
        self.clear()?;
        let before = Mode::ALL.map(|mode| self.figures(mode));
        let lasting = Mode::ALL.map(|mode| self.process(mode));
        self.stop.store(false, Ordering::Relaxed);
        std::thread::scope(|scope| -> Result<()> {
            let mut workers: Vec<_> = (0..STARTERS)
                .map(|starter| scope.spawn(move || self.start_containers(starter)))
                .collect();
            workers.extend(Mode::ALL.map(|mode| scope.spawn(move || self.read(mode))));
            workers.push(scope.spawn(|| self.break_the_network()));
            workers.push(scope.spawn(move || self.disturb(disturbed)));
            while Instant::now() < end && !workers.iter().any(|worker| worker.is_finished()) {
                std::thread::sleep(Duration::from_millis(50));
            }
            self.stop.store(true, Ordering::Relaxed);
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().expect("a worker panicked"))
        })
        .with_context(|| self.logs())?;
        self.proxy.heal();
        self.clear()?;
        for ((mode, before), process) in Mode::ALL.into_iter().zip(before).zip(lasting) {
            self.compare(mode, before?)?;
            // The other one has lived through all of it.
            ensure!(
                (self.process(mode)? == process?) == (mode != disturbed),
                "{}",
                self.logs()
            );
        }
        Ok(())
    }

    fn figures(&self, mode: Mode) -> Result<Figures> {
        Figures::of(self.process(mode)?, &self.daemon(mode).root())
    }

    /// Waits until no more is held than before; connections and idle threads
    /// take a moment to go.
    fn compare(&self, mode: Mode, before: Figures) -> Result<()> {
        let name = mode.name();
        let supervisor = self.daemon(mode).process().pid();
        let mut last = String::new();
        wait_for("everything to be given back", || {
            let after = self.figures(mode)?;
            last = format!("{name} at the start: {before}\n{name} at the end:   {after}");
            let bounded = after.mounts == before.mounts
                && after.inodes == before.inodes
                && after.descriptors <= before.descriptors + MORE_DESCRIPTORS
                && after.threads <= before.threads + MORE_THREADS
                && after.memory <= before.memory + MORE_MEMORY
                && after.disk <= before.disk + MORE_DISK;
            Ok(bounded.then_some(()))
        })
        .with_context(|| last.clone())
        .with_context(|| self.logs())?;
        println!("{last}");
        let kept = figures::descriptors(supervisor)?;
        println!("{name}, its supervisor: {kept} descriptors");
        // Three of its own, two sockets, and two for the mount.
        ensure!(kept <= 16, "{kept} descriptors");
        Ok(())
    }

    fn logs(&self) -> String {
        let logs = self.daemons.each_ref().map(Daemon::log);
        let tails = logs.each_ref().map(|log| {
            let lines: Vec<_> = log.lines().collect();
            lines[lines.len().saturating_sub(60)..].join("\n")
        });
        format!("{}\n{}", self.tally, tails.join("\n---\n"))
    }
}
