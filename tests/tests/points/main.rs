//! The daemon is killed at every step of every change of state. After the next
//! start database, directories, mounts and containerd agree, no byte is wrong,
//! and what was broken off can be done again.

mod world;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use sluice_snapshotter::crash_points::POINTS;
use sluice_tests::agreement::check_agreement;
use sluice_tests::command::wait_for;
use sluice_tests::content;
use sluice_tests::daemon::Mode;
use sluice_tests::killer::signal;
use sluice_tests::scratch::mount_points;
use sluice_tests::{Daemon, Scratch, programs};

use world::{Orders, Source, TWINS, World, options};

impl World<'_> {
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
            // containerd gives out another number meanwhile. A removal would
            // have it look for what it does not know of, and remove that.
            self.snapshots(&["prepare", "between"])?;
            keep().context("a commit that was broken off cannot be made again")?;
            self.snapshots(&["remove", "between"])?;
            ensure!(fs::read_to_string(upper.join("written"))? == point);
            self.snapshots(&["remove", "name"])?;
            self.crash(&[remove.next().context("no point")?], || {
                self.containerd.collect_garbage()
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

    /// A file that another layer has is read, with a death at each point.
    fn deaths_in_copies(&self, points: [&str; TWINS]) -> Result<()> {
        self.pull()?;
        let root = self.mount()?;
        let files = &self.source.files;
        for (number, point) in points.into_iter().enumerate() {
            content::check(&root, &files[number])?;
            let twin = &files[files.len() - TWINS + number];
            ensure!(twin.1 == files[number].1, "they are different files");
            self.crash(&[point], || content::check(&root, twin))?;
        }
        for file in files {
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

    /// What a layer's tar is becomes known once all of it is here, with a death
    /// at each point; the process after it finds out the same.
    fn deaths_in_proving(&self, points: &[&str]) -> Result<()> {
        let configuration = self.daemon.root().with_file_name("config.toml");
        let text = fs::read_to_string(&configuration)?;
        let (off, on) = (
            "[background]\nenabled = false",
            "[background]\ndelay_seconds = 0",
        );
        ensure!(text.contains(off), "{text}");
        for point in points {
            self.pull()?;
            let root = self.mount()?;
            fs::write(&configuration, text.replace(off, on))?;
            self.crash(&[point], || self.daemon.process().signal(Signal::HUP))?;
            self.wait_until_proven()?;
            self.agrees(true)?;
            fs::write(&configuration, &text)?;
            self.restart()?;
            for file in &self.source.files {
                content::check(&root, file)?;
            }
            self.containerd.unmount(&root)?;
            self.remove_image()?;
            self.is_empty()?;
        }
        Ok(())
    }

    fn wait_until_proven(&self) -> Result<()> {
        let layers = self.daemon.root().join("layers");
        let top = self.containerd.top_snapshot(&self.source.reference)?;
        wait_for("the layers to be what the image says", || {
            let stat = self.containerd.ctr_text(&[
                "snapshots",
                "--snapshotter",
                world::SLUICE,
                "info",
                &top,
            ])?;
            let proven = fs::read_dir(&layers)?
                .map(|layer| Ok(layer?.path().join("diff-id").exists()))
                .collect::<Result<Vec<_>>>()?;
            let verified = stat.contains("\"containerd.io/snapshot/sluice.content\": \"verified\"");
            Ok((verified && proven == [true, true]).then_some(()))
        })
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
        &[
            &["mount.target-made", "start.cleared"],
            &["mount.mounted"],
            &["index.drafted"],
            &["index.named"],
            &["index.merged"],
        ],
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
            "rest.written",
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
            "marker.cleared",
        ],
        &[
            &[
                "start.root-taken",
                "start.database-opened",
                "start.probed",
                "marker.opened",
                "marker.written",
                "marker.set",
                "start.directories-restored",
                "start.orphans-removed",
                "start.layers-retained",
                "start.ready",
                "verify.layer-done",
                "verify.settled",
                "rest.opened",
            ][..],
            &ADOPT,
        ]
        .concat(),
    )?;
    world.deaths_in_copies(["copy.found", "copy.told"])?;
    world.deaths_in_mending(&["mend.compiled", "mend.written", "mend.done"])?;
    world.deaths_in_evictions(&[
        "evict.unmounted",
        "evict.target-removed",
        "evict.present-removed",
        "evict.data-made",
        "evict.data-named",
        "evict.synced",
    ])?;
    world.deaths_in_proving(&[
        "prove.known",
        "prove.written",
        "prove.named",
        "prove.rest-removed",
    ])?;
    world.deaths_at_the_end()?;
    let mut struck = world.orders.struck()?;
    let first = [
        &[
            "database.drafted",
            "database.initialised",
            "database.named",
            "probe.mounted",
            "probe.unmounted",
        ][..],
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
