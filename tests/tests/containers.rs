//! Containers really run from lazily mounted layers, write, become images,
//! and outlive the daemon and the registry.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use sluice_tests::daemon::Mode;
use sluice_tests::node::{Node, snapshotter};
use sluice_tests::tree::{self, Times};
use sluice_tests::{command, figures, image};

/// Everything that a container does to its file system: new, changed,
/// removed, replaced, renamed, linked, with attributes.
const CHANGES: &str = r"
set -eu
echo new > /new
mkdir -p /dir/below && echo deep > /dir/below/file
echo appended >> /etc/passwd
rm /etc/hostname
rm -r /usr/share/doc && mkdir /usr/share/doc && echo opaque > /usr/share/doc/only
mv /etc/issue /etc/issue-renamed
chmod 4711 /bin/true
chown 12:34 /etc/group
ln /etc/debian_version /etc/debian_version-again
ln -s new /link
mkfifo /fifo
touch -d '2001-02-03 04:05:06' /new
sync
cat /etc/passwd | tail -n 1
";

#[test]
fn a_container_writes_and_becomes_an_image() -> Result<()> {
    let node = Node::start("")?;
    let base = image::base()?;
    let lazy = node.convert(&base, "estargz", "base:lazy")?;
    for mode in Mode::ALL {
        let name = snapshotter(mode);
        node.pull_lazily(&lazy, mode)?;
        let written = node.containerd.ctr_text(&[
            "run",
            "--snapshotter",
            name,
            &lazy,
            name,
            "sh",
            "-c",
            CHANGES,
        ])?;
        ensure!(written == "appended", "the container wrote: {written}");

        // The kubelet is told what the container has written, and of it alone.
        let mounts = ["snapshots", "--snapshotter", name, "mounts", "/none", name];
        let mounts = node.containerd.ctr_text(&mounts)?;
        let upper = mounts.split(',').find_map(|o| o.strip_prefix("upperdir="));
        let upper = Path::new(upper.with_context(|| mounts.clone())?);
        let told = node.containerd.usage(name, name)?;
        assert_eq!(told, figures::on_disk(upper)?, "{}", upper.display());
        ensure!(told.1 > 10, "{told:?}");

        // What the container wrote, as a layer, on top of the image.
        let layer = command::run(node.containerd.ctr().args([
            "snapshots",
            "--snapshotter",
            name,
            "diff",
            name,
        ]))?;
        let layout = node.scratch.fresh_dir("committed")?;
        command::run(
            Command::new("skopeo")
                .args([
                    "--insecure-policy",
                    "copy",
                    "--quiet",
                    "--src-tls-verify=false",
                ])
                .arg(format!("docker://{lazy}"))
                .arg(format!("oci:{}:{}", layout.display(), image::TAG)),
        )?;
        image::append_layer(&layout, image::TAG, &layer.stdout)?;

        // Once as it is, for containerd to unpack, once for a lazy pull.
        let plain = node
            .registry
            .push(&layout, image::TAG, &format!("committed:{name}"))?;
        let committed = node.registry.reference(&format!("committed:{name}-lazy"));
        image::convert(&layout, &committed, &[])?;
        let below = node.registry.manifest(&lazy)?.layers;
        let above = node.registry.manifest(&committed)?.layers;
        ensure!(above.len() == below.len() + 1, "{above:?}");
        ensure!(above.starts_with(&below), "layers below were made anew");

        let unpacked = node.containerd.yardstick(&plain)?;
        let mounted = node.mount_lazily(&committed, mode)?;
        // The lower layers' landmarks and TOC are files like any other to an
        // ordinary unpack.
        tree::compare_but(&unpacked, &mounted, Times::Seconds, |path, what| {
            let names = [
                ".no.prefetch.landmark",
                ".prefetch.landmark",
                "stargz.index.json",
            ];
            tree::root_time(path, what)
                || (what == "name" && names.iter().any(|name| path == Path::new(name)))
        })?;
        ensure!(!mounted.join("etc/hostname").exists(), "it was removed");
        let docs = std::fs::read_dir(mounted.join("usr/share/doc"))?.count();
        ensure!(
            docs == 1,
            "the directory was replaced, but has {docs} entries"
        );
        node.containerd.unmount(&mounted)?;
        node.containerd.unmount(&unpacked)?;

        let again = command::text(&mut node.containerd.run_command(
            name,
            &committed,
            &format!("{name}-again"),
            &["sh", "-c", "cat /new /dir/below/file; stat -c %a /bin/true"],
        ))?;
        ensure!(
            again == "new\ndeep\n4711",
            "the new container wrote: {again}"
        );
        node.containerd.ctr_text(&["containers", "remove", name])?;
    }
    Ok(())
}

