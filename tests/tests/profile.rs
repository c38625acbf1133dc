//! What a container reads while it starts is recorded, and fetched ahead of
//! the next start; the profile can be looked at, moved and built into an
//! image; the daemon says what it holds and does.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use sluice_layer::Profile;
use sluice_layer::annotations::{START_CHUNKS, START_RANGES};
use sluice_tests::command::{run, text, wait_for};
use sluice_tests::containerd::Containerd;
use sluice_tests::daemon::{Daemon, Options};
use sluice_tests::image;
use sluice_tests::programs::sluice_command;
use sluice_tests::proxy::{Fault, Proxy, Rule};
use sluice_tests::registry::Registry;
use sluice_tests::scratch::Scratch;

/// Nothing is fetched but what is read and what a profile names. Recordings
/// end with their images, at no other time.
const CONFIGURATION: &str = "[background]\nenabled = false\n[fetch]\nread_ahead_mib = 0\n\
                             [profiles]\nseconds = 3600\nidle_seconds = 3600\n";
const SNAPSHOTTER: &str = "sluice";
const PROGRAM: &[&str] = &["python3", "-c", "import json; print(json.dumps({'a': 1}))"];

/// A node, and the base image in a registry behind a proxy.
struct World {
    proxy: Proxy,
    daemon: Daemon,
    containerd: Containerd,
    registry: Registry,
    scratch: Scratch,
    /// Through the proxy.
    reference: String,
}

impl World {
    fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        let options = Options {
            more: CONFIGURATION.to_owned(),
            ..Options::default()
        };
        let daemon = Daemon::start(&scratch, &options)?;
        let containerd = Containerd::start_with(&scratch, &[(SNAPSHOTTER, &daemon)])?;
        let proxy = Proxy::start(registry.host())?;
        run(sluice_command()?
            .args(["convert", "--chunk-size", "64K"])
            .arg(image::base()?.source())
            .arg(registry.reference("base:lazy")))?;
        Ok(Self {
            reference: proxy.reference("base:lazy"),
            proxy,
            daemon,
            containerd,
            registry,
            scratch,
        })
    }

    /// `sluice` with a subcommand that asks the daemon.
    fn ask(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = sluice_command()?;
        command
            .args(arguments)
            .arg("--address")
            .arg(self.daemon.socket());
        Ok(command)
    }

    fn status(&self) -> Result<Value> {
        let json = text(&mut self.ask(&["status", "--json"])?)?;
        serde_json::from_str(&json).with_context(|| json)
    }

    /// What the daemon says of the image's one layer.
    fn layer(&self) -> Result<Value> {
        Ok(self.status()?["layers"][0].clone())
    }

    /// Runs the program in a container that stays, and returns what it wrote.
    fn start(&self, id: &str) -> Result<String> {
        let mut arguments = vec!["run", "--snapshotter", SNAPSHOTTER, &self.reference, id];
        arguments.extend(PROGRAM);
        self.containerd.ctr_text(&arguments)
    }

    /// Removes the container and the image, which ends the recording.
    fn remove(&self, id: &str) -> Result<()> {
        self.containerd.ctr_text(&["containers", "delete", id])?;
        self.containerd.forget_images()?;
        wait_for("the layer to be removed", || {
            Ok(self.layer()?.is_null().then_some(()))
        })
    }

    fn restart(&mut self) -> Result<()> {
        self.daemon.stop()?;
        self.daemon.start_again()?;
        self.containerd.wait_for_snapshotter(SNAPSHOTTER)
    }

    fn export(&self) -> Result<(PathBuf, Profile)> {
        let path = self.scratch.path().join("profile.json");
        let export = ["profile", "export", &self.reference];
        run(self.ask(&export)?.arg("--output").arg(&path))?;
        Ok((path.clone(), parse(&path)?))
    }
}

fn parse(path: &Path) -> Result<Profile> {
    Ok(Profile::parse(&std::fs::read(path)?)?)
}

fn number(value: &Value, path: &str) -> u64 {
    value
        .pointer(path)
        .and_then(Value::as_u64)
        .unwrap_or_else(|| panic!("no number at {path} of {value}"))
}

fn names(profile: &Profile, prefix: &str) -> bool {
    let files = profile.files();
    files.iter().any(|path| path.starts_with(prefix.as_bytes()))
}

