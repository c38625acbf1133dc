//! `sluice profile show`.

use std::collections::HashMap;
use std::process::ExitCode;

use indicatif::HumanBytes;
use sluice_layer::Profile;
use sluice_proto::control::v1 as api;

use super::{get, read};
use crate::args::ProfileShow;
use crate::control;
use crate::status::{short, table};

/// Runs it.
pub(super) async fn run(args: ProfileShow) -> anyhow::Result<ExitCode> {
    if let Some(file) = &args.file {
        print!("{}", page(&read(file)?));
        return Ok(ExitCode::SUCCESS);
    }
    let mut daemon = control::connect(&args.daemon.address).await?;
    if let Some(image) = &args.image {
        let (stored, profile) = get(&mut daemon, image).await?;
        let partly = match stored.whole {
            true => "",
            false => ", partly: some of it had been read before",
        };
        println!("{image}  {}", stored.manifest_digest);
        println!("recorded on this node{partly}");
        print!("{}", page(&profile));
        return Ok(ExitCode::SUCCESS);
    }
    let answer = daemon.list_profiles(api::ListProfilesRequest {}).await;
    let answer = answer.map_err(|status| control::failed(&status))?;
    let rows = answer.into_inner().profiles.into_iter().rev().map(|one| {
        [
            one.image,
            short(&one.manifest_digest).to_owned(),
            one.layers.len().to_string(),
            one.recordings.to_string(),
            if one.whole { "yes" } else { "no" }.to_owned(),
        ]
    });
    let head = ["IMAGE", "MANIFEST", "LAYERS", "RECORDINGS", "WHOLE"];
    print!("{}", table(head, rows));
    Ok(ExitCode::SUCCESS)
}

/// Files in the order of first need.
fn page(profile: &Profile) -> String {
    struct File {
        at: u128,
        reads: usize,
        bytes: u64,
        starts: u32,
    }
    let mut order = Vec::new();
    let mut files: HashMap<(usize, &[u8]), File> = HashMap::new();
    for read in profile.reads() {
        let key = (read.layer, &*read.path);
        let file = files.entry(key).or_insert_with(|| {
            order.push(key);
            File {
                at: read.at.as_millis(),
                reads: 0,
                bytes: 0,
                starts: 0,
            }
        });
        file.reads += 1;
        file.bytes = file.bytes.saturating_add(read.len);
        file.starts = file.starts.max(read.starts);
    }
    let mut text = format!(
        "{} starts; {} in {} reads of {} files of {} layers\n\n",
        profile.starts(),
        HumanBytes(profile.bytes()),
        profile.reads().len(),
        order.len(),
        profile.layers().len(),
    );
    let rows = order.iter().map(|key| {
        let file = &files[key];
        [
            format!("{} ms", file.at),
            key.0.to_string(),
            file.starts.to_string(),
            file.reads.to_string(),
            HumanBytes(file.bytes).to_string(),
            String::from_utf8_lossy(key.1).into_owned(),
        ]
    });
    let head = ["FIRST", "LAYER", "STARTS", "READS", "BYTES", "FILE"];
    text += &table(head, rows);
    text
}
