//! Other people's tools, as references to compare with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::command::{run, text};
use crate::containerd::Containerd;
use crate::programs::cache_dir;
use crate::scratch::Scratch;

/// stargz-snapshotter's `ctr-remote`, built from Debian's source package with
/// Debian's Go, kept between runs.
pub fn ctr_remote() -> Result<PathBuf> {
    let program = cache_dir()?.join("ctr-remote");
    crate::image::once(&program, |draft| {
        go_build(
            "github.com/containerd/stargz-snapshotter/cmd/ctr-remote",
            draft,
        )
        .context("cannot build ctr-remote; `make deps` installs what it needs")
    })?;
    Ok(program)
}

/// Builds a program of Debian's Go library packages, or a file of one's own
/// that uses them.
pub fn go_build(package: &str, output: &Path) -> Result<()> {
    // Debian's own Go, not a newer one that happens to come first in PATH:
    // only that one still builds without modules.
    run(Command::new("/usr/bin/go")
        .args(["build", "-o"])
        .arg(output)
        .arg(package)
        .env("GO111MODULE", "off")
        .env("GOPATH", "/usr/share/gocode")
        .env("GOFLAGS", "")
        .env("GOCACHE", cache_dir()?.join("go-build")))?;
    Ok(())
}

/// Copies an image of an OCI layout into a directory layout (`dir:`), its
/// layers compressed anew as zstd:chunked by containers/storage, then into a
/// registry.
pub fn push_as_podman_zstd_chunked(
    layout: &Path,
    tag: &str,
    work: &Path,
    reference: &str,
) -> Result<()> {
    fs::create_dir_all(work)?;
    let dir = format!("dir:{}", work.display());
    run(Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet"])
        .args(["--dest-compress", "--dest-compress-format", "zstd:chunked"])
        .arg(format!("oci:{}:{tag}", layout.display()))
        .arg(&dir))?;
    push_dir(work, reference)
}

/// Copies an image of a directory layout (`dir:`) into a registry as it is.
pub fn push_dir(dir: &Path, reference: &str) -> Result<()> {
    run(Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet"])
        .args(["--dest-tls-verify=false", "--preserve-digests"])
        .arg(format!("dir:{}", dir.display()))
        .arg(format!("docker://{reference}")))?;
    Ok(())
}

/// buildah with images of its own, which it has in containers/storage, as
/// podman and CRI-O do.
pub struct Buildah {
    dir: PathBuf,
}

impl Buildah {
    /// Without images. `partial` makes it fetch of a zstd:chunked layer the
    /// files that it does not have, each by its range.
    pub fn new(scratch: &Scratch, partial: bool) -> Result<Self> {
        let dir = scratch.fresh_dir("buildah")?;
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = {:?}\nrunroot = {:?}\n\
             [storage.options]\npull_options = {{enable_partial_images = \"{partial}\"}}\n",
            dir.join("images"),
            dir.join("run"),
        );
        fs::write(dir.join("storage.conf"), storage)?;
        let policy = r#"{"default": [{"type": "insecureAcceptAnything"}]}"#;
        fs::write(dir.join("policy.json"), policy)?;
        Ok(Self { dir })
    }

    fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new("buildah");
        command
            .args(["--log-level", "debug", subcommand])
            .env("CONTAINERS_STORAGE_CONF", self.dir.join("storage.conf"));
        if ["pull", "push"].contains(&subcommand) {
            command.arg("--signature-policy");
            command.arg(self.dir.join("policy.json"));
            command.arg("--tls-verify=false");
        }
        command
    }

    /// Pulls an image, and returns its number and what was said meanwhile.
    pub fn pull(&self, source: &str) -> Result<(String, String)> {
        let output = run(self.command("pull").arg(source))?;
        let id = String::from_utf8(output.stdout)?.trim().to_owned();
        Ok((id, String::from_utf8_lossy(&output.stderr).into_owned()))
    }

    /// Pushes an image into a registry, its layers compressed anew as
    /// zstd:chunked. By way of a directory: for a registry, it would rather
    /// name layers that it knows to be there.
    pub fn push_zstd_chunked(&self, id: &str, reference: &str) -> Result<()> {
        let dir = self.dir.join("pushed");
        run(self
            .command("push")
            .args(["--format", "oci", "--compression-format", "zstd:chunked"])
            .arg(id)
            .arg(format!("dir:{}", dir.display())))?;
        push_dir(&dir, reference)?;
        Ok(fs::remove_dir_all(&dir)?)
    }

    /// Mounts an image until the scratch directory goes.
    pub fn mount(&self, id: &str) -> Result<PathBuf> {
        let container = text(self.command("from").args(["--pull-never", id]))?;
        Ok(text(self.command("mount").arg(container))?.into())
    }
}

/// What `ctr-remote` converts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// eStargz.
    Estargz,
    /// zstd:chunked, in stargz-snapshotter's dialect.
    ZstdChunked,
}

/// Pulls an image into containerd, converts it with `ctr-remote` and pushes
/// the result.
pub fn convert_with_ctr_remote(
    containerd: &Containerd,
    source: &str,
    target: Target,
    destination: &str,
) -> Result<()> {
    run(containerd
        .ctr()
        .args(["content", "fetch", "--plain-http", source]))?;
    run(&mut ctr_remote_convert(
        containerd,
        source,
        target,
        destination,
    )?)?;
    run(containerd
        .ctr()
        .args(["images", "push", "--plain-http", destination]))?;
    Ok(())
}

/// The conversion alone, of an image whose content containerd has.
pub fn ctr_remote_convert(
    containerd: &Containerd,
    source: &str,
    target: Target,
    destination: &str,
) -> Result<Command> {
    let format = match target {
        Target::Estargz => "--estargz",
        Target::ZstdChunked => "--zstdchunked",
    };
    let mut command = Command::new(ctr_remote()?);
    command
        .arg("--address")
        .arg(containerd.socket())
        .args(["--namespace", containerd.namespace()])
        .args(["images", "convert", "--oci", format, source, destination]);
    Ok(command)
}
