//! What a person or a machine gets wrong: the real programs say it in one line
//! with the remedy, leave nothing half-written, and break nothing that worked.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use rustix::fs::Advice;
use sluice_snapshotter::layer_dir::{CHUNKS, DATA};
use sluice_snapshotter::mount::mounts_below;
use sluice_tests::command::{refusal_in_one_line, run, wait_for};
use sluice_tests::daemon::Mode;
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Noise, Tarball};
use sluice_tests::kernel::without_file_backed_erofs;
use sluice_tests::programs::{self, sluice_command};
use sluice_tests::proxy::Proxy;
use sluice_tests::{Process, Registry, Scratch};

const SIZE: usize = 2 << 20;

/// An image of one layer with the file `content`, as it was and converted.
struct Rig {
    scratch: Scratch,
    registry: Registry,
    source: String,
    lazy: String,
}

impl Rig {
    fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        let layout = scratch.dir("layout")?;
        let mut writer = LayoutWriter::new(&layout)?;
        writer.layer(Compression::Gzip, |to| {
            let mut tar = Tarball::new(to);
            tar.file("content", &Meta::mode(0o644), &content()?)?;
            tar.finish()
        })?;
        writer.finish(image::TAG, &["/bin/true"])?;
        let source = format!("oci:{}:{}", layout.display(), image::TAG);
        let lazy = registry.reference("image:lazy");
        run(sluice_command()?.args(["convert", &source, &lazy]))?;
        Ok(Self {
            scratch,
            registry,
            source,
            lazy,
        })
    }

    /// `sluice mount` of the lazy image.
    fn mount(&self, target: &Path, more: &[&str]) -> Result<Command> {
        let mut command = sluice_command()?;
        command.args(["mount", &self.lazy]).arg(target).args(more);
        Ok(command)
    }

    /// Starts it and waits until the image is there.
    fn mounted(&self, target: &Path, command: Command) -> Result<Process> {
        let process = self.scratch.spawn("mount", command)?;
        wait_for("sluice mount", || {
            ensure!(process.is_running(), "it ended: {}", process.log());
            Ok((!mounts_below(target)?.is_empty()).then_some(()))
        })?;
        Ok(process)
    }

    /// The daemon in a directory of its own.
    fn daemon(&self, dir: &Path, mode: &str) -> Result<Command> {
        let config = dir.join("config.toml");
        fs::write(&config, format!("[mount]\nmode = {mode:?}\n"))?;
        let mut command = Command::new(programs::snapshotter()?);
        command.arg("serve").arg("--config").arg(config);
        command.arg("--root").arg(dir.join("root"));
        command.arg("--address").arg(dir.join("socket"));
        Ok(command)
    }
}

