//! `sluice profile`.

mod record;
mod show;
mod spec;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::num::NonZero;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use sluice_converter::Attaching;
use sluice_layer::Profile;
use sluice_layer::profile::MAX_BYTES;
use sluice_proto::control::v1 as api;

use crate::args::{Profile as Command, ProfileExport, ProfileImport, ProfileMerge, ProfilePush};
use crate::{control, registry};

/// Runs it.
pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Show(args) => show::run(args).await,
        Command::Export(args) => export(args).await,
        Command::Import(args) => import(args).await,
        Command::Clear(args) => {
            let mut daemon = control::connect(&args.daemon.address).await?;
            let request = api::ClearProfileRequest { image: args.image };
            let cleared = daemon.clear_profile(request).await;
            cleared.map_err(|status| control::failed(&status))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Merge(args) => merge(&args),
        Command::Push(args) => push(args).await,
        Command::Record(args) => record::run(*args).await,
    }
}

async fn export(args: ProfileExport) -> anyhow::Result<ExitCode> {
    let mut daemon = control::connect(&args.daemon.address).await?;
    let (_, profile) = get(&mut daemon, &args.image).await?;
    match &args.output {
        Some(path) => write(path, &profile)?,
        None => println!("{}", profile.to_json()),
    }
    Ok(ExitCode::SUCCESS)
}

async fn import(args: ProfileImport) -> anyhow::Result<ExitCode> {
    let profile = read(&args.file)?;
    let mut daemon = control::connect(&args.daemon.address).await?;
    let request = api::PutProfileRequest {
        image: args.image.to_string(),
        manifest_digest: String::new(),
        document: profile.to_json().into_bytes(),
    };
    let put = daemon.put_profile(request).await;
    put.map_err(|status| control::failed(&status))?;
    Ok(ExitCode::SUCCESS)
}

async fn push(args: ProfilePush) -> anyhow::Result<ExitCode> {
    let profile = match &args.profile {
        Some(path) => read(path)?,
        None => {
            let mut daemon = control::connect(&args.daemon.address).await?;
            get(&mut daemon, &args.image.to_string()).await?.1
        }
    };
    let client = registry::client(&args.registry, [&args.image])?;
    let attaching = Attaching {
        data: args.with_data.then_some(args.level),
        workers: std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN),
    };
    let scratch = std::env::temp_dir();
    let attached = sluice_converter::attach(&client, &args.image, &profile, attaching, &scratch);
    let attached = attached.await?;
    println!(
        "{}: attached a profile of {} chunks, {} bytes{}, to {}",
        args.image,
        attached.chunks,
        attached.bytes,
        match args.with_data {
            true => format!(" in {} compressed", attached.stored),
            false => String::new(),
        },
        attached.image
    );
    Ok(ExitCode::SUCCESS)
}

fn merge(args: &ProfileMerge) -> anyhow::Result<ExitCode> {
    let profiles = args.inputs.iter().map(|path| read(path));
    let profiles = profiles.collect::<anyhow::Result<Vec<_>>>()?;
    let merged = Profile::merge(&profiles).with_context(|| {
        let names: Vec<String> = args
            .inputs
            .iter()
            .map(|p| p.display().to_string())
            .collect();
        format!("cannot merge {}", names.join(", "))
    })?;
    write(&args.output, &merged)?;
    println!(
        "{}: {} starts, {} reads of {} files",
        args.output.display(),
        merged.starts(),
        merged.reads().len(),
        merged.files().len()
    );
    Ok(ExitCode::SUCCESS)
}

/// The profile that the daemon has of an image.
async fn get(
    daemon: &mut api::control_client::ControlClient<tonic::transport::Channel>,
    image: &str,
) -> anyhow::Result<(api::StoredProfile, Profile)> {
    // As the daemon has it: with the registry and the tag that people leave out.
    let image = match image.parse::<sluice_oci::Reference>() {
        Ok(reference) if image.parse::<sluice_oci::Digest>().is_err() => reference.to_string(),
        _ => image.to_owned(),
    };
    let answer = daemon.get_profile(api::GetProfileRequest { image }).await;
    let answer = answer.map_err(|status| control::failed(&status))?;
    let answer = answer.into_inner();
    let profile = Profile::parse(&answer.document).context("the daemon sent no profile")?;
    Ok((answer.stored.unwrap_or_default(), profile))
}

/// A profile in a file.
pub(crate) fn read(path: &Path) -> anyhow::Result<Profile> {
    let mut document = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_BYTES as u64 + 1).read_to_end(&mut document))
        .with_context(|| format!("cannot read the profile {}", path.display()))?;
    Profile::parse(&document).with_context(|| path.display().to_string())
}

/// Writes the whole file or leaves what was there.
fn write(path: &Path, profile: &Profile) -> anyhow::Result<()> {
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    let written = tempfile::NamedTempFile::new_in(directory).and_then(|mut file| {
        use std::os::unix::fs::PermissionsExt as _;
        writeln!(file, "{}", profile.to_json())?;
        let mode = std::fs::Permissions::from_mode(0o644);
        file.as_file().set_permissions(mode)?;
        file.persist(path).map_err(|error| error.error)
    });
    written.with_context(|| format!("cannot write the profile {}", path.display()))?;
    Ok(())
}
