//! `sluice pull`: an image onto a node, through containerd's API.
//!
//! Everything is held by one lease until the image record holds it, so that
//! a pull that fails, or is interrupted, leaves nothing behind.

mod ahead;
mod content;
mod image;
mod labels;
mod layers;
pub(crate) mod node;
mod report;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use sluice_oci::Platform;
use sluice_registry::Client;
use tokio::signal::unix::{SignalKind, signal};

use crate::args::Pull;
use crate::registry;
use ahead::Ahead;
use layers::Layers;
use node::Node;
use report::Report;

pub(crate) use image::{Image, choose};

/// Runs it.
pub(crate) async fn run(args: Pull) -> anyhow::Result<ExitCode> {
    let client = registry::client(&args.registry, [&args.image])?;
    let node = Arc::new(Node::connect(&args.containerd, &args.namespace).await?);
    let done = tokio::select! {
        done = pull(&args, &client, &node) => done,
        stopped = interruption() => stopped,
    };
    let released = node.release(done.is_err()).await;
    match (done, released) {
        (Ok(_), Ok(())) => Ok(ExitCode::SUCCESS),
        (Ok(_), Err(error)) => {
            tracing::warn!(%error, "the lease stays until it expires");
            Ok(ExitCode::SUCCESS)
        }
        (Err(error), _) => Err(error),
    }
}

/// Fails when somebody wants the program to end.
pub(crate) async fn interruption<T>() -> anyhow::Result<T> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        pressed = tokio::signal::ctrl_c() => pressed?,
        _ = terminate.recv() => {}
    }
    bail!("interrupted; nothing of the image was kept")
}

/// Pulls the image under the node's lease.
pub(crate) async fn pull(
    args: &Pull,
    client: &Client,
    node: &Arc<Node>,
) -> anyhow::Result<Arc<Image>> {
    let started = Instant::now();
    let platform = args
        .platform
        .clone()
        .unwrap_or_else(Platform::of_this_machine);
    let ahead = Ahead::of(node, &args.snapshotter, &args.image);
    let ready = async {
        node.take_lease().await?;
        node.check_snapshotter(&args.snapshotter).await
    };
    let named = async { Ok(client.manifest(&args.image).await?) };
    let ((), named) = tokio::try_join!(ready, named)?;
    let image = image::fetch(node, client, &args.image, named, &platform, ahead).await?;
    let image = Arc::new(image);
    let report = Report::default();
    report.image(&image);
    let layers = Layers::new(
        Arc::clone(node),
        client.clone(),
        Arc::clone(&image),
        args.snapshotter.clone(),
        report.clone(),
    );
    let outcomes = layers.pull().await?;
    if let Some(&top) = image.chain_ids.last() {
        let labels = labels::of_config(&args.snapshotter, top);
        node.label(image.manifest.config.digest, labels).await?;
    }
    node.put_image(&image.reference.to_string(), &image.target)
        .await?;
    report.done(&image, &outcomes, &args.snapshotter, started.elapsed());
    Ok(image)
}
