//! A service manager for one service: where there is no systemd, it starts the
//! daemon, keeps its descriptors, and starts it again when it dies.
//!
//! It is one thread that waits in `poll`, and does as little as it can: as
//! long as it lives, the mounts live.

mod child;
mod inbox;

use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Resource, WaitStatus, getrlimit, setrlimit};

use super::fdstore::{FIRST_FD, MOST_FDS};
use child::Child;
#[cfg(any(test, fuzzing))]
pub(crate) use inbox::forgotten;
use inbox::{Inbox, Kept, Told};

/// How long the daemon may take to stop. Killing it loses nothing: the next
/// process answers what it left.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// A process that was ready and dies sooner after its start is replaced after
/// the first pause, so that one that always does takes little of the machine.
const QUICK: Duration = Duration::from_millis(250);
/// So many failures to become ready in a row are answered at once; then the
/// pauses double.
const FREE_FAILURES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// A path that is looked at again at each start, so that a new binary in
    /// its place is what runs next.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

/// Why the supervisor ends, or cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("cannot supervise: {what}: {source}")]
    System {
        /// What failed.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// What is kept would not be.
    #[error(
        "cannot keep descriptors: at most {limit} files may be open here, and it takes {wanted}; \
         raise the hard limit (`ulimit -Hn`, `LimitNOFILE=`, the container's ulimits)"
    )]
    Limit {
        /// The hard limit.
        limit: u64,
        /// What is needed.
        wanted: u64,
    },
    /// The arguments hold a NUL.
    #[error("cannot run {0:?}: it holds a NUL byte")]
    Argument(OsString),
}

impl Error {
    fn system(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// Why the running process was told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// To start it again.
    Restart,
    /// To end.
    End,
}

/// How a process lived.
struct Life {
    ready: bool,
    age: Duration,
}

struct Supervisor {
    options: Options,
    inbox: Inbox,
    kept: Kept,
    child: Option<Child>,
    /// Set while the child is to stop: why, and when patience ends.
    stopping: Option<(Stop, Instant)>,
    /// When to start the next child, if none runs.
    start_at: Instant,
    failures: u32,
    ever_ready: bool,
}

/// Runs the program until SIGTERM or SIGINT, and starts it again whenever it
/// dies and on SIGHUP. Not for a process that has other threads.
pub fn run(options: Options) -> Result<ExitCode, Error> {
    let mut wanted = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGTERM,
    ] {
        wanted.add(signal);
    }
    wanted
        .thread_block()
        .map_err(|e| Error::system("blocking signals", e))?;
    raise_limit()?;
    let signals = SignalFd::with_flags(&wanted, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|e| Error::system("signalfd", e))?;
    let mut supervisor = Supervisor::new(options)?;
    loop {
        supervisor.start_if_due()?;
        supervisor.wait(&signals)?;
        supervisor.read_messages();
        while let Some(info) = signals
            .read_signal()
            .map_err(|e| Error::system("reading signals", e))?
        {
            let Ok(signal) = Signal::try_from(info.ssi_signo as i32) else {
                continue;
            };
            if let Some(code) = supervisor.handle(signal)? {
                return Ok(code);
            }
        }
        supervisor.lose_patience();
    }
}

/// Sees to it that as many descriptors can be open as are kept at most, and
/// some of its own. The daemon, which needs more than any, inherits the limit.
fn raise_limit() -> Result<(), Error> {
    const OWN: u64 = 64;
    let wanted = FIRST_FD as u64 + 2 * MOST_FDS as u64 + OWN;
    let mut limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    if hard < wanted {
        return Err(Error::Limit {
            limit: hard,
            wanted,
        });
    }
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).map_err(|e| Error::system("raising RLIMIT_NOFILE", e))
}

impl Supervisor {
    fn new(options: Options) -> Result<Self, Error> {
        Ok(Self {
            options,
            inbox: Inbox::open()?,
            kept: Kept::default(),
            child: None,
            stopping: None,
            start_at: Instant::now(),
            failures: 0,
            ever_ready: false,
        })
    }

    fn start_if_due(&mut self) -> Result<(), Error> {
        if self.child.is_some() || Instant::now() < self.start_at {
            return Ok(());
        }
        let child = Child::start(&self.options, self.inbox.address(), &self.kept)?;
        tracing::info!(
            "started {} as process {} with {} kept descriptors",
            self.options.program.display(),
            child.pid(),
            self.kept.len(),
        );
        self.child = Some(child);
        Ok(())
    }

