//! `sluice convert` between a real registry and layouts, read back by other
//! tools.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sluice_oci::{Digest, Manifest, media_type};
use sluice_tests::command::{attempt, refusal, run, text};
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Tarball};
use sluice_tests::programs::sluice_command;
use sluice_tests::proxy::{Fault, Proxy};
use sluice_tests::registry::{PASSWORD, USER};
use sluice_tests::{Registry, Scratch};

const FORMATS: [&str; 2] = ["estargz", "zstd-chunked"];

/// A layout of two small layers.
fn layout(scratch: &Scratch, name: &str) -> Result<std::path::PathBuf> {
    let layout = scratch.fresh_dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    for number in 0..2 {
        writer.layer(Compression::Gzip, |to| {
            let mut tar = Tarball::new(to);
            tar.dir("data", &Meta::mode(0o755))?;
            let content = format!("{name} {number} ").repeat(20_000);
            tar.file(
                &format!("data/{number}"),
                &Meta::mode(0o644),
                content.as_bytes(),
            )?;
            tar.finish()
        })?;
    }
    writer.finish(image::TAG, &["/bin/true"])?;
    Ok(layout)
}

fn convert(format: &str, from: &str, to: &str) -> Result<Command> {
    let mut command = sluice_command()?;
    command.args(["convert", "--format", format, from, to]);
    Ok(command)
}

/// The digest that `sluice convert` prints.
fn converted(format: &str, from: &str, to: &str) -> Result<Digest> {
    Ok(text(&mut convert(format, from, to)?)?.parse()?)
}

fn verify(image: &str) -> Result<()> {
    run(sluice_command()?.args(["verify", image]))?;
    Ok(())
}

/// Whether a repository of the registry has a blob.
fn has(registry: &Registry, repository: &str, digest: &str) -> bool {
    let storage = registry.blob_file(digest);
    let root = storage.ancestors().nth(5).unwrap_or(Path::new("/"));
    let hex = digest.trim_start_matches("sha256:");
    root.join("repositories")
        .join(repository)
        .join("_layers/sha256")
        .join(hex)
        .join("link")
        .exists()
}

#[test]
fn registry_to_registry_and_back_to_a_layout() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let source = registry.push(&layout(&scratch, "one")?, image::TAG, "plain:v1")?;
    for format in FORMATS {
        let lazy = registry.reference(&format!("{format}:v1"));
        let digest = converted(format, &source, &lazy)?;
        verify(&lazy)?;
        // By way of a layout the same image results.
        let through = format!("oci:{}:v1", scratch.fresh_dir("through")?.display());
        ensure!(converted(format, &source, &through)? == digest);
        // What is seekable already is copied: to another repository of the
        // same registry, and from there into a layout.
        let copy = registry.reference(&format!("copy/{format}:v2"));
        ensure!(converted(format, &lazy, &copy)? == digest);
        let manifest = registry.manifest(&copy)?;
        for layer in &manifest.layers {
            let layer = layer.digest.to_string();
            ensure!(has(&registry, &format!("copy/{format}"), &layer));
        }
        let back = format!("oci:{}:v1", scratch.fresh_dir("back")?.display());
        ensure!(converted(format, &copy, &back)? == digest);
        verify(&back)?;
        // Other tools take it for what it is: an ordinary image.
        let dir = scratch.fresh_dir("skopeo")?;
        run(Command::new("skopeo")
            .args([
                "--insecure-policy",
                "copy",
                "--quiet",
                "--src-tls-verify=false",
            ])
            .arg(format!("docker://{copy}"))
            .arg(format!("dir:{}", dir.display())))?;
        let copied: Manifest = serde_json::from_slice(&fs::read(dir.join("manifest.json"))?)?;
        ensure!(copied == manifest);
    }
    Ok(())
}

#[test]
fn an_index_in_a_registry_stays_one() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let layout = layout(&scratch, "two")?;
    // The same image for two platforms.
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let mut entry = index["manifests"][0].clone();
    entry
        .as_object_mut()
        .context("no entry")?
        .remove("annotations");
    let mut manifests = Vec::new();
    for architecture in ["amd64", "arm64"] {
        entry["platform"] = json!({"os": "linux", "architecture": architecture});
        manifests.push(entry.clone());
    }
    let document = json!({
        "schemaVersion": 2,
        "mediaType": media_type::OCI_INDEX,
        "manifests": manifests,
    })
    .to_string();
    let digest = Digest::of(document.as_bytes());
    fs::write(layout.join("blobs/sha256").join(digest.hex()), &document)?;
    let named = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": media_type::OCI_INDEX,
        "digest": digest,
        "size": document.len(),
        "annotations": {"org.opencontainers.image.ref.name": image::TAG},
    }]});
    fs::write(layout.join("index.json"), named.to_string())?;
    let source = registry.push(&layout, image::TAG, "plain:v1")?;

    let lazy = registry.reference("lazy:v1");
    let digest = converted("estargz", &source, &lazy)?;
    verify(&lazy)?;
    let raw = text(
        Command::new("skopeo")
            .args([
                "--insecure-policy",
                "inspect",
                "--raw",
                "--tls-verify=false",
            ])
            .arg(format!("docker://{lazy}")),
    )?;
    ensure!(Digest::of(raw.as_bytes()) == digest);
    let index: Value = serde_json::from_str(&raw)?;
    ensure!(index["mediaType"] == media_type::OCI_INDEX);
    ensure!(index["manifests"][1]["platform"]["architecture"] == "arm64");

    let one = registry.reference("one:v1");
    let mut command = convert("estargz", &source, &one)?;
    run(command.args(["--platform", "linux/arm64"]))?;
    let json = text(sluice_command()?.args(["inspect", "--json", &one]))?;
    let json: Value = serde_json::from_str(&json)?;
    ensure!(json["images"].as_array().map(Vec::len) == Some(1));
    ensure!(json["images"][0]["platform"] == "linux/arm64");
    ensure!(json["images"][0]["layers"][1]["lazy"] == "yes");
    Ok(())
}

