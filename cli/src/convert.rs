//! `sluice convert`.

use std::io::Read as _;
use std::num::NonZero;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::CommandFactory as _;
use clap::error::ErrorKind;
use indicatif::HumanBytes;
use sluice_converter::{Conversion, Platforms};
use sluice_layer::write::{Chunking, Options};
use sluice_layer::{Format, Profile, StartReads};

use crate::args::{ChunkingArg, Cli, Convert, FormatArg};
use crate::{profile, progress, registry};

/// More than anybody lists by hand.
const MAX_LIST: u64 = 64 << 20;

/// Runs it.
pub(crate) async fn run(args: Convert) -> anyhow::Result<ExitCode> {
    let format = match args.format {
        FormatArg::Estargz => Format::Estargz,
        FormatArg::ZstdChunked => Format::ZstdChunked,
    };
    let mut options = Options::new(format);
    options.chunk_size = args.chunk_size.unwrap_or(options.chunk_size);
    options.chunking = match args.chunking {
        ChunkingArg::Fixed => Chunking::Fixed,
        ChunkingArg::Content => Chunking::Content,
    };
    if options.chunking == Chunking::Content && options.chunk_size > Chunking::LARGEST_AVERAGE {
        usage("--chunk-size is at most 4M with --chunking content");
    }
    if let Some(level) = args.level {
        let levels = Options::levels(format);
        if !levels.contains(&level) {
            let (first, last) = (levels.start(), levels.end());
            usage(&format!("--level is {first} to {last} for {format}"));
        }
        options.level = level;
    }
    let profile = args.profile.as_deref().map(profile::read).transpose()?;
    let conversion = Conversion {
        options,
        platforms: platforms(&args.platform),
        prioritized: match (&args.prioritize, &profile) {
            (Some(file), _) => prioritized(file)?,
            (None, Some(profile)) => profiled(profile),
            (None, None) => Vec::new(),
        },
        start_reads: profile
            .as_ref()
            .map(|profile| Arc::new(StartReads::of(profile))),
        force: args.force,
        scratch: std::env::temp_dir(),
        workers: std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN),
    };
    let places = [&args.source, &args.destination];
    let registries = places.into_iter().filter_map(|place| place.reference());
    let client = registry::client(&args.registry, registries)?;
    let conversion = sluice_converter::convert(
        &client,
        &args.source,
        &args.destination,
        &conversion,
        progress::display(),
    );
    let report = tokio::select! {
        report = conversion => report?,
        _ = tokio::signal::ctrl_c() => bail!("interrupted; {} is as it was", args.destination),
    };
    println!("{}", report.digest);
    let change = match report.size_before {
        0 => String::new(),
        before => {
            let percent = report.size_after as f64 / before as f64 * 100.0;
            format!(" ({percent:.0} %)")
        }
    };
    eprintln!(
        "{}: {} of {} layers converted; {} before, {} now{change}",
        args.destination,
        report.converted,
        report.converted + report.already_seekable + report.kept,
        HumanBytes(report.size_before),
        HumanBytes(report.size_after),
    );
    Ok(ExitCode::SUCCESS)
}

/// What clap cannot tell by one argument alone.
fn usage(message: &str) -> ! {
    Cli::command()
        .error(ErrorKind::ValueValidation, message)
        .exit()
}

fn platforms(given: &[String]) -> Platforms {
    if given.iter().any(|platform| platform == "all") {
        return Platforms::All;
    }
    let parse = |text: &String| match text.parse() {
        Ok(platform) => platform,
        Err(cause) => usage(&format!("--platform: {cause}")),
    };
    Platforms::Only(given.iter().map(parse).collect())
}

/// The files of a profile, as a tar's names are read.
fn profiled(profile: &Profile) -> Vec<String> {
    let files = profile.files().into_iter();
    files
        .map(|path| String::from_utf8_lossy(&path).into_owned())
        .collect()
}

/// Paths, one a line; empty lines and lines that begin with # do not count.
fn prioritized(file: &Path) -> anyhow::Result<Vec<String>> {
    let mut text = String::new();
    std::fs::File::open(file)
        .and_then(|list| list.take(MAX_LIST).read_to_string(&mut text))
        .with_context(|| {
            format!(
                "cannot read the list of prioritized files {}",
                file.display()
            )
        })?;
    let lines = text.lines().map(str::trim);
    let paths = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(paths.map(str::to_owned).collect())
}
