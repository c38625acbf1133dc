//! Docker's configuration file (`config.json`) and credential helpers.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::printable;

/// A configuration file larger than this is not one.
const MAX_FILE: u64 = 4 << 20;
/// What a helper may print.
const MAX_ANSWER: u64 = 64 << 10;
/// A helper that waits for a person would block a daemon for ever.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

/// What to authenticate with. `Debug` shows no secret.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    Password {
        user: String,
        password: String,
    },
    /// An OAuth2 refresh token.
    Identity(String),
    /// A token to send as it is.
    Registry(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(..)",
            Self::Identity(_) => "Identity(..)",
            Self::Registry(_) => "Registry(..)",
        })
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct File {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// The credentials for `repository` on `host` from the first of `paths` that
/// has some, or why one of them cannot be used.
pub(crate) async fn find(
    paths: &[PathBuf],
    host: &str,
    repository: &str,
) -> Result<Option<Credentials>, String> {
    for path in paths {
        let found = find_in(path, host, repository)
            .await
            .map_err(|why| format!("{}: {why}", path.display()))?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

async fn find_in(path: &Path, host: &str, repository: &str) -> Result<Option<Credentials>, String> {
    let Some(file) = read(path).await? else {
        return Ok(None);
    };
    let names = server_names(host);
    if let Some((server, helper)) = names
        .iter()
        .find_map(|name| Some((name, file.cred_helpers.get(name)?)))
    {
        return ask_helper(&program(helper)?, server).await;
    }
    if let Some(entry) = matching_entry(&file, &names, repository) {
        let credentials = entry.credentials()?;
        if credentials.is_some() {
            return Ok(credentials);
        }
    }
    match &file.creds_store {
        Some(store) if !store.is_empty() => ask_helper(&program(store)?, &names[0]).await,
        _ => Ok(None),
    }
}

async fn read(path: &Path) -> Result<Option<File>, String> {
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE)
        .read_to_end(&mut bytes)
        .await
        .map_err(|error| error.to_string())?;
    parse(&bytes).map(Some)
}

fn parse(bytes: &[u8]) -> Result<File, String> {
    // The position alone: the text of a JSON error can quote the value.
    serde_json::from_slice(bytes).map_err(|error| {
        format!(
            "it is not a Docker configuration (line {}, column {})",
            error.line(),
            error.column()
        )
    })
}

/// What a file alone says, without the helpers that it names.
#[cfg(any(test, fuzzing))]
pub(super) fn in_file(
    bytes: &[u8],
    host: &str,
    repository: &str,
) -> Result<Option<Credentials>, String> {
    let file = parse(bytes)?;
    let names = server_names(host);
    for helper in names.iter().filter_map(|name| file.cred_helpers.get(name)) {
        program(helper)?;
    }
    match matching_entry(&file, &names, repository) {
        Some(entry) => entry.credentials(),
        None => Ok(None),
    }
}

/// The names under which credentials for `host` are kept, the usual first.
fn server_names(host: &str) -> Vec<String> {
    let mut names = Vec::new();
    if matches!(
        host,
        "docker.io" | "index.docker.io" | "registry-1.docker.io"
    ) {
        names.push("https://index.docker.io/v1/".to_owned());
        names.push("docker.io".to_owned());
        names.push("index.docker.io".to_owned());
        names.push("registry-1.docker.io".to_owned());
    } else {
        names.push(host.to_owned());
    }
    names
}

/// The entry for the longest prefix of `host/repository`, as podman writes
/// them; Docker's have the host alone, or a URL.
fn matching_entry<'a>(file: &'a File, names: &[String], repository: &str) -> Option<&'a Entry> {
    let mut best: Option<(usize, &Entry)> = None;
    for (key, entry) in &file.auths {
        let bare = key
            .strip_prefix("https://")
            .or_else(|| key.strip_prefix("http://"));
        let (server, path) = match (bare, key.split_once('/')) {
            // A URL names a server; its path is that of an API version.
            (Some(bare), _) => (bare.split('/').next().unwrap_or(bare), ""),
            (None, Some((server, path))) => (server, path.trim_end_matches('/')),
            (None, None) => (key.as_str(), ""),
        };
        let here = names.iter().any(|name| name == key || name == server);
        let covers = path.is_empty()
            || repository == path
            || repository
                .strip_prefix(path)
                .is_some_and(|rest| rest.starts_with('/'));
        if here && covers && best.is_none_or(|(length, _)| path.len() >= length) {
            best = Some((path.len(), entry));
        }
    }
    best.map(|(_, entry)| entry)
}

impl Entry {
    fn credentials(&self) -> Result<Option<Credentials>, String> {
        let set = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = set(&self.identitytoken) {
            return Ok(Some(Credentials::Identity(token)));
        }
        if let Some(token) = set(&self.registrytoken) {
            return Ok(Some(Credentials::Registry(token)));
        }
        if let Some(auth) = set(&self.auth) {
            let decoded = base64::engine::general_purpose::STANDARD
                .decode(auth.trim())
                .ok()
                .and_then(|bytes| String::from_utf8(bytes).ok());
            let Some((user, password)) = decoded.as_deref().and_then(|text| text.split_once(':'))
            else {
                return Err("an 'auth' value is not the base64 of user:password".to_owned());
            };
            return Ok(Some(Credentials::Password {
                user: user.to_owned(),
                // Docker pads with NULs.
                password: password.trim_end_matches('\0').to_owned(),
            }));
        }
        match (set(&self.username), set(&self.password)) {
            (Some(user), Some(password)) => Ok(Some(Credentials::Password { user, password })),
            _ => Ok(None),
        }
    }
}

/// The program behind a helper's name.
fn program(helper: &str) -> Result<String, String> {
    if helper.contains('/') {
        return Err(format!(
            "'{}' is no name of a helper",
            printable(helper, 50)
        ));
    }
    Ok(format!("docker-credential-{helper}"))
}

/// Runs `docker-credential-<helper> get`.
async fn ask_helper(program: &str, server: &str) -> Result<Option<Credentials>, String> {
    let run = run_helper(program, server);
    let (ok, output) = tokio::time::timeout(HELPER_TIMEOUT, run)
        .await
        .map_err(|_| format!("{program} gave no answer for {server}"))?
        .map_err(|error| format!("{program} cannot be run ({error}); is it in PATH?"))?;
    if !ok {
        // Every helper says this in the same words.
        let text = String::from_utf8_lossy(&output);
        if text.contains("credentials not found") {
            return Ok(None);
        }
        let text = printable(&text, 200);
        return Err(format!("{program} failed for {server} ({text})"));
    }
    let answer: HelperAnswer = serde_json::from_slice(&output)
        .map_err(|_| format!("{program} printed no credentials for {server}"))?;
    if answer.secret.is_empty() {
        return Ok(None);
    }
    Ok(Some(if answer.username == "<token>" {
        Credentials::Identity(answer.secret)
    } else {
        Credentials::Password {
            user: answer.username,
            password: answer.secret,
        }
    }))
}

async fn run_helper(program: &str, server: &str) -> std::io::Result<(bool, Vec<u8>)> {
    let mut child = tokio::process::Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that does not read is judged by its answer.
        let _ = stdin.write_all(server.as_bytes()).await;
    }
    let mut output = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(MAX_ANSWER).read_to_end(&mut output).await?;
    }
    Ok((child.wait().await?.success(), output))
}

#[cfg(test)]
mod tests;
