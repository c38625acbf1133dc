//! Credentials are told to the registry and to nobody else, and what the
//! daemon makes is root's alone.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use sluice_tests::command::{attempt, run, text};
use sluice_tests::daemon::{Mode, Options};
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Tarball};
use sluice_tests::node::snapshotter;
use sluice_tests::proxy::{Access, Fault, Proxy, Rule, TOKEN};
use sluice_tests::{Containerd, Daemon, Registry, Scratch};

/// The password of the user `sluice`.
const PASSWORD: &str = "hush-hush-hush";
/// Both, as HTTP and Docker's configuration have them.
const PAIR: &str = "c2x1aWNlOmh1c2gtaHVzaC1odXNo";
/// The same of another user, who is named by a header of `hosts.toml`.
const HEADER: &str = "bWlycm9yOnF1aWV0LXF1aWV0";
/// What makes a redirect good for whoever has it.
const SIGNATURE: &str = "sealed-sealed-sealed";
/// What nobody may see.
const SECRETS: [&str; 5] = [PASSWORD, PAIR, TOKEN, HEADER, SIGNATURE];

const FILES: usize = 20;

fn make_image(scratch: &Scratch, registry: &Registry) -> Result<()> {
    let layout = scratch.dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    writer.layer(Compression::Gzip, |to| {
        let mut tar = Tarball::new(to);
        for number in 0..FILES {
            let content = vec![number as u8; 10_000];
            tar.file(&number.to_string(), &Meta::mode(0o644), &content)?;
        }
        tar.finish()
    })?;
    writer.finish(image::TAG, &[])?;
    let to = registry.reference("guarded:lazy");
    image::convert(&layout, &to, &["--format", "estargz"])
}

fn holds_no_secret(what: &str, text: &str) -> Result<()> {
    for secret in SECRETS {
        let line = text.lines().find(|line| line.contains(secret));
        ensure!(line.is_none(), "{what} tells '{secret}': {line:?}");
    }
    Ok(())
}

fn no_file_holds_a_secret(dir: &Path) -> Result<()> {
    let mut grep = Command::new("grep");
    grep.args(["-rlF", "--devices=skip"]);
    for secret in SECRETS {
        grep.args(["-e", secret]);
    }
    // 0 says that something was found, 1 that nothing was, 2 that it failed.
    let found = attempt(grep.arg(dir))?;
    ensure!(found.status.code() == Some(1), "{found:?}");
    Ok(())
}

/// Has the registry reached with a header that lets everything pass.
fn set_header(hosts_dir: &Path, registry: &Proxy) -> Result<()> {
    let host = registry.host();
    let directory = hosts_dir.join(host.replace(':', "_") + "_");
    fs::create_dir_all(&directory)?;
    let text = format!("[host.\"http://{host}\".header]\nauthorization = \"Basic {HEADER}\"\n");
    Ok(fs::write(directory.join("hosts.toml"), text)?)
}

/// Neither group nor others may do anything with what is below the root, but
/// for the contents of snapshots and of mounted layers.
fn is_roots_alone(daemon: &Daemon) -> Result<()> {
    let root = daemon.root();
    let below = |part: &str| root.join(part).display().to_string();
    let open = text(
        Command::new("find")
            .arg(&root)
            .arg("-xdev")
            .args(["-path", &below("snapshots/*/*"), "-prune", "-o"])
            .args(["-path", &below("m/*"), "-prune", "-o"])
            .args(["-path", &below("t"), "-prune", "-o"])
            .args(["-path", &below("blobs"), "-prune", "-o"])
            .args(["!", "-type", "l", "-perm", "/077", "-print"]),
    )?;
    ensure!(open.is_empty(), "open to others:\n{open}");
    let socket = text(Command::new("stat").args(["-c", "%a"]).arg(daemon.socket()))?;
    ensure!(socket == "600", "the socket has mode {socket}");
    Ok(())
}

