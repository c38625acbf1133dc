//! `sluice pull` against a real containerd: with its own overlayfs, which can
//! do nothing lazily, and with the daemon.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use sluice_oci::{Descriptor, Digest, Index, Manifest, media_type};
use sluice_tests::command::{refusal, run, text, wait_for};
use sluice_tests::daemon::Options;
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Tarball};
use sluice_tests::proxy::{Fault, Proxy};
use sluice_tests::tree::{Times, compare};
use sluice_tests::{Containerd, Daemon, Registry, Scratch, tools};

const OVERLAYFS: &str = "overlayfs";
const SLUICE: &str = "sluice";

/// An image in a registry.
struct Pushed {
    reference: String,
    layout: PathBuf,
    manifest: Manifest,
}

/// Three small layers and one static program, `/ldconfig`.
fn small_image(scratch: &Scratch, registry: &Registry, name: &str) -> Result<Pushed> {
    let layout = scratch.fresh_dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    let program = fs::read("/sbin/ldconfig")?;
    writer.layer(Compression::Gzip, |to| {
        let mut tar = Tarball::new(to);
        tar.file("ldconfig", &Meta::mode(0o755), &program)?;
        tar.finish()
    })?;
    for number in 1..3 {
        writer.layer(Compression::Zstd, |to| {
            let mut tar = Tarball::new(to);
            tar.dir("data", &Meta::mode(0o750))?;
            let content = format!("{name} {number}").repeat(10_000);
            let path = format!("data/{number}");
            tar.file(&path, &Meta::mode(0o640), content.as_bytes())?;
            tar.finish()
        })?;
    }
    writer.finish(image::TAG, &["/ldconfig", "--version"])?;
    Ok(Pushed {
        reference: registry.push(&layout, image::TAG, name)?,
        manifest: image::read_manifest(&layout)?,
        layout,
    })
}

impl Pushed {
    fn top(&self) -> Result<String> {
        let top = self.manifest.layers.last().context("no layers")?;
        Ok(top.digest.to_string())
    }
}

#[test]
fn every_layer_is_unpacked_where_nothing_is_lazy() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = small_image(&scratch, &registry, "small:1")?;
    let reference = &image.reference;
    let proxy = Proxy::start(registry.host())?;
    let through = proxy.reference("small:1");
    let ours = Containerd::start(&scratch)?;
    let said = text(&mut ours.lazy_pull_command(&through, OVERLAYFS)?)?;
    for part in ["1/3  sha256:", "3/3  sha256:", "3 unpacked", &through] {
        ensure!(said.contains(part), "{part} is not in\n{said}");
    }
    // One manifest, one configuration, three layers.
    assert_eq!(proxy.requests("/manifests/"), 1);
    assert_eq!(proxy.requests("/blobs/"), 4);
    // There is no daemon that could be told beforehand.
    assert_eq!(connected_ahead(&proxy), 0);

    let ran = text(&mut ours.run_command(OVERLAYFS, &through, "one", &[]))?;
    ensure!(ran.contains("ldconfig"), "{ran}");

    // The tree is the one that containerd's own pull gives.
    let theirs = Containerd::start(&scratch)?;
    theirs.pull(reference, OVERLAYFS)?;
    let (left, right) = (
        theirs.mount(reference, OVERLAYFS)?,
        ours.mount(&through, OVERLAYFS)?,
    );
    compare(&left, &right, Times::Nanoseconds)?;
    ours.unmount(&right)?;
    theirs.unmount(&left)?;
    Ok(())
}

#[test]
fn what_was_pulled_survives_the_collector_and_goes_with_the_image() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = small_image(&scratch, &registry, "small:1")?;
    let reference = &image.reference;
    let containerd = Containerd::start(&scratch)?;
    containerd.lazy_pull(reference, OVERLAYFS)?;
    assert_eq!(leases(&containerd)?, 0);

    // Removing another image synchronously runs the collector.
    let other = small_image(&scratch, &registry, "other:1")?.reference;
    containerd.pull(&other, OVERLAYFS)?;
    containerd.ctr_text(&["images", "remove", "--sync", &other])?;
    assert_eq!(contents(&containerd)?, 5);
    assert_eq!(snapshots(&containerd, OVERLAYFS)?, 3);
    let ran = text(&mut containerd.run_command(OVERLAYFS, reference, "one", &[]))?;
    ensure!(ran.contains("ldconfig"), "{ran}");

    // containerd finds everything in place: the second pull of either kind
    // downloads nothing.
    let before = containerd.ctr_text(&["content", "list", "--quiet"])?;
    let said = text(&mut containerd.lazy_pull_command(reference, OVERLAYFS)?)?;
    ensure!(said.contains("3 already there"), "{said}");
    containerd.pull(reference, OVERLAYFS)?;
    let after = containerd.ctr_text(&["content", "list", "--quiet"])?;
    assert_eq!(before, after);

    containerd.forget_images()?;
    assert_eq!(
        (contents(&containerd)?, snapshots(&containerd, OVERLAYFS)?),
        (0, 0)
    );
    Ok(())
}

