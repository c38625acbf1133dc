//! The daemon `sluice-snapshotter`: arguments, logging, signals.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use sluice_snapshotter::cleanup;
use sluice_snapshotter::config::Config;
use sluice_snapshotter::daemon::{self, Stop};
use sluice_snapshotter::keeper::{Keeper, supervise};
use sluice_snapshotter::scrub;
use sluice_snapshotter::socket::{self, Root};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// containerd's snapshotter for images that start before they are downloaded.
#[derive(Debug, Parser)]
#[command(name = "sluice-snapshotter", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves containerd until SIGTERM or SIGINT. SIGTERM leaves mounts to the
    /// next process when a service manager keeps them; SIGINT unmounts.
    Serve(Serve),
    /// Runs `serve`, keeps its mounts alive, and starts it again when it dies
    /// or on SIGHUP, with whatever program is then in its place. For machines
    /// without systemd.
    Supervise(Supervise),
    /// Reads all that is kept of lazily mounted layers, compares it with its
    /// digests, and has fetched again what is wrong. A running daemon does it
    /// itself. Exit code 1 says that something could not be checked.
    Scrub(Scrub),
    /// Unmounts what a stopped daemon has left mounted, and says what still
    /// uses the rest.
    Cleanup(Cleanup),
}

#[derive(Debug, Args)]
struct Supervise {
    /// `serve` and its arguments.
    #[arg(last = true, value_name = "SERVE...")]
    serve: Vec<OsString>,
}

#[derive(Debug, Args)]
struct Cleanup {
    /// The configuration file, for its root directory.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where snapshots and layers are kept [default: /var/lib/sluice].
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Detach what is in use, too: whoever uses it gets errors.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct Scrub {
    /// The configuration file, for its root directory and socket.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where snapshots and layers are kept [default: /var/lib/sluice].
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// The socket of a running daemon [default: /run/sluice/snapshotter.sock].
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Serve {
    /// The configuration file. Without one, everything has its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where snapshots and layers are kept [default: /var/lib/sluice].
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// The socket for containerd [default: /run/sluice/snapshotter.sock].
    #[arg(long, value_name = "SOCKET")]
    address: Option<PathBuf>,
    /// What is logged: error, warn, info, debug or trace, or a filter as in
    /// RUST_LOG, which it precedes [default: info].
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
}

pub(crate) fn main() -> ExitCode {
    // Before anything else opens or starts anything.
    let keeper = Keeper::from_environment();
    let result = match Cli::parse().command {
        Command::Serve(arguments) => keeper
            .map_err(anyhow::Error::from)
            .and_then(|keeper| serve(arguments, keeper)),
        Command::Supervise(arguments) => supervise(arguments),
        Command::Cleanup(arguments) => cleanup(&arguments),
        Command::Scrub(arguments) => scrub(&arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sluice-snapshotter: {}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: Serve, keeper: Keeper) -> anyhow::Result<ExitCode> {
    // Whatever the daemon makes is root's alone; what containers see of it has
    // its own modes.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let config = configuration(&arguments)?;
    log(arguments.log_level.or_else(|| config.log_level.clone()))?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
        let stop = async move { first(&mut terminate, &mut interrupt).await };
        daemon::run(config, Arc::new(keeper), stop).await?;
        Ok(ExitCode::SUCCESS)
    });
    // A call that hangs on a disk or a registry must not hold the process.
    runtime.shutdown_background();
    result
}

async fn first(terminate: &mut Signal, interrupt: &mut Signal) -> Stop {
    tokio::select! {
        _ = terminate.recv() => Stop::HandOver,
        _ = interrupt.recv() => Stop::End,
    }
}

fn supervise(arguments: Supervise) -> anyhow::Result<ExitCode> {
    log(None)?;
    let args = match &arguments.serve[..] {
        [] => vec!["serve".into()],
        [command, ..] if command == "serve" => arguments.serve,
        [other, ..] => anyhow::bail!(
            "'{}' is not supervised, only 'serve' is: sluice-snapshotter supervise -- serve ...",
            other.display()
        ),
    };
    let program = program()?;
    Ok(supervise::run(supervise::Options { program, args })?)
}

/// The path by which this program was called, so that another program put in
/// its place is found there.
fn program() -> anyhow::Result<PathBuf> {
    let called = std::env::args_os().next().map(PathBuf::from);
    let called = called.unwrap_or_default();
    if called.components().count() > 1 {
        return std::path::absolute(&called).context("cannot find this program");
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|directory| directory.join(&called))
        .find(|candidate| candidate.is_absolute() && candidate.is_file());
    match found {
        Some(found) => Ok(found),
        None => std::env::current_exe().context("cannot find this program"),
    }
}

fn cleanup(arguments: &Cleanup) -> anyhow::Result<ExitCode> {
    log(None)?;
    let config = load(arguments.config.as_deref())?;
    let root = arguments.root.as_ref().unwrap_or(&config.root);
    let report = cleanup::run(root, arguments.force)?;
    print!("{report}");
    Ok(match report.left.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn scrub(arguments: &Scrub) -> anyhow::Result<ExitCode> {
    log(Some("error".to_owned()))?;
    let config = load(arguments.config.as_deref())?;
    let root = arguments.root.as_ref().unwrap_or(&config.root);
    let address = arguments.address.as_ref().unwrap_or(&config.address);
    let (mut layers, mut failed) = (0, false);
    let each = |report: scrub::Report| {
        layers += 1;
        failed |= report.failed.is_some();
        println!("{report}");
    };
    anyhow::ensure!(
        root.is_dir(),
        "there is no root directory {}",
        root.display()
    );
    match Root::take(root) {
        Ok(_taken) => scrub::run(root, each)?,
        Err(socket::Error::RootInUse { .. }) => tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start")?
            .block_on(scrub::ask(address, each))?,
        Err(error) => return Err(error.into()),
    }
    if layers == 0 {
        println!("there is no layer");
    }
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn load(path: Option<&Path>) -> anyhow::Result<Config> {
    Ok(match path {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    })
}

/// The file, and over it the command line.
fn configuration(arguments: &Serve) -> anyhow::Result<Config> {
    let mut config = load(arguments.config.as_deref())?;
    if let Some(root) = &arguments.root {
        config.root.clone_from(root);
    }
    if let Some(address) = &arguments.address {
        config.address.clone_from(address);
    }
    if config.registry.docker_configs.is_empty() {
        config.registry.docker_configs = docker_configs();
    }
    Ok(config)
}

/// Where credentials usually are: the operator's, then the kubelet's.
fn docker_configs() -> Vec<PathBuf> {
    let operators = match (std::env::var_os("DOCKER_CONFIG"), std::env::home_dir()) {
        (Some(directory), _) => Some(PathBuf::from(directory)),
        (None, Some(home)) => Some(home.join(".docker")),
        (None, None) => None,
    };
    operators
        .map(|directory| directory.join("config.json"))
        .into_iter()
        .chain([PathBuf::from("/var/lib/kubelet/config.json")])
        .collect()
}

fn log(level: Option<String>) -> anyhow::Result<()> {
    let (filter, origin) = match (level, std::env::var("RUST_LOG")) {
        (Some(level), _) => (level, "the log level"),
        (None, Ok(filter)) if !filter.is_empty() => (filter, "RUST_LOG"),
        _ => ("info".to_owned(), "the log level"),
    };
    let filter = EnvFilter::try_new(&filter)
        .with_context(|| format!("{origin} '{filter}' is neither a level nor a filter"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
    Ok(())
}

/// One line with every cause that the one before it does not already tell.
fn describe(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
