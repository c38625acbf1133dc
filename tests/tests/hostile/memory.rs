//! What hostile images may cost in memory, however many there are.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::json;
use sluice_layer::Format;
use sluice_oci::Digest;
use sluice_tests::daemon::{Mode, ON_DEMAND};
use sluice_tests::node::{Node, snapshotter};

use crate::blobs::compress;
use crate::layer::{Content, Outcome};
use crate::push;

/// The daemon's budgets in the tests below.
const TOC_MEMORY: u64 = 64 << 20;
const FETCH_MEMORY: u64 = 64 << 20;
/// What comes on top: stacks, gRPC, what the allocator keeps.
const SURPLUS: u64 = 32 << 20;

fn start() -> Result<Node> {
    let mib = |bytes: u64| bytes >> 20;
    Node::start(&format!(
        "{ON_DEMAND}toc_memory_mib = {}\nmemory_mib = {}\n",
        mib(TOC_MEMORY),
        mib(FETCH_MEMORY)
    ))
}

/// Eight layers of one image, each with a TOC of a million entries, are opened
/// at once; each alone would take more than the budget.
#[test]
fn a_million_entries_eight_times_take_no_more_than_the_budget() -> Result<()> {
    let node = start()?;
    let entries: Vec<_> = (0..1_000_000)
        .map(|number| format!(r#"{{"name":"{number}","type":"dir"}}"#))
        .collect();
    let json = format!(r#"{{"version":1,"entries":[{}]}}"#, entries.join(","));
    let mut layers = Vec::new();
    for number in 0..8 {
        let format = [Format::ZstdChunked, Format::Estargz][number % 2];
        let content = Content::new(format, &format!("million-{number}"))?;
        let outcome = Outcome::Unpacked("raise toc_memory_mib");
        layers.push(content.with_json(json.as_bytes(), outcome)?);
    }
    let reference = push(&node, "million:entries", &layers)?;
    let mode = Mode::Erofs;
    let process = node.daemon(mode).process();
    let before = process.resident_bytes()?;
    process.peak_bytes()?;
    (node.containerd).lazy_pull(&reference, snapshotter(mode))?;
    let peak = process.peak_bytes()?;
    println!("{before} bytes before, {peak} at most");
    let log = node.daemon(mode).log();
    for layer in &layers {
        let digest = Digest::of(&layer.blob).to_string();
        let refused = log.lines().any(|line| {
            line.contains("cannot be lazy")
                && line.contains(&digest)
                && line.contains("raise toc_memory_mib")
        });
        ensure!(refused, "{}: {log}", layer.name);
    }
    ensure!(
        peak <= before + TOC_MEMORY + SURPLUS,
        "{before} bytes became {peak}"
    );
    Ok(())
}

/// Small chunks that decode to 60 MiB each, read at once, are decoded one
/// after the other.
#[test]
fn chunks_that_decode_to_much_wait_for_each_other() -> Result<()> {
    const SIZE: usize = 60 << 20;
    const FILES: usize = 6;
    let node = start()?;
    let zeros = vec![0; SIZE];
    let digest = Digest::of(&zeros);
    let bombs = [Format::Estargz, Format::ZstdChunked].map(|format| compress(format, &zeros));
    drop(zeros);
    for ((format, bomb), mode) in [Format::Estargz, Format::ZstdChunked]
        .into_iter()
        .zip(bombs)
        .zip(Mode::ALL)
    {
        let mut content = Content::new(format, &format!("bombs-{}", mode.name()))?;
        let mut entries = vec![content.honest()];
        for number in 0..FILES {
            let at = content.bytes.len();
            content.bytes.extend(&bomb);
            let more = json!({
                "size": SIZE, "offset": at, "digest": digest, "chunkDigest": digest,
            });
            entries.push(content.entry(&content.path(&format!("bomb-{number}")), more));
        }
        let layer = content.with(&entries, Outcome::Any)?;
        let reference = push(&node, &format!("bombs:{}", mode.name()), &[layer])?;
        let dir = node.mount_lazily(&reference, mode)?;
        let process = node.daemon(mode).process();
        let before = process.resident_bytes()?;
        process.peak_bytes()?;
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..FILES)
                .map(|number| {
                    let path = dir.join(format!("bombs-{}/bomb-{number}", mode.name()));
                    scope.spawn(move || -> Result<()> {
                        let mut byte = [1];
                        File::open(&path)?
                            .read_exact_at(&mut byte, 1000)
                            .with_context(|| path.display().to_string())?;
                        ensure!(byte == [0], "wrong byte");
                        Ok(())
                    })
                })
                .collect();
            readers.into_iter().try_for_each(|reader| {
                reader
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("a reader panicked")))
            })
        })?;
        let peak = process.peak_bytes()?;
        println!("{mode:?}: {before} bytes before, {peak} at most");
        ensure!(
            peak <= before + FETCH_MEMORY + SURPLUS,
            "{mode:?}: {before} bytes became {peak}"
        );
        node.containerd.unmount(&dir)?;
    }
    Ok(())
}
