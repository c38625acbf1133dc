//! `sluice inspect`.

use std::process::ExitCode;

use indicatif::HumanBytes;
use sluice_converter::{InspectedImage, Lazy};

use crate::args::Inspect;
use crate::progress::counted;
use crate::registry;

/// Runs it.
pub(crate) async fn run(args: Inspect) -> anyhow::Result<ExitCode> {
    let client = registry::client(&args.registry, args.image.reference())?;
    let inspection = sluice_converter::inspect(&client, &args.image).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&inspection)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}", args.image);
    println!("  digest  {}", inspection.digest);
    println!("  type    {}", inspection.media_type);
    for image in &inspection.images {
        println!();
        print(image);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(image: &InspectedImage) {
    let platform = image.platform.as_deref().unwrap_or("unknown platform");
    let kind = if image.attestation {
        " (attestation)"
    } else {
        ""
    };
    println!("{platform}{kind}");
    println!("  manifest  {}", image.digest);
    println!("  config    {}", image.config);
    for (number, layer) in image.layers.iter().enumerate() {
        println!(
            "  layer {number}   {}  {}",
            layer.digest,
            HumanBytes(layer.size)
        );
        match &layer.lazy {
            Lazy::No => println!("            not lazily loadable ({})", layer.media_type),
            Lazy::Broken { why } => println!("            not lazily loadable: {why}"),
            Lazy::Yes(toc) => {
                println!("            {}, TOC {}", toc.format, toc.toc_digest);
                let prioritized = match toc.prioritized.len() {
                    0 => String::new(),
                    count => format!(
                        ", {} ({})",
                        counted(count, "prioritized file"),
                        HumanBytes(toc.prioritized_bytes)
                    ),
                };
                println!(
                    "            {} entries, {} of {}, {}{prioritized}",
                    toc.entries,
                    counted(toc.files, "file"),
                    HumanBytes(toc.file_bytes),
                    counted(toc.chunks, "chunk"),
                );
            }
        }
    }
}
