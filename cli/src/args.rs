//! The command line. Each subcommand's own module runs it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use sluice_oci::{Platform, Reference};

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
    /// Pull an image into containerd, without downloading the layers that can be loaded lazily.
    Pull(Box<Pull>),
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

/// Arguments of `sluice pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sluice pull registry.example/app:v1
  ctr run --rm --snapshotter sluice registry.example/app:v1 app")]
pub(crate) struct Pull {
    /// The image, in a registry.
    pub(crate) image: Reference,
    /// containerd's socket.
    #[arg(
        long,
        value_name = "SOCKET",
        default_value = "/run/containerd/containerd.sock"
    )]
    pub(crate) containerd: PathBuf,
    /// containerd's namespace; Kubernetes uses k8s.io.
    #[arg(long, value_name = "NS", default_value = "default")]
    pub(crate) namespace: String,
    /// The snapshotter that gets the layers, by its name in containerd's configuration.
    #[arg(long, value_name = "NAME", default_value = "sluice")]
    pub(crate) snapshotter: String,
    /// The platform to pull, as OS/ARCHITECTURE[/VARIANT]; this machine's by default.
    #[arg(long, value_name = "P", value_parser = crate::pull::parse_platform)]
    pub(crate) platform: Option<Platform>,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}
