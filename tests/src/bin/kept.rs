//! A small daemon for the tests of what keeps the daemon's mounts: it serves
//! one file through FUSE as slowly as it is told, keeps its mount with its
//! manager, and is its own `supervise`.
//!
//! `kept supervise DIR` or `kept serve DIR`; in `DIR`:
//! - `data` is the file's content, `mount/7` the file;
//! - `events` gets a line for each thing that happens;
//! - while `hold` exists, reads of what was not read before wait;
//! - `fail` in place of the daemon: it ends at once;
//! - `mute`: it keeps nothing.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures_util::future::BoxFuture;
use sluice_snapshotter::fuse::blobs::{BlobTable, Blobs};
use sluice_snapshotter::fuse::{Content, Reader, Session};
use sluice_snapshotter::keeper::supervise::{self, Options};
use sluice_snapshotter::keeper::{BLOBS, Keeper};
use tokio::signal::unix::{SignalKind, signal};

const BLOCK: u64 = 4096;

fn main() -> Result<ExitCode> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let [command, dir] = &args[..] else {
        bail!("two arguments");
    };
    match command.to_str() {
        Some("supervise") => Ok(supervise::run(Options {
            program: std::env::current_exe()?,
            args: vec!["serve".into(), dir.clone()],
        })?),
        Some("serve") => serve(Path::new(dir)),
        _ => bail!("{} is no command", command.display()),
    }
}

fn serve(dir: &Path) -> Result<ExitCode> {
    let keeper = Keeper::from_environment()?;
    let events = Events(dir.join("events"));
    if dir.join("fail").exists() {
        events.say("failed")?;
        return Ok(ExitCode::from(3));
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let _entered = runtime.enter();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let table = BlobTable::new();
    let data = File::open(dir.join("data")).context("data")?;
    let size = data.metadata()?.len();
    table.insert(
        7,
        Arc::new(Slow {
            data,
            size,
            present: Mutex::default(),
            hold: dir.join("hold"),
            events: events.clone(),
        }),
    );
    let blobs = Blobs::new(table, Reader::new(runtime.handle().clone()));
    let mount_point = dir.join("mount");
    let (session, how) = match keeper.take(BLOBS) {
        Some(kept) => (Session::adopt(blobs, &mount_point, kept)?, "adopted"),
        None => {
            let mut session = Session::mount(blobs, &mount_point, "kept")?;
            if !dir.join("mute").exists() && keeper.keep(BLOBS, session.kept())? {
                session.outlive();
            }
            (session, "mounted")
        }
    };
    // Whoever sees the line may kill this process and expect what it says.
    events.say(&format!("{how} {}", std::process::id()))?;
    keeper.ready();
    let last = runtime.block_on(async {
        tokio::select! {
            _ = terminate.recv() => false,
            _ = interrupt.recv() => true,
        }
    });
    if last {
        keeper.forget(BLOBS);
        session.unmount();
        events.say("unmounted")?;
    } else {
        events.say("left")?;
        session.leave();
    }
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}

#[derive(Clone)]
struct Events(PathBuf);

impl Events {
    fn say(&self, what: &str) -> io::Result<()> {
        let mut file = File::options().create(true).append(true).open(&self.0)?;
        file.write_all(format!("{what}\n").as_bytes())
    }
}

/// A file of which each process reads each block slowly once.
struct Slow {
    data: File,
    size: u64,
    present: Mutex<HashSet<u64>>,
    hold: PathBuf,
    events: Events,
}

fn blocks(offset: u64, len: u64) -> std::ops::Range<u64> {
    offset / BLOCK..(offset + len).div_ceil(BLOCK)
}

impl Content for Slow {
    fn size(&self) -> u64 {
        self.size
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        let present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        if !blocks(offset, buffer.len() as u64).all(|block| present.contains(&block)) {
            return Ok(false);
        }
        self.data.read_exact_at(buffer, offset)?;
        Ok(true)
    }

    fn read_missing(
        self: Arc<Self>,
        offset: u64,
        len: usize,
    ) -> BoxFuture<'static, io::Result<Vec<u8>>> {
        Box::pin(async move {
            if self.hold.exists() {
                self.events.say("held")?;
                while self.hold.exists() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            tokio::time::sleep(Duration::from_millis(1 + offset / BLOCK % 13)).await;
            let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
            present.extend(blocks(offset, len as u64));
            let mut bytes = vec![0; len];
            self.data.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        })
    }
}
