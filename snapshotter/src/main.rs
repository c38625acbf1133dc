//! The daemon `sluice-snapshotter`: arguments, logging, signals.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use sluice_snapshotter::config::Config;
use sluice_snapshotter::daemon;
use sluice_snapshotter::notify::Notifier;
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
    /// Serves containerd until SIGTERM or SIGINT.
    Serve(Serve),
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

fn main() -> ExitCode {
    let Command::Serve(arguments) = Cli::parse().command;
    match serve(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sluice-snapshotter: {}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: Serve) -> anyhow::Result<()> {
    let config = configuration(&arguments)?;
    log(arguments.log_level.or_else(|| config.log_level.clone()))?;
    let notifier = Notifier::new(std::env::var_os("NOTIFY_SOCKET").as_deref())
        .context("NOTIFY_SOCKET is no socket's name")?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start threads")?;
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
        let stop = async move { first(&mut terminate, &mut interrupt).await };
        daemon::run(config, notifier, stop).await?;
        Ok(())
    });
    // A call that hangs on a disk or a registry must not hold the process.
    runtime.shutdown_background();
    result
}

async fn first(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// The file, and over it the command line.
fn configuration(arguments: &Serve) -> anyhow::Result<Config> {
    let mut config = match &arguments.config {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
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