#[test]
fn a_pull_that_fails_leaves_nothing_behind() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = small_image(&scratch, &registry, "small:1")?;
    let reference = &image.reference;
    let containerd = Containerd::start(&scratch)?;
    // The topmost layer's bytes have rotten in the registry.
    let top = image.top()?;
    let file = registry.blob_file(&top);
    let mut bytes = fs::read(&file)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes)?;

    let said = refusal(&mut containerd.lazy_pull_command(reference, OVERLAYFS)?)?;
    ensure!(said.contains(&top), "{said}");
    ensure!(said.contains("the content has digest"), "{said}");
    assert_eq!(contents(&containerd)?, 0);
    assert_eq!(snapshots(&containerd, OVERLAYFS)?, 0);
    assert_eq!(leases(&containerd)?, 0);
    assert_eq!(containerd.ctr_text(&["images", "list", "--quiet"])?, "");
    let ingests = containerd.ctr_text(&["content", "active"])?;
    assert_eq!(ingests.lines().count(), 1, "{ingests}");
    Ok(())
}

#[test]
fn an_interrupted_pull_leaves_nothing_behind() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let top = small_image(&scratch, &registry, "small:1")?.top()?;
    let proxy = Proxy::start(registry.host())?;
    let containerd = Containerd::start(&scratch)?;
    let reference = proxy.reference("small:1");
    proxy.fail(&top, 100, Fault::Stall(10));
    let command = containerd.lazy_pull_command(&reference, OVERLAYFS)?;
    let pull = scratch.spawn("pull", command)?;
    // Both layers below are in place, the last one hangs.
    wait_for("the second layer", || {
        ensure!(pull.is_running(), "it ended: {}", pull.log());
        Ok(pull.log().contains("2/3  sha256:").then_some(()))
    })?;
    let status = pull.stop()?;
    assert_eq!(status.code(), Some(1), "{}", pull.log());
    ensure!(pull.log().contains("interrupted"), "{}", pull.log());
    assert_eq!(
        (contents(&containerd)?, snapshots(&containerd, OVERLAYFS)?),
        (0, 0)
    );
    assert_eq!(leases(&containerd)?, 0);
    Ok(())
}

#[test]
fn the_platform_is_chosen_from_an_index() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = small_image(&scratch, &registry, "small:1")?;
    let reference = push_as_index(&registry, &image)?;
    let proxy = Proxy::start(registry.host())?;
    let containerd = Containerd::start(&scratch)?;
    let through = proxy.reference("multi:1");
    containerd.lazy_pull(&through, OVERLAYFS)?;
    assert_eq!(proxy.requests("/manifests/"), 2);
    let ran = text(&mut containerd.run_command(OVERLAYFS, &through, "one", &[]))?;
    ensure!(ran.contains("ldconfig"), "{ran}");

    let refuse = |reference: &str, platform: &str| {
        let mut command = containerd.lazy_pull_command(reference, OVERLAYFS)?;
        refusal(command.args(["--platform", platform]))
    };
    let said = refuse(&reference, "linux/mips")?;
    ensure!(said.contains("no image for linux/mips"), "{said}");
    ensure!(said.contains("linux/s390x"), "what there is: {said}");
    let said = refuse(&image.reference, "linux/s390x")?;
    ensure!(said.contains("not for linux/s390x"), "{said}");
    ensure!(said.contains("pass --platform"), "{said}");
    let said = refuse(&image.reference, "linux")?;
    ensure!(said.contains("is no platform"), "{said}");
    Ok(())
}

