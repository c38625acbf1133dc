//! `sluice mount`: a whole image without containerd.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use sluice_tests::command::wait_for;
use sluice_tests::daemon::Mode;
use sluice_tests::tree::{Times, compare_but, root_time};
use sluice_tests::{Containerd, Process, Registry, Scratch, command, image, programs};

/// An image in a registry, converted and as it was.
struct Rig {
    scratch: Scratch,
    registry: Registry,
    plain: String,
    lazy: String,
}

impl Rig {
    fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        let odd = image::odd()?;
        let plain = registry.push(odd.layout(), image::TAG, "odd:plain")?;
        let lazy = registry.reference("odd:lazy");
        command::run(
            programs::sluice_command()?
                .args(["convert", "--plain-http", &odd.source()])
                .arg(&lazy),
        )?;
        Ok(Self {
            scratch,
            registry,
            plain,
            lazy,
        })
    }

    fn command(&self, reference: &str, target: &Path) -> Result<Command> {
        let mut command = programs::sluice_command()?;
        command
            .args(["mount", "--plain-http", reference])
            .arg(target);
        Ok(command)
    }

    /// Starts a mount and waits until it says that it is there.
    fn mount(&self, name: &str, command: Command) -> Result<Process> {
        let process = self.scratch.spawn(name, command)?;
        wait_for("sluice mount", || {
            ensure!(process.is_running(), "it ended: {}", process.log());
            Ok(process.log().contains("Ctrl-C unmounts").then_some(()))
        })?;
        Ok(process)
    }
}

fn is_mounted(target: &Path) -> Result<bool> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.contains(&format!(" {} ", target.display())))
}

fn wait_for_end(process: &Process) -> Result<()> {
    wait_for("the end of sluice mount", || {
        Ok((!process.is_running()).then_some(()))
    })
}

#[test]
fn the_odd_image_looks_as_when_containerd_unpacks_it() -> Result<()> {
    let rig = Rig::new()?;
    let containerd = Containerd::start(&rig.scratch)?;
    containerd.pull(&rig.plain, "overlayfs")?;
    let expected = containerd.mount(&rig.plain, "overlayfs")?;
    for mode in Mode::ALL {
        let target = rig.scratch.dir(mode.name())?;
        let mut command = rig.command(&rig.lazy, &target)?;
        command.args(["--mode", mode.name()]);
        let process = rig.mount(mode.name(), command)?;
        // The images' times are those of eStargz: whole seconds.
        let summary = compare_but(&expected, &target, Times::Seconds, root_time)?;
        assert!(summary.entries > 300, "{summary:?}");
        let status = process.stop()?;
        assert_eq!(status.code(), Some(0), "{}", process.log());
        assert!(!is_mounted(&target)?);
        assert_eq!(fs::read_dir(&target)?.count(), 0);
    }
    containerd.unmount(&expected)?;
    Ok(())
}

#[test]
fn it_ends_when_it_should() -> Result<()> {
    let rig = Rig::new()?;
    let target = rig.scratch.dir("mnt")?;
    let root = rig.scratch.path().join("root");
    let mount = |name: &str| {
        let mut command = rig.command(&rig.lazy, &target)?;
        command.arg("--root").arg(&root);
        rig.mount(name, command)
    };

    // In use: the first Ctrl-C waits, until nobody uses it any more.
    let process = mount("waits")?;
    let held = File::open(target.join("changed"))?;
    process.signal(Signal::INT)?;
    wait_for("the message", || {
        Ok(process.log().contains("is in use").then_some(()))
    })?;
    assert!(process.is_running() && is_mounted(&target)?);
    drop(held);
    wait_for_end(&process)?;
    assert!(!is_mounted(&target)?);

    // The second one does not wait.
    let process = mount("insists")?;
    let held = File::open(target.join("changed"))?;
    process.signal(Signal::INT)?;
    wait_for("the message", || {
        Ok(process.log().contains("is in use").then_some(()))
    })?;
    process.signal(Signal::INT)?;
    wait_for_end(&process)?;
    assert!(!is_mounted(&target)?);
    drop(held);

    // Somebody else unmounts.
    let process = mount("let-go")?;
    command::run(Command::new("umount").arg(&target))?;
    wait_for_end(&process)?;

    // A registry that is gone is named.
    rig.registry.process().stop()?;
    let error = command::refusal(&mut rig.command(&rig.lazy, &target)?)?;
    assert!(error.contains(rig.registry.host()), "{error}");
    Ok(())
}

#[test]
fn refusals_name_the_thing_and_the_remedy() -> Result<()> {
    let rig = Rig::new()?;
    let target = rig.scratch.dir("mnt")?;
    let none = rig.scratch.path().join("none");
    let refusal = |reference: &str, target: &Path, parts: &[&str]| -> Result<()> {
        let error = command::refusal(&mut rig.command(reference, target)?)?;
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.starts_with("sluice: "), "{error}");
        for part in parts {
            assert!(error.contains(part), "'{part}' is not in: {error}");
        }
        Ok(())
    };
    refusal(&rig.plain, &target, &[&rig.plain, "sluice convert"])?;
    let missing = rig.registry.reference("odd:missing");
    refusal(&missing, &target, &["odd:missing", "404"])?;
    let nowhere = none.display().to_string();
    refusal(&rig.lazy, &none, &[&nowhere, "No such file"])?;
    assert!(!is_mounted(&target)?);
    Ok(())
}
