//! `sluice status`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::process::ExitCode;

use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;
use sluice_proto::control::v1 as api;

use crate::args::Status;
use crate::control;

/// Runs it.
pub(crate) async fn run(args: Status) -> anyhow::Result<ExitCode> {
    let mut daemon = control::connect(&args.daemon.address).await?;
    let view = look(&mut daemon).await?;
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&view)?),
        false => print!("{}", view.page()),
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks the daemon.
pub(crate) async fn look(
    daemon: &mut api::control_client::ControlClient<tonic::transport::Channel>,
) -> anyhow::Result<View> {
    let answer = daemon.status(api::StatusRequest {}).await;
    let answer = answer.map_err(|status| control::failed(&status))?;
    Ok(View::new(answer.into_inner()))
}

/// What the daemon says, as `--json` prints it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct View {
    pub(crate) version: String,
    /// `erofs` or `fuse`.
    pub(crate) mode: String,
    pub(crate) waiting_readers: u64,
    pub(crate) memory: Budget,
    pub(crate) connections: Budget,
    pub(crate) images: Vec<Image>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) fetches: Vec<Fetch>,
    pub(crate) links: Vec<Link>,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Budget {
    pub(crate) used: u64,
    pub(crate) limit: u64,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Image {
    pub(crate) reference: String,
    pub(crate) manifest: String,
    pub(crate) layers: Vec<String>,
    pub(crate) users: u64,
    /// `image`, `node`, or nothing.
    pub(crate) profile: Option<&'static str>,
    pub(crate) recording: bool,
    /// Of all its layers together.
    #[serde(flatten)]
    pub(crate) figures: Figures,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Layer {
    pub(crate) digest: String,
    pub(crate) image: String,
    pub(crate) mounted: bool,
    pub(crate) profile: Option<&'static str>,
    /// Whether it is what its image says: `verified`, `unknown` or
    /// `contradicted`.
    pub(crate) content: String,
    #[serde(flatten)]
    pub(crate) figures: Figures,
}

/// What a layer holds and has done, or several together.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Figures {
    pub(crate) blob_bytes: u64,
    pub(crate) chunks: u64,
    pub(crate) present_chunks: u64,
    pub(crate) reads: u64,
    pub(crate) waited_reads: u64,
    pub(crate) fetched: Fetched,
    /// Uncompressed bytes that other layers of the node had.
    pub(crate) reused_bytes: u64,
}

/// Compressed bytes, by what they were fetched for.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Fetched {
    pub(crate) on_demand: u64,
    pub(crate) prefetch: u64,
    pub(crate) background: u64,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Fetch {
    pub(crate) layer: String,
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// `on-demand`, `prefetch` or `background`.
    pub(crate) priority: &'static str,
    pub(crate) age_milliseconds: u64,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct Link {
    pub(crate) host: String,
    pub(crate) round_trip_microseconds: u64,
    pub(crate) bytes_per_second: u64,
}

impl Figures {
    pub(crate) fn add(&mut self, other: &Self) {
        self.blob_bytes += other.blob_bytes;
        self.chunks += other.chunks;
        self.present_chunks += other.present_chunks;
        self.reads += other.reads;
        self.waited_reads += other.waited_reads;
        self.fetched.on_demand += other.fetched.on_demand;
        self.fetched.prefetch += other.fetched.prefetch;
        self.fetched.background += other.fetched.background;
        self.reused_bytes += other.reused_bytes;
    }

    fn present(&self) -> String {
        percent(self.present_chunks, self.chunks)
    }

    fn hits(&self) -> String {
        percent(self.reads.saturating_sub(self.waited_reads), self.reads)
    }
}

impl Fetched {
    pub(crate) fn total(&self) -> u64 {
        self.on_demand + self.prefetch + self.background
    }
}

impl View {
    fn new(answer: api::StatusResponse) -> Self {
        let budget = |budget: Option<api::Budget>| {
            let api::Budget { used, limit } = budget.unwrap_or_default();
            Budget { used, limit }
        };
        let layers: Vec<Layer> = answer.layers.into_iter().map(layer).collect();
        let by_digest: HashMap<&str, &Figures> = layers
            .iter()
            .map(|layer| (layer.digest.as_str(), &layer.figures))
            .collect();
        let images = answer.images.into_iter().map(|image| {
            let mut figures = Figures::default();
            for layer in &image.layers {
                if let Some(layer) = by_digest.get(layer.as_str()) {
                    figures.add(layer);
                }
            }
            Image {
                profile: source(image.profile()),
                reference: image.reference,
                manifest: image.manifest_digest,
                layers: image.layers,
                users: image.users,
                recording: image.recording,
                figures,
            }
        });
        let images = images.collect();
        let fetches = answer.fetches.into_iter().map(|fetch| Fetch {
            priority: match fetch.priority() {
                api::Priority::OnDemand => "on-demand",
                api::Priority::Prefetch => "prefetch",
                api::Priority::Background => "background",
                api::Priority::Unspecified => "unknown",
            },
            layer: fetch.layer,
            start: fetch.start,
            end: fetch.end,
            age_milliseconds: fetch.age_milliseconds,
        });
        let links = answer.links.into_iter().map(|link| Link {
            host: link.host,
            round_trip_microseconds: link.round_trip_microseconds,
            bytes_per_second: link.bytes_per_second,
        });
        Self {
            version: answer.version,
            mode: answer.mode,
            waiting_readers: answer.waiting_readers,
            memory: budget(answer.memory),
            connections: budget(answer.connections),
            images,
            layers,
            fetches: fetches.collect(),
            links: links.collect(),
        }
    }

    /// What all layers have done.
    pub(crate) fn figures(&self) -> Figures {
        let mut all = Figures::default();
        for layer in &self.layers {
            all.add(&layer.figures);
        }
        all
    }

    /// For people.
    pub(crate) fn page(&self) -> String {
        let mut page = self.head();
        page += "\n";
        page += &self.images();
        page += "\n";
        page += &self.layers();
        if !self.fetches.is_empty() {
            page += "\n";
            page += &self.fetches(usize::MAX);
        }
        if !self.links.is_empty() {
            page += "\n";
            page += &self.links();
        }
        page
    }

    pub(crate) fn head(&self) -> String {
        let waiting = match self.waiting_readers {
            0 => "no reader waits".to_owned(),
            1 => "1 reader waits".to_owned(),
            n => format!("{n} readers wait"),
        };
        format!(
            "sluice-snapshotter {}, mode {}; {} of {} requests and {} of {} in flight; {waiting}\n",
            self.version,
            self.mode,
            self.connections.used,
            self.connections.limit,
            HumanBytes(self.memory.used),
            HumanBytes(self.memory.limit),
        )
    }

    pub(crate) fn images(&self) -> String {
        let head = [
            "IMAGE", "USERS", "LAYERS", "PRESENT", "READS", "HITS", "FETCHED", "REUSED", "PROFILE",
        ];
        let rows = self.images.iter().map(|image| {
            let mut profile = image.profile.unwrap_or("none").to_owned();
            if image.recording {
                profile += ", recording";
            }
            let name = match image.reference.as_str() {
                "" => &image.manifest,
                reference => reference,
            };
            [
                name.to_owned(),
                image.users.to_string(),
                image.layers.len().to_string(),
                image.figures.present(),
                HumanCount(image.figures.reads).to_string(),
                image.figures.hits(),
                HumanBytes(image.figures.fetched.total()).to_string(),
                HumanBytes(image.figures.reused_bytes).to_string(),
                profile,
            ]
        });
        table(head, rows)
    }

    fn layers(&self) -> String {
        let head = [
            "LAYER",
            "SIZE",
            "PRESENT",
            "CONTENT",
            "READS",
            "HITS",
            "ON-DEMAND",
            "PREFETCH",
            "BACKGROUND",
            "REUSED",
            "MOUNTED",
            "PROFILE",
        ];
        let rows = self.layers.iter().map(|layer| {
            let Figures { fetched, .. } = layer.figures;
            [
                short(&layer.digest).to_owned(),
                HumanBytes(layer.figures.blob_bytes).to_string(),
                layer.figures.present(),
                layer.content.clone(),
                HumanCount(layer.figures.reads).to_string(),
                layer.figures.hits(),
                HumanBytes(fetched.on_demand).to_string(),
                HumanBytes(fetched.prefetch).to_string(),
                HumanBytes(fetched.background).to_string(),
                HumanBytes(layer.figures.reused_bytes).to_string(),
                if layer.mounted { "yes" } else { "no" }.to_owned(),
                layer.profile.unwrap_or("none").to_owned(),
            ]
        });
        table(head, rows)
    }

    pub(crate) fn fetches(&self, most: usize) -> String {
        let rows = self.fetches.iter().take(most).map(|fetch| {
            [
                short(&fetch.layer).to_owned(),
                fetch.priority.to_owned(),
                HumanBytes(fetch.end.saturating_sub(fetch.start)).to_string(),
                format!("at {}", fetch.start),
                format!("{} ms", fetch.age_milliseconds),
            ]
        });
        table(["FETCHING", "WHY", "RANGE", "", "SINCE"], rows)
    }

    pub(crate) fn links(&self) -> String {
        let rows = self.links.iter().map(|link| {
            [
                link.host.clone(),
                format!("{:.1} ms", link.round_trip_microseconds as f64 / 1e3),
                format!("{:.1} Mbit/s", link.bytes_per_second as f64 * 8.0 / 1e6),
            ]
        });
        table(["REGISTRY", "ROUND TRIP", "BANDWIDTH"], rows)
    }
}

fn layer(layer: api::Layer) -> Layer {
    let fetched = layer.fetched.unwrap_or_default();
    Layer {
        profile: source(layer.profile()),
        content: layer.content,
        digest: layer.digest,
        image: layer.image,
        mounted: layer.mounted,
        figures: Figures {
            blob_bytes: layer.blob_bytes,
            chunks: layer.chunks,
            present_chunks: layer.present_chunks,
            reads: layer.reads,
            waited_reads: layer.waited_reads,
            fetched: Fetched {
                on_demand: fetched.on_demand,
                prefetch: fetched.prefetch,
                background: fetched.background,
            },
            reused_bytes: layer.reused_bytes,
        },
    }
}

fn source(source: api::ProfileSource) -> Option<&'static str> {
    match source {
        api::ProfileSource::Unspecified => None,
        api::ProfileSource::Image => Some("image"),
        api::ProfileSource::Attached => Some("attached"),
        api::ProfileSource::Node => Some("node"),
    }
}

/// A digest's first twelve digits.
pub(crate) fn short(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..12).unwrap_or(hex)
}

fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "-".to_owned(),
        // Never "100 %" of what is not whole.
        _ => format!("{} %", part.saturating_mul(100) / whole),
    }
}

/// Columns as wide as their widest cell. Control characters, which a name may
/// hold, do not reach the terminal.
pub(crate) fn table<const N: usize>(
    head: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut all = vec![head.map(str::to_owned)];
    all.extend(rows.into_iter().map(|row| row.map(|cell| printable(&cell))));
    let width = |column: usize| {
        let widths = all.iter().map(|row| row[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &all {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned_and_printable() {
        let rows = [["a\u{1b}[2J".to_owned(), "1".to_owned()]];
        assert_eq!(table(["NAME", "N"], rows), "NAME   N\na?[2J  1\n");
    }

    #[test]
    fn rates_are_never_rounded_up() {
        assert_eq!(percent(0, 0), "-");
        assert_eq!(percent(999, 1000), "99 %");
        assert_eq!(percent(5, 5), "100 %");
    }
}
