//! Running commands so that a failure says what failed and why.

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

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

/// Runs what must fail as a person can use it: exit code 1, and as the last
/// words one line of the program's that holds all `parts`. Returns the line.
pub fn refusal_in_one_line(command: &mut Command, parts: &[&str]) -> Result<String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", show(command)))?;
    // One that does what it should refuse may go on for ever.
    let ended = wait_for("a refusal", || Ok(child.try_wait()?));
    if ended.is_err() {
        child.kill()?;
    }
    let output = child.wait_with_output()?;
    ended?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let shown = show(command);
    ensure!(
        output.status.code() == Some(1),
        "{shown} ended with {}:\n{said}",
        output.status
    );
    let is_error =
        |line: &&str| line.starts_with("sluice: ") || line.starts_with("sluice-snapshotter: ");
    let line = said.lines().next_back().unwrap_or_default();
    ensure!(
        is_error(&line) && said.lines().filter(is_error).count() == 1,
        "{shown} said more or less than one line:\n{said}"
    );
    for part in parts {
        ensure!(line.contains(part), "{shown}: '{part}' is not in: {line}");
    }
    Ok(line.to_owned())
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
