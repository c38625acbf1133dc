//! Many at once: containers, readers, snapshots, layers. What is asserted are
//! counts; times are printed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use sluice_oci::Digest;
use sluice_tests::command::{run, wait_for};
use sluice_tests::daemon::{Mode, Options};
use sluice_tests::figures::{self, Work};
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Noise, Tarball};
use sluice_tests::killer::signal;
use sluice_tests::proxy::{Fault, Proxy};
use sluice_tests::{Containerd, Daemon, Registry, Runc, Scratch, Snapshots, snapshots};

fn noise(seed: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    Noise(seed << 32).take(len).read_to_end(&mut bytes)?;
    Ok(bytes)
}

const CONTAINERS: usize = 200;
/// How many are made at one moment: no machine does more at once than it has
/// cores. Where nothing is prefetched, they begin to read when all are there.
const STARTING: usize = 16;

/// Two hundred containers of one image: every one reads everything and stays.
#[test]
fn two_hundred_containers_of_one_image_fetch_each_byte_once() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let layout = scratch.dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    writer.layer(Compression::None, |to| {
        let mut tar = Tarball::new(to);
        image::add_programs(&mut tar, &["sh", "cat", "sha256sum", "sleep"])?;
        tar.finish()
    })?;
    let mut all = Vec::new();
    for layer in 0..2 {
        writer.layer(Compression::None, |to| {
            let mut tar = Tarball::new(to);
            tar.dir("data", &Meta::mode(0o755))?;
            for file in 0..20 {
                let content = noise(layer * 20 + file, 30_000 + file * 10_000)?;
                let name = format!("data/{layer}-{file:02}");
                tar.file(&name, &Meta::mode(0o644), &content)?;
                all.extend(content);
            }
            tar.finish()
        })?;
    }
    writer.finish(image::TAG, &["/usr/bin/sh"])?;
    let expected = Digest::of(&all).hex();
    // Half of the data is fetched ahead, if anything is.
    let first = scratch.path().join("first");
    let names = (0..10).map(|file| format!("data/1-{file:02}\n"));
    fs::write(&first, names.collect::<String>())?;
    let first = first.to_string_lossy();
    let direct = registry.reference("many:1");
    image::convert(
        &layout,
        &direct,
        &["--chunk-size", "65536", "--prioritize", &first],
    )?;

    // All of them in one containerd, each with a proxy of its own, so that
    // they have nothing in common.
    let kinds = Mode::ALL.map(|mode| [(mode, false), (mode, true)]);
    let mut daemons = Vec::new();
    for &(mode, prefetch) in kinds.as_flattened() {
        let more = format!("[prefetch]\nenabled = {prefetch}\n[background]\nenabled = false\n");
        let options = Options {
            mode: Some(mode),
            more,
            ..Options::default()
        };
        let name = format!(
            "{}-{}",
            mode.name(),
            ["only", "prefetch"][usize::from(prefetch)]
        );
        daemons.push((name, Daemon::start(&scratch, &options)?, prefetch));
    }
    let named: Vec<_> = daemons
        .iter()
        .map(|(name, daemon, _)| (name.as_str(), daemon))
        .collect();
    let containerd = Containerd::start_with(&scratch, &named)?;
    let runtime = tokio::runtime::Runtime::new()?;
    for (name, daemon, prefetch) in &daemons {
        let proxy = Proxy::start(registry.host())?;
        let reference = proxy.reference("many:1");
        containerd.lazy_pull(&reference, name)?;
        let parent = containerd.top_snapshot(&reference)?;
        // What was asked for until now are tables of contents, and where
        // anything is fetched ahead some of the data.
        proxy.forget();
        let client = runtime.block_on(Snapshots::connect(daemon))?;
        let runc = Runc::new(&scratch)?;
        let gate = runc.shared().join("gate");
        run(std::process::Command::new("mkfifo").arg(&gate))?;
        let wait = if *prefetch {
            ""
        } else {
            "read line < /shared/gate;"
        };
        let read = format!("{wait} cat /data/* | sha256sum; exec sleep 100000");
        let clock = Instant::now();
        let containers = all_at_once(|number| {
            let id = format!("{name}-{number}");
            let mounts = runtime.block_on(client.prepare(&id, &parent))?;
            runc.start(&id, &["sh", "-c", &read], |root| {
                snapshots::mount(&mounts, root)
            })
        })?;
        // A line for each; open until all have taken theirs.
        let mut opened = File::options().read(true).write(true).open(&gate)?;
        opened.write_all(&[b'\n'; CONTAINERS])?;
        for container in &containers {
            let read = wait_for("a container to have read everything", || {
                ensure!(container.is_alive(), "it ended: {}", container.output()?);
                Ok(Some(container.output()?).filter(|output| output.ends_with('\n')))
            })
            .with_context(|| daemon.log())?;
            ensure!(read == format!("{expected}  -\n"), "{name}: {read}");
        }
        let alive = containers.iter().filter(|container| container.is_alive());
        ensure!(alive.count() == CONTAINERS, "not all are alive together");
        let started = clock.elapsed();
        let fetched = each_byte_once(&proxy).with_context(|| name.clone())?;
        println!(
            "{name}: {CONTAINERS} containers in {started:.1?}: {} requests, {fetched} bytes",
            proxy.seen().len()
        );
        let least = match prefetch {
            false => all.len(),
            true => all.len() / 2,
        };
        ensure!(fetched > least as u64, "{fetched} bytes were fetched");
        all_at_once(|number| runc.remove(&containers[number]))?;
    }
    Ok(())
}

