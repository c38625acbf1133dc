//! A Unix socket that outlives what it leads to.
//!
//! containerd waits for seconds before it connects again to a socket that
//! refused it. To a test that kills the daemon a hundred times those seconds
//! are all it would do: here a connection waits for the next process instead,
//! and only ends when the process does.

use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// The socket. It ends when dropped.
pub struct Relay {
    path: PathBuf,
    ended: Arc<AtomicBool>,
}

impl Relay {
    /// Listens at `path` and leads to whoever listens at `to`.
    pub fn start(path: PathBuf, to: PathBuf) -> Result<Self> {
        let listener = UnixListener::bind(&path)
            .with_context(|| format!("cannot listen at {}", path.display()))?;
        let ended = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&ended);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (to, over) = (to.clone(), Arc::clone(&over));
                thread::spawn(move || {
                    if let Some((server, first)) = connect(&to, &over) {
                        // Either side's end is the other's.
                        let _ = join(&client, &server, &first);
                    }
                });
            }
        });
        Ok(Self { path, ended })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = UnixStream::connect(&self.path);
    }
}

/// Whoever accepts, and the first that it says. A process that dies takes its
/// last connections without a word; gRPC's server speaks first.
fn connect(to: &Path, over: &AtomicBool) -> Option<(UnixStream, Vec<u8>)> {
    while !over.load(Ordering::SeqCst) {
        if let Ok(mut server) = UnixStream::connect(to) {
            let mut first = vec![0; 4096];
            if let Ok(len @ 1..) = server.read(&mut first) {
                first.truncate(len);
                return Some((server, first));
            }
        }
        thread::sleep(Duration::from_millis(2));
    }
    None
}

fn join(mut client: &UnixStream, server: &UnixStream, first: &[u8]) -> io::Result<()> {
    client.write_all(first)?;
    thread::scope(|scope| {
        scope.spawn(|| pass(client, server));
        pass(server, client)
    })
}

fn pass(mut from: &UnixStream, mut to: &UnixStream) -> io::Result<()> {
    let passed = io::copy(&mut from, &mut to);
    for end in [from, to] {
        let _ = end.shutdown(Shutdown::Both);
    }
    passed.map(drop)
}
