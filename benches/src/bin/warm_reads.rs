//! Reads, walks and opens through each mount mode against native overlayfs,
//! on the same files, all of whose bytes are local.
//!
//! `cargo run --release -p sluice-benches --bin warm_reads -- --help`; as
//! root, on a machine that does nothing else. A table goes to standard error,
//! JSON to standard output.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use sluice_benches::median;
use sluice_layer::{Format, Limits, NodeId, NodeKind, Toc, read_toc_json};
use sluice_oci::Digest;
use sluice_snapshotter::erofs::{Image, XattrNamespace, write_image};
use sluice_snapshotter::fuse::blobs::{BlobTable, Blobs};
use sluice_snapshotter::fuse::tree::Trees;
use sluice_snapshotter::fuse::{Content, Reader, Session, Tree, TreeTable};
use sluice_snapshotter::layer_dir::placement::Placement;
use sluice_snapshotter::mount;
use tempfile::TempDir;

/// Warm reads through each mount mode against native overlayfs.
#[derive(Parser)]
struct Arguments {
    /// Small files
    #[arg(long, default_value_t = 20_000)]
    files: usize,
    /// Bytes of each, at least 1
    #[arg(long, default_value = "6000")]
    file_size: std::num::NonZeroUsize,
    /// Small files in a directory
    #[arg(long, default_value_t = 100)]
    per_directory: usize,
    /// MiB of the large file, at least 1
    #[arg(long, default_value = "512")]
    stream: std::num::NonZeroUsize,
    /// Rounds, each with mounts of its own; medians are told
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// A directory on the file system that is native
    #[arg(long, default_value = "target")]
    directory: PathBuf,
}

/// The part of a file's content that one chunk covers.
const CHUNK: usize = 4 << 20;
const LARGE: &str = "large";

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(
        rustix::process::geteuid().is_root(),
        "mounting takes root; run it as root"
    );
    let scratch = TempDir::with_prefix_in("warm-reads-", &arguments.directory)
        .with_context(|| format!("no directory in {}", arguments.directory.display()))?;
    let _clean = Unmount(scratch.path().to_owned());
    let bench = Bench::new(scratch.path().to_owned(), &arguments)?;

    let mut rounds: BTreeMap<(Mode, &str), Vec<f64>> = BTreeMap::new();
    for round in 0..arguments.rounds {
        eprintln!("round {} of {}", round + 1, arguments.rounds);
        for mode in MODES {
            for (what, seconds) in bench.measure(mode)? {
                rounds.entry((mode, what)).or_default().push(seconds);
            }
        }
    }
    report(&arguments, &rounds);
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Mode {
    /// Overlayfs on a directory.
    Native,
    /// EROFS with its data on the node's FUSE mount.
    Erofs,
    /// EROFS with its data read directly, as when all of it is there.
    ErofsComplete,
    /// The node's FUSE mount of trees.
    Fuse,
}

const MODES: [Mode; 4] = [Mode::Native, Mode::Erofs, Mode::ErofsComplete, Mode::Fuse];

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Erofs => "erofs",
            Self::ErofsComplete => "erofs, complete",
            Self::Fuse => "fuse",
        }
    }
}

/// What is measured: on a mount just made, and again with its caches filled.
const MEASURED: [&str; 6] = [
    "walk, first",
    "walk",
    "small files, first",
    "small files",
    "stream, first",
    "stream",
];

struct Bench {
    root: PathBuf,
    small: Vec<PathBuf>,
    runtime: tokio::runtime::Runtime,
}

impl Bench {
    fn new(root: PathBuf, arguments: &Arguments) -> Result<Self> {
        for directory in ["native", "empty", "layer", "merged", "fuse"] {
            fs::create_dir(root.join(directory))?;
        }
        let mut small = Vec::new();
        for index in 0..arguments.files {
            let directory = format!("d{:05}", index / arguments.per_directory.max(1));
            fs::create_dir_all(root.join("native").join(&directory))?;
            let path = PathBuf::from(directory).join(format!("file-{index:06}"));
            let content = pattern(index as u64, arguments.file_size.get());
            fs::write(root.join("native").join(&path), content)?;
            small.push(path);
        }
        let large = pattern(u64::MAX, arguments.stream.get() << 20);
        fs::write(root.join("native").join(LARGE), large)?;
        // Neither writing back nor reading in is to happen while measuring.
        rustix::fs::sync();

        let bench = Self {
            root,
            small,
            runtime: tokio::runtime::Runtime::new()?,
        };
        bench.make_layer()?;
        rustix::fs::sync();
        for file in ["data", "meta.erofs"] {
            fs::read(bench.root.join(file))?;
        }
        Ok(bench)
    }

