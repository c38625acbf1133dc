//! containerd with its Kubernetes plugin (CRI), asked as the kubelet asks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use http::uri::PathAndQuery;
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;

use crate::command::{attempt, wait_for};
use crate::daemon::Daemon;
use crate::scratch::Scratch;

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

/// The name of its snapshotter.
pub const SNAPSHOTTER: &str = "sluice";

/// A containerd with the CRI plugin.
pub struct Cri {
    dir: PathBuf,
    runtime: Runtime,
}

/// The socket that the scratch directory's containerd of this number, from 0,
/// has, or will have.
pub fn socket(scratch: &Scratch, number: usize) -> PathBuf {
    socket_in(&scratch.path().join(format!("cri-{number}")))
}

fn socket_in(dir: &Path) -> PathBuf {
    dir.join("containerd.sock")
}

impl Cri {
    /// On top of `daemon`, configured as the installation guide says.
    pub fn start(scratch: &Scratch, daemon: &Daemon) -> Result<Self> {
        let dir = scratch.fresh_dir("cri")?;
        let (drop_ins, socket) = (dir.join("conf.d"), socket_in(&dir));
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
  snapshotter = "{SNAPSHOTTER}"
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
        let cri = Self {
            dir,
            runtime: Runtime::new()?,
        };
        wait_for("containerd", || {
            ensure!(process.is_running(), "it ended: {}", process.log());
            let answer = attempt(cri.ctr().arg("version"))?;
            Ok(answer.status.success().then_some(()))
        })?;
        Ok(cri)
    }

    /// Where a blob is when containerd has downloaded it.
    pub fn blob(&self, hex: &str) -> PathBuf {
        let content = self.dir.join("root/io.containerd.content.v1.content");
        content.join("blobs/sha256").join(hex)
    }

    /// A `ctr` command towards it, in the kubelet's namespace.
    pub fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(socket_in(&self.dir))
            .args(["--namespace", "k8s.io"]);
        command
    }

    /// Pulls an image; returns what the kubelet is told that it is.
    pub fn pull(&self, image: &str) -> Result<String> {
        self.runtime
            .block_on(pull(&socket_in(&self.dir), image))
            .with_context(|| format!("cannot pull {image}"))
    }
}

async fn pull(socket: &Path, image: &str) -> Result<String> {
    let mut client = Grpc::new(containerd_client::connect(socket).await?);
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
        .await?;
    Ok(reply.into_inner().image_ref)
}
