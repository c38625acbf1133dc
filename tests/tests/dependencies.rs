//! What a program is going to load is fetched before it asks for it, on a node
//! that knows nothing of the image.

use std::fs;
use std::io::Read as _;

use anyhow::{Result, ensure};
use sluice_tests::Node;
use sluice_tests::command::{text, wait_for};
use sluice_tests::daemon::Mode;
use sluice_tests::image::{self, Compression, LayoutWriter, Meta, Noise, Tarball};
use sluice_tests::node::snapshotter;
use sluice_tests::proxy::{Fault, Proxy};

/// Between files, so that none comes along with another: more than is guessed
/// around a read, however slow the machine makes the link look.
const BETWEEN: u64 = 1_200_000;
const CONFIGURATION: &str = "[background]\nenabled = false\n[fetch]\nread_ahead_mib = 1\n";

const LIB: &str = "usr/lib/python3.11";

/// Modules, what they import, and whether that is fetched when the first is
/// read: five steps are made.
const MODULES: [(&str, &str, bool); 9] = [
    (
        "app/main.py",
        "import part.one\ndef later():\n    import unused\n",
        true,
    ),
    ("app/part/one.py", "from json import near\n", true),
    ("usr/lib/python3.11/json/__init__.py", "\n", true),
    ("usr/lib/python3.11/json/near.py", "import far\n", true),
    (
        "usr/lib/python3.11/far/__init__.py",
        "import beyond\n",
        true,
    ),
    (
        "usr/lib/python3.11/beyond/__init__.py",
        "import further\n",
        true,
    ),
    (
        "usr/lib/python3.11/further/__init__.py",
        "import out\n",
        true,
    ),
    ("usr/lib/python3.11/out/__init__.py", "\n", false),
    ("app/unused/__init__.py", "\n", false),
];

#[test]
fn modules_are_there_before_they_are_imported() -> Result<()> {
    let node = Node::start(CONFIGURATION)?;
    let layout = node.scratch.dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    // The interpreter's modules are in another layer than the program's.
    for lower in [true, false] {
        writer.layer(Compression::None, |to| {
            let mut tar = Tarball::new(to);
            if lower {
                image::add_programs(&mut tar, &["cat"])?;
            }
            for (at, (name, imports, _)) in MODULES.iter().enumerate() {
                if name.starts_with(LIB) != lower {
                    continue;
                }
                let content = format!("{imports}# this is {name}\n");
                tar.file(name, &Meta::mode(0o644), content.as_bytes())?;
                let mut between = Vec::new();
                Noise((at as u64) << 32)
                    .take(BETWEEN)
                    .read_to_end(&mut between)?;
                tar.file(&format!("srv/{at}/data"), &Meta::mode(0o644), &between)?;
            }
            tar.finish()
        })?;
    }
    writer.finish(image::TAG, &["/usr/bin/cat", "/app/main.py"])?;
    let reference = node.registry.reference("modules:1");
    image::convert(&layout, &reference, &[])?;

    for mode in Mode::ALL {
        node.pull_lazily(&reference, mode)?;
        let name = format!("reads-{}", mode.name());
        let mut start = node
            .containerd
            .run_command(snapshotter(mode), &reference, &name, &[]);
        let output = text(&mut start)?;
        ensure!(output.contains("this is app/main.py"), "{output}");
        // Who has read one of them is gone: the rest comes by itself.
        let there = || -> Result<_> {
            let mut content = Vec::new();
            for layer in node.registry.manifest(&reference)?.layers {
                let dir = node.layer_dir(mode, &layer.digest.hex());
                content.extend(fs::read(dir.join("data"))?);
            }
            let is_there = |name: &str| {
                let line = format!("# this is {name}\n").into_bytes();
                content.windows(line.len()).any(|window| window == line)
            };
            Ok(MODULES.map(|(name, ..)| is_there(name)))
        };
        wait_for("what is imported", || {
            let mut all = MODULES.iter().zip(there()?);
            let come = all.all(|((.., expected), there)| there || !expected);
            Ok(come.then_some(()))
        })?;
        assert_eq!(
            there()?,
            MODULES.map(|(.., expected)| expected),
            "{}",
            mode.name()
        );
    }
    Ok(())
}

