//! Mirrors as `hosts.toml` names them: what one host does not deliver, the
//! next one does, and no reader notices.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sluice_tests::command::{run, text};
use sluice_tests::daemon::{Mode, ON_DEMAND};
use sluice_tests::faulty::{FILES, World};
use sluice_tests::programs::sluice_command;
use sluice_tests::proxy::{Fault, Proxy, Rule};

/// Nothing is fetched but what is read. A stall takes a quarter of the deadline.
fn on_demand() -> String {
    format!("{ON_DEMAND}deadline_seconds = 20\n")
}

/// Puts a mirror before the registry of the world.
fn set_mirror(world: &World, hosts_dir: &Path, mirror: &Proxy) -> Result<()> {
    let directory = hosts_dir.join(world.proxy.host().replace(':', "_") + "_");
    fs::create_dir_all(&directory)?;
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
        world.proxy.host(),
        mirror.host()
    );
    // At once, as whoever changes it should: half a file would be another.
    let new = directory.join("hosts.new");
    fs::write(&new, text)?;
    Ok(fs::rename(new, directory.join("hosts.toml"))?)
}

#[test]
fn reads_go_on_from_the_next_host_whatever_one_does() -> Result<()> {
    let world = World::new("estargz", &on_demand())?;
    let start = || Proxy::start(world.node.registry.host());
    for (mode, mut next) in Mode::ALL.into_iter().zip([0..FILES, 0..FILES]) {
        let hosts_dir = world.node.daemon(mode).hosts_dir();

        // The table of contents is wrong on the mirror, and then a chunk is.
        let mirror = start()?;
        let toc = world.layer.size - 51 - 500;
        mirror.fail_ranges("/blobs/", u64::MAX, Fault::Tamper(toc));
        set_mirror(&world, &hosts_dir, &mirror)?;
        let dir = world.mount(mode)?;
        ensure!(mirror.asked("ns=127.0.0.1%3A") >= 1, "{:?}", mirror.seen());
        let mut read = || -> Result<()> {
            let number = next.next().context("no file is left")?;
            ensure!(world.read(&dir, number)?, "{}", world.log(mode));
            Ok(())
        };
        let mut through = |mirror: &Proxy, what: &str| -> Result<()> {
            set_mirror(&world, &hosts_dir, mirror)?;
            world.proxy.forget();
            read()?;
            let (first, second) = (mirror.asked("/blobs/"), world.proxy.asked("/blobs/"));
            ensure!(second == 1, "{what}: {first} and {second}");
            ensure!((first > 0) == mirror.is_up(), "{what}: {first}");
            Ok(())
        };
        for fault in [
            Fault::Status(503, ""),
            Fault::Status(404, ""),
            Fault::Status(401, ""),
            Fault::Status(429, "Retry-After: 100\r\n"),
            Fault::Close,
            Fault::Truncate(1000),
            Fault::Reset(1000),
            Fault::IgnoreRange,
        ] {
            let mirror = start()?;
            let what = format!("{fault:?}");
            mirror.fail_ranges("/blobs/", u64::MAX, fault);
            through(&mirror, &what)?;
        }
        let stalled = start()?;
        stalled.fail_ranges("/blobs/", u64::MAX, Fault::Stall(1000));
        if mode == Mode::Erofs {
            through(&stalled, "a stall")?;
        }
        let dead = start()?;
        dead.down();
        through(&dead, "a dead host")?;
        dead.up()?;

        // It is asked again some time after it has come back.
        while dead.asked("/blobs/") == 0 {
            std::thread::sleep(Duration::from_millis(250));
            read()?;
        }
        let log = world.log(mode);
        ensure!(log.contains("delivers again"), "{log}");
        ensure!(!log.contains("gets EIO"), "{log}");
    }
    Ok(())
}

#[test]
fn wrong_bytes_of_a_mirror_are_fetched_from_the_next_host() -> Result<()> {
    let world = World::new("zstd-chunked", &on_demand())?;
    let mirror = Proxy::start(world.node.registry.host())?;
    let middle = world.layer.size / 2;
    mirror.schedule(Rule::new(Fault::Tamper(middle)).on("/blobs/"));
    for mode in Mode::ALL {
        set_mirror(&world, &world.node.daemon(mode).hosts_dir(), &mirror)?;
        let dir = world.mount(mode)?;
        mirror.forget();
        world.proxy.forget();
        let outcome = world.read_all(&dir)?;
        ensure!(outcome.iter().all(|complete| *complete), "{outcome:?}");
        let log = world.log(mode);
        ensure!(log.contains("have to be fetched once more"), "{log}");
        ensure!(mirror.asked("/blobs/") > 0, "it was asked first");
        ensure!(world.proxy.asked("/blobs/") > 0, "and then the other");
        world.node.containerd.forget_images()?;
    }
    // What is pulled whole or converted is digested at its end.
    let hosts = world.node.scratch.dir("certs.d")?;
    set_mirror(&world, &hosts, &mirror)?;
    let plain = world.proxy.reference("faulty:plain");
    mirror.heal();
    mirror.schedule(Rule::new(Fault::Tamper(1000)).on("/blobs/"));
    let mut pull = (world.node.containerd).lazy_pull_command(&plain, "overlayfs")?;
    let said = text(pull.arg("--hosts-dir").arg(&hosts))?;
    ensure!(said.contains("1 unpacked"), "{said}");
    let convert = |from: &str, more: &[&Path]| -> Result<Vec<u8>> {
        let to = world.node.scratch.fresh_dir("converted")?;
        let mut command = sluice_command()?;
        command.arg("convert");
        for dir in more {
            command.arg("--hosts-dir").arg(dir);
        }
        run(command.arg(from).arg(format!("oci:{}:v1", to.display())))?;
        Ok(fs::read(to.join("index.json"))?)
    };
    mirror.forget();
    let direct = convert(&world.plain, &[])?;
    let mirrored = convert(&plain, &[&hosts])?;
    ensure!(direct == mirrored, "the conversions differ");
    ensure!(mirror.asked("/blobs/") > 0);
    Ok(())
}
