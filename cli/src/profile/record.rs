//! `sluice profile record`: an image is pulled lazily, run once, and what it
//! read is written. Everything that was made for it goes again.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, bail};
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::{
    Container, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest,
    DeleteTaskRequest, KillRequest, StartRequest, WaitRequest,
};
use containerd_client::types;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use sluice_layer::Profile;
use sluice_proto::control::v1 as api;
use sluice_proto::control::v1::control_client::ControlClient;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::spec::{ImageConfig, Process, User, resolve, spec};
use super::write;
use crate::args::ProfileRecord;
use crate::pull::node::{Labels, Node, Prepared, unique};
use crate::pull::{Image, interruption, pull};
use crate::{control, registry};

/// Asks the daemon for a recording.
const RECORD: &str = "containerd.io/snapshot/sluice.record";
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
const RUNTIME: &str = "io.containerd.runc.v2";
/// Signals, by the numbers that they have on every Linux.
const TERM: u32 = 15;
const KILL: u32 = 9;
/// How long a container may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);
/// Configurations and lists of users are not larger.
const MOST: usize = 4 << 20;

/// Runs it.
pub(super) async fn run(args: ProfileRecord) -> anyhow::Result<ExitCode> {
    let client = registry::client(&args.pull.registry, [&args.pull.image])?;
    // First, so that nothing is pulled in vain.
    let mut daemon = control::connect(&args.daemon.address).await?;
    let node = Arc::new(Node::connect(&args.pull.containerd, &args.pull.namespace).await?);
    let id = unique("sluice-record");
    let name = args.pull.image.to_string();
    let had = node.has_image(&name).await?;
    let recorded = tokio::select! {
        recorded = async {
            let image = pull(&args.pull, &client, &node).await?;
            record(&args, &node, &image, &mut daemon, &id).await
        } => recorded,
        stopped = interruption() => stopped,
    };
    end(&node, &id, &args.pull.snapshotter).await;
    if !had {
        node.delete_image(&name).await?;
    }
    let released = node.release(true).await;
    let (profile, whole, code) = recorded?;
    released?;
    if profile.reads().is_empty() {
        bail!(
            "nothing was read of {} through the daemon: its layers are not lazy, or all of it is \
             on this node already; remove the image from the node first",
            args.pull.image
        );
    }
    write(&args.output, &profile)?;
    println!(
        "{}: {} reads of {} files, container ended with {code}",
        args.output.display(),
        profile.reads().len(),
        profile.files().len()
    );
    if !whole {
        eprintln!(
            "sluice: part of {} had been read on this node before; what the kernel still had in \
             its memory is missing from the profile. Record it where it was not run yet",
            args.pull.image
        );
    }
    Ok(ExitCode::SUCCESS)
}

async fn record(
    args: &ProfileRecord,
    node: &Node,
    image: &Image,
    daemon: &mut ControlClient<Channel>,
    id: &str,
) -> anyhow::Result<(Profile, bool, u32)> {
    let process = process(node, image).await?;
    let top = image.chain_ids.last().context("the image has no layers")?;
    let top = top.to_string();
    let labels = Labels::from([(RECORD.to_owned(), id.to_owned())]);
    let snapshotter = &args.pull.snapshotter;
    let prepared = node.prepare(snapshotter, id, &top, labels).await?;
    let Prepared::Unpack(mounts) = prepared else {
        bail!("snapshotter '{snapshotter}' says that snapshot {id} exists already");
    };
    let user = match process.user.as_str() {
        "" => User::default(),
        name => {
            let (name, mounts) = (name.to_owned(), mounts.clone());
            tokio::task::spawn_blocking(move || user(&name, &mounts)).await??
        }
    };
    let spec = spec(&process, &args.args, &user, node.namespace(), id)?;
    let container = Container {
        id: id.to_owned(),
        image: image.reference.to_string(),
        runtime: Some(Runtime {
            name: RUNTIME.to_owned(),
            options: None,
        }),
        spec: Some(prost_types::Any {
            type_url: SPEC.to_owned(),
            value: serde_json::to_vec(&spec)?,
        }),
        snapshotter: snapshotter.clone(),
        snapshot_key: id.to_owned(),
        ..Container::default()
    };
    let create = CreateContainerRequest {
        container: Some(container),
    };
    let created = node
        .client()
        .containers()
        .create(node.request(create))
        .await;
    created.map_err(|status| node.failed("create the container", &status))?;
    let code = run_task(args, node, mounts, id).await?;
    let request = api::FinishRecordingRequest {
        name: id.to_owned(),
    };
    let finished = daemon.finish_recording(request).await;
    let finished = finished.map_err(|status| control::failed(&status))?;
    let finished = finished.into_inner();
    let profile = Profile::parse(&finished.document).context("the daemon sent no profile")?;
    Ok((profile, finished.whole, code))
}

