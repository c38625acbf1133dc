//! Converting a large image with `sluice convert` against `ctr-remote image
//! convert` at its defaults: time and size, as ratios of one run.
//!
//! `cargo run --release -p sluice-benches --bin conversion -- --help`; as
//! root, on a machine that does nothing else. A table goes to standard error,
//! JSON to standard output.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Parser;
use serde::Serialize;
use sluice_tests::command::{run, text};
use sluice_tests::image::{self, read_manifest};
use sluice_tests::programs::sluice_command;
use sluice_tests::tools::{Target, ctr_remote_convert};
use sluice_tests::{Containerd, Registry, Scratch};

/// Converting a large image, against ctr-remote.
#[derive(Debug, Parser)]
struct Arguments {
    /// Conversions by each program; the fastest counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// One program's result.
#[derive(Debug, Clone, Copy, Serialize)]
struct Figures {
    seconds: f64,
    layer_bytes: u64,
}

/// One format.
#[derive(Debug, Serialize)]
struct Comparison {
    format: &'static str,
    ctr_remote: Figures,
    sluice: Figures,
    /// How many times the throughput.
    throughput: f64,
    /// Size of the layers, as a part of what ctr-remote makes of them.
    size: f64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let scratch = Scratch::new()?;
    let image = image::scientific()?;
    let registry = Registry::start(&scratch)?;
    let containerd = Containerd::start(&scratch)?;
    let source = registry.push(image.layout(), image::TAG, "scientific:original")?;
    run(containerd
        .ctr()
        .args(["content", "fetch", "--plain-http", &source]))?;
    eprintln!(
        "{} bytes of layers, each program from and to local content",
        image.layer_bytes()?
    );
    eprintln!(
        "{:<14}{:>12}{:>12}{:>12}{:>10}",
        "format", "ctr-remote", "sluice", "throughput", "size"
    );
    let mut results = Vec::new();
    for (format, target) in [
        ("estargz", Target::Estargz),
        ("zstd-chunked", Target::ZstdChunked),
    ] {
        let theirs = fastest(arguments.rounds, |round| {
            // A name and a content store's entries of its own each time:
            // what is there already would not be converted again.
            let result = registry.reference(&format!("ctr-remote:{format}-{round}"));
            let mut command = ctr_remote_convert(&containerd, &source, target, &result)?;
            let seconds = time(&mut command)?;
            run(containerd
                .ctr()
                .args(["images", "push", "--plain-http", &result]))?;
            let manifest = registry.manifest(&result)?;
            let layer_bytes = manifest.layers.iter().map(|layer| layer.size).sum();
            run(containerd.ctr().args(["images", "rm", "--sync", &result]))?;
            Ok(Figures {
                seconds,
                layer_bytes,
            })
        })?;
        let ours = fastest(arguments.rounds, |_| {
            let layout = scratch.fresh_dir("out")?;
            let mut command = sluice_command()?;
            command
                .args(["convert", "--format", format])
                .arg(image.source())
                .arg(format!("oci:{}:{}", layout.display(), image::TAG));
            let seconds = time(&mut command)?;
            let manifest = read_manifest(&layout)?;
            let layer_bytes = manifest.layers.iter().map(|layer| layer.size).sum();
            std::fs::remove_dir_all(layout)?;
            Ok(Figures {
                seconds,
                layer_bytes,
            })
        })?;
        let comparison = Comparison {
            format,
            ctr_remote: theirs,
            sluice: ours,
            throughput: theirs.seconds / ours.seconds,
            size: ours.layer_bytes as f64 / theirs.layer_bytes as f64,
        };
        eprintln!(
            "{format:<14}{:>10.1} s{:>10.1} s{:>11.1}x{:>10.3}",
            theirs.seconds, ours.seconds, comparison.throughput, comparison.size
        );
        results.push(comparison);
    }
    println!("{}", serde_json::to_string_pretty(&results)?);
    Ok(())
}

/// How long a command takes, with the disks quiet before.
fn time(command: &mut Command) -> Result<f64> {
    rustix::fs::sync();
    let clock = Instant::now();
    text(command)?;
    Ok(clock.elapsed().as_secs_f64())
}

fn fastest(rounds: u32, mut once: impl FnMut(u32) -> Result<Figures>) -> Result<Figures> {
    let mut best: Option<Figures> = None;
    for round in 0..rounds {
        let figures = once(round)?;
        if best.is_none_or(|best| figures.seconds < best.seconds) {
            best = Some(figures);
        }
    }
    best.context("no round was made")
}
