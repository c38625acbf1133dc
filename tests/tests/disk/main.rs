//! Disks that are full, fail, lose writes or lose power, and files that are
//! damaged: no container reads a wrong byte, and what can go on goes on.

mod power;
mod read_only;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use sluice_oci::Digest;
use sluice_snapshotter::layer_dir::LayerDir;
use sluice_tests::command::{attempt, run, wait_for};
use sluice_tests::content::{self, noise};
use sluice_tests::daemon::{Mode, ON_DEMAND, Options};
use sluice_tests::disk::{Cut, Disk, Faults};
use sluice_tests::figures;
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Tarball};
use sluice_tests::killer::signal;
use sluice_tests::{Containerd, Daemon, Registry, Scratch, programs};

const SLUICE: &str = "sluice";
const FILES: usize = 12;

/// An image of one layer, pulled lazily and mounted.
struct Rig {
    _registry: Registry,
    daemon: Daemon,
    containerd: Containerd,
    reference: String,
    root: PathBuf,
    files: Vec<(String, Vec<u8>)>,
    layer: Digest,
}

impl Rig {
    fn start(scratch: &Scratch, options: &Options) -> Result<Self> {
        let registry = Registry::start(scratch)?;
        let layout = scratch.fresh_dir("layout")?;
        let mut writer = LayoutWriter::new(&layout)?;
        let mut files = Vec::new();
        writer.layer(Compression::Gzip, |to| {
            let mut tar = Tarball::new(to);
            for file in 0..FILES {
                let content = noise(150_000 + file * 1000, file as u64);
                let name = format!("file-{file}");
                tar.file(&name, &Meta::mode(0o644), &content)?;
                files.push((name, content));
            }
            tar.finish()
        })?;
        writer.finish(image::TAG, &["/none"])?;
        let reference = registry.reference("app:1");
        let chunks = ["--format", "estargz", "--chunk-size", "65536"];
        image::convert(&layout, &reference, &chunks)?;
        let daemon = Daemon::start(scratch, options)?;
        let containerd = Containerd::start_with(scratch, &[(SLUICE, &daemon)])?;
        containerd.lazy_pull(&reference, SLUICE)?;
        let root = containerd.mount(&reference, SLUICE)?;
        let layer = registry.manifest(&reference)?.layers[0].digest;
        Ok(Self {
            _registry: registry,
            daemon,
            containerd,
            reference,
            root,
            files,
            layer,
        })
    }

    /// One whose daemon keeps everything on a small ext4, and where that is.
    fn on_ext4(scratch: &Scratch, mode: Mode) -> Result<(Self, PathBuf)> {
        let disk = scratch.disk("disk", 24 << 20)?;
        let root = disk.join("root");
        fs::create_dir(&root)?;
        let options = Options {
            root: Some(root),
            supervised: true,
            ..quiet(mode)
        };
        Ok((Self::start(scratch, &options)?, disk))
    }

    /// Reads a file from where it comes from, and compares every byte.
    fn check(&self, number: usize) -> Result<()> {
        content::check(&self.root, &self.files[number]).with_context(|| self.daemon.log())
    }

    fn check_all(&self) -> Result<()> {
        (0..FILES).try_for_each(|number| self.check(number))
    }

    fn said(&self, text: &str) -> usize {
        self.daemon.log().matches(text).count()
    }

    fn dir(&self) -> PathBuf {
        self.daemon.root().join("layers").join(self.layer.hex())
    }

    /// Looks at the directory beside the daemon.
    fn look(&self) -> Result<LayerDir> {
        Ok(LayerDir::open(&self.dir(), self.layer)?)
    }

    /// What containerd says that the layer takes, which is what is there.
    fn usage(&self) -> Result<u64> {
        let top = self.containerd.top_snapshot(&self.reference)?;
        wait_for("containerd to be told what is on the disk", || {
            let told = self.containerd.usage(&top, SLUICE)?;
            Ok((told == figures::on_disk(&self.dir())?).then_some(told.0))
        })
    }

    /// What `scrub` says, and whether it is content.
    fn scrub(&self) -> Result<(bool, String)> {
        let config = self.daemon.root().with_file_name("config.toml");
        let mut command = Command::new(programs::snapshotter()?);
        let output = attempt(command.arg("scrub").arg("--config").arg(config))?;
        let mut text = String::from_utf8(output.stdout)?;
        text += &String::from_utf8(output.stderr)?;
        Ok((output.status.success(), text))
    }

    fn mount_again(&mut self) -> Result<()> {
        self.containerd.wait_for_snapshotter(SLUICE)?;
        self.root = self.containerd.mount(&self.reference, SLUICE)?;
        Ok(())
    }
}

fn flip(path: &Path, at: u64) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 1], at)?;
    Ok(())
}

fn quiet(mode: Mode) -> Options {
    Options {
        mode: Some(mode),
        more: ON_DEMAND.to_owned(),
        ..Options::default()
    }
}

