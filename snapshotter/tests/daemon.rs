//! The real daemon, spoken to as containerd does: its life cycle, what it
//! keeps over a restart, and what it says when it cannot start.

#![allow(
    clippy::unwrap_used,
    reason = "a test's helpers may panic as the test does"
)]

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use sluice_oci::Digest;
use sluice_proto::containerd::services::snapshots::v1 as api;
use sluice_proto::containerd::types::Mount;
use sluice_proto::control::v1::ExpectImageRequest;
use sluice_proto::control::v1::control_client::ControlClient;
use tempfile::TempDir;
use tonic::Code;
use tonic::transport::Channel;

type Client = api::snapshots_client::SnapshotsClient<Channel>;

/// A root and a socket in a directory of their own, and the daemon on them.
struct Daemon {
    home: TempDir,
    process: Option<Child>,
}

impl Daemon {
    fn new() -> Self {
        let mut daemon = Self {
            home: tempfile::tempdir().unwrap(),
            process: None,
        };
        daemon.start();
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.home.path().join("run/s.sock")
    }

    fn root(&self) -> PathBuf {
        self.home.path().join("root")
    }

    fn command(&self) -> Command {
        serve(&self.root(), &self.socket())
    }

    fn start(&mut self) {
        let mut process = self.command().stderr(Stdio::inherit()).spawn().unwrap();
        wait_for("the daemon", || {
            assert_eq!(process.try_wait().unwrap(), None, "it ended");
            std::os::unix::net::UnixStream::connect(self.socket()).is_ok()
        });
        self.process = Some(process);
    }

    fn signal(&mut self, signal: rustix::process::Signal) -> std::process::ExitStatus {
        let mut process = self.process.take().unwrap();
        let pid = rustix::process::Pid::from_child(&process);
        rustix::process::kill_process(pid, signal).unwrap();
        process.wait().unwrap()
    }

    fn stop(&mut self) {
        let status = self.signal(rustix::process::Signal::TERM);
        assert_eq!(status.code(), Some(0));
        assert!(!self.socket().exists());
    }

    async fn client(&self) -> Client {
        Client::new(self.channel().await)
    }

    async fn channel(&self) -> Channel {
        let channel = containerd_client::connect(self.socket()).await;
        channel.unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let pid = rustix::process::Pid::from_child(&process);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let _ = process.wait();
        }
        // What one that was killed has left.
        if let Ok(mounts) = sluice_snapshotter::mount::mounts_below(self.home.path()) {
            for mount in mounts {
                let _ = sluice_snapshotter::mount::detach(&mount.target);
            }
        }
    }
}

fn serve(root: &Path, socket: &Path) -> Command {
    let mut command = program();
    command
        .args(["--root".as_ref(), root.as_os_str()])
        .args(["--address".as_ref(), socket.as_os_str()]);
    command
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-snapshotter"));
    command.arg("serve").env_remove("RUST_LOG");
    command
}

