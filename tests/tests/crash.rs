//! The daemon dies, is replaced or ends while containers' layers are read.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use sluice_oci::Digest;
use sluice_snapshotter::layer_dir::LayerDir;
use sluice_tests::command::{self, attempt, run, wait_for};
use sluice_tests::content::{self, noise};
use sluice_tests::daemon::{Mode, ON_DEMAND, Options};
use sluice_tests::figures::Supervisor;
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Tarball};
use sluice_tests::killer::{Killer, signal};
use sluice_tests::proxy::{Fault, Proxy};
use sluice_tests::scratch::mount_points;
use sluice_tests::systemd::UNIT;
use sluice_tests::{Containerd, Daemon, Registry, Scratch, programs};

const SLUICE: &str = "sluice";
/// What a process logs that goes on with the mount of another.
const TAKEN_OVER: &str = "going on with the mount at";
const LAYERS: usize = 3;
const FILES: usize = 8;

/// A daemon that fetches nothing but what is read.
fn quiet(mode: Mode, supervised: bool) -> Options {
    Options {
        mode: Some(mode),
        more: ON_DEMAND.to_owned(),
        supervised,
        ..Options::default()
    }
}

/// A lazily pulled image, mounted as a container's root would be.
struct Mounted {
    scratch: Scratch,
    daemon: Daemon,
    containerd: Containerd,
    proxy: Proxy,
    reference: String,
    root: PathBuf,
    files: Vec<(String, Vec<u8>)>,
    registry: Registry,
}

impl Mounted {
    fn start(mode: Mode, format: &str, supervised: bool) -> Result<Self> {
        Self::start_with(format, quiet(mode, supervised))
    }

    fn start_with(format: &str, options: Options) -> Result<Self> {
        Self::with_programs(&[], format, options)
    }

    /// With programs for a container, and `sums` for them to compare by.
    fn with_programs(names: &[&str], format: &str, options: Options) -> Result<Self> {
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        let layout = scratch.fresh_dir("layout")?;
        let mut writer = LayoutWriter::new(&layout)?;
        let mut files = Vec::new();
        let mut sums = String::new();
        for layer in 0..LAYERS {
            writer.layer(Compression::Gzip, |to| {
                let mut tar = Tarball::new(to);
                for file in 0..FILES {
                    let seed = (layer * FILES + file) as u64;
                    let content = noise(50_000 + file * file * 20_011, seed);
                    let name = format!("{layer}-{file}");
                    tar.file(&name, &Meta::mode(0o644), &content)?;
                    sums += &format!("{}  /{name}\n", Digest::of(&content).hex());
                    files.push((name, content));
                }
                if layer + 1 == LAYERS && !names.is_empty() {
                    image::add_programs(&mut tar, names)?;
                    tar.file("sums", &Meta::mode(0o644), sums.as_bytes())?;
                }
                tar.finish()
            })?;
        }
        writer.finish(image::TAG, &["/none"])?;
        let chunks = ["--format", format, "--chunk-size", "65536"];
        image::convert(&layout, &registry.reference("app:1"), &chunks)?;
        let proxy = Proxy::start(registry.host())?;
        let reference = proxy.reference("app:1");
        let daemon = Daemon::start(&scratch, &options)?;
        let containerd = Containerd::start_with(&scratch, &[(SLUICE, &daemon)])?;
        containerd.lazy_pull(&reference, SLUICE)?;
        let root = containerd.mount(&reference, SLUICE)?;
        Ok(Self {
            scratch,
            daemon,
            containerd,
            proxy,
            reference,
            root,
            files,
            registry,
        })
    }

    /// Reads a file from where it comes from, and compares every byte.
    fn check(&self, number: usize) -> Result<()> {
        content::check(&self.root, &self.files[number])
    }

    fn check_all(&self) -> Result<()> {
        (0..self.files.len()).try_for_each(|number| self.check(number))
    }

    /// How often the daemon has logged a text, over all its lives.
    fn said(&self, text: &str) -> usize {
        self.daemon.log().matches(text).count()
    }

    fn process(&self) -> Result<u32> {
        self.daemon.serving().context("no process serves")
    }

    /// containerd takes a while to call again after its calls have failed.
    fn containerd_is_back(&self) -> Result<()> {
        wait_for("containerd to reach the daemon", || {
            let usage = ["snapshots", "--snapshotter", SLUICE, "usage"];
            let answer = attempt(self.containerd.ctr().args(usage))?;
            Ok(answer.status.success().then_some(()))
        })
    }

