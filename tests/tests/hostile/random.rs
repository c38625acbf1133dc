//! Hostile layers by the generator of the layer crate's property tests, the
//! same every time.

use anyhow::{Result, anyhow};
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;
use sluice_layer::Format;

use crate::layer::{Content, Layer, Outcome};

#[path = "../../../layer/tests/hostile/generator.rs"]
mod generator;

/// So many, of both formats.
pub(crate) fn layers(count: usize) -> Result<Vec<Layer>> {
    let mut runner = TestRunner::deterministic();
    (0..count)
        .map(|number| {
            let format = [Format::Estargz, Format::ZstdChunked][number % 2];
            let content = Content::new(format, &format!("random-{number}"))?;
            let blob = generator::Blob {
                name: content.name.clone(),
                offset: content.offset,
                size: content.file.len() as u64,
                digest: sluice_oci::Digest::of(&content.file).to_string(),
                end: content.bytes.len() as u64,
            };
            let json = generator::toc(blob)
                .new_tree(&mut runner)
                .map_err(|reason| anyhow!("{reason}"))?
                .current();
            content.with_json(&json, Outcome::Any)
        })
        .collect()
}
