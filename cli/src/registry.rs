//! The registry client as the command line sets it up.

use std::path::PathBuf;

use sluice_oci::Reference;
use sluice_registry::{Client, Config, Error};

use crate::args::RegistryArgs;

/// A client for the registries of `references`, with the credentials of
/// `docker login` and `podman login`.
pub(crate) fn client<'a>(
    args: &RegistryArgs,
    references: impl IntoIterator<Item = &'a Reference>,
) -> Result<Client, Error> {
    let hosts = references
        .into_iter()
        .map(|reference| reference.host().to_owned());
    Client::new(Config {
        plain_http: hosts.filter(|_| args.plain_http).collect(),
        docker_configs: credential_files(),
        hosts_dirs: args.hosts_dir.clone(),
        ..Config::default()
    })
}

/// Where credentials may be, in the order in which they count.
fn credential_files() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let mut files = Vec::new();
    match variable("DOCKER_CONFIG") {
        Some(directory) => files.push(directory.join("config.json")),
        None => files.extend(variable("HOME").map(|home| home.join(".docker/config.json"))),
    }
    files.extend(variable("REGISTRY_AUTH_FILE"));
    files.extend(variable("XDG_RUNTIME_DIR").map(|run| run.join("containers/auth.json")));
    files
}