#[test]
fn a_start_is_recorded_and_the_next_one_finds_its_bytes() -> Result<()> {
    let mut world = World::new()?;
    let log = || format!("the daemon's log:\n{}", world.daemon.log());
    world.containerd.lazy_pull(&world.reference, SNAPSHOTTER)?;
    let written = world.start("first").with_context(log)?;
    ensure!(written.trim() == "{\"a\": 1}", "{written}");

    // What the daemon says while it records.
    let status = world.status()?;
    let image = &status["images"][0];
    ensure!(image["reference"] == world.reference.as_str(), "{status}");
    ensure!(
        image["users"] == 1 && image["recording"] == true,
        "{status}"
    );
    ensure!(image["profile"].is_null(), "{status}");
    ensure!(
        image["layers"][0] == status["layers"][0]["digest"],
        "{status}"
    );
    let first = world.layer()?;
    let (present, chunks) = (number(&first, "/present_chunks"), number(&first, "/chunks"));
    let waited = number(&first, "/waited_reads");
    ensure!(0 < present && present < chunks / 2, "{first}");
    ensure!(0 < waited && waited < number(&first, "/reads"), "{first}");
    ensure!(number(&first, "/fetched/on_demand") > 0, "{first}");
    ensure!(number(&first, "/fetched/prefetch") == 0, "{first}");
    ensure!(number(&first, "/fetched/background") == 0, "{first}");
    ensure!(first["mounted"] == true, "{first}");
    ensure!(
        status["links"][0]["host"] == world.proxy.host().as_str(),
        "{status}"
    );
    ensure!(number(&status, "/memory/used") == 0 && number(&status, "/memory/limit") > 0);
    let page = text(&mut world.ask(&["status"])?)?;
    ensure!(
        page.contains(&world.reference) && page.contains("none, recording"),
        "{page}"
    );
    let page = text(&mut world.ask(&["top", "--once"])?)?;
    ensure!(
        page.contains(&world.reference) && page.contains("fetched: 0 B/s"),
        "{page}"
    );

    world.remove("first")?;
    let (_, recorded) = world.export().with_context(log)?;
    let manifest = world
        .registry
        .manifest(&world.registry.reference("base:lazy"))?;
    ensure!(recorded.layers() == [manifest.layers[0].digest]);
    // Nothing else fetched anything, and a unit is a chunk: what is present
    // is what was read.
    ensure!(
        recorded.reads().len() as u64 == present,
        "{} {present}",
        recorded.reads().len()
    );
    ensure!(names(&recorded, "usr/bin/python3"), "{recorded:?}");
    ensure!(!names(&recorded, "usr/share/doc/"), "{recorded:?}");

    // The next start: what it needs is there before, by few requests.
    world.proxy.forget();
    world.containerd.lazy_pull(&world.reference, SNAPSHOTTER)?;
    wait_for("the prefetch", || {
        let layer = world.layer()?;
        Ok((number(&layer, "/present_chunks") == present).then_some(()))
    })
    .with_context(log)?;
    let requests = world.proxy.requests(&manifest.layers[0].digest.to_string());
    ensure!(
        (requests as u64) < present / 2,
        "{requests} requests for {present} chunks"
    );
    world.start("second").with_context(log)?;
    let second = world.layer()?;
    ensure!(second["profile"] == "node", "{second}");
    ensure!(
        number(&second, "/waited_reads") * 10 <= waited,
        "{second} after {first}"
    );
    ensure!(number(&second, "/fetched/prefetch") > 0, "{second}");
    world.remove("second")?;
    begun(&mut world, &manifest.layers[0].digest.to_string(), present)?;
    let (file, twice) = world.export()?;
    ensure!(twice.starts() == 3 && twice.layers() == recorded.layers());

    moved(&world, &file, &twice)?;
    built_in(&world, &file, &twice)?;
    let kept = world.scratch.path().join("kept.json");
    std::fs::write(&kept, twice.to_json())?;
    recorded_on_request(&world)?;
    attached(world, &kept, twice.reads().len() as u64)
}

