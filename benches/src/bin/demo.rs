//! `make demo`: starts a container from a large image over a slow link, once
//! after an ordinary pull and once lazily.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use serde::Serialize;
use sluice_benches::{Start, lazy_start, ordinary_start};
use sluice_tests::daemon::{Mode, Options};
use sluice_tests::link::Shape;
use sluice_tests::{
    Containerd, Daemon, Link, Registry, Scratch, command, image, programs, scratch,
};

/// Starts a container from a large image over a slow link, once after an
/// ordinary pull and once lazily.
#[derive(Debug, Parser)]
struct Arguments {
    /// The link's rate in Mbit/s
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// The link's one-way delay in milliseconds (needs netem in the kernel)
    #[arg(long, default_value_t = 0)]
    delay: u32,
    /// The layer format: estargz or zstd-chunked
    #[arg(long, default_value = "estargz")]
    format: String,
    /// The mount mode: erofs or fuse; what the node can do if not given
    #[arg(long)]
    mode: Option<String>,
}

/// The figures, as written to `target/demo.json`.
#[derive(Serialize)]
struct Figures {
    ordinary: Start,
    lazy: Start,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if scratch::interrupted() => loop {
            // Another thread is cleaning up and ends the process.
            std::thread::park();
        },
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("it mounts, makes network namespaces and runs containers: run it as root");
    }
    let mode = match arguments.mode.as_deref() {
        None => None,
        Some("erofs") => Some(Mode::Erofs),
        Some("fuse") => Some(Mode::Fuse),
        Some(other) => bail!("--mode {other}: there are erofs and fuse"),
    };
    let scratch = Scratch::new()?;
    eprintln!("Everything runs in {}.", scratch.path().display());

    eprintln!("Making an image with a scientific Python (kept for the next time) ...");
    let clock = Instant::now();
    let scientific = image::scientific()?;
    let size = scientific.layer_bytes()?;
    eprintln!(
        "  {} in {:.0} s",
        megabytes(size),
        clock.elapsed().as_secs_f64()
    );

    eprintln!("Starting a registry at the far end of a link, containerd and the snapshotter ...");
    let link = Link::new(&scratch)?;
    let registry = Registry::start_behind(&scratch, &link)?;
    let options = Options {
        mode,
        plain_http: vec![registry.host().to_owned()],
        ..Options::default()
    };
    let daemon = Daemon::start(&scratch, &options)?;
    let containerd = Containerd::start_with(&scratch, &[("sluice", &daemon)])?;

    eprintln!(
        "Pushing the image as it is, converting it to {} and pushing that ...",
        arguments.format
    );
    let original = registry.push(scientific.layout(), image::TAG, "scientific:original")?;
    let converted = registry.reference("scientific:lazy");
    let clock = Instant::now();
    command::run(
        programs::sluice_command()?
            .args(["convert", "--plain-http", "--format", &arguments.format])
            .arg(scientific.source())
            .arg(&converted),
    )?;
    eprintln!("  converted in {:.1} s", clock.elapsed().as_secs_f64());

    link.shape(Shape {
        rate_mbit: arguments.rate,
        delay_ms: arguments.delay,
    })?;
    eprintln!(
        "The link now has {} Mbit/s. An ordinary pull and start ...",
        arguments.rate
    );
    let ordinary = ordinary_start(&link, &containerd, &original)?;
    // What has the same diff IDs would be compared with it first.
    containerd.forget_images()?;
    eprintln!("A lazy pull and start ...");
    let lazy = lazy_start(&link, &containerd, &converted)
        .with_context(|| format!("the snapshotter's log:\n{}", daemon.log()))?;

    print_table(arguments, size, &ordinary, &lazy);
    let file = programs::target_dir().join("demo.json");
    std::fs::write(
        &file,
        serde_json::to_string_pretty(&Figures { ordinary, lazy })? + "\n",
    )
    .with_context(|| format!("cannot write {}", file.display()))?;
    eprintln!("The figures are in {}.", file.display());
    Ok(())
}

fn print_table(arguments: &Arguments, size: u64, ordinary: &Start, lazy: &Start) {
    println!();
    println!(
        "An image of {}, over {} Mbit/s, to the output of `import numpy, pandas`:",
        megabytes(size),
        arguments.rate
    );
    println!();
    println!(
        "{:<16} {:>10} {:>14} {:>13}",
        "", "pull", "first output", "transferred"
    );
    for (name, start) in [("ordinary", ordinary), ("lazy", lazy)] {
        println!(
            "{name:<16} {:>8.2} s {:>12.2} s {:>13}",
            start.pull_seconds,
            start.ready_seconds,
            megabytes(start.bytes)
        );
    }
    println!(
        "{:<16} {:>10.3} {:>14.3} {:>13.3}",
        "lazy / ordinary",
        lazy.pull_seconds / ordinary.pull_seconds,
        lazy.ready_seconds / ordinary.ready_seconds,
        ratio(lazy.bytes, ordinary.bytes)
    );
    println!();
}

#[allow(clippy::cast_precision_loss)]
fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b as f64
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", ratio(bytes, 1_000_000))
}
