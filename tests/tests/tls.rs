//! A registry that speaks TLS and HTTP/2, whose authority `hosts.toml` names.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use sluice_tests::command::{run, text};
use sluice_tests::daemon::Options;
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Tarball};
use sluice_tests::programs::sluice_command;
use sluice_tests::tls::trust;
use sluice_tests::{Containerd, Daemon, Registry, Scratch};

const SLUICE: &str = "sluice";

/// One static program, and files that it does not read.
fn make_image(layout: &Path) -> Result<()> {
    let mut writer = LayoutWriter::new(layout)?;
    let program = fs::read("/sbin/ldconfig")?;
    writer.layer(Compression::Gzip, |to| {
        let mut tar = Tarball::new(to);
        tar.file("ldconfig", &Meta::mode(0o755), &program)?;
        for number in 0..50 {
            let content = format!("{number}").repeat(10_000);
            let path = format!("data-{number}");
            tar.file(&path, &Meta::mode(0o644), content.as_bytes())?;
        }
        tar.finish()
    })?;
    writer.finish(image::TAG, &["/ldconfig", "--version"])
}

#[test]
fn images_are_converted_to_it_and_started_from_it() -> Result<()> {
    let scratch = Scratch::new()?;
    let (registry, identity) = Registry::start_with_tls(&scratch)?;
    let options = Options {
        traced: true,
        ..Options::default()
    };
    let daemon = Daemon::start(&scratch, &options)?;
    let containerd = Containerd::start_with(&scratch, &[(SLUICE, &daemon)])?;
    let hosts = scratch.fresh_dir("certs.d")?;
    for dir in [&hosts, &daemon.hosts_dir()] {
        trust(dir, registry.host(), &identity.authority)?;
    }
    let layout = scratch.fresh_dir("layout")?;
    make_image(&layout)?;
    let image = registry.reference("app:lazy");
    run(sluice_command()?
        .arg("convert")
        .arg("--hosts-dir")
        .arg(&hosts)
        .arg(format!("oci:{}:{}", layout.display(), image::TAG))
        .arg(&image))?;
    let mut pull = containerd.lazy_pull_command(&image, SLUICE)?;
    let said = text(pull.arg("--hosts-dir").arg(&hosts))?;
    ensure!(said.contains("1 layer lazy"), "{said}");
    let ran = text(&mut containerd.run_command(SLUICE, &image, "one", &[]))?;
    ensure!(ran.contains("ldconfig"), "{ran}");
    let log = daemon.log();
    ensure!(log.contains("version=HTTP/2.0"), "{log}");
    ensure!(!log.contains("version=HTTP/1.1"), "{log}");
    // It has no attached profile. That it says so is no reason to ask it in
    // another way, nor to leave it alone.
    for trouble in ["other hosts are asked", "the reader waits"] {
        ensure!(!log.contains(trouble), "{log}");
    }
    Ok(())
}