    /// Removes the image and ends everything in order; nothing may stay.
    fn end(self) -> Result<()> {
        self.containerd_is_back()?;
        self.containerd.unmount(&self.root)?;
        self.containerd.forget_images()?;
        let layers = fs::read_dir(self.daemon.root().join("layers"))?.count();
        ensure!(
            layers == 0,
            "{layers} layers are left: {}",
            self.daemon.log()
        );
        self.daemon.stop()?;
        let left = mount_points(&self.daemon.root());
        ensure!(left.is_empty(), "{left:?} are still mounted");
        Ok(())
    }
}

/// Calls `disturb` while `readers` threads read and compare without a pause;
/// returns how many files they read. No read may fail.
fn under_load(
    mounted: &Mounted,
    readers: u64,
    disturb: impl FnOnce(&AtomicU64) -> Result<()>,
) -> Result<u64> {
    let stop = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..readers)
            .map(|reader| {
                let (stop, reads) = (&stop, &reads);
                scope.spawn(move || -> Result<()> {
                    let mut order = noise(1 << 14, 1000 + reader).into_iter().cycle();
                    while !stop.load(Ordering::Relaxed) {
                        let number = usize::from(order.next().unwrap_or(0));
                        mounted.check(number % mounted.files.len())?;
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let disturbed = disturb(&reads);
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().expect("a reader panicked")?;
        }
        disturbed
    })?;
    Ok(reads.into_inner())
}

/// Waits until readers have read this much more.
fn go_on(reads: &AtomicU64, more: u64) -> Result<()> {
    let before = reads.load(Ordering::Relaxed);
    wait_for("the readers to go on", || {
        Ok((reads.load(Ordering::Relaxed) >= before + more).then_some(()))
    })
}

/// From when a process says that it is ready until a reader has a whole file,
/// of readers that all wait for it.
fn time_to_go_on(mounted: &Mounted, process: u32, reads: &AtomicU64) -> Result<Duration> {
    let ready = format!("process {process} is ready");
    let pause = || std::thread::sleep(Duration::from_micros(300));
    let before = reads.load(Ordering::Relaxed);
    while mounted.said(&ready) == 0 {
        ensure!(mounted.daemon.process().is_running());
        pause();
    }
    let since = Instant::now();
    wait_for("the readers to go on", || {
        for _ in 0..1000 {
            if reads.load(Ordering::Relaxed) > before {
                return Ok(Some(()));
            }
            pause();
        }
        Ok(None)
    })?;
    Ok(since.elapsed())
}

/// What a container does that reads all files from where they come from, and
/// compares every byte, until one is wrong or cannot be read.
const COMPARE: &str = "while :; do
    for file in /[0-9]*; do dd if=$file iflag=nocache count=0 status=none || exit 1; done
    sha256sum --quiet --check /sums || exit 1
    echo compared
done";

fn reads_survive_kills(mode: Mode, format: &str) -> Result<()> {
    const KILLS: usize = 22;
    let mounted = Mounted::with_programs(&["sh", "dd", "sha256sum"], format, quiet(mode, true))?;
    let Mounted {
        containerd,
        reference,
        ..
    } = &mounted;
    let run = containerd.run_command(SLUICE, reference, "load", &["sh", "-c", COMPARE]);
    let container = mounted.scratch.spawn("container", run)?;
    let compares = || {
        let before = container.log().matches("compared").count();
        wait_for("the container to compare all files", || {
            let log = container.log();
            ensure!(
                container.is_running(),
                "it ended: {log}\n{}",
                mounted.daemon.log()
            );
            // Once from where it is, and once from the beginning.
            Ok((log.matches("compared").count() >= before + 2).then_some(()))
        })
    };
    compares()?;
    let supervisor = mounted.daemon.process().pid();
    let before = Supervisor::of(supervisor)?;
    let mut gaps = Vec::new();
    let read = under_load(&mounted, 4, |reads| {
        let mut killer = Killer::new(7, Duration::from_millis(255));
        for kill in 0..KILLS {
            let process = killer.strike(&mounted.daemon)?;
            // Every other one must come as far as to serve; the rest die
            // whenever it hits them, while they start or under load.
            if kill % 2 == 0 {
                gaps.push(time_to_go_on(&mounted, process, reads)?);
            }
        }
        compares()?;
        go_on(reads, 40)
    })?;
    ensure!(read >= 40, "only {read} files were read");
    gaps.sort_unstable();
    eprintln!(
        "mode {}: readers went on {:?} after the next process was ready, {:?} at most",
        mode.name(),
        gaps[gaps.len() / 2],
        gaps[gaps.len() - 1],
    );
    assert_eq!(mounted.said("killed by signal 9"), KILLS);
    let taken_over = mounted.said(TAKEN_OVER);
    ensure!((KILLS / 2..=KILLS).contains(&taken_over), "{taken_over}");
    let after = Supervisor::of(supervisor)?;
    after.has_not_grown(&before)?;
    let kib = [before, after].map(|held| held.memory >> 10);
    eprintln!("`supervise` takes {kib:?} KiB before and after {KILLS} kills");
    mounted.containerd_is_back()?;
    (mounted.containerd).ctr_text(&["tasks", "kill", "--signal", "SIGKILL", "load"])?;
    wait_for("the container to be removed", || {
        Ok((!container.is_running()).then_some(()))
    })?;
    mounted.end()
}

#[test]
fn reads_survive_kills_in_mode_erofs() -> Result<()> {
    reads_survive_kills(Mode::Erofs, "zstd-chunked")
}

#[test]
fn reads_survive_kills_in_mode_fuse() -> Result<()> {
    reads_survive_kills(Mode::Fuse, "estargz")
}

fn waiting_reads_survive(mode: Mode) -> Result<()> {
    let mounted = Mounted::start(mode, "estargz", true)?;
    let Mounted { proxy, daemon, .. } = &mounted;
    // The registry falls silent: every read of missing bytes waits.
    proxy.forget();
    proxy.fail_ranges("/blobs/", u64::MAX, Fault::Stall(0));
    std::thread::scope(|scope| -> Result<()> {
        let readers: Vec<_> = (0..mounted.files.len())
            .map(|number| {
                let mounted = &mounted;
                scope.spawn(move || mounted.check(number))
            })
            .collect();
        let all_wait = || -> Result<()> {
            // One range for each layer at the least.
            wait_for("reads to wait", || {
                Ok((proxy.asked("/blobs/") >= LAYERS).then_some(()))
            })?;
            proxy.forget();
            ensure!(readers.iter().all(|reader| !reader.is_finished()));
            Ok(())
        };
        let mut process = mounted.process()?;
        for _ in 0..3 {
            all_wait()?;
            signal(process, Signal::KILL)?;
            process = daemon.wait_for_next(process)?;
        }
        // And an end in good order, whose unfinished answers are no failures.
        all_wait()?;
        proxy.heal();
        daemon.process().signal(Signal::HUP)?;
        daemon.wait_for_next(process)?;
        for reader in readers {
            reader.join().expect("a reader panicked")?;
        }
        Ok(())
    })?;
    mounted.end()
}

#[test]
fn waiting_reads_survive_in_mode_erofs() -> Result<()> {
    waiting_reads_survive(Mode::Erofs)
}

#[test]
fn waiting_reads_survive_in_mode_fuse() -> Result<()> {
    waiting_reads_survive(Mode::Fuse)
}

#[test]
fn a_new_program_takes_over_under_load() -> Result<()> {
    const UPGRADES: usize = 5;
    let place = Scratch::new()?;
    let program = place.path().join("sluice-snapshotter");
    fs::copy(programs::snapshotter()?, &program)?;
    let mounted = Mounted::start_with(
        "zstd-chunked",
        Options {
            supervised: true,
            program: Some(program.clone()),
            ..Options::default()
        },
    )?;
    let runs =
        |process: u32| -> Result<u64> { Ok(fs::metadata(format!("/proc/{process}/exe"))?.ino()) };
    under_load(&mounted, 4, |reads| {
        let mut process = mounted.process()?;
        for _ in 0..UPGRADES {
            let next = place.path().join("next");
            fs::copy(programs::snapshotter()?, &next)?;
            let wanted = fs::metadata(&next)?.ino();
            ensure!(runs(process)? != wanted);
            fs::rename(&next, &program)?;
            mounted.daemon.process().signal(Signal::HUP)?;
            process = mounted.daemon.wait_for_next(process)?;
            assert_eq!(runs(process)?, wanted);
            go_on(reads, 10)?;
        }
        Ok(())
    })?;
    assert_eq!(mounted.said(TAKEN_OVER), UPGRADES);
    mounted.end()
}

/// The shipped unit under a real systemd: what it keeps, how it ends what, and
/// when it starts again.
#[test]
fn reads_survive_kills_and_restarts_under_systemd() -> Result<()> {
    const ROUNDS: usize = 6;
    for mode in Mode::ALL {
        let options = Options {
            systemd: true,
            ..quiet(mode, false)
        };
        let mounted = Mounted::start_with("estargz", options)?;
        let systemd = mounted.daemon.systemd()?;
        let kept = |name: &str| systemd.property(name);
        assert_eq!(kept("NFileDescriptorStore")?, "2", "a device and its terms");
        let mut killer = Killer::new(11, Duration::from_millis(100));
        under_load(&mounted, 4, |reads| {
            for round in 0..ROUNDS {
                match round % 2 {
                    0 => {
                        killer.strike(&mounted.daemon)?;
                        // Counted anew since the last restart by hand.
                        assert_eq!(kept("NRestarts")?, "1");
                    }
                    _ => {
                        let former = mounted.process()?;
                        systemd.control(&["restart", UNIT])?;
                        mounted.daemon.wait_for_next(former)?;
                    }
                }
                go_on(reads, 10)?;
            }
            Ok(())
        })?;
        assert_eq!(mounted.said(TAKEN_OVER), ROUNDS);
        assert_eq!(mounted.said("stands on layers"), 0);
        assert_eq!(kept("NFileDescriptorStore")?, "2");
        mounted.containerd_is_back()?;
        mounted.containerd.unmount(&mounted.root)?;
        mounted.containerd.forget_images()?;
        systemd.control(&["stop", UNIT])?;
        assert_eq!(kept("Result")?, "success");
        run(Command::new(programs::snapshotter()?)
            .args(["cleanup", "--root"])
            .arg(mounted.daemon.root()))?;
        assert_eq!(mount_points(&mounted.daemon.root()), [] as [PathBuf; 0]);
    }
    Ok(())
}

/// What a former process had begun to download, the next one does, without
/// being asked for the layer.
#[test]
fn regression_downloads_go_on_after_a_restart_in_both_modes() -> Result<()> {
    for mode in Mode::ALL {
        let mounted = Mounted::start_with(
            "estargz",
            Options {
                mode: Some(mode),
                more: "[prefetch]\nenabled = false\n[background]\ndelay_seconds = 86400\n".into(),
                supervised: true,
                ..Options::default()
            },
        )?;
        let configuration = mounted.daemon.root().with_file_name("config.toml");
        let text = fs::read_to_string(&configuration)?;
        fs::write(&configuration, text.replace("= 86400", "= 0"))?;
        let process = mounted.process()?;
        mounted.daemon.process().signal(Signal::HUP)?;
        mounted.daemon.wait_for_next(process)?;
        for layer in mounted.registry.manifest(&mounted.reference)?.layers {
            let hex = layer.digest.hex();
            let path = mounted.daemon.root().join("layers").join(hex);
            wait_for("the download", || {
                let open = LayerDir::open(&path, layer.digest)?;
                Ok(open.is_complete().then_some(()))
            })
            .with_context(|| mounted.daemon.log())?;
        }
        mounted.check_all()?;
        mounted.end()?;
    }
    Ok(())
}

#[test]
fn a_process_without_a_keeper_says_whom_its_end_has_hit() -> Result<()> {
    for mode in Mode::ALL {
        let mut mounted = Mounted::start(mode, "estargz", false)?;
        mounted.check_all()?;
        // As a container has it, whose number is also that of its snapshot.
        let container = mounted.scratch.dir("container")?;
        let top = mounted.containerd.top_snapshot(&mounted.reference)?;
        let snapshots = |arguments: &[&str]| {
            let mut ctr = mounted.containerd.ctr();
            ctr.args(["snapshots", "--snapshotter", SLUICE])
                .args(arguments);
            command::text(&mut ctr)
        };
        snapshots(&["prepare", "container-1", &top])?;
        let target = container.display().to_string();
        let mount = snapshots(&["mounts", &target, "container-1"])?;
        run(Command::new("sh").args(["-c", &mount]))?;
        fs::write(container.join("written"), "content")?;
        let held = fs::File::open(container.join("written"))?;
        let points = |daemon: &Daemon| {
            let mut points = mount_points(&daemon.root());
            points.sort();
            points
        };
        let before = points(&mounted.daemon);

        mounted.daemon.process().kill()?;
        mounted.daemon.start_again()?;
        let view = format!("the mount at {} stands on layers", mounted.root.display());
        let writable = format!(
            "the mount at {target} of container container-1 in namespace {} stands on layers",
            mounted.containerd.namespace()
        );
        for told in [&view, &writable] {
            wait_for("the daemon to tell", || {
                Ok((mounted.said(told) > 0).then_some(()))
            })?;
            assert_eq!(mounted.said(told), 1);
        }
        // Mounts are where they were, without anybody having asked.
        wait_for("the layers to be mounted again", || {
            Ok((points(&mounted.daemon) == before).then_some(()))
        })?;
        // The container was not disturbed: what is its own is there.
        assert_eq!(fs::read_to_string(container.join("written"))?, "content");
        drop(held);
        run(Command::new("umount").arg(&container))?;
        mounted.containerd_is_back()?;
        snapshots(&["remove", "container-1"])?;
        // What is mounted from now on works.
        let mount_anew = |mounted: &mut Mounted| -> Result<()> {
            mounted.containerd_is_back()?;
            let dead = mounted.root.clone();
            mounted.root = mounted.containerd.mount(&mounted.reference, SLUICE)?;
            mounted.check_all()?;
            mounted.containerd.unmount(&dead)
        };
        mount_anew(&mut mounted)?;
        if mode == Mode::Erofs {
            // From the next start on the kernel reads it alone: everything is
            // here, and durable when it was scrubbed.
            run(Command::new(programs::snapshotter()?)
                .args(["scrub", "--config"])
                .arg(mounted.daemon.root().with_file_name("config.toml")))?;
            mounted.daemon.process().kill()?;
            mounted.daemon.start_again()?;
            mount_anew(&mut mounted)?;
            let (told, detached) = (mounted.said("stands on layers"), mounted.said("detaching"));
            mounted.daemon.process().kill()?;
            mounted.check_all()?;
            mounted.daemon.start_again()?;
            mounted.containerd_is_back()?;
            assert_eq!(mounted.said("stands on layers"), told, "a false alarm");
            assert_eq!(mounted.said("detaching"), detached + 1, "only the blobs");
            mounted.check_all()?;
        }
        mounted.end()?;
    }
    Ok(())
}

#[test]
fn cleanup_unmounts_and_says_who_is_in_the_way() -> Result<()> {
    for mode in Mode::ALL {
        let mounted = Mounted::start(mode, "estargz", false)?;
        let cleanup = || -> Result<(bool, String)> {
            let output = attempt(
                Command::new(programs::snapshotter()?)
                    .args(["cleanup", "--root"])
                    .arg(mounted.daemon.root()),
            )?;
            let mut text = String::from_utf8(output.stdout)?;
            text += &String::from_utf8(output.stderr)?;
            Ok((output.status.success(), text))
        };
        let (done, said) = cleanup()?;
        ensure!(!done && said.contains("in use by another daemon"), "{said}");

        mounted.daemon.process().kill()?;
        let before = mount_points(&mounted.daemon.root());
        let (done, said) = cleanup()?;
        ensure!(!done, "{said}");
        let user = format!("used by the overlay at {}", mounted.root.display());
        let stands_on = match mode {
            Mode::Erofs => LAYERS,
            Mode::Fuse => 1,
        };
        assert_eq!(said.matches(&user).count(), stands_on, "{said}");
        let after = mount_points(&mounted.daemon.root());
        ensure!(after.len() >= stands_on && after.len() <= before.len());

        run(Command::new("umount").arg(&mounted.root))?;
        let (done, said) = cleanup()?;
        ensure!(done, "{said}");
        assert_eq!(
            said.matches("\nunmounted ").count() + 1,
            after.len(),
            "{said}"
        );
        assert_eq!(mount_points(&mounted.daemon.root()), [] as [PathBuf; 0]);
        assert_eq!(cleanup()?, (true, "nothing is mounted\n".to_owned()));
        drop(mounted.scratch);
    }
    Ok(())
}
