//! `sluice verify`.

use std::process::ExitCode;

use crate::args::Verify;
use crate::registry;

/// Runs it.
pub(crate) async fn run(args: Verify) -> anyhow::Result<ExitCode> {
    let client = registry::client(&args.registry, args.image.reference())?;
    let found = sluice_converter::verify(&client, &args.image, &std::env::temp_dir()).await?;
    for defect in &found.defects {
        println!("{}", defect.replace('\n', " "));
    }
    if !found.defects.is_empty() {
        let count = found.defects.len();
        let plural = if count == 1 { "" } else { "s" };
        eprintln!("sluice: {} has {count} defect{plural}", args.image);
        return Ok(ExitCode::FAILURE);
    }
    println!(
        "{}: {} layers, {} of them lazily loadable, {} chunks: all as their digests say",
        args.image, found.layers, found.seekable, found.chunks
    );
    Ok(ExitCode::SUCCESS)
}