/// Does something for each container, some at a time.
fn all_at_once<T: Send>(work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..STARTING {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= CONTAINERS {
                        return;
                    }
                    let result = work(number);
                    done.lock()
                        .expect("no thread panics")
                        .insert(number, result);
                }
            });
        }
    });
    let done = done.into_inner().expect("no thread panics");
    done.into_values().collect()
}

/// Makes sure that no byte of any blob was sent twice, and returns how many
/// there were.
fn each_byte_once(proxy: &Proxy) -> Result<u64> {
    let mut ranges = BTreeMap::<_, Vec<_>>::new();
    for seen in proxy.seen() {
        ensure!(seen.path.contains("/blobs/"), "{seen:?}");
        let range = seen.range.context("a whole blob was asked for")?;
        let start = range.trim_start_matches("bytes=").split('-').next();
        let start: u64 = start.unwrap_or_default().parse().context(range)?;
        ranges
            .entry(seen.path)
            .or_default()
            .push((start, start + seen.bytes));
    }
    let mut total = 0;
    for (path, mut ranges) in ranges {
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            let twice = pair[0].1.saturating_sub(pair[1].0);
            ensure!(twice == 0, "{path}: {twice} bytes twice: {ranges:?}");
        }
        total += ranges.iter().map(|(start, end)| end - start).sum::<u64>();
    }
    Ok(total)
}

const READERS: u64 = 3_000;
const FILE: u64 = 40_000;
/// What the daemon may have in memory for everything that is being fetched:
/// its default.
const BUDGET: u64 = 64 << 20;
/// Beside the budget: 3,000 requests of the kernel that wait, at a few
/// kilobytes each, what decoders and connections work on, and what the
/// allocator does not give back at once.
const OVERHEAD: u64 = 32 << 20;

