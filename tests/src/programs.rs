//! The programs under test, built once for each test process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, anyhow};

use crate::command;

/// The workspace's directory.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
}

/// The workspace's build directory.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), |dir| workspace().join(dir))
}

/// Where images and tools that take long to make are kept between runs.
pub fn cache_dir() -> Result<PathBuf> {
    let dir =
        std::env::var_os("SLUICE_CACHE").map_or_else(|| target_dir().join("images"), PathBuf::from);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}

/// The command line program.
pub fn sluice() -> Result<PathBuf> {
    Ok(built()?.join("sluice"))
}

/// The daemon.
pub fn snapshotter() -> Result<PathBuf> {
    Ok(built()?.join("sluice-snapshotter"))
}

/// The daemon with its crash points, which `SLUICE_CRASH_POINTS` arms.
pub fn crashing_snapshotter() -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let build = || {
        // Both packages, as in the other build, so that what they stand on is
        // built once for both.
        let dir = build(&[
            "--bin=sluice-snapshotter-crashing",
            "--features=sluice-snapshotter/crash-points",
        ])?;
        Ok(dir.join("sluice-snapshotter-crashing"))
    };
    BUILT
        .get_or_init(|| build().map_err(|error: anyhow::Error| format!("{error:#}")))
        .clone()
        .map_err(|error| anyhow!(error))
}

/// A command of `sluice`.
pub fn sluice_command() -> Result<Command> {
    let mut command = Command::new(sluice()?);
    // Credentials of whoever runs the tests must not decide their outcome.
    command.env("DOCKER_CONFIG", "/nonexistent");
    Ok(command)
}

/// Builds both programs in this process' own profile, so that a test never
/// judges yesterday's build, and returns where they are.
fn built() -> Result<&'static Path> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BUILT
        .get_or_init(|| build(&["--bins"]).map_err(|error| format!("{error:#}")))
        .as_deref()
        .map_err(|error| anyhow!("{error}"))
}

fn build(what: &[&str]) -> Result<PathBuf> {
    let mut cargo = Command::new(option_env!("CARGO").unwrap_or("cargo"));
    cargo
        .args(["build", "--locked"])
        .args(what)
        .args(["-p", "sluice-cli", "-p", "sluice-snapshotter"])
        .current_dir(workspace());
    // What Cargo tells this test of its own crate would make build scripts run
    // again, and half of all dependencies with them: now and at the next test.
    for (name, _) in std::env::vars_os() {
        let own = ["CARGO_PKG_", "CARGO_MANIFEST_"];
        if own
            .iter()
            .any(|own| name.as_encoded_bytes().starts_with(own.as_bytes()))
        {
            cargo.env_remove(name);
        }
    }
    let profile = if cfg!(debug_assertions) {
        "debug"
    } else {
        cargo.arg("--release");
        "release"
    };
    command::run(&mut cargo).context("cannot build the programs under test")?;
    Ok(target_dir().join(profile))
}
