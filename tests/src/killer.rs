//! Kills the daemon at random moments, while it is under whatever load a test
//! puts on it.

use std::io::Read as _;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

use crate::daemon::Daemon;
use crate::image::Noise;

/// The moments, the same for the same seed.
pub struct Killer {
    random: Noise,
    longest: Duration,
    kills: u64,
}

impl Killer {
    /// One that waits up to `longest` before each kill.
    pub fn new(seed: u64, longest: Duration) -> Self {
        Self {
            random: Noise(seed),
            longest,
            kills: 0,
        }
    }

    /// Waits, kills the process of a supervised daemon that serves then
    /// (SIGKILL), and returns when the next one serves: with its number.
    pub fn strike(&mut self, daemon: &Daemon) -> Result<u32> {
        std::thread::sleep(self.pause()?);
        let process = daemon.serving().context("no process serves")?;
        signal(process, Signal::KILL)?;
        self.kills += 1;
        daemon.wait_for_next(process)
    }

    /// Strikes again and again while `go_on` says so.
    pub fn strike_while(&mut self, daemon: &Daemon, go_on: impl Fn() -> bool) -> Result<()> {
        while go_on() {
            self.strike(daemon)?;
        }
        Ok(())
    }

    /// How often it has killed.
    pub fn kills(&self) -> u64 {
        self.kills
    }

    fn pause(&mut self) -> Result<Duration> {
        let mut bytes = [0; 8];
        self.random.read_exact(&mut bytes)?;
        let part = u64::from_le_bytes(bytes) as f64 / u64::MAX as f64;
        Ok(self.longest.mul_f64(part))
    }
}

/// Sends a signal to a process by its number.
pub fn signal(process: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(process)?).context("no process")?;
    kill_process(pid, signal).with_context(|| format!("cannot signal process {process}"))
}
