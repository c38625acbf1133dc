//! `make bench-fetching`: what the fetch engine makes of a link, and what
//! recording costs.
//!
//! As root, on a machine that does nothing else. A table goes to standard
//! error, JSON to standard output.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use sluice_benches::median;
use sluice_benches::rig::front::Protocol;
use sluice_benches::rig::link::Shape;
use sluice_benches::rig::node::{NO_DOWNLOAD, Node, SLUICE, UNSHAPED, processor_seconds};
use sluice_benches::rig::workloads::{ALL, Workload};
use sluice_layer::Profile;
use sluice_oci::{Descriptor, Digest};
use sluice_tests::command::{run, text, wait_for};
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Noise, Tarball};
use sluice_tests::programs;

/// Snapshotter of the daemon that downloads in the background at once.
const DOWNLOADING: &str = "sluice-downloading";
const AT_ONCE: &str = "[background]\ndelay_seconds = 0\n";

/// Streams, downloads, many starts at once, and the cost of recording.
///
/// All of it takes about a quarter of an hour.
#[derive(Debug, Parser)]
struct Arguments {
    /// What to measure; all if not given
    #[arg(value_enum)]
    what: Vec<What>,
    /// Rounds; medians are told
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Bandwidth of the streams, in Mbit/s
    #[arg(long, default_value_t = 1000)]
    stream_mbit: u64,
    /// Round trips of the streams, in milliseconds
    #[arg(long, value_delimiter = ',', default_values_t = [0, 20, 100])]
    stream_round_trip_ms: Vec<u64>,
    /// Bytes of each of the 100,000 files that are downloaded
    #[arg(long, default_value_t = 2000)]
    file_size: u64,
    /// Containers that are started at once
    #[arg(long, default_value_t = 100)]
    starts: usize,
    /// The program that they run, one of the cold-start rig's
    #[arg(long, default_value = "python")]
    workload: String,
    /// The layer format: estargz or zstd-chunked
    #[arg(long, default_value = "zstd-chunked")]
    format: String,
    /// Arguments for `sluice convert`, such as --chunk-size=65536
    #[arg(long, allow_hyphen_values = true)]
    convert: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// A container reads a file of 1 GiB, against one curl of its blob
    Stream,
    /// The background download of a layer of 100,000 files, at 100 Mbit/s and
    /// 30 ms, against one curl of its blob
    Download,
    /// Bytes of many starts of one image at once, against those of one
    AtOnce,
    /// Warm reads while they are recorded, against such that are not
    Recording,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.rounds > 0, "--rounds 0 measures nothing");
    let daemons = [(SLUICE, NO_DOWNLOAD), (DOWNLOADING, AT_ONCE)];
    let mut bench = Bench {
        node: Node::start_with(&daemons, Protocol::Http)?,
        arguments: &arguments,
    };
    let mut report = serde_json::Map::new();
    for what in What::value_variants() {
        if !arguments.what.is_empty() && !arguments.what.contains(what) {
            continue;
        }
        let (name, found) = match what {
            What::Stream => ("stream", bench.stream()?),
            What::Download => ("download", bench.download()?),
            What::AtOnce => ("at_once", bench.at_once()?),
            What::Recording => ("recording", bench.recording()?),
        };
        report.insert(name.to_owned(), found);
        bench.node.forget()?;
    }
    println!("{:#}", Value::Object(report));
    Ok(())
}

struct Bench<'a> {
    node: Node,
    arguments: &'a Arguments,
}

