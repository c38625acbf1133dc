//! Images that say of their layers what is true of others': once all of such a
//! layer is here that is known, and nobody is given it any more.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use sluice_layer::Format;
use sluice_oci::{Digest, media_type};
use sluice_tests::command::{attempt, refusal, run, text, wait_for};
use sluice_tests::containerd::Containerd;
use sluice_tests::cri::{self, Cri};
use sluice_tests::daemon::{Daemon, Mode, ON_DEMAND, Options};
use sluice_tests::image::{self, LayoutWriter};
use sluice_tests::node::{Node, snapshotter};
use sluice_tests::programs::sluice_command;
use sluice_tests::{Registry, Scratch};

use super::layer::{Content, Layer, Outcome};
use super::{push, push_to};

const SETTINGS: &str = "[prefetch]\nenabled = false\n[background]\ndelay_seconds = 0\n";

/// A layer with one file, of which all is true that is said.
fn honest(name: &str) -> Result<Layer> {
    let content = Content::new(Format::ZstdChunked, name)?;
    let entries = [content.directory(), content.honest()];
    content.with(&entries, Outcome::Any)
}

/// Waits until the daemon says of a layer that `what`.
fn wait_for_log(node: &Node, mode: Mode, layer: &Layer, what: &str) -> Result<()> {
    let digest = layer.digest().to_string();
    wait_for(what, || {
        let log = node.daemon(mode).log();
        let told = log
            .lines()
            .any(|line| line.contains(&digest) && line.contains(what));
        Ok(told.then_some(()))
    })
    .with_context(|| format!("the daemon's log:\n{}", node.daemon(mode).log()))
}

/// How the daemon sees a layer.
fn content(node: &Node, mode: Mode, layer: &Layer) -> Result<String> {
    let status = sluice_command()?
        .args(["status", "--json", "--address"])
        .arg(node.daemon(mode).socket())
        .output()?;
    let status: serde_json::Value = serde_json::from_slice(&status.stdout)?;
    let digest = layer.digest().to_string();
    let layers = status["layers"].as_array().context("no layers")?;
    let layer = layers.iter().find(|layer| layer["digest"] == *digest);
    let content = layer.context("the layer is not open")?["content"].as_str();
    Ok(content.unwrap_or_default().to_owned())
}

/// Whether a new view of an image's snapshot can be made.
fn view(containerd: &Containerd, reference: &str, mode: Mode, key: &str) -> Result<String> {
    let top = containerd.top_snapshot(reference)?;
    let view = [
        "snapshots",
        "--snapshotter",
        snapshotter(mode),
        "view",
        key,
        &top,
    ];
    let answer = attempt(containerd.ctr().args(view))?;
    Ok(match answer.status.success() {
        true => String::new(),
        false => String::from_utf8_lossy(&answer.stderr).into_owned(),
    })
}

/// A layer that says that it is `good`, and what its lie is.
fn lying(lie: &str, name: &str, good: &Layer) -> Result<Layer> {
    let liar = match lie {
        // Another layer under its name.
        "content" => Layer {
            diff_id: good.diff_id,
            ..honest(&format!("evil-{name}"))?
        },
        // Its own tar, with a table of contents that says something else.
        _ => {
            let content = Content::new(Format::ZstdChunked, name)?;
            let more = json!({"mode": 0o104755});
            let entries = [
                content.directory(),
                content.entry(&content.path("inside"), more),
            ];
            content.with(&entries, Outcome::Any)?
        }
    };
    ensure!(good.diff_id == liar.diff_id && good.digest() != liar.digest());
    Ok(liar)
}

