//! What a process and its directory take of the machine, as the kernel counts
//! it.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::command::text;
use crate::scratch::mount_points;

/// What a daemon holds at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    /// Bytes of memory that are its own: not those of files it has mapped.
    pub memory: u64,
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Mounts below its root.
    pub mounts: usize,
    /// Bytes on disk below its root, without what is mounted there.
    pub disk: u64,
    /// Files and directories there.
    pub inodes: u64,
}

impl Figures {
    /// Of a process that works below `root`.
    pub fn of(process: u32, root: &Path) -> Result<Self> {
        let mut figures = Self {
            memory: memory(process, "RssAnon")?,
            descriptors: descriptors(process)?,
            threads: entries(process, "task")?,
            mounts: mount_points(root).len(),
            disk: 0,
            inodes: 0,
        };
        figures.add(root, fs::metadata(root)?.dev())?;
        Ok(figures)
    }

    fn add(&mut self, path: &Path, device: u64) -> Result<()> {
        let Ok(found) = fs::symlink_metadata(path) else {
            return Ok(());
        };
        if found.dev() != device {
            return Ok(());
        }
        self.disk += found.blocks() * 512;
        self.inodes += 1;
        if found.is_dir() {
            for entry in fs::read_dir(path)? {
                self.add(&entry?.path(), device)?;
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} KiB of memory, {} descriptors, {} threads, {} mounts, {} KiB in {} files on disk",
            self.memory >> 10,
            self.descriptors,
            self.threads,
            self.mounts,
            self.disk >> 10,
            self.inodes,
        )
    }
}

/// Bytes and inodes below a directory and of itself, as du(1) counts them.
pub fn on_disk(path: &Path) -> Result<(u64, u64)> {
    let count = |what: &str| -> Result<u64> {
        let told = text(Command::new("du").args(["-xs", what]).arg(path))?;
        let number = told.split_whitespace().next().unwrap_or_default();
        number.parse().with_context(|| told.clone())
    };
    Ok((count("-B1")?, count("--inodes")?))
}

/// One of the sizes in `/proc/<process>/status`, such as `VmHWM`, in bytes.
pub fn memory(process: u32, field: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .with_context(|| format!("process {process} has no {field}"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib << 10)
}

/// Lets `VmHWM` start again from what is resident now.
pub fn forget_peak(process: u32) -> Result<()> {
    let file = format!("/proc/{process}/clear_refs");
    fs::write(&file, "5").with_context(|| format!("cannot write {file}"))
}

/// How many file descriptors a process has open.
pub fn descriptors(process: u32) -> Result<usize> {
    entries(process, "fd")
}

/// What `supervise` holds. As long as it lives, the mounts live: so it has to
/// be small and to stay so.
#[derive(Debug, Clone, Copy)]
pub struct Supervisor {
    /// Bytes of memory that are its own.
    pub memory: u64,
    descriptors: usize,
}

impl Supervisor {
    /// Most of it are pages with addresses, which the loader writes.
    const MOST_MEMORY: u64 = 2 << 20;
    /// What is allocated for each life of the daemon, and freed, may settle
    /// elsewhere: 40 KiB in all after 60 lives.
    const MOST_GROWTH: u64 = 128 << 10;

    /// Of a process, which fails when it is not small.
    pub fn of(process: u32) -> Result<Self> {
        let found = Self {
            memory: memory(process, "RssAnon")?,
            descriptors: descriptors(process)?,
        };
        let threads = entries(process, "task")?;
        ensure!(threads == 1, "{threads} threads");
        ensure!(found.memory <= Self::MOST_MEMORY, "{found:?}");
        Ok(found)
    }

    /// Fails when it holds more than it did `before`.
    pub fn has_not_grown(&self, before: &Self) -> Result<()> {
        ensure!(
            self.descriptors == before.descriptors
                && self.memory <= before.memory + Self::MOST_GROWTH,
            "{self:?} after {before:?}"
        );
        Ok(())
    }
}

fn entries(process: u32, directory: &str) -> Result<usize> {
    let path = format!("/proc/{process}/{directory}");
    Ok(fs::read_dir(&path)
        .with_context(|| format!("cannot list {path}"))?
        .count())
}

/// What a process has done so far that does not depend on how fast the machine
/// is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// System calls that read or write.
    pub calls: u64,
    /// Bytes that they read and wrote.
    pub bytes: u64,
}

impl Work {
    /// Of a process, up to now.
    pub fn of(process: u32) -> Result<Self> {
        let io = fs::read_to_string(format!("/proc/{process}/io"))?;
        let field = |name: &str| -> Result<u64> {
            let line = io.lines().find_map(|line| line.strip_prefix(name));
            Ok(line
                .with_context(|| format!("no {name} in {io}"))?
                .trim()
                .parse()?)
        };
        Ok(Self {
            calls: field("syscr:")? + field("syscw:")?,
            bytes: field("rchar:")? + field("wchar:")?,
        })
    }

    /// What was done since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            calls: self.calls - before.calls,
            bytes: self.bytes - before.bytes,
        }
    }
}
