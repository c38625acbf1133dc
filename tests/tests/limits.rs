//! What a lazily mounted layer may cost, counted: requests and memory.

use anyhow::{Result, ensure};
use sluice_tests::command::wait_for;
use sluice_tests::daemon::Mode;
use sluice_tests::image::{self, MANY_FILES};
use sluice_tests::node::{Node, snapshotter};
use sluice_tests::proxy::Proxy;

const MEMORY: u64 = 40 << 20;
/// A daemon that has nothing to do.
const IDLE: u64 = 20 << 20;
/// What a mounted layer takes of its own: a quarter of a mebibyte, and what
/// the first layer leaves behind in allocator, pools and tables.
const A_LAYER: u64 = (256 << 10) + (3 << 20);

#[test]
fn a_layer_of_100_000_files_takes_one_request_and_little_memory() -> Result<()> {
    let more = "[prefetch]\nenabled = false\n[background]\nenabled = false\n";
    let node = Node::start(more)?;
    let proxy = Proxy::start(node.registry.host())?;
    let many = image::many()?;
    for (format, mode) in [("estargz", Mode::Erofs), ("zstd-chunked", Mode::Fuse)] {
        let process = node.daemon(mode).process();
        let idle = process.anonymous_bytes()?;
        ensure!(idle <= IDLE, "{mode:?}: an idle daemon has {idle} bytes");
        let direct = node.convert(&many, format, &format!("many:{format}"))?;
        let layer = node.registry.manifest(&direct)?.layers.remove(0);
        let reference = proxy.reference(&format!("many:{format}"));
        (node.containerd).lazy_pull(&reference, snapshotter(mode))?;
        let dir = (node.containerd).mount(&reference, snapshotter(mode))?;
        let requests = proxy.requests(&layer.digest.to_string());
        // Its labels say where the table of contents is.
        ensure!(requests == 1, "{format}: {:#?}", proxy.seen());
        let bytes = proxy.bytes(&layer.digest.to_string());
        ensure!(bytes < layer.size, "{bytes} of {} were fetched", layer.size);
        let entries = std::fs::read_dir(dir.join("many/huge"))?.count();
        ensure!(
            entries as u64 == u64::from(MANY_FILES / 5),
            "{entries} entries"
        );
        let memory = process.resident_bytes()?;
        ensure!(memory <= MEMORY, "{format}: the daemon has {memory} bytes");
        // Its chunks are added to the node's index in the background.
        let own = wait_for("the layer to take little memory", || {
            let own = process.anonymous_bytes()?.saturating_sub(idle);
            Ok((own <= A_LAYER).then_some(own))
        })?;
        println!(
            "{format}: {bytes} bytes, {memory} bytes of memory, {idle} of \
             them when idle, {own} for the layer, at most {}",
            process.peak_bytes()?
        );
        node.containerd.unmount(&dir)?;
    }
    Ok(())
}