/// The limit only keeps a broken test from hanging.
fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(60);
    while !ready() {
        assert!(Instant::now() < limit, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

async fn prepare(client: &mut Client, key: &str, parent: &str) -> Result<Vec<Mount>, Code> {
    let request = api::PrepareSnapshotRequest {
        key: key.into(),
        parent: parent.into(),
        ..Default::default()
    };
    let reply = client.prepare(request).await.map_err(|s| s.code())?;
    Ok(reply.into_inner().mounts)
}

async fn commit(client: &mut Client, name: &str, key: &str) -> Result<(), Code> {
    let request = api::CommitSnapshotRequest {
        name: name.into(),
        key: key.into(),
        ..Default::default()
    };
    client.commit(request).await.map(drop).map_err(|s| s.code())
}

async fn mounts(client: &mut Client, key: &str) -> Result<Vec<Mount>, Code> {
    let request = api::MountsRequest {
        key: key.into(),
        ..Default::default()
    };
    let reply = client.mounts(request).await.map_err(|s| s.code())?;
    Ok(reply.into_inner().mounts)
}

/// What is listed, in the messages in which it came.
async fn list(client: &mut Client, filters: &[&str]) -> Result<Vec<Vec<api::Info>>, Code> {
    let request = api::ListSnapshotsRequest {
        filters: filters.iter().map(|f| (*f).to_owned()).collect(),
        ..Default::default()
    };
    let reply = client.list(request).await.map_err(|s| s.code())?;
    let mut stream = reply.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await.map_err(|s| s.code())? {
        messages.push(message.info);
    }
    Ok(messages)
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_survive_a_stop_and_a_kill() {
    let mut daemon = Daemon::new();
    let mut client = daemon.client().await;
    let upper = prepare(&mut client, "a", "")
        .await
        .unwrap()
        .remove(0)
        .source;
    fs::write(Path::new(&upper).join("file"), "content").unwrap();
    commit(&mut client, "base", "a").await.unwrap();
    prepare(&mut client, "container", "base").await.unwrap();
    let before = list(&mut client, &[]).await.unwrap();
    let shown = mounts(&mut client, "container").await.unwrap();
    assert_eq!(shown[0].r#type, "overlay");

    daemon.stop();
    daemon.start();
    let mut client = daemon.client().await;
    assert_eq!(list(&mut client, &[]).await.unwrap(), before);
    assert_eq!(mounts(&mut client, "container").await.unwrap(), shown);

    daemon.signal(rustix::process::Signal::KILL);
    assert!(daemon.socket().exists());
    daemon.start();
    let mut client = daemon.client().await;
    assert_eq!(list(&mut client, &[]).await.unwrap(), before);
    assert_eq!(mounts(&mut client, "container").await.unwrap(), shown);
    assert_eq!(
        fs::read(Path::new(&upper).join("file")).unwrap(),
        b"content"
    );
    daemon.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_carry_the_codes_that_containerd_knows() {
    let daemon = Daemon::new();
    let mut client = daemon.client().await;
    prepare(&mut client, "a", "").await.unwrap();
    assert_eq!(
        prepare(&mut client, "a", "").await,
        Err(Code::AlreadyExists)
    );
    assert_eq!(prepare(&mut client, "b", "no").await, Err(Code::NotFound));
    assert_eq!(
        prepare(&mut client, "b", "a").await,
        Err(Code::InvalidArgument)
    );
    assert_eq!(
        prepare(&mut client, "", "").await,
        Err(Code::InvalidArgument)
    );
    assert_eq!(mounts(&mut client, "no").await, Err(Code::NotFound));
    commit(&mut client, "base", "a").await.unwrap();
    assert_eq!(
        mounts(&mut client, "base").await,
        Err(Code::FailedPrecondition)
    );
    assert_eq!(
        commit(&mut client, "x", "base").await,
        Err(Code::FailedPrecondition)
    );
    prepare(&mut client, "child", "base").await.unwrap();
    let request = api::RemoveSnapshotRequest {
        key: "base".into(),
        ..Default::default()
    };
    let status = client.remove(request).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("'base' has children"), "{status}");
    let update = api::UpdateSnapshotRequest::default();
    let status = client.update(update).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(
        list(&mut client, &["name=="]).await,
        Err(Code::InvalidArgument)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expected_image_is_looked_at_before_it_is_believed() {
    let daemon = Daemon::new();
    let mut control = ControlClient::new(daemon.channel().await);
    // A registry that is not there: nothing waits for it.
    let named = ExpectImageRequest {
        reference: "127.0.0.1:1/app:v1".to_owned(),
        ..ExpectImageRequest::default()
    };
    let with = |manifest: &[u8]| ExpectImageRequest {
        manifest_digest: Digest::of(manifest).to_string(),
        manifest: manifest.to_vec(),
        ..named.clone()
    };
    let descriptor = |content: &[u8]| {
        let digest = Digest::of(content).to_string();
        json!({"mediaType": "text/plain", "size": content.len(), "digest": digest})
    };
    let document = |layers: serde_json::Value| {
        let config = descriptor(b"{}");
        json!({"schemaVersion": 2, "config": config, "layers": layers}).to_string()
    };
    let layers = json!([descriptor(b"lowest"), descriptor(b"next")]);
    let good = with(document(layers.clone()).as_bytes());
    for right in [
        named.clone(),
        with(document(json!([])).as_bytes()),
        good.clone(),
        good.clone(),
    ] {
        control.expect_image(right).await.unwrap();
    }

    let other = Digest::of(b"other").to_string();
    let mut large = document(layers).into_bytes();
    large.resize((4 << 20) + 1, b' ');
    for (wrong, why) in [
        (
            ExpectImageRequest {
                reference: "Not/A Reference".to_owned(),
                ..good.clone()
            },
            "reference",
        ),
        (
            ExpectImageRequest {
                manifest_digest: "sha256:short".to_owned(),
                ..good.clone()
            },
            "digest",
        ),
        (
            ExpectImageRequest {
                manifest_digest: other.clone(),
                ..good.clone()
            },
            &other,
        ),
        (with(b"no manifest"), "expected"),
        (with(br#"{"layers":[{}]}"#), "missing field"),
        (with(&large), "4194304"),
    ] {
        let status = control.expect_image(wrong).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(why), "{status}");
    }
    // Nothing was made of any of it.
    let mut client = daemon.client().await;
    assert!(list(&mut client, &[]).await.unwrap().concat().is_empty());
    let layers = daemon.root().join("layers");
    assert_eq!(fs::read_dir(layers).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_list_comes_in_several_messages() {
    let daemon = Daemon::new();
    let client = daemon.client().await;
    let tasks: Vec<_> = (0..250)
        .map(|n| {
            let mut client = client.clone();
            tokio::spawn(async move { prepare(&mut client, &format!("k{n}"), "").await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let mut client = client.clone();
    let messages = list(&mut client, &["kind==active,name~=^k", "name==other"])
        .await
        .unwrap();
    let sizes: Vec<_> = messages.iter().map(Vec::len).collect();
    assert_eq!(sizes, [100, 100, 50]);
}

#[test]
fn the_service_manager_is_told() {
    let mut daemon = Daemon::new();
    daemon.stop();
    let path = daemon.home.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let hear = || {
        let mut words = [0; 64];
        let read = loop {
            match manager.recv(&mut words) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                read => break read.unwrap(),
            }
        };
        String::from_utf8_lossy(&words[..read]).into_owned()
    };
    let process = daemon
        .command()
        .env("NOTIFY_SOCKET", &path)
        .spawn()
        .unwrap();
    daemon.process = Some(process);
    assert_eq!(hear(), "READY=1");
    daemon.stop();
    assert_eq!(hear(), "STOPPING=1");
}

/// Runs what must not start, and returns its one line.
#[track_caller]
fn refusal(mut command: Command) -> String {
    let Output { status, stderr, .. } = command.output().unwrap();
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    let mut lines = stderr.lines();
    let line = lines.next_back().unwrap_or_default().to_owned();
    assert!(line.starts_with("sluice-snapshotter: "), "{stderr}");
    // Nothing but log lines before it.
    assert!(
        lines.all(|line| line.contains(" INFO ") || line.contains(" WARN ")),
        "{stderr}"
    );
    line
}

#[track_caller]
fn assert_names(line: &str, parts: &[&OsStr]) {
    for part in parts {
        let part = part.to_str().unwrap();
        assert!(line.contains(part), "'{part}' is not in: {line}");
    }
}

#[test]
fn a_second_daemon_is_refused_and_the_first_goes_on() {
    let mut daemon = Daemon::new();
    let other = daemon.home.path().join("other");
    let line = refusal(serve(&daemon.root(), &other));
    let root = daemon.root();
    assert_names(
        &line,
        &[root.as_os_str(), "in use".as_ref(), "--root".as_ref()],
    );
    let line = refusal(serve(&other, &daemon.socket()));
    let socket = daemon.socket();
    assert_names(
        &line,
        &[socket.as_os_str(), "in use".as_ref(), "--address".as_ref()],
    );
    daemon.stop();
}

#[test]
fn what_is_in_the_way_of_the_socket_stays() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("file");
    fs::write(&path, "precious").unwrap();
    let line = refusal(serve(&home.path().join("root"), &path));
    assert_names(&line, &[path.as_os_str(), "no socket".as_ref()]);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    // A socket that somebody else listens on, too.
    let path = home.path().join("theirs");
    let listener = UnixListener::bind(&path).unwrap();
    let line = refusal(serve(&home.path().join("root"), &path));
    assert_names(&line, &["in use".as_ref()]);
    drop(listener);
}

#[test]
fn a_configuration_with_a_mistake_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("config.toml");
    let run = |text: &str| {
        fs::write(&file, text).unwrap();
        let mut command = program();
        command.arg("--config").arg(&file);
        command
    };
    let root = home.path().join("root");
    let text = format!("root = {root:?}\n[mount]\nmodus = 'fuse'\n");
    let line = refusal(run(&text));
    assert_names(&line, &[file.as_os_str(), ":3:".as_ref(), "modus".as_ref()]);
    assert!(!root.exists());
    let text = format!("root = {root:?}\nlog_level = 'a=b=c'\n");
    assert_names(&refusal(run(&text)), &["a=b=c".as_ref()]);
    assert!(!root.exists());
    let mut command = program();
    command.arg("--config").arg(home.path().join("none"));
    assert_names(
        &refusal(command),
        &["none".as_ref(), "No such file".as_ref()],
    );
}

#[test]
fn a_root_of_a_newer_version_is_refused_and_untouched() {
    let mut daemon = Daemon::new();
    daemon.stop();
    let path = daemon.root().join("state.redb");
    {
        let table = redb::TableDefinition::<&str, u64>::new("meta");
        let database = redb::Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction
            .open_table(table)
            .unwrap()
            .insert("version", 99)
            .unwrap();
        transaction.commit().unwrap();
    }
    let strange = daemon.root().join("snapshots/of-the-future");
    fs::create_dir(&strange).unwrap();
    let line = refusal(daemon.command());
    assert_names(
        &line,
        &[
            path.as_os_str(),
            "newer version".as_ref(),
            "--root".as_ref(),
        ],
    );
    assert!(strange.is_dir());
    assert!(!daemon.socket().exists());
}

/// A small file system, full but for what is taken away again.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        rustix::mount::mount(
            "tmpfs",
            directory.path(),
            "tmpfs",
            rustix::mount::MountFlags::empty(),
            Some(c"size=12m"),
        )
        .unwrap();
        Self(directory)
    }

    fn fill(&self) {
        let error = fs::write(self.0.path().join("ballast"), vec![1; 16 << 20]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    }

    fn relieve(&self) {
        fs::remove_file(self.0.path().join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_named_and_passes() {
    let disk = SmallDisk::new();
    let mut daemon = Daemon {
        home: tempfile::tempdir().unwrap(),
        process: None,
    };
    std::os::unix::fs::symlink(disk.0.path().join("root"), daemon.root()).unwrap();
    fs::create_dir(disk.0.path().join("root")).unwrap();

    disk.fill();
    let line = refusal(daemon.command());
    assert_names(&line, &["state.redb".as_ref(), "free space".as_ref()]);
    disk.relieve();

    daemon.start();
    let mut client = daemon.client().await;
    prepare(&mut client, "before", "").await.unwrap();
    disk.fill();
    let mut made = 0;
    let code = loop {
        match prepare(&mut client, &format!("k{made}"), "").await {
            Ok(_) => made += 1,
            Err(code) => break code,
        }
        assert!(made < 100_000, "the disk is never full");
    };
    assert_eq!(code, Code::ResourceExhausted);
    let count = async |client: &mut Client| {
        let all = list(client, &[]).await.unwrap();
        all.into_iter().flatten().count()
    };
    assert_eq!(count(&mut client).await, made + 1);
    disk.relieve();
    prepare(&mut client, "after", "").await.unwrap();
    assert_eq!(count(&mut client).await, made + 2);
    // Nothing of what failed is left.
    let directories = fs::read_dir(daemon.root().join("snapshots")).unwrap();
    assert_eq!(directories.count(), made + 2);
    daemon.stop();
}

/// `command` in a mount namespace of its own, after the shell's `preparation`.
fn unshared(preparation: &str, command: &Command) -> Command {
    let mut unshared = Command::new("unshare");
    unshared
        .args(["--mount", "--propagation", "private", "sh", "-ec"])
        .arg(format!("{preparation}; exec \"$@\""))
        .arg("sh")
        .arg(command.get_program())
        .args(command.get_args());
    unshared
}

#[test]
fn a_missing_fuse_device_is_named() {
    let home = tempfile::tempdir().unwrap();
    let command = serve(&home.path().join("root"), &home.path().join("socket"));
    let line = refusal(unshared("mount -t tmpfs none /dev", &command));
    assert_names(&line, &["/dev/fuse".as_ref(), "modprobe fuse".as_ref()]);
    assert!(!home.path().join("socket").exists());
}

#[test]
fn the_mount_mode_can_be_chosen() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("config.toml");
    for mode in ["erofs", "fuse"] {
        fs::write(&file, format!("[mount]\nmode = '{mode}'\n")).unwrap();
        let mut daemon = Daemon {
            home: tempfile::tempdir().unwrap(),
            process: None,
        };
        let log = fs::File::create(home.path().join("log")).unwrap();
        let process = daemon
            .command()
            .arg("--config")
            .arg(&file)
            .stderr(log)
            .spawn();
        daemon.process = Some(process.unwrap());
        let text = || fs::read_to_string(home.path().join("log")).unwrap();
        wait_for("the daemon", || text().contains("serving"));
        assert!(text().contains(&format!("mode=\"{mode}\"")), "{}", text());
        daemon.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_mount_is_left() {
    let mut daemon = Daemon::new();
    let below = |daemon: &Daemon| {
        let mounts = sluice_snapshotter::mount::mounts_below(&daemon.root());
        mounts.unwrap().len()
    };
    // A call is answered when everything is mounted.
    list(&mut daemon.client().await, &[]).await.unwrap();
    assert_eq!(below(&daemon), 1);
    daemon.stop();
    assert_eq!(below(&daemon), 0);
    // Those of one that was killed go with the next.
    daemon.start();
    list(&mut daemon.client().await, &[]).await.unwrap();
    daemon.signal(rustix::process::Signal::KILL);
    assert_eq!(below(&daemon), 1);
    daemon.start();
    list(&mut daemon.client().await, &[]).await.unwrap();
    assert_eq!(below(&daemon), 1);
    daemon.stop();
    assert_eq!(below(&daemon), 0);
}

#[test]
fn usage_errors_are_exit_code_2() {
    for arguments in [&["--rot", "/x"][..], &["extra"]] {
        let mut command = program();
        command.args(arguments);
        assert_eq!(command.output().unwrap().status.code(), Some(2));
    }
}

#[test]
fn what_is_logged_can_be_chosen() {
    let mut daemon = Daemon::new();
    daemon.stop();
    let mut process = daemon
        .command()
        .args(["--log-level", "warn"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = process.stderr.take().unwrap();
    wait_for("the daemon", || {
        std::os::unix::net::UnixStream::connect(daemon.socket()).is_ok()
    });
    daemon.process = Some(process);
    daemon.stop();
    let mut log = String::new();
    stderr.read_to_string(&mut log).unwrap();
    assert_eq!(log, "");
}
