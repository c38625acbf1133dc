//! The daemon is killed at every step of every change of state. After the next
//! start database, directories, mounts and containerd agree, no byte is wrong,
//! and what was broken off can be done again.

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use sluice_snapshotter::crash_points::POINTS;
use sluice_tests::agreement::check_agreement;
use sluice_tests::command::{run, wait_for};
use sluice_tests::content::{self, noise};
use sluice_tests::daemon::{Mode, Options};
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Tarball};
use sluice_tests::killer::signal;
use sluice_tests::relay::Relay;
use sluice_tests::scratch::mount_points;
use sluice_tests::{Containerd, Daemon, Registry, Scratch, programs};

const SLUICE: &str = "sluice";
const LAYERS: usize = 2;
/// Files of a layer, each with a chunk of its own.
const FILES: usize = 40;
const FILE_SIZE: usize = 5000;

/// Only what a test does happens.
const QUIET: &str = "[background]\nenabled = false\n[prefetch]\nenabled = false\n\
                     [fetch]\nread_ahead_mib = 0\n";

/// An image in a registry.
struct Source {
    reference: String,
    files: Vec<(String, Vec<u8>)>,
    _registry: Registry,
    _scratch: Scratch,
}

impl Source {
    fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        let layout = scratch.fresh_dir("layout")?;
        let mut writer = LayoutWriter::new(&layout)?;
        let mut files = Vec::new();
        for layer in 0..LAYERS {
            writer.layer(Compression::Gzip, |to| {
                let mut tar = Tarball::new(to);
                for file in 0..FILES {
                    let content = noise(FILE_SIZE, (layer * FILES + file) as u64);
                    let name = format!("{layer}-{file}");
                    tar.file(&name, &Meta::mode(0o644), &content)?;
                    files.push((name, content));
                }
                tar.finish()
            })?;
        }
        writer.finish(image::TAG, &["/none"])?;
        let reference = registry.reference("points:1");
        run(programs::sluice_command()?
            .args(["convert", "--plain-http", "--format", "estargz"])
            .arg(format!("oci:{}:{}", layout.display(), image::TAG))
            .arg(&reference))?;
        Ok(Self {
            reference,
            files,
            _registry: registry,
            _scratch: scratch,
        })
    }
}

/// A node whose daemon dies where it is told to.
struct World<'s> {
    source: &'s Source,
    mode: Mode,
    daemon: Daemon,
    containerd: Containerd,
    orders: Orders,
    /// Files that no process has read yet.
    unread: Mutex<VecDeque<usize>>,
    _relay: Relay,
    _scratch: Scratch,
}

/// The file that tells the daemon where to die.
struct Orders(PathBuf);

impl Orders {
    fn give(&self, points: &[&str]) -> Result<()> {
        let draft = self.0.with_extension("new");
        fs::write(&draft, points.join("\n"))?;
        Ok(fs::rename(draft, &self.0)?)
    }

    /// What has struck so far: the points, each with the process.
    fn struck(&self) -> Result<Vec<(String, u32)>> {
        let mut path = self.0.clone().into_os_string();
        path.push(".struck");
        let text = fs::read_to_string(path).unwrap_or_default();
        let parse = |line: &str| {
            let (point, process) = line.split_once(' ')?;
            Some((point.to_owned(), process.parse().ok()?))
        };
        let each = text.lines().map(|line| parse(line).context("half a line"));
        each.collect()
    }

    /// Waits until `points` have struck after the first `before`; returns the
    /// last process that died.
    fn wait(&self, before: usize, points: &[&str]) -> Result<u32> {
        let struck = wait_for(&format!("the daemon to reach {points:?}"), || {
            let struck = self.struck()?;
            Ok((struck.len() >= before + points.len()).then_some(struck))
        })?;
        for ((struck, _), point) in struck[before..].iter().zip(points) {
            let (name, _) = point.split_once(' ').unwrap_or((point, ""));
            ensure!(struck == name, "{struck} struck instead of {name}");
        }
        Ok(struck.last().context("nothing struck")?.1)
    }
}

fn options(mode: Mode, orders: &Orders) -> Options {
    Options {
        mode: Some(mode),
        more: QUIET.to_owned(),
        supervised: true,
        crash_points: Some(orders.0.clone()),
        ..Options::default()
    }
}

