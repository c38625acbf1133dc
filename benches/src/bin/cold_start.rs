//! `make bench-cold-start`: how long programs of different kinds take from
//! the start of the pull until they are ready, over links of chosen bandwidth
//! and latency, against what link and processor allow.
//!
//! As root, on a machine that does nothing else. Tables go to standard error;
//! JSON and pictures to `target/cold-start`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use serde::Serialize;
use sluice_benches::rig::chart::{Bar, Group, comparison, waterfall};
use sluice_benches::rig::limit::{Need, needed_bytes};
use sluice_benches::rig::link::Shape;
use sluice_benches::rig::node::{Node, PLAIN, PROFILED, Start, UNSHAPED};
use sluice_benches::rig::workloads::{ALL, Way, Workload};
use sluice_layer::Profile;
use sluice_tests::command::run;
use sluice_tests::{image, programs};

/// Cold starts.
#[derive(Debug, Parser)]
struct Arguments {
    /// Programs, by name; all if not given: true, python, scientific, node,
    /// java, gcc, postgresql, model
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
    /// Arguments for `sluice convert`, such as --chunk-size=65536
    #[arg(long, allow_hyphen_values = true)]
    convert: Vec<String>,
    /// Only makes the images, which are kept
    #[arg(long)]
    images_only: bool,
}

/// The median start of one kind, and how it compares.
#[derive(Debug, Serialize)]
struct Figure {
    workload: &'static str,
    way: &'static str,
    shape: Shape,
    /// Seconds that no start can be faster.
    limit: f64,
    /// Seconds to ready over the limit.
    ratio: f64,
    /// Shortest and longest of the rounds, in seconds.
    range: (f64, f64),
    #[serde(flatten)]
    start: Start,
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
        node: Node::start()?,
        arguments: &arguments,
        out,
    };
    let mut figures = Vec::new();
    for workload in &workloads {
        rig.measure(workload, &ways, &mut figures)?;
    }
    rig.draw(&workloads, &figures)
}

