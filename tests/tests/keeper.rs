//! What keeps the daemon's mounts alive from one process to the next, with a
//! small daemon in the place of the real one.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::Advice;
use rustix::process::Signal;
use sluice_snapshotter::mount::erofs;
use sluice_tests::command::{self, wait_for};
use sluice_tests::content::noise;
use sluice_tests::figures::Supervisor;
use sluice_tests::killer::signal as kill;
use sluice_tests::{Process, Scratch};

/// A supervised daemon in a directory of its own.
struct Kept {
    scratch: Scratch,
    dir: PathBuf,
    supervisor: Process,
}

impl Kept {
    fn start(prepare: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_kept")), prepare)
    }

    /// By a command that runs what its further arguments say.
    fn start_by(start: Command, prepare: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        let scratch = Scratch::new()?;
        let dir = scratch.dir("kept")?;
        fs::create_dir(dir.join("mount"))?;
        fs::write(dir.join("events"), "")?;
        prepare(&dir)?;
        let mut start = start;
        start.arg("supervise").arg(&dir);
        let supervisor = scratch.spawn("supervise", start)?;
        Ok(Self {
            scratch,
            dir,
            supervisor,
        })
    }

    fn with_content(bytes: &[u8]) -> Result<Self> {
        let kept = Self::start(|dir| Ok(fs::write(dir.join("data"), bytes)?))?;
        kept.wait_for_process(0)?;
        Ok(kept)
    }

    fn events(&self) -> Vec<String> {
        let events = fs::read_to_string(self.dir.join("events")).unwrap_or_default();
        events.lines().map(str::to_owned).collect()
    }

    fn count(&self, event: &str) -> usize {
        let events = self.events();
        events.iter().filter(|line| line.as_str() == event).count()
    }

    /// Waits until a process after the first `after` ones serves; its number.
    fn wait_for_process(&self, after: usize) -> Result<u32> {
        wait_for("the next process", || {
            ensure!(
                self.supervisor.is_running(),
                "the supervisor ended: {}",
                self.supervisor.log()
            );
            self.process(after)
        })
    }

    fn process(&self, number: usize) -> Result<Option<u32>> {
        let events = self.events();
        let mut served = events.iter().filter_map(|line| {
            line.strip_prefix("mounted ")
                .or_else(|| line.strip_prefix("adopted "))
        });
        Ok(served.nth(number).map(str::parse).transpose()?)
    }

    fn file(&self) -> PathBuf {
        self.dir.join("mount/7")
    }

    fn wait_for_end(&self) -> Result<()> {
        wait_for("the supervisor's end", || {
            Ok((!self.supervisor.is_running()).then_some(()))
        })
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.dir.join("hold"));
    }
}

/// A tree that the kernel's EROFS shows, with its content in the kept file.
struct Tree {
    kept: Kept,
    data: Vec<u8>,
    target: PathBuf,
    contents: Vec<Vec<u8>>,
}

impl Tree {
    fn mount(contents: Vec<Vec<u8>>) -> Result<Self> {
        let scratch = Scratch::new()?;
        let tree = scratch.dir("tree")?;
        for (number, content) in contents.iter().enumerate() {
            fs::write(tree.join(number.to_string()), content)?;
        }
        let (meta, blob) = (scratch.path().join("meta"), scratch.path().join("blob"));
        File::create(&blob)?;
        command::run(
            Command::new("mkfs.erofs")
                .arg(format!("--blobdev={}", blob.display()))
                .args(["--chunksize=4096", "-E", "force-chunk-indexes"])
                .args([&meta, &tree]),
        )?;
        let data = fs::read(&blob)?;
        let kept = Kept::with_content(&data)?;
        let target = kept.scratch.dir("erofs")?;
        let options = erofs::Options {
            direct_io: true,
            ..Default::default()
        };
        erofs::mount(&meta, &kept.file(), &target, options)?;
        Ok(Self {
            kept,
            data,
            target,
            contents,
        })
    }

    /// Unmounts all, which nothing may prevent.
    fn end(self) -> Result<()> {
        rustix::mount::unmount(&self.target, rustix::mount::UnmountFlags::empty())?;
        self.kept.supervisor.stop()?;
        assert!(!self.kept.file().exists());
        Ok(())
    }
}

