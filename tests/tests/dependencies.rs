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

/// Between files, so that none comes along with another.
const BETWEEN: u64 = 300_000;

const LIB: &str = "usr/lib/python3.11";

/// Modules, what they import, and whether that is fetched when the first is
/// read: three steps are made.
const MODULES: [(&str, &str, bool); 7] = [
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
    ("usr/lib/python3.11/beyond/__init__.py", "\n", false),
    ("app/unused/__init__.py", "\n", false),
];

#[test]
fn modules_are_there_before_they_are_imported() -> Result<()> {
    let node = Node::start("[background]\nenabled = false\n")?;
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
