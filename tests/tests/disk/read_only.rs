//! The file system that has everything that the daemon keeps becomes
//! read-only.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use sluice_tests::command::{attempt, refusal, run, text, wait_for};
use sluice_tests::daemon::Mode;
use sluice_tests::disk::{Disk, Faults};
use sluice_tests::killer::signal;
use sluice_tests::{Scratch, Snapshots};

use super::{Rig, SLUICE, quiet};

/// Does with the daemon's snapshots what containerd would.
fn with_snapshots(rig: &Rig, work: impl AsyncFnOnce(&Snapshots) -> Result<()>) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async { work(&Snapshots::connect(&rig.daemon).await?).await })
}

/// While all is well: something to commit, and something to remove.
fn prepare_for_changes(rig: &Rig) -> Result<()> {
    // containerd does not know of them, and would remove them.
    rig.containerd.collect_garbage()?;
    with_snapshots(rig, async |snapshots| {
        snapshots.prepare("to-commit", "").await?;
        snapshots.prepare("to-remove", "").await?;
        Ok(())
    })
}

/// Every change fails with the reason and the remedy.
fn changes_fail(rig: &Rig) -> Result<()> {
    with_snapshots(rig, async |snapshots| {
        for (what, done) in [
            ("prepare", snapshots.prepare("new", "").await.map(drop)),
            ("commit", snapshots.commit("committed", "to-commit").await),
            ("remove", snapshots.remove("to-remove").await),
        ] {
            let failed = done.err().with_context(|| format!("{what} succeeded"))?;
            let reason = format!("{failed:#}");
            for part in ["has become read-only", "repair it", "currently unavailable"] {
                ensure!(reason.contains(part), "{what}: {reason}");
            }
        }
        Ok(())
    })
}

/// What `ctr` tells whoever asks containerd.
fn containerd_says_why(rig: &Rig) -> Result<()> {
    let prepare = ["snapshots", "--snapshotter", SLUICE, "prepare", "refused"];
    let said = refusal(rig.containerd.ctr().args(prepare))?;
    ensure!(said.contains("has become read-only"), "{said}");
    Ok(())
}

/// Every change that has failed works, by the same names.
fn changes_succeed(rig: &Rig) -> Result<()> {
    with_snapshots(rig, async |snapshots| {
        snapshots.prepare("new", "").await?;
        snapshots.commit("committed", "to-commit").await?;
        snapshots.prepare("above", "committed").await?;
        for key in ["to-remove", "above", "committed", "new"] {
            snapshots.remove(key).await?;
        }
        Ok(())
    })
}

/// As after an error of its disk, which most systems have ext4 answer so. The
/// kernel of today does not let it be written to again before it was unmounted.
#[test]
fn reads_survive_an_ext4_that_has_become_read_only() -> Result<()> {
    for mode in Mode::ALL {
        let scratch = Scratch::new()?;
        let (mut rig, disk) = Rig::on_ext4(&scratch, mode)?;
        rig.check(0)?;
        let (content, said) = rig.scrub()?;
        ensure!(content, "{said}");
        prepare_for_changes(&rig)?;
        become_read_only(&disk)?;
        rig.check(1)?;
        changes_fail(&rig)?;
        containerd_says_why(&rig)?;
        rig.check(2)?;
        let first = rig.daemon.serving().context("no process serves")?;
        for (lives, end) in (2..).zip([Signal::KILL, Signal::HUP]) {
            match end {
                Signal::HUP => rig.daemon.process().signal(end)?,
                _ => signal(first, end)?,
            }
            rig.check(0)?;
            rig.check(3)?;
            // It cannot write its number down.
            wait_for("the next process to be ready", || {
                Ok((rig.said(" is ready") >= lives).then_some(()))
            })?;
            changes_fail(&rig)?;
        }
        rig.check_all()?;
        ensure!(rig.said("has become read-only") > 0);
        run(Command::new("umount").arg(&rig.root))?;
        rig.daemon.stop()?;
        repair(&disk)?;
        rig.daemon.start_again()?;
        changes_succeed(&rig)?;
        rig.mount_again()?;
        rig.check_all()?;
        rig.containerd.unmount(&rig.root)?;
        rig.containerd.forget_images()?;
        rig.daemon.stop()?;
    }
    Ok(())
}

fn device(mount: &Path) -> Result<String> {
    text(Command::new("findmnt").args(["-no", "SOURCE"]).arg(mount))
}

fn become_read_only(mount: &Path) -> Result<()> {
    run(Command::new("mount")
        .args(["-o", "remount,errors=remount-ro"])
        .arg(mount))?;
    let device = device(mount)?;
    let name = device.rsplit('/').next().unwrap_or_default();
    fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "test")?;
    let refused = fs::write(mount.join("x"), "").expect_err("it is read-only");
    assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    Ok(())
}

/// Checks the file system and mounts it again, as who runs the node would.
fn repair(mount: &Path) -> Result<()> {
    let device = device(mount)?;
    // The name of its file is gone: without this the device would be, too.
    let _held = File::open(&device)?;
    run(Command::new("umount").arg(mount))?;
    let checked = attempt(Command::new("e2fsck").args(["-f", "-y"]).arg(&device))?;
    // 1: errors were found and mended.
    ensure!(matches!(checked.status.code(), Some(0 | 1)), "{checked:?}");
    run(Command::new("mount")
        .args(["-o", "noatime", &device])
        .arg(mount))?;
    Ok(())
}

/// One that can be written to again without having been unmounted: the process
/// that has seen it fail goes on as before.
#[test]
fn what_was_read_only_for_a_while_is_written_to_by_the_same_process() -> Result<()> {
    let scratch = Scratch::new()?;
    let mount = scratch.dir("disk")?;
    let disk = Disk::mount(&mount)?;
    let root = mount.join("root");
    fs::create_dir(&root)?;
    let mut options = quiet(Mode::Fuse);
    options.root = Some(root);
    let rig = Rig::start(&scratch, &options)?;
    rig.check(0)?;
    prepare_for_changes(&rig)?;
    for time in 1..=2 {
        disk.fail(Faults {
            read_only: true,
            ..Faults::default()
        });
        rig.check(0)?;
        rig.check(2 * time)?;
        changes_fail(&rig)?;
        disk.fail(Faults::default());
        rig.check(2 * time + 1)?;
        assert_eq!(rig.said("content is stored again"), time);
        changes_succeed(&rig)?;
        prepare_for_changes(&rig)?;
    }
    rig.check_all()?;
    rig.containerd.unmount(&rig.root)?;
    rig.containerd.forget_images()?;
    rig.daemon.stop()
}