/// Runs the container to its end, or until its time is over.
async fn run_task(
    args: &ProfileRecord,
    node: &Node,
    rootfs: Vec<types::Mount>,
    id: &str,
) -> anyhow::Result<u32> {
    let output = Output::new()?;
    let create = CreateTaskRequest {
        container_id: id.to_owned(),
        rootfs,
        stdout: output.path("out"),
        stderr: output.path("err"),
        ..CreateTaskRequest::default()
    };
    let mut tasks = node.client().tasks();
    let created = tasks.create(node.request(create)).await;
    created.map_err(|status| node.failed("create the container's task", &status))?;
    let wait = WaitRequest {
        container_id: id.to_owned(),
        ..WaitRequest::default()
    };
    let mut waiting = node.client().tasks();
    let ended = waiting.wait(node.request(wait));
    tokio::pin!(ended);
    let start = StartRequest {
        container_id: id.to_owned(),
        ..StartRequest::default()
    };
    let started = tasks.start(node.request(start)).await;
    started.map_err(|status| node.failed("start the container", &status))?;
    let seconds = args.seconds.map_or(Duration::MAX, Duration::from_secs);
    let mut answer = tokio::time::timeout(seconds, &mut ended).await;
    for signal in [TERM, KILL] {
        if answer.is_ok() {
            break;
        }
        kill(node, id, signal).await?;
        answer = tokio::time::timeout(GRACE, &mut ended).await;
    }
    let answer = answer.context("the container does not end, not even by SIGKILL")?;
    let answer = answer.map_err(|status| node.failed("wait for the container", &status))?;
    delete_task(node, id).await?;
    output.finish();
    Ok(answer.into_inner().exit_status)
}

async fn kill(node: &Node, id: &str, signal: u32) -> anyhow::Result<()> {
    let request = KillRequest {
        container_id: id.to_owned(),
        signal,
        all: signal == KILL,
        ..KillRequest::default()
    };
    let killed = node.client().tasks().kill(node.request(request)).await;
    absent_is_fine(killed.map(|_| ())).map_err(|status| node.failed("stop the container", &status))
}

async fn delete_task(node: &Node, id: &str) -> anyhow::Result<()> {
    let request = DeleteTaskRequest {
        container_id: id.to_owned(),
    };
    let deleted = node.client().tasks().delete(node.request(request)).await;
    absent_is_fine(deleted.map(|_| ()))
        .map_err(|status| node.failed("delete the container's task", &status))
}

fn absent_is_fine(outcome: Result<(), Status>) -> Result<(), Status> {
    match outcome {
        Err(status) if status.code() != Code::NotFound => Err(status),
        _ => Ok(()),
    }
}

/// Takes away whatever there is of the container.
async fn end(node: &Node, id: &str, snapshotter: &str) {
    let gone = async {
        kill(node, id, KILL).await?;
        let wait = WaitRequest {
            container_id: id.to_owned(),
            ..WaitRequest::default()
        };
        let mut tasks = node.client().tasks();
        // What is not there has ended.
        let _ = tokio::time::timeout(GRACE, tasks.wait(node.request(wait))).await;
        delete_task(node, id).await?;
        let request = DeleteContainerRequest { id: id.to_owned() };
        let deleted = node
            .client()
            .containers()
            .delete(node.request(request))
            .await;
        absent_is_fine(deleted.map(|_| ()))
            .map_err(|status| node.failed("delete the container", &status))
    };
    if let Err(error) = gone.await {
        eprintln!("sluice: container {id} is left behind: {error:#}");
    }
    node.remove(snapshotter, id).await;
}

