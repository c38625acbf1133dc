//! Runs the fuzz targets' checks over their corpus, and over what becomes of
//! it by some thousand fixed mutations.

#![allow(clippy::unwrap_used, reason = "a test through and through")]

#[path = "../fuzz/checks.rs"]
#[allow(unreachable_pub, reason = "shared with the fuzz targets")]
mod checks;
#[path = "../fuzz/replay.rs"]
mod replay;

use std::path::Path;

const MUTATIONS: u32 = 400;

fn replay(target: &str, check: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    replay::replay(&corpus.join(target), MUTATIONS, check);
}

#[test]
fn footers() {
    replay("footer", checks::footer);
}

#[test]
fn tocs() {
    replay("toc", checks::toc);
}

#[test]
fn units() {
    replay("decoder", checks::decoder);
}

#[test]
fn tars() {
    replay("tar", checks::tar);
}

#[test]
fn annotations() {
    replay("annotations", checks::annotations);
}

#[test]
fn profiles() {
    replay("profile", checks::profile);
}
