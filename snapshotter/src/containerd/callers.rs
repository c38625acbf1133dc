//! Which containerd it is that calls.

use std::collections::BTreeSet;
use std::error::Error as StdError;
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lru::LruCache;
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::process::Pid;
use tokio::sync::OnceCell;
use tokio::time::timeout;
use tonic::{Code, Status};

use super::client::Containerd;
use super::process::Process;
use super::{Failed, causes};

/// Processes that are remembered, with what their images say. Mostly it is one,
/// and the one before that.
const MOST: NonZeroUsize = NonZeroUsize::new(4).unwrap();
/// How long a socket may take to say whose it is. Those for other protocols
/// wait for more.
const ANSWER: Duration = Duration::from_secs(4);

/// The containerds that call.
#[derive(Debug)]
pub(super) struct Callers(Mutex<LruCache<Process, Arc<OnceCell<Arc<Containerd>>>>>);

/// Why no containerd was found behind a call.
#[derive(Debug)]
pub(super) enum NotFound {
    /// The caller is none, or cannot be seen from here.
    Nobody(String),
    /// It may be one.
    Unclear(Failed),
}

impl NotFound {
    fn because(what: &str, error: &io::Error) -> Self {
        let why = format!("{what}: {error}");
        match may_pass(error) {
            true => Self::Unclear(why.into()),
            false => Self::Nobody(why),
        }
    }
}

impl Default for Callers {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(MOST)))
    }
}

impl Callers {
    /// The containerd that `caller` is. That is none when its number is not
    /// known: it is in a namespace of processes that is not below this one.
    pub(super) async fn find(&self, caller: Option<Pid>) -> Result<Arc<Containerd>, NotFound> {
        let hidden = "it cannot be seen in this PID namespace";
        let caller = caller.ok_or_else(|| NotFound::Nobody(hidden.to_owned()))?;
        let process = Process::of(caller).map_err(|error| {
            let number = caller.as_raw_pid();
            NotFound::because(&format!("process {number} cannot be looked at"), &error)
        })?;
        let place = {
            let mut found = self.0.lock();
            Arc::clone(found.get_or_insert(process, Arc::default))
        };
        // Many that start at once look once.
        let found = place.get_or_try_init(|| find(process)).await?;
        Ok(Arc::clone(found))
    }
}

async fn find(process: Process) -> Result<Arc<Containerd>, NotFound> {
    let listens = tokio::task::spawn_blocking(move || process.listens_at()).await;
    let paths = listens.map_err(|error| NotFound::Unclear(error.into()))?;
    let paths = paths.map_err(|error| {
        let number = process.pid();
        NotFound::because(
            &format!("the sockets of process {number} cannot be found"),
            &error,
        )
    })?;
    let containerd = choose(process, with_grpc(paths)).await?;
    tracing::info!("{containerd} uses this snapshotter and is asked what its images say of layers");
    Ok(Arc::new(containerd))
}

/// Without the sockets at which containerd speaks its other protocol, by their
/// names: it logs an error when something else is said there.
fn with_grpc(paths: BTreeSet<PathBuf>) -> BTreeSet<PathBuf> {
    let is_other = |path: &PathBuf| {
        let others = path.extension().is_some_and(|name| name == "ttrpc");
        others && paths.contains(&path.with_extension(""))
    };
    paths
        .iter()
        .filter(|path| !is_other(path))
        .cloned()
        .collect()
}

/// The one of a process's sockets at which a containerd answers.
async fn choose(process: Process, paths: BTreeSet<PathBuf>) -> Result<Containerd, NotFound> {
    let number = process.pid();
    let looks = paths.into_iter().map(|path| look(process, path));
    let mut looks: FuturesUnordered<_> = looks.collect();
    let mut unclear = None;
    while let Some(look) = looks.next().await {
        match look {
            Ok(Some(containerd)) => return Ok(containerd),
            Ok(None) => {}
            Err(why) => unclear = Some(why),
        }
    }
    Err(match unclear {
        Some(why) => NotFound::Unclear(why),
        None => NotFound::Nobody(format!(
            "process {number} has no socket at which one answers"
        )),
    })
}

/// The containerd at a socket, if it is one and the process is; or why that is
/// not clear.
async fn look(process: Process, path: PathBuf) -> Result<Option<Containerd>, Failed> {
    let asked = timeout(ANSWER, ask(process, &path)).await;
    let why = match asked {
        Ok(Ok(containerd)) => return Ok(containerd),
        Ok(Err(why)) => causes(why.as_ref()),
        Err(_) => "it does not answer".to_owned(),
    };
    let (number, path) = (process.pid(), path.display());
    Err(format!("process {number} listens at {path}, but it is not clear what: {why}").into())
}