/// What the image's configuration says of its process.
async fn process(node: &Node, image: &Image) -> anyhow::Result<Process> {
    let digest = image.manifest.config.digest;
    let bytes = node.read(digest, MOST).await?;
    let bytes = bytes.with_context(|| format!("containerd has lost content {digest}"))?;
    let config: ImageConfig = serde_json::from_slice(&bytes)
        .with_context(|| format!("{digest} is no image configuration"))?;
    Ok(config.config)
}

/// Looks a user up in the container's own files.
fn user(name: &str, mounts: &[types::Mount]) -> anyhow::Result<User> {
    let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
    let root = Mounted::new(mounts, directory.path())
        .context("cannot look for the image's user: its snapshot does not mount")?;
    let (passwd, group) = (root.read("etc/passwd")?, root.read("etc/group")?);
    resolve(name, &passwd, &group)
}

/// A snapshot, read-only at a directory, until it is dropped.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(mounts: &[types::Mount], target: &'a Path) -> anyhow::Result<Self> {
        let [mount] = mounts else {
            bail!("it takes {} mounts", mounts.len());
        };
        let bind = mount.r#type == "bind";
        let options: Vec<&str> = mount
            .options
            .iter()
            .map(String::as_str)
            .filter(|option| !bind && !matches!(*option, "ro" | "rw"))
            .collect();
        let options = std::ffi::CString::new(options.join(","))?;
        let flags = if bind {
            MountFlags::BIND
        } else {
            MountFlags::RDONLY
        };
        rustix::mount::mount(
            &mount.source,
            target,
            &mount.r#type,
            flags,
            options.as_c_str(),
        )?;
        Ok(Self(target))
    }

    /// A file in it, whatever links lead to; empty when there is none.
    fn read(&self, path: &str) -> anyhow::Result<String> {
        let read = || -> io::Result<Vec<u8>> {
            let root = File::open(self.0)?;
            let file: OwnedFd = rustix::fs::openat2(
                &root,
                path,
                OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
                Mode::empty(),
                ResolveFlags::IN_ROOT,
            )?;
            let mut bytes = Vec::new();
            File::from(file).take(MOST as u64).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        match read() {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error).with_context(|| format!("cannot read the image's /{path}")),
        }
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(self.0, UnmountFlags::DETACH) {
            eprintln!("sluice: {} stays mounted: {error}", self.0.display());
        }
    }
}

/// Passes on what the container writes.
struct Output {
    directory: tempfile::TempDir,
    copying: Vec<JoinHandle<()>>,
}

impl Output {
    fn new() -> anyhow::Result<Self> {
        let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
        let mut output = Self {
            directory,
            copying: Vec::new(),
        };
        for (name, error) in [("out", false), ("err", true)] {
            let path = PathBuf::from(output.path(name));
            rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR)
                .with_context(|| format!("cannot make a pipe at {}", path.display()))?;
            // Opening waits for the container, and copying for its end; if it
            // never begins, the threads end with this process.
            output.copying.push(std::thread::spawn(move || {
                let Ok(mut pipe) = File::open(&path) else {
                    return;
                };
                let copied = match error {
                    true => io::copy(&mut pipe, &mut io::stderr()),
                    false => io::copy(&mut pipe, &mut io::stdout()),
                };
                if copied.is_err() {
                    // Nobody listens; the container may go on writing.
                    let _ = io::copy(&mut pipe, &mut io::sink());
                }
                let _ = io::stdout().flush();
            }));
        }
        Ok(output)
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// Waits for the last words of a container that has ended.
    fn finish(self) {
        for copying in self.copying {
            let _ = copying.join();
        }
    }
}
