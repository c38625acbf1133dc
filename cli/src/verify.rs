//! `sluice verify`.

use std::process::ExitCode;

use crate::args::Verify;
use crate::progress::counted;
use crate::registry;

/// Runs it.
pub(crate) async fn run(args: Verify) -> anyhow::Result<ExitCode> {
    let client = registry::client(&args.registry, args.image.reference())?;
    let found = sluice_converter::verify(&client, &args.image, &std::env::temp_dir()).await?;
    for defect in &found.defects {
        println!("{}", defect.replace('\n', " "));
    }
    if !found.defects.is_empty() {
        let defects = counted(found.defects.len(), "defect");
        eprintln!("sluice: {} has {defects}", args.image);
        return Ok(ExitCode::FAILURE);
    }
    println!(
        "{}: {}, {} of them lazily loadable, {}: all as their digests say",
        args.image,
        counted(found.layers, "layer"),
        found.seekable,
        counted(found.chunks, "chunk"),
    );
    Ok(ExitCode::SUCCESS)
}
