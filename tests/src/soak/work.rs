//! What the threads of a soak do.

use std::fs::File;
use std::io::Read as _;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::Advice;
use rustix::process::{Pid, Signal, kill_process};

use super::images::CHECK;
use super::{Soak, Tally, snapshotter};
use crate::command::{attempt, wait_for};
use crate::daemon::Mode;
use crate::proxy::{Fault, Rule};

/// What a failed call says when a container could not read its files, in
/// contrast to a call that came while a daemon was away.
const BROKEN: [&str; 4] = [
    "sha256sum",
    "FAILED",
    "Input/output error",
    "input/output error",
];

/// Numbers without a pattern, the same in every run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % bound
    }

    fn pause(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

impl Soak {
    /// Starts containers of the starter's own images, until the end.
    pub(super) fn start_containers(&self, starter: usize) -> Result<()> {
        while self.goes_on() {
            self.round(starter)?;
        }
        Ok(())
    }

    /// Pulls each of the starter's images, runs containers of it in each mode,
    /// and removes it.
    pub(super) fn round(&self, starter: usize) -> Result<()> {
        for image in &self.images[1 + 2 * starter..][..2] {
            for mode in Mode::ALL {
                let name = snapshotter(mode);
                let reference = &image.reference;
                self.until_done("pull", || {
                    self.containerd.lazy_pull_command(reference, name)
                })?;
                for _ in 0..2 {
                    let id = format!("c{}", self.tally.ids());
                    let run = || {
                        // A failed attempt may have left something of that name.
                        self.discard(&id, name)?;
                        Ok(self.containerd.run_command(name, reference, &id, &CHECK))
                    };
                    self.until_done("run", run)?;
                    Tally::count(&self.tally.starts);
                }
            }
            self.until_done("remove", || {
                let mut remove = self.containerd.ctr();
                remove.args(["images", "remove", "--sync", &image.reference]);
                Ok(remove)
            })?;
            Tally::count(&self.tally.images);
        }
        Ok(())
    }

    /// Does what may fail while a daemon is away, until it does not. What
    /// shows that a container could not read is noted as a failure.
    fn until_done(&self, what: &str, mut command: impl FnMut() -> Result<Command>) -> Result<()> {
        let mut last = String::new();
        wait_for(what, || {
            let output = attempt(&mut command()?)?;
            if output.status.success() {
                return Ok(Some(()));
            }
            last = String::from_utf8_lossy(&output.stdout).into_owned();
            last += &String::from_utf8_lossy(&output.stderr);
            if BROKEN.iter().any(|broken| last.contains(broken)) {
                self.tally.fail(last.clone());
            }
            Tally::count(&self.tally.again);
            Ok(None)
        })
        .with_context(|| last)
    }

    /// Removes what there may be of a container.
    fn discard(&self, id: &str, snapshotter: &str) -> Result<()> {
        let ctr = |arguments: &[&str]| attempt(self.containerd.ctr().args(arguments));
        ctr(&["tasks", "delete", "--force", id])?;
        ctr(&["containers", "delete", id])?;
        ctr(&["snapshots", "--snapshotter", snapshotter, "remove", id])?;
        Ok(())
    }

    /// Reads the image that stays, as a container that stays would, and
    /// compares every byte.
    pub(super) fn read(&self, mode: Mode) -> Result<()> {
        let image = &self.images[0];
        let name = snapshotter(mode);
        self.until_done("pull", || {
            self.containerd.lazy_pull_command(&image.reference, name)
        })?;
        let root = wait_for("a mount", || {
            Ok(self.containerd.mount(&image.reference, name).ok())
        })?;
        while self.goes_on() {
            for (name, content) in &image.files {
                let path = root.join(name);
                let read = || -> Result<()> {
                    let mut file = File::open(&path)?;
                    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
                    let mut read = Vec::with_capacity(content.len());
                    file.read_to_end(&mut read)?;
                    ensure!(read == *content, "wrong bytes");
                    Ok(())
                };
                match read() {
                    Ok(()) => Tally::count(&self.tally.reads),
                    Err(error) => self.tally.fail(format!("{}: {error:#}", path.display())),
                }
            }
            // Others have to get at the processor, too.
            std::thread::sleep(Duration::from_millis(20));
        }
        wait_for("the unmount", || Ok(self.containerd.unmount(&root).ok()))
    }

    /// One fault of the network after the other, with good times in between.
    pub(super) fn break_the_network(&self) -> Result<()> {
        let mut chance = Chance(0x5eed);
        let mut outages = 0;
        while self.goes_on() {
            let times = 1 + chance.below(3);
            let fault = match chance.below(8) {
                0 => Fault::Status(503, ""),
                1 => Fault::Status(429, "Retry-After: 1\r\n"),
                2 => Fault::Close,
                3 => Fault::Reset(chance.below(20_000)),
                4 => Fault::Truncate(chance.below(20_000)),
                5 => Fault::Slow(Duration::from_millis(20)),
                6 => Fault::Delay(Duration::from_millis(500)),
                _ => {
                    self.proxy.down();
                    std::thread::sleep(chance.pause(100, 1_000));
                    self.proxy.up()?;
                    outages += 1;
                    continue;
                }
            };
            self.proxy
                .schedule(Rule::new(fault).on("/blobs/").ranged().times(times));
            std::thread::sleep(chance.pause(200, 1_500));
            self.proxy.heal();
        }
        self.tally.note_faults(&self.proxy.struck(), outages);
        Ok(())
    }

    /// Kills a daemon again and again, or has it replaced in good order.
    pub(super) fn disturb(&self, mode: Mode) -> Result<()> {
        let mut chance = Chance(0xdead);
        let mut number = 0_u64;
        while self.goes_on() {
            number += 1;
            if number.is_multiple_of(3) {
                self.replace(mode)?;
                Tally::count(&self.tally.upgrades);
            } else {
                let process = self.process(mode)?;
                let pid = Pid::from_raw(i32::try_from(process)?).context("no process")?;
                kill_process(pid, Signal::KILL)?;
                self.daemon(mode).wait_for_next(process)?;
                Tally::count(&self.tally.kills);
            }
            std::thread::sleep(chance.pause(500, 5_000));
        }
        Ok(())
    }

    /// Has a daemon replaced by a new process in good order.
    pub(super) fn replace(&self, mode: Mode) -> Result<()> {
        let process = self.process(mode)?;
        self.daemon(mode).process().signal(Signal::HUP)?;
        self.daemon(mode).wait_for_next(process)?;
        Ok(())
    }

    /// Removes all containers and images, and waits until nothing of them is
    /// left on the node.
    pub(super) fn clear(&self) -> Result<()> {
        for mode in Mode::ALL {
            self.containerd.wait_for_snapshotter(snapshotter(mode))?;
        }
        for id in self
            .containerd
            .ctr_text(&["containers", "list", "--quiet"])?
            .lines()
        {
            for mode in Mode::ALL {
                self.discard(id, snapshotter(mode))?;
            }
        }
        for mode in Mode::ALL {
            // Views whose mount was interrupted; they keep their layers.
            let list = ["snapshots", "--snapshotter", snapshotter(mode), "list"];
            let list = self.containerd.ctr_text(&list)?;
            let keys = list.lines().filter_map(|line| line.split(' ').next());
            for key in keys.filter(|key| key.starts_with('/')) {
                self.discard(key, snapshotter(mode))?;
            }
        }
        wait_for("nothing to be left", || {
            // Every removal makes containerd look for what is left over.
            let _ = self.containerd.forget_images();
            let mut left = 0;
            for mode in Mode::ALL {
                let root = self.daemon(mode).root();
                left += std::fs::read_dir(root.join("layers"))?.count();
                left += std::fs::read_dir(root.join("snapshots"))?.count();
            }
            if left > 0 {
                self.collect()?;
            }
            Ok((left == 0).then_some(()))
        })
    }

    /// Makes containerd look for what nothing refers to: it does after a
    /// removal only.
    fn collect(&self) -> Result<()> {
        let image = &self.images[0].reference;
        let name = snapshotter(Mode::Erofs);
        attempt(&mut self.containerd.lazy_pull_command(image, name)?)?;
        self.containerd.forget_images()
    }
}
