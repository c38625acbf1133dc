//! Pictures of measurements, as SVG that any browser shows.

use std::fmt::Write as _;

use super::link::Transfer;
use super::node::Phases;

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

/// One start: what was asked for when, when it came, and what was done when.
pub fn waterfall(title: &str, phases: &Phases, transfers: &[Transfer]) -> String {
    const LEFT: f64 = 330.0;
    const WIDTH: f64 = 800.0;
    let row = (1400.0 / transfers.len().max(1) as f64).clamp(3.0, 14.0);
    let last = transfers.iter().map(|transfer| transfer.last);
    let scale = WIDTH / last.fold(phases.ready, f64::max).max(1e-3);
    let mut body = String::new();
    words(&mut body, 10.0, 20.0, title, "font-weight='bold'");
    words(
        &mut body,
        10.0,
        36.0,
        "light: asked and waited for; dark: arriving; each row is a request",
        "",
    );
    let top = 62.0;
    let bottom = top + row * transfers.len() as f64;
    for (end, (name, colour)) in [
        (phases.pulled, ("pulled", PARTS[0].1)),
        (phases.mounted, ("mounted", PARTS[1].1)),
        (phases.started, ("first instruction", PARTS[2].1)),
        (phases.ready, ("ready", PARTS[3].1)),
    ]
    .into_iter()
    {
        let x = LEFT + end * scale;
        line(&mut body, x, (top - 4.0, bottom), colour);
        let level = match name {
            "pulled" | "first instruction" => 46.0,
            _ => 57.0,
        };
        words(
            &mut body,
            x - 4.0,
            level,
            &format!("{name} {end:.2} s"),
            "text-anchor='end'",
        );
    }
    for (number, transfer) in transfers.iter().enumerate() {
        let y = top + row * number as f64;
        let first = transfer.first.unwrap_or(transfer.last);
        let at = |seconds: f64| LEFT + seconds * scale;
        let height = row - 1.0;
        rectangle(
            &mut body,
            at(transfer.sent),
            y,
            (first - transfer.sent) * scale,
            height,
            "#c6d8e8",
        );
        rectangle(
            &mut body,
            at(first),
            y,
            (transfer.last - first) * scale,
            height,
            "#20639b",
        );
        if row >= 9.0 {
            words(&mut body, 10.0, y + row - 2.0, &label(transfer), "");
        }
    }
    page(LEFT + WIDTH + 30.0, bottom + 20.0, &body)
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