fn chosen<T: Copy>(names: &[String], all: &[T], name: impl Fn(&T) -> &str) -> Result<Vec<T>> {
    if names.is_empty() {
        return Ok(all.to_vec());
    }
    names
        .iter()
        .map(|wanted| {
            let found = all.iter().find(|one| name(one) == wanted);
            let known: Vec<&str> = all.iter().map(&name).collect();
            found
                .copied()
                .with_context(|| format!("'{wanted}' is none of {}", known.join(", ")))
        })
        .collect()
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
        let image = workload.make_image()?;
        let (ordinary, lazy) = (
            format!("{}:ordinary", workload.image),
            format!("{}:lazy", workload.name),
        );
        let registry = &self.node.registry;
        registry.push(image.layout(), image::TAG, &ordinary)?;
        self.convert(&image.source(), &lazy, &[])?;
        let need = self.need(workload, &ordinary, &lazy)?;
        eprintln!(
            "{}: needs {:.1} MB, {:.2} s when local",
            workload.name,
            need.bytes as f64 / 1e6,
            need.local
        );
        for &way in ways {
            let (name, snapshotter) = match way {
                Way::Ordinary => (&ordinary, "overlayfs"),
                Way::Lazy => (&lazy, PLAIN),
                Way::BuiltIn => (&self.built_in(workload, &image)?, PLAIN),
                Way::Recorded | Way::Attached | Way::WithData => (&lazy, PROFILED),
            };
            self.prepare(way, &lazy, &self.profile_file(workload))?;
            for &mbit in &self.arguments.mbit {
                for &round_trip_ms in &self.arguments.round_trip_ms {
                    let shape = Shape {
                        mbit,
                        round_trip_ms,
                    };
                    let starts = self.starts(name, snapshotter, workload, shape)?;
                    let figure = self.figure(workload, way, shape, &need, starts)?;
                    eprintln!("{}", line(&figure));
                    figures.push(figure);
                    // Whatever stops it later, this is kept.
                    self.save(figures)?;
                }
            }
        }
        self.node.forget()
    }

    fn starts(
        &self,
        image: &str,
        snapshotter: &str,
        workload: &Workload,
        shape: Shape,
    ) -> Result<Vec<Start>> {
        (0..self.arguments.rounds)
            .map(|_| {
                self.node.forget()?;
                self.node
                    .pull_and_start(image, snapshotter, workload.program, shape)
            })
            .collect()
    }

    fn figure(
        &self,
        workload: &Workload,
        way: Way,
        shape: Shape,
        need: &Need,
        mut starts: Vec<Start>,
    ) -> Result<Figure> {
        ensure!(!starts.is_empty(), "--rounds 0 measures nothing");
        starts.sort_by(|a, b| a.phases.ready.total_cmp(&b.phases.ready));
        let range = (
            starts[0].phases.ready,
            starts[starts.len() - 1].phases.ready,
        );
        let start = starts.swap_remove(starts.len() / 2);
        let name = format!(
            "{}-{}-{}mbit-{}ms",
            workload.name,
            way.name(),
            shape.mbit,
            shape.round_trip_ms
        );
        let picture = waterfall(&name, &start.phases, &start.transfers);
        fs::write(self.out.join(format!("{name}.svg")), picture)?;
        let limit = need.limit(shape);
        Ok(Figure {
            workload: workload.name,
            way: way.name(),
            shape,
            limit,
            ratio: start.phases.ready / limit,
            range,
            start,
        })
    }

    /// What the start needs at least: recorded once, and run once with
    /// everything on the node.
    fn need(&self, workload: &Workload, ordinary: &str, lazy: &str) -> Result<Need> {
        let file = self.profile_file(workload);
        self.node.link.reset(UNSHAPED);
        let mut record = programs::sluice_command()?;
        record
            .args(["profile", "record", "--plain-http", "--output"])
            .arg(&file)
            .args(["--snapshotter", PROFILED, "--containerd"])
            .arg(self.node.containerd.socket())
            .args(["--namespace", self.node.containerd.namespace()])
            .arg("--address")
            .arg(self.socket()?)
            .arg(self.node.reference(lazy))
            .arg("--")
            .args(workload.program);
        run(&mut record)?;
        let profile = Profile::parse(&fs::read(&file)?)?;
        let registry = &self.node.registry;
        let manifest = registry.manifest(&registry.reference(lazy))?;
        let layers: Vec<_> = manifest.layers.iter().map(|layer| layer.digest).collect();
        self.node.forget()?;
        self.node
            .pull_and_start(ordinary, "overlayfs", workload.program, UNSHAPED)?;
        let mut local = Vec::new();
        for _ in 0..self.arguments.rounds.max(3) {
            let again = self
                .node
                .start_again(ordinary, "overlayfs", workload.program);
            local.push(again?);
        }
        local.sort_by(f64::total_cmp);
        Ok(Need {
            bytes: needed_bytes(registry, &layers, &profile)?,
            local: local[local.len() / 2],
        })
    }

    fn profile_file(&self, workload: &Workload) -> PathBuf {
        self.out.join(format!("{}.profile.json", workload.name))
    }

    fn socket(&self) -> Result<PathBuf> {
        let daemon = self.node.daemon(PROFILED);
        Ok(daemon.context("no daemon uses profiles")?.socket())
    }

    /// Puts the profile where this way looks for it, and nowhere else.
    fn prepare(&mut self, way: Way, lazy: &str, profile: &Path) -> Result<()> {
        let node_reference = self.node.reference(lazy);
        let address = self.socket()?;
        let on_node = |arguments: &[&str]| -> Result<()> {
            let mut command = programs::sluice_command()?;
            command.args(["profile", arguments[0], &node_reference]);
            command.args(&arguments[1..]).arg("--address").arg(&address);
            sluice_tests::command::attempt(&mut command)?;
            Ok(())
        };
        on_node(&["clear"])?;
        let file = profile.display().to_string();
        match way {
            Way::Ordinary | Way::Lazy | Way::BuiltIn => return Ok(()),
            Way::Recorded => on_node(&["import", &file])?,
            Way::Attached | Way::WithData => {
                let mut push = programs::sluice_command()?;
                push.args(["profile", "push", "--plain-http", "--profile", &file]);
                if way == Way::WithData {
                    push.arg("--with-data");
                }
                run(push.arg(self.node.registry.reference(lazy)))?;
            }
        }
        self.node.restart()
    }

    fn convert(&self, source: &str, name: &str, more: &[&str]) -> Result<()> {
        run(programs::sluice_command()?
            .args([
                "convert",
                "--plain-http",
                "--format",
                &self.arguments.format,
            ])
            .args(&self.arguments.convert)
            .args(more)
            .arg(source)
            .arg(self.node.registry.reference(name)))?;
        Ok(())
    }

    fn built_in(&self, workload: &Workload, image: &image::Image) -> Result<String> {
        let name = format!("{}:built-in", workload.name);
        let file = self.profile_file(workload).display().to_string();
        self.convert(&image.source(), &name, &["--profile", &file])?;
        Ok(name)
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
    format!(
        "{:<11} {:<9} {:>4} Mbit/s {:>3} ms: pull {:>6.2}  mount {:>6.2}  first instruction {:>6.2}  \
         ready {:>6.2} s ({:.2}-{:.2}), {:.2} of {:.2} s; {:>6.1} MB, {:>4} requests; \
         daemon {:.2} s, {:.0} MiB",
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
        start.bytes as f64 / 1e6,
        start.requests,
        start.daemon_cpu,
        start.daemon_peak_kib as f64 / 1024.0
    )
}