#[test]
fn a_registry_with_a_password() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start_with_password(&scratch)?;
    let source = format!(
        "oci:{}:{}",
        layout(&scratch, "three")?.display(),
        image::TAG
    );
    let lazy = registry.reference("lazy:v1");
    let said = refusal(&mut convert("estargz", &source, &lazy)?)?;
    let reason = said.lines().last().context("it said nothing")?;
    ensure!(reason.starts_with("sluice: cannot "), "{said}");
    ensure!(reason.contains("docker login"), "{said}");

    let login = scratch.fresh_dir("login")?;
    let config = json!({"auths": {registry.host(): {"username": USER, "password": PASSWORD}}});
    fs::write(login.join("config.json"), config.to_string())?;
    run(convert("estargz", &source, &lazy)?.env("DOCKER_CONFIG", &login))?;
    run(sluice_command()?
        .args(["verify", &lazy])
        .env("DOCKER_CONFIG", &login))?;
    Ok(())
}

#[test]
fn a_registry_that_misbehaves() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let reference = registry.push(&layout(&scratch, "four")?, image::TAG, "plain:v1")?;
    let layer = registry.manifest(&reference)?.layers[0].digest.to_string();
    let proxy = Proxy::start(registry.host())?;
    let source = proxy.reference("plain:v1");
    let directory = scratch.fresh_dir("out")?.join("layout");
    let to = format!("oci:{}:v1", directory.display());

    let missing = proxy.reference("nothing:v1");
    let said = refusal(&mut convert("estargz", &missing, &to)?)?;
    ensure!(
        said.lines().count() == 1 && said.contains("nothing"),
        "{said}"
    );
    ensure!(!directory.exists(), "it left {}", directory.display());

    proxy.fail(&layer, u64::MAX, Fault::Tamper(100));
    let said = refusal(&mut convert("estargz", &source, &to)?)?;
    ensure!(said.contains(&layer), "{said}");
    ensure!(!directory.exists(), "it left {}", directory.display());

    // A body that breaks off is resumed where it stopped.
    proxy.heal();
    proxy.fail(&layer, 1, Fault::Truncate(50));
    proxy.forget();
    run(&mut convert("estargz", &source, &to)?)?;
    let ranges: Vec<_> = proxy
        .seen()
        .into_iter()
        .filter(|seen| seen.path.contains(&layer))
        .map(|seen| seen.range)
        .collect();
    ensure!(ranges.len() == 2 && ranges[1].is_some(), "{ranges:?}");
    verify(&to)
}

#[test]
fn the_same_image_twice_reads_no_layer_of_the_destination() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let source = registry.push(&layout(&scratch, "five")?, image::TAG, "plain:v1")?;
    let proxy = Proxy::start(registry.host())?;
    let through = source.replacen(registry.host(), &proxy.host(), 1);
    let to = format!("oci:{}:v1", scratch.fresh_dir("out")?.display());
    let first = converted("zstd-chunked", &through, &to)?;
    let layers = registry.manifest(&source)?.layers;
    for layer in &layers {
        // Once, however many stages look at it.
        ensure!(proxy.requests(&layer.digest.to_string()) == 1);
    }
    ensure!(converted("zstd-chunked", &through, &to)? == first);
    Ok(())
}

#[test]
fn a_killed_conversion_leaves_no_half_written_file() -> Result<()> {
    let scratch = Scratch::new()?;
    let layout = scratch.fresh_dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    writer.layer(Compression::Gzip, |to| {
        let mut tar = Tarball::new(to);
        for number in 0..200u32 {
            let content = Digest::of(&number.to_be_bytes()).hex().repeat(300);
            tar.file(&number.to_string(), &Meta::mode(0o644), content.as_bytes())?;
        }
        tar.finish()
    })?;
    writer.finish(image::TAG, &["/bin/true"])?;
    let source = format!("oci:{}:{}", layout.display(), image::TAG);
    let directory = scratch.fresh_dir("out")?.join("layout");
    let to = format!("oci:{}:v1", directory.display());
    let mut child = convert("estargz", &source, &to)?
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?;
    while !directory.join("blobs/sha256").exists() && child.try_wait()?.is_none() {
        std::thread::yield_now();
    }
    child.kill()?;
    child.wait()?;
    for entry in fs::read_dir(directory.join("blobs/sha256"))? {
        let path = entry?.path();
        let name = path
            .file_name()
            .context("no name")?
            .to_string_lossy()
            .into_owned();
        ensure!(
            Digest::of(&fs::read(&path)?).hex() == name,
            "{name} is not whole"
        );
    }
    // And the next one succeeds in the same place.
    run(&mut convert("estargz", &source, &to)?)?;
    verify(&to)?;
    let dry = attempt(sluice_command()?.args(["inspect", &to]))?;
    ensure!(dry.status.success());
    Ok(())
}
