//! Showing a conversion: a bar on a terminal, plain lines elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use sluice_converter::{Event, LayerOutcome, Progress};
use sluice_oci::Digest;

/// The display that fits standard error.
pub(crate) fn display() -> Arc<dyn Progress> {
    if std::io::stderr().is_terminal() {
        Arc::new(Bars::default())
    } else {
        Arc::new(Lines)
    }
}

/// The digits by which a digest is recognised.
pub(crate) fn short(digest: Digest) -> String {
    digest.hex()[..12].to_owned()
}

/// `1 layer`, `2 layers`.
pub(crate) fn counted(count: usize, thing: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {thing}{plural}")
}

fn image_line(platform: Option<&str>, layers: usize) -> String {
    let layers = counted(layers, "layer");
    match platform {
        Some(platform) => format!("{platform}: {layers}"),
        None => layers,
    }
}

fn layer_line(layer: Digest, outcome: &LayerOutcome) -> String {
    let layer = short(layer);
    match outcome {
        LayerOutcome::Converted { digest, size } => {
            format!(
                "{layer} converted to {}, {}",
                short(*digest),
                HumanBytes(*size)
            )
        }
        LayerOutcome::AlreadySeekable => format!("{layer} is lazily loadable already"),
        LayerOutcome::Kept { why } => format!("{layer} kept as it is: {why}"),
    }
}

fn missing_line(name: &str) -> String {
    format!(
        "warning: no layer holds the prioritized file /{name}; give its path without symbolic links"
    )
}

struct Lines;

impl Progress for Lines {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Image { platform, layers } => eprintln!("{}", image_line(platform, layers)),
            Event::LayerEnds { layer, outcome } => eprintln!("{}", layer_line(layer, outcome)),
            Event::NotFound { name } => eprintln!("{}", missing_line(name)),
            Event::LayerBegins { .. } | Event::LayerRead { .. } => {}
        }
    }
}

#[derive(Default)]
struct Bars {
    all: MultiProgress,
    layers: Mutex<HashMap<Digest, ProgressBar>>,
}

impl Bars {
    fn say(&self, line: &str) {
        // A terminal that went away is no reason to stop.
        let _ = self.all.println(line);
    }
}

impl Progress for Bars {
    fn event(&self, event: Event<'_>) {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Image {
                platform,
                layers: count,
            } => self.say(&image_line(platform, count)),
            Event::LayerBegins { layer, size } => {
                let template = "{prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}";
                let style = ProgressStyle::with_template(template)
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
                let bar = ProgressBar::new(size).with_style(style);
                bar.set_prefix(short(layer));
                layers.insert(layer, self.all.add(bar));
            }
            Event::LayerRead { layer, bytes } => {
                if let Some(bar) = layers.get(&layer) {
                    bar.inc(bytes);
                }
            }
            Event::LayerEnds { layer, outcome } => {
                if let Some(bar) = layers.remove(&layer) {
                    bar.finish_and_clear();
                }
                self.say(&layer_line(layer, outcome));
            }
            Event::NotFound { name } => self.say(&missing_line(name)),
        }
    }
}