impl<'s> World<'s> {
    fn start(source: &'s Source, mode: Mode) -> Result<Self> {
        let scratch = Scratch::new()?;
        let orders = Orders(scratch.path().join("orders"));
        let daemon = Daemon::start(&scratch, &options(mode, &orders))?;
        let relay = Relay::start(scratch.path().join("relay.sock"), daemon.socket())?;
        let sockets = [(SLUICE, relay.path().to_owned())];
        let containerd = Containerd::start_with_sockets(&scratch, &sockets)?;
        Ok(Self {
            source,
            mode,
            daemon,
            containerd,
            orders,
            unread: Mutex::default(),
            _relay: relay,
            _scratch: scratch,
        })
    }

    /// Does what makes the daemon pass `points`, one process after the other
    /// dying at each, and waits for the process that lives. Whoever caused it
    /// may have got an error.
    fn die(&self, points: &[&str], cause: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.orders.struck()?.len();
        self.orders.give(points)?;
        let outcome = cause();
        let dead = self
            .orders
            .wait(before, points)
            .with_context(|| format!("{outcome:?}; log:\n{}", self.daemon.log()))?;
        self.daemon.wait_until_ready(dead)?;
        Ok(())
    }

    /// The same; then everything has to agree.
    fn crash(&self, points: &[&str], cause: impl FnOnce() -> Result<()>) -> Result<()> {
        self.die(points, cause)?;
        self.agrees(false)
            .with_context(|| format!("after {points:?}; log:\n{}", self.daemon.log()))
    }

    /// The daemon stops, and the next one starts.
    fn restart(&self) -> Result<()> {
        let process = self.daemon.serving().context("no process")?;
        self.daemon.process().signal(Signal::HUP)?;
        self.daemon.wait_until_ready(process)?;
        Ok(())
    }

    /// That the daemon agrees with itself, and with containerd.
    fn agrees(&self, with_containerd: bool) -> Result<()> {
        let containerd = with_containerd.then_some((&self.containerd, SLUICE));
        // What is present is made durable whenever the time has come for it.
        let mut last = Ok(());
        for _ in 0..30 {
            last = check_agreement(&self.daemon, self.mode, containerd);
            match (&last, with_containerd) {
                (Ok(()), _) => return Ok(()),
                (Err(_), true) => self.collect()?,
                (Err(_), false) => std::thread::sleep(std::time::Duration::from_millis(20)),
            }
        }
        last
    }

    fn snapshots(&self, arguments: &[&str]) -> Result<()> {
        run(self
            .containerd
            .ctr()
            .args(["snapshots", "--snapshotter", SLUICE])
            .args(arguments))?;
        Ok(())
    }

    /// Has containerd remove what it no longer refers to, also what the daemon
    /// has and containerd never heard of.
    fn collect(&self) -> Result<()> {
        // A removal is what makes it look.
        self.snapshots(&["prepare", "passing"])?;
        self.snapshots(&["remove", "passing"])?;
        self.collect_garbage()
    }

    fn collect_garbage(&self) -> Result<()> {
        self.containerd
            .ctr_text(&["leases", "create", "--id", "passing"])?;
        self.containerd
            .ctr_text(&["leases", "delete", "--sync", "passing"])?;
        Ok(())
    }

    fn pull(&self) -> Result<()> {
        self.containerd.lazy_pull(&self.source.reference, SLUICE)?;
        *self.unread.lock().unwrap() = (0..self.source.files.len()).collect();
        Ok(())
    }

    fn mount(&self) -> Result<PathBuf> {
        self.containerd.mount(&self.source.reference, SLUICE)
    }

    /// Reads a file that is not on the node yet.
    fn read(&self, root: &Path) -> Result<()> {
        let next = self.unread.lock().unwrap().pop_front();
        let number = next.context("all files were read")?;
        content::check(root, &self.source.files[number])
    }

    fn remove_image(&self) -> Result<()> {
        self.containerd.forget_images()
    }

    /// That nothing of any image is left, anywhere.
    fn is_empty(&self) -> Result<()> {
        self.agrees(true)?;
        for directory in ["layers", "snapshots", "m"] {
            let left = fs::read_dir(self.daemon.root().join(directory))?.count();
            ensure!(left == 0, "{left} left in {directory}");
        }
        Ok(())
    }

    /// The directory of an active snapshot.
    fn upper(&self, key: &str) -> Result<PathBuf> {
        let mounts = self.containerd.ctr_text(&[
            "snapshots",
            "--snapshotter",
            SLUICE,
            "mounts",
            "/nowhere",
            key,
        ])?;
        let upper = mounts.split(',').find_map(|o| o.strip_prefix("upperdir="));
        Ok(upper.context("no upper directory")?.into())
    }

