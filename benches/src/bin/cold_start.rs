//! `make bench-cold-start`: how long programs of different kinds take from
//! the start of the pull until they are ready, over links of chosen bandwidth
//! and latency, against what link and processor allow.
//!
//! As root, on a machine that does nothing else. Tables go to standard error;
//! JSON and pictures to `target/cold-start`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use serde::Serialize;
use sluice_benches::median;
use sluice_benches::rig::chart::{Bar, Group, Waterfall, comparison, waterfall};
use sluice_benches::rig::front::Protocol;
use sluice_benches::rig::limit::{Need, Tables};
use sluice_benches::rig::link::Shape;
use sluice_benches::rig::node::{Node, SLUICE, Start, UNSHAPED};
use sluice_benches::rig::reads::{Read, reads, seconds_waited};
use sluice_benches::rig::workloads::{ALL, Way, Workload};
use sluice_layer::Profile;
use sluice_tests::command::run;
use sluice_tests::{image, programs};

/// Cold starts.
///
/// All of it, at two bandwidths and three round trips, is 972 starts and takes
/// about three hours; --mbit 100 --round-trip-ms 20 --rounds 1 takes half an
/// hour, of which the model takes half. The images are made once, in ten
/// minutes, and kept.
#[derive(Debug, Parser)]
struct Arguments {
    /// Programs, by name; all if not given: true, python, scientific, misfit
    /// (/bin/true where the profile is scientific's), node, java, gcc,
    /// postgresql, model
    #[arg(long, value_delimiter = ',')]
    workloads: Vec<String>,
    /// Ways to start, by name; all if not given: ordinary, lazy, recorded,
    /// attached, with-data, built-in
    #[arg(long, value_delimiter = ',')]
    ways: Vec<String>,
    /// Bandwidths, in Mbit/s
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1000])]
    mbit: Vec<u64>,
    /// Round trips, in milliseconds
    #[arg(long, value_delimiter = ',', default_values_t = [0, 20, 100])]
    round_trip_ms: Vec<u64>,
    /// Starts of each kind; the median is told
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// The layer format: estargz or zstd-chunked
    #[arg(long, default_value = "zstd-chunked")]
    format: String,
    /// What the registry speaks: with TLS, waterfalls stay empty
    #[arg(long, value_enum, default_value = "http")]
    protocol: Protocol,
    /// Arguments for `sluice convert`, such as --chunk-size=65536
    #[arg(long, allow_hyphen_values = true)]
    convert: Vec<String>,
    /// Only makes the images, which are kept
    #[arg(long)]
    images_only: bool,
}

/// Beyond so many bytes an artifact is compressed faster than it is by itself,
/// or a GiB of noise would take many minutes.
const LARGE: u64 = 256 << 20;

/// The median start of one kind, and how it compares.
#[derive(Debug, Serialize)]
struct Figure {
    workload: &'static str,
    way: &'static str,
    shape: Shape,
    /// Seconds that no start can be faster.
    limit: f64,
    /// What the limit is made of: bytes that have to be fetched, and seconds
    /// when everything is on the node.
    needed_bytes: u64,
    local: f64,
    /// Seconds of a pull and a start for which nothing has to be fetched, and
    /// over no link: what is beyond `local` is no matter of the link.
    pulled_again: f64,
    /// Seconds to ready over the limit.
    ratio: f64,
    /// Seconds to ready over those of the lazy start without a profile.
    of_lazy: Option<f64>,
    /// Shortest and longest of the rounds, in seconds.
    range: (f64, f64),
    /// Seconds until ready in which at least one reader's bytes were missing,
    /// as far as ranges of the layers brought them.
    waited: Option<f64>,
    #[serde(flatten)]
    start: Start,
}

/// A workload with its images, and what it needs.
struct Prepared {
    workload: Workload,
    ordinary: String,
    lazy: String,
    built_in: Option<String>,
    /// In the node's registry, for each of the above that is lazy.
    tables: Tables,
    built_in_tables: Option<Tables>,
    need: Need,
    pulled_again: f64,
    profile: PathBuf,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let workloads = chosen(&arguments.workloads, ALL, |workload| workload.name)?;
    let ways = chosen(&arguments.ways, &Way::ALL, |way| way.name())?;
    for workload in &workloads {
        eprintln!("image of '{}' ({})", workload.name, workload.about);
        workload.make_image()?;
    }
    if arguments.images_only {
        return Ok(());
    }
    let out = programs::target_dir().join("cold-start");
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let mut rig = Rig {
        node: Node::start(arguments.protocol)?,
        arguments: &arguments,
        out,
    };
    let mut figures = Vec::new();
    for workload in &workloads {
        rig.measure(workload, &ways, &mut figures)?;
    }
    rig.draw(&workloads, &figures)
}

