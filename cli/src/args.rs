//! The command line. Each subcommand's own module runs it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use sluice_converter::Location;
use sluice_oci::{Platform, Reference};

/// Build and inspect container images that start before they are downloaded.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, max_term_width = 100)]
#[command(
    after_help = "An image is a registry reference (ubuntu:24.04, registry.example/app@sha256:…) \
or an OCI layout directory (oci:DIR or oci:DIR:TAG).\n\
Credentials are those of 'docker login'. Exit code: 0 success, 1 failure, 2 wrong usage."
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Rewrite an image's layers so that containers start before they are downloaded.
    Convert(Convert),
    /// Show an image's manifest, platforms and layers, and which layers can be loaded lazily.
    Inspect(Inspect),
    /// Mount an image read-only, without containerd and without downloading it.
    Mount(Box<Mount>),
    /// Record, look at, merge and move profiles: what images read while they start.
    #[command(subcommand)]
    Profile(Profile),
    /// Pull an image into containerd, without downloading the layers that can be loaded lazily.
    Pull(Box<Pull>),
    /// Show what the daemon on this node holds, fetches and waits for.
    Status(Status),
    /// The same, again and again, with rates.
    Top(Top),
    /// Check every blob, table of contents and chunk of an image against its digest.
    Verify(Verify),
}

/// How to reach registries; shared by every subcommand that does.
#[derive(Debug, Args)]
pub(crate) struct RegistryArgs {
    /// Speak plain HTTP to the registries named on this command line. Loopback registries need
    /// no flag.
    #[arg(long)]
    pub(crate) plain_http: bool,
    /// Directory with hosts.toml files, which name mirrors of registries, such as
    /// /etc/containerd/certs.d. May be given several times.
    #[arg(long, value_name = "DIR")]
    pub(crate) hosts_dir: Vec<PathBuf>,
}

/// The formats of a lazily loadable layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// gzip; every runtime reads it
    Estargz,
    /// Zstandard; smaller and faster, for containerd 1.5, Docker 23, podman 4 or later
    ZstdChunked,
}

/// Where large files are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ChunkingArg {
    /// at multiples of the chunk size
    Fixed,
    /// where the content says so: what is inserted changes only the chunks around it, so that a
    /// node that has one version of a large file fetches little of the next
    Content,
}

/// Arguments of `sluice convert`.
#[derive(Debug, Args)]
#[command(after_help = "\
The result is an ordinary OCI image. Indexes stay indexes; attestations are copied. Layers that
are lazily loadable in the wanted format already are kept as they are, unless --force,
--prioritize or --profile is given. Nothing is visible at DST before everything is there.

Examples:
  sluice convert ubuntu:24.04 registry.example/ubuntu:24.04-lazy
  sluice convert --format zstd-chunked --platform linux/amd64 oci:in:v1 oci:out:v1
  sluice convert --prioritize startup.txt app:v1 127.0.0.1:5000/app:v1
  sluice convert --profile app.json app:v1 127.0.0.1:5000/app:v1-fast")]
