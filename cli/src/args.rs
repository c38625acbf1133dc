//! The command line. Each subcommand's own module runs it.

use clap::{Args, Parser, Subcommand};

/// Build and inspect container images that start before they are downloaded.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, max_term_width = 100)]
#[command(
    after_help = "An image is a registry reference (ubuntu:24.04, registry.example/app@sha256:…) \
or an OCI layout directory (oci:DIR or oci:DIR:TAG)."
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show an image's manifest, platforms and layers, and which layers can be loaded lazily.
    Inspect(Inspect),
}

/// How to reach registries; shared by every subcommand that does.
#[derive(Debug, Args)]
pub(crate) struct RegistryArgs {
    /// Speak plain HTTP to the registries named on this command line. Loopback registries need
    /// no flag.
    #[arg(long)]
    pub(crate) plain_http: bool,
}

/// Arguments of `sluice inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sluice inspect registry.example/app:v1
  sluice inspect --json oci:./layout:v1")]
pub(crate) struct Inspect {
    /// The image: a registry reference or oci:DIR[:TAG].
    pub(crate) image: sluice_converter::Location,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}
