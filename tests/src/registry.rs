//! A private registry: Debian's docker-registry.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};

use sluice_oci::Manifest;

use crate::command::{run, text, wait_for};
use crate::link::Link;
use crate::scratch::{Process, Scratch};
use crate::tls::Identity;
use crate::tools::push_dir;

/// The one account of a registry with a password.
pub const USER: &str = "sluice";
/// Its password.
pub const PASSWORD: &str = "secret";
/// The account as an htpasswd line (bcrypt is the only form it takes).
const HTPASSWD: &str = "sluice:$2y$05$KaeO666nai22X9LEUuoBQ.suB0DifaRy9EllsFEUk3tguwuiQIKle\n";

/// A running registry.
pub struct Registry {
    scratch: Scratch,
    dir: PathBuf,
    host: String,
    process: Mutex<Process>,
}

/// Who gets in, and how.
enum Access {
    Open,
    Password,
    Tls(Identity),
}

impl Registry {
    /// On loopback, open to everyone.
    pub fn start(scratch: &Scratch) -> Result<Self> {
        Self::start_on_loopback(scratch, &Access::Open)
    }

    /// On loopback, for [`USER`] alone.
    pub fn start_with_password(scratch: &Scratch) -> Result<Self> {
        Self::start_on_loopback(scratch, &Access::Password)
    }

    /// On loopback, by TLS and HTTP/2 for those who trust its authority. (The
    /// tools that push here ask for no certificate.)
    pub fn start_with_tls(scratch: &Scratch) -> Result<(Self, Identity)> {
        let identity = Identity::make(&scratch.fresh_dir("identity")?)?;
        let access = Access::Tls(identity.clone());
        Ok((Self::start_on_loopback(scratch, &access)?, identity))
    }

    fn start_on_loopback(scratch: &Scratch, access: &Access) -> Result<Self> {
        // Another process may take the port between the two binds: try again.
        let mut last = None;
        for _ in 0..5 {
            let port = free_port()?;
            let start = Command::new("docker-registry");
            match Self::start_at(scratch, start, Ipv4Addr::LOCALHOST, port, access) {
                Ok(registry) => return Ok(registry),
                Err(error) => last = Some(error),
            }
        }
        Err(last.context("no attempt was made")?)
    }

    /// At the far end of a link.
    pub fn start_behind(scratch: &Scratch, link: &Link) -> Result<Self> {
        let start = link.far_command("docker-registry");
        Self::start_at(scratch, start, link.far_address(), 5000, &Access::Open)
    }

    fn start_at(
        scratch: &Scratch,
        command: Command,
        address: Ipv4Addr,
        port: u16,
        access: &Access,
    ) -> Result<Self> {
        let dir = scratch.fresh_dir("registry")?;
        let host = format!("{address}:{port}");
        let mut config = format!(
            "version: 0.1\n\
             log: {{level: warn}}\n\
             storage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\n\
             http:\n  addr: \"{host}\"\n",
            dir.join("storage").display()
        );
        match access {
            Access::Open => {}
            Access::Password => {
                let file = dir.join("htpasswd");
                fs::write(&file, HTPASSWD)?;
                config += &format!(
                    "auth:\n  htpasswd: {{realm: test, path: {}}}\n",
                    file.display()
                );
            }
            Access::Tls(identity) => {
                config += &format!(
                    "  tls: {{certificate: {}, key: {}}}\n",
                    identity.certificate.display(),
                    identity.key.display()
                );
            }
        }
        fs::write(dir.join("config.yml"), config)?;
        Ok(Self {
            process: Mutex::new(launch(scratch, &dir, command, &host)?),
            scratch: scratch.clone(),
            host,
            dir,
        })
    }

    /// Starts it again at the same address, with what it has stored, after
    /// its process has ended. On loopback only.
    pub fn start_again(&self) -> Result<()> {
        let process = wait_for("the registry's port", || {
            let command = Command::new("docker-registry");
            // Somebody may have the port for a moment, as one end of a
            // connection.
            Ok(launch(&self.scratch, &self.dir, command, &self.host).ok())
        })?;
        *self.process.lock().unwrap_or_else(PoisonError::into_inner) = process;
        Ok(())
    }

    /// Host and port, as references name it.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// A reference to an image of this registry.
    pub fn reference(&self, image: &str) -> String {
        format!("{}/{image}", self.host)
    }

    /// The process.
    pub fn process(&self) -> Process {
        let process = self.process.lock();
        process.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The file that holds a blob or manifest, by digest `sha256:<hex>`:
    /// `<two digits>/<hex>/data` below [`Self::blobs_dir`].
    pub fn blob_file(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
        self.blobs_dir().join(&hex[..2]).join(hex).join("data")
    }

    /// Where its blobs are.
    pub fn blobs_dir(&self) -> PathBuf {
        self.dir.join("storage/docker/registry/v2/blobs/sha256")
    }

    /// The manifest of an image of this registry.
    pub fn manifest(&self, reference: &str) -> Result<Manifest> {
        let text = text(
            Command::new("skopeo")
                .args(["--insecure-policy", "inspect", "--raw"])
                .arg("--tls-verify=false")
                .arg(format!("docker://{reference}")),
        )?;
        serde_json::from_str(&text).with_context(|| format!("{reference} has no plain manifest"))
    }

    /// Gives an image of this registry a second name, with another manifest
    /// over the same blobs.
    pub fn push_changed(
        &self,
        scratch: &Scratch,
        reference: &str,
        image: &str,
        change: impl FnOnce(&mut Manifest),
    ) -> Result<String> {
        let dir = scratch.fresh_dir("changed")?;
        let changed = self.reference(image);
        run(Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet"])
            .args(["--src-tls-verify=false", "--preserve-digests"])
            .arg(format!("docker://{reference}"))
            .arg(format!("dir:{}", dir.display())))?;
        let file = dir.join("manifest.json");
        let mut manifest: Manifest = serde_json::from_slice(&fs::read(&file)?)?;
        change(&mut manifest);
        fs::write(&file, serde_json::to_vec(&manifest)?)?;
        push_dir(&dir, &changed)?;
        Ok(changed)
    }

    /// Pushes an image of an OCI layout as it is, without any tool under test.
    pub fn push(&self, layout: &Path, tag: &str, image: &str) -> Result<String> {
        let reference = self.reference(image);
        run(Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--all", "--quiet"])
            .arg("--dest-tls-verify=false")
            .arg(format!("oci:{}:{tag}", layout.display()))
            .arg(format!("docker://{reference}")))?;
        Ok(reference)
    }
}

fn launch(scratch: &Scratch, dir: &Path, mut command: Command, host: &str) -> Result<Process> {
    command.arg("serve").arg(dir.join("config.yml"));
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let process = scratch.spawn(&name, command)?;
    wait_for("the registry", || {
        if !process.is_running() {
            bail!("docker-registry ended: {}", process.log());
        }
        Ok(TcpStream::connect(host).ok())
    })?;
    Ok(process)
}

/// A loopback port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}