pub(crate) struct Convert {
    /// The image to convert: a registry reference or oci:DIR[:TAG].
    #[arg(value_name = "SRC")]
    pub(crate) source: Location,
    /// Where to write the result: a registry reference or oci:DIR[:TAG].
    #[arg(value_name = "DST")]
    pub(crate) destination: Location,
    /// Format of the layers.
    #[arg(long, value_enum, default_value = "estargz")]
    pub(crate) format: FormatArg,
    /// Image of an index to keep and convert, as os/architecture[/variant], or 'all'. May be
    /// given several times.
    #[arg(long, value_name = "PLATFORM", default_value = "all")]
    pub(crate) platform: Vec<String>,
    /// Largest chunk in bytes, or with the suffix K or M; with --chunking content the average, up
    /// to 4M. Smaller chunks mean less to fetch for a small read and a larger image. Files that
    /// would have more than 16384 chunks get larger ones, up to 4M [default: 64K].
    #[arg(long, value_name = "N", value_parser = chunk_size)]
    pub(crate) chunk_size: Option<u64>,
    /// Where files that are larger than a chunk are cut.
    #[arg(long, value_enum, default_value = "fixed")]
    pub(crate) chunking: ChunkingArg,
    /// Compression level: 1 to 12 for estargz, 1 to 22 for zstd-chunked [default: 5 and 6].
    #[arg(long, value_name = "N")]
    pub(crate) level: Option<i32>,
    /// File that lists, a path a line, what a container reads while it starts. These files come
    /// first in their layers and are fetched ahead.
    #[arg(long, value_name = "FILE")]
    pub(crate) prioritize: Option<PathBuf>,
    /// Profile of the image, or of one with the same files ('sluice profile export'): the files
    /// that it names come first, in the order of first need.
    #[arg(long, value_name = "FILE", conflicts_with = "prioritize")]
    pub(crate) profile: Option<PathBuf>,
    /// Convert layers that are lazily loadable already, too.
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// Arguments of `sluice inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sluice inspect registry.example/app:v1
  sluice inspect --json oci:./layout:v1")]
pub(crate) struct Inspect {
    /// The image: a registry reference or oci:DIR[:TAG].
    pub(crate) image: Location,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// How a layer becomes a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum MountMode {
    /// by the kernel's EROFS (Linux 6.12)
    Erofs,
    /// by FUSE alone
    Fuse,
}

/// Arguments of `sluice mount`.
#[derive(Debug, Args)]
#[command(after_help = "\
Stays in the foreground; Ctrl-C unmounts. Only what is read is downloaded. Every layer has to be
lazily loadable: convert the image with 'sluice convert' if one is not. Needs root.

Examples:
  sluice mount registry.example/app:v1 /mnt
  sluice mount --root /var/cache/app registry.example/app:v1 /mnt")]
pub(crate) struct Mount {
    /// The image, in a registry.
    pub(crate) image: Reference,
    /// An existing directory that will show it.
    #[arg(value_name = "DIR")]
    pub(crate) directory: PathBuf,
    /// How layers are mounted; what the kernel can do best by default.
    #[arg(long, value_enum)]
    pub(crate) mode: Option<MountMode>,
    /// Keep what is downloaded here, also for the next time; by default it goes with the mount.
    #[arg(long, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// The platform to mount, as OS/ARCHITECTURE[/VARIANT]; this machine's by default.
    #[arg(long, value_name = "P")]
    pub(crate) platform: Option<Platform>,
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
    #[arg(long, value_name = "P")]
    pub(crate) platform: Option<Platform>,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// Where the daemon is; shared by every subcommand that asks it.
#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// The daemon's socket.
    #[arg(
        long,
        value_name = "SOCKET",
        default_value = "/run/sluice/snapshotter.sock"
    )]
    pub(crate) address: PathBuf,
}

/// Arguments of `sluice status`.
#[derive(Debug, Args)]
#[command(after_help = "\
PRESENT is the part of the chunks that is on this node; HITS is the part of the reads that came to
the daemon and found their bytes there. What the kernel answers from its own memory is in neither.
FETCHED counts compressed bytes; REUSED, uncompressed, what other layers of this node had already.

Examples:
  sluice status
  sluice status --json")]
pub(crate) struct Status {
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
    /// Print JSON instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `sluice top`.
#[derive(Debug, Args)]
#[command(after_help = "Ctrl-C ends it. What is not a terminal gets one page after another.")]
pub(crate) struct Top {
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) interval: u64,
    /// One page, over one interval.
    #[arg(long)]
    pub(crate) once: bool,
}

/// The subcommands of `sluice profile`.
#[derive(Debug, Subcommand)]
#[command(after_help = "\
A profile says what a start reads, in the order in which it is first needed. The daemon records
one for each image by itself and uses it for the next start on the node; with these commands it
gets into the image, or to other nodes. docs/profiles.md describes the format.")]
pub(crate) enum Profile {
    /// Show a profile of this node or of a file; without either, list those of this node.
    Show(ProfileShow),
    /// Write a profile of this node as JSON.
    Export(ProfileExport),
    /// Give a profile to this node, in the place of its own.
    Import(ProfileImport),
    /// Forget a profile of this node.
    Clear(ProfileClear),
    /// Make one profile of several of the same image.
    Merge(ProfileMerge),
    /// Attach a profile to an image in its registry, where every node finds it. The image, its
    /// digest and its signatures stay as they are.
    Push(ProfilePush),
    /// Pull an image lazily, run it once, and write what it read.
    Record(Box<ProfileRecord>),
}

/// Arguments of `sluice profile show`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sluice profile show
  sluice profile show registry.example/app:v1
  sluice profile show --file app.json")]
pub(crate) struct ProfileShow {
    /// The image, as it was pulled, or the digest of its manifest.
    #[arg(value_name = "REF", conflicts_with = "file")]
    pub(crate) image: Option<String>,
    /// A profile in a file.
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
}

/// Arguments of `sluice profile push`.
#[derive(Debug, Args)]
#[command(after_help = "\
With --with-data the artifact carries the content of all that the profile names, in the order of
need: a start is then one long request, however many layers there are. Nodes check every byte of
it against the image, so it needs no trust.