/// An index of the image and of one that claims to be for another machine.
fn push_as_index(registry: &Registry, image: &Pushed) -> Result<String> {
    let path = image.layout.join("index.json");
    let mut index: Index = serde_json::from_slice(&fs::read(&path)?)?;
    let mut one = index.manifests.remove(0);
    one.annotations.clear();
    let here = text(Command::new("dpkg").arg("--print-architecture"))?;
    let entry = |architecture: &str| {
        let mut entry = serde_json::to_value(&one)?;
        entry["platform"] = serde_json::json!({"os": "linux", "architecture": architecture});
        anyhow::Ok(entry)
    };
    let bytes = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "mediaType": media_type::OCI_INDEX,
        "manifests": [entry("s390x")?, entry(&here)?],
    }))?;
    let digest = Digest::of(&bytes);
    fs::write(image.layout.join("blobs/sha256").join(digest.hex()), &bytes)?;
    let mut top = Descriptor::new(media_type::OCI_INDEX, digest, bytes.len() as u64);
    let key = "org.opencontainers.image.ref.name".to_owned();
    top.annotations.insert(key, "multi".to_owned());
    index.manifests = vec![top];
    fs::write(&path, serde_json::to_vec(&index)?)?;
    registry.push(&image.layout, "multi", "multi:1")
}

#[test]
fn bad_input_is_one_line_with_the_remedy() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let containerd = Containerd::start(&scratch)?;
    let image = small_image(&scratch, &registry, "small:1")?;
    let reference = &image.reference;
    let missing = registry.reference("no/such:tag");
    let nowhere = "127.0.0.1:1/no/such:tag";
    let sluice = sluice_tests::programs::sluice_command;
    let mut no_socket = sluice()?;
    no_socket
        .args(["pull", "--containerd", "/nonexistent/containerd.sock"])
        .arg(reference);
    let cases: [(Command, &[&str]); 5] = [
        (
            no_socket,
            &["/nonexistent/containerd.sock", "--containerd", "root"],
        ),
        (
            containerd.lazy_pull_command(reference, "absent")?,
            &["'absent'", "[proxy_plugins.absent]", "config.toml"],
        ),
        (
            containerd.lazy_pull_command(&missing, OVERLAYFS)?,
            &[&missing, "404", "check the name"],
        ),
        (
            containerd.lazy_pull_command(nowhere, OVERLAYFS)?,
            &[nowhere, "refused"],
        ),
        (
            containerd.lazy_pull_command("Not/A Reference", OVERLAYFS)?,
            &["not an image reference"],
        ),
    ];
    for (mut command, parts) in cases {
        let said = refusal(&mut command)?;
        for part in parts {
            ensure!(said.contains(part), "{part} is not in: {said}");
        }
        if !parts[0].starts_with("not an") {
            assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        }
    }
    assert_eq!((contents(&containerd)?, leases(&containerd)?), (0, 0));
    Ok(())
}

/// A copy of the image in which the layers of the given numbers are
/// zstd:chunked as podman writes them.
fn push_chunked(
    scratch: &Scratch,
    registry: &Registry,
    image: &Pushed,
    chunked: &[usize],
    name: &str,
) -> Result<String> {
    let work = scratch.fresh_dir("chunked")?;
    let whole = registry.reference("chunked:all");
    tools::push_as_podman_zstd_chunked(&image.layout, image::TAG, &work, &whole)?;
    let all: Manifest = serde_json::from_slice(&fs::read(work.join("manifest.json"))?)?;
    let layout = scratch.fresh_dir("mixed")?;
    run(Command::new("cp")
        .args(["-r", "-T"])
        .arg(&image.layout)
        .arg(&layout))?;
    let blobs = layout.join("blobs/sha256");
    let mut mixed = image.manifest.clone();
    for &number in chunked {
        let layer = &all.layers[number];
        ensure!(!layer.annotations.is_empty(), "skopeo wrote no TOC");
        let hex = layer.digest.hex();
        fs::copy(work.join(&hex), blobs.join(&hex))?;
        mixed.layers[number] = layer.clone();
    }
    let bytes = serde_json::to_vec(&mixed)?;
    let digest = Digest::of(&bytes);
    fs::write(blobs.join(digest.hex()), &bytes)?;
    let mut top = Descriptor::new(media_type::OCI_MANIFEST, digest, bytes.len() as u64);
    let key = "org.opencontainers.image.ref.name".to_owned();
    top.annotations.insert(key, "mixed".to_owned());
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [top]});
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
    registry.push(&layout, "mixed", name)
}

