//! `sluice mount`: looking into an image without pulling it.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use sluice_oci::{Manifest, Platform};
use sluice_registry::Client;
use sluice_snapshotter::node::Mode;
use sluice_snapshotter::standalone::{ImageMount, Options};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::{Mount, MountMode};
use crate::pull::choose;
use crate::registry;

/// How often it is looked whether the image is still mounted, or no longer in
/// use.
const LOOK: Duration = Duration::from_millis(500);

/// Runs it.
pub(crate) async fn run(args: Mount) -> anyhow::Result<ExitCode> {
    let mut stop = Stop::new()?;
    let image = tokio::select! {
        image = mount(&args) => image?,
        () = stop.wanted() => bail!("interrupted; nothing is mounted"),
    };
    // What goes wrong while the image is mounted has no other way to be told.
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::WARN)
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
    println!("mounted at {}; Ctrl-C unmounts", image.target().display());
    io::stdout().flush()?;
    let waited = wait(&image, &mut stop).await;
    image.close().await?;
    waited?;
    Ok(ExitCode::SUCCESS)
}

async fn mount(args: &Mount) -> anyhow::Result<ImageMount> {
    let client = registry::client(&args.registry, [&args.image])?;
    let manifest = manifest(args, &client).await?;
    let options = Options {
        target: args.directory.clone(),
        root: args.root.clone(),
        mode: args.mode.map(|mode| match mode {
            MountMode::Erofs => Mode::Erofs,
            MountMode::Fuse => Mode::Fuse,
        }),
    };
    ImageMount::new(client, &args.image, &manifest.layers, options)
        .await
        .with_context(|| format!("cannot mount {}", args.image))
}

async fn manifest(args: &Mount, client: &Client) -> anyhow::Result<Manifest> {
    let document = client.manifest(&args.image).await?;
    if !document.is_index() {
        return Ok(document.manifest()?);
    }
    let platform = args
        .platform
        .clone()
        .unwrap_or_else(Platform::of_this_machine);
    let index = document.index()?;
    let chosen = choose(&args.image, &index, &platform)?;
    let reference = args.image.with_digest(chosen.digest);
    Ok(client.manifest(&reference).await?.manifest()?)
}

/// Until it is unmounted, by a signal to this process or by somebody else.
/// A second signal does not wait for those who use it.
async fn wait(image: &ImageMount, stop: &mut Stop) -> anyhow::Result<()> {
    while image.is_mounted()? {
        tokio::select! {
            () = stop.wanted() => break,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    let mut told = false;
    while !image.unmount()? {
        if !told {
            let target = image.target().display();
            eprintln!("sluice: {target} is in use; waiting, Ctrl-C again takes it away now");
            told = true;
        }
        tokio::select! {
            () = stop.wanted() => break,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    Ok(())
}

/// Ctrl-C and SIGTERM.
struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn wanted(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