/// Every reader waits for a chunk of its own, 120 MB together, while the
/// registry delivers nothing; the daemon is killed, and the next one takes all
/// of them over; then the registry delivers.
#[test]
fn thousands_of_readers_wait_within_the_memory_budget_and_all_are_answered() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let layout = scratch.dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    writer.layer(Compression::None, |to| {
        let mut tar = Tarball::new(to);
        for file in 0..READERS {
            tar.file(&file.to_string(), &Meta::mode(0o644), &noise(file, FILE)?)?;
        }
        tar.finish()
    })?;
    writer.finish(image::TAG, &[])?;
    let direct = registry.reference("many:1");
    image::convert(&layout, &direct, &["--format", "zstd-chunked"])?;
    let layer = registry.manifest(&direct)?.layers.remove(0);
    let runtime = tokio::runtime::Runtime::new()?;
    for mode in Mode::ALL {
        let proxy = Proxy::start(registry.host())?;
        let options = Options {
            mode: Some(mode),
            more: "[prefetch]\nenabled = false\n[background]\nenabled = false\n".to_owned(),
            supervised: true,
            ..Options::default()
        };
        let daemon = Daemon::start(&scratch, &options)?;
        let dir = scratch.fresh_dir("mounted")?;
        runtime.block_on(async {
            let client = Snapshots::connect(&daemon).await?;
            client
                .serve("layer", "", &proxy.reference("many:1"), &layer)
                .await?;
            snapshots::mount(&client.prepare("container", "layer").await?, &dir)
        })?;
        let first = daemon.serving().context("no process serves")?;
        let before = figures::memory(first, "VmRSS")?;
        figures::forget_peak(first)?;
        let mut peaks = Vec::new();
        proxy.fail_ranges("/blobs/", u64::MAX, Fault::Status(503, ""));
        let clock = Instant::now();
        std::thread::scope(|scope| -> Result<()> {
            let readers = (0..READERS).map(|file| {
                let dir = &dir;
                let read = move || read_one(dir, file);
                // As small as threads can be.
                std::thread::Builder::new()
                    .stack_size(128 << 10)
                    .spawn_scoped(scope, read)
            });
            let readers: Vec<_> = readers.collect::<Result<_, _>>()?;
            wait_for("all readers to wait", || {
                let waiting = reading_threads()? as u64;
                ensure!(
                    readers.iter().all(|reader| !reader.is_finished()),
                    "one is done"
                );
                Ok((waiting >= READERS).then_some(()))
            })?;
            peaks.push(figures::memory(first, "VmHWM")?);
            signal(first, Signal::KILL)?;
            let next = daemon.wait_until_ready(first)?;
            proxy.heal();
            for reader in readers {
                reader
                    .join()
                    .expect("a reader panicked")
                    .with_context(|| daemon.log())?;
            }
            peaks.push(figures::memory(next, "VmHWM")?);
            Ok(())
        })?;
        let peak = peaks.into_iter().max().unwrap_or_default();
        println!(
            "{}: {READERS} readers answered in {:.1?}; the daemon took {} MiB, at most {} MiB",
            mode.name(),
            clock.elapsed(),
            before >> 20,
            peak >> 20
        );
        ensure!(
            peak <= before + BUDGET + OVERHEAD,
            "{peak} bytes, after {before}"
        );
        rustix::mount::unmount(&dir, rustix::mount::UnmountFlags::empty())?;
        daemon.stop()?;
    }
    Ok(())
}

fn read_one(dir: &Path, file: u64) -> Result<()> {
    let path = dir.join(file.to_string());
    let failed = || format!("reading {}", path.display());
    let mut read = vec![0; FILE as usize];
    let open = File::open(&path).with_context(failed)?;
    open.read_exact_at(&mut read, 0).with_context(failed)?;
    ensure!(read == noise(file, FILE)?, "{} is wrong", path.display());
    Ok(())
}

/// Threads of this process that are in pread(2).
fn reading_threads() -> Result<usize> {
    let call = format!("{} ", libc::SYS_pread64);
    let mut count = 0;
    for thread in fs::read_dir("/proc/self/task")? {
        let now = fs::read_to_string(thread?.path().join("syscall"));
        count += usize::from(now.is_ok_and(|now| now.starts_with(&call)));
    }
    Ok(count)
}

/// Snapshots that are prepared to measure what one costs.
const MEASURED: usize = 25;
/// What is measured in between: the database's own upkeep comes in bursts.
const ROUNDS: usize = 4;

/// The cost is what the daemon reads and writes: system calls and bytes.
#[test]
fn a_snapshot_among_ten_thousand_costs_what_it_costs_among_a_hundred() -> Result<()> {
    let scratch = Scratch::new()?;
    let daemon = Daemon::start(&scratch, &Options::default())?;
    let process = daemon.process().pid();
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let client = Snapshots::connect(&daemon).await?;
        client.prepare("base", "").await?;
        client.commit("parent", "base").await?;
        let few = cost_among(&client, process, 0..100).await?;
        let many = cost_among(&client, process, 100..10_000).await?;
        println!("among 100: {few:?}; among 10,000: {many:?}");
        ensure!(many.calls <= 2 * few.calls, "calls: {many:?}, not {few:?}");
        ensure!(many.bytes <= 2 * few.bytes, "bytes: {many:?}, not {few:?}");
        Ok(())
    })
}