#[test]
fn credentials_are_told_to_the_registry_alone() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    make_image(&scratch, &registry)?;
    let proxy = Proxy::start(registry.host())?;
    let docker = scratch.dir("docker")?;
    let file = docker.join("config.json");
    let host = proxy.host();
    fs::write(
        &file,
        format!(r#"{{"auths":{{"{host}":{{"auth":"{PAIR}"}}}}}}"#),
    )?;
    let start = |mode: Mode| {
        let more = format!(
            "docker_config = {file:?}\n[mount]\nmode = {:?}\n[prefetch]\nenabled = false\n",
            mode.name()
        );
        let options = Options {
            more,
            traced: true,
            ..Options::default()
        };
        Daemon::start(&scratch, &options)
    };
    let daemons = Mode::ALL.map(start);
    let [erofs, fuse] = daemons;
    let (erofs, fuse) = (erofs?, fuse?);
    let containerd = Containerd::start_with(
        &scratch,
        &[
            (snapshotter(Mode::Erofs), &erofs),
            (snapshotter(Mode::Fuse), &fuse),
        ],
    )?;
    let layer = (registry
        .manifest(&registry.reference("guarded:lazy"))?
        .layers)
        .pop()
        .context("the image has no layer")?;
    let other = Proxy::start(registry.host())?;
    let store = Proxy::start(registry.host())?;
    let password = |pair: &str| Access::Password(pair.to_owned());
    for (daemon, mode, proxy, access) in [
        (&erofs, Mode::Erofs, &proxy, password(PAIR)),
        (&fuse, Mode::Fuse, &proxy, Access::Token),
        (&erofs, Mode::Erofs, &other, password(HEADER)),
    ] {
        proxy.demand(access.clone());
        let reference = proxy.reference("guarded:lazy");
        let name = snapshotter(mode);
        let mut pull = containerd.lazy_pull_command(&reference, name)?;
        if access == Access::Token {
            let query = format!("signature={SIGNATURE}");
            let to = store.host();
            proxy.schedule(Rule::new(Fault::Redirect { to, query }).on("/blobs/"));
        } else if access == password(HEADER) {
            set_header(&daemon.hosts_dir(), proxy)?;
            pull.arg("--hosts-dir").arg(daemon.hosts_dir());
        }
        let pulled = run(pull.env("DOCKER_CONFIG", &docker).env("RUST_LOG", "trace"))?;
        let meta = daemon.root().join("layers").join(layer.digest.hex());
        ensure!(meta.join("meta.erofs").exists(), "{}", daemon.log());
        let dir = containerd.mount(&reference, name)?;
        if access == Access::Token {
            // The signature was good until now.
            store.schedule(Rule::new(Fault::Status(403, "")).times(1));
        }
        for number in 0..FILES {
            let read = fs::read(dir.join(number.to_string()))?;
            ensure!(read == vec![number as u8; 10_000], "file {number}");
        }
        for (what, asked) in [
            ("tokens", proxy.asked("/token")),
            ("signatures", store.asked(SIGNATURE)),
        ] {
            ensure!((asked > 0) == (access == Access::Token), "{asked} {what}");
        }
        store.forget();

        let log = daemon.log();
        ensure!(log.contains("TRACE"), "not all is logged:\n{log}");
        holds_no_secret("the daemon's log", &log)?;
        for output in [&pulled.stdout, &pulled.stderr] {
            holds_no_secret("the pull", &String::from_utf8_lossy(output))?;
        }
        let process = format!("/proc/{}", daemon.process().pid());
        for file in ["cmdline", "environ"] {
            let bytes = fs::read(Path::new(&process).join(file))?;
            holds_no_secret(file, &String::from_utf8_lossy(&bytes))?;
        }
        no_file_holds_a_secret(&daemon.root())?;
        no_file_holds_a_secret(&dir)?;
        is_roots_alone(daemon)?;
        containerd.unmount(&dir)?;
        containerd.forget_images()?;
    }
    Ok(())
}