/// Those that were named, in their own order: what comes later may leave
/// something in the registry that comes earlier must not find.
fn chosen<T: Copy>(names: &[String], all: &[T], name: impl Fn(&T) -> &str) -> Result<Vec<T>> {
    let known: Vec<&str> = all.iter().map(&name).collect();
    for wanted in names {
        ensure!(
            known.contains(&wanted.as_str()),
            "'{wanted}' is none of {}",
            known.join(", ")
        );
    }
    let is_chosen = |one: &&T| names.is_empty() || names.iter().any(|n| n == name(one));
    Ok(all.iter().filter(is_chosen).copied().collect())
}

struct Rig<'a> {
    node: Node,
    arguments: &'a Arguments,
    out: PathBuf,
}

impl Rig<'_> {
    fn measure(
        &mut self,
        workload: &Workload,
        ways: &[Way],
        figures: &mut Vec<Figure>,
    ) -> Result<()> {
        let prepared = self.prepare(workload, ways.contains(&Way::BuiltIn))?;
        eprintln!(
            "{}: needs {:.1} MB, {:.2} s when local, {:.2} s pulled again",
            workload.name,
            prepared.need.bytes as f64 / 1e6,
            prepared.need.local,
            prepared.pulled_again
        );
        for &way in ways {
            self.attach(way, &prepared)?;
            for &mbit in &self.arguments.mbit {
                for &round_trip_ms in &self.arguments.round_trip_ms {
                    let shape = Shape {
                        mbit,
                        round_trip_ms,
                    };
                    let starts = self.starts(&prepared, way, shape)?;
                    let figure = self.figure(&prepared, way, shape, starts, figures)?;
                    eprintln!("{}", line(&figure));
                    figures.push(figure);
                    // Whatever stops it later, this is kept.
                    self.save(figures)?;
                }
            }
        }
        self.node.forget()
    }

    /// Makes the images and the profile, and finds out what a start needs at
    /// least: it is recorded once, and run with everything on the node.
    fn prepare(&mut self, workload: &Workload, built_in: bool) -> Result<Prepared> {
        let image = workload.make_image()?;
        let (ordinary, lazy) = (
            format!("{}:ordinary", workload.image),
            format!("{}:lazy", workload.name),
        );
        let registry = &self.node.registry;
        registry.push(image.layout(), image::TAG, &ordinary)?;
        self.convert(&image.source(), &lazy, &[])?;
        let tables = Tables::read(&self.node.registry, &lazy)?;
        let record = |program, name| -> Result<(PathBuf, Profile)> {
            let file = self.out.join(format!("{}.{name}.json", workload.name));
            self.node.forget()?;
            self.node.record(&lazy, program, &file)?;
            let recorded = Profile::parse(&fs::read(&file)?)?;
            Ok((file, recorded))
        };
        let (mut profile, own) = record(workload.program, "profile")?;
        if let Some(other) = workload.profiled {
            profile = record(other, "other-profile")?.0;
        }
        let built_in = built_in.then(|| format!("{}:built-in", workload.name));
        let mut built_in_tables = None;
        if let Some(name) = &built_in {
            let file = profile.display().to_string();
            self.convert(&image.source(), name, &["--profile", &file])?;
            built_in_tables = Some(Tables::read(&self.node.registry, name)?);
        }
        Ok(Prepared {
            need: Need {
                bytes: tables.needed_bytes(&own)?,
                local: self.local(&ordinary, workload.program)?,
            },
            pulled_again: self.pulled_again(&lazy, workload.program)?,
            workload: *workload,
            ordinary,
            lazy,
            built_in,
            tables,
            built_in_tables,
            profile,
        })
    }

    /// Seconds from a pull to a ready program, when everything that it reads is
    /// on the node.
    fn pulled_again(&mut self, lazy: &str, program: &[&str]) -> Result<f64> {
        self.node.forget()?;
        self.node.set_profile(lazy, None)?;
        self.node.pull_and_start(lazy, SLUICE, program, UNSHAPED)?;
        let again = |_| self.node.pull_and_start_again(lazy, SLUICE, program);
        let rounds = 0..self.arguments.rounds.max(3);
        let mut again: Vec<f64> = rounds.map(again).collect::<Result<_>>()?;
        Ok(median(&mut again))
    }

    /// Seconds that a program takes when everything is on the node.
    fn local(&mut self, ordinary: &str, program: &[&str]) -> Result<f64> {
        self.node.forget()?;
        self.node
            .pull_and_start(ordinary, "overlayfs", program, UNSHAPED)?;
        let mut local = Vec::new();
        for _ in 0..self.arguments.rounds.max(3) {
            local.push(self.node.start_again(ordinary, "overlayfs", program)?);
        }
        Ok(median(&mut local))
    }

    /// Puts the profile into the registry, where this way looks for it there.
    fn attach(&mut self, way: Way, prepared: &Prepared) -> Result<()> {
        if !matches!(way, Way::Attached | Way::WithData) {
            return Ok(());
        }
        let mut push = programs::sluice_command()?;
        push.args(["profile", "push", "--plain-http", "--profile"])
            .arg(&prepared.profile);
        if way == Way::WithData {
            push.arg("--with-data");
            if prepared.need.bytes > LARGE {
                push.args(["--level", "3"]);
            }
        }
        run(push.arg(self.node.registry.reference(&prepared.lazy)))?;
        // What is there would have to be made durable first.
        self.node.forget()?;
        self.node.restart(SLUICE)
    }

    /// Starts of one kind, each with what it read.
    fn starts(
        &mut self,
        prepared: &Prepared,
        way: Way,
        shape: Shape,
    ) -> Result<Vec<(Start, Vec<Read>)>> {
        let program = prepared.workload.program;
        let (image, tables, snapshotter) = match way {
            Way::Ordinary => (&prepared.ordinary, None, "overlayfs"),
            Way::BuiltIn => {
                let name = prepared.built_in.as_ref();
                let name = name.context("the image was not built")?;
                (name, prepared.built_in_tables.as_ref(), SLUICE)
            }
            _ => (&prepared.lazy, Some(&prepared.tables), SLUICE),
        };
        let mut start = || -> Result<(Start, Vec<Read>)> {
            self.node.forget()?;
            let known = (way == Way::Recorded).then_some(prepared.profile.as_path());
            self.node.set_profile(image, known)?;
            let start = self
                .node
                .pull_and_start(image, snapshotter, program, shape)?;
            let (Some(tables), Some(recording)) = (tables, self.node.take_recording(image)?) else {
                return Ok((start, Vec::new()));
            };
            let mut reads = reads(tables, &recording, start.prepared, &start.transfers)?;
            // What comes after is not what the start waits for.
            reads.retain(|read| read.at <= start.phases.ready);
            Ok((start, reads))
        };
        (0..self.arguments.rounds).map(|_| start()).collect()
    }

    fn figure(
        &self,
        prepared: &Prepared,
        way: Way,
        shape: Shape,
        mut starts: Vec<(Start, Vec<Read>)>,
        former: &[Figure],
    ) -> Result<Figure> {
        ensure!(!starts.is_empty(), "--rounds 0 measures nothing");
        let ready = |(start, _): &(Start, Vec<Read>)| start.phases.ready;
        starts.sort_by(|a, b| ready(a).total_cmp(&ready(b)));
        let range = (ready(&starts[0]), ready(&starts[starts.len() - 1]));
        let (start, reads) = starts.swap_remove(starts.len() / 2);
        let workload = &prepared.workload;
        let name = format!(
            "{}-{}-{}mbit-{}ms",
            workload.name,
            way.name(),
            shape.mbit,
            shape.round_trip_ms
        );
        let picture = waterfall(&Waterfall {
            title: format!("{name}: {}", workload.about),
            shape,
            phases: start.phases,
            transfers: &start.transfers,
            reads: &reads,
        });
        fs::write(self.out.join(format!("{name}.svg")), picture)?;
        // The numbers behind the picture.
        let transfers = serde_json::to_string_pretty(&start.transfers)? + "\n";
        fs::write(self.out.join(format!("{name}.json")), transfers)?;
        let need = prepared.need;
        let limit = need.limit(shape);
        let lazy = former.iter().find(|other| {
            (other.workload, other.way, other.shape) == (workload.name, Way::Lazy.name(), shape)
        });
        Ok(Figure {
            workload: workload.name,
            way: way.name(),
            shape,
            limit,
            needed_bytes: need.bytes,
            local: need.local,
            pulled_again: prepared.pulled_again,
            ratio: start.phases.ready / limit,
            of_lazy: lazy.map(|lazy| start.phases.ready / lazy.start.phases.ready),
            range,
            waited: (!reads.is_empty()).then(|| seconds_waited(&reads)),
            start,
        })
    }

    fn convert(&self, source: &str, name: &str, more: &[&str]) -> Result<()> {
        let more = more.iter().map(|&argument| argument.to_owned());
        let more: Vec<String> = self.arguments.convert.iter().cloned().chain(more).collect();
        let format = &self.arguments.format;
        self.node.convert(source, name, format, &more)
    }

    fn save(&self, figures: &[Figure]) -> Result<()> {
        let file = self.out.join("cold-start.json");
        let json = serde_json::to_string_pretty(figures)? + "\n";
        fs::write(&file, json).with_context(|| format!("cannot write {}", file.display()))
    }

    /// One picture a link.
    fn draw(&self, workloads: &[Workload], figures: &[Figure]) -> Result<()> {
        for &mbit in &self.arguments.mbit {
            for &round_trip_ms in &self.arguments.round_trip_ms {
                let shape = Shape {
                    mbit,
                    round_trip_ms,
                };
                let of_link = || figures.iter().filter(|figure| figure.shape == shape);
                let group = |workload: &Workload| Group {
                    title: workload.about.to_owned(),
                    limit: of_link()
                        .find(|figure| figure.workload == workload.name)
                        .map_or(0.0, |figure| figure.limit),
                    bars: of_link()
                        .filter(|figure| figure.workload == workload.name)
                        .map(bar)
                        .collect(),
                };
                let groups: Vec<Group> = workloads.iter().map(group).collect();
                let title = format!("Cold starts over {mbit} Mbit/s, {round_trip_ms} ms");
                let file = format!("cold-start-{mbit}mbit-{round_trip_ms}ms.svg");
                fs::write(self.out.join(file), comparison(&title, &groups))?;
            }
        }
        if figures.is_empty() {
            bail!("nothing was measured");
        }
        eprintln!("Figures and pictures are in {}.", self.out.display());
        Ok(())
    }
}