#[test]
fn lazy_layers_are_not_downloaded() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = small_image(&scratch, &registry, "small:1")?;
    push_chunked(&scratch, &registry, &image, &[0, 1, 2], "lazy:1")?;
    let proxy = Proxy::start(registry.host())?;
    let reference = proxy.reference("lazy:1");
    let daemon = Daemon::start(&scratch, &Options::default())?;
    let containerd = Containerd::start_with(&scratch, &[(SLUICE, &daemon)])?;

    let said = text(&mut containerd.lazy_pull_command(&reference, SLUICE)?)?;
    ensure!(said.contains("3 layers lazy, 0 unpacked"), "{said}");
    // Manifest and configuration; none of the layers.
    assert_eq!(contents(&containerd)?, 2);
    assert_eq!(leases(&containerd)?, 0);
    let ran = text(&mut containerd.run_command(SLUICE, &reference, "one", &[]))?;
    ensure!(ran.contains("ldconfig"), "{ran}");

    let truth = Containerd::start(&scratch)?;
    truth.pull(&image.reference, OVERLAYFS)?;
    let expected = truth.mount(&image.reference, OVERLAYFS)?;
    let lazy = containerd.mount(&reference, SLUICE)?;
    compare(&expected, &lazy, Times::Nanoseconds)?;
    containerd.unmount(&lazy)?;
    truth.unmount(&expected)?;

    // Again: nothing is asked for but what the tag names.
    proxy.forget();
    let said = text(&mut containerd.lazy_pull_command(&reference, SLUICE)?)?;
    ensure!(said.contains("3 already there"), "{said}");
    assert_eq!(proxy.requests("/manifests/"), 1);
    assert_eq!(proxy.requests("/blobs/"), 0);
    containerd.forget_images()?;
    Ok(())
}

/// The daemon connects and opens layers while the configuration is on its way,
/// and asks for nothing that the client has.
#[test]
fn layers_are_opened_before_containerd_asks() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = small_image(&scratch, &registry, "small:1")?;
    let lazy = push_chunked(&scratch, &registry, &image, &[0, 1, 2], "lazy:1")?;
    let manifest = registry.manifest(&lazy)?;
    let proxy = Proxy::start(registry.host())?;
    let reference = proxy.reference("lazy:1");
    let options = Options {
        more: "[prefetch]\nenabled = false\n[background]\nenabled = false\n".to_owned(),
        ..Options::default()
    };
    let daemon = Daemon::start(&scratch, &options)?;
    let containerd = Containerd::start_with(&scratch, &[(SLUICE, &daemon)])?;

    proxy.fail(&manifest.config.digest.to_string(), 100, Fault::Stall(0));
    let command = containerd.lazy_pull_command(&reference, SLUICE)?;
    let pull = scratch.spawn("pull", command)?;
    let layers = daemon.root().join("layers");
    wait_for("the layers", || {
        ensure!(pull.is_running(), "it ended: {}", pull.log());
        let opened = |layer: &Descriptor| layers.join(layer.digest.hex()).join("meta.erofs");
        let all = manifest.layers.iter().all(|layer| opened(layer).exists());
        Ok(all.then_some(()))
    })?;
    assert_eq!(snapshots(&containerd, SLUICE)?, 0);
    // More, where the machine is so busy that the registry seems far away.
    wait_for("the connections", || {
        Ok((connected_ahead(&proxy) >= 10).then_some(()))
    })?;
    // The client's: the daemon was given it.
    assert_eq!(proxy.requests("/manifests/"), 1, "{:?}", proxy.seen());
    assert_eq!(pull.stop()?.code(), Some(1), "{}", pull.log());
    assert_eq!((contents(&containerd)?, leases(&containerd)?), (0, 0));

    // Who pulls it after all finds them.
    proxy.heal();
    proxy.forget();
    let said = text(&mut containerd.lazy_pull_command(&reference, SLUICE)?)?;
    ensure!(said.contains("3 layers lazy"), "{said}");
    assert_eq!(proxy.requests("/manifests/"), 1, "{:?}", proxy.seen());
    // What the first had asked for may be told only now, and brought nothing.
    let mut brought = proxy.seen();
    brought.retain(|seen| seen.path.contains("/blobs/") && seen.bytes > 0);
    assert_eq!(brought.len(), 1, "{brought:?}");
    let ran = text(&mut containerd.run_command(SLUICE, &reference, "one", &[]))?;
    ensure!(ran.contains("ldconfig"), "{ran}");
    containerd.forget_images()?;
    Ok(())
}