/// Makes snapshots, and tells what the least costly round of further ones took.
async fn cost_among(
    client: &Snapshots,
    process: u32,
    numbers: std::ops::Range<usize>,
) -> Result<Work> {
    client.prepare_many("parent", numbers).await?;
    let mut least: Option<Work> = None;
    for round in 0..ROUNDS {
        let before = Work::of(process)?;
        for number in 0..MEASURED {
            client
                .prepare(&format!("measured-{round}-{number}"), "parent")
                .await?;
        }
        let work = Work::of(process)?.since(before);
        least = Some(
            least
                .filter(|least| least.calls <= work.calls)
                .unwrap_or(work),
        );
        for number in 0..MEASURED {
            client.remove(&format!("measured-{round}-{number}")).await?;
        }
    }
    least.context("no round was measured")
}

/// A daemon that may open few files serves as many layers as it can, says what
/// is wrong with one more, and keeps on serving the others.
#[test]
fn at_the_limit_of_descriptors_the_next_layer_is_refused_and_all_others_work() -> Result<()> {
    const LAYERS: usize = 40;
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let layout = scratch.dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    for layer in 0..LAYERS as u64 {
        writer.layer(Compression::None, |to| {
            let mut tar = Tarball::new(to);
            tar.file(&layer.to_string(), &Meta::mode(0o644), &noise(layer, FILE)?)?;
            tar.finish()
        })?;
    }
    writer.finish(image::TAG, &[])?;
    let reference = registry.reference("layers:1");
    image::convert(&layout, &reference, &[])?;
    let layers = registry.manifest(&reference)?.layers;
    // The soft limit alone would not even do for the first.
    let options = Options {
        descriptors: Some((64, 144)),
        more: "[fetch]\nconnections = 16\n[prefetch]\nenabled = false\n[background]\nenabled = false\n".to_owned(),
        ..Options::default()
    };
    let daemon = Daemon::start(&scratch, &options)?;
    let process = daemon.process().pid();
    let on_disk = || -> Result<usize> { Ok(fs::read_dir(daemon.root().join("layers"))?.count()) };
    tokio::runtime::Runtime::new()?.block_on(async {
        let client = Snapshots::connect(&daemon).await?;
        let mut served = 0;
        let mut opened = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            let name = format!("layer-{number}");
            match client.serve(&name, "", &reference, layer).await {
                Ok(()) => served = number + 1,
                Err(_) => break,
            }
            opened.push(figures::descriptors(process)?);
            let dir = scratch.dir(&name)?;
            snapshots::mount(
                &client.prepare(&format!("use-{number}"), &name).await?,
                &dir,
            )?;
        }
        println!("{served} layers; descriptors: {opened:?}");
        ensure!(served > 16 && served < LAYERS, "{served} layers are served");
        // Not more than one for each.
        let (first, last) = (opened[0], opened[served - 1]);
        ensure!(last - first < served + 8, "{opened:?}");
        let log = daemon.log();
        let refused = layers[served].digest.to_string();
        let said = log
            .lines()
            .find(|line| line.contains(&refused))
            .context("no word of it")?;
        ensure!(said.contains("limit of 144 file descriptors"), "{said}");
        ensure!(
            on_disk()? == served,
            "what is not served stays: {}",
            on_disk()?
        );
        // Those that are served are fetched, while there is no room.
        for number in 0..served as u64 {
            let dir = scratch.dir(&format!("layer-{number}"))?;
            read_one(&dir, number)?;
        }
        // And what goes makes room.
        let dir = scratch.dir("layer-0")?;
        rustix::mount::unmount(&dir, rustix::mount::UnmountFlags::empty())?;
        client.remove("use-0").await?;
        client.remove("layer-0").await?;
        client
            .serve("again", "", &reference, &layers[served])
            .await?;
        ensure!(on_disk()? == served, "{} layers are there", on_disk()?);
        Ok(())
    })
}
