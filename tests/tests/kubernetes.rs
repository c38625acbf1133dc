//! Pulling as the kubelet does: through containerd's CRI plugin, which tells
//! the snapshotter by labels which layer of which image it wants.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use sluice_tests::daemon::{Daemon, Options};
use sluice_tests::programs::sluice_command;
use sluice_tests::{Registry, Scratch, command, image};
use tonic::client::Grpc;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;

/// `runtime.v1.ImageSpec`, as far as it is needed.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// `runtime.v1.PullImageRequest`, as far as it is needed.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

/// `runtime.v1.PullImageResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

/// A containerd with the CRI plugin on top of `daemon`, configured as the
/// installation guide says. Returns its socket.
fn start_containerd(scratch: &Scratch, daemon: &Daemon) -> Result<PathBuf> {
    let dir = scratch.fresh_dir("cri")?;
    let (drop_ins, socket) = (dir.join("conf.d"), dir.join("containerd.sock"));
    fs::create_dir(&drop_ins)?;
    let shipped = include_str!("../../systemd/containerd-sluice.toml");
    let address = daemon.socket().display().to_string();
    let drop_in = shipped.replace("/run/sluice/snapshotter.sock", &address);
    ensure!(drop_in != shipped, "the drop-in names another socket");
    fs::write(drop_ins.join("sluice.toml"), drop_in)?;
    let config = format!(
        r#"version = 2
imports = ["{drop_ins}/*.toml"]
root = "{dir}/root"
state = "{dir}/state"
[grpc]
address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
path = "{dir}/opt"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "sluice"
  disable_snapshot_annotations = false
"#,
        drop_ins = drop_ins.display(),
        dir = dir.display(),
        socket = socket.display(),
    );
    let file = dir.join("config.toml");
    fs::write(&file, config)?;
    let mut containerd = Command::new("containerd");
    containerd.arg("--config").arg(&file);
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let process = scratch.spawn(&name, containerd)?;
    command::wait_for("containerd", || {
        ensure!(process.is_running(), "it ended: {}", process.log());
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(&socket).arg("version");
        Ok(command::attempt(&mut ctr)?.status.success().then_some(()))
    })?;
    Ok(socket)
}

async fn pull(socket: &Path, image: &str) -> Result<String> {
    let socket = socket.to_owned();
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(socket).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        }))
        .await?;
    let mut client = Grpc::new(channel);
    client.ready().await?;
    let request = PullImageRequest {
        image: Some(ImageSpec {
            image: image.to_owned(),
        }),
    };
    let path = PathAndQuery::from_static("/runtime.v1.ImageService/PullImage");
    let codec = ProstCodec::<_, PullImageResponse>::default();
    let reply = client
        .unary(tonic::Request::new(request), path, codec)
        .await
        .with_context(|| format!("cannot pull {image}"))?;
    Ok(reply.into_inner().image_ref)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kubelets_pull_is_lazy_and_falls_back() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let daemon = Daemon::start(&scratch, &Options::default())?;
    let socket = start_containerd(&scratch, &daemon)?;
    let odd = image::odd()?;
    let plain = registry.push(odd.layout(), image::TAG, "odd:plain")?;

    for format in ["estargz", "zstd-chunked"] {
        let lazy = registry.reference(&format!("odd:{format}"));
        command::run(
            sluice_command()?
                .args(["convert", "--format", format, &odd.source()])
                .arg(&lazy),
        )?;
        let known = pull(&socket, &lazy).await?;
        ensure!(known.starts_with("sha256:"), "{known}");
        for layer in registry.manifest(&lazy)?.layers {
            let directory = daemon.root().join("layers").join(layer.digest.hex());
            ensure!(
                directory.join("meta.erofs").exists(),
                "{} of {lazy} is not lazy:\n{}",
                layer.digest,
                daemon.log()
            );
            let blob = scratch
                .path()
                .join("cri-0/root/io.containerd.content.v1.content");
            let blob = blob.join("blobs/sha256").join(layer.digest.hex());
            ensure!(!blob.exists(), "containerd downloaded {}", layer.digest);
        }
        ensure!(
            !daemon.log().contains("unpacked as usual"),
            "{}",
            daemon.log()
        );
    }

    // The same image unconverted is unpacked, and the log says why; on a node
    // of its own, for this one has the content already.
    let daemon = Daemon::start(&scratch, &Options::default())?;
    let socket = start_containerd(&scratch, &daemon)?;
    pull(&socket, &plain).await?;
    let layers = registry.manifest(&plain)?.layers;
    let log = daemon.log();
    let unpacked = log
        .lines()
        .filter(|line| line.contains("unpacked as usual"));
    let told = unpacked
        .clone()
        .filter(|line| line.contains("sluice convert"));
    ensure!(unpacked.count() == layers.len(), "{log}");
    ensure!(told.count() == layers.len(), "{log}");
    Ok(())
}
