//! Pictures of measurements, as SVG that any browser shows.

use std::fmt::Write as _;

use super::link::{Shape, Transfer};
use super::node::Phases;
use super::reads::Read;

const FONT: &str = "font-family='sans-serif' font-size='11'";

/// One bar of a comparison.
pub struct Bar {
    /// What it is.
    pub label: String,
    /// Seconds until pulled, mounted, first instruction and ready.
    pub phases: Phases,
    /// More, in words, behind the bar.
    pub note: String,
}

/// Bars that are compared with each other.
pub struct Group {
    /// Above them.
    pub title: String,
    /// The physical limit in seconds.
    pub limit: f64,
    /// From top to bottom.
    pub bars: Vec<Bar>,
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn rectangle(out: &mut String, x: f64, y: f64, width: f64, height: f64, fill: &str) {
    let width = width.max(0.5);
    let _ = writeln!(
        out,
        "<rect x='{x:.1}' y='{y:.1}' width='{width:.1}' height='{height:.1}' fill='{fill}'/>"
    );
}

fn words(out: &mut String, x: f64, y: f64, text: &str, more: &str) {
    let text = escape(text);
    let _ = writeln!(
        out,
        "<text x='{x:.1}' y='{y:.1}' {FONT} {more}>{text}</text>"
    );
}

fn line(out: &mut String, x: f64, y: (f64, f64), colour: &str) {
    let (from, to) = y;
    let _ = writeln!(
        out,
        "<line x1='{x:.1}' y1='{from:.1}' x2='{x:.1}' y2='{to:.1}' stroke='{colour}' \
         stroke-dasharray='4 2'/>"
    );
}

fn page(width: f64, height: f64, body: &str) -> String {
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' width='{width:.0}' height='{height:.0}' \
         viewBox='0 0 {width:.0} {height:.0}'>\n\
         <rect width='100%' height='100%' fill='white'/>\n{body}</svg>\n"
    )
}

/// What the parts of a bar are, in their order, with their colours.
const PARTS: [(&str, &str); 4] = [
    ("pull", "#9aa5b1"),
    ("mount", "#f2b134"),
    ("to the first instruction", "#ed553b"),
    ("to ready", "#20639b"),
];

/// Groups of bars, each group on a scale of its own: the longest bar of each
/// fills the width.
pub fn comparison(title: &str, groups: &[Group]) -> String {
    const LEFT: f64 = 90.0;
    const WIDTH: f64 = 640.0;
    const ROW: f64 = 18.0;
    let mut body = String::new();
    words(&mut body, 10.0, 20.0, title, "font-weight='bold'");
    let mut x = 10.0;
    for (name, colour) in PARTS {
        rectangle(&mut body, x, 29.0, 10.0, 10.0, colour);
        words(&mut body, x + 14.0, 38.0, name, "");
        x += 40.0 + 6.0 * name.len() as f64;
    }
    line(&mut body, x, (28.0, 40.0), "#333");
    words(&mut body, x + 6.0, 38.0, "the physical limit", "");
    let mut y = 58.0;
    for group in groups {
        words(&mut body, 10.0, y, &group.title, "font-weight='bold'");
        y += 6.0;
        let longest = group.bars.iter().map(|bar| bar.phases.ready);
        let scale = WIDTH / longest.fold(group.limit, f64::max).max(1e-3);
        let top = y;
        for bar in &group.bars {
            words(&mut body, 10.0, y + 12.0, &bar.label, "");
            let ends = [
                bar.phases.pulled,
                bar.phases.mounted,
                bar.phases.started,
                bar.phases.ready,
            ];
            let mut from = 0.0;
            for (end, (_, colour)) in ends.into_iter().zip(PARTS) {
                let width = (end - from).max(0.0) * scale;
                rectangle(
                    &mut body,
                    LEFT + from * scale,
                    y + 2.0,
                    width,
                    ROW - 4.0,
                    colour,
                );
                from = end.max(from);
            }
            words(&mut body, LEFT + WIDTH + 8.0, y + 12.0, &bar.note, "");
            y += ROW;
        }
        line(&mut body, LEFT + group.limit * scale, (top, y), "#333");
        y += 22.0;
    }
    page(1060.0, y, &body)
}

/// One start.
pub struct Waterfall<'a> {
    /// Above it.
    pub title: String,
    /// The link that it came over.
    pub shape: Shape,
    /// When what was done.
    pub phases: Phases,
    /// What was asked for and when it came.
    pub transfers: &'a [Transfer],
    /// What was read when; empty where that was not recorded.
    pub reads: &'a [Read],
}

const ARRIVING: &str = "#20639b";
const ASKED: &str = "#c6d8e8";
const READ: &str = "#333";
const WAITED: &str = "#d7263d";
/// Columns over which the link's use is averaged.
const COLUMNS: usize = 200;