impl Bench<'_> {
    /// Seconds that a container reads, and that curl takes.
    fn stream(&mut self) -> Result<Value> {
        const IMAGE: &str = "model:lazy";
        let workload = workload("model")?;
        self.convert(&workload.make_image()?.source(), IMAGE)?;
        let layer = self.last_layer(IMAGE)?;
        let mut found = Vec::new();
        for &round_trip_ms in &self.arguments.stream_round_trip_ms {
            let shape = Shape {
                mbit: self.arguments.stream_mbit,
                round_trip_ms,
            };
            let (mut curl, mut container) = (Vec::new(), Vec::new());
            for _ in 0..self.arguments.rounds {
                curl.push(self.curl(IMAGE, layer.digest, shape)?);
                self.start_from_nothing(IMAGE)?;
                let start = self
                    .node
                    .pull_and_start(IMAGE, SLUICE, workload.program, shape)?;
                container.push(start.phases.ready - start.phases.started);
            }
            let (curl, container) = (median(&mut curl), median(&mut container));
            let (ratio, mbytes) = (curl / container, layer.size as f64 / 1e6);
            eprintln!(
                "stream, {:>4} Mbit/s {round_trip_ms:>3} ms: {ratio:.2} of curl ({:.1} MB/s, curl \
                 {:.1})",
                shape.mbit,
                mbytes / container,
                mbytes / curl
            );
            found.push(json!({
                "shape": shape,
                "container_seconds": container,
                "curl_seconds": curl,
                "of_curl": ratio,
            }));
        }
        Ok(json!(found))
    }

    /// Seconds of a layer's background download, and that curl takes.
    fn download(&mut self) -> Result<Value> {
        const IMAGE: &str = "many:lazy";
        let shape = Shape {
            mbit: 100,
            round_trip_ms: 30,
        };
        let layout = self.node.scratch.path().join("many");
        self.write_many(&layout)?;
        self.convert(&format!("oci:{}", layout.display()), IMAGE)?;
        fs::remove_dir_all(&layout)?;
        let layer = self.last_layer(IMAGE)?;
        let (mut curl, mut download, mut link) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..self.arguments.rounds {
            let seconds = self.curl(IMAGE, layer.digest, shape)?;
            curl.push(layer.size as f64 / seconds);
            self.node.forget()?;
            self.node.restart(DOWNLOADING)?;
            self.node.link.reset(shape);
            let clock = Instant::now();
            let reference = self.node.reference(IMAGE);
            self.node.containerd.lazy_pull(&reference, DOWNLOADING)?;
            // It begins with the first use of the layer.
            let mounted = self.node.containerd.mount(&reference, DOWNLOADING)?;
            wait_for("the background download", || {
                let layers = self.status(DOWNLOADING, "layers")?;
                let chunks = |key: &str| layers[0][key].as_u64();
                let complete = chunks("present_chunks") == chunks("chunks");
                Ok((complete && chunks("chunks") > Some(0)).then_some(()))
            })?;
            let end = clock.elapsed().as_secs_f64();
            self.node.containerd.unmount(&mounted)?;
            // What came first is the table of contents.
            let transfers = self.node.link.transfers();
            let name = layer.digest.to_string();
            let of_layer = transfers.iter().filter(|t| t.request.ends_with(&name));
            let downloads: Vec<_> = of_layer.skip(1).collect();
            let first = downloads.first().context("nothing was downloaded")?;
            let bytes: u64 = downloads.iter().map(|transfer| transfer.bytes).sum();
            let rate = bytes as f64 / (end - first.sent);
            download.push(rate);
            link.push(rate / shape.bytes_per_second());
        }
        let (curl, download) = (median(&mut curl), median(&mut download));
        let (ratio, link) = (download / curl, median(&mut link));
        eprintln!(
            "download of 100,000 files ({:.0} MB), 100 Mbit/s 30 ms: {ratio:.2} of curl, {link:.2} \
             of the link ({:.1} MB/s)",
            layer.size as f64 / 1e6,
            download / 1e6
        );
        Ok(json!({
            "shape": shape,
            "blob_bytes": layer.size,
            "bytes_per_second": download,
            "of_curl": ratio,
            "of_link": link,
        }))
    }

    fn write_many(&self, layout: &Path) -> Result<()> {
        const FILES: u64 = 100_000;
        let mut writer = LayoutWriter::new(layout)?;
        let size = self.arguments.file_size;
        writer.layer(Compression::None, |to| {
            let mut tar = Tarball::new(to);
            for index in 0..FILES {
                if index % 100 == 0 {
                    tar.dir(&format!("d{:04}", index / 100), &Meta::mode(0o755))?;
                }
                let name = format!("d{:04}/file-{index:06}", index / 100);
                let mut content = Noise(index << 32).take(size);
                tar.file_from(&name, &Meta::mode(0o644), size, &mut content)?;
            }
            tar.finish()
        })?;
        writer.finish(image::TAG, &[])
    }

    /// Bytes of one start, and of many at once, to their ends.
    fn at_once(&mut self) -> Result<Value> {
        const IMAGE: &str = "at-once:lazy";
        let shape = Shape {
            mbit: 100,
            round_trip_ms: 20,
        };
        let workload = workload(&self.arguments.workload)?;
        self.convert(&workload.make_image()?.source(), IMAGE)?;
        let (mut one, mut many) = (Vec::new(), Vec::new());
        let mut seconds = Vec::new();
        for _ in 0..self.arguments.rounds {
            one.push(self.bytes_of_starts(IMAGE, workload, shape, 1)?.0 as f64);
            let (bytes, took) =
                self.bytes_of_starts(IMAGE, workload, shape, self.arguments.starts)?;
            many.push(bytes as f64);
            seconds.push(took);
        }
        let (one, many) = (median(&mut one), median(&mut many));
        let (ratio, seconds) = (many / one, median(&mut seconds));
        eprintln!(
            "{} starts of '{}' at once: {ratio:.3} of the bytes of one ({:.2} MB, {:.2} MB), all \
             done after {seconds:.1} s",
            self.arguments.starts,
            workload.name,
            many / 1e6,
            one / 1e6
        );
        Ok(json!({
            "shape": shape,
            "workload": workload.name,
            "starts": self.arguments.starts,
            "bytes_of_one": one,
            "bytes_of_all": many,
            "of_one": ratio,
            "seconds": seconds,
        }))
    }

    fn bytes_of_starts(
        &mut self,
        image: &str,
        workload: &Workload,
        shape: Shape,
        starts: usize,
    ) -> Result<(u64, f64)> {
        self.start_from_nothing(image)?;
        self.node.restart(SLUICE)?;
        self.node.link.reset(shape);
        let reference = self.node.reference(image);
        self.node.containerd.lazy_pull(&reference, SLUICE)?;
        let clock = Instant::now();
        let start = |number| {
            let id = format!("at-once-{number}");
            let containerd = &self.node.containerd;
            let mut command = containerd.run_command(SLUICE, &reference, &id, workload.program);
            command.stdin(Stdio::null()).stdout(Stdio::null());
            Ok(command.stderr(Stdio::piped()).spawn()?)
        };
        let running: Vec<_> = (0..starts).map(start).collect::<Result<_>>()?;
        for container in running {
            let output = container.wait_with_output()?;
            ensure!(
                output.status.success(),
                "a container ended with {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok((self.node.link.bytes(), clock.elapsed().as_secs_f64()))
    }

    /// Seconds to read a file that is on the node, but not in the kernel's
    /// memory, while it is recorded and while it is not.
    fn recording(&self) -> Result<Value> {
        const IMAGE: &str = "recording:lazy";
        self.convert(&workload("model")?.make_image()?.source(), IMAGE)?;
        self.start_from_nothing(IMAGE)?;
        self.node.link.reset(UNSHAPED);
        let containerd = &self.node.containerd;
        let reference = self.node.reference(IMAGE);
        containerd.lazy_pull(&reference, SLUICE)?;
        let mounted = containerd.mount(&reference, SLUICE)?;
        let model = File::open(mounted.join("model"))?;
        // All of it comes to the node.
        self.read_through(&model)?;
        let (mut off, mut on) = (Vec::new(), Vec::new());
        let (mut off_cpu, mut on_cpu) = (Vec::new(), Vec::new());
        // Differences are small, and rounds are short.
        for _ in 0..self.arguments.rounds * 5 {
            let (seconds, cpu) = self.read_through(&model)?;
            off.push(seconds);
            off_cpu.push(cpu);
            let (seconds, cpu) = self.recorded(IMAGE, || self.read_through(&model))?;
            on.push(seconds);
            on_cpu.push(cpu);
        }
        drop(model);
        containerd.unmount(&mounted)?;
        let (off, on) = (median(&mut off), median(&mut on));
        let (off_cpu, on_cpu) = (median(&mut off_cpu), median(&mut on_cpu));
        eprintln!(
            "recording: {:+.2} % seconds to read 1 GiB ({on:.3} s, {off:.3} s without), {:+.2} % \
             of the daemon's processor time ({on_cpu:.2} s, {off_cpu:.2} s)",
            (on / off - 1.0) * 100.0,
            (on_cpu / off_cpu - 1.0) * 100.0
        );
        Ok(json!({
            "seconds_recorded": on,
            "seconds": off,
            "daemon_seconds_recorded": on_cpu,
            "daemon_seconds": off_cpu,
            "cost": on / off - 1.0,
        }))
    }

    /// Does something while a container of the image, which does nothing
    /// itself, is being recorded.
    fn recorded<T>(&self, image: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let file = self.node.scratch.path().join("recorded.json");
        let mut record = self.node.record_command(SLUICE, image, &file)?;
        record.args(["sleep", "3600"]);
        let recording = record
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let containerd = &self.node.containerd;
        let task = wait_for("the recorded container", || {
            let tasks = containerd.ctr_text(&["tasks", "list"])?;
            let running = tasks.lines().find(|line| line.contains("RUNNING"));
            Ok(running.and_then(|line| Some(line.split_whitespace().next()?.to_owned())))
        })?;
        let done = work();
        containerd.ctr_text(&["tasks", "kill", "--signal", "SIGKILL", &task])?;
        let output = recording.wait_with_output()?;
        ensure!(
            output.status.success(),
            "recording ended with {}",
            output.status
        );
        let profile = Profile::parse(&fs::read(&file)?)?;
        let read: u64 = profile.reads().iter().map(|read| read.len).sum();
        ensure!(
            read >= 512 << 20,
            "{read} bytes were recorded, so most of what was read did not come to the daemon"
        );
        done
    }

    /// Reads a file past what the kernel still had of it: seconds, and those
    /// of the daemon's processor time.
    fn read_through(&self, file: &File) -> Result<(f64, f64)> {
        let daemon = self.node.daemon(SLUICE).context("no daemon")?;
        let process = daemon.serving().context("the daemon does not serve")?;
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?;
        let cpu = processor_seconds(process)?;
        let clock = Instant::now();
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        loop {
            let count = std::os::unix::fs::FileExt::read_at(file, &mut buffer, at)?;
            if count == 0 {
                break;
            }
            at += count as u64;
        }
        Ok((
            clock.elapsed().as_secs_f64(),
            processor_seconds(process)? - cpu,
        ))
    }

    /// Nothing is known of the image, no profile either.
    fn start_from_nothing(&self, image: &str) -> Result<()> {
        self.node.forget()?;
        self.node.set_profile(image, None)
    }

    /// Seconds of one GET of a blob.
    fn curl(&self, image: &str, blob: Digest, shape: Shape) -> Result<f64> {
        let (repository, _) = image.split_once(':').unwrap_or((image, ""));
        let url = format!(
            "http://{}/v2/{repository}/blobs/{blob}",
            self.node.link.host()
        );
        self.node.link.reset(shape);
        let clock = Instant::now();
        run(Command::new("curl")
            .args([
                "--silent",
                "--show-error",
                "--fail",
                "--output",
                "/dev/null",
            ])
            .arg(url))?;
        Ok(clock.elapsed().as_secs_f64())
    }

    fn convert(&self, source: &str, name: &str) -> Result<()> {
        let arguments = self.arguments;
        self.node
            .convert(source, name, &arguments.format, &arguments.convert)
    }

    fn last_layer(&self, image: &str) -> Result<Descriptor> {
        let registry = &self.node.registry;
        let mut manifest = registry.manifest(&registry.reference(image))?;
        manifest.layers.pop().context("no layer")
    }

    /// A part of what `sluice status` tells of a daemon.
    fn status(&self, snapshotter: &str, part: &str) -> Result<Value> {
        let daemon = self.node.daemon(snapshotter).context("no such daemon")?;
        let mut status = programs::sluice_command()?;
        status
            .args(["status", "--json", "--address"])
            .arg(daemon.socket());
        let mut view: Value = serde_json::from_str(&text(&mut status)?)?;
        Ok(view[part].take())
    }
}

fn workload(name: &str) -> Result<&'static Workload> {
    let found = ALL.iter().find(|workload| workload.name == name);
    found.with_context(|| format!("the rig has no workload '{name}'"))
}