#[test]
fn a_layer_under_anothers_name_is_given_to_nobody() -> Result<()> {
    let node = Node::start(SETTINGS)?;
    for (mode, lie) in [(Mode::Erofs, "content"), (Mode::Fuse, "tree")] {
        let name = format!("{lie}-{}", mode.name());
        let good = honest(&name)?;
        let liar = lying(lie, &name, &good)?;
        let evil = push(&node, &format!("evil:{name}"), std::slice::from_ref(&liar))?;
        let honest = push(&node, &format!("good:{name}"), std::slice::from_ref(&good))?;
        let containerd = &node.containerd;

        // Before anybody can know: who comes by the daemon gets its own.
        containerd.lazy_pull(&evil, snapshotter(mode))?;
        let pull = containerd.lazy_pull_command_in("elsewhere", &honest, snapshotter(mode));
        let said = text(&mut pull?)?;
        ensure!(said.contains("unpacked"), "{said}");
        // containerd would find what it has verified by itself.
        let forget = [
            "--namespace",
            "elsewhere",
            "images",
            "remove",
            "--sync",
            &honest,
        ];
        let mut ctr = Command::new("ctr");
        run(ctr.arg("--address").arg(containerd.socket()).args(forget))?;
        // In the same namespace containerd would not even ask.
        let refused = refusal(&mut containerd.lazy_pull_command(&honest, snapshotter(mode))?)?;
        let named = [liar.digest().to_string(), evil.clone()];
        ensure!(named.iter().all(|name| refused.contains(name)), "{refused}");

        // Once it is mounted, the rest is downloaded and compared.
        let dir = containerd.mount(&evil, snapshotter(mode))?;
        wait_for_log(&node, mode, &liar, "is not what the image says")?;
        ensure!(content(&node, mode, &liar)? == "contradicted");
        let inside = dir.join(&liar.name).join("inside");
        ensure!(inside.exists(), "who runs goes on");
        let said = view(containerd, &evil, mode, &format!("{name}-again"))?;
        let named = ["pull again", &liar.digest().to_string(), &evil];
        ensure!(named.iter().all(|name| said.contains(name)), "{said}");
        let refused = refusal(&mut containerd.lazy_pull_command(&honest, snapshotter(mode))?)?;
        ensure!(refused.contains("not what it is named for"), "{refused}");

        // The remedy that was told.
        containerd.unmount(&dir)?;
        containerd.forget_images()?;
        let dir = node.mount_lazily(&honest, mode)?;
        wait_for_log(&node, mode, &good, "it is what its image says")?;
        ensure!(content(&node, mode, &good)? == "verified");
        let read = std::fs::read(dir.join(&good.name).join("inside"))?;
        ensure!(read == Content::new(good.format, &good.name)?.file);
        // Now the name is as good as the content.
        run(&mut containerd.lazy_pull_command(&honest, snapshotter(mode))?)?;
        containerd.unmount(&dir)?;
    }
    Ok(())
}

