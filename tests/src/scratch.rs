//! A directory for one test or run, and everything that was started in it.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process};

/// How long a process may take to end after SIGTERM before it is killed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether a signal has asked this process to end.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Every scratch directory of this process, for the way out.
static LIVE: Mutex<Vec<Weak<Inner>>> = Mutex::new(Vec::new());

/// A temporary directory that owns processes, mounts and network namespaces,
/// and leaves nothing behind when it is dropped, when the process exits or
/// when it is interrupted. Clones are the same directory.
#[derive(Clone)]
pub struct Scratch(Arc<Inner>);

struct Inner {
    path: PathBuf,
    processes: Mutex<Vec<Process>>,
    namespaces: Mutex<Vec<String>>,
    cleaned: Mutex<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Scratch {
    /// A new, empty directory on a file system of its own (in a file in
    /// `TMPDIR`, or `/var/tmp`): the same everywhere, and gone in a moment
    /// however many files it holds. Where there are no loop devices, an
    /// ordinary directory.
    pub fn new() -> Result<Self> {
        let parent = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
        let scratch = Self::new_in(&parent)?;
        // As many inodes as the image with the most files takes.
        if let Err(error) = mount_ext4(scratch.path(), 64 << 30, &["-N", "6000000"]) {
            eprintln!(
                "{} has no file system of its own: {error:#}",
                parent.display()
            );
        }
        Ok(scratch)
    }

    /// A new, empty directory in another.
    pub fn new_in(parent: &Path) -> Result<Self> {
        clean_on_the_way_out();
        let path = tempfile::Builder::new()
            .prefix("sluice-")
            .tempdir_in(parent)
            .with_context(|| format!("cannot make a directory in {}", parent.display()))?
            .keep();
        let inner = Arc::new(Inner {
            path,
            processes: Mutex::default(),
            namespaces: Mutex::default(),
            cleaned: Mutex::new(false),
        });
        lock(&LIVE).push(Arc::downgrade(&inner));
        Ok(Self(inner))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// A directory below, made if it is not there.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.0.path.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }

    /// A directory below that is an ext4 of its own, on a loop device, of
    /// `bytes`.
    pub fn disk(&self, name: &str, bytes: u64) -> Result<PathBuf> {
        let dir = self.dir(name)?;
        mount_ext4(&dir, bytes, &[])?;
        Ok(dir)
    }

    /// A directory below that is in use by nobody else, by number.
    pub fn fresh_dir(&self, prefix: &str) -> Result<PathBuf> {
        for number in 0.. {
            let dir = self.0.path.join(format!("{prefix}-{number}"));
            match fs::create_dir(&dir) {
                Ok(()) => return Ok(dir),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e).with_context(|| format!("cannot make {}", dir.display())),
            }
        }
        unreachable!("the numbers do not end")
    }

    /// Starts a process that ends with the scratch directory at the latest.
    /// What it writes goes to `log/<name>.log`, appended.
    pub fn spawn(&self, name: &str, mut command: Command) -> Result<Process> {
        let log = self.dir("log")?.join(format!("{name}.log"));
        let out = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            // A group of its own: Ctrl-C reaches this process alone, which
            // then ends the others in order.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", crate::command::show(&command)))?;
        let process = Process {
            name: name.to_owned(),
            pid: child.id(),
            log,
            child: Arc::new(Mutex::new(child)),
        };
        let mut processes = lock(&self.0.processes);
        processes.retain(|process| process.is_running());
        processes.push(process.clone());
        Ok(process)
    }

    /// Notes a network namespace to be deleted at the end.
    pub fn own_namespace(&self, name: &str) {
        lock(&self.0.namespaces).push(name.to_owned());
    }
}

/// Mounts a new ext4 over a directory. Its file is unlinked at once, so that
/// the mount is all there is to take away.
fn mount_ext4(dir: &Path, bytes: u64, options: &[&str]) -> Result<()> {
    use crate::command::run;
    let image = dir.with_extension("ext4");
    let made = File::create(&image)
        .and_then(|file| file.set_len(bytes))
        .map_err(anyhow::Error::from)
        .and_then(|()| {
            run(Command::new("mkfs.ext4")
                .args(["-q", "-F", "-m", "0"])
                .args(["-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"])
                .args(options)
                .arg(&image))
        })
        .and_then(|_| {
            run(Command::new("mount")
                .args(["-t", "ext4", "-o", "loop,noatime"])
                .arg(&image)
                .arg(dir))
        });
    fs::remove_file(&image)?;
    made?;
    let _ = fs::remove_dir(dir.join("lost+found"));
    Ok(())
}

impl Inner {
    fn clean(&self) {
        let mut cleaned = lock(&self.cleaned);
        if std::mem::replace(&mut *cleaned, true) {
            return;
        }
        let processes = std::mem::take(&mut *lock(&self.processes));
        // Shims and containers first, while what they stand on still works.
        kill_strays(&self.path);
        for process in processes.iter().rev() {
            process.end();
        }
        kill_strays(&self.path);
        for namespace in lock(&self.namespaces).drain(..) {
            let _ = Command::new("ip")
                .args(["netns", "delete", &namespace])
                .stderr(Stdio::null())
                .status();
        }
        unmount_below(&self.path);
        let _ = rustix::mount::unmount(&self.path, UnmountFlags::DETACH);
        if let Err(error) = fs::remove_dir_all(&self.path)
            && self.path.exists()
        {
            eprintln!("{} is left behind: {error}", self.path.display());
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.clean();
    }
}

/// A process that belongs to a scratch directory.
#[derive(Clone)]
pub struct Process {
    name: String,
    pid: u32,
    log: PathBuf,
    child: Arc<Mutex<Child>>,
}

impl Process {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has not ended yet.
    pub fn is_running(&self) -> bool {
        matches!(lock(&self.child).try_wait(), Ok(None))
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let mut child = lock(&self.child);
        if child.try_wait()?.is_some() {
            bail!("{} has ended", self.name);
        }
        kill_process(pid_of(self.pid)?, signal)
            .with_context(|| format!("cannot signal {}", self.name))
    }