#[test]
fn reads_survive_a_disk_that_is_full_fails_is_slow_or_loses_power() -> Result<()> {
    let scratch = Scratch::new()?;
    let mount = scratch.dir("disk")?;
    let disk = Disk::mount(&mount)?;
    // As an installation that has been there for a while.
    fs::create_dir(mount.join("layers"))?;
    for directory in [&mount, &mount.join("layers")] {
        File::open(directory)?.sync_all()?;
    }
    let mut rig = Rig::start(
        &scratch,
        &Options {
            layers: Some(mount.join("layers")),
            ..quiet(Mode::Fuse)
        },
    )?;
    rig.check(0)?;
    let full = Faults {
        full: true,
        ..Faults::default()
    };
    disk.fail(full);
    for number in 0..4 {
        rig.check(number)?;
    }
    assert_eq!(rig.said("cannot store content"), 1, "once for each cause");
    disk.fail(Faults::default());
    rig.check(4)?;
    assert_eq!(rig.said("content is stored again"), 1);

    let unreadable = Faults {
        reads: true,
        ..Faults::default()
    };
    disk.fail(unreadable);
    rig.check(0)?;
    rig.check(4)?;
    ensure!(rig.said("cannot read") >= 1, "{}", rig.daemon.log());
    let slow = Faults {
        slow: Some(Duration::from_millis(20)),
        ..Faults::default()
    };
    disk.fail(slow);
    rig.check(5)?;
    disk.fail(Faults::default());
    rig.check_all()?;

    // A write that the disk has lost, and told of once: `scrub` makes durable
    // what is new, and that fails.
    let lossy = Faults {
        sync_once: true,
        ..Faults::default()
    };
    disk.fail(lossy);
    let (_, said) = rig.scrub()?;
    ensure!(said.contains("chunks"), "{said}");
    wait_for("everything to be fetched and made durable", || {
        rig.check_all()?;
        rig.scrub()?;
        let look = LayerDir::open(&mount.join("layers").join(rig.layer.hex()), rig.layer)?;
        Ok((look.present().count() > 0).then_some(()))
    })?;
    // The power goes, and with it the daemon and all mounts.
    rig.daemon.process().kill()?;
    run(Command::new("umount").arg("--lazy").arg(&rig.root))?;
    let after = scratch.dir("after")?;
    disk.after_power_cut(None, Cut::AllLost, &after)?;
    let layers = rig.daemon.root().join("layers");
    fs::remove_file(&layers)?;
    std::os::unix::fs::symlink(after.join("layers"), &layers)?;
    fs::write(rig.daemon.root().join("running"), "the last boot\n")?;
    rig.daemon.start_again()?;
    rig.mount_again()?;
    rig.check_all()?;
    assert_eq!(rig.said("nor did the machine"), 1);
    rig.containerd.unmount(&rig.root)?;
    rig.daemon.stop()
}

/// The same on a block device, whose file system puts off what it allocates,
/// and which has everything that the daemon keeps.
#[test]
fn reads_survive_a_full_ext4() -> Result<()> {
    for mode in Mode::ALL {
        let scratch = Scratch::new()?;
        let (rig, disk) = Rig::on_ext4(&scratch, mode)?;
        rig.check(0)?;
        let ballast = disk.join("ballast");
        fill(&ballast)?;
        for number in [1, 2, 3, 1, 0] {
            rig.check(number)?;
        }
        assert_eq!(rig.said("cannot store content"), 1, "once for each cause");
        ensure!(rig.said("No space left on device") > 0);
        // A death, an end in order, and the starts that follow, with no room to
        // write anything: readers go on.
        for end in [Signal::KILL, Signal::HUP, Signal::KILL] {
            let process = rig.daemon.serving().context("no process serves")?;
            match end {
                Signal::HUP => rig.daemon.process().signal(end)?,
                _ => signal(process, end)?,
            }
            rig.check(0)?;
            rig.check(4)?;
            rig.daemon.wait_until_ready(process)?;
        }
        fs::remove_file(&ballast)?;
        rig.check_all()?;
        ensure!(
            rig.said("content is stored again") > 0,
            "{}",
            rig.daemon.log()
        );
        rig.containerd.wait_for_snapshotter(SLUICE)?;
        rig.containerd.unmount(&rig.root)?;
        rig.daemon.stop()?;
    }
    Ok(())
}

fn cut(path: &Path, left: u64) -> Result<()> {
    let file = File::options().write(true).open(path)?;
    ensure!(file.metadata()?.len() > left, "{}", path.display());
    Ok(file.set_len(left)?)
}

/// Writes until there is no space left.
fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    for piece in [1 << 20, 4096] {
        let full = loop {
            if let Err(error) = file.write_all(&vec![1; piece]) {
                break error;
            }
        };
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        file.sync_all()?;
    }
    Ok(())
}

