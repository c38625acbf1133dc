//! `sluice top`.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use console::Term;
use indicatif::HumanBytes;

use crate::args::Top;
use crate::control;
use crate::status::{Figures, View, look};

/// Fetches shown at most.
const FETCHES: usize = 12;

/// Runs it.
pub(crate) async fn run(args: Top) -> anyhow::Result<ExitCode> {
    let mut daemon = control::connect(&args.daemon.address).await?;
    let term = Term::stdout();
    let live = term.is_term() && !args.once;
    let interval = Duration::from_secs(args.interval);
    let mut before = (look(&mut daemon).await?.figures(), Instant::now());
    if live {
        term.hide_cursor()?;
        term.clear_screen()?;
    }
    let ended = loop {
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            ended = tokio::signal::ctrl_c() => break ended.map_err(Into::into),
        }
        let view = match look(&mut daemon).await {
            Ok(view) => view,
            Err(error) => break Err(error),
        };
        let now = (view.figures(), Instant::now());
        let page = page(&view, &before.0, &now.0, now.1 - before.1);
        before = now;
        let shown = match live {
            true => draw(&term, &page),
            false => io::stdout().write_all(page.as_bytes()),
        };
        // A reader that has gone wants no more.
        if args.once || shown.is_err() {
            break Ok(());
        }
    };
    if live {
        term.show_cursor()?;
    }
    ended.map(|()| ExitCode::SUCCESS)
}

fn page(view: &View, before: &Figures, now: &Figures, passed: Duration) -> String {
    let rate = |before: u64, now: u64| {
        let bytes = now.saturating_sub(before) as f64 / passed.as_secs_f64().max(0.001);
        format!("{}/s", HumanBytes(bytes as u64))
    };
    let reads = now.reads.saturating_sub(before.reads);
    let waited = now.waited_reads.saturating_sub(before.waited_reads);
    let (old, new) = (before.fetched, now.fetched);
    let mut page = view.head();
    page += &format!(
        "fetched: {} on demand, {} ahead, {} in the background; {reads} reads, {waited} of them \
         waited\n\n",
        rate(old.on_demand, new.on_demand),
        rate(old.prefetch, new.prefetch),
        rate(old.background, new.background),
    );
    page += &view.images();
    if !view.fetches.is_empty() {
        page += "\n";
        page += &view.fetches(FETCHES);
    }
    if !view.links.is_empty() {
        page += "\n";
        page += &view.links();
    }
    page
}

/// Over the former page, line by line, so that nothing flickers.
fn draw(term: &Term, page: &str) -> io::Result<()> {
    let (rows, columns) = term.size();
    let mut screen = String::from("\x1b[H");
    for line in page.lines().take(usize::from(rows).saturating_sub(1)) {
        screen.extend(line.chars().take(columns.into()));
        screen += "\x1b[K\n";
    }
    screen += "\x1b[J";
    let mut out = io::stdout().lock();
    out.write_all(screen.as_bytes())?;
    out.flush()
}
