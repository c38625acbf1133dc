//! Other people's tools, as references to compare with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::command::run;
use crate::containerd::Containerd;
use crate::programs::cache_dir;

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
    run(Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet"])
        .args(["--dest-tls-verify=false", "--preserve-digests"])
        .arg(&dir)
        .arg(format!("docker://{reference}")))?;
    Ok(())
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