    fn wait(&self, signals: &SignalFd) -> Result<(), Error> {
        let until = match (&self.child, self.stopping) {
            (None, _) => Some(self.start_at),
            (Some(_), Some((_, patience))) => Some(patience),
            (Some(_), None) => None,
        };
        let timeout = until.map(|until| {
            // A little more than the remainder, not a spin of little less.
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec::try_from(left).unwrap_or_default()
        });
        let mut polled = [
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.inbox.as_fd(), PollFlags::IN),
        ];
        match rustix::event::poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(Error::system("poll", error)),
        }
    }

    fn read_messages(&mut self) {
        let Some(child) = &mut self.child else {
            return;
        };
        for told in self.inbox.drain(child.pid()) {
            match told {
                Told::Ready => {
                    child.set_ready();
                    self.ever_ready = true;
                    tracing::info!("process {} is ready", child.pid());
                }
                Told::Store(name, fds) => self.kept.add(&name, fds),
                Told::Forget(name) => self.kept.remove(&name),
            }
        }
    }

    fn handle(&mut self, signal: Signal) -> Result<Option<ExitCode>, Error> {
        match signal {
            Signal::SIGCHLD => return self.reap(),
            Signal::SIGHUP if self.stopping.is_none() => {
                tracing::info!("SIGHUP: starting {} anew", self.options.program.display());
                self.failures = 0;
                self.start_at = Instant::now();
                self.stop(Stop::Restart);
            }
            Signal::SIGINT | Signal::SIGTERM => {
                if self.child.is_none() {
                    return Ok(Some(self.end(ExitCode::SUCCESS)));
                }
                self.stop(Stop::End);
            }
            _ => {}
        }
        Ok(None)
    }

    fn stop(&mut self, why: Stop) {
        let Some(child) = &self.child else { return };
        // SIGTERM leaves the mounts to the next process; SIGINT says that
        // there is none.
        child.signal(match why {
            Stop::Restart => rustix::process::Signal::TERM,
            Stop::End => rustix::process::Signal::INT,
        });
        self.stopping = Some((why, Instant::now() + STOP_PATIENCE));
    }

    fn lose_patience(&mut self) {
        if let (Some(child), Some((why, patience))) = (&self.child, self.stopping)
            && Instant::now() >= patience
        {
            tracing::warn!(
                "process {} has not stopped in {} s and is killed",
                child.pid(),
                STOP_PATIENCE.as_secs()
            );
            child.signal(rustix::process::Signal::KILL);
            self.stopping = Some((why, Instant::now() + STOP_PATIENCE));
        }
    }

    /// Collects every process that ended: as the first process of a container
    /// it also gets those that nobody else waits for.
    fn reap(&mut self) -> Result<Option<ExitCode>, Error> {
        loop {
            let (pid, status) = match rustix::process::wait(rustix::process::WaitOptions::NOHANG) {
                Ok(Some(ended)) => ended,
                Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(Error::system("wait", error)),
            };
            if self.child.as_ref().is_some_and(|child| child.pid() == pid) {
                // What it said last is in the socket still.
                self.read_messages();
                let ended = self.child_ended(status);
                if ended.is_some() {
                    return Ok(ended);
                }
            }
        }
    }

    fn child_ended(&mut self, status: WaitStatus) -> Option<ExitCode> {
        let child = self.child.take()?;
        self.start_at = Instant::now();
        match self.stopping.take() {
            Some((Stop::End, _)) => return Some(self.end(ExitCode::SUCCESS)),
            Some((Stop::Restart, _)) => return None,
            None => {}
        }
        let how = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("ended with code {code}"),
            (_, Some(signal)) => format!("was killed by signal {signal}"),
            _ => "ended".to_owned(),
        };
        // What never worked and holds nothing is not worth trying again.
        if let Some(code) = status.exit_status()
            && !self.ever_ready
            && self.kept.len() == 0
        {
            tracing::error!("process {} {how} before it was ready", child.pid());
            return Some(self.end(ExitCode::from(u8::try_from(code.max(1)).unwrap_or(1))));
        }
        let pause = self.pause_after(&Life {
            ready: child.is_ready(),
            age: child.age(),
        });
        self.start_at += pause;
        tracing::warn!(
            "process {} {how}; the next starts in {} ms",
            child.pid(),
            pause.as_millis()
        );
        None
    }

    /// How long to wait before the next start, after an unexpected end.
    fn pause_after(&mut self, life: &Life) -> Duration {
        if life.ready {
            self.failures = 0;
            return match life.age < QUICK {
                true => FIRST_PAUSE,
                false => Duration::ZERO,
            };
        }
        self.failures += 1;
        match self.failures.checked_sub(FREE_FAILURES + 1) {
            None => Duration::ZERO,
            Some(doublings) => FIRST_PAUSE
                .saturating_mul(2u32.saturating_pow(doublings))
                .min(LONGEST_PAUSE),
        }
    }

    fn end(&self, code: ExitCode) -> ExitCode {
        if self.kept.len() > 0 {
            tracing::warn!(
                "ending with {} kept descriptors: the mounts behind them stop working",
                self.kept.len()
            );
        }
        code
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supervisor() -> Supervisor {
        let options = Options {
            program: PathBuf::new(),
            args: Vec::new(),
        };
        Supervisor::new(options).unwrap()
    }

    const FAILED: Life = Life {
        ready: false,
        age: Duration::from_secs(1),
    };

    #[test]
    fn pauses_double_after_free_failures_until_the_longest() {
        let mut supervisor = supervisor();
        let pauses: Vec<u128> = (0..13)
            .map(|_| supervisor.pause_after(&FAILED).as_millis())
            .collect();
        assert_eq!(
            pauses,
            [
                0, 0, 0, 50, 100, 200, 400, 800, 1600, 3200, 6400, 10000, 10000
            ]
        );
        for _ in 0..1000 {
            supervisor.pause_after(&FAILED);
        }
        assert_eq!(supervisor.pause_after(&FAILED), LONGEST_PAUSE);
    }

    #[test]
    fn a_process_that_worked_is_replaced_at_once() {
        let mut supervisor = supervisor();
        for _ in 0..10 {
            supervisor.pause_after(&FAILED);
        }
        let worked = Life {
            ready: true,
            age: QUICK,
        };
        assert_eq!(supervisor.pause_after(&worked), Duration::ZERO);
        assert_eq!(supervisor.pause_after(&FAILED), Duration::ZERO);
    }

    #[test]
    fn a_process_that_worked_for_a_moment_is_replaced_after_another() {
        let mut supervisor = supervisor();
        let moment = Life {
            ready: true,
            age: Duration::from_millis(1),
        };
        for _ in 0..100 {
            assert_eq!(supervisor.pause_after(&moment), FIRST_PAUSE);
        }
    }
}