    /// Makes `meta.erofs` and `data` of the native files.
    fn make_layer(&self) -> Result<()> {
        let native = self.root.join("native");
        let mut entries = Vec::new();
        let mut offset = 0;
        let mut last = None;
        let large = PathBuf::from(LARGE);
        for path in self.small.iter().chain([&large]) {
            let parent = path.parent().filter(|parent| *parent != Path::new(""));
            if let Some(parent) = parent.filter(|parent| last != Some(*parent)) {
                entries.push(json!({"name": parent, "type": "dir", "mode": 0o755}));
                last = Some(parent);
            }
            let content = fs::read(native.join(path))?;
            let mut position = 0;
            for chunk in content.chunks(CHUNK) {
                let mut entry = json!({
                    "name": path,
                    "type": "chunk",
                    "offset": offset,
                    "chunkOffset": position,
                    "chunkSize": chunk.len(),
                    "chunkDigest": Digest::of(chunk).to_string(),
                });
                if position == 0 {
                    entry["type"] = "reg".into();
                    entry["mode"] = 0o644.into();
                    entry["size"] = content.len().into();
                    entry["digest"] = Digest::of(&content).to_string().into();
                }
                entries.push(entry);
                position += chunk.len();
                offset += chunk.len() as u64;
            }
        }
        let json = serde_json::to_vec(&json!({"version": 1, "entries": entries}))?;
        let limits = Limits::default();
        let toc = read_toc_json(
            Format::ZstdChunked,
            offset,
            &json,
            &Digest::of(&json),
            &limits,
        )?;
        let placement = Placement::new(&toc);
        let meta = File::create(self.root.join("meta.erofs"))?;
        let started = Instant::now();
        write_image(&toc, &placement, XattrNamespace::Trusted, meta)?;
        eprintln!(
            "meta.erofs of {} inodes written in {:.1} ms",
            toc.nodes().len(),
            started.elapsed().as_secs_f64() * 1000.0
        );
        let data = File::create(self.root.join("data"))?;
        data.set_len(placement.data_size())?;
        for (path, id) in files(&toc) {
            data.write_all_at(&fs::read(native.join(path))?, placement.start(id))?;
        }
        Ok(())
    }

    fn content(&self) -> Result<Arc<Local>> {
        let data = File::open(self.root.join("data"))?;
        let size = data.metadata()?.len();
        Ok(Arc::new(Local { data, size }))
    }

    /// Mounts, measures and unmounts.
    fn measure(&self, mode: Mode) -> Result<Vec<(&'static str, f64)>> {
        let (layer, fuse) = (self.root.join("layer"), self.root.join("fuse"));
        let reader = Reader::new(self.runtime.handle().clone());
        let mut session = None;
        let lower = match mode {
            Mode::Native => self.root.join("native"),
            Mode::Erofs => {
                let table = BlobTable::new();
                table.insert(0, self.content()?);
                session = Some(Session::mount(Blobs::new(table, reader), &fuse, "sluice")?);
                self.mount_erofs(&fuse.join(BlobTable::file_name(0)), &layer, true)?;
                layer.clone()
            }
            Mode::ErofsComplete => {
                self.mount_erofs(&self.root.join("data"), &layer, false)?;
                layer.clone()
            }
            Mode::Fuse => {
                let table = TreeTable::new();
                let image = Image::open(&self.root.join("meta.erofs"))?;
                table.insert(0, Tree::new(image, self.content()?));
                session = Some(Session::mount(Trees::new(table, reader), &fuse, "sluice")?);
                fuse.join(TreeTable::directory_name(0))
            }
        };
        let merged = self.root.join("merged");
        let options = format!(
            "lowerdir={}:{}",
            lower.display(),
            self.root.join("empty").display()
        );
        rustix::mount::mount(
            "overlay",
            &merged,
            "overlay",
            rustix::mount::MountFlags::RDONLY,
            &*CString::new(options)?,
        )?;
        let measured = self.run(&merged);
        mount::unmount(&merged)?;
        mount::unmount(&layer)?;
        if let Some(session) = session {
            session.unmount();
        }
        measured
    }