/// What is in the layer's one file.
fn inside(dir: &Path, layer: &Layer) -> Result<Vec<u8>> {
    let path = dir.join(&layer.name).join("inside");
    std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// containerd finds a snapshot by the name that an image gives, and asks the
/// daemon only when a container starts.
#[test]
fn what_containerd_pulls_after_a_liar_starts_as_itself_or_not_at_all() -> Result<()> {
    let mut node = Node::start(ON_DEMAND)?;
    for (mode, lie) in [(Mode::Erofs, "content"), (Mode::Fuse, "tree")] {
        let name = format!("{lie}-{}", mode.name());
        let good = honest(&name)?;
        let liar = lying(lie, &name, &good)?;
        let evil = push(&node, &format!("evil:{name}"), std::slice::from_ref(&liar))?;
        let honest = push(&node, &format!("good:{name}"), std::slice::from_ref(&good))?;

        node.containerd.lazy_pull(&evil, snapshotter(mode))?;
        let evil_dir = node.containerd.mount(&evil, snapshotter(mode))?;
        // The daemon has found out whom to ask, and has to once more.
        node.containerd.restart()?;
        let containerd = &node.containerd;
        containerd.pull(&honest, snapshotter(mode))?;
        let log = node.daemon(mode).log();
        ensure!(
            !log.contains("is not what the image says"),
            "known too early: {log}"
        );

        let run = containerd.run_command(snapshotter(mode), &honest, "honest", &["/program"]);
        let said = refusal(&mut { run })?;
        let named = ["is not what the image says", "pull again", &evil];
        ensure!(named.iter().all(|part| said.contains(part)), "{said}");
        ensure!(said.contains(&liar.digest().to_string()), "{said}");
        let said = view(containerd, &honest, mode, &format!("{name}-view"))?;
        ensure!(said.contains("is not what the image says"), "{said}");
        ensure!(
            !inside(&evil_dir, &liar)?.is_empty(),
            "who runs from the other goes on"
        );

        // The remedy that was told.
        containerd.unmount(&evil_dir)?;
        containerd.forget_images()?;
        containerd.pull(&honest, snapshotter(mode))?;
        let dir = containerd.mount(&honest, snapshotter(mode))?;
        let own = Content::new(good.format, &good.name)?.file;
        ensure!(inside(&dir, &good)? == own);
        containerd.unmount(&dir)?;
        containerd.forget_images()?;
    }
    Ok(())
}

/// An image and its conversion have the same diff IDs, and other blobs.
#[test]
fn an_image_starts_from_its_lazily_mounted_conversion() -> Result<()> {
    let node = Node::start(ON_DEMAND)?;
    let containerd = &node.containerd;
    for mode in Mode::ALL {
        let converted = honest(&format!("converted-{}", mode.name()))?;
        let tar = zstd::decode_all(&converted.blob[..])?;
        ensure!(Digest::of(&tar) == converted.diff_id);
        let layout = node.scratch.fresh_dir("layout")?;
        let mut writer = LayoutWriter::new(&layout)?;
        let none = Default::default();
        writer.raw_layer(media_type::OCI_LAYER, &tar, converted.diff_id, none)?;
        writer.finish(image::TAG, &[])?;
        let original = format!("original:{}", mode.name());
        let original = node.registry.push(&layout, image::TAG, &original)?;
        let lazy = format!("converted:{}", mode.name());
        let lazy = push(&node, &lazy, std::slice::from_ref(&converted))?;

        containerd.lazy_pull(&lazy, snapshotter(mode))?;
        let dir = containerd.mount(&lazy, snapshotter(mode))?;
        ensure!(content(&node, mode, &converted)? == "unknown");
        containerd.unmount(&dir)?;
        containerd.pull(&original, snapshotter(mode))?;
        // Whoever comes first, for nobody says which of them it is.
        let own = Content::new(converted.format, &converted.name)?.file;
        for reference in [&original, &lazy] {
            let dir = containerd
                .mount(reference, snapshotter(mode))
                .with_context(|| format!("the daemon's log:\n{}", node.daemon(mode).log()))?;
            ensure!(content(&node, mode, &converted)? == "verified");
            ensure!(inside(&dir, &converted)? == own, "{reference}");
            containerd.unmount(&dir)?;
        }
    }
    Ok(())
}

#[test]
fn what_the_kubelet_pulls_after_a_liar_starts_as_itself_or_not_at_all() -> Result<()> {
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let options = Options {
        containerd: Some(cri::socket(&scratch, 0)),
        more: ON_DEMAND.to_owned(),
        ..Options::default()
    };
    let daemon = Daemon::start(&scratch, &options)?;
    let cri = Cri::start(&scratch, &daemon)?;
    let good = honest("kubelet")?;
    let liar = lying("content", "kubelet", &good)?;
    let evil = push_to(
        &scratch,
        &registry,
        "evil:kubelet",
        std::slice::from_ref(&liar),
    )?;
    let honest = push_to(&scratch, &registry, "good:kubelet", &[good])?;
    for reference in [&evil, &honest] {
        cri.pull(reference)?;
    }
    let log = daemon.log();
    ensure!(log.matches("served lazily").count() == 1, "{log}");
    let mut ctr = cri.ctr();
    ctr.args(["run", "--rm", "--snapshotter", cri::SNAPSHOTTER]);
    let said = refusal(ctr.args([&honest, "honest", "/program"]))?;
    let named = ["is not what the image says", &liar.digest().to_string()];
    ensure!(named.iter().all(|part| said.contains(part)), "{said}");
    Ok(())
}