fn content() -> Result<Vec<u8>> {
    let mut bytes = vec![0; SIZE];
    Noise(7).read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A directory on a file system of so many bytes.
fn small_disk(scratch: &Scratch, size: usize) -> Result<PathBuf> {
    let dir = scratch.fresh_dir("disk")?;
    run(Command::new("mount")
        .args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"])
        .arg(&dir))?;
    Ok(dir)
}

/// The same command where there is no `/dev/fuse`.
fn without_fuse(command: &Command) -> Command {
    let mut unshared = Command::new("unshare");
    unshared
        .args(["--mount", "--propagation", "private", "sh", "-ec"])
        .arg("mount -t tmpfs none /dev; exec \"$@\"")
        .arg("sh")
        .arg(command.get_program())
        .args(command.get_args());
    unshared
}

fn is_empty(dir: &Path) -> Result<bool> {
    Ok(!dir.exists() || fs::read_dir(dir)?.next().is_none())
}

#[test]
fn an_image_that_is_none() -> Result<()> {
    let rig = Rig::new()?;
    let scratch = &rig.scratch;
    let missing = rig.registry.reference("no/such:image");
    let directory = format!("oci:{}", scratch.dir("empty")?.display());
    let out = scratch.path().join("out");
    let to = format!("oci:{}:v1", out.display());
    let target = scratch.dir("mnt")?.display().to_string();

    let layout = scratch.dir("no-tar")?;
    let mut writer = LayoutWriter::new(&layout)?;
    writer.layer(Compression::Gzip, |to| Ok(to.write_all(&content()?)?))?;
    writer.finish(image::TAG, &["/bin/true"])?;
    let no_tar = format!("oci:{}:{}", layout.display(), image::TAG);

    let not_there: &[&str] = &["no/such:image", "404", "check the name"];
    let no_layout: &[&str] = &["empty", "no OCI layout"];
    let cases: [(&[&str], &[&str]); 8] = [
        (&["convert", &missing, &to], not_there),
        (&["inspect", &missing], not_there),
        (&["verify", &missing], not_there),
        (&["mount", &missing, &target], not_there),
        (&["convert", &directory, &to], no_layout),
        (&["inspect", &directory], no_layout),
        (&["verify", &directory], no_layout),
        (&["convert", &no_tar, &to], &["sha256:", "no tar archive"]),
    ];
    for (args, parts) in cases {
        refusal_in_one_line(sluice_command()?.args(args), parts)?;
        ensure!(!out.exists(), "{args:?} left {}", out.display());
        ensure!(is_empty(Path::new(&target))?, "{args:?}");
    }
    Ok(())
}

#[test]
fn a_full_disk() -> Result<()> {
    let rig = Rig::new()?;
    // A layout that is there already keeps what it has.
    for kept in [false, true] {
        let disk = small_disk(&rig.scratch, SIZE)?;
        let out = disk.join("out");
        let to = |tag: &str| format!("oci:{}:{tag}", out.display());
        if kept {
            let small = rig.scratch.dir("small")?;
            let mut writer = LayoutWriter::new(&small)?;
            writer.layer(Compression::Gzip, |to| Tarball::new(to).finish())?;
            writer.finish(image::TAG, &["/bin/true"])?;
            let small = format!("oci:{}:{}", small.display(), image::TAG);
            run(sluice_command()?.args(["convert", &small, &to("kept")]))?;
        }
        refusal_in_one_line(
            sluice_command()?.args(["convert", &rig.source, &to("v1")]),
            &["No space left on device", "free some space"],
        )?;
        match kept {
            true => drop(run(sluice_command()?.args(["verify", &to("kept")]))?),
            false => ensure!(!out.exists(), "it left {}", out.display()),
        }
    }

    // Not even the metadata of the layer has room.
    let disk = small_disk(&rig.scratch, 16 << 10)?;
    let root = disk.join("root").display().to_string();
    let target = rig.scratch.dir("mnt")?;
    refusal_in_one_line(
        &mut rig.mount(&target, &["--root", &root])?,
        &[&rig.lazy, "No space left on device"],
    )?;
    ensure!(mounts_below(&target)?.is_empty());
    ensure!(is_empty(&disk.join("root/layers"))?);
    Ok(())
}

#[test]
fn a_machine_without_fuse_or_file_backed_erofs() -> Result<()> {
    let rig = Rig::new()?;
    let target = rig.scratch.dir("mnt")?;
    let root = rig.scratch.path().join("root");
    let rooted: &[&str] = &["--root", &root.display().to_string()];
    let before = mounts_below(rig.scratch.path())?;
    let clean = || -> Result<()> {
        ensure!(
            mounts_below(rig.scratch.path())? == before,
            "a mount is left"
        );
        ensure!(is_empty(&root.join("layers"))?);
        ensure!(!root.join("probe").exists());
        Ok(())
    };
    let fuse = ["/dev/fuse", "modprobe fuse"];
    refusal_in_one_line(&mut without_fuse(&rig.mount(&target, rooted)?), &fuse)?;
    clean()?;

    let remedy: &[&str] = &[
        "erofs",
        "block devices only",
        "Linux 6.12",
        "choose mode fuse",
    ];
    let by_force = [rooted, &["--mode", "erofs"]].concat();
    let mut command = rig.mount(&target, &by_force)?;
    refusal_in_one_line(without_file_backed_erofs(&mut command), remedy)?;
    clean()?;

    // Left to choose, it takes what works.
    let mut command = rig.mount(&target, rooted)?;
    without_file_backed_erofs(&mut command);
    let process = rig.mounted(&target, command)?;
    ensure!(fs::read(target.join("content"))? == content()?);
    let kinds: Vec<_> = mounts_below(&root)?.into_iter().map(|m| m.kind).collect();
    ensure!(kinds == ["fuse.sluice"], "{kinds:?}");
    process.stop()?;

    // The daemon, too.
    let dir = rig.scratch.fresh_dir("daemon")?;
    let mut command = rig.daemon(&dir, Mode::Erofs.name())?;
    refusal_in_one_line(without_file_backed_erofs(&mut command), remedy)?;
    ensure!(!dir.join("socket").exists());
    let mut command = rig.daemon(&dir, "auto")?;
    without_file_backed_erofs(&mut command);
    let daemon = rig.scratch.spawn("daemon", command)?;
    wait_for("the daemon", || {
        ensure!(daemon.is_running(), "it ended: {}", daemon.log());
        Ok(daemon.log().contains("serving").then_some(()))
    })?;
    let log = daemon.log();
    ensure!(
        log.contains("FUSE alone: the kernel mounts EROFS from block"),
        "{log}"
    );
    ensure!(log.contains("mode=\"fuse\""), "{log}");
    daemon.stop()?;
    Ok(())
}

#[test]
fn content_that_was_cut_short_is_fetched_again() -> Result<()> {
    let rig = Rig::new()?;
    let proxy = Proxy::start(rig.registry.host())?;
    let layer = rig.registry.manifest(&rig.lazy)?.layers.remove(0).digest;
    let target = rig.scratch.dir("mnt")?;
    for mode in Mode::ALL {
        let root = rig.scratch.fresh_dir("root")?;
        let mut command = sluice_command()?;
        command.args(["mount", "--mode", mode.name(), "--root"]);
        command.arg(&root).arg(proxy.reference("image:lazy"));
        command.arg(&target);
        let process = rig.mounted(&target, command)?;
        let file = target.join("content");
        ensure!(fs::read(&file)? == content()?);
        let before = proxy.requests(&layer.to_string());

        let data = root.join("layers").join(layer.hex()).join(DATA);
        let data = File::options().write(true).open(data)?;
        data.set_len(SIZE as u64 / 2)?;
        // Or the kernel would answer from its cache.
        rustix::fs::fadvise(File::open(&file)?, 0, None, Advice::DontNeed)?;
        ensure!(fs::read(&file)? == content()?, "{}", mode.name());
        ensure!(
            proxy.requests(&layer.to_string()) > before,
            "it was not read"
        );
        ensure!(data.metadata()?.len() == SIZE as u64);
        process.stop()?;
        let log = process.log();
        ensure!(log.contains("was cut short"), "{log}");
    }
    Ok(())
}

#[test]
fn a_root_that_another_uses_or_a_newer_version_wrote() -> Result<()> {
    let rig = Rig::new()?;
    let (target, other) = (rig.scratch.dir("mnt")?, rig.scratch.dir("other")?);
    let root = rig.scratch.path().join("root");
    let rooted: &[&str] = &["--root", &root.display().to_string()];
    let process = rig.mounted(&target, rig.mount(&target, rooted)?)?;
    refusal_in_one_line(
        &mut rig.mount(&other, rooted)?,
        &[&root.display().to_string(), "in use", "--root"],
    )?;
    ensure!(fs::read(target.join("content"))? == content()?);
    process.stop()?;

    let layer = rig.registry.manifest(&rig.lazy)?.layers.remove(0).digest;
    let chunks = root.join("layers").join(layer.hex()).join(CHUNKS);
    let file = File::options().read(true).write(true).open(&chunks)?;
    file.write_all_at(&9u32.to_le_bytes(), 8)?;
    let before = fs::read(&chunks)?;
    refusal_in_one_line(
        &mut rig.mount(&target, rooted)?,
        &[
            &chunks.display().to_string(),
            "newer version of Sluice",
            "remove",
        ],
    )?;
    ensure!(fs::read(&chunks)? == before, "it was touched");
    Ok(())
}
