//! What goes wrong between a node and its registry gives a clear error and
//! never a wrong byte, and what goes wrong for a moment gives none at all.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sluice_tests::command::{self, wait_for};
use sluice_tests::daemon::{Mode, ON_DEMAND};
use sluice_tests::faulty::{FILES, World, file_name};
use sluice_tests::node::snapshotter;
use sluice_tests::proxy::{Access, Fault, Proxy};
use sluice_tests::tree::{self, Times};

/// Failures come soon.
const SOON: u32 = 3;

/// Nothing is fetched but what a reader asks for.
fn with_deadline(seconds: u32) -> String {
    format!("{ON_DEMAND}deadline_seconds = {seconds}\n")
}

const FORMATS: [&str; 2] = ["estargz", "zstd-chunked"];

#[test]
fn a_tampered_chunk_is_never_served() -> Result<()> {
    for format in FORMATS {
        let world = World::new(format, &with_deadline(SOON))?;
        for mode in Mode::ALL {
            let dir = world.mount(mode)?;
            world.fail(u64::MAX, Fault::Tamper(world.layer.size / 2));
            let outcome = world.read_all(&dir)?;
            let failed = outcome.iter().filter(|complete| !**complete).count();
            ensure!(failed == 1, "one chunk of one file is bad: {outcome:?}");
            let log = world.log(mode);
            let named = log.contains(&world.layer.digest.to_string());
            ensure!(named, "the log does not name the layer:\n{log}");
            // Nothing of it was kept: the file is whole once the registry is.
            world.proxy.heal();
            for number in 0..FILES {
                world.read_in_the_end(&dir, number)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_chunk_tampered_once_is_fetched_again() -> Result<()> {
    let world = World::new("estargz", &with_deadline(SOON))?;
    for mode in Mode::ALL {
        let dir = world.mount(mode)?;
        world.fail(1, Fault::Tamper(world.layer.size / 2));
        let outcome = world.read_all(&dir)?;
        ensure!(outcome.iter().all(|complete| *complete), "{outcome:?}");
        world.proxy.heal();
    }
    Ok(())
}

/// The table of contents or the footer broken: the layer is not lazy, and
/// unpacked as usual where the blob itself is whole.
#[test]
fn a_tampered_toc_or_footer_is_unpacked_instead() -> Result<()> {
    for format in FORMATS {
        let world = World::new(format, &with_deadline(SOON))?;
        let unpacked = world.node.containerd.yardstick(&world.plain)?;
        let toc = match world
            .layer
            .annotations
            .get("io.containers.zstd-chunked.manifest-position")
        {
            // offset:compressed length:length:type
            Some(position) => {
                let mut numbers = position.split(':').map(str::parse::<u64>);
                let mut next = || {
                    numbers
                        .next()
                        .context("too few numbers")?
                        .context("no number")
                };
                next()? + next()? / 2
            }
            None => world.layer.size - 51 - 500,
        };
        // The footer is read where no annotation says where the TOC is.
        let direct = world.node.registry.reference("faulty:lazy");
        let registry = &world.node.registry;
        registry.push_changed(&world.node.scratch, &direct, "faulty:footer", |manifest| {
            let annotations = &mut manifest.layers[0].annotations;
            annotations.retain(|key, _| !key.ends_with("position"));
        })?;
        let footer = (Mode::Fuse, "faulty:footer", world.layer.size - 20);
        for (mode, name, offset) in [(Mode::Erofs, "faulty:lazy", toc), footer] {
            let reference = world.proxy.reference(name);
            world.fail(u64::MAX, Fault::Tamper(offset));
            (world.node.containerd).lazy_pull(&reference, snapshotter(mode))?;
            let log = world.log(mode);
            ensure!(
                log.contains(&world.layer.digest.to_string()) && log.contains("cannot be lazy"),
                "no reason in the log:\n{log}"
            );
            let mounted = (world.node.containerd).mount(&reference, snapshotter(mode))?;
            tree::compare_but(&unpacked, &mounted, Times::Seconds, |path, what| {
                let own = ["stargz.index.json", ".no.prefetch.landmark"];
                tree::root_time(path, what) || own.iter().any(|name| path == Path::new(name))
            })?;
            world.proxy.heal();
        }
    }
    Ok(())
}

/// Where the blob is broken for everyone, the pull says so and keeps nothing.
#[test]
fn a_tampered_blob_or_manifest_is_refused() -> Result<()> {
    let world = World::new("estargz", &with_deadline(SOON))?;
    let images = || (world.node.containerd).ctr_text(&["images", "list", "--quiet"]);
    let refusal = |reference: &str| -> Result<String> {
        let name = snapshotter(Mode::Erofs);
        let said =
            command::refusal(&mut world.node.containerd.lazy_pull_command(reference, name)?)?;
        ensure!(images()?.is_empty(), "an image was kept: {}", images()?);
        Ok(said)
    };

    let toc = world.layer.size - 51 - 500;
    world.proxy.fail("/blobs/", u64::MAX, Fault::Tamper(toc));
    let said = refusal(&world.reference)?;
    let layer = world.layer.digest.to_string();
    ensure!(said.contains(&layer), "the layer is not named:\n{said}");
    world.proxy.heal();

    let manifest = world.node.registry.manifest(&world.reference)?;
    let bytes = std::fs::read(world.node.registry.blob_file(&manifest_digest(&world)?))?;
    ensure!(serde_json::from_slice::<sluice_oci::Manifest>(&bytes)? == manifest);
    let text = String::from_utf8(bytes)?.replacen("linux", "Linux", 1) + " ";
    let replaced = Fault::Replace(text.into_bytes());
    world.proxy.fail("/manifests/", u64::MAX, replaced);
    let digest = manifest_digest(&world)?;
    let by_digest = world.proxy.reference(&format!("faulty@{digest}"));
    let said = refusal(&by_digest)?;
    ensure!(said.contains(&digest), "the manifest is not named:\n{said}");
    world.proxy.heal();

    // A registry that never delivers the table of contents holds up nobody.
    world.fail(u64::MAX, Fault::Stall(0));
    (world.node.containerd).lazy_pull(&world.reference, snapshotter(Mode::Fuse))?;
    let log = world.log(Mode::Fuse);
    let reason = format!("layer {layer} cannot be lazy: the registry did not deliver");
    ensure!(log.contains(&reason), "{log}");
    Ok(())
}

fn manifest_digest(world: &World) -> Result<String> {
    command::text(
        std::process::Command::new("skopeo")
            .args(["--insecure-policy", "inspect", "--no-tags"])
            .args(["--format", "{{.Digest}}", "--tls-verify=false"])
            .arg(format!(
                "docker://{}",
                world.node.registry.reference("faulty:lazy")
            )),
    )
}

#[test]
fn what_fails_for_a_moment_is_not_noticed() -> Result<()> {
    // A stall takes a quarter of the deadline.
    let world = World::new("estargz", &with_deadline(20))?;
    let (mode, mut next) = (Mode::Erofs, 0..FILES);
    let dir = world.mount(mode)?;
    for fault in [
        Fault::Status(500, ""),
        Fault::Status(503, ""),
        Fault::Status(429, "Retry-After: 1\r\n"),
        Fault::Close,
        Fault::Truncate(0),
        Fault::Truncate(100_000),
        Fault::Reset(100_000),
        Fault::Delay(Duration::from_millis(500)),
        Fault::Slow(Duration::from_millis(5)),
        Fault::Stall(50_000),
    ] {
        let number = next.next().context("no file is left")?;
        world.fail(1, fault.clone());
        let complete = world.read(&dir, number)?;
        ensure!(complete, "{fault:?} failed a read:\n{}", world.log(mode));
        world.proxy.heal();
    }
    Ok(())
}

#[test]
fn what_fails_for_good_fails_the_read_and_nothing_else() -> Result<()> {
    let world = World::new("zstd-chunked", &with_deadline(SOON))?;
    for (mode, mut next) in Mode::ALL.into_iter().zip([0..FILES, 0..FILES]) {
        let dir = world.mount(mode)?;
        let first = next.next().context("no file is left")?;
        ensure!(world.read(&dir, first)?, "the first file");
        for fault in [
            Fault::Status(401, ""),
            Fault::Status(403, ""),
            Fault::Status(404, ""),
            Fault::Status(416, ""),
            Fault::Status(429, "Retry-After: 1\r\n"),
            Fault::Status(500, ""),
            Fault::IgnoreRange,
            Fault::Close,
            Fault::Truncate(100),
            Fault::Stall(100),
        ] {
            let number = next.next().context("no file is left")?;
            world.fail(u64::MAX, fault.clone());
            let logged = world.log(mode).len();
            let complete = world.read(&dir, number)?;
            ensure!(!complete, "{fault:?} was not noticed");
            // What is here still is, and the log says what is wrong.
            ensure!(world.read(&dir, first)?, "after {fault:?}");
            let log = world.log(mode).split_off(logged);
            let named = log.contains(&world.layer.digest.to_string());
            ensure!(named, "{fault:?}: the log does not name the layer:\n{log}");
            // Once, however many readers and tries there were.
            let lines = log.lines().filter(|line| line.contains("gets EIO"));
            let lines: Vec<_> = lines.collect();
            let path = format!("path=/{}", file_name(number));
            ensure!(
                lines.len() == 1 && lines[0].contains(&path),
                "{fault:?}: {lines:?}"
            );
            world.proxy.heal();
            world
                .read_in_the_end(&dir, number)
                .with_context(|| format!("{fault:?} left something behind"))?;
        }
    }
    Ok(())
}

/// The registry's process ends and is started again.
#[test]
fn an_outage_is_waited_for_and_readers_can_be_killed_meanwhile() -> Result<()> {
    let world = World::new("estargz", &with_deadline(300))?;
    let reference = world.node.registry.reference("faulty:lazy");
    for mode in Mode::ALL {
        let dir = world.mount_from(&reference, mode)?;
        ensure!(world.read(&dir, 0)?);
        world.node.registry.process().kill()?;
        let logged = world.log(mode).len();
        let log = |world: &World| world.log(mode).split_off(logged);
        std::thread::scope(|scope| -> Result<()> {
            let reader = |number| {
                let (world, dir) = (&world, &dir);
                scope.spawn(move || world.read(dir, number))
            };
            let readers: Vec<_> = (1..6).map(reader).collect();
            let mut doomed = Command::new("cat")
                .arg(dir.join(file_name(10)))
                .stdout(Stdio::null())
                .spawn()?;
            wait_for("readers that wait", || {
                Ok(log(&world).contains("the reader waits").then_some(()))
            })?;
            // What is here is served, and whoever waits can be killed.
            ensure!(world.read(&dir, 0)?);
            ensure!(doomed.try_wait()?.is_none(), "it waits, too");
            doomed.kill()?;
            doomed.wait()?;
            ensure!(readers.iter().all(|reader| !reader.is_finished()));
            world.node.registry.start_again()?;
            for reader in readers {
                let complete = reader.join().expect("a reader does not panic")?;
                ensure!(complete, "{}", log(&world));
            }
            Ok(())
        })?;
        // Readers have their bytes a moment before that is logged.
        wait_for("the end of the outage to be told", || {
            Ok(log(&world).contains("is fetched again").then_some(()))
        })?;
        let log = log(&world);
        let told = |text: &str| log.lines().filter(|line| line.contains(text)).count();
        ensure!(told("refused") == 1, "once for a cause:\n{log}");
        ensure!(told("gets EIO") == 0, "{log}");
    }
    Ok(())
}

/// Tokens, passwords and redirects that are no longer good.
#[test]
fn what_changes_in_the_middle_is_followed() -> Result<()> {
    let world = World::new("estargz", &with_deadline(300))?;
    let (mode, mut next) = (Mode::Erofs, 1..FILES);
    let dir = world.mount(mode)?;
    ensure!(world.read(&dir, 0)?);
    let mut read = || -> Result<()> {
        let number = next.next().context("no file is left")?;
        ensure!(world.read(&dir, number)?, "{}", world.log(mode));
        Ok(())
    };

    // An expired token is renewed without a reader's noticing.
    world.proxy.demand(Access::Token);
    read()?;
    world.proxy.expire_tokens();
    read()?;
    assert_eq!(world.proxy.asked("/token"), 2);
    ensure!(!world.log(mode).contains("the reader waits"));

    // A redirect is followed, without credentials, and renewed when it has
    // expired.
    let store = Proxy::start(world.node.registry.host())?;
    let redirect = |signature: &str| {
        world.proxy.heal();
        let redirect = Fault::Redirect {
            to: store.host(),
            query: format!("signature={signature}"),
        };
        world.fail(u64::MAX, redirect);
    };
    redirect("one");
    read()?;
    let before = world.proxy.asked("/blobs/");
    read()?;
    assert_eq!(world.proxy.asked("/blobs/"), before, "it is remembered");
    store.fail("signature=one", u64::MAX, Fault::Status(403, ""));
    redirect("two");
    read()?;
    ensure!(store.asked("signature=two") == 1);
    ensure!(store.seen().iter().all(|seen| !seen.authorized));
    ensure!(!world.log(mode).contains("the reader waits"));
    world.proxy.heal();
    store.fail("signature=two", u64::MAX, Fault::Status(403, ""));

    // Credentials are read again when they are refused. Here the registry has
    // the new ones before the node does.
    let log_in = |password: &str| {
        let json = format!(
            r#"{{"auths": {{"{}": {{"auth": "{password}"}}}}}}"#,
            world.proxy.host()
        );
        let file = world.node.daemon(mode).docker_config();
        let new = file.with_extension("new");
        fs::write(&new, json)?;
        fs::rename(&new, &file)
    };
    log_in("bWU6b25l")?;
    world.proxy.demand(Access::Password("bWU6b25l".to_owned()));
    read()?;
    ensure!(!world.log(mode).contains("the reader waits"));
    world.proxy.demand(Access::Password("bWU6dHdv".to_owned()));
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(&mut read);
        wait_for("a reader that waits", || {
            Ok(world.log(mode).contains("the reader waits").then_some(()))
        })?;
        ensure!(!reader.is_finished());
        log_in("bWU6dHdv")?;
        reader.join().expect("a reader does not panic")
    })?;
    let log = world.log(mode);
    ensure!(
        log.contains("docker login") && !log.contains("bWU6"),
        "{log}"
    );
    Ok(())
}
