//! containerd's own conformance suite for snapshotters, run against the daemon
//! through its socket, and against containerd's overlayfs snapshotter as the
//! reference.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use sluice_tests::{Scratch, command, programs};

/// Cases of the suite as of containerd 1.6: the last is skipped by the suite
/// itself, on every snapshotter.
const CASES: [&str; 21] = [
    "Basic",
    "StatActive",
    "StatComitted",
    "TransitivityTest",
    "PreareViewFailingtest",
    "Update",
    "Remove",
    "Walk",
    "LayerFileupdate",
    "RemoveDirectoryInLowerLayer",
    "Chown",
    "DirectoryPermissionOnCommit",
    "RemoveIntermediateSnapshot",
    "DeletedFilesInChildSnapshot",
    "MoveFileFromLowerLayer",
    "ViewReadonly",
    "StatInWalk",
    "CloseTwice",
    "RootPermission",
    "128LayersMount",
    "Rename",
];

/// The outcome of every case of one Go test: `PASS`, `SKIP` or `FAIL`. The
/// test itself is the case with the empty name.
type Outcomes = BTreeMap<String, String>;

#[test]
fn the_daemon_passes_what_the_reference_passes() -> Result<()> {
    let scratch = Scratch::new()?;
    let suite = build_suite()?;
    let output = command::attempt(
        Command::new(suite)
            .arg("-test.v")
            .current_dir(scratch.path())
            .env("TMPDIR", scratch.path())
            .env("SLUICE_SNAPSHOTTER", programs::snapshotter()?),
    )?;
    let log = String::from_utf8_lossy(&output.stdout);
    let reference = outcomes(&log, "TestReference");
    let sluice = outcomes(&log, "TestSluice");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(sluice, reference, "{log}\n{errors}");
    let count = |outcome| sluice.values().filter(|o| *o == outcome).count();
    assert_eq!(
        (count("PASS"), count("SKIP"), count("FAIL")),
        (21, 1, 0),
        "{log}\n{errors}"
    );
    for case in CASES {
        assert!(sluice.contains_key(case), "{case} did not run\n{log}");
    }
    assert!(output.status.success(), "{log}\n{errors}");
    Ok(())
}

fn outcomes(log: &str, test: &str) -> Outcomes {
    log.lines()
        .filter_map(|line| {
            let (outcome, rest) = line.trim_start().strip_prefix("--- ")?.split_once(": ")?;
            let case = rest.split(' ').next()?.strip_prefix(test)?;
            let case = case.strip_prefix('/').unwrap_or(case);
            Some((case.to_owned(), outcome.to_owned()))
        })
        .collect()
}

/// Compiles `conformance/` with Debian's Go, which alone still builds without
/// modules, against Debian's package of containerd.
fn build_suite() -> Result<PathBuf> {
    let suite = programs::target_dir().join("conformance.test");
    command::run(
        Command::new("/usr/bin/go")
            .args(["test", "-c", "-o"])
            .arg(&suite)
            .arg(".")
            .current_dir(programs::workspace().join("tests/conformance"))
            .env("GO111MODULE", "off")
            .env("GOPATH", "/usr/share/gocode")
            .env("GOFLAGS", "")
            .env("GOCACHE", programs::cache_dir()?.join("go-build")),
    )
    .context("cannot build containerd's suite; `make deps` installs what it needs")?;
    Ok(suite)
}