    /// Asks it to end (SIGTERM) and waits until it has.
    pub fn stop(&self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = lock(&self.child).try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!(
                    "{} did not end within {PATIENCE:?} of SIGTERM; it wrote\n{}",
                    self.name,
                    self.log()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it at once (SIGKILL).
    pub fn kill(&self) -> Result<()> {
        let mut child = lock(&self.child);
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Its resident memory in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        crate::figures::memory(self.pid, "VmRSS")
    }

    /// The same without what is only mapped from files.
    pub fn anonymous_bytes(&self) -> Result<u64> {
        crate::figures::memory(self.pid, "RssAnon")
    }

    /// The most resident memory since the last call, in bytes.
    pub fn peak_bytes(&self) -> Result<u64> {
        let peak = crate::figures::memory(self.pid, "VmHWM")?;
        crate::figures::forget_peak(self.pid)?;
        Ok(peak)
    }

    /// Ends it one way or the other.
    fn end(&self) {
        if self.is_running() && self.stop().is_err() {
            let _ = self.kill();
        }
    }
}

fn pid_of(pid: u32) -> Result<Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .with_context(|| format!("{pid} is no process id"))
}

/// Kills processes that name the directory on their command line and do not
/// descend from this process, with all their descendants: shims, whose parent
/// is init, and the containers below them.
fn kill_strays(dir: &Path) {
    let mut parents = Vec::new();
    let mut doomed = Vec::new();
    let Ok(entries) = fs::read_dir("/proc") else {
        return;
    };
    let name = dir.as_os_str().as_encoded_bytes();
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The command in parentheses may hold anything; the parent is the
        // second field after the last one.
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        parents.push((pid, parent.unwrap_or(0)));
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if arguments.windows(name.len()).any(|window| window == name) {
            doomed.push(pid);
        }
    }
    doomed.retain(|pid| !is_below(*pid, &parents));
    let mut next = 0;
    while let Some(&pid) = doomed.get(next) {
        next += 1;
        for (child, parent) in &parents {
            if *parent == pid && !doomed.contains(child) {
                doomed.push(*child);
            }
        }
    }
    for pid in doomed {
        if let Ok(pid) = pid_of(pid) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Whether a process descends from this one.
fn is_below(pid: u32, parents: &[(u32, u32)]) -> bool {
    let mut at = pid;
    for _ in 0..parents.len() {
        if at == std::process::id() {
            return true;
        }
        match parents.iter().find(|(child, _)| *child == at) {
            Some((_, parent)) if *parent != 0 => at = *parent,
            _ => return false,
        }
    }
    false
}

/// Unmounts everything mounted below a directory, the latest first.
pub(crate) fn unmount_below(dir: &Path) {
    for _ in 0..4 {
        let mut points = mount_points(dir);
        if points.is_empty() {
            return;
        }
        while let Some(point) = points.pop() {
            let _ = rustix::mount::unmount(&point, UnmountFlags::DETACH);
        }
    }
}

/// The mount points below a directory, in the order they were mounted.
pub fn mount_points(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| point.starts_with(dir) && point != dir)
        .collect()
}

/// Whether the process is on its way out because of a signal: what fails now
/// fails because its ground is taken away.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Cleans every scratch directory of this process. Who comes second waits for
/// the first.
pub fn clean_all() {
    static CLEANING: Mutex<()> = Mutex::new(());
    let _alone = lock(&CLEANING);
    let live = std::mem::take(&mut *lock(&LIVE));
    for inner in live.iter().filter_map(Weak::upgrade) {
        inner.clean();
    }
}

/// Arranges for [`clean_all`] at exit, which drops of statics do not reach,
/// and on the signals that end a program.
fn clean_on_the_way_out() {
    static ONCE: Once = Once::new();
    extern "C" fn at_exit() {
        clean_all();
    }
    ONCE.call_once(|| {
        // SAFETY: the handler is a plain function that unwinds nowhere: what
        // it calls neither panics on poisoned locks nor on failed clean-up.
        #[allow(unsafe_code)]
        unsafe {
            libc::atexit(at_exit);
        }
        std::thread::spawn(|| {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
            else {
                return;
            };
            runtime.block_on(async {
                use tokio::signal::unix::{SignalKind, signal};
                let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = (
                    signal(SignalKind::interrupt()),
                    signal(SignalKind::terminate()),
                    signal(SignalKind::hangup()),
                ) else {
                    return;
                };
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                INTERRUPTED.store(true, Ordering::SeqCst);
                eprintln!("interrupted: cleaning up");
                clean_all();
                std::process::exit(130);
            });
        });
    });
}
