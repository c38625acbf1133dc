//! How long a layer of many files takes until it is mounted, how many
//! requests that costs, and how much memory the daemon holds afterwards.
//!
//! `cargo run --release -p sluice-benches --bin mounting -- --help`; as root,
//! on a machine that does nothing else. A table goes to standard error, JSON to
//! standard output.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use serde_json::json;
use sluice_oci::Descriptor;
use sluice_tests::daemon::Options;
use sluice_tests::image::{Compression, LayoutWriter, Meta, Tarball};
use sluice_tests::proxy::Proxy;
use sluice_tests::{Daemon, Registry, Scratch, Snapshots};

/// Mounting a layer of many files.
#[derive(Parser)]
struct Arguments {
    /// Files of the layer
    #[arg(long, default_value_t = 100_000)]
    files: usize,
    /// Bytes of each
    #[arg(long, default_value_t = 400)]
    file_size: usize,
    /// Rounds, each with a daemon of its own; medians are told
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let layout = scratch.path().join("layout");
    write_image(&arguments, &layout)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let mut report = Vec::new();
    for format in ["estargz", "zstd-chunked"] {
        let reference = registry.reference(&format!("many:{format}"));
        let mut convert = sluice_tests::programs::sluice_command()?;
        convert
            .args(["convert", "--format", format])
            .arg(format!("oci:{}", layout.display()))
            .arg(&reference);
        sluice_tests::command::run(&mut convert)?;
        let layer = layer_of(&registry, &reference)?;

        let mut rounds = Vec::new();
        for round in 0..arguments.rounds {
            eprintln!("{format}: round {} of {}", round + 1, arguments.rounds);
            rounds.push(runtime.block_on(mount_once(&scratch, &reference, &layer))?);
        }
        let requests = runtime.block_on(count_requests(&scratch, &registry, format, &layer))?;
        let median = |of: fn(&Round) -> f64| {
            let mut values: Vec<f64> = rounds.iter().map(of).collect();
            values.sort_by(f64::total_cmp);
            (
                values[0],
                values[values.len() / 2],
                values[values.len() - 1],
            )
        };
        let (ready, mounted) = (median(|r| r.ready_ms), median(|r| r.mounted_ms));
        let memory = median(|r| r.resident_mib);
        eprintln!(
            "{format:12}  ready {:.0} ms ({:.0}-{:.0})  container's mount {:.1} ms  requests \
             {requests}  resident {:.1} MiB ({:.1}-{:.1})",
            ready.1, ready.0, ready.2, mounted.1, memory.1, memory.0, memory.2
        );
        report.push(json!({
            "format": format,
            "files": arguments.files,
            "ready_ms": ready.1,
            "container_mount_ms": mounted.1,
            "requests": requests,
            "resident_mib": memory.1,
        }));
    }
    println!("{:#}", json!(report));
    Ok(())
}

fn write_image(arguments: &Arguments, dir: &Path) -> Result<()> {
    let mut layout = LayoutWriter::new(dir)?;
    layout.layer(Compression::Gzip, |to| {
        let mut tar = Tarball::new(to);
        let mut content = vec![b'x'; arguments.file_size];
        for index in 0..arguments.files {
            if index % 100 == 0 {
                tar.dir(&format!("d{:05}", index / 100), &Meta::mode(0o755))?;
            }
            for (byte, digit) in content.iter_mut().zip(index.to_string().bytes()) {
                *byte = digit;
            }
            let name = format!("d{:05}/some-file-name-{index:06}.py", index / 100);
            tar.file(&name, &Meta::mode(0o644), &content)?;
        }
        tar.finish()
    })?;
    layout.finish("latest", &[])
}

fn layer_of(registry: &Registry, reference: &str) -> Result<Descriptor> {
    let manifest = registry.manifest(reference)?;
    manifest.layers.into_iter().next().context("no layer")
}

/// What one round measured.
struct Round {
    /// From the request to serve the layer until it is ready to be mounted.
    ready_ms: f64,
    /// From the request for a container's snapshot until its mounts are known.
    mounted_ms: f64,
    /// Afterwards.
    resident_mib: f64,
}

async fn mount_once(scratch: &Scratch, reference: &str, layer: &Descriptor) -> Result<Round> {
    // Nothing that the layer does not need: what is fetched in the background
    // would be counted as the mount's.
    let daemon = Daemon::start(
        scratch,
        &Options {
            more: "[background]\nenabled = false\n".to_owned(),
            ..Options::default()
        },
    )?;
    let client = Snapshots::connect(&daemon).await?;
    rustix::fs::sync();

    let clock = Instant::now();
    let served = client.serve(CHAIN_ID, "", reference, layer).await;
    let ready_ms = clock.elapsed().as_secs_f64() * 1000.0;
    served.with_context(|| daemon.log())?;
    let clock = Instant::now();
    let mounts = client.prepare("container", CHAIN_ID).await?;
    let mounted_ms = clock.elapsed().as_secs_f64() * 1000.0;
    ensure!(mounts.len() == 1, "{mounts:?}");
    let resident_mib = daemon.process().resident_bytes()? as f64 / f64::from(1 << 20);
    daemon.stop()?;
    Ok(Round {
        ready_ms,
        mounted_ms,
        resident_mib,
    })
}

/// Requests until the layer is mounted, counted by a proxy.
async fn count_requests(
    scratch: &Scratch,
    registry: &Registry,
    format: &str,
    layer: &Descriptor,
) -> Result<usize> {
    let proxy = Proxy::start(registry.host())?;
    let reference = proxy.reference(&format!("many:{format}"));
    mount_once(scratch, &reference, layer).await?;
    Ok(proxy.seen().len())
}

/// Any name does; this is not an image that somebody pulled.
const CHAIN_ID: &str = "sha256:bench";