    /// A snapshot is prepared, written to, committed and removed, with a death
    /// in each.
    fn lives_of_snapshots(&self) -> Result<()> {
        let database = ["database.begun", "database.changed", "database.committed"];
        let with_database =
            |points: &[&'static str]| [points, &database].concat().into_iter().cycle();
        let prepare = [
            "prepare.lower-mounted",
            "prepare.directory-made",
            "prepare.upper-made",
            "prepare.upper-owned",
            "prepare.directories-made",
            "prepare.recorded",
            "database.begun",
            "database.changed",
            "database.committed",
        ];
        let mut commit = with_database(&["commit.recorded", "commit.measured"]);
        let mut remove = with_database(&["remove.recorded", "remove.directory-removed"]);
        self.pull()?;
        let root = self.mount()?;
        let top = self.containerd.top_snapshot(&self.source.reference)?;
        for point in prepare {
            let make = || self.snapshots(&["prepare", "key", &top]);
            self.crash(&[point], make)?;
            make()?;
            let upper = self.upper("key")?;
            fs::write(upper.join("written"), point)?;
            let keep = || self.snapshots(&["commit", "name", "key"]);
            self.crash(&[commit.next().context("no point")?], keep)?;
            // containerd gives out another number meanwhile.
            self.snapshots(&["prepare", "between"])?;
            self.snapshots(&["remove", "between"])?;
            keep().context("a commit that was broken off cannot be made again")?;
            ensure!(fs::read_to_string(upper.join("written"))? == point);
            self.snapshots(&["remove", "name"])?;
            self.crash(&[remove.next().context("no point")?], || {
                self.collect_garbage()
            })?;
            self.agrees(true)?;
            ensure!(!upper.exists(), "{} is left", upper.display());
            self.read(&root)?;
        }
        // Who gives up after a commit whose answer was lost leaves nothing.
        self.snapshots(&["prepare", "key", &top])?;
        self.crash(&["commit.recorded"], || {
            self.snapshots(&["commit", "name", "key"])
        })?;
        self.snapshots(&["remove", "key"])?;
        self.agrees(true)?;
        self.containerd.unmount(&root)?;
        self.remove_image()?;
        self.is_empty()
    }

    /// An image is pulled, mounted and removed, with a death in each.
    fn lives_of_layers(&self, pull: &[&[&str]], mount: &[&[&str]], remove: &[&str]) -> Result<()> {
        let (mut mount, mut remove) = (mount.iter(), remove.iter());
        let mut pull = pull.iter();
        loop {
            let (pull, mount, remove) = (pull.next(), mount.next(), remove.next());
            if pull.is_none() && mount.is_none() && remove.is_none() {
                return Ok(());
            }
            if let Some(points) = pull {
                self.crash(points, || self.pull())?;
            }
            self.pull()?;
            self.agrees(true)?;
            if mount.is_some() || remove.is_some() {
                if let Some(points) = mount {
                    self.crash(points, || self.mount().map(drop))?;
                }
                let root = self.mount()?;
                self.read(&root)?;
                self.agrees(false)?;
                self.containerd.unmount(&root)?;
            }
            match remove {
                Some(point) => self.crash(&[point], || self.remove_image())?,
                None => self.remove_image()?,
            }
            self.is_empty()?;
        }
    }

    /// Reads go on through a death at each point of a fill, of making it
    /// durable, of a stop in good order, and of the next start.
    fn deaths_under_readers(&self, fill: &[&str], restart: &[&str], start: &[&str]) -> Result<()> {
        self.pull()?;
        let root = self.mount()?;
        for point in fill {
            self.crash(&[point], || self.read(&root))?;
        }
        let hang_up = || self.daemon.process().signal(Signal::HUP);
        for point in restart {
            // Something that is to be made durable.
            self.read(&root)?;
            self.crash(&[point], hang_up)?;
        }
        for point in start {
            self.crash(&[point], || {
                let process = self.daemon.serving().context("no process")?;
                signal(process, Signal::KILL)?;
                // Waits for the process after the one that dies.
                self.read(&root)
            })?;
        }
        for file in &self.source.files {
            content::check(&root, file)?;
        }
        self.containerd.unmount(&root)?;
        self.remove_image()?;
        self.is_empty()
    }

    /// What nobody uses is evicted by each start, with a death at each point;
    /// what is mounted afterwards is whole.
    fn deaths_in_evictions(&self, points: &[&str]) -> Result<()> {
        let configuration = self.daemon.root().with_file_name("config.toml");
        let text = fs::read_to_string(&configuration)?;
        let full = format!("{text}[cache]\nmin_free_mib = {}\n", 1_u64 << 40);
        self.pull()?;
        for point in points {
            let root = self.mount()?;
            self.read(&root)?;
            self.containerd.unmount(&root)?;
            fs::write(&configuration, &full)?;
            self.crash(&[point], || self.daemon.process().signal(Signal::HUP))?;
            self.wait_until_evicted()?;
            self.agrees(true)?;
            fs::write(&configuration, &text)?;
            self.restart()?;
            let root = self.mount()?;
            for file in &self.source.files {
                content::check(&root, file)?;
            }
            self.containerd.unmount(&root)?;
        }
        self.remove_image()?;
        self.is_empty()
    }

    /// A layer whose tree the disk has damaged is mended when it is mounted.
    fn deaths_in_mending(&self, points: &[&str]) -> Result<()> {
        self.pull()?;
        for point in points {
            self.restart()?;
            for layer in fs::read_dir(self.daemon.root().join("layers"))? {
                let meta = layer?.path().join("meta.erofs");
                let meta = fs::File::options().write(true).open(meta)?;
                meta.set_len(meta.metadata()?.len() - 1)?;
            }
            self.die(&[point], || self.mount().map(drop))?;
            let root = self.mount()?;
            self.agrees(false)
                .with_context(|| format!("after {point}"))?;
            self.read(&root)?;
            self.containerd.unmount(&root)?;
            // Nothing is mounted from it when it is damaged again.
            self.remove_image()?;
            self.is_empty()?;
            self.pull()?;
        }
        self.remove_image()?;
        self.is_empty()
    }

    fn wait_until_evicted(&self) -> Result<()> {
        let layers = self.daemon.root().join("layers");
        wait_for("the eviction", || {
            for layer in fs::read_dir(&layers)? {
                let data = fs::metadata(layer?.path().join("data"))?;
                if data.blocks() > 0 {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
    }

    /// SIGTERM lets a call finish, takes no other, and leaves mounts alive.
    fn a_stop_waits_for_calls(&self) -> Result<()> {
        self.pull()?;
        let root = self.mount()?;
        let top = self.containerd.top_snapshot(&self.source.reference)?;
        let process = self.daemon.serving().context("no process")?;
        let before = self.orders.struck()?.len();
        let point = "prepare.directories-made hold";
        self.orders.give(&[point])?;
        let prepared = std::thread::scope(|scope| -> Result<_> {
            let call = scope.spawn(|| self.snapshots(&["prepare", "slow", &top]));
            self.orders.wait(before, &[point])?;
            signal(process, Signal::TERM)?;
            wait_for("the daemon to stop", || {
                Ok(self.daemon.log().contains("stopping").then_some(()))
            })?;
            ensure!(!call.is_finished(), "the call has ended");
            ensure!(self.daemon.serving() == Some(process), "it did not wait");
            self.orders.give(&[])?;
            let Ok(prepared) = call.join() else {
                bail!("the call panicked");
            };
            Ok(prepared)
        })?;
        prepared.context("a call under way when the daemon was to stop")?;
        self.daemon.wait_until_ready(process)?;
        self.agrees(true)?;
        self.read(&root)?;
        self.snapshots(&["remove", "slow"])?;
        self.containerd.unmount(&root)?;
        self.remove_image()?;
        self.is_empty()
    }

    /// The end for good is broken off, and a later daemon finds what is left.
    fn deaths_at_the_end(&mut self) -> Result<()> {
        for points in [
            &["end.layers-closed", "start.lost-detached"][..],
            &["end.forgotten"],
            &["end.unmounted"],
        ] {
            self.pull()?;
            let root = self.mount()?;
            self.read(&root)?;
            self.containerd.unmount(&root)?;
            let before = self.orders.struck()?.len();
            self.orders.give(points)?;
            self.daemon.stop()?;
            self.orders.wait(before, &points[..1])?;
            self.daemon.start_again()?;
            self.orders.wait(before, points)?;
            self.agrees(true)?;
            let root = self.mount()?;
            self.read(&root)?;
            self.containerd.unmount(&root)?;
            self.remove_image()?;
            self.is_empty()?;
        }
        Ok(())
    }
}

/// The first process of a new root directory dies at each point.
fn deaths_of_the_first(mode: Mode, points: &[&str]) -> Result<()> {
    let scratch = Scratch::new()?;
    for point in points {
        let directory = scratch.fresh_dir("orders")?;
        let orders = Orders(directory.join("orders"));
        orders.give(&[point])?;
        let daemon = Daemon::start(&scratch, &options(mode, &orders))?;
        let dead = orders.wait(0, &[point])?;
        daemon.wait_until_ready(dead)?;
        check_agreement(&daemon, mode, None)
            .with_context(|| format!("after {point}; log:\n{}", daemon.log()))?;
        daemon.stop()?;
        let left = mount_points(&daemon.root());
        ensure!(left.is_empty(), "after {point}, {left:?} are mounted");
    }
    Ok(())
}

const FIRST: [&str; 5] = [
    "session.mounted",
    "session.negotiated",
    "keep.forgotten",
    "keep.terms-stored",
    "keep.device-stored",
];

const ADOPT: [&str; 6] = [
    "start.taken-over",
    "start.resumed",
    "adopt.replayed",
    "adopt.in-place",
    "adopt.resent",
    "start.served",
];

fn in_mode_erofs(source: &Source) -> Result<Vec<(String, u32)>> {
    let mut world = World::start(source, Mode::Erofs)?;
    world.a_stop_waits_for_calls()?;
    world.lives_of_snapshots()?;
    world.lives_of_layers(
        &[
            &["number.noted"],
            &["number.taken"],
            &["compile.directory-made", "start.tidied"],
            &["compile.meta-written"],
            &["compile.meta-synced"],
            &["compile.data-made"],
            &["compile.chunks-written"],
            &["compile.filled"],
            &["compile.named"],
            &["compile.synced"],
            &["open.opened"],
            &["database.begun"],
            &["database.changed"],
            &["database.committed"],
            &["open.recorded"],
        ],
        // While one layer is mounted, so is the other: a daemon that is killed
        // in the middle must not wait for itself.
        &[&["mount.target-made", "start.cleared"], &["mount.mounted"]],
        &[
            "release.closed",
            "release.unmounted",
            "release.target-removed",
            "release.renamed",
            "release.deleted",
            "remove.recorded",
        ],
    )?;
    world.deaths_under_readers(
        &[
            "fill.claimed",
            "fill.arrived",
            "fill.verified",
            "fill.written",
            "fill.present",
            "fill.told",
        ],
        &[
            "persist.taken",
            "persist.data-synced",
            "persist.new-made",
            "persist.new-written",
            "persist.new-synced",
            "persist.named",
            "persist.synced",
            "stop.begun",
            "stop.drained",
            "stop.closed",
            "leave.persisted",
            "leave.left",
        ],
        &[
            &[
                "start.root-taken",
                "start.database-opened",
                "probe.mounted",
                "probe.unmounted",
                "start.probed",
                "start.directories-restored",
                "start.orphans-removed",
                "start.layers-retained",
                "start.ready",
            ][..],
            &ADOPT,
        ]
        .concat(),
    )?;
    world.deaths_in_mending(&["mend.compiled", "mend.written", "mend.done"])?;
    world.deaths_in_evictions(&[
        "evict.unmounted",
        "evict.target-removed",
        "evict.present-removed",
        "evict.data-made",
        "evict.data-named",
        "evict.synced",
    ])?;
    world.deaths_at_the_end()?;
    let mut struck = world.orders.struck()?;
    let first = [
        &["database.drafted", "database.initialised", "database.named"][..],
        &FIRST,
    ]
    .concat();
    deaths_of_the_first(Mode::Erofs, &first)?;
    struck.extend(first.iter().map(|point| ((*point).to_owned(), 0)));
    Ok(struck)
}

/// What differs from the other mode.
fn in_mode_fuse(source: &Source) -> Result<Vec<(String, u32)>> {
    deaths_of_the_first(Mode::Fuse, &FIRST)?;
    let mut world = World::start(source, Mode::Fuse)?;
    world.lives_of_layers(
        &[],
        &[&["mount.shown"]],
        &["release.closed", "release.renamed", "release.deleted"],
    )?;
    world.deaths_under_readers(&["fill.arrived", "fill.written"], &["stop.drained"], &ADOPT)?;
    world.deaths_at_the_end()?;
    world.orders.struck()
}

#[test]
fn a_death_at_any_point_leaves_everything_in_agreement() -> Result<()> {
    let source = Source::new()?;
    // Once, before both ask for it.
    programs::crashing_snapshotter()?;
    let struck = std::thread::scope(|scope| -> Result<_> {
        let fuse = scope.spawn(|| in_mode_fuse(&source));
        let mut struck = in_mode_erofs(&source).context("in mode erofs")?;
        let Ok(fuse) = fuse.join() else {
            bail!("the thread for mode fuse panicked");
        };
        struck.extend(fuse.context("in mode fuse")?);
        Ok(struck)
    })?;
    eprintln!("killed {} times", struck.len());
    let struck: BTreeSet<&str> = struck.iter().map(|(point, _)| point.as_str()).collect();
    let missed: Vec<_> = POINTS.iter().filter(|p| !struck.contains(*p)).collect();
    ensure!(missed.is_empty(), "nothing was killed at {missed:?}");
    Ok(())
}
