//! Running commands so that a failure says what failed and why.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Runs to the end; an exit status other than 0 is an error that holds what
/// the command wrote.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = attempt(command)?;
    if !output.status.success() {
        bail!(
            "{} ended with {}\n{}{}",
            show(command),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
    }
    Ok(output)
}

/// Runs to the end, whatever the exit status.
pub fn attempt(command: &mut Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", show(command)))
}

/// Runs to the end and returns standard output without the last line break.
pub fn text(command: &mut Command) -> Result<String> {
    let output = run(command)?;
    let text = String::from_utf8(output.stdout)
        .with_context(|| format!("{} wrote no UTF-8", show(command)))?;
    Ok(text.trim_end().to_owned())
}

/// Runs what must fail, and returns what it wrote to standard error.
pub fn refusal(command: &mut Command) -> Result<String> {
    let output = attempt(command)?;
    if output.status.success() {
        bail!(
            "{} should have failed, but wrote\n{}",
            show(command),
            String::from_utf8_lossy(&output.stdout)
        );
    }
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The command as one would type it, near enough.
pub fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Polls until `ready` answers something. The deadline only keeps a broken
/// test from hanging.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(300);
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(value) = ready().with_context(|| format!("waiting for {what}"))? {
            return Ok(value);
        }
        if Instant::now() > deadline {
            bail!("gave up waiting for {what}");
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}