/// What a person waits for before the first instruction: one request a layer,
/// beside the configuration and the manifest, which the daemon asks for as well
/// where containerd is faster than what it is told.
#[test]
fn few_requests_make_a_converted_image_ready() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = small_image(&scratch, &registry, "small:1")?;
    let proxy = Proxy::start(registry.host())?;
    let options = Options {
        more: "[prefetch]\nenabled = false\n[background]\nenabled = false\n".to_owned(),
        ..Options::default()
    };
    let daemon = Daemon::start(&scratch, &options)?;
    let containerd = Containerd::start_with(&scratch, &[(SLUICE, &daemon)])?;
    for format in ["estargz", "zstd-chunked"] {
        let name = format!("{format}:1");
        run(sluice_tests::programs::sluice_command()?
            .args(["convert", "--format", format, &image.reference])
            .arg(registry.reference(&name)))?;
        let reference = proxy.reference(&name);
        proxy.forget();
        let said = text(&mut containerd.lazy_pull_command(&reference, SLUICE)?)?;
        ensure!(said.contains("3 layers lazy"), "{said}");
        let (manifests, blobs) = (proxy.requests("/manifests/"), proxy.requests("/blobs/"));
        ensure!(manifests <= 2, "{:?}", proxy.seen());
        ensure!(blobs == 1 + 3, "{:?}", proxy.seen());
        let ran = text(&mut containerd.run_command(SLUICE, &reference, format, &[]))?;
        ensure!(ran.contains("ldconfig"), "{ran}");
        containerd.forget_images()?;
    }
    Ok(())
}

#[test]
fn layers_that_cannot_be_lazy_are_unpacked_and_the_reason_is_told() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = small_image(&scratch, &registry, "small:1")?;
    let reference = push_chunked(&scratch, &registry, &image, &[0, 2], "mixed:1")?;
    let daemon = Daemon::start(&scratch, &Options::default())?;
    let containerd = Containerd::start_with(&scratch, &[(SLUICE, &daemon)])?;
    let said = text(&mut containerd.lazy_pull_command(&reference, SLUICE)?)?;
    ensure!(said.contains("2 layers lazy, 1 unpacked"), "{said}");
    let lines: Vec<&str> = said.lines().collect();
    ensure!(lines[1].ends_with("lazy"), "{said}");
    ensure!(lines[2].contains("unpacked ("), "{said}");
    ensure!(lines[3].ends_with("lazy"), "{said}");
    // Manifest, configuration, and the layer in the middle.
    assert_eq!(contents(&containerd)?, 3);
    let truth = Containerd::start(&scratch)?;
    truth.pull(&image.reference, OVERLAYFS)?;
    let expected = truth.mount(&image.reference, OVERLAYFS)?;
    let mixed = containerd.mount(&reference, SLUICE)?;
    compare(&expected, &mixed, Times::Nanoseconds)?;
    containerd.unmount(&mixed)?;
    truth.unmount(&expected)?;
    containerd.forget_images()?;
    Ok(())
}

#[test]
fn a_daemon_that_does_not_run_is_named() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = small_image(&scratch, &registry, "small:1")?;
    let daemon = Daemon::start(&scratch, &Options::default())?;
    let containerd = Containerd::start_with(&scratch, &[(SLUICE, &daemon)])?;
    daemon.stop()?;
    let said = refusal(&mut containerd.lazy_pull_command(&image.reference, SLUICE)?)?;
    ensure!(said.contains("check that its daemon runs"), "{said}");
    assert_eq!((contents(&containerd)?, leases(&containerd)?), (0, 0));
    Ok(())
}

/// Requests that only open a connection, as of a client that asks for nothing.
fn connected_ahead(proxy: &Proxy) -> usize {
    let seen = proxy.seen();
    seen.iter().filter(|seen| seen.path == "/v2/").count()
}

/// Lines of a list without its heading.
fn count(containerd: &Containerd, list: &[&str], heading: usize) -> Result<usize> {
    let lines = containerd.ctr_text(list)?;
    Ok(lines.lines().count() - heading)
}

fn contents(containerd: &Containerd) -> Result<usize> {
    count(containerd, &["content", "list", "--quiet"], 0)
}

fn snapshots(containerd: &Containerd, snapshotter: &str) -> Result<usize> {
    let list = ["snapshots", "--snapshotter", snapshotter, "list"];
    count(containerd, &list, 1)
}

fn leases(containerd: &Containerd) -> Result<usize> {
    count(containerd, &["leases", "list", "--quiet"], 0)
}
