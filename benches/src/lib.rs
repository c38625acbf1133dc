//! Benchmarks and the demonstration: what they share.

pub mod rig;

use std::io::Read as _;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use sluice_tests::{Containerd, Link};

/// What the demo starts: the import of two large libraries, and a word when
/// it is done.
pub const PROGRAM: [&str; 3] = [
    "python3",
    "-c",
    "import numpy, pandas; print('numpy', numpy.__version__, 'pandas', pandas.__version__, flush=True)",
];

/// One start of a container, from the pull on.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Start {
    /// Until the pull was done.
    pub pull_seconds: f64,
    /// Until the program's first output, from the start of the pull.
    pub ready_seconds: f64,
    /// Bytes that came over the link until then.
    pub bytes: u64,
}

/// The median of at least one value; the upper one of two.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Runs a command to its end. Returns what `at` says when it writes its first
/// byte, or ends without one; whether it wrote any; and how it ended.
pub fn at_first_output<T>(
    command: &mut Command,
    at: impl FnOnce() -> T,
) -> Result<(T, bool, Output)> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut output = child.stdout.take().context("no standard output")?;
    let spoke = output.read(&mut [0])? == 1;
    let at = at();
    // Whatever else it writes must not block it.
    std::io::copy(&mut output, &mut std::io::sink())?;
    Ok((at, spoke, child.wait_with_output()?))
}

/// Pulls with one command and starts a container with another, which must
/// write something.
pub fn measure(link: &Link, pull: &mut Command, start: &mut Command) -> Result<Start> {
    // What was written before must not slow down what is measured.
    rustix::fs::sync();
    let bytes_before = link.received_bytes()?;
    let clock = Instant::now();
    sluice_tests::command::run(pull)?;
    let pull_seconds = clock.elapsed().as_secs_f64();

    let first = || (clock.elapsed().as_secs_f64(), link.received_bytes());
    let ((ready_seconds, received), spoke, rest) = at_first_output(start, first)?;
    let bytes = received? - bytes_before;
    if !rest.status.success() || !spoke {
        bail!(
            "the container ended with {}: {}",
            rest.status,
            String::from_utf8_lossy(&rest.stderr)
        );
    }
    Ok(Start {
        pull_seconds,
        ready_seconds,
        bytes,
    })
}

/// An ordinary pull and start, unpacked by containerd's overlayfs.
pub fn ordinary_start(link: &Link, containerd: &Containerd, reference: &str) -> Result<Start> {
    let mut pull = containerd.ctr();
    pull.args(["images", "pull", "--plain-http"])
        .args(["--snapshotter", "overlayfs", reference]);
    let mut start = containerd.run_command("overlayfs", reference, "ordinary", &PROGRAM);
    measure(link, &mut pull, &mut start)
}

/// A lazy pull and start.
pub fn lazy_start(link: &Link, containerd: &Containerd, reference: &str) -> Result<Start> {
    let mut pull = containerd.lazy_pull_command(reference, "sluice")?;
    let mut start = containerd.run_command("sluice", reference, "lazy", &PROGRAM);
    measure(link, &mut pull, &mut start)
}