Examples:
  sluice profile push registry.example/app:v1
  sluice profile push --profile app.json --with-data registry.example/app:v1")]
pub(crate) struct ProfilePush {
    /// The image, in its registry.
    #[arg(value_name = "REF")]
    pub(crate) image: Reference,
    /// The profile [default: the one that the daemon on this node has of the image].
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
    /// Carry the content as well.
    #[arg(long)]
    pub(crate) with_data: bool,
    /// How hard the content is compressed: a level of Zstandard.
    #[arg(long, value_name = "N", default_value_t = 17, requires = "with_data",
          value_parser = clap::value_parser!(i32).range(1..=22))]
    pub(crate) level: i32,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
}

/// Arguments of `sluice profile export`.
#[derive(Debug, Args)]
pub(crate) struct ProfileExport {
    /// The image, as it was pulled, or the digest of its manifest.
    #[arg(value_name = "REF")]
    pub(crate) image: String,
    /// Where to write it [default: standard output].
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
}

/// Arguments of `sluice profile import`.
#[derive(Debug, Args)]
pub(crate) struct ProfileImport {
    /// The image that it is of, for the list of profiles.
    #[arg(value_name = "REF")]
    pub(crate) image: Reference,
    /// The profile.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
}

/// Arguments of `sluice profile clear`.
#[derive(Debug, Args)]
pub(crate) struct ProfileClear {
    /// The image, as it was pulled, or the digest of its manifest.
    #[arg(value_name = "REF")]
    pub(crate) image: String,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
}

/// Arguments of `sluice profile merge`.
#[derive(Debug, Args)]
#[command(after_help = "\
What was read in fewer than a third of all starts is left out; the rest is in the order of the
median of its first needs.")]
pub(crate) struct ProfileMerge {
    /// Where to write the result.
    #[arg(value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// The profiles, all of one image.
    #[arg(value_name = "IN", required = true)]
    pub(crate) inputs: Vec<PathBuf>,
}

/// Arguments of `sluice profile record`.
#[derive(Debug, Args)]
#[command(after_help = "\
Needs containerd and the daemon on this machine. Only what the container reads is downloaded. Best
on a node that has not run the image before: what the kernel has in its memory is read unseen, and
the command says so. The container gets the default specification of 'ctr run', and is removed
together with what was pulled for it. With ARGS they replace the image's entrypoint and command.

Examples:
  sluice profile record -o app.json registry.example/app:v1
  sluice profile record -o py.json --seconds 30 registry.example/py:v1 -- python3 -c 'import numpy'")]
pub(crate) struct ProfileRecord {
    #[command(flatten)]
    pub(crate) pull: Pull,
    /// Where to write the profile.
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Stop the container after so many seconds; by default it runs to its end.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: Option<u64>,
    #[command(flatten)]
    pub(crate) daemon: DaemonArgs,
    /// What to run.
    #[arg(last = true)]
    pub(crate) args: Vec<String>,
}

/// Arguments of `sluice verify`.
#[derive(Debug, Args)]
#[command(after_help = "\
Prints a line for each defect and exits with 1 if there is one.

Examples:
  sluice verify registry.example/app:v1
  sluice verify oci:./layout:v1")]
pub(crate) struct Verify {
    /// The image: a registry reference or oci:DIR[:TAG].
    pub(crate) image: Location,
    #[command(flatten)]
    pub(crate) registry: RegistryArgs,
}

/// Readers refuse to decode more than 64 MiB for one chunk; half of that
/// leaves room for the headers that follow it.
const MAX_CHUNK: u64 = 32 << 20;
const MIN_CHUNK: u64 = 4 << 10;

fn chunk_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 10),
        None => match text.strip_suffix(['m', 'M']) {
            Some(digits) => (digits, 20),
            None => (text, 0),
        },
    };
    let size = digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift));
    match size {
        Some(size) if (MIN_CHUNK..=MAX_CHUNK).contains(&size) => Ok(size),
        Some(_) => Err("a chunk has 4K to 32M bytes".to_owned()),
        None => Err("write a number of bytes, for example 65536, 64K or 1M".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn chunk_sizes() {
        assert_eq!(chunk_size("65536"), Ok(65536));
        assert_eq!(chunk_size("64K"), Ok(65536));
        assert_eq!(chunk_size("4m"), Ok(4 << 20));
        for bad in ["", "K", "1", "33M", "-4K", "99999999999999999999", "4G"] {
            assert!(chunk_size(bad).is_err(), "{bad}");
        }
    }
}