async fn ask(process: Process, path: &Path) -> Result<Option<Containerd>, Failed> {
    let address = path.to_owned();
    let opened = tokio::task::spawn_blocking(move || process.open(&address)).await?;
    let reached = match opened {
        Ok(socket) => process.connect(&socket).await.map(|_| socket),
        Err(error) => Err(error),
    };
    let socket = match reached {
        Ok(socket) => socket,
        Err(error) if may_pass(&error) => return Err(error.into()),
        Err(_) => return Ok(None),
    };
    let containerd = Containerd::of(process, path.to_owned(), socket);
    match containerd.version().await {
        Ok(_) => Ok(Some(containerd)),
        Err(why) if is_another(&why) => Ok(None),
        Err(why) => Err(why),
    }
}

/// Whether it shows that something else than containerd answers.
fn is_another(why: &Failed) -> bool {
    match why.downcast_ref::<Status>() {
        Some(status) if status.code() == Code::Unimplemented => true,
        // One with a cause is no answer: what came was not understood.
        Some(status) => status.source().is_some() && !may_pass(status),
        None => why.is::<tonic::transport::Error>() && !may_pass(why.as_ref()),
    }
}

/// Whether there is too much, or something was lacking, for now. Others may have
/// seen to that, so it tells nothing of who calls.
fn may_pass(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            let lacking = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
            let code = Errno::from_io_error(error);
            let busy = [io::ErrorKind::FileTooLarge, io::ErrorKind::WouldBlock];
            if code.is_some_and(|code| lacking.contains(&code)) || busy.contains(&error.kind()) {
                return true;
            }
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use rustix::process::{getpid, getppid};
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::service::Routes;
    use tonic::transport::Server;

    use super::*;

    /// What is found when a process listens at `path`.
    async fn found(pid: Pid, path: &Path) -> NotFound {
        let process = Process::of(pid).unwrap();
        let paths = BTreeSet::from([path.to_owned()]);
        choose(process, paths).await.unwrap_err()
    }

    #[tokio::test]
    async fn who_says_something_else_is_no_containerd() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        let bind = |name: &str| {
            let listener = tokio::net::UnixListener::bind(path(name)).unwrap();
            UnixListenerStream::new(listener)
        };
        // As this daemon itself, behind a proxy.
        let server = Server::builder().add_routes(Routes::default());
        tokio::spawn(server.serve_with_incoming(bind("other")));
        let mut rude = bind("rude");
        tokio::spawn(async move { while rude.next().await.is_some() {} });
        let own = getpid();
        let init = Pid::INIT;
        for (pid, name) in [
            (own, "other"),
            (own, "rude"),
            (own, "gone"),
            (init, "other"),
        ] {
            let why = found(pid, &path(name)).await;
            assert!(matches!(why, NotFound::Nobody(_)), "{name}: {why:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_nothing_may_be_one() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("silent");
        let _listener = UnixListener::bind(&path).unwrap();
        let NotFound::Unclear(why) = found(getpid(), &path).await else {
            panic!("it is not known yet");
        };
        let why = why.to_string();
        let number = format!("process {}", getpid().as_raw_pid());
        let parts = [number.as_str(), path.to_str().unwrap(), "does not answer"];
        assert!(parts.iter().all(|part| why.contains(part)), "{why}");
    }

    #[tokio::test]
    async fn each_caller_is_asked_itself() {
        let callers = Callers::default();
        let (own, parent) = (getpid(), getppid().unwrap());
        for pid in [own, parent] {
            let there = PathBuf::from(format!("/{}", pid.as_raw_pid()));
            let known = Arc::new(OnceCell::from(Arc::new(Containerd::at(there))));
            callers.0.lock().put(Process::of(pid).unwrap(), known);
        }
        for pid in [own, parent] {
            let containerd = callers.find(Some(pid)).await.unwrap();
            let there = format!("/{}", pid.as_raw_pid());
            assert_eq!(containerd.address(), Path::new(&there));
        }
        for unknown in [None, Pid::from_raw(i32::MAX)] {
            let why = callers.find(unknown).await.unwrap_err();
            assert!(matches!(why, NotFound::Nobody(_)), "{why:?}");
        }
    }

    #[test]
    fn only_the_other_protocol_of_the_same_socket_is_passed_over() {
        let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect();
        let all = paths(&["/c.sock", "/c.sock.ttrpc", "/d.ttrpc", "/e.sock"]);
        assert_eq!(with_grpc(all), paths(&["/c.sock", "/d.ttrpc", "/e.sock"]));
    }
    #[test]
    fn what_is_lacking_tells_nothing_of_who_calls() {
        let because = |error: io::Error| NotFound::because("x", &error);
        for lacking in [Errno::MFILE, Errno::AGAIN, Errno::FBIG] {
            let error = because(lacking.into());
            assert!(matches!(error, NotFound::Unclear(_)), "{error:?}");
        }
        for certain in [Errno::NOENT, Errno::ACCESS, Errno::CONNREFUSED] {
            let error = because(certain.into());
            assert!(matches!(error, NotFound::Nobody(_)), "{error:?}");
        }
        // However deep it lies.
        let cause = io::Error::from(Errno::MFILE);
        let status = Status::from_error(Box::new(cause));
        assert!(!is_another(&Failed::from(status)));
        assert!(is_another(&Failed::from(Status::unimplemented(""))));
        assert!(!is_another(&Failed::from(Status::internal(""))));
    }
}