/// The head of a program that has a text among its constants.
fn program_that_names(text: &str) -> Vec<u8> {
    const HEADER: usize = 64;
    const SEGMENT: usize = 56;
    let mut file = vec![0; HEADER + SEGMENT];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    // One segment, right behind the header, that is loaded.
    (file[32], file[54], file[56]) = (HEADER as u8, SEGMENT as u8, 1);
    file[HEADER] = 1;
    file.extend([text.as_bytes(), b"\0"].concat());
    file
}

/// What the words of a container's command name is fetched when it is started,
/// whatever the program does with them, and what that names in turn.
#[test]
fn what_a_container_runs_is_there_before_it_is_run() -> Result<()> {
    let node = Node::start(CONFIGURATION)?;
    what_runs_is_there(&node, &node.registry.reference("runs:1"), || Ok(()))
}

/// The same while the registry does not answer whether a profile is attached to
/// the image.
#[test]
fn what_a_container_runs_does_not_wait_for_a_profile() -> Result<()> {
    let node = Node::start(CONFIGURATION)?;
    let proxy = Proxy::start(node.registry.host())?;
    for part_of_path in ["/referrers/", "/manifests/sha256-"] {
        proxy.fail(part_of_path, u64::MAX, Fault::Stall(0));
    }
    what_runs_is_there(&node, &proxy.reference("runs:1"), || {
        let path = "/manifests/sha256-";
        ensure!(
            proxy.requests(path) < proxy.asked(path),
            "the registry has told whether there is a profile"
        );
        Ok(())
    })
}

/// `when_there` is called once all of it has come.
fn what_runs_is_there(
    node: &Node,
    reference: &str,
    when_there: impl Fn() -> Result<()>,
) -> Result<()> {
    let layout = node.scratch.dir("layout")?;
    let mut writer = LayoutWriter::new(&layout)?;
    let interpreter = program_that_names("/etc/interpreter.conf");
    let files: [(&str, &[u8], bool); 7] = [
        ("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", true),
        ("opt/bin/serve", b"#!/usr/bin/interpreter -x\n", true),
        ("usr/bin/interpreter", &interpreter, true),
        ("etc/interpreter.conf", b"among constants\n", true),
        ("etc/other.conf", b"nowhere\n", false),
        ("srv/app/main.conf", b"of the command\n", true),
        ("opt/second/serve", b"not the first in PATH\n", false),
    ];
    writer.layer(Compression::None, |to| {
        let mut tar = Tarball::new(to);
        image::add_programs(&mut tar, &["true"])?;
        for (at, (name, content, _)) in files.iter().enumerate() {
            let mut between = Vec::new();
            Noise((at as u64) << 32)
                .take(BETWEEN)
                .read_to_end(&mut between)?;
            tar.file(&format!("srv/{at}/data"), &Meta::mode(0o644), &between)?;
            tar.file(name, &Meta::mode(0o755), content)?;
        }
        tar.finish()
    })?;
    writer.finish_with(
        image::TAG,
        &serde_json::json!({
            "WorkingDir": "/srv/app",
            "Env": ["PATH=/opt/bin:/opt/second"],
        }),
    )?;
    let pushed = node.registry.reference("runs:1");
    image::convert(&layout, &pushed, &[])?;
    let layers = node.registry.manifest(&pushed)?.layers;
    for mode in Mode::ALL {
        node.pull_lazily(reference, mode)?;
        let name = format!("runs-{}", mode.name());
        let command = ["/usr/bin/true", "serve", "--all", "main.conf"];
        let snapshotter = snapshotter(mode);
        text(
            &mut node
                .containerd
                .run_command(snapshotter, reference, &name, &command),
        )?;
        let data = node.layer_dir(mode, &layers[0].digest.hex()).join("data");
        let there = || -> Result<_> {
            let all = fs::read(&data)?;
            let is_there = |content: &[u8]| all.windows(content.len()).any(|w| w == content);
            Ok(files.map(|(_, content, _)| is_there(content)))
        };
        let expected = files.map(|(.., expected)| expected);
        wait_for("what the container runs", || {
            let come = std::iter::zip(there()?, expected).all(|(there, wanted)| there || !wanted);
            Ok(come.then_some(()))
        })?;
        when_there()?;
        assert_eq!(there()?, expected, "{}", mode.name());
    }
    Ok(())
}
