//! Images whose containers can tell whether every byte of them is right.

use std::io::Read as _;

use anyhow::Result;
use sluice_oci::Digest;

use crate::image::{self, Compression, LayoutWriter, Meta, Noise, Tarball};
use crate::proxy::Proxy;
use crate::{Registry, Scratch};

/// Files of each, beside the programs.
const FILES: u64 = 12;

/// An image of the soak.
pub struct SoakImage {
    /// Its name, through the proxy.
    pub reference: String,
    /// What its data is.
    pub files: Vec<(String, Vec<u8>)>,
}

/// The program that compares every file with its digest.
pub(super) const CHECK: [&str; 4] = ["sha256sum", "--quiet", "--check", "/sums"];

/// Two for each starter, of either format, and one that stays.
pub(super) fn make(
    scratch: &Scratch,
    registry: &Registry,
    proxy: &Proxy,
    starters: usize,
) -> Result<Vec<SoakImage>> {
    (0..=2 * starters as u64)
        .map(|number| {
            let name = format!("soak-{number}:1");
            let files = files(number)?;
            let layout = scratch.fresh_dir("layout")?;
            let mut writer = LayoutWriter::new(&layout)?;
            // The same for all images.
            writer.layer(Compression::None, |to| {
                let mut tar = Tarball::new(to);
                image::add_programs(&mut tar, &["sha256sum"])?;
                tar.finish()
            })?;
            let mut sums = String::new();
            for (name, content) in &files {
                sums += &format!("{}  /{name}\n", Digest::of(content).hex());
            }
            for (layer, half) in files.chunks(FILES as usize / 2).enumerate() {
                writer.layer(Compression::None, |to| {
                    let mut tar = Tarball::new(to);
                    let meta = Meta::mode(0o644);
                    for (name, content) in half {
                        tar.file(name, &meta, content)?;
                    }
                    if layer == 0 {
                        tar.file("sums", &meta, sums.as_bytes())?;
                    }
                    tar.finish()
                })?;
            }
            writer.finish(image::TAG, &CHECK)?;
            let format = ["estargz", "zstd-chunked"][number as usize % 2];
            let chunks = ["--format", format, "--chunk-size", "32768"];
            image::convert(&layout, &registry.reference(&name), &chunks)?;
            let reference = proxy.reference(&name);
            Ok(SoakImage { reference, files })
        })
        .collect()
}

fn files(image: u64) -> Result<Vec<(String, Vec<u8>)>> {
    (0..FILES)
        .map(|file| {
            let mut content = Vec::new();
            let size = 10_000 + file * 25_000;
            Noise((image * FILES + file) << 32)
                .take(size)
                .read_to_end(&mut content)?;
            Ok((format!("data-{file:02}"), content))
        })
        .collect()
}