/// Far away, content is asked for before the table of contents is there, and
/// none of it twice.
fn begun(world: &mut World, layer: &str, chunks: u64) -> Result<()> {
    // So that it does not know how near the registry was.
    world.restart()?;
    let far = Fault::Delay(Duration::from_millis(200));
    world.proxy.schedule(Rule::new(far));
    let held = Fault::Delay(Duration::from_secs(2));
    world.proxy.schedule(Rule::new(held).on(layer).ranged());
    world.proxy.forget();
    let mut pull = world
        .containerd
        .lazy_pull_command(&world.reference, SNAPSHOTTER)?;
    let mut pull = pull.spawn()?;
    wait_for("requests for content", || {
        Ok((world.proxy.asked(layer) > 1).then_some(()))
    })?;
    let answered = world.proxy.requests(layer);
    ensure!(answered == 0, "{answered} were answered before");
    world.proxy.heal();
    ensure!(pull.wait()?.success(), "{}", world.daemon.log());
    wait_for("the prefetch", || {
        Ok((number(&world.layer()?, "/present_chunks") >= chunks).then_some(()))
    })?;
    let seen = world.proxy.seen();
    let of_layer = seen.iter().filter(|seen| seen.path.contains(layer));
    let ranges = of_layer.filter_map(|seen| seen.range.as_deref()?.strip_prefix("bytes="));
    let ranges = ranges.filter_map(|range| range.split_once('-'));
    let mut ranges = ranges
        .map(|(start, end)| Ok((start.parse()?, end.parse()?)))
        .collect::<Result<Vec<(u64, u64)>>>()?;
    // Small gaps may hold what is on its way.
    let asked: u64 = ranges.iter().map(|(start, end)| end - start + 1).sum();
    ranges.sort_unstable();
    let (mut distinct, mut reached) = (0, 0);
    for (start, end) in &ranges {
        distinct += (end + 1).saturating_sub(reached.max(*start));
        reached = reached.max(end + 1);
    }
    ensure!(
        ranges.len() > 1 && asked * 10 <= distinct * 11,
        "{asked} bytes, {distinct} of them distinct: {ranges:?}"
    );
    world.start("third")?;
    world.remove("third")
}

/// Merged, shown, forgotten and given back.
fn moved(world: &World, file: &Path, profile: &Profile) -> Result<()> {
    let merged = world.scratch.path().join("merged.json");
    run(sluice_command()?
        .args(["profile", "merge"])
        .args([&merged, file, file]))?;
    ensure!(parse(&merged)?.starts() == 2 * profile.starts());
    ensure!(parse(&merged)?.files() == profile.files());
    let shown = text(&mut world.ask(&["profile", "show", &world.reference])?)?;
    ensure!(
        shown.contains("usr/bin/python3") && shown.contains("3 starts"),
        "{shown}"
    );
    run(&mut world.ask(&["profile", "clear", &world.reference])?)?;
    let shown = text(&mut world.ask(&["profile", "show"])?)?;
    ensure!(!shown.contains(&world.reference), "{shown}");
    let import = ["profile", "import", &world.reference];
    run(world.ask(&import)?.arg(&merged))?;
    let (_, imported) = world.export()?;
    ensure!(imported == parse(&merged)?);
    Ok(())
}

/// An image made with the profile has its files first.
fn built_in(world: &World, file: &Path, profile: &Profile) -> Result<()> {
    let to = world.registry.reference("base:profiled");
    run(sluice_command()?
        .args(["convert", "--profile"])
        .arg(file)
        .arg(image::base()?.source())
        .arg(&to))?;
    run(sluice_command()?.args(["verify", &to]))?;
    let json = text(sluice_command()?.args(["inspect", "--json", &to]))?;
    let inspected: Value = serde_json::from_str(&json)?;
    let lazy = &inspected["images"][0]["layers"][0];
    let prioritized = find(lazy, "prioritized").context(json.clone())?;
    let prioritized = prioritized.as_array().context("no list")?;
    let all = prioritized.iter().filter_map(Value::as_str);
    let all: Vec<&str> = all.map(|path| path.trim_start_matches('/')).collect();
    // Files come in the order of first need; a hard link's target comes
    // before it.
    let wanted: Vec<String> = profile
        .files()
        .iter()
        .map(|path| String::from_utf8_lossy(path).into_owned())
        .collect();
    ensure!(
        wanted.iter().all(|path| all.contains(&path.as_str())),
        "{all:?}"
    );
    let listed: Vec<&str> = all
        .iter()
        .copied()
        .filter(|path| wanted.iter().any(|wanted| wanted == path))
        .collect();
    ensure!(listed == wanted, "{listed:?} instead of {wanted:?}");
    let layer = &world.registry.manifest(&to)?.layers[0];
    for hint in [START_CHUNKS, START_RANGES] {
        ensure!(layer.annotations.contains_key(hint), "{layer:?}");
    }
    Ok(())
}

