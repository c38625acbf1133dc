//! `sluice inspect`.

use std::process::ExitCode;

use crate::args::Inspect;

/// Runs it.
pub(crate) async fn run(args: Inspect) -> anyhow::Result<ExitCode> {
    let inspection = sluice_converter::inspect(&args.image).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&inspection)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}  {}", args.image, inspection.digest);
    for image in &inspection.images {
        let platform = match &image.platform {
            Some(platform) => format!("{}/{}", platform.os, platform.architecture),
            None => "image".to_owned(),
        };
        println!("{platform}  {}", image.digest);
        for layer in &image.layers {
            println!(
                "  {}  {} bytes  {}",
                layer.digest, layer.size, layer.media_type
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