    fn mount_erofs(&self, data: &Path, layer: &Path, direct_io: bool) -> Result<()> {
        let options = mount::erofs::Options {
            direct_io,
            ..Default::default()
        };
        mount::erofs::mount(&self.root.join("meta.erofs"), data, layer, options)?;
        Ok(())
    }

    fn run(&self, merged: &Path) -> Result<Vec<(&'static str, f64)>> {
        let walked = || -> io::Result<()> {
            let entries = walk(merged)?;
            assert!(entries > self.small.len(), "{entries} entries");
            Ok(())
        };
        let opened = || {
            self.small
                .iter()
                .try_for_each(|path| read_whole(&merged.join(path)))
        };
        let streamed = || read_whole(&merged.join(LARGE));
        let mut measured = Vec::new();
        for (index, action) in [&walked as &dyn Fn() -> io::Result<()>, &opened, &streamed]
            .into_iter()
            .enumerate()
        {
            measured.push((MEASURED[index * 2], timed(action)?));
            // The least disturbed of a few.
            let mut least = f64::INFINITY;
            for _ in 0..5 {
                least = least.min(timed(action)?);
            }
            measured.push((MEASURED[index * 2 + 1], least));
        }
        Ok(measured)
    }
}

fn timed(action: &dyn Fn() -> io::Result<()>) -> io::Result<f64> {
    let started = Instant::now();
    action()?;
    Ok(started.elapsed().max(Duration::from_nanos(1)).as_secs_f64())
}

/// Lists every directory and stats every entry; how many there were.
fn walk(directory: &Path) -> io::Result<usize> {
    let mut entries = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        entries += 1;
        if entry.metadata()?.is_dir() {
            entries += walk(&entry.path())?;
        }
    }
    Ok(entries)
}

fn read_whole(path: &Path) -> io::Result<()> {
    thread_local! {
        static BUFFER: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; 1 << 20]);
    }
    let mut file = File::open(path)?;
    BUFFER.with_borrow_mut(|buffer| {
        while file.read(buffer)? > 0 {}
        Ok(())
    })
}

/// A layer's content, all present.
struct Local {
    data: File,
    size: u64,
}

impl Content for Local {
    fn size(&self) -> u64 {
        self.size
    }

    fn try_read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        self.data.read_exact_at(buffer, offset)?;
        Ok(true)
    }

    fn read_missing(
        self: Arc<Self>,
        offset: u64,
        len: usize,
    ) -> BoxFuture<'static, io::Result<Vec<u8>>> {
        Box::pin(async move {
            let mut bytes = vec![0; len];
            self.data.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        })
    }
}

/// The regular files by path.
fn files(toc: &Toc) -> Vec<(PathBuf, NodeId)> {
    use std::os::unix::ffi::OsStrExt as _;
    let mut files = Vec::new();
    let mut pending = vec![(PathBuf::new(), NodeId::ROOT)];
    while let Some((path, id)) = pending.pop() {
        match &toc.node(id).kind {
            NodeKind::Directory(directory) => {
                pending.extend(directory.children.iter().map(|child| {
                    let name = std::ffi::OsStr::from_bytes(&child.name);
                    (path.join(name), child.node)
                }));
            }
            _ => files.push((path, id)),
        }
    }
    files
}

fn pattern(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

fn report(arguments: &Arguments, rounds: &BTreeMap<(Mode, &str), Vec<f64>>) {
    let seconds = |mode, what| median(&mut rounds[&(mode, what)].clone());
    let mut document = json!({
        "files": arguments.files,
        "file_size": arguments.file_size.get(),
        "stream_mib": arguments.stream.get(),
        "rounds": arguments.rounds,
    });
    eprint!("{:<20}", "");
    for mode in MODES {
        eprint!("{:>24}", mode.name());
    }
    eprintln!();
    for what in MEASURED {
        eprint!("{what:<20}");
        for mode in MODES {
            let taken = seconds(mode, what);
            let ratio = seconds(Mode::Native, what) / taken;
            eprint!("{:>12.2} ms  {:>6.2} x", taken * 1000.0, ratio);
            let row: &mut Value = &mut document[what][mode.name()];
            *row = json!({"seconds": taken, "of_native": ratio});
        }
        eprintln!();
    }
    println!("{document:#}");
}

/// Takes down what is left mounted when a measurement fails.
struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        for mount in mount::mounts_below(&self.0).unwrap_or_default() {
            let _ = mount::detach(&mount.target);
        }
    }
}