fn bar(figure: &Figure) -> Bar {
    Bar {
        label: figure.way.to_owned(),
        phases: figure.start.phases,
        note: format!(
            "{:.2} s, {:.2} of the limit, {:.1} MB, {} requests",
            figure.start.phases.ready,
            figure.ratio,
            figure.start.bytes as f64 / 1e6,
            figure.start.requests
        ),
    }
}

fn line(figure: &Figure) -> String {
    let start = &figure.start;
    let of_lazy = figure.of_lazy.map(|of| format!(", {of:.2} of lazy"));
    let waited = figure.waited.map(|s| format!(", {s:.2} s waited"));
    let processors = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
    format!(
        "{:<11} {:<9} {:>4} Mbit/s {:>3} ms: pull {:>6.2}  mount {:>6.2}  first instruction {:>6.2}  \
         ready {:>6.2} s ({:.2}-{:.2}), {:.2} of {:.2} s{}{}; {:>6.1} MB, {:>4} requests; \
         processors {:.2} s ({:.0} %), daemon {:.2} s, {:.0} MiB",
        figure.workload,
        figure.way,
        figure.shape.mbit,
        figure.shape.round_trip_ms,
        start.phases.pulled,
        start.phases.mounted,
        start.phases.started,
        start.phases.ready,
        figure.range.0,
        figure.range.1,
        figure.ratio,
        figure.limit,
        of_lazy.unwrap_or_default(),
        waited.unwrap_or_default(),
        start.bytes as f64 / 1e6,
        start.requests,
        start.busy,
        100.0 * start.busy / start.phases.ready / processors,
        start.daemon_cpu,
        start.daemon_peak_kib as f64 / 1024.0
    )
}