#[test]
fn files_that_are_damaged_under_a_running_daemon_are_mended() -> Result<()> {
    for mode in Mode::ALL {
        let scratch = Scratch::new()?;
        let rig = Rig::start(
            &scratch,
            &Options {
                supervised: true,
                ..quiet(mode)
            },
        )?;
        for number in 0..4 {
            rig.check(number)?;
        }
        // The daemon has these mapped. Its next look at them kills it: a page
        // that is gone does, and so does it itself where a part of a page is.
        // The process that follows mends them while the reader waits.
        let mut damages = vec![("chunks", 4096), ("chunks", 4096 + 70)];
        if mode == Mode::Fuse {
            damages.push(("meta.erofs", 2000));
        }
        for (times, (name, left)) in (1..).zip(damages) {
            let former = rig.daemon.serving().context("no process serves")?;
            cut(&rig.dir().join(name), left)?;
            rig.check(3 + times)?;
            rig.daemon.wait_for_next(former)?;
            wait_for("the layer to be mended", || {
                Ok((rig.said("it has been mended") >= times).then_some(()))
            })?;
        }
        ensure!(rig.said("killed by signal 7") >= 1, "SIGBUS");
        ensure!(rig.said("was cut short by another program") >= 1);
        if mode == Mode::Erofs {
            // Here the kernel reads the tree: files that it knows nothing of
            // are errors until somebody has looked.
            cut(&rig.dir().join("meta.erofs"), 2000)?;
            let fails = (0..FILES).filter(|&number| rig.check(number).is_err());
            println!("{} of {FILES} files could not be read", fails.count());
            let (content, said) = rig.scrub()?;
            ensure!(content && said.contains("it has been mended"), "{said}");
        }
        rig.check_all()?;
        rig.containerd.wait_for_snapshotter(SLUICE)?;
        rig.containerd.unmount(&rig.root)?;
        rig.containerd.forget_images()?;
        rig.daemon.stop()?;
    }
    Ok(())
}

#[test]
fn scrub_repairs_with_the_daemon_and_without() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut rig = Rig::start(&scratch, &quiet(Mode::Erofs))?;
    rig.check_all()?;
    let (content, said) = rig.scrub()?;
    ensure!(content && said.contains("all right"), "{said}");
    let data = rig.dir().join("data");
    flip(&data, 70_000)?;
    flip(&rig.dir().join("meta.erofs"), 3000)?;
    let (content, said) = rig.scrub()?;
    ensure!(content && said.contains("it has been mended"), "{said}");
    ensure!(said.contains("1 wrong, to be fetched again"), "{said}");
    rig.check_all()?;
    let (content, said) = rig.scrub()?;
    ensure!(content && said.contains("all right"), "{said}");

    rig.containerd.unmount(&rig.root)?;
    rig.daemon.stop()?;
    flip(&data, 70_000)?;
    let (content, said) = rig.scrub()?;
    ensure!(
        content && said.contains("1 wrong, to be fetched again"),
        "{said}"
    );
    ensure!(!rig.look()?.is_complete());
    let (content, said) = rig.scrub()?;
    ensure!(content && said.contains("all right"), "{said}");
    // What it cannot look at, it says.
    let newer = File::options().write(true).open(rig.dir().join("chunks"))?;
    let version = fs::read(rig.dir().join("chunks"))?[8..12].to_vec();
    newer.write_all_at(&9u32.to_le_bytes(), 8)?;
    let (content, said) = rig.scrub()?;
    ensure!(!content && said.contains("newer version"), "{said}");
    newer.write_all_at(&version, 8)?;
    // And the database: set aside, told, and everything still there.
    let mut database = File::options()
        .write(true)
        .open(rig.daemon.root().join("state.redb"))?;
    database.write_all(&noise(9000, 1))?;
    rig.daemon.start_again()?;
    rig.mount_again()?;
    rig.check_all()?;
    ensure!(rig.daemon.root().join("state.redb.damaged-0").exists());
    ensure!(rig.said("it is kept as") == 1, "{}", rig.daemon.log());
    rig.daemon.stop()
}

#[test]
fn what_nothing_mounts_gives_way_to_the_quota() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut options = quiet(Mode::Erofs);
    options.more += "[cache]\nlimit_mib = 1\n";
    let mut rig = Rig::start(&scratch, &options)?;
    let nothing = rig.usage()?;
    rig.check(0)?;
    let one = rig.usage()?;
    ensure!(one > nothing + 150_000, "{one} bytes, not a file more");
    rig.check_all()?;
    wait_for("the daemon to say that it is over its limit", || {
        Ok((rig.said("everything that is left is in use") > 0).then_some(()))
    })?;
    rig.check_all()?;
    let all = rig.usage()?;
    ensure!(all > nothing + FILES as u64 * 150_000, "{all}, not all");
    rig.containerd.unmount(&rig.root)?;
    wait_for("the content to be evicted", || {
        Ok((LayerDir::content_size(&rig.dir())? == 0).then_some(()))
    })?;
    let evicted = rig.usage()?;
    ensure!(evicted + FILES as u64 * 150_000 < all, "{evicted} of {all}");
    rig.mount_again()?;
    rig.check_all()?;
    ensure!(rig.usage()? > evicted + FILES as u64 * 150_000);
    rig.daemon.stop()
}
