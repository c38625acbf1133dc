//! The command `sluice`: arguments, progress and printing. What it does is
//! in the libraries.

mod args;
mod control;
mod convert;
mod inspect;
mod mount;
mod profile;
mod progress;
mod pull;
mod registry;
mod status;
mod top;
mod verify;

use std::process::ExitCode;

use clap::Parser as _;

use args::{Cli, Command};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(cause) => return fail(&anyhow::Error::new(cause).context("cannot start threads")),
    };
    match runtime.block_on(run(cli.command)) {
        Ok(code) => code,
        Err(error) => fail(&error),
    }
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Convert(args) => convert::run(args).await,
        Command::Inspect(args) => inspect::run(args).await,
        Command::Mount(args) => mount::run(*args).await,
        Command::Profile(command) => profile::run(command).await,
        Command::Pull(args) => pull::run(*args).await,
        Command::Status(args) => status::run(args).await,
        Command::Top(args) => top::run(args).await,
        Command::Verify(args) => verify::run(args).await,
    }
}

/// One line that says what failed, and exit code 1. Code 2, for usage, is
/// clap's.
fn fail(error: &anyhow::Error) -> ExitCode {
    // Many errors tell their cause themselves.
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    let line = line.replace('\n', " ");
    eprintln!("sluice: {line}");
    ExitCode::FAILURE
}