/// The value under a key, however deep.
fn find<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map
            .get(key)
            .or_else(|| map.values().find_map(|value| find(value, key))),
        Value::Array(list) => list.iter().find_map(|value| find(value, key)),
        _ => None,
    }
}

/// As a CI job records.
fn recorded_on_request(world: &World) -> Result<()> {
    let file = world.scratch.path().join("recorded.json");
    let record = |more: &[&str], script: &str| -> Result<String> {
        let mut command = world.ask(&["profile", "record", "--plain-http"])?;
        command
            .args(more)
            .arg("--output")
            .arg(&file)
            .args(["--snapshotter", SNAPSHOTTER, "--containerd"])
            .arg(world.containerd.socket())
            .args(["--namespace", world.containerd.namespace()])
            .args([&world.reference, "--", "/bin/sh", "-c", script]);
        text(&mut command).with_context(|| world.daemon.log())
    };
    let script = "echo said; id -u; cat /etc/debian_version > /written";
    let written = record(&[], script)?;
    ensure!(written.contains("said\n0\n"), "{written}");
    ensure!(written.contains("ended with 0"), "{written}");
    let profile = parse(&file)?;
    ensure!(names(&profile, "etc/debian_version") && names(&profile, "usr/bin/cat"));
    ensure!(!names(&profile, "usr/bin/python3"), "{profile:?}");
    // Nothing of it is left.
    for list in [
        ["containers", "list", "--quiet"],
        ["images", "list", "--quiet"],
    ] {
        let left = world.containerd.ctr_text(&list)?;
        ensure!(left.is_empty(), "{left}");
    }
    wait_for("the layer to be removed", || {
        Ok(world.layer()?.is_null().then_some(()))
    })?;
    // A container that does not end by itself.
    let script = "trap 'exit 7' TERM; while :; do sleep 0.1; done";
    let written = record(&["--seconds", "1"], script)?;
    ensure!(written.contains("ended with 7"), "{written}");
    ensure!(names(&parse(&file)?, "usr/bin/sleep"));
    Ok(())
}

/// Attached in the registry, a profile serves nodes that never saw the image.
fn attached(mut world: World, file: &Path, chunks: u64) -> Result<()> {
    let to = world.registry.reference("base:lazy");
    let layer = world.registry.manifest(&to)?.layers[0].digest.to_string();
    let push = |more: &[&str]| -> Result<()> {
        let mut command = sluice_command()?;
        command.args(["profile", "push", "--profile"]).arg(file);
        let said = text(command.args(more).arg(&to))?;
        ensure!(said.contains(&format!("{chunks} chunks")), "{said}");
        Ok(())
    };
    push(&[])?;
    world.follow_attached(chunks)?;
    ensure!(world.layer()?["profile"] == "attached");
    ensure!(world.proxy.requests(&layer) > 1);
    world.remove("attached")?;

    // With its content, the layer is asked for its table of contents alone.
    push(&["--with-data", "--level", "3"])?;
    world.follow_attached(chunks)?;
    let requests = world.proxy.requests(&layer);
    ensure!(requests == 1, "{requests} requests for the layer");
    let largest = world.proxy.seen().into_iter().max_by_key(|seen| seen.bytes);
    let content = largest.context("nothing was asked for")?.path;
    world.remove("attached")?;

    // What is wrong with it is fetched from the layer instead.
    world.proxy.fail(&content, u64::MAX, Fault::Tamper(100_000));
    world.follow_attached(chunks)?;
    ensure!(world.proxy.requests(&layer) > 1);
    let log = world.daemon.log();
    ensure!(log.contains("the content of an attached profile is given up"));
    world.remove("attached")
}

impl World {
    /// Pulls with a daemon that knows nothing of the image, waits for what the
    /// profile names, and runs the program.
    fn follow_attached(&mut self, chunks: u64) -> Result<()> {
        if self.export().is_ok() {
            run(&mut self.ask(&["profile", "clear", &self.reference])?)?;
        }
        self.restart()?;
        self.proxy.forget();
        self.containerd.lazy_pull(&self.reference, SNAPSHOTTER)?;
        let log = || format!("the daemon's log:\n{}", self.daemon.log());
        wait_for("what the profile names", || {
            let present = number(&self.layer()?, "/present_chunks");
            Ok((present >= chunks).then_some(()))
        })
        .with_context(log)?;
        let written = self.start("attached").with_context(log)?;
        ensure!(written.trim() == "{\"a\": 1}", "{written}");
        Ok(())
    }
}
