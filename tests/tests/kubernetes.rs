//! Pulling as the kubelet does: through containerd's CRI plugin, which tells
//! the snapshotter by labels which layer of which image it wants.

use anyhow::{Result, ensure};
use sluice_tests::cri::Cri;
use sluice_tests::daemon::{Daemon, Options};
use sluice_tests::programs::sluice_command;
use sluice_tests::{Registry, Scratch, command, image};

/// A daemon and a containerd of its own.
fn start(scratch: &Scratch) -> Result<(Daemon, Cri)> {
    let daemon = Daemon::start(scratch, &Options::default())?;
    let cri = Cri::start(scratch, &daemon)?;
    Ok((daemon, cri))
}

#[test]
fn the_kubelets_pull_is_lazy_and_falls_back() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let (daemon, cri) = start(&scratch)?;
    let odd = image::odd()?;
    let plain = registry.push(odd.layout(), image::TAG, "odd:plain")?;

    for format in ["estargz", "zstd-chunked"] {
        let lazy = registry.reference(&format!("odd:{format}"));
        command::run(
            sluice_command()?
                .args(["convert", "--format", format, &odd.source()])
                .arg(&lazy),
        )?;
        let known = cri.pull(&lazy)?;
        ensure!(known.starts_with("sha256:"), "{known}");
        for layer in registry.manifest(&lazy)?.layers {
            let directory = daemon.root().join("layers").join(layer.digest.hex());
            ensure!(
                directory.join("meta.erofs").exists(),
                "{} of {lazy} is not lazy:\n{}",
                layer.digest,
                daemon.log()
            );
            let blob = cri.blob(&layer.digest.hex());
            ensure!(!blob.exists(), "containerd downloaded {}", layer.digest);
        }
        ensure!(
            !daemon.log().contains("unpacked as usual"),
            "{}",
            daemon.log()
        );
    }

    // The same image unconverted is unpacked, and the log says why; on a node
    // of its own, for this one has the content already.
    let (daemon, cri) = start(&scratch)?;
    cri.pull(&plain)?;
    let layers = registry.manifest(&plain)?.layers;
    let log = daemon.log();
    let unpacked = log
        .lines()
        .filter(|line| line.contains("unpacked as usual"));
    let told = unpacked
        .clone()
        .filter(|line| line.contains("sluice convert"));
    ensure!(unpacked.count() == layers.len(), "{log}");
    ensure!(told.count() == layers.len(), "{log}");
    Ok(())
}