#[test]
fn reads_through_both_ways_survive_any_number_of_kills() -> Result<()> {
    const KILLS: usize = 25;
    let tree = Tree::mount(
        (0..12)
            .map(|n| noise(300_000 + n * 77_777, n as u64))
            .collect(),
    )?;
    let Tree {
        kept,
        data,
        target,
        contents,
    } = &tree;

    let stop = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    std::thread::scope(|scope| -> Result<()> {
        let mut readers = Vec::new();
        for reader in 0..4 {
            let (stop, reads) = (&stop, &reads);
            readers.push(scope.spawn(move || -> Result<()> {
                let mut order = noise(1 << 16, 1000 + reader).into_iter().cycle();
                while !stop.load(Ordering::Relaxed) {
                    let number = usize::from(order.next().unwrap_or(0)) % contents.len();
                    let path = target.join(number.to_string());
                    let mut file = File::open(&path)?;
                    // From the daemon again, not from memory.
                    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
                    let mut read = Vec::new();
                    file.read_to_end(&mut read)
                        .with_context(|| format!("reading {}", path.display()))?;
                    ensure!(read == contents[number], "{} is wrong", path.display());
                    reads.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }));
        }
        for reader in 0..2 {
            let (stop, reads) = (&stop, &reads);
            readers.push(scope.spawn(move || -> Result<()> {
                let mut order = noise(1 << 16, 2000 + reader).into_iter().cycle();
                let mut file = File::open(kept.file())?;
                while !stop.load(Ordering::Relaxed) {
                    let mut next = || usize::from(order.next().unwrap_or(0));
                    let offset = (next() << 8 | next()) * 4097 % (data.len() - 200_000);
                    let len = 1 + next() * 700;
                    file.seek(SeekFrom::Start(offset as u64))?;
                    let mut read = vec![0; len];
                    file.read_exact(&mut read).context("reading the blob")?;
                    ensure!(read == data[offset..][..len], "wrong bytes at {offset}");
                    reads.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }));
        }
        let killed = (|| -> Result<()> {
            let mut pauses = noise(KILLS, 3000).into_iter();
            for kill_number in 0..KILLS {
                let process = kept.wait_for_process(kill_number)?;
                // Sometimes at once, sometimes under load.
                let pause = u64::from(pauses.next().unwrap_or(0)) % 200;
                std::thread::sleep(Duration::from_millis(pause));
                kill(process, Signal::KILL)?;
            }
            kept.wait_for_process(KILLS)?;
            let before = reads.load(Ordering::Relaxed);
            // Readers have gone on.
            wait_for("reads after the last kill", || {
                Ok((reads.load(Ordering::Relaxed) > before + 50).then_some(()))
            })
        })();
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("a reader panicked")?;
        }
        killed
    })?;
    let events = kept.events();
    let of = |prefix: &str| events.iter().filter(|e| e.starts_with(prefix)).count();
    assert_eq!((of("mounted "), of("adopted ")), (1, KILLS));
    tree.end()
}

#[test]
fn reads_that_wait_when_the_daemon_dies_are_answered_by_the_next() -> Result<()> {
    const READERS: usize = 24;
    let data = noise(READERS * 8192, 1);
    let kept = Kept::with_content(&data)?;
    fs::write(kept.dir.join("hold"), "")?;
    std::thread::scope(|scope| -> Result<()> {
        let readers: Vec<_> = (0..READERS)
            .map(|reader| {
                let (kept, data) = (&kept, &data);
                scope.spawn(move || -> Result<()> {
                    let mut read = [0; 8192];
                    File::open(kept.file())?.read_exact_at(&mut read, reader as u64 * 8192)?;
                    ensure!(read == data[reader * 8192..][..8192], "wrong bytes");
                    Ok(())
                })
            })
            .collect();
        let held = |times: usize| {
            wait_for("the readers to wait", || {
                Ok((kept.count("held") >= READERS * times).then_some(()))
            })
        };
        held(1)?;
        kill(kept.wait_for_process(0)?, Signal::KILL)?;
        // All of them again, in the next process, and once more.
        held(2)?;
        kill(kept.wait_for_process(1)?, Signal::KILL)?;
        held(3)?;
        fs::remove_file(kept.dir.join("hold"))?;
        for reader in readers {
            reader.join().expect("a reader panicked")?;
        }
        Ok(())
    })?;
    assert_eq!(kept.count("held"), READERS * 3);
    kept.supervisor.stop()?;
    Ok(())
}

#[test]
fn a_reader_that_waits_can_be_killed_while_no_daemon_runs() -> Result<()> {
    let content = noise(8192, 1);
    let tree = Tree::mount(vec![content.clone()])?;
    let Tree { kept, target, .. } = &tree;
    fs::write(kept.dir.join("hold"), "")?;
    let mut reader = Command::new("cat").arg(target.join("0")).spawn()?;
    wait_for("the reader to wait", || {
        Ok((kept.count("held") == 1).then_some(()))
    })?;
    // A daemon that cannot start, after one that could.
    fs::write(kept.dir.join("fail"), "")?;
    kill(kept.wait_for_process(0)?, Signal::KILL)?;
    wait_for("the failing start", || {
        Ok((kept.count("failed") >= 1).then_some(()))
    })?;
    assert!(reader.try_wait()?.is_none());
    reader.kill()?;
    reader.wait()?;
    fs::remove_file(kept.dir.join("fail"))?;
    fs::remove_file(kept.dir.join("hold"))?;
    kept.wait_for_process(1)?;
    assert_eq!(fs::read(target.join("0"))?, content);
    tree.end()
}

#[test]
fn a_hangup_starts_the_daemon_anew_and_loses_nothing() -> Result<()> {
    let data = noise(1 << 20, 1);
    let kept = Kept::with_content(&data)?;
    let open = File::open(kept.file())?;
    for round in 0..3 {
        let process = kept.wait_for_process(round)?;
        kept.supervisor.signal(Signal::HUP)?;
        let next = kept.wait_for_process(round + 1)?;
        assert_ne!(process, next);
        let mut read = vec![0; data.len()];
        open.read_exact_at(&mut read, 0)?;
        assert!(read == data, "wrong bytes");
    }
    assert_eq!(kept.count("left"), 3);
    drop(open);
    kept.supervisor.stop()?;
    Ok(())
}

#[test]
fn the_end_of_the_supervisor_unmounts() -> Result<()> {
    let kept = Kept::with_content(b"content")?;
    assert_eq!(fs::read(kept.file())?, b"content");
    let status = kept.supervisor.stop()?;
    assert!(status.success(), "{status}");
    assert_eq!(kept.events().last().map(String::as_str), Some("unmounted"));
    assert!(!kept.file().exists());
    Ok(())
}

#[test]
fn a_daemon_that_never_started_ends_the_supervisor_with_its_code() -> Result<()> {
    let kept = Kept::start(|dir| Ok(fs::write(dir.join("fail"), "")?))?;
    kept.wait_for_end()?;
    assert_eq!(kept.events(), ["failed"]);
    let log = kept.supervisor.log();
    assert_eq!(log, "", "the daemon speaks for itself");
    Ok(())
}

#[test]
fn mounts_that_were_not_kept_are_lost_and_said_to_be() -> Result<()> {
    let kept = Kept::start(|dir| {
        fs::write(dir.join("mute"), "")?;
        Ok(fs::write(dir.join("data"), "content")?)
    })?;
    let process = kept.wait_for_process(0)?;
    assert_eq!(fs::read(kept.file())?, b"content");
    kill(process, Signal::KILL)?;
    // The next one mounts over the dead one.
    kept.wait_for_process(1)?;
    assert!(kept.events().iter().all(|line| line.starts_with("mounted")));
    assert_eq!(fs::read(kept.file())?, b"content");
    kept.supervisor.stop()?;
    Ok(())
}

#[test]
fn the_supervisor_is_small_and_holds_nothing_open_on_its_mounts() -> Result<()> {
    const LIVES: usize = 10;
    let kept = Kept::with_content(b"content")?;
    let supervisor = kept.supervisor.pid();
    let open: Vec<_> = fs::read_dir(format!("/proc/{supervisor}/fd"))?
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .collect();
    let named = |name: &str| {
        open.iter()
            .filter(|path| path.to_string_lossy().contains(name))
            .count()
    };
    assert_eq!(named("/dev/fuse"), 1, "{open:?}");
    assert_eq!(named("sluice-fuse-terms"), 1, "{open:?}");
    assert_eq!(named(kept.dir.to_str().unwrap_or_default()), 0, "{open:?}");
    let first = Supervisor::of(supervisor)?;
    // Some lives later it is the same.
    for life in 0..LIVES {
        let process = kept.wait_for_process(life)?;
        match life % 2 {
            0 => kill(process, Signal::KILL)?,
            _ => kept.supervisor.signal(Signal::HUP)?,
        }
    }
    kept.wait_for_process(LIVES)?;
    Supervisor::of(supervisor)?.has_not_grown(&first)?;
    kept.supervisor.stop()?;
    Ok(())
}

/// `kept` with at most so many open files, soft and hard.
fn limited(files: &str) -> Command {
    let mut command = Command::new("prlimit");
    command
        .arg(format!("--nofile={files}"))
        .arg(env!("CARGO_BIN_EXE_kept"));
    command
}

#[test]
fn regression_descriptors_are_kept_under_a_low_soft_limit() -> Result<()> {
    let content = |dir: &Path| Ok(fs::write(dir.join("data"), "content")?);
    let kept = Kept::start_by(limited("32:4096"), content)?;
    kill(kept.wait_for_process(0)?, Signal::KILL)?;
    kept.wait_for_process(1)?;
    assert!(
        kept.events()[1].starts_with("adopted "),
        "{:?}",
        kept.events()
    );
    assert_eq!(fs::read(kept.file())?, b"content");
    kept.supervisor.stop()?;
    Ok(())
}

#[test]
fn a_hard_limit_that_keeps_nothing_is_refused() -> Result<()> {
    let kept = Kept::start_by(limited("64:64"), |_| Ok(()))?;
    kept.wait_for_end()?;
    let log = kept.supervisor.log();
    ensure!(log.contains("at most 64 files may be open"), "{log}");
    ensure!(kept.events().is_empty(), "a daemon was started");
    Ok(())
}

/// The shipped unit says what the daemon needs of systemd, and nothing that
/// systemd does not understand.
#[test]
fn the_unit_keeps_descriptors_and_kills_the_daemon_alone() -> Result<()> {
    let unit = include_str!("../../systemd/sluice-snapshotter.service");
    let setting = |key: &str| -> Result<&str> {
        let mut lines = unit.lines().filter_map(|line| line.split_once('='));
        let found = lines.find(|(name, _)| *name == key);
        Ok(found.with_context(|| format!("the unit has no {key}"))?.1)
    };
    assert_eq!(setting("Type")?, "notify");
    assert_eq!(setting("NotifyAccess")?, "main");
    assert_eq!(setting("Restart")?, "always");
    assert_eq!(setting("StartLimitIntervalSec")?, "0");
    assert_eq!(setting("KillMode")?, "process");
    // Two mounts at the most, each with its terms.
    let most: u32 = setting("FileDescriptorStoreMax")?.parse()?;
    ensure!(most >= 4, "{most}");
    assert_eq!(setting("Environment")?, format!("FDSTORE={most}"));
    assert_eq!(setting("FileDescriptorStorePreserve")?, "yes");
    for own_namespace in ["Private", "Protect", "ReadOnlyPaths", "RootDirectory"] {
        let line = unit.lines().find(|line| line.starts_with(own_namespace));
        ensure!(line.is_none(), "{line:?} takes the mounts out of sight");
    }

    let scratch = Scratch::new()?;
    let copy = scratch.path().join("sluice-snapshotter.service");
    let program = sluice_tests::programs::snapshotter()?;
    let installed = "/usr/local/bin/sluice-snapshotter";
    ensure!(setting("ExecStart")?.starts_with(installed));
    fs::write(
        &copy,
        unit.replace(installed, &program.display().to_string()),
    )?;
    let verified = command::run(
        Command::new("systemd-analyze")
            .args(["verify", "--man=no"])
            .arg(&copy),
    )?;
    let said = String::from_utf8(verified.stderr)?;
    // Which systemd 254 and later know.
    let known = |line: &&str| !line.contains("'FileDescriptorStorePreserve'");
    let strange: Vec<&str> = said.lines().filter(known).collect();
    ensure!(strange.is_empty(), "{strange:#?}");
    Ok(())
}