/// With nothing fetched ahead, what a container has read is on the node; the
/// registry and the daemon may go, and the daemon alone comes back.
#[test]
fn what_was_read_is_served_after_a_restart_without_the_registry() -> Result<()> {
    let mut node = Node::start("[prefetch]\nenabled = false\n[background]\nenabled = false\n")?;
    let base = image::base()?;
    let original = node
        .registry
        .push(base.layout(), image::TAG, "base:original")?;
    let unpacked = node.containerd.yardstick(&original)?;
    let lazy = node.convert(&base, "zstd-chunked", "base:lazy")?;
    for mode in Mode::ALL {
        let name = snapshotter(mode);
        let mounted = node.mount_lazily(&lazy, mode)?;
        tree::compare(&unpacked, &mounted, Times::Seconds)?;
        node.containerd.unmount(&mounted)?;
        // A container that stays, to be started again.
        node.containerd.ctr_text(&[
            "run",
            "--snapshotter",
            name,
            &lazy,
            name,
            "sh",
            "-c",
            "echo first >> /kept; cat /kept",
        ])?;
    }
    for daemon in &node.daemons {
        daemon.stop()?;
    }
    node.registry.process().kill()?;
    for daemon in &mut node.daemons {
        daemon.start_again()?;
    }
    for mode in Mode::ALL {
        node.containerd.wait_for_snapshotter(snapshotter(mode))?;
    }
    for mode in Mode::ALL {
        let name = snapshotter(mode);
        let about = || format!("mode {}; log:\n{}", mode.name(), node.daemon(mode).log());
        let mounted = node.containerd.mount(&lazy, name).with_context(about)?;
        tree::compare(&unpacked, &mounted, Times::Seconds).with_context(about)?;
        node.containerd.unmount(&mounted)?;
        let again = node
            .containerd
            .ctr_text(&["tasks", "start", name])
            .with_context(about)?;
        ensure!(again == "first\nfirst", "the container wrote: {again}");
        let fresh = command::text(&mut node.containerd.run_command(
            name,
            &lazy,
            &format!("{name}-fresh"),
            &["python3", "-c", "import json; print(json.dumps([1]))"],
        ))
        .with_context(about)?;
        ensure!(fresh == "[1]", "the container wrote: {fresh}");
    }
    Ok(())
}

/// Removing the images removes everything that they put on the node.
#[test]
fn removing_an_image_leaves_nothing_of_it() -> Result<()> {
    let node = Node::start("")?;
    let odd = image::odd()?;
    let lazy = node.convert(&odd, "estargz", "odd:lazy")?;
    for mode in Mode::ALL {
        node.pull_lazily(&lazy, mode)?;
    }
    node.containerd.forget_images()?;
    for mode in Mode::ALL {
        let root = node.daemon(mode).root();
        command::wait_for("the layers to be removed", || {
            let left = std::fs::read_dir(root.join("layers"))?.count();
            let mounted = sluice_tests::scratch::mount_points(&root);
            let mounted = mounted.iter().any(|m| m.starts_with(root.join("layers")));
            Ok((left == 0 && !mounted).then_some(()))
        })?;
    }
    Ok(())
}