/// What was asked for when, when it came, how busy the link was, what was read
/// when and how long that was waited for.
pub fn waterfall(start: &Waterfall<'_>) -> String {
    const LEFT: f64 = 330.0;
    const WIDTH: f64 = 800.0;
    const STRIP: f64 = 26.0;
    let Waterfall {
        phases, transfers, ..
    } = start;
    let row = (1400.0 / transfers.len().max(1) as f64).clamp(3.0, 14.0);
    let last = transfers.iter().map(|transfer| transfer.last);
    let end = last.fold(phases.ready, f64::max).max(1e-3);
    let at = |seconds: f64| LEFT + seconds * WIDTH / end;
    let mut body = String::new();
    words(&mut body, 10.0, 20.0, &start.title, "font-weight='bold'");
    let mut x = 10.0;
    for (name, colour) in [
        ("each row is a request: waited for", ASKED),
        ("arriving", ARRIVING),
        ("a chunk was first read", READ),
        ("its reader waited", WAITED),
    ] {
        rectangle(&mut body, x, 29.0, 10.0, 10.0, colour);
        words(&mut body, x + 14.0, 38.0, name, "");
        x += 34.0 + 6.0 * name.len() as f64;
    }
    let strips = 92.0;
    let top = strips + 2.0 * STRIP + 8.0;
    let bottom = top + row * transfers.len() as f64;

    words(&mut body, 10.0, strips + 16.0, "use of the link", "");
    let column = end / COLUMNS as f64;
    for (index, part) in link_use(transfers, start.shape, end).iter().enumerate() {
        let height = (STRIP - 4.0) * part;
        let y = strips + STRIP - 4.0 - height;
        let x = at(index as f64 * column);
        rectangle(&mut body, x, y, WIDTH / COLUMNS as f64, height, ARRIVING);
    }
    if !start.reads.is_empty() {
        let y = strips + STRIP;
        words(&mut body, 10.0, y + 16.0, "reads, and waiting for them", "");
        for read in start.reads {
            let wait = at(read.at + read.waited()) - at(read.at);
            if wait > 0.5 {
                rectangle(&mut body, at(read.at), y + 11.0, wait, 10.0, WAITED);
            }
            rectangle(&mut body, at(read.at), y, 0.5, 10.0, READ);
        }
    }

    // Each on a line of its own: they may be close together.
    for (number, (end, name)) in [
        (phases.pulled, "pulled"),
        (phases.mounted, "mounted"),
        (phases.started, "first instruction"),
        (phases.ready, "ready"),
    ]
    .into_iter()
    .enumerate()
    {
        line(&mut body, at(end), (strips - 4.0, bottom), PARTS[number].1);
        let text = format!("{name} {end:.2} s");
        let level = 54.0 + 10.0 * number as f64;
        words(&mut body, at(end) - 4.0, level, &text, "text-anchor='end'");
    }
    let height = row - 1.0;
    for (number, transfer) in transfers.iter().enumerate() {
        let y = top + row * number as f64;
        let first = transfer.first.unwrap_or(transfer.last);
        let mut bar = |from: f64, to: f64, colour| {
            rectangle(&mut body, at(from), y, at(to) - at(from), height, colour);
        };
        bar(transfer.sent, first, ASKED);
        bar(first, transfer.last, ARRIVING);
        if row >= 9.0 {
            words(&mut body, 10.0, y + row - 2.0, &label(transfer), "");
        }
    }
    for read in start.reads {
        let Some((number, _)) = read.brought else {
            continue;
        };
        let y = top + row * number as f64;
        let wait = at(read.at + read.waited()) - at(read.at);
        if wait > 0.5 {
            rectangle(&mut body, at(read.at), y + height / 3.0, wait, 1.0, WAITED);
        }
        rectangle(&mut body, at(read.at), y, 0.7, height, READ);
    }
    page(LEFT + WIDTH + 30.0, bottom + 20.0, &body)
}

/// Which part of the bandwidth was used, column by column of the time until
/// `end`. Each answer is taken to have come evenly.
fn link_use(transfers: &[Transfer], shape: Shape, end: f64) -> Vec<f64> {
    let column = end / COLUMNS as f64;
    let mut used = vec![0.0; COLUMNS];
    for transfer in transfers {
        let Some(first) = transfer.first else {
            continue;
        };
        // What came at once came within a column.
        let span = (transfer.last - first).max(column);
        let rate = transfer.bytes as f64 / span / shape.bytes_per_second();
        for (index, used) in used.iter_mut().enumerate() {
            let from = (index as f64 * column).max(first);
            let to = ((index + 1) as f64 * column).min(first + span);
            *used += rate * ((to - from) / column).max(0.0);
        }
    }
    used.iter().map(|used| used.min(1.0)).collect()
}

/// `GET …/blobs/1a2b3c4d 0-4095 (4.1 kB)`.
fn label(transfer: &Transfer) -> String {
    let path = transfer.request.rsplit('/').next().unwrap_or_default();
    let name = path
        .strip_prefix("sha256:")
        .map_or(path, |hex| hex.get(..8).unwrap_or(hex));
    let kind = ["manifests", "blobs", "referrers"]
        .into_iter()
        .find(|kind| transfer.request.contains(&format!("/{kind}/")))
        .unwrap_or("");
    let range = transfer.range.as_deref().unwrap_or_default();
    let range = range.strip_prefix("bytes=").unwrap_or(range);
    format!(
        "{kind} {name} {range} ({:.1} kB)",
        transfer.bytes as f64 / 1e3
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_use_of_the_link_is_what_came_while_it_came() {
        let shape = Shape {
            mbit: 8,
            round_trip_ms: 0,
        };
        let transfer = |first, last, bytes| Transfer {
            connection: 0,
            request: String::new(),
            range: None,
            sent: 0.0,
            first,
            last,
            bytes,
        };
        let transfers = [
            transfer(Some(0.0), 10.0, 5_000_000),
            transfer(Some(5.0), 10.0, 1_250_000),
            transfer(None, 3.0, 0),
        ];
        let used = link_use(&transfers, shape, 20.0);
        let part = |seconds: usize| used[seconds * COLUMNS / 20];
        assert!((part(1) - 0.5).abs() < 0.01, "{}", part(1));
        assert!((part(7) - 0.75).abs() < 0.01, "{}", part(7));
        assert_eq!(part(12), 0.0);
        assert_eq!(
            link_use(&[transfer(Some(1.0), 1.0, 1 << 30)], shape, 2.0)[110],
            0.0
        );
    }
}
