//! What a pull tells: a line a layer, bars for downloads on a terminal, and
//! a summary.

use std::time::Duration;

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use sluice_oci::Descriptor;

use super::image::Image;
use super::layers::Outcome;
use crate::progress::counted;

/// Where progress goes. Clones draw on the same terminal.
#[derive(Clone, Default)]
pub(crate) struct Report {
    bars: MultiProgress,
}

impl Report {
    /// What is being pulled.
    pub(crate) fn image(&self, image: &Image) {
        self.line(&format!("{}  {}", image.reference, image.manifest_digest));
    }

    /// What became of a layer.
    pub(crate) fn layer(&self, index: usize, all: usize, layer: &Descriptor, outcome: &Outcome) {
        let what = match outcome {
            Outcome::Present => "already there".to_owned(),
            Outcome::Lazy => "lazy".to_owned(),
            Outcome::Unpacked(None) => "unpacked".to_owned(),
            Outcome::Unpacked(Some(reason)) => format!("unpacked ({})", one_line(reason)),
        };
        let number = index + 1;
        let digest = layer.digest;
        let size = HumanBytes(layer.size);
        self.line(&format!("{number}/{all}  {digest}  {size}  {what}"));
    }

    /// A bar for a download; it shows on a terminal alone.
    pub(crate) fn download(&self, layer: &Descriptor) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::new(layer.size));
        let style = "{prefix:.dim} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_prefix(layer.digest.hex()[..12].to_owned());
        bar
    }

    /// The end, and how to go on.
    pub(crate) fn done(
        &self,
        image: &Image,
        outcomes: &[Outcome],
        snapshotter: &str,
        took: Duration,
    ) {
        let layers = image.manifest.layers.iter().zip(outcomes);
        let (mut lazy, mut downloaded, mut bytes) = (0, 0, 0);
        for (layer, outcome) in layers {
            match outcome {
                Outcome::Lazy => lazy += 1,
                Outcome::Unpacked(_) => {
                    downloaded += 1;
                    bytes += layer.size;
                }
                Outcome::Present => {}
            }
        }
        let size: u64 = image.manifest.layers.iter().map(|layer| layer.size).sum();
        let present = outcomes.len() - lazy - downloaded;
        self.line(&format!(
            "pulled in {:.2} s: {} lazy, {downloaded} unpacked, {present} already there; \
             {} of {} downloaded",
            took.as_secs_f64(),
            counted(lazy, "layer"),
            HumanBytes(bytes),
            HumanBytes(size),
        ));
        self.line(&format!(
            "run it: ctr run --rm --snapshotter {snapshotter} {} ID [COMMAND]",
            image.reference
        ));
    }

    fn line(&self, text: &str) {
        self.bars.suspend(|| println!("{text}"));
    }
}

fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
